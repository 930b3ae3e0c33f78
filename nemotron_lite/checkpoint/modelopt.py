"""The layout in which NVIDIA releases quantized models, and the checks of its tensors.

ModelOpt writes a quantized linear layer X as several tensors:

    NVFP4    X.weight          U8       [out, in/2]   two codes per byte, even column in low bits
             X.weight_scale    F8_E4M3  [out, in/16]  row-major
             X.weight_scale_2  F32      []
             X.input_scale     F32      []            amax of the inputs / (6 * 448)
    FP8      X.weight          F8_E4M3  [out, in]
             X.weight_scale, X.input_scale   F32 []
    cache    mixer.k_proj.k_scale, mixer.v_proj.v_scale   F32 []

    w = e2m1(code) * weight_scale * weight_scale_2          w = weight * weight_scale

The format of each module is also declared in `hf_quant_config.json` and in `quantization_config` of
config.json (`modelopt_config.py`). The stored tensors decide, and the declarations must agree with
them.

`group_quantized` reads headers only. It replaces the tensors of a quantized weight by one entry
with the shape of the decoded weight and NVFP4 or FP8 as its dtype. So quantized checkpoints are
compared with the model in the same way as others. Invalid values (scales that are negative or not
finite) are found when the tensors are read; `invalid_values` names them.

Rows whose length is no multiple of 16 are padded, as ModelOpt does. Source: reference sheet 10.3.
Left out: scales per channel or per 128 x 128 tile, MXFP8 and integer formats. They are refused with
an error that names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_lite.checkpoint.validation import (
    FLOATS,
    NVFP4_BLOCK,
    QUANTIZED,
    StoredTensor,
    shorten,
)

NVFP4, FP8 = QUANTIZED
FORM_OF = {NVFP4: "nvfp4", FP8: "fp8"}
BLOCK = NVFP4_BLOCK
SCALES = ("weight_scale", "weight_scale_2", "input_scale")
CACHE_SCALES = ("k_scale", "v_scale")


class QuantizedModule(NamedTuple):
    """The stored tensors of one quantized module."""

    module: str  # as it is spelled in the file
    algo: str  # NVFP4 or FP8
    shape: tuple[int, ...]  # of the decoded weight, with rows padded to a multiple of 16
    tensors: dict[str, StoredTensor]  # by the last part of their name: weight, weight_scale, ...


class GroupedTensors(NamedTuple):
    """The tensors of a folder, with each quantized weight as one entry.

    Attributes:
        stored: the entries to compare with the model.
        modules: the quantized modules, by the name of their weight.
        cache_scales: scales of keys and values, by name.
        problems: tensors that do not belong together.
    """

    stored: list[StoredTensor]
    modules: dict[str, QuantizedModule]
    cache_scales: dict[str, StoredTensor]
    problems: list[str]


def group_quantized(stored: Iterable[StoredTensor]) -> GroupedTensors:
    """Group each quantized weight with its scales."""
    stored = list(stored)
    order = {(item.file, item.name): i for i, item in enumerate(stored)}
    groups: dict[str, dict[str, StoredTensor]] = {}
    entries, cache_scales = [], {}
    for item in stored:
        module, _, part = item.name.rpartition(".")
        if part in CACHE_SCALES:
            cache_scales[item.name] = item
        elif part == "weight" or part in SCALES:
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
        problem = _layout_problem(tensors)
        if problem is None:
            assert weight is not None
            found = _quantized_module(module, tensors)
            modules[weight.name] = found
            entries.append(weight._replace(shape=found.shape, dtype=found.algo))
        else:
            modules_by_problem.setdefault(problem, []).append(module)
    for item in cache_scales.values():
        if not _is_number(item):
            problem = f"a cache scale is {_dtype_and_shape(item)}; expected one F32 number"
            modules_by_problem.setdefault(problem, []).append(item.name)
    problems = [
        f"not in ModelOpt's layout, {len(names)} module{'s' if len(names) > 1 else ''}, "
        f"{shorten(names)}: {problem}"
        for problem, names in modules_by_problem.items()
    ]
    entries.sort(key=lambda item: order[item.file, item.name])
    return GroupedTensors(entries, modules, cache_scales, problems)


def _layout_problem(tensors: Mapping[str, StoredTensor]) -> str | None:
    """What is wrong with the dtypes and shapes of one module's tensors; None if nothing is."""
    weight = tensors.get("weight")
    if weight is None:
        return f"{', '.join(tensors)} without a weight; copy the files again"
    scale = tensors.get("weight_scale")
    if weight.dtype in FLOATS:
        return (
            f"{', '.join(t for t in tensors if t != 'weight')} for a weight in {weight.dtype}, "
            "which needs no scale. Take files that were saved together"
        )
    if weight.dtype not in ("U8", "F8_E4M3"):
        return f"a weight in {weight.dtype}; expected U8 (NVFP4), F8_E4M3 (FP8) or a float dtype"
    required = ("weight_scale", "weight_scale_2") if weight.dtype == "U8" else ("weight_scale",)
    missing = [part for part in required if part not in tensors]
    if missing:
        return f"a weight in {weight.dtype} without {', '.join(missing)}; copy the files again"
    assert scale is not None
    if len(weight.shape) != 2:
        return f"a weight of shape {list(weight.shape)}; expected [out, in] for each module"
    if weight.dtype == "U8":
        rows, half = weight.shape
        expected = (rows, half * 2 // BLOCK)
        if half * 2 % BLOCK:
            return f"packed rows of {half} bytes; expected a multiple of {BLOCK // 2}"
        if scale.dtype != "F8_E4M3" or scale.shape != expected:
            return f"weight_scale is {_dtype_and_shape(scale)}; expected F8_E4M3 {list(expected)}"
    else:
        if "weight_scale_2" in tensors:
            return "weight_scale_2 for an FP8 weight; only NVFP4 has two scales"
        if scale.dtype == "U8":
            return "weight_scale in U8: this is MXFP8, which is not supported. Take another release"
        if not _is_number(scale):
            return (
                f"weight_scale is {_dtype_and_shape(scale)}; expected one F32 number for the tensor"
            )
    for part in ("weight_scale_2", "input_scale"):
        if part in tensors and not _is_number(tensors[part]):
            return f"{part} is {_dtype_and_shape(tensors[part])}; expected one F32 number"
    return None


def _quantized_module(module: str, tensors: dict[str, StoredTensor]) -> QuantizedModule:
    weight = tensors["weight"]
    if weight.dtype == "U8":
        return QuantizedModule(module, NVFP4, (weight.shape[0], weight.shape[1] * 2), tensors)
    return QuantizedModule(module, FP8, weight.shape, tensors)


def _is_number(item: StoredTensor) -> bool:
    return item.dtype == "F32" and item.shape in ((), (1,))


def _dtype_and_shape(item: StoredTensor) -> str:
    return f"{item.dtype} {list(item.shape)}"


def invalid_values(name: str, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """The invalid values in the tensors of module `name`: at most one message per tensor."""
    for part in SCALES:
        if part not in tensors:
            continue
        value = tensors[part].float()
        if not bool((value.isfinite() & (value >= 0)).all()):
            bad = value[~(value.isfinite() & (value >= 0))].flatten()[0]
            yield f"{name}.{part} holds {float(bad)}"
    weight = tensors["weight"]
    if weight.dtype == torch.float8_e4m3fn and not bool(weight.float().isfinite().all()):
        yield f"{name}.weight holds NaN"
