"""Offsets of the SSD kernels at a million tokens of Ultra.

mamba_ssm's kernels multiply indices by strides in 32 bits. From about 61 thousand tokens of Ultra
on they read and write wrong addresses without an error (its issue 1015). Here every kernel runs its
last program with its true sizes and strides, and 32-bit arithmetic that overflows raises. No memory
is allocated for these offsets: loads give zeros and stores do nothing.

Loops over chunks run their first and last iterations only, and count in 32 bits as on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.errors import InterpreterError

from nemotron_kernels import ssd_backward, ssd_forward, ssd_states
from nemotron_kernels._compat import MOST_ROWS
from tests.kernels.interpreter import ends_of_loops, overflow_is_an_error

T, H, G, P, N, Q = 1_000_000, 256, 8, 64, 128, 64
CHUNKS, ROWS = T // Q, MOST_ROWS - 1
Arguments = Callable[[int], dict[str, Any]]
SIZES: dict[str, Any] = dict(R=H // G, P=P, N=N, PAD_N=N, Q=Q, SOFTPLUS=True, PRECISION="ieee")


@contextlib.contextmanager
def _program(*index: int) -> Iterator[None]:
    """Run only the program with these three numbers, without memory."""
    builder: Any = triton_interpreter.interpreter_builder

    def load(pointers: Any, *_: Any) -> Any:
        kind = pointers.get_element_ty()
        dtype = np.int32 if kind.is_int() else np.float16 if kind == tl.float16 else np.float32
        return triton_interpreter.TensorHandle(np.zeros(pointers.data.shape, dtype), kind)

    builder.create_masked_load = load
    builder.create_masked_store = lambda *_: None
    builder.set_grid_idx = lambda *_: setattr(builder, "grid_idx", index)
    try:
        with overflow_is_an_error(), ends_of_loops(ssd_backward, ssd_forward, ssd_states):
            yield
    finally:
        for name in ("create_masked_load", "create_masked_store", "set_grid_idx"):
            delattr(builder, name)


@pytest.fixture(params=[False, True], ids=["tokens first", "heads first"])
def arguments(request: pytest.FixtureRequest) -> Arguments:
    """Pointers and strides for rows of this many tokens, by the kernels' argument names."""
    return functools.partial(_arguments, heads_first=request.param)


def _arguments(tokens: int, heads_first: bool) -> dict[str, Any]:
    half, number = torch.zeros(1, dtype=torch.float16), torch.zeros(1)
    heads = (tokens * H * P, H * P, P, 1)
    groups = (tokens * G * N, G * N, N, 1)
    times = (tokens * H, H, 1)
    if heads_first:
        heads = (tokens * H * P, P, tokens * P, 1)
        groups = (tokens * G * N, N, tokens * N, 1)
        times = (tokens * H, 1, tokens)
    return {
        "x": (half, heads), "dt": (half, times), "A": number, "B": (half, groups),
        "C": (half, groups), "row": (torch.zeros(1, dtype=torch.int32), (tokens, 1)),
    }  # fmt: skip


@triton.jit
def _narrow(x_ptr, stride):
    tl.store(x_ptr + tl.program_id(0) * stride, 0.0, mask=tl.program_id(0) >= 0)


def test_an_overflow_in_32_bits_is_found() -> None:
    with _program(T - 1, 0, 0), pytest.raises(InterpreterError, match="overflow"):
        _narrow[(1,)](torch.zeros(1), H * P)


@pytest.mark.parametrize("reverse", [False, True])
def test_states_of_every_chunk(reverse: bool, arguments: Arguments) -> None:
    v = arguments(T)
    for b, index in ((0, CHUNKS - 1), (ROWS, 0)):
        with _program(index, H - 1, b):
            ssd_states.states_kernel[(1,)](
                *v["x"],
                *v["dt"],
                v["A"],
                *v["B"],
                v["A"],
                None,
                *v["row"],
                v["A"],
                v["A"],
                v["A"],
                T,
                CHUNKS,
                H,
                REVERSE=reverse,
                LOOP=False,
                BLOCK_P=P,
                **SIZES,
            )


