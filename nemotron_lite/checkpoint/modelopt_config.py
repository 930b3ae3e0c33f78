"""The two files in which a ModelOpt checkpoint declares its formats: reading, checking, writing.

`hf_quant_config.json`, in ModelOpt's own format:

    {"producer": {"name": "modelopt", …},
     "quantization": {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8",
                      "quantized_layers": {"backbone.layers.1.mixer.experts.0.up_proj":
                                               {"quant_algo": "NVFP4", "group_size": 16}, …}}}

If all modules have one format, it is `"quant_algo": "NVFP4"` (or FP8), and `exclude_modules` lists
the modules that are not quantized. `quantization_config` in config.json declares the same in the
format of llm-compressor: `config_groups`, an `ignore` list, and `kv_cache_scheme`. Some serving
engines read the first file and some the second, so both are written.

A declaration must not contradict the stored tensors: a listed module must be stored in the listed
format, and an excluded module must not be quantized. A module that is not mentioned may be stored
in any way. Names may end in `*`, and a listed module stands for all modules inside it.

Source: reference sheet 10.3; ModelOpt's exporter. Left out: other algorithms, which are refused
with an error that names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from nemotron_lite.checkpoint.modelopt import BLOCK, FP8, NVFP4, QuantizedModule
from nemotron_lite.checkpoint.names import PREFIXES
from nemotron_lite.checkpoint.validation import read_json, shorten

FILE = "hf_quant_config.json"
KEY = "quantization_config"
MIXED = "MIXED_PRECISION"
PRODUCER = {"name": "modelopt"}  # serving engines recognize the layout by this name
_GROUPS: dict[str, dict[str, Any]] = {
    FP8: {"dynamic": False, "num_bits": 8, "type": "float"},
    NVFP4: {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK},
}


class Declaration(NamedTuple):
    """What one of the two files declares."""

    source: str  # the file, for error messages
    algo: str
    layers: dict[str, str]  # module (or pattern) -> algorithm
    excluded: list[str]


def check(
    folder: Path,
    hf: Mapping[str, Any],
    modules: Iterable[QuantizedModule],
    float_tensors: Iterable[str],
    *,
    complete: bool,
) -> list[str]:
    """Compare the declarations with the stored tensors.

    Args:
        folder: the checkpoint folder.
        hf: its config.json.
        modules: the quantized modules in the files.
        float_tensors: names of the tensors that are stored as floats.
        complete: False if other problems were found. Then quantized modules or declarations may be
            absent because of these problems, and their absence is not reported.

    Returns:
        The problems: unreadable declarations and contradictions.
    """
    declarations, problems = _read(folder, hf)
    modules = list(modules)
    complete = complete and not problems
    if declarations and not modules and complete:
        sources = " and ".join(each.source for each in declarations)
        problems.append(
            f"{sources}: the weights are declared as quantized ({declarations[0].algo}), but no "
            "stored weight is. Take files that belong together, or remove the declaration"
        )
    if modules and not declarations and complete:
        problems.append(
            f"{len(modules)} modules are quantized, such as {modules[0].module}, but neither "
            f"{FILE} nor {KEY} in config.json declares it: copy the file that belongs to them"
        )
    if len({each.algo for each in declarations}) > 1:
        algos = "; ".join(f"{each.source}: {each.algo}" for each in declarations)
        problems.append(f"different algorithms are declared ({algos}); copy both files again")
    names = {_without_prefix(n.removesuffix(".weight")) for n in float_tensors if _is_weight(n)}
    for each in declarations:
        contradictions = _contradictions(each, modules, names)
        if contradictions:
            problems.append(
                f"{each.source} contradicts the stored tensors: {shorten(contradictions)}"
            )
    return problems


def _is_weight(name: str) -> bool:
    return name.endswith(".weight")


def _contradictions(
    declaration: Declaration, modules: list[QuantizedModule], float_modules: set[str]
) -> list[str]:
    found = []
    for module in modules:
        name = _without_prefix(module.module)
        declared = declaration.layers.get(name) or _lookup(name, declaration.layers)
        if declared is not None and declared != module.algo:
            found.append(f"{module.module} is stored as {module.algo}, declared as {declared}")
        elif declared is None and any(_covers(pattern, name) for pattern in declaration.excluded):
            found.append(f"{module.module} is stored as {module.algo}, declared as not quantized")
        elif declared is None and declaration.algo not in (MIXED, module.algo):
            found.append(
                f"{module.module} is stored as {module.algo}, declared as {declaration.algo}"
            )
    found += [
        f"{name} is not quantized, declared as {declaration.layers[name]}"
        for name in sorted(float_modules & set(declaration.layers))
    ]
    return found


def _lookup(name: str, layers: Mapping[str, str]) -> str | None:
    return next((algo for pattern, algo in layers.items() if _covers(pattern, name)), None)


def _covers(pattern: str, name: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def _without_prefix(name: str) -> str:
    """A module's name without the prefix, which differs between the programs that write it."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _read(folder: Path, hf: Mapping[str, Any]) -> tuple[list[Declaration], list[str]]:
    """The valid declarations of a folder, and what is wrong with the others."""
    found: list[Declaration | None] = []
    problems: list[str] = []
    content = hf.get(KEY)
    if content:
        if not isinstance(content, Mapping):
            kind = type(content).__name__
            problems.append(f"{KEY} in config.json is a {kind}; expected an object")
        elif (method := content.get("quant_method", "modelopt")) != "modelopt":
            problems.append(
                f"the weights are quantized with {method!r}; only 'modelopt' is supported. Take "
                "the BF16 release of the same model, or one in NVFP4 or FP8"
            )
        else:
            declaration, wrong = _declaration(f"{KEY} in config.json", content, "ignore")
            found.append(declaration)
            problems += wrong
    if (folder / FILE).exists():
        whole, wrong = read_json(folder / FILE)
        problems += wrong
        inner = whole.get("quantization")
        if isinstance(inner, Mapping):
            declaration, wrong = _declaration(FILE, inner, "exclude_modules")
            found.append(declaration)
            problems += wrong
        else:
            problems.append(f'{FILE} has no object "quantization"; download or copy it again')
    return [each for each in found if each is not None], problems


