"""How quantized weights are stored, and the checks of their tensors before and after reading.

NVIDIA's releases are written by ModelOpt. It stores a quantized linear layer X as several tensors:

    NVFP4    X.weight          U8       [out, in/2]   two codes per byte, even column in low bits
             X.weight_scale    F8_E4M3  [out, in/16]  row-major
             X.weight_scale_2  F32      []
             X.input_scale     F32      []            amax of the inputs / (6 * 448)
    FP8      X.weight          F8_E4M3  [out, in]
             X.weight_scale    F32      []            or [out]: one for each row
                                                      or [out/128, in/128]: one for each tile
             X.input_scale     F32      []
    cache    mixer.k_proj.k_scale, mixer.v_proj.v_scale   F32 []

    w = e2m1(code) * weight_scale * weight_scale_2          w = weight * weight_scale

Other programs store the same with other names (`compressed_tensors.py`): `weight_packed` for the
codes, `weight_global_scale` and `input_global_scale` for the reciprocals of `weight_scale_2` and
`input_scale`, `weight_scale_inv` for `weight_scale`.

The format of each module is also declared, in `hf_quant_config.json` or in `quantization_config` of
config.json (`modelopt_config.py`). The stored tensors decide, and the declarations must agree with
them.

`group_quantized` reads headers only. It replaces the tensors of a quantized weight by one entry
with the shape of the decoded weight and its format as dtype. So quantized checkpoints are compared
with the model in the same way as others. Invalid values (scales that are zero, negative or not
finite) are found when the tensors are read; `invalid_values` names them.

Rows whose length is no multiple of 16 are padded, as ModelOpt does. Source: reference sheet 10.3;
ModelOpt's exporter for FP8 per row and per tile. Left out: MXFP8 and integer formats. They are
refused with an error that names them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_lite.checkpoint.errors import count_and_names
from nemotron_lite.checkpoint.weight_files import StoredTensor
from nemotron_lite.quantization.fp8 import decode_fp8_blocks
from nemotron_lite.quantization.nvfp4.cpu_packed_products import decode_blocks, decode_e4m3
from nemotron_lite.quantization.packed_layers import decode_weight

# The names are ModelOpt's. The last two have several scales; no packed layer holds them.
NVFP4, FP8 = "NVFP4", "FP8"
FP8_ROWS, FP8_TILES = "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"
QUANTIZED = (NVFP4, FP8, FP8_ROWS, FP8_TILES)
FORM_OF = {NVFP4: "nvfp4", FP8: "fp8"}  # the packed layers' names

FLOATS = ("F64", "F32", "F16", "BF16")  # the supported dtypes of weights that are not quantized
BLOCK = 16  # numbers with one scale in NVFP4; rows are padded to a multiple of it
TILE = (128, 128)  # rows and columns with one scale in FP8, unless a declaration says otherwise

WEIGHTS = ("weight", "weight_packed")
BLOCK_SCALES = ("weight_scale", "weight_scale_inv")
# Of the whole tensor; one number each. The first two are divided by, the others multiplied with.
DIVISORS = ("weight_global_scale", "input_global_scale")
TENSOR_SCALES = ("weight_scale_2", "input_scale", "activation_scale", *DIVISORS)
INPUT_SCALES = ("input_scale", "activation_scale", "input_global_scale")
CACHE_SCALES = ("k_scale", "v_scale")
# What integer formats store beside their codes; grouped so that the error names the format.
OF_INTEGERS = ("weight_zero_point", "weight_shape", "weight_g_idx")
_PARTS = (*WEIGHTS, *BLOCK_SCALES, *TENSOR_SCALES, *OF_INTEGERS)


class QuantizedModule(NamedTuple):
    """The stored tensors of one quantized module."""

    module: str  # as it is spelled in the file
    algo: str  # one of QUANTIZED
    shape: tuple[int, ...]  # of the decoded weight, with rows padded to a multiple of 16 in NVFP4
    tensors: dict[str, StoredTensor]  # by the last part of their name: weight, weight_scale, ...
    tile: tuple[int, int]  # rows and columns with one scale in FP8_TILES

    @property
    def calibrated(self) -> bool:
        """Whether there is a scale of the inputs."""
        return any(part in self.tensors for part in INPUT_SCALES)

    @property
    def one_scale(self) -> bool:
        """Whether there is one number for the whole weight, whatever the declared strategy is."""
        return all(item.numel == 1 for part, item in self.tensors.items() if part in BLOCK_SCALES)


class GroupedTensors(NamedTuple):
    """The tensors of a folder, with each quantized weight as one entry.

    Attributes:
        stored: the entries to compare with the model.
        modules: the quantized modules, by the name of their weight (`….weight`).
        cache_scales: scales of keys and values, by name.
        problems: tensors that do not belong together.
    """

    stored: list[StoredTensor]
    modules: dict[str, QuantizedModule]
    cache_scales: dict[str, StoredTensor]
    problems: list[str]


def group_quantized(stored: Iterable[StoredTensor], tile: tuple[int, int] = TILE) -> GroupedTensors:
    """Group each quantized weight with its scales.

    Args:
        stored: all tensors of the folder.
        tile: rows and columns that share a scale in FP8, as config.json declares it.
    """
    stored = list(stored)
    order = {(item.file, item.name): i for i, item in enumerate(stored)}
    groups: dict[str, dict[str, StoredTensor]] = {}
    entries, cache_scales = [], {}
    for item in stored:
        module, _, part = item.name.rpartition(".")
        if part in CACHE_SCALES:
            cache_scales[item.name] = item
        elif part in _PARTS:
            first = groups.setdefault(module, {}).setdefault(part, item)
            if first is not item:
                entries.append(item)  # `match_tensors` reports that it is stored twice
        else:
            entries.append(item)
    modules = {}
    modules_by_problem: dict[str, list[str]] = {}
    for module, tensors in groups.items():
        weight = tensors.get("weight")
        if weight is not None and len(tensors) == 1 and weight.dtype not in ("U8", "F8_E4M3"):
            entries.append(weight)
            continue
        problem = _layout_problem(tensors, tile)
        if problem is None:
            found = _quantized_module(module, tensors, tile)
            weight = _weight(tensors)
            assert weight is not None
            name = f"{module}.weight"
            modules[name] = found
            entries.append(weight._replace(name=name, shape=found.shape, dtype=found.algo))
            order[weight.file, name] = order[weight.file, weight.name]
        else:
            modules_by_problem.setdefault(problem, []).append(module)
    for item in cache_scales.values():
        if not _is_number(item):
            problem = f"a cache scale is {_dtype_and_shape(item)}; expected one F32 number"
            modules_by_problem.setdefault(problem, []).append(item.name)
    problems = [
        f"not in a layout of quantized weights, {count_and_names(names, 'module')}: {problem}"
        for problem, names in modules_by_problem.items()
    ]
    entries.sort(key=lambda item: order[item.file, item.name])
    return GroupedTensors(entries, modules, cache_scales, problems)


def _weight(tensors: Mapping[str, StoredTensor]) -> StoredTensor | None:
    return next((tensors[part] for part in WEIGHTS if part in tensors), None)


def _block_scale(tensors: Mapping[str, StoredTensor]) -> StoredTensor | None:
    return next((tensors[part] for part in BLOCK_SCALES if part in tensors), None)


def _layout_problem(tensors: Mapping[str, StoredTensor], tile: tuple[int, int]) -> str | None:
    """What is wrong with the dtypes and shapes of one module's tensors; None if nothing is."""
    weight = _weight(tensors)
    if weight is None:
        return f"{', '.join(tensors)} without a weight; copy the files again"
    integers = [part for part in OF_INTEGERS if part in tensors]
    if integers or (weight.name.endswith("packed") and weight.dtype != "U8"):
        return (
            f"{' and '.join(integers) or f'packed codes in {weight.dtype}'}: this is an integer "
            "format (AWQ, GPTQ), which is not supported. Take the BF16 release, or one in NVFP4 or "
            "FP8"
        )
    if weight.dtype in FLOATS:
        return (
            f"{', '.join(t for t in tensors if t != 'weight')} for a weight in {weight.dtype}, "
            "which needs no scale. Take files that were saved together"
        )
    if weight.dtype not in ("U8", "F8_E4M3"):
        return f"a weight in {weight.dtype}; expected U8 (NVFP4), F8_E4M3 (FP8) or a float dtype"
    twice = [
        " and ".join(both)
        for both in (WEIGHTS, BLOCK_SCALES, ("weight_scale_2", "weight_global_scale"))
        if all(part in tensors for part in both)
    ]
    if twice:
        return f"both {twice[0]}, which are two names of one thing; copy the files again"
    scale = _block_scale(tensors)
    missing = [] if scale is not None else ["weight_scale"]
    if weight.dtype == "U8" and not {"weight_scale_2", "weight_global_scale"} & tensors.keys():
        missing.append("weight_scale_2")
    if missing:
        return f"a weight in {weight.dtype} without {', '.join(missing)}; copy the files again"
    assert scale is not None
    if len(weight.shape) != 2:
        return f"a weight of shape {list(weight.shape)}; expected [out, in] for each module"
    problem = _nvfp4_problem(weight, scale) if weight.dtype == "U8" else None
    problem = problem or (_fp8_problem(tensors, tile) if weight.dtype == "F8_E4M3" else None)
    if problem:
        return problem
    for part in TENSOR_SCALES:
        if part in tensors and not _is_number(tensors[part]):
            return f"{part} is {_dtype_and_shape(tensors[part])}; expected one F32 number"
    return None


