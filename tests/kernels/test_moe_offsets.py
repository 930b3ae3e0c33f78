"""Offsets of the router's and the experts' kernels at a million tokens of Ultra.

22 million (token, slot) pairs times a width of 5,120, and 512 matrices of 10 million elements: both
are far more than 32 bits can count. There a product of two 32-bit integers wraps, and a kernel
reads and writes wrong addresses without an error. Here every kernel runs its last program, with its
true sizes and strides, and 32-bit arithmetic that overflows raises. No memory is allocated for
these offsets: loads of floats give zeros and stores do nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.errors import InterpreterError

from nemotron_kernels import experts, grouped, routing, sorting
from tests.kernels.interpreter import overflow_is_an_error

TOKENS, TOP_K, E, HIDDEN, WIDTH = 1_000_000, 22, 512, 5120, 2048
LAST = TOKENS * TOP_K - 1
APART = 2 * WIDTH  # tokens as slices of a wider tensor; a million of them alone stay below 2^31


@contextlib.contextmanager
def _last_program(program: int, integers: bool = True) -> Iterator[None]:
    """Run only the program with this number, without memory for floats."""
    builder: Any = triton_interpreter.interpreter_builder
    real = builder.create_masked_load

    def load(pointers: Any, mask: Any, *rest: Any) -> Any:
        kind = pointers.get_element_ty()
        if integers and kind.is_int():
            return real(pointers, mask, *rest)
        zeros = np.zeros(pointers.data.shape, dtype=np.int32 if kind.is_int() else np.float32)
        return triton_interpreter.TensorHandle(zeros, tl.int32 if kind.is_int() else kind)

    builder.create_masked_load = load
    builder.create_masked_store = lambda *_: None
    builder.set_grid_idx = lambda *_: setattr(builder, "grid_idx", (program, 0, 0))
    try:
        with overflow_is_an_error():
            yield
    finally:
        for name in ("create_masked_load", "create_masked_store", "set_grid_idx"):
            delattr(builder, name)


@triton.jit
def _narrow(x_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + rows * WIDTH, 0.0, mask=rows >= 0)


@pytest.fixture(scope="module")
def last_pair() -> torch.Tensor:
    """Every place has the last pair. At 88 MB, it is the only tensor here of its true size."""
    return torch.full((LAST + 1,), LAST, dtype=torch.int32)


def test_an_overflow_in_32_bits_is_found() -> None:
    with _last_program(LAST // 16), pytest.raises(InterpreterError, match="overflow"):
        _narrow[(1,)](torch.zeros(1), WIDTH=WIDTH, BLOCK=16)


@pytest.mark.parametrize(("gather", "stage"), [(True, 1), (False, 0), (True, 2)])
def test_grouped_rows(last_pair: torch.Tensor, gather: bool, stage: int) -> None:
    x, tile = torch.zeros(1), torch.tensor([LAST], dtype=torch.int32)
    ends = torch.full((E + 1,), LAST + 1, dtype=torch.int32)
    across = HIDDEN // 128
    with _last_program(across - 1):
        grouped._grouped_rows_kernel[(1,)](
            x,
            x,
            x,
            x,
            x,
            x,
            last_pair,
            ends,
            torch.tensor([E - 1], dtype=torch.int32),
            tile,
            APART,
            HIDDEN * WIDTH,
            1,
            WIDTH,
            sorting.MAX_PAIRS,
            N=HIDDEN,
            K=WIDTH,
            TOP_K=TOP_K,
            STAGE=stage,
            GATHER=gather,
            PRECISION="ieee",
            ROWS=16,
            COLUMNS=128,
            DEPTH=64,
        )


@pytest.mark.parametrize("strides", [(WIDTH, 1), (1, HIDDEN)])
def test_grouped_outer(last_pair: torch.Tensor, strides: tuple[int, int]) -> None:
    x, starts = torch.zeros(1), torch.tensor([0] * (E - 1) + [LAST - 99, LAST + 1]).int()
    tiles = (HIDDEN // 128) * (WIDTH // 128)
    with _last_program(E * tiles - 1):
        grouped._grouped_outer_kernel[(1,)](
            x,
            x,
            x,
            x,
            last_pair,
            starts,
            APART,
            *strides,
            M=HIDDEN,
            N=WIDTH,
            TOP_K=TOP_K,
            WEIGHTED=True,
            PRECISION="ieee",
            ROWS=128,
            COLUMNS=128,
            DEPTH=64,
        )


@pytest.mark.parametrize("is_sorted", [True, False])
def test_combine(last_pair: torch.Tensor, is_sorted: bool) -> None:
    x = torch.zeros(1)
    with _last_program(2 * TOKENS - 1):
        experts._combine_kernel[(1,)](
            x,
            last_pair,
            x,
            x,
            TOKENS,
            TOP_K=TOP_K,
            WIDTH=WIDTH,
            SORTED=is_sorted,
            WEIGHTED=True,
            TOKENS=1,
            COLUMNS=1024,
        )


def test_matvec() -> None:
    x, pairs = torch.zeros(1), 128
    indices = torch.full((pairs,), E - 1)
    with _last_program(pairs * HIDDEN // 16 - 1):
        experts._matvec_kernel[(1,)](
            x,
            x,
            indices,
            x,
            WIDTH,
            HIDDEN * WIDTH,
            WIDTH,
            1,
            E=E,
            N=HIDDEN,
            K=WIDTH,
            PAIRS_PER_ROW=TOP_K,
            ACTIVATE=True,
            ROWS=16,
            DEPTH=512,
        )


def test_router_at_eight_million_tokens() -> None:
    tokens, x, i = 8_000_000, torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    assert tokens * E > 2**31
    with _last_program(tokens // 4 - 1, integers=False):
        routing._route_kernel[(1,)](
            x,
            x,
            x,
            i,
            x,
            tokens,
            E,
            5.0,
            E=E,
            TOP_K=TOP_K,
            N_GROUP=8,
            TOPK_GROUP=4,
            NORMALIZE=True,
            ROWS=4,
            EXPERTS=E,
            SLOTS=32,
            GROUPS=8,
        )
        routing._route_backward_kernel[(1,)](
            x,
            i,
            x,
            x,
            x,
            tokens,
            E,
            5.0,
            E=E,
            TOP_K=TOP_K,
            NORMALIZE=True,
            HAS_WEIGHTS=True,
            HAS_SCORES=True,
            ROWS=4,
            EXPERTS=E,
            SLOTS=32,
        )


def test_sort_of_as_many_pairs_as_it_takes() -> None:
    i = torch.zeros(1, dtype=torch.int32)
    with _last_program(sorting.MAX_PAIRS // 256, integers=False):
        sorting._count_kernel[(1,)](i, i, sorting.MAX_PAIRS, E=E, EXPERTS=E, BLOCK=256)
        sorting._place_kernel[(1,)](
            i,
            i,
            i,
            i,
            i,
            sorting.MAX_PAIRS,
            E=E,
            BLOCK=256,
            CHUNK=64,
        )
    with _last_program(E // 16 - 1, integers=False):
        sorting._offsets_kernel[(1,)](i, i, 600, E=E, ROWS=64, COLUMNS=16)
