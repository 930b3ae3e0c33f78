"""Declarations of compressed-tensors (llm-compressor) and of plain FP8 in config.json.

Quantized releases that are not NVIDIA's own are mostly written by llm-compressor, in the format
compressed-tensors:

    "quantization_config": {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group",
                        "group_size": 16, ...},
            "input_activations": {...}}},
        "ignore": ["lm_head", "re:.*gate$"]}

    NVFP4    X.weight_packed        U8       [out, in/2]     as ModelOpt's X.weight
             X.weight_scale         F8_E4M3  [out, in/16]
             X.weight_global_scale  F32      [1]             1 / ModelOpt's X.weight_scale_2
             X.input_global_scale   F32      [1]             1 / ModelOpt's X.input_scale
    FP8      X.weight               F8_E4M3  [out, in]
             X.weight_scale         F32, BF16   [1] (tensor), [out, 1] (channel), or one for each
                                                tile (block), 128 x 128 in `block_structure`

    w = e2m1(code) * (weight_scale / weight_global_scale)      w = weight * weight_scale

The other declaration is `"quant_method": "fp8"`, as DeepSeek and transformers write it. Its scales
are `X.weight_scale_inv`, one for each tile of `weight_block_size`. Despite the name they are
multiplied with.

Here a module may be stored in any format that a group declares. Whether a name belongs to a group
is not checked where `targets` or `ignore` have regular expressions ("re:..."), because those of a
damaged file may take forever. Refused by name: integer formats, groups of another size, weights
that are also sparse or rotated (`sparsity_config`, `transform_config`).

Sources: compressed-tensors (`nvfp4_quantized.py`, `quant_args.py`, `lifecycle/forward.py`);
transformers 5.23, `integrations/finegrained_fp8.py`. Left out: writing these declarations. `save`
writes ModelOpt's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemotron_lite.arguments import shown
from nemotron_lite.checkpoint.declaration import ByName, Declaration
from nemotron_lite.checkpoint.modelopt import BLOCK, FP8, FP8_ROWS, FP8_TILES, NVFP4, TILE

_STRATEGIES = {None: FP8, "tensor": FP8, "channel": FP8_ROWS, "block": FP8_TILES}
_OTHER_RELEASE = "Take the BF16 release of the same model, or one in NVFP4 or FP8"
MOST_GROUPS = 64


def read_compressed_tensors(
    source: str, content: Mapping[str, Any]
) -> tuple[Declaration | None, list[str]]:
    """The declaration in a `quantization_config` of this method, or what is wrong with it."""
    problems = []
    for key, none in (("sparsity_config", ("dense", None)), ("transform_config", (None,))):
        extra = content.get(key)
        if extra and not (isinstance(extra, Mapping) and extra.get("format", extra) in none):
            problems.append(f"{key} is {shown(extra)}, which is not supported. {_OTHER_RELEASE}")
    groups = content.get("config_groups")
    if not isinstance(groups, Mapping) or not 0 < len(groups) <= MOST_GROUPS:
        problems.append(
            f"config_groups is {shown(groups)}; expected an object with 1 to {MOST_GROUPS} groups"
        )
        groups = {}
    formats: set[str] = set()
    tiles: set[tuple[int, int]] = set()
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else group
        if isinstance(group, Mapping) and weights is None:
            continue  # a group for activations or the cache only
        found, problem = _format(weights)
        if isinstance(weights, Mapping) and found == FP8_TILES:
            tile, problem = _tile(weights.get("block_structure") or list(TILE))
            tiles.add(tile)
        if problem is not None:
            problems.append(f"{shown(name)}: {problem}")
        formats.add(found)
    if len(tiles) > 1:
        problems.append(f"the groups have tiles of different sizes: {shown(sorted(tiles))}")
    excluded, problem = _names(content, "ignore")
    problems += [problem] if problem else []
    if problems:
        return None, [f"{source}: {problem}" for problem in problems]
    tile = tiles.pop() if tiles else TILE
    known = frozenset(formats)
    return Declaration(source, " and ".join(sorted(known)), known, ByName({}), excluded, tile), []


def _format(weights: Any) -> tuple[str, str | None]:
    """The format that the `weights` of a group declare, and what is wrong with them."""
    if not isinstance(weights, Mapping):
        return "", f"weights is {shown(weights)}; expected an object"
    bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
    if kind != "float" or bits not in (4, 8) or isinstance(bits, bool):
        return "", (
            f"weights of {shown(bits)} bits of type {shown(kind)} are not supported; expected 4 or "
            f"8 bits of type 'float'. {_OTHER_RELEASE}"
        )
    if weights.get("symmetric") is False:
        return "", f"asymmetric weights are not supported. {_OTHER_RELEASE}"
    if bits == 4:
        size = weights.get("group_size")
        if size != BLOCK or strategy not in (None, "group", "tensor_group"):
            return "", (
                f"4-bit weights with group_size {shown(size)} and strategy {shown(strategy)} are "
                f"not supported; expected {BLOCK} and 'tensor_group' (NVFP4). {_OTHER_RELEASE}"
            )
        return NVFP4, None
    if not isinstance(strategy, str | None) or strategy not in _STRATEGIES:
        return "", (
            f"8-bit weights with strategy {shown(strategy)} are not supported; expected 'tensor', "
            f"'channel' or 'block'. {_OTHER_RELEASE}"
        )
    return _STRATEGIES[strategy], None


def _tile(value: Any) -> tuple[tuple[int, int], str | None]:
    """Rows and columns of a tile, from [128, 128] or "128x128"; and what is wrong with them."""
    if isinstance(value, str):
        sides = value[:64].split("x")
        value = [int(side) if side.isdecimal() and len(side) < 9 else side for side in sides]
    valid = (
        isinstance(value, list)
        and len(value) == 2
        and all(type(side) is int and 0 < side <= 2**20 for side in value)
    )
    if not valid:
        return TILE, f"tiles of {shown(value)} are not supported; expected two sizes, [128, 128]"
    return (value[0], value[1]), None


def _names(content: Mapping[str, Any], key: str) -> tuple[ByName, str | None]:
    """A list of names of modules, without regular expressions; and what is wrong with it."""
    names = content.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ByName({}), f"{key} is not a list of names"
    found = ByName({name: "" for name in names if not name.startswith("re:")})
    return found, None if found.problem is None else f"{key} has {found.problem}"


def read_fp8(source: str, content: Mapping[str, Any]) -> tuple[Declaration | None, list[str]]:
    """The declaration in a `quantization_config` of method "fp8", or what is wrong with it."""
    problems = []
    tile, formats = TILE, frozenset({FP8})
    if content.get("weight_block_size") is not None:
        tile, problem = _tile(content["weight_block_size"])
        formats = frozenset({FP8_TILES})
        problems += [problem] if problem else []
    if content.get("fmt") not in (None, "e4m3"):
        problems.append(f"fmt is {shown(content['fmt'])}; expected 'e4m3'. {_OTHER_RELEASE}")
    excluded, problem = _names(content, "modules_to_not_convert")
    problems += [problem] if problem else []
    if problems:
        return None, [f"{source}: {problem}" for problem in problems]
    return Declaration(source, " and ".join(formats), formats, ByName({}), excluded, tile), []