def _nvfp4_problem(weight: StoredTensor, scale: StoredTensor) -> str | None:
    rows, half = weight.shape
    expected = (rows, half * 2 // BLOCK)
    if half * 2 % BLOCK:
        return f"packed rows of {half} bytes; expected a multiple of {BLOCK // 2}"
    if scale.dtype != "F8_E4M3" or scale.shape != expected:
        return f"weight_scale is {_dtype_and_shape(scale)}; expected F8_E4M3 {list(expected)}"
    return None


def _fp8_problem(tensors: Mapping[str, StoredTensor], tile: tuple[int, int]) -> str | None:
    weight, scale = _weight(tensors), _block_scale(tensors)
    assert weight is not None
    assert scale is not None
    if "weight_scale_2" in tensors or "weight_global_scale" in tensors:
        return "weight_scale_2 for an FP8 weight; only NVFP4 has two scales"
    if scale.dtype == "U8":
        return "weight_scale in U8: this is MXFP8, which is not supported. Take another release"
    if scale.dtype not in FLOATS or _fp8_algo(weight, scale, tile) is None:
        rows, cols = weight.shape
        tiles = [-(-rows // tile[0]), -(-cols // tile[1])]
        return (
            f"weight_scale is {_dtype_and_shape(scale)}; expected one F32 number for the tensor, "
            f"{[rows]} for its rows, or {tiles} for tiles of {tile[0]} x {tile[1]}"
        )
    return None


def _fp8_algo(weight: StoredTensor, scale: StoredTensor, tile: tuple[int, int]) -> str | None:
    """The format of an FP8 weight by the shape of its scales; None if they do not fit."""
    rows, cols = weight.shape
    if scale.numel == 1 and len(scale.shape) <= 2:
        return FP8
    if scale.shape in ((rows,), (rows, 1)):
        return FP8_ROWS
    # ModelOpt has written the two dimensions of tiles with dimensions of length 1 between them.
    tiles = (-(-rows // tile[0]), -(-cols // tile[1]))
    if scale.shape in (tiles, (tiles[0], 1, tiles[1], 1)):
        return FP8_TILES
    return None


def _quantized_module(
    module: str, tensors: dict[str, StoredTensor], tile: tuple[int, int]
) -> QuantizedModule:
    weight, scale = _weight(tensors), _block_scale(tensors)
    assert weight is not None
    assert scale is not None
    if weight.dtype == "U8":
        shape = (weight.shape[0], weight.shape[1] * 2)
        return QuantizedModule(module, NVFP4, shape, tensors, tile)
    algo = _fp8_algo(weight, scale, tile)
    assert algo is not None
    return QuantizedModule(module, algo, weight.shape, tensors, tile)


def _is_number(item: StoredTensor) -> bool:
    return item.dtype in ("F32", "BF16", "F16") and item.shape in ((), (1,))


def _dtype_and_shape(item: StoredTensor) -> str:
    return f"{item.dtype} {list(item.shape[:8])}"


def invalid_values(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """The tensors of a module with invalid values: the last part of the name, and one value.

    A scale of a block of NVFP4 may be zero, where all its weights are zero. Other scales are above
    zero: zero would make a whole tensor, row or tile zero.
    """
    for part, value in tensors.items():
        if part in WEIGHTS:
            if value.dtype == torch.float8_e4m3fn and bool(_is_nan(value).any()):
                yield part, math.nan
            continue
        wide = value.float()
        block = part in BLOCK_SCALES and value.dtype == torch.float8_e4m3fn
        valid = wide.isfinite() & ((wide >= 0) if block else (wide > 0))
        if not bool(valid.all()):
            yield part, float(wide[~valid].flatten()[0])


def _is_nan(codes: Tensor) -> Tensor:
    return (codes.view(torch.uint8) & 0x7F) == 0x7F


def as_packed(module: QuantizedModule, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with ModelOpt's names and shapes, as packed layers hold them.

    The reciprocal of a divisor is rounded: decoded weights may differ from those of `decode` by
    one unit in the last place of float32.
    """
    found = {}
    for part, value in tensors.items():
        if part in WEIGHTS:
            found["weight"] = value
        elif part in BLOCK_SCALES:
            found["weight_scale"] = value if module.algo == NVFP4 else value.float().reshape(())
        elif part in ("weight_scale_2", "weight_global_scale"):
            found["weight_scale_2"] = _factor(part, value)
        elif part in INPUT_SCALES:
            found["input_scale"] = _factor(part, value)
    return found


def _factor(part: str, value: Tensor) -> Tensor:
    wide = value.float().reshape(())
    return 1.0 / wide if part in DIVISORS else wide


def decode(
    module: QuantizedModule, tensors: Mapping[str, Tensor], shape: tuple[int, ...]
) -> Tensor:
    """The weight that the stored tensors encode, `out in`, in float32.

    Args:
        shape: of the weight in the model; rows of NVFP4 are stored with padding.
    """
    if "weight_global_scale" in tensors:
        # As compressed-tensors rounds: first the scale of each block, then the product.
        codes = tensors["weight_packed" if "weight_packed" in tensors else "weight"]
        scales = decode_e4m3(tensors["weight_scale"]) / tensors["weight_global_scale"].float()
        out = torch.empty(module.shape, dtype=torch.float32, device=codes.device)
        return decode_blocks(codes, scales, out)[..., : shape[-1]]
    if module.algo in FORM_OF:
        return decode_weight(FORM_OF[module.algo], as_packed(module, tensors), shape, torch.float32)
    scale = next(tensors[part] for part in BLOCK_SCALES if part in tensors).float()
    rows, cols = module.shape
    if module.algo == FP8_ROWS:
        return decode_fp8_blocks(tensors["weight"], scale.reshape(rows, 1), (1, cols))
    tiles = (-(-rows // module.tile[0]), -(-cols // module.tile[1]))
    return decode_fp8_blocks(tensors["weight"], scale.reshape(tiles), module.tile)
