"""Quantization: NVFP4, FP8 and MXFP8, for training in emulation and for stored weights.

The number formats:

    nvfp4/                four bits a number, with block scales and a tensor scale
    fp8.py                eight bits a number: FP8 with one scale, and MXFP8
    recipe.py             which matrix of a model is in which format (precision recipes as data)

Training in NVFP4, as Nemotron 3 was trained, emulated on any device:

    emulated_layers.py    linear layers and experts whose three matrix products read NVFP4 or MXFP8
    emulated_training.py  `EmulatedPrecision`: puts these layers into a model while it trains

Post-training quantization, from a trained model to a smaller one:

    calibration = calibrate(model, batches)            largest inputs, keys and values
    costs = measure_sensitivity(model, batches, calibration)
                                                       the loss that each format of each module adds
    formats = allocate_bits(costs, bits=4.75)          the best mix of formats within a budget
    quantize_model(model, formats, calibration)        in place; `save` writes ModelOpt's layout

    calibration.py        largest magnitudes of what modules read, and of keys and values
    quantizable.py        which modules can be quantized, in which formats, at how many bits
    sensitivity.py        second-order estimate of the loss that each format of each module adds
    bit_allocation.py     the best format for each module within a budget of bits
    scale_search.py       block scales that minimize the error of a weight
    packed_layers.py      layers that keep their weights in four or eight bits in memory
    pack_model.py         replaces a model's plain weights by packed layers

A name below is imported when it is first used (PEP 562), as in `nemotron_lite` itself: the command
line reads the recipes without waiting for torch.

Source: Nemotron 3 Super report 4.1, 4.2 and table 7; reference sheet 6. Left out: fine-tuning after
quantization (distillation), and searches over the format of the KV cache.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemotron_lite.quantization.bit_allocation import allocate_bits, minimize_cost
    from nemotron_lite.quantization.calibration import Calibration, calibrate
    from nemotron_lite.quantization.pack_model import quantize_model
    from nemotron_lite.quantization.quantizable import (
        QuantizableModule,
        bits_per_weight,
        quantizable_modules,
        single_format,
    )
    from nemotron_lite.quantization.scale_search import search_block_scales
    from nemotron_lite.quantization.sensitivity import Sensitivity, measure_sensitivity

__all__ = [
    "Calibration",
    "QuantizableModule",
    "Sensitivity",
    "allocate_bits",
    "bits_per_weight",
    "calibrate",
    "measure_sensitivity",
    "minimize_cost",
    "quantizable_modules",
    "quantize_model",
    "search_block_scales",
    "single_format",
]

_MODULE_OF = {
    "Calibration": "calibration",
    "QuantizableModule": "quantizable",
    "Sensitivity": "sensitivity",
    "allocate_bits": "bit_allocation",
    "bits_per_weight": "quantizable",
    "calibrate": "calibration",
    "measure_sensitivity": "sensitivity",
    "minimize_cost": "bit_allocation",
    "quantizable_modules": "quantizable",
    "quantize_model": "pack_model",
    "search_block_scales": "scale_search",
    "single_format": "quantizable",
}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use; afterwards it is an ordinary attribute."""
    if name in _MODULE_OF:
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(
        f"nemotron_lite.quantization has no {name!r}; its public names are {__all__}."
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
