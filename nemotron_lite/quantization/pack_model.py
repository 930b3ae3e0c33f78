"""Quantize a model: its plain weights become packed layers, in the formats that were chosen.

NVFP4 weights get the block scales of least error (`block_scales`) and one tensor scale for each
expert; FP8 weights get one scale, amax / 448. A layer holds what ModelOpt's layout stores and
nothing else. So the model in memory is, bit for bit, the one that `save` writes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.calibration import Calibration
from nemotron_lite.quantization.fp8 import quantize_fp8
from nemotron_lite.quantization.nvfp4 import E4M3_MAX, quantize
from nemotron_lite.quantization.nvfp4.scaling import check_finite
from nemotron_lite.quantization.packed_layers import (
    INPUT_MAX,
    LinearWithKVScale,
    PackedExperts,
    PackedLinear,
    PackedWeight,
    empty_packed_layer,
    install_packed_layer,
)
from nemotron_lite.quantization.quantizable import (
    FORMATS,
    QuantizableModule,
    quantizable_modules,
)
from nemotron_lite.quantization.scale_search import search_block_scales


@torch.no_grad()
def quantize_model(
    model: Nemotron,
    formats: Mapping[str, str],
    calibration: Calibration | None = None,
    *,
    search: bool = True,
    cache: bool = False,
) -> Nemotron:
    """Quantize a model in place. If an argument is refused, the model stays as it was.

    Args:
        model: with plain weights. Quantize it in its training dtype, and cast what stays plain
            afterwards.
        formats: path of a quantizable module -> "nvfp4", "fp8" or "bf16" (left as it is). Modules
            that are not named are left as they are too.
        calibration: for `input_scale`. Without it no `input_scale` is stored, and engines that
            quantize activations cannot serve the checkpoint.
        search: block scales of least error; False takes those of NVFP4's rule.
        cache: also store FP8 scales of keys and values.

    Returns:
        The same model.

    Raises:
        ValueError: a path that is no quantizable module, an unknown format, `cache` without a
            calibration, or weights that are not finite.
    """
    known = {module.path: module for module in quantizable_modules(model, "everything")}
    if unknown := sorted(set(formats) - set(known)):
        raise ValueError(
            f"{', '.join(unknown)}: not to be quantized. Expected paths of {', '.join(known)}."
        )
    if wrong := sorted(set(formats.values()) - set(FORMATS)):
        raise ValueError(f"format {wrong[0]!r}: expected one of {', '.join(FORMATS)}.")
    for path, format in formats.items():
        if format not in known[path].formats:
            raise ValueError(
                f"{path} in {format!r}: expected one of {', '.join(known[path].formats)}."
            )
    if missing := _without_calibration(known, formats, calibration):
        raise ValueError(
            f"{missing} is to be quantized, but the calibration has no inputs of it: calibrate("
            'model, batches, choices="everything").'
        )
    if cache and calibration is None:
        raise ValueError(
            "cache=True needs a calibration, which says how large keys and values get. Pass "
            "calibration=calibrate(model, batches)."
        )
    to_quantize = [
        (name, format)
        for path, format in formats.items()
        if format != "bf16"
        for name in known[path].shapes
    ]
    for name, _ in to_quantize:  # before anything is changed
        check_finite(model.get_parameter(name).abs().amax().float(), name)
    for name, format in to_quantize:
        layer = empty_packed_layer(model, name, format, calibrated=calibration is not None)
        amax = None if calibration is None else calibration.input_amax[name]
        store_quantized(layer, model.get_parameter(name), amax, search=search, name=name)
        install_packed_layer(model, name, layer)
    if cache and calibration is not None:
        for path, amax in calibration.kv_amax.items():
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            buffer = "k_scale" if path.endswith("k_proj") else "v_scale"
            with_scale = LinearWithKVScale.from_linear(linear, buffer)
            # Divide by a tensor: a GPU multiplies by the reciprocal of a Python number, which
            # rounds once more.
            scale = amax / torch.full_like(amax, E4M3_MAX)
            with_scale.get_buffer(buffer).copy_(torch.where(scale == 0, 1.0, scale))
            model.set_submodule(path, with_scale.train(model.training))
    return model


def _without_calibration(
    known: Mapping[str, QuantizableModule],
    formats: Mapping[str, str],
    calibration: Calibration | None,
) -> str | None:
    """The first weight that a calibration does not cover."""
    if calibration is None:
        return None
    names = (n for path, format in formats.items() if format != "bf16" for n in known[path].shapes)
    return next((name for name in names if name not in calibration.input_amax), None)


@torch.no_grad()
def store_quantized(
    layer: PackedWeight,
    weight: Tensor,
    amax: Tensor | None,
    *,
    search: bool = True,
    name: str = "weight",
) -> None:
    """Quantize `weight` and store it in a packed layer.

    Args:
        layer: of the weight's shape.
        weight: plain.
        amax: largest magnitude of the inputs; one number, or one for each expert.
        search: as for `quantize_model`.
        name: of the weight, for errors.
    """
    stack_dims = weight.ndim - 2
    plain = weight.detach().float()  # the quantizers do not take float64
    if layer.format == "nvfp4":
        if search:
            quantized = search_block_scales(plain, batch_dims=stack_dims, name=name)
        else:
            quantized = quantize(plain, batch_dims=stack_dims, name=name)
        layer.weight, layer.weight_scale = quantized.codes, quantized.scales
        layer.weight_scale_2 = quantized.scale
    elif stack_dims:
        experts = [quantize_fp8(expert, name=name) for expert in plain]
        codes = torch.stack([expert.codes.view(torch.uint8) for expert in experts])
        layer.weight = codes.view(torch.float8_e4m3fn)  # torch does not stack FP8
        layer.weight_scale = torch.stack([expert.scale for expert in experts])
    else:
        matrix = quantize_fp8(plain, name=name)
        layer.weight, layer.weight_scale = matrix.codes, matrix.scale
    if amax is not None:
        scale = amax.to(weight.device) / INPUT_MAX[layer.format]
        layer.input_scale = torch.where(scale == 0, 1.0, scale)


def packed_copy(
    model: Nemotron, path: str, format: str, calibration: Calibration
) -> PackedLinear | PackedExperts:
    """A packed copy of the module at `path`; the model is not changed."""
    layers: dict[str, PackedWeight] = {}
    for leaf, weight in model.get_submodule(path).named_parameters():
        if leaf == "bias":  # shared by the packed layer
            continue
        name = f"{path}.{leaf}"
        layers[leaf] = empty_packed_layer(model, name, format)
        store_quantized(layers[leaf], weight, calibration.input_amax[name], name=name)
    if "weight" in layers:
        linear = layers["weight"]
        assert isinstance(linear, PackedLinear)
        return linear
    return PackedExperts(layers["up_proj"], layers["down_proj"])
