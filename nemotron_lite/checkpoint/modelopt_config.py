"""What a ModelOpt checkpoint says about itself, twice, and whether that is what it holds.

`hf_quant_config.json`, ModelOpt's own words:

    {"producer": {"name": "modelopt", …},
     "quantization": {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8",
                      "quantized_layers": {"backbone.layers.1.mixer.experts.0.up_proj":
                                               {"quant_algo": "NVFP4", "group_size": 16}, …}}}

With one format for all it is `"quant_algo": "NVFP4"` (or FP8), with `exclude_modules` naming what
is not quantized. `quantization_config` in config.json says the same in the words of llm-compressor:
`config_groups` of formats, an `ignore` list, `kv_cache_scheme`. Serving engines read one or the
other, so both are written.

Reading is strict about contradictions and lenient about silence: a module that is listed must be
stored as listed, and one that is excluded must not be quantized; a list that leaves out something
says nothing about it. Names may end in `*`, and a listed module covers what is inside it.

Source: reference sheet 10.3; ModelOpt's exporter. Left out: other algorithms, refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from nemotron_lite.checkpoint.modelopt import BLOCK, FP8, NVFP4, Quantized
from nemotron_lite.checkpoint.names import PREFIXES
from nemotron_lite.checkpoint.validation import read_json, some

FILE = "hf_quant_config.json"
KEY = "quantization_config"
MIXED = "MIXED_PRECISION"
PRODUCER = {"name": "modelopt"}  # whose layout this is; engines recognise it by this name
_GROUPS: dict[str, dict[str, Any]] = {
    FP8: {"dynamic": False, "num_bits": 8, "type": "float"},
    NVFP4: {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK},
}


class Declared(NamedTuple):
    """What one of the two places says."""

    where: str
    algo: str
    layers: dict[str, str]  # module (or pattern) -> algorithm
    excluded: list[str]


def check(
    folder: Path,
    hf: Mapping[str, Any],
    modules: Iterable[Quantized],
    plain: Iterable[str],
    problems: list[str],
) -> None:
    """Compare what is declared with what is stored.

    Args:
        folder: of the checkpoint.
        hf: its config.json.
        modules: quantized ones.
        plain: names of the tensors that are stored as floats.
        problems: receives every contradiction.
    """
    declared = _read(folder, hf, problems)
    modules = list(modules)
    if declared and not modules and not problems:
        places = " and ".join(each.where for each in declared)
        problems.append(
            f"{places} say that the weights are quantized ({declared[0].algo}), but none is: take "
            "files that belong together, or remove what is said there"
        )
    if modules and not declared and not problems:
        problems.append(
            f"{len(modules)} modules are quantized, such as {modules[0].module}, but neither "
            f"{FILE} nor {KEY} in config.json says so: copy the file that belongs to them"
        )
    if len({each.algo for each in declared}) > 1:
        algos = "; ".join(f"{each.where}: {each.algo}" for each in declared)
        problems.append(f"two places name different algorithms ({algos}); copy both files again")
    weights = {_plain(n.removesuffix(".weight")) for n in plain if n.endswith(".weight")}
    for each in declared:
        wrong = _contradictions(each, modules, weights)
        if wrong:
            problems.append(f"{each.where} contradicts what is stored: {some(wrong)}")


def _contradictions(declared: Declared, modules: list[Quantized], plain: set[str]) -> list[str]:
    wrong = []
    for module in modules:
        name = _plain(module.module)
        said = declared.layers.get(name) or _lookup(name, declared.layers)
        if said is not None and said != module.algo:
            wrong.append(f"{module.module} is {module.algo}, said is {said}")
        elif said is None and any(_covers(pattern, name) for pattern in declared.excluded):
            wrong.append(f"{module.module} is {module.algo}, said is not quantized")
        elif said is None and declared.algo not in (MIXED, module.algo):
            wrong.append(f"{module.module} is {module.algo}, said is {declared.algo}")
    wrong += [
        f"{name} is not quantized, said is {declared.layers[name]}"
        for name in sorted(plain & set(declared.layers))
    ]
    return wrong


def _lookup(name: str, layers: Mapping[str, str]) -> str | None:
    return next((algo for pattern, algo in layers.items() if _covers(pattern, name)), None)


def _covers(pattern: str, name: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def _plain(name: str) -> str:
    """A module's name without the prefix that writers spell differently."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _read(folder: Path, hf: Mapping[str, Any], problems: list[str]) -> list[Declared]:
    found: list[Declared | None] = []
    said = hf.get(KEY)
    if said:
        if not isinstance(said, Mapping):
            problems.append(f"{KEY} in config.json is {type(said).__name__}, not an object")
        elif (method := said.get("quant_method", "modelopt")) != "modelopt":
            problems.append(
                f"the weights are quantized with {method!r}; read is what modelopt writes. Take "
                "the BF16 release of the same model, or one in NVFP4 or FP8"
            )
        else:
            found.append(_declared(f"{KEY} in config.json", said, "ignore", problems))
    if (folder / FILE).exists():
        whole = read_json(folder / FILE, problems)
        inner = whole.get("quantization")
        if isinstance(inner, Mapping):
            found.append(_declared(FILE, inner, "exclude_modules", problems))
        else:
            problems.append(f'{FILE} has no object "quantization"; download or copy it again')
    return [each for each in found if each is not None]