def _declaration(
    source: str, content: Mapping[str, Any], excluded_key: str
) -> tuple[Declaration | None, list[str]]:
    problems = []
    algo = content.get("quant_algo")
    layers = content.get("quantized_layers") or {}
    excluded = content.get(excluded_key) or []
    if algo not in (NVFP4, FP8, MIXED):
        problems.append(f"quant_algo is {algo!r}; expected {NVFP4}, {FP8} or {MIXED}")
    if not isinstance(excluded, list) or not all(isinstance(name, str) for name in excluded):
        problems.append(f"{excluded_key} is not a list of names")
    if not isinstance(layers, Mapping):
        problems.append(f"quantized_layers is a {type(layers).__name__}; expected an object")
        layers = {}
    algo_of = {}
    for module, entry in layers.items():
        kind = entry.get("quant_algo") if isinstance(entry, Mapping) else entry
        size = entry.get("group_size", BLOCK) if isinstance(entry, Mapping) else BLOCK
        if kind not in (NVFP4, FP8):
            problems.append(f"{module} has quant_algo {kind!r}; expected {NVFP4} or {FP8}")
        elif kind == NVFP4 and size != BLOCK:
            problems.append(f"{module} has group_size {size!r}; expected {BLOCK} for NVFP4")
        else:
            algo_of[_without_prefix(module)] = kind
    if problems:
        return None, [f"{source}: {problem}" for problem in problems]
    names = [_without_prefix(name) for name in excluded]
    return Declaration(source, str(algo), algo_of, names), []


def describe(
    formats: Mapping[str, str], not_quantized: Iterable[str], cache: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of `hf_quant_config.json` and of `quantization_config`.

    Args:
        formats: module -> NVFP4 or FP8, with names as in the files.
        not_quantized: linear modules that are not quantized.
        cache: True if there are scales for an FP8 cache.
    """
    used = sorted(set(formats.values()), key=[FP8, NVFP4].index)
    algo = used[0] if len(used) == 1 else MIXED
    excluded = sorted(not_quantized)
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
                "input_activations": _GROUPS[kind],
                "weights": _GROUPS[kind],
                "targets": [name for name, one in formats.items() if one == kind]
                if algo == MIXED
                else ["Linear"],
            }
            for i, kind in enumerate(used)
        },
        "ignore": excluded,
        "quant_algo": algo,
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
    if algo == MIXED:
        shared["quantized_layers"] = layers
    if cache:
        shared["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return {"producer": PRODUCER, "quantization": own}, shared
