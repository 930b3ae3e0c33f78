"""The list of cases: what is compiled for every GPU, and on one checked and timed.

A case is one public function at one shape of a real model. `cases_*.py` beside this file each hold
a list `CASES`; three programs read them:

- aot.py compiles every case for sm_80, 90, 100 and 120 on a machine without a GPU, and compares
  registers, spills, shared memory and matrix instructions with benchmarks/records/kernels_aot.json;
- device.py, on a GPU, checks every case twice against its exact definition and then times it;
- catalogue.py writes the tables of kernels/README.md.

A case draws its inputs through `Draw`, so that a dry run gets tensors that cost nothing. With
`backward=True` the gradients of all `leaves` are what is checked and timed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# A checkout that was not installed works as well.
sys.path[:0] = [str(p) for p in (ROOT / "kernels", ROOT, HERE) if str(p) not in sys.path]


@dataclass
class Draw:
    """Random tensors on one device; uninitialised ones in a dry run, which reads none of them.

    `tokens` is the number of tokens the case should take: its own on a GPU, few in a dry run.
    """

    device: str
    seed: int = 0
    dry: bool = False
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def tokens(self, count: int) -> int:
        """`count`, but at most 512 in a dry run: the kernels that are compiled stay the same."""
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
        """Uniform integers, `high` left out; `low` everywhere in a dry run."""
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
        name: what of it, such as "forward" or "backward, packed". "forward: Q 64, 8 warps" is
            "forward" in another configuration: compiled, checked and timed, not in the catalogue.
        shape: the model and size in words, such as "Super, 8192 tokens".
        inputs: makes fresh inputs, by name.
        run: the kernel: takes the inputs by name, returns its float outputs.
        exact: the definition in float64; takes the same inputs (as float64 where they are floats)
            and returns the same outputs.
        tolerance: largest relative rms error of the outputs, or of the gradients if `backward`;
            one for all, or one for each.
        bytes: the least that has to be read and written.
        flops: multiplications and additions that matter, 0 where memory is the only limit.
        leaves: inputs whose gradients are wanted; needed with `backward`.
        backward: check and time the backward pass alone.
        in_place: inputs that `run` overwrites; each call gets them back as they were.
        peers: other implementations: name -> function with the arguments of `run`. One that is
            not installed raises ImportError when called.
        key: cases with the same key compile the same kernels; the dry run takes the first.
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
        """The inputs, with gradients asked for where this case wants them."""
        return {k: v.requires_grad_() if k in self.leaves else v for k, v in inputs.items()}


def outputs_of(found: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """One tensor or several, as a list."""
    return [found] if isinstance(found, Tensor) else list(found)


def gradients(outputs: list[Tensor], leaves: list[Tensor], draw: Draw) -> list[Tensor]:
    """Gradients of the leaves, for random gradients of the outputs.

    These have bfloat16's digits whatever the dtype of the outputs, so that a kernel and its
    definition in float64 are given the same numbers.
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
        for path in sorted(HERE.glob("cases_*.py"))
        for case in importlib.import_module(path.stem).CASES
    ]
    names = [str(case) for case in cases]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"several cases are called {sorted(twice)}; each name stands in a record.")
    return cases
