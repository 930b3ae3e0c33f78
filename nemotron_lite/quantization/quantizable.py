"""Which modules can be quantized, in which formats, at how many bits.

A unit is what gets one format: a linear layer, or all routed experts of a layer with both of their
matrices. Embedding, head, router, convolution, norms and the MTP module are no units and stay as
they are, as in NVIDIA's releases (report table 7).

Two sets of choices:

    "any"       NVFP4, FP8 or BF16 for every unit but q, k and v, which stay BF16
    "report"    table 7: routed experts NVFP4; shared expert any; Mamba projections, latent
                projections and attention output FP8 or BF16

Bits count codes and block scales (NVFP4 4.5, FP8 8, BF16 16), filled-up rows included, over the
weights of the units; a scale for a whole tensor is not counted.

Super holds most of its weights in routed experts, so "report" reaches 4.75 bits there. In a small
model the other units weigh more, and such a budget may only be within reach of "any".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from nemotron_lite.layers.moe import Experts
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.recipe import placements

FORMATS = ("nvfp4", "fp8", "bf16")
_TABLE_7: dict[str, tuple[str, ...]] = {
    "experts": ("nvfp4",), "shared": FORMATS, "mlp": FORMATS,
    "mamba.in_proj": ("fp8", "bf16"), "mamba.out_proj": ("fp8", "bf16"),
    "latent": ("fp8", "bf16"), "attention": ("fp8", "bf16"),
}  # fmt: skip
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "any": dict.fromkeys(_TABLE_7, FORMATS),
    "report": _TABLE_7,
}
_STAY_PLAIN = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class QuantizableModule:
    """What gets one format.

    Attributes:
        path: of the module.
        role: as in `nemotron_lite.quantization.recipe`.
        shapes: of its weights, by their name in the state_dict.
        formats: it may have.
    """

    path: str
    role: str
    shapes: Mapping[str, tuple[int, ...]]
    formats: tuple[str, ...]

    @property
    def numbers(self) -> int:
        """How many weights."""
        return sum(_count(shape) for shape in self.shapes.values())

    def bits(self, form: str) -> int:
        """Stored bits in a format.

        Raises:
            ValueError: an unknown format.
        """
        if form == "nvfp4":
            # 16 codes of 4 bits and a scale of 8; rows are filled up.
            return sum(
                _count(shape[:-1]) * -(-shape[-1] // 16) * 72 for shape in self.shapes.values()
            )
        if form not in FORMATS:
            raise ValueError(f"{self.path} in {form!r}: expected one of {', '.join(FORMATS)}.")
        return self.numbers * (8 if form == "fp8" else 16)


def quantizable_modules(model: Nemotron, choices: str = "any") -> list[QuantizableModule]:
    """The units of a model whose weights are plain.

    Raises:
        ValueError: unknown choices, or a model that is packed already.
    """
    if choices not in CHOICES:
        raise ValueError(f"choices={choices!r}: expected one of {', '.join(CHOICES)}.")
    found = []
    for place in placements(model.config, "bf16"):
        if place.role not in CHOICES[choices] or place.path.endswith(_STAY_PLAIN):
            continue
        module = model.get_submodule(place.path)
        if not isinstance(module, nn.Linear | Experts):
            raise ValueError(
                f"{place.path} is {type(module).__name__}: this model is quantized already. Load "
                "it without packed=True, or better, quantize the original."
            )
        shapes = {f"{place.path}.{n}": tuple(p.shape) for n, p in module.named_parameters()}
        found.append(
            QuantizableModule(place.path, place.role, shapes, CHOICES[choices][place.role])
        )
    return found


def uniform(parts: list[QuantizableModule], form: str) -> dict[str, str]:
    """The same format for every unit."""
    return {unit.path: form for unit in parts}


def bits_per_weight(parts: list[QuantizableModule], formats: Mapping[str, str]) -> float:
    """Mean bits of the units' weights under an assignment (units not named are BF16)."""
    bits = sum(unit.bits(formats.get(unit.path, "bf16")) for unit in parts)
    return bits / sum(unit.numbers for unit in parts)


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total
