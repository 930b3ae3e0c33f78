"""Post-training quantization: a trained model in 4 and 8 bits a weight, and what that costs.

    found = calibrate(model, batches)                       how large inputs, keys and values get
    costs = sensitivity(model, batches, found)              what each format of each module costs
    chosen = assign(costs, bits=4.75)                       the cheapest mix under a budget
    pack(model, chosen, found)                              in place; `save` writes ModelOpt's files

The rooms, in that order:

    calibration   largest magnitudes of what modules read, and of keys and values
    sensitivity   second-order estimate of the loss that a format adds, module by module
    knapsack      the best choice of one format for each module under a budget of bits
    units         which modules take part, in which formats, at how many bits
    scales        block scales that minimise the error of a weight
    packing       weights become packed layers

Source: Nemotron 3 Super report 4.1, 4.2 and table 7; reference sheet 6.6. Left out: fine-tuning
after quantization (distillation), and searches over the KV cache's format.
"""

from nemotron_lite.quantization.bit_allocation import assign, knapsack
from nemotron_lite.quantization.block_scales import best_scales
from nemotron_lite.quantization.calibration import Calibration, calibrate
from nemotron_lite.quantization.pack_model import pack
from nemotron_lite.quantization.quantizable import (
    QuantizableModule,
    bits_per_weight,
    quantizable_modules,
    uniform,
)
from nemotron_lite.quantization.sensitivity import Costs, sensitivity

__all__ = [
    "Calibration",
    "Costs",
    "QuantizableModule",
    "assign",
    "best_scales",
    "bits_per_weight",
    "calibrate",
    "knapsack",
    "pack",
    "quantizable_modules",
    "sensitivity",
    "uniform",
]