@pytest.mark.parametrize("reverse", [False, True])
def test_loops_over_the_chunks_of_many_rows_and_of_many_chunks(
    reverse: bool, arguments: Arguments
) -> None:
    for row, tokens, chunks in ((ROWS, 2 * Q, 2), (3, T, CHUNKS)):
        v = arguments(tokens)
        with _program(0, H - 1, row):
            ssd_states.states_kernel[(1,)](
                *v["x"],
                *v["dt"],
                v["A"],
                *v["B"],
                v["A"],
                v["A"],
                *v["row"],
                v["x"][0],
                None,
                v["A"],
                tokens,
                chunks,
                H,
                REVERSE=reverse,
                LOOP=True,
                BLOCK_P=P,
                **SIZES,
            )
        with _program(0, H - 1, row):
            ssd_states.pass_kernel[(1,)](
                v["A"],
                v["A"],
                v["A"],
                v["x"][0],
                v["A"],
                chunks,
                H,
                P * N,
                REVERSE=reverse,
                BLOCK=P * N,
            )


@pytest.mark.parametrize(("row", "tokens"), [(ROWS, 2 * Q), (0, T)])
def test_fused_rows(row: int, tokens: int, arguments: Arguments) -> None:
    v = arguments(tokens)
    with _program(0, H - 1, row):
        ssd_forward.fused_kernel[(1,)](
            *v["x"],
            *v["dt"],
            v["A"],
            *v["B"],
            *v["C"],
            v["A"],
            v["A"],
            v["A"],
            *v["row"],
            *v["x"],
            v["A"],
            tokens,
            tokens // Q,
            H,
            BLOCK_P=P,
            **SIZES,
        )


@triton.jit
def _narrow_loop(x_ptr, turns, stride):
    for i in range(0, turns):
        tl.store(x_ptr + i * stride, 0.0, mask=i >= 0)


def test_an_overflow_of_a_loop_counter_in_32_bits_is_found() -> None:
    with _program(0, 0, 0), ends_of_loops(sys.modules[__name__]):
        _narrow_loop[(1,)](torch.zeros(1), CHUNKS, 1)
        with pytest.raises(InterpreterError, match="overflow"):
            _narrow_loop[(1,)](torch.zeros(1), CHUNKS, H * P * Q)


def test_scan_of_the_last_chunk(arguments: Arguments) -> None:
    v = arguments(T)
    with _program(CHUNKS - 1, 0, H - 1):
        ssd_forward.scan_kernel[(1,)](
            *v["x"],
            *v["dt"],
            v["A"],
            *v["B"],
            *v["C"],
            v["A"],
            v["A"],
            *v["row"],
            v["x"][0],
            *v["x"],
            T,
            CHUNKS,
            H,
            PAD_P=P,
            HEADS=1,
            **SIZES,
        )


@pytest.mark.parametrize("row", [0, 30])
def test_gradients_of_the_last_chunk(row: int, arguments: Arguments) -> None:
    v = arguments(T)
    number, half = v["A"], v["x"][0]
    given = (*v["x"], *v["dt"], number, *v["B"], *v["C"])
    with _program(CHUNKS - 1, row, 2 * H - 1):  # the second block of n, a program for every head
        ssd_backward.grad_bc_kernel[(1,)](
            *given,
            number,
            *v["row"],
            *v["x"],
            half,
            half,
            half,
            half,
            number,
            T,
            CHUNKS,
            H,
            G,
            H // G,
            PAD_P=P,
            HEADS=1,
            BLOCK_N=64,
            **SIZES,
        )
    with _program(CHUNKS - 1, row, H - 1):
        ssd_backward.grad_x_kernel[(1,)](
            *given,
            number,
            number,
            *v["row"],
            *v["x"],
            half,
            number,
            *v["x"],
            *v["dt"],
            number,
            T,
            CHUNKS,
            H,
            PAD_P=P,
            HEADS=1,
            BLOCKS_N=2,
            **SIZES,
        )