def _declared(
    where: str, said: Mapping[str, Any], excluded: str, problems: list[str]
) -> Declared | None:
    algo = said.get("quant_algo")
    layers = said.get("quantized_layers") or {}
    left_out = said.get(excluded) or []
    before = len(problems)
    if algo not in (NVFP4, FP8, MIXED):
        problems.append(f"{where}: quant_algo is {algo!r}; read are {NVFP4}, {FP8} and {MIXED}")
    if not isinstance(left_out, list) or not all(isinstance(name, str) for name in left_out):
        problems.append(f"{where}: {excluded} is not a list of names")
    if not isinstance(layers, Mapping):
        problems.append(f"{where}: quantized_layers is {type(layers).__name__}, not an object")
        layers = {}
    named = {}
    for module, how in layers.items():
        kind = how.get("quant_algo") if isinstance(how, Mapping) else how
        size = how.get("group_size", BLOCK) if isinstance(how, Mapping) else BLOCK
        if kind not in (NVFP4, FP8):
            problems.append(f"{where}: {module} has quant_algo {kind!r}; read are {NVFP4}, {FP8}")
        elif kind == NVFP4 and size != BLOCK:
            problems.append(f"{where}: {module} has group_size {size!r}; NVFP4 has {BLOCK}")
        else:
            named[_plain(module)] = kind
    if len(problems) > before:
        return None
    return Declared(where, str(algo), named, [_plain(name) for name in left_out])


def describe(
    formats: Mapping[str, str], plain: Iterable[str], cache: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of `hf_quant_config.json` and of `quantization_config`.

    Args:
        formats: module -> NVFP4 or FP8, in the spelling of the files.
        plain: modules that are linear and stay as they are.
        cache: whether there are scales for an FP8 cache.
    """
    used = sorted(set(formats.values()), key=[FP8, NVFP4].index)
    algo = used[0] if len(used) == 1 else MIXED
    excluded = sorted(plain)
    layers: dict[str, dict[str, Any]] = {
        module: {"quant_algo": kind, **({"group_size": BLOCK} if kind == NVFP4 else {})}
        for module, kind in formats.items()
    }
    own: dict[str, Any] = {"quant_algo": algo}
    own["kv_cache_quant_algo"] = FP8 if cache else None
    if algo == MIXED:
        own["quantized_layers"] = layers
    else:
        if algo == NVFP4:
            own["group_size"] = BLOCK
        own["exclude_modules"] = excluded
    shared: dict[str, Any] = {
        "config_groups": {
            f"group_{i}": {
                "input_activations": _GROUPS[kind], "weights": _GROUPS[kind],
                "targets": [name for name, one in formats.items() if one == kind]
                if algo == MIXED else ["Linear"],
            }
            for i, kind in enumerate(used)
        },
        "ignore": excluded,
        "quant_algo": algo,
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }  # fmt: skip
    if algo == MIXED:
        shared["quantized_layers"] = layers
    if cache:
        shared["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return {"producer": PRODUCER, "quantization": own}, shared
