"""Packing: plain weights become packed layers, in the formats that were chosen.

NVFP4 weights get the block scales of least error (`scales`), one tensor scale for each expert; FP8
weights one scale, amax / 448. A layer holds what ModelOpt's layout stores and nothing else, so the
model that is evaluated here is, bit for bit, the one that `save` writes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.block_scales import best_scales
from nemotron_lite.quantization.calibration import Calibration
from nemotron_lite.quantization.fp8 import quantize_fp8
from nemotron_lite.quantization.nvfp4 import E4M3_MAX, quantize
from nemotron_lite.quantization.packed_layers import (
    INPUT_MAX,
    Packed,
    PackedExperts,
    PackedLinear,
    ScaledLinear,
    install,
)
from nemotron_lite.quantization.quantizable import FORMATS, quantizable_modules


@torch.no_grad()
def pack(
    model: Nemotron,
    formats: Mapping[str, str],
    calibration: Calibration | None = None,
    *,
    search: bool = True,
    cache: bool = False,
) -> Nemotron:
    """Quantize a model in place.

    Args:
        model: with plain weights; give it as it was trained, and cast what stays plain afterwards.
        formats: path of a unit -> "nvfp4", "fp8" or "bf16" (left alone). Units that are not named
            are left alone too.
        calibration: for `input_scale`; without one there is none, and engines that round
            activations cannot serve the checkpoint.
        search: block scales of least error; False takes the rule's.
        cache: also store FP8 scales of keys and values.

    Returns:
        The same model.

    Raises:
        ValueError: a path that is no unit, an unknown format, a scale for the cache without
            calibration, weights that are not finite.
    """
    known = {unit.path: unit for unit in quantizable_modules(model)}
    if odd := sorted(set(formats) - set(known)):
        raise ValueError(f"{', '.join(odd)}: not to be quantized; units are {', '.join(known)}.")
    if wrong := sorted(set(formats.values()) - set(FORMATS)):
        raise ValueError(f"format {wrong[0]!r}: expected one of {', '.join(FORMATS)}.")
    if cache and calibration is None:
        raise ValueError("cache=True needs a calibration: how large keys and values get.")
    for path, form in formats.items():
        if form == "bf16":
            continue
        for name in known[path].shapes:
            weight = model.get_parameter(name)
            layer = install(model, name, form, calibrated=calibration is not None)
            fill(layer, weight, None if calibration is None else calibration.inputs[name],
                 search=search, name=name)  # fmt: skip
    if cache and calibration is not None:
        for path, amax in calibration.caches.items():
            above, _, leaf = path.rpartition(".")
            part = f"{leaf[0]}_scale"
            linear = ScaledLinear.over(model.get_submodule(path), part)  # type: ignore[arg-type]
            # By a tensor: a GPU multiplies by the reciprocal of a number, which rounds once more.
            linear.get_buffer(part).copy_(amax / torch.full_like(amax, E4M3_MAX))
            setattr(model.get_submodule(above), leaf, linear.train(model.training))
    return model


@torch.no_grad()
def fill(
    layer: Packed, weight: Tensor, amax: Tensor | None, *, search: bool = True, name: str = "weight"
) -> None:
    """Put the quantized `weight` into an empty packed layer.

    Args:
        layer: of the weight's shape.
        weight: plain.
        amax: of the inputs; one number, or one for each expert.
        search, name: as for `pack`; for errors.
    """
    stacked = weight.ndim - 2
    # float64 has no packed form of its own; its float32 values do.
    plain = weight.detach().float()
    if layer.form == "nvfp4":
        if search:
            packed = best_scales(plain, batch_dims=stacked, name=name)
        else:
            packed = quantize(plain, batch_dims=stacked, name=name)
        layer.weight, layer.weight_scale = packed.codes, packed.scales
        layer.weight_scale_2 = packed.scale
    elif stacked:
        each = [quantize_fp8(one, name=name) for one in plain]
        layer.weight = torch.stack([one.codes.view(torch.uint8) for one in each]).view(
            torch.float8_e4m3fn
        )
        layer.weight_scale = torch.stack([one.scale for one in each])
    else:
        one = quantize_fp8(plain, name=name)
        layer.weight, layer.weight_scale = one.codes, one.scale
    if amax is not None:
        scale = amax.to(weight.device) / INPUT_MAX[layer.form]
        layer.input_scale = torch.where(scale == 0, 1.0, scale)


def stand_in(
    model: Nemotron, path: str, form: str, calibration: Calibration
) -> PackedLinear | PackedExperts:
    """A packed copy of one unit, beside the model and not in it."""
    module = model.get_submodule(path)
    made: dict[str, Packed] = {}
    for leaf, weight in module.named_parameters():
        kind = Packed if weight.ndim == 3 else PackedLinear
        with weight.device:
            made[leaf] = kind(form, tuple(weight.shape))
        fill(made[leaf], weight, calibration.inputs[f"{path}.{leaf}"], name=f"{path}.{leaf}")
    if "weight" in made:
        linear = made["weight"]
        assert isinstance(linear, PackedLinear)
        return linear
    return PackedExperts(made["up_proj"], made["down_proj"])
