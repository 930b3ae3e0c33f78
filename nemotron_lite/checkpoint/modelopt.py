"""The layout in which NVIDIA releases quantized models: what is stored, and whether it fits.

ModelOpt writes a quantized linear layer X as several tensors beside each other:

    NVFP4    X.weight          U8       [out, in/2]   two codes a byte, even column in the low half
             X.weight_scale    F8_E4M3  [out, in/16]  row-major
             X.weight_scale_2  F32      []
             X.input_scale     F32      []            amax of the inputs / (6 * 448)
    FP8      X.weight          F8_E4M3  [out, in]
             X.weight_scale, X.input_scale   F32 []
    cache    mixer.k_proj.k_scale, mixer.v_proj.v_scale   F32 []

    w = e2m1(code) * weight_scale * weight_scale_2          w = weight * weight_scale

Which module is what is said once more in `hf_quant_config.json` and in `quantization_config` of
config.json (`modelopt_config.py`). What the files hold decides; the two may not contradict it.

`gather` looks at headers only. It hands every quantized weight on as one entry with the shape of
the numbers and the pseudo-dtype NVFP4 or FP8, so that the comparison with the model is the same as
for any checkpoint. Values that no writer means (scales that are negative or not finite) are found
when the tensors are read; `wrong_values` names them.

Rows that are no multiple of 16 are filled up, as ModelOpt does. Source: reference sheet 10.3.
Left out: scales per channel or per 128 x 128 tile, MXFP8 and integer formats, all refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_lite.checkpoint.validation import FLOATS, NVFP4_ROWS, QUANTIZED, Stored, some

NVFP4, FP8 = QUANTIZED
FORM_OF = {NVFP4: "nvfp4", FP8: "fp8"}
BLOCK = NVFP4_ROWS
SCALES = ("weight_scale", "weight_scale_2", "input_scale")
CACHE_SCALES = ("k_scale", "v_scale")


class Quantized(NamedTuple):
    """One quantized module of the files."""

    module: str  # as the file spells it
    algo: str  # NVFP4 or FP8
    shape: tuple[int, ...]  # of the numbers, filled up to a multiple of 16
    parts: dict[str, Stored]


class Gathered(NamedTuple):
    """The tensors of a folder, each quantized weight as one entry.

    Attributes:
        stored: what is to be compared with the model.
        modules: by the name of their weight.
        cache_scales: scales of keys and values, by name.
    """

    stored: list[Stored]
    modules: dict[str, Quantized]
    cache_scales: dict[str, Stored]


def gather(stored: Iterable[Stored], problems: list[str]) -> Gathered:
    """Put weights and their scales together; what cannot be put together becomes a problem."""
    stored = list(stored)
    order = {(item.file, item.name): place for place, item in enumerate(stored)}
    groups: dict[str, dict[str, Stored]] = {}
    plain, cache_scales = [], {}
    for item in stored:
        module, _, part = item.name.rpartition(".")
        if part in CACHE_SCALES:
            cache_scales[item.name] = item
        elif part == "weight" or part in SCALES:
            before = groups.setdefault(module, {}).setdefault(part, item)
            if before is not item:
                plain.append(item)  # `match` says that it is there twice
        else:
            plain.append(item)
    modules = {}
    faults: dict[str, list[str]] = {}
    for module, parts in groups.items():
        weight = parts.get("weight")
        if weight is not None and len(parts) == 1 and weight.dtype not in ("U8", "F8_E4M3"):
            plain.append(weight)
            continue
        fault = _fault(parts)
        if fault is None:
            assert weight is not None
            found = _quantized(module, parts)
            modules[weight.name] = found
            plain.append(weight._replace(shape=found.shape, dtype=found.algo))
        else:
            faults.setdefault(fault, []).append(module)
    for item in cache_scales.values():
        if not _is_number(item):
            fault = f"a cache scale must be one F32 number, it is {_what(item)}"
            faults.setdefault(fault, []).append(item.name)
    for fault, names in faults.items():
        problems.append(
            f"not as ModelOpt stores it, {len(names)} module{'s' if len(names) > 1 else ''}, "
            f"{some(names)}: {fault}"
        )
    plain.sort(key=lambda item: order[item.file, item.name])
    return Gathered(plain, modules, cache_scales)


def _fault(parts: Mapping[str, Stored]) -> str | None:
    """What is wrong with the tensors of one module, from their dtypes and shapes."""
    weight = parts.get("weight")
    if weight is None:
        return f"{', '.join(parts)} without a weight; copy the files again"
    scale = parts.get("weight_scale")
    if weight.dtype in FLOATS:
        return (
            f"{', '.join(p for p in parts if p != 'weight')} beside a weight in {weight.dtype}, "
            "which has no use for it. Take files that were saved together"
        )
    if weight.dtype not in ("U8", "F8_E4M3"):
        return f"a weight in {weight.dtype}; read are U8 (NVFP4), F8_E4M3 (FP8) and floats"
    needed = ("weight_scale", "weight_scale_2") if weight.dtype == "U8" else ("weight_scale",)
    absent = [part for part in needed if part not in parts]
    if absent:
        return f"a weight in {weight.dtype} without {', '.join(absent)}; copy the files again"
    assert scale is not None
    if len(weight.shape) != 2:
        return f"a weight of shape {list(weight.shape)}; expected [out, in] for each module"
    if weight.dtype == "U8":
        rows, half = weight.shape
        expected = (rows, half * 2 // BLOCK)
        if half * 2 % BLOCK:
            return f"packed rows of {half} bytes; expected a multiple of {BLOCK // 2}"
        if scale.dtype != "F8_E4M3" or scale.shape != expected:
            return f"weight_scale is {_what(scale)}; expected F8_E4M3 {list(expected)}"
    else:
        if "weight_scale_2" in parts:
            return "weight_scale_2 beside an FP8 weight; only NVFP4 has two scales"
        if scale.dtype == "U8":
            return "weight_scale in U8 makes this MXFP8, which is not read. Take another release"
        if not _is_number(scale):
            return f"weight_scale is {_what(scale)}; read is one F32 number for the tensor"
    for part in ("weight_scale_2", "input_scale"):
        if part in parts and not _is_number(parts[part]):
            return f"{part} is {_what(parts[part])}; expected one F32 number"
    return None


def _quantized(module: str, parts: dict[str, Stored]) -> Quantized:
    weight = parts["weight"]
    if weight.dtype == "U8":
        return Quantized(module, NVFP4, (weight.shape[0], weight.shape[1] * 2), parts)
    return Quantized(module, FP8, weight.shape, parts)


def _is_number(item: Stored) -> bool:
    return item.dtype == "F32" and item.shape in ((), (1,))


def _what(item: Stored) -> str:
    return f"{item.dtype} {list(item.shape)}"


def wrong_values(name: str, parts: Mapping[str, Tensor]) -> Iterator[str]:
    """What is wrong with the values of a module's tensors."""
    for part in SCALES:
        if part not in parts:
            continue
        value = parts[part].float()
        if not bool((value.isfinite() & (value >= 0)).all()):
            bad = value[~(value.isfinite() & (value >= 0))].flatten()[0]
            yield f"{name}.{part} holds {float(bad)}"
    weight = parts["weight"]
    if weight.dtype == torch.float8_e4m3fn and not bool(weight.float().isfinite().all()):
        yield f"{name}.weight holds NaN"
