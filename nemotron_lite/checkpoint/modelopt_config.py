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

Newer versions of ModelOpt write `hf_quant_config.json` in the second format too, without the object
"quantization". `W4A16_NVFP4` is NVFP4 whose inputs are not to be quantized; the weights are stored
in the same way.

`read_declarations` reads both files, and declarations of other programs in config.json
(`compressed_tensors.py`). `check_declarations` compares them with the stored tensors.

Source: reference sheet 10.3; ModelOpt's exporter and `convert_hf_config.py`. Left out: other
algorithms, which are refused with an error that names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemotron_lite.arguments import shown
from nemotron_lite.checkpoint.compressed_tensors import read_compressed_tensors, read_fp8
from nemotron_lite.checkpoint.declaration import ByName, Declaration
from nemotron_lite.checkpoint.errors import count_and_names
from nemotron_lite.checkpoint.modelopt import BLOCK, FP8, FP8_ROWS, FP8_TILES, NVFP4
from nemotron_lite.checkpoint.weight_files import read_object
from nemotron_lite.hf_config import TEXT_KEYS

FILE = "hf_quant_config.json"
KEYS = ("quantization_config", "compression_config")  # the second is an old name
KEY = KEYS[0]
MIXED = "MIXED_PRECISION"
PRODUCER = {"name": "modelopt"}  # serving engines recognize the layout by this name
_GROUPS: dict[str, dict[str, Any]] = {
    FP8: {"dynamic": False, "num_bits": 8, "type": "float"},
    NVFP4: {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK},
}
# What is written in `quant_algo`, and how these weights are stored.
_FORMAT_OF = {
    NVFP4: NVFP4,
    "W4A16_NVFP4": NVFP4,
    "NVFP4_W4A16": NVFP4,
    FP8: FP8,
    FP8_ROWS: FP8_ROWS,
    FP8_TILES: FP8_TILES,
}


def read_declarations(folder: Path, hf: Mapping[str, Any]) -> tuple[list[Declaration], list[str]]:
    """The valid declarations of a folder, and what is wrong with the others.

    Args:
        folder: the checkpoint folder.
        hf: its config.json.
    """
    found: list[Declaration] = []
    problems: list[str] = []
    levels = [hf, *(hf[key] for key in TEXT_KEYS if isinstance(hf.get(key), Mapping))]
    contents = [(key, level[key]) for level in levels for key in KEYS if level.get(key)]
    for key, content in contents[:1]:
        declaration, wrong = _read_config(f"{key} in config.json", content)
        found += [declaration] if declaration else []
        problems += wrong
    if (folder / FILE).exists():
        whole, wrong = read_object(folder / FILE)
        inner = whole.get("quantization", whole)
        if wrong:
            problems += wrong
        elif not isinstance(inner, Mapping) or "quant_algo" not in inner:
            problems.append(f"{FILE} has no quant_algo; download or copy it again")
        else:
            declaration, wrong = _read_modelopt(FILE, inner)
            found += [declaration] if declaration else []
            problems += wrong
    algos = {each.source: each.algo for each in found if each.algo in (*_FORMAT_OF, MIXED)}
    if len({_FORMAT_OF.get(algo, algo) for algo in algos.values()}) > 1:
        spelled = "; ".join(f"{source}: {algo}" for source, algo in algos.items())
        problems.append(f"different algorithms are declared ({spelled}); copy both files again")
    return found, problems


def _read_config(source: str, content: Any) -> tuple[Declaration | None, list[str]]:
    """The declaration in config.json, by whatever program."""
    if not isinstance(content, Mapping):
        return None, [f"{source} is a {type(content).__name__}; expected an object"]
    method = content.get("quant_method", "modelopt")
    if isinstance(method, str) and method.startswith("modelopt"):
        return _read_modelopt(source, content)
    if method == "compressed-tensors":
        return read_compressed_tensors(source, content)
    if method == "fp8":
        return read_fp8(source, content)
    return None, [
        f"the weights are quantized with {shown(method)}; supported are 'modelopt', "
        "'compressed-tensors' and 'fp8'. Take the BF16 release of the same model, or one in NVFP4 "
        "or FP8"
    ]


def _read_modelopt(source: str, content: Mapping[str, Any]) -> tuple[Declaration | None, list[str]]:
    problems = []
    algo = content.get("quant_algo")
    layers = content.get("quantized_layers") or {}
    if not isinstance(algo, str) or algo not in (*_FORMAT_OF, MIXED):
        problems.append(
            f"quant_algo is {shown(algo)}; expected one of {', '.join(_FORMAT_OF)} or {MIXED}"
        )
    excluded: list[str] = []
    for key in ("exclude_modules", "ignore"):  # in the one file, and in the other
        names = content.get(key) or []
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            excluded += names
        else:
            problems.append(f"{key} is not a list of names")
    if not isinstance(layers, Mapping):
        problems.append(f"quantized_layers is a {type(layers).__name__}; expected an object")
        layers = {}
    formats, kinds = _formats_of_layers(layers)
    problems += [f"{count_and_names(names, 'module')}: {kind}" for kind, names in kinds.items()]
    by_layer = ByName(formats)
    by_exclusion = ByName({name: "" for name in excluded if not name.startswith("re:")})
    for key, names in (("quantized_layers", by_layer), ("the excluded modules", by_exclusion)):
        if names.problem is not None:
            problems.append(f"{key}: {names.problem}")
    if problems:
        return None, [f"{source}: {problem}" for problem in problems]
    of_others = None if algo == MIXED else frozenset({_FORMAT_OF[str(algo)]})
    return Declaration(source, str(algo), of_others, by_layer, by_exclusion), []


def _formats_of_layers(layers: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The format of each listed module; and modules with invalid entries, by what is wrong."""
    formats: dict[str, str] = {}
    kinds: dict[str, list[str]] = {}
    for module, entry in layers.items():
        algo = entry.get("quant_algo") if isinstance(entry, Mapping) else entry
        size = entry.get("group_size", BLOCK) if isinstance(entry, Mapping) else BLOCK
        form = _FORMAT_OF.get(algo) if isinstance(algo, str) else None
        if form is None:
            kind = f"quant_algo {shown(algo)}; expected one of {', '.join(_FORMAT_OF)}"
            kinds.setdefault(kind, []).append(module)
        elif form == NVFP4 and size not in (BLOCK, None):
            kind = f"group_size {shown(size)}; expected {BLOCK} for NVFP4"
            kinds.setdefault(kind, []).append(module)
        else:
            formats[module] = form
    if len(kinds) > 4:  # not one algorithm that is missing, but a damaged file
        rest = [name for kind in list(kinds)[4:] for name in kinds.pop(kind)]
        kinds["other entries that are not valid"] = rest
    return formats, kinds


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
