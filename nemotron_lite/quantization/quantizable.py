"""Which modules can be quantized, in which formats, and at how many bits.

A quantizable module gets one format: it is a linear layer, or all routed experts of a layer with
both of their matrices. Embedding, router, convolution and norms stay as they are.

There are three sets of allowed formats (`choices`):

    "any"         NVFP4, FP8 or BF16 for every module except q, k and v, which stay BF16. Head and
                  MTP module stay as they are, as in NVIDIA's releases
    "report"      table 7: routed experts NVFP4; shared expert any; Mamba projections, latent
                  projections and attention output FP8 or BF16
    "everything"  those of "any", the MTP module in any format, and the head in FP8 or BF16. For
                  small models, whose head and MTP module are a large part of the file

The bits of a module count its codes and block scales (NVFP4 4.5 bits a weight, FP8 8, BF16 16). The
padding of rows is counted; the one scale of a whole tensor is not. Averages are over the weights of
the quantizable modules.

Super holds most of its weights in routed experts, so "report" reaches 4.75 bits there. In a small
model the other modules weigh more, and such a budget may be within reach of "any" only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from nemotron_lite.layers.moe import Experts
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.recipe import module_formats

FORMATS = ("nvfp4", "fp8", "bf16")
_TABLE_7: dict[str, tuple[str, ...]] = {
    "experts": ("nvfp4",),
    "shared": FORMATS,
    "mlp": FORMATS,
    "mamba.in_proj": ("fp8", "bf16"),
    "mamba.out_proj": ("fp8", "bf16"),
    "latent": ("fp8", "bf16"),
    "attention": ("fp8", "bf16"),
}
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "any": dict.fromkeys(_TABLE_7, FORMATS),
    "report": _TABLE_7,
    "everything": {
        **dict.fromkeys(_TABLE_7, FORMATS),
        "mtp": FORMATS,
        "head": ("fp8", "bf16"),
    },
}
_STAY_PLAIN = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class QuantizableModule:
    """A module that gets one format.

    Attributes:
        path: in the model, as in `model.get_submodule(path)`.
        role: as in `nemotron_lite.quantization.recipe`.
        shapes: of its weights, by their name in the state_dict.
        formats: that it may have.
    """

    path: str
    role: str
    shapes: Mapping[str, tuple[int, ...]]
    formats: tuple[str, ...]

    @property
    def num_weights(self) -> int:
        """How many weights the module has."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def bits(self, format: str) -> int:
        """Bits that the module takes in a format.

        Raises:
            ValueError: an unknown format.
        """
        if format == "nvfp4":
            # A block is 16 codes of 4 bits and a scale of 8 bits; rows are padded to whole blocks.
            return sum(
                math.prod(shape[:-1]) * math.ceil(shape[-1] / 16) * 72
                for shape in self.shapes.values()
            )
        if format not in FORMATS:
            raise ValueError(f"{self.path} in {format!r}: expected one of {', '.join(FORMATS)}.")
        return self.num_weights * (8 if format == "fp8" else 16)


def quantizable_modules(model: Nemotron, choices: str = "any") -> list[QuantizableModule]:
    """The quantizable modules of a model whose weights are plain, in the model's order.

    Raises:
        ValueError: an unknown set of choices, or a model that is quantized already.
    """
    if choices not in CHOICES:
        raise ValueError(f"choices={choices!r}: expected one of {', '.join(CHOICES)}.")
    allowed = CHOICES[choices]
    found = []
    for entry in module_formats(model.config, "bf16"):
        if entry.role not in allowed or entry.path.endswith(_STAY_PLAIN):
            continue
        module = model.get_submodule(entry.path)
        if not isinstance(module, nn.Linear | Experts):
            raise ValueError(
                f"{entry.path} is {type(module).__name__}: this model is quantized already, or "
                "offloaded. Load it without packed=True and offload=True, or better, quantize the "
                "original."
            )
        shapes = {
            f"{entry.path}.{n}": tuple(p.shape) for n, p in module.named_parameters() if n != "bias"
        }
        found.append(QuantizableModule(entry.path, entry.role, shapes, allowed[entry.role]))
    return found


def single_format(modules: list[QuantizableModule], format: str) -> dict[str, str]:
    """The same format for every module (the smallest it may have, if not this): path -> format."""
    return {m.path: format if format in m.formats else m.formats[0] for m in modules}


def bits_per_weight(modules: list[QuantizableModule], formats: Mapping[str, str]) -> float:
    """Mean bits per weight of the modules in these formats; modules not named are in BF16."""
    bits = sum(module.bits(formats.get(module.path, "bf16")) for module in modules)
    return bits / sum(module.num_weights for module in modules)
