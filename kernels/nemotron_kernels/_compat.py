"""Code that all kernels of this package share: devices, block sizes, and checks of inputs.

Three ways to run the same launcher:

- on a GPU, as usual;
- in Triton's interpreter (`TRITON_INTERPRET=1` before Python starts): numpy runs each program, one
  after another, on CPU tensors. It is slow and exact, and the tests use it;
- as a dry run: every kernel is compiled for a chosen GPU and none is launched. This needs no GPU
  (benchmarks/kernels/dry_run.py).

Rules that the kernels follow, because breaking them has caused errors:

- Offsets into tensors are 64-bit: an index is widened *before* it is multiplied by a stride.
  A million tokens times Ultra's 18,432 convolution channels is more than 2^31 elements.
- Arithmetic is in float32. 16-bit values are only loaded and stored; the interpreter gets bfloat16
  sums wrong, and `tl.dot` on it too. Where a dot takes 16-bit operands it reads `DOT_F32` and
  widens them first when interpreting.
- Block sizes come from a table per architecture, not from autotuning: what is tested is what runs.
- No block pointers (gone in Triton 3.9), and no mask that joins a block with a scalar (refused by
  3.9's interpreter); scalars go into the bound instead.

Source: Triton 3.6 to 3.9. Left out: AMD and Intel GPUs, on which nothing here was tested.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "nemotron_kernels needs triton, which is not installed. On Linux: pip install 'triton>=3.6'"
        " (or a CUDA build of torch, which brings it). Elsewhere use impl='auto', which"
        " takes an implementation in PyTorch there."
    ) from error

INTERPRET: bool = bool(triton.knobs.runtime.interpret)
"""True when TRITON_INTERPRET was set as triton was imported; fixed from then on."""

DOT_F32 = tl.constexpr(INTERPRET)
"""For kernels: widen the operands of `tl.dot` to float32 (the interpreter's bfloat16 is wrong)."""

MOST_ROWS = 65_535  # CUDA's limit for the second and third axis of a grid
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_dry_run = False


def set_dry_run(on: bool) -> None:
    """Let launchers take CPU tensors although nothing will be launched (dry_run.py only)."""
    global _dry_run
    _dry_run = on


@dataclass(frozen=True)
class Config:
    """Block sizes and launch options of one kernel on one architecture.

    `blocks` are constexpr arguments of the kernel; `kwargs` holds all keyword arguments of the
    launch. Fused multiply-add is set explicitly, because Triton is about to change its default.
    """

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2
    fp_fusion: bool = True
    kwargs: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fp_fusion,
        }
        object.__setattr__(self, "kwargs", {**self.blocks, **options})

    def __getitem__(self, block: str) -> int:
        return self.blocks[block]


def arch() -> int:
    """Compute capability of the current device as 80, 90, 100, ...; 0 in the interpreter.

    Raises:
        RuntimeError: the current device is no NVIDIA GPU.
    """
    if INTERPRET:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        raise RuntimeError(
            f"nemotron_kernels is written for NVIDIA GPUs, and the current device is a "
            f"{target.backend} {target.arch}. Use impl='auto', which takes PyTorch."
        )
    return int(target.arch)


def by_arch(table: Mapping[int, Config]) -> Config:
    """The entry for the current device, or else the entry of the newest older architecture.

    The key 0 is the interpreter's entry. It has few programs and big blocks, because in the
    interpreter each program costs more than the elements in it. Without that entry, the
    interpreter uses the one of the oldest GPU.

    Raises:
        RuntimeError: the device is older than every entry.
    """
    here = arch()
    if here == 0:
        return table[min(table)]
    older = [key for key in table if 0 < key <= here]
    if not older:
        oldest = min(key for key in table if key > 0)
        raise RuntimeError(
            f"This GPU is sm_{here}; the kernels need sm_{oldest} or newer. "
            "Use impl='auto', which takes an implementation in PyTorch here."
        )
    return table[max(older)]


def check_inputs(op: str, *tensors: Tensor | None) -> None:
    """Refuse inputs that the kernel `op` cannot take; all must be on the first tensor's device.

    Raises:
        RuntimeError: tensors on the CPU outside the interpreter.
        ValueError: tensors on several devices, or an element type the kernels have no code for.
    """
    given = [x for x in tensors if x is not None]
    device = given[0].device
    for x in given:
        if x.device != device:
            raise ValueError(
                f"{op}: one input is on {device}, another on {x.device}; move them to one device."
            )
        if x.is_floating_point() and x.dtype not in FLOATS:
            raise ValueError(
                f"{op}: the kernel takes float32, bfloat16 and float16, not {x.dtype}. "
                "Use impl='auto', which takes an implementation in PyTorch."
            )
    if device.type != "cuda" and not INTERPRET and not _dry_run:
        raise RuntimeError(
            f"{op}: the tensors are on {device}, and the Triton kernel runs on an NVIDIA GPU. "
            "Move them with .to('cuda'), or use impl='auto', or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernel in Triton's interpreter."
        )


def check_rows(op: str, rows: int) -> None:
    """Refuse more rows than the second or third axis of a grid can have.

    Raises:
        ValueError: `rows` is above the limit; the message has the limit.
    """
    if rows > MOST_ROWS:
        raise ValueError(
            f"{op}: {rows} rows; one launch takes at most {MOST_ROWS}. Pass the batch in parts."
        )


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which the device of `x` is the current one, so that kernels launch there."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def unit_stride(x: Tensor) -> Tensor:
    """`x`, contiguous along its last axis; copied only if it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()
