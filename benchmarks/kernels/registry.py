"""The list of cases: each is compiled for every GPU, and checked and timed on one.

A case is one public function at one shape of a real model. Each `cases_*.py` beside this file holds
a list `CASES`; three programs read them:

- aot.py compiles every case for sm_80, 90, 100 and 120 on a machine without a GPU, and compares
  registers, spills, shared memory and matrix instructions with benchmarks/records/kernels_aot.json;
- device.py, on a GPU, checks every case twice against its exact definition and then times it;
- catalogue.py writes the tables of kernels/README.md.

A case makes its inputs through `Draw`, so that a dry run gets uninitialized tensors. With
`backward=True` the gradients of all `leaves` are checked and timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass
class Draw:
    """Random tensors on one device; uninitialized ones in a dry run, which reads no values."""

    device: str
    seed: int = 0
    dry: bool = False
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def tokens(self, count: int) -> int:
        """`count`; in a dry run at most 512, for which the same kernels are compiled."""
        return min(count, 512) if self.dry else count

    def normal(
        self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0
    ) -> Tensor:
        """Normally distributed, rounded to `dtype`."""
        if self.dry:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return (torch.randn(shape, generator=self.generator, device=self.device) * scale).to(dtype)

    def uniform(
        self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Uniform between `low` and `high`, rounded to `dtype`."""
        if self.dry:
            return torch.empty(shape, dtype=dtype, device=self.device)
        unit = torch.rand(shape, generator=self.generator, device=self.device)
        return (unit * (high - low) + low).to(dtype)

    def integers(
        self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """Uniform integers in [low, high); in a dry run all are `low`."""
        if self.dry:
            return torch.full(shape, low, dtype=dtype, device=self.device)
        return torch.randint(
            low, high, shape, generator=self.generator, device=self.device, dtype=dtype
        )


Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One function at one shape.

    Attributes:
        op: the public function, such as "causal_conv1d".
        name: the variant, such as "forward" or "backward, documents". "forward: Q 64, 8 warps" is
            "forward" in another configuration; the catalogue leaves such cases out.
        shape: the model and size in words, such as "Super, 8192 tokens".
        inputs: makes fresh inputs, by name.
        run: the kernel: takes the inputs by name, returns its float outputs.
        exact: the definition; takes the same inputs (floats converted to float64) and returns
            the same outputs.
        tolerance: largest relative rms error of the outputs, or of the gradients if `backward`;
            one number for all of them, or one for each.
        bytes: the smallest number of bytes that has to be read and written.
        flops: multiplications and additions; 0 where memory is the only limit.
        leaves: inputs whose gradients are computed; needed with `backward`.
        backward: check and time the backward pass alone.
        in_place: inputs that `run` overwrites; each checked call gets a fresh copy of them.
        peers: other implementations: name -> function with the arguments of `run`. A peer that
            is not installed raises ImportError when called.
        key: cases with the same key compile the same kernels; the dry run compiles the first.
    """

    op: str
    name: str
    shape: str
    inputs: Callable[[Draw], Inputs]
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    exact: Callable[..., Tensor | tuple[Tensor, ...]]
    tolerance: float | Sequence[float]
    bytes: int
    flops: int = 0
    leaves: Sequence[str] = ()
    backward: bool = False
    in_place: Sequence[str] = ()
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    key: str = ""

    def __str__(self) -> str:
        return f"{self.op} {self.name}, {self.shape}"

    @property
    def compiled_as(self) -> str:
        """The name of this case in the snapshot."""
        return self.key or str(self)

    def with_leaves(self, inputs: Inputs) -> Inputs:
        """The inputs; those in `leaves` require gradients."""
        return {k: v.requires_grad_() if k in self.leaves else v for k, v in inputs.items()}


def outputs_of(found: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """One tensor or several, as a list."""
    return [found] if isinstance(found, Tensor) else list(found)


def gradients(outputs: list[Tensor], leaves: list[Tensor], draw: Draw) -> list[Tensor]:
    """Gradients of the leaves, for random gradients of the outputs.

    The random gradients are rounded to bfloat16, whatever the dtype of the outputs, so that a
    kernel and its definition in float64 get the same numbers.
    """
    given = [draw.normal(*y.shape).to(y.dtype) for y in outputs]
    return list(torch.autograd.grad(outputs, leaves, given, retain_graph=True))


def all_cases() -> list[Case]:
    """Every case of every cases_*.py, in the order of the files.

    Raises:
        ValueError: two cases have the same name.
    """
    cases = [
        case
        for path in sorted(Path(__file__).parent.glob("cases_*.py"))
        for case in importlib.import_module(f"benchmarks.kernels.{path.stem}").CASES
    ]
    names = [str(case) for case in cases]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(
            f"several cases are called {sorted(twice)}; the records identify cases by name."
        )
    return cases
