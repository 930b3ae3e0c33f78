"""Offsets beyond 2^31: at a million tokens of Ultra no 32-bit arithmetic may wrap.

Ultra has 18,432 convolution channels and 16,384 gated ones in a projection of 35,072 rows: at 2^20
tokens that is 3.7e10 elements, and a 32-bit product of an index and a stride is a wrong address.
Each kernel here runs the program with the largest indices, with its true sizes and strides. No
memory is allocated for them: loads give zeros and stores do nothing. So only addresses are
computed, and one that overflows raises.
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

from nemotron_kernels import conv, conv_step, norm, ssd, state_update, verification
from nemotron_kernels._compat import MOST_ROWS
from tests.kernels.interpreter import overflow_is_an_error

TOKENS, INNER, CHANNELS, PROJECTION = 2**20, 16_384, 18_432, 35_072
HEADS, P, N = 256, 64, 128


@contextlib.contextmanager
def _program(*index: int) -> Iterator[None]:
    """Inside, every launch runs only this program, without memory."""
    builder: Any = triton_interpreter.interpreter_builder

    def load(pointers: Any, *_: Any) -> Any:
        kind = pointers.get_element_ty()
        zeros = np.zeros(pointers.data.shape, triton_interpreter._get_np_dtype(kind))
        return triton_interpreter.TensorHandle(zeros, kind)

    builder.create_load = builder.create_masked_load = load
    builder.create_store = builder.create_masked_store = lambda *_: None
    builder.set_grid_idx = lambda *_: setattr(builder, "grid_idx", (*index, 0, 0)[:3])
    try:
        with overflow_is_an_error():
            yield
    finally:
        for name in ("load", "masked_load", "store", "masked_store"):
            delattr(builder, f"create_{name}")
        del builder.set_grid_idx


@triton.jit
def _narrow(x_ptr, stride, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + token * stride, 0.0)


def test_an_overflow_in_32_bits_is_found() -> None:
    with _program(TOKENS // 16 - 1), pytest.raises(InterpreterError, match="overflow"):
        _narrow[(1,)](torch.zeros(1), PROJECTION, BLOCK=16)


# A few long rows of a wide projection; or the most rows that a grid allows, each within 32 bits.
LONG_AND_MANY = [(TOKENS, 3, PROJECTION), (2**15, MOST_ROWS - 1, CHANNELS)]


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize(("tokens", "row", "width"), LONG_AND_MANY)
def test_convolution_forward(tokens: int, row: int, width: int, options: bool) -> None:
    x, i = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    given = (x, i, i) if options else (None, None, None)
    # The last tokens, and the first ones, which write the final state; of the last sequence.
    for block in (tokens // 16 - 1, 0):
        with _program(block, CHANNELS // 256 - 1, row):
            conv._conv_forward[(1,)](
                x,
                x,
                x,
                *given,
                x,
                x,
                tokens,
                CHANNELS,
                tokens * width,
                width,
                4,
                3 * CHANNELS,
                CHANNELS,
                tokens,
                TAPS=4,
                BLOCK_T=16,
                BLOCK_C=256,
            )


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize(("tokens", "row", "width"), LONG_AND_MANY)
def test_convolution_backward(tokens: int, row: int, width: int, options: bool) -> None:
    x, i = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    given = (x, i, i, x, x, x, x) if options else (None, None, None, x, None, x, None)
    stretches = tokens // 4
    with _program(stretches - 1, CHANNELS // 256 - 1, row):
        conv._conv_backward[(1,)](
            x,
            x,
            x,
            *given,
            x,
            tokens,
            CHANNELS,
            stretches,
            tokens * width,
            width,
            4,
            3 * CHANNELS,
            CHANNELS,
            tokens,
            tokens * CHANNELS,
            CHANNELS,
            3 * CHANNELS,
            CHANNELS,
            TAPS=4,
            STRETCH=4,
            BLOCK_C=256,
        )


def test_convolution_step_of_the_most_sequences() -> None:
    x, batch = torch.zeros(1), MOST_ROWS
    assert batch * 3 * CHANNELS > 2**31
    with _program(CHANNELS // 256 - 1, batch - 1):
        conv_step._conv_step[(1,)](
            x,
            x,
            x,
            x,
            x,
            x,
            CHANNELS,
            3 * CHANNELS,
            CHANNELS,
            3 * CHANNELS,
            CHANNELS,
            PROJECTION,
            4,
            TAPS=4,
            BLOCK_C=256,
        )


@pytest.mark.parametrize("gated", [True, False])
def test_norms(gated: bool) -> None:
    x = torch.zeros(1)
    z, groups = (x, 8) if gated else (None, 1)
    size = INNER // groups
    with _program(TOKENS - 1, groups - 1):
        norm._norm_forward[(1,)](
            x, z, x, x, TOKENS, INNER, size, 1e-5, INNER, PROJECTION, BLOCK_R=1, BLOCK_N=size
        )
    with _program(TOKENS // 4 - 1, groups - 1):
        norm._norm_backward[(1,)](
            x,
            z,
            x,
            x,
            x,
            z,
            x,
            TOKENS,
            INNER,
            size,
            1e-5,
            INNER,
            PROJECTION,
            INNER,
            ROWS=4,
            BLOCK_R=1,
            BLOCK_N=size,
        )


@pytest.mark.parametrize("half", [True, False])
def test_state_update_of_four_thousand_sequences(half: bool) -> None:
    x, batch = torch.zeros(1), 4096
    state = x.half() if half else x
    with _program(P // 16 - 1, HEADS - 1, batch - 1):
        state_update._state_update[(1,)](
            state,
            x,
            x,
            x,
            x,
            x,
            x,
            x,
            x,
            None,
            2**40,
            x,
            HEADS,
            HEADS // 8,
            HEADS * P * N,
            P * N,
            N,
            PROJECTION,
            P,
            PROJECTION,
            1,
            0,
            1,
            0,
            PROJECTION,
            N,
            PROJECTION,
            N,
            1,
            0,
            PROJECTION,
            P,
            1,
            0,
            HEADS * P,
            P,
            P=P,
            N=N,
            SOFTPLUS=True,
            SEEDED=half,
            ROUNDS=5,
            BLOCK_P=16,
            BLOCK_N=N,
        )


def test_verification_of_four_thousand_drafts() -> None:
    x, i, batch, k, size = torch.zeros(1), torch.zeros(1, dtype=torch.int64), 4096, 7, 131_072
    assert batch * (k + 1) * size > 2**31
    with _program(batch - 1):
        verification._verify_kernel[(1,)](
            x,
            x,
            i,
            x.double(),
            i,
            i,
            i,
            k,
            size,
            (k + 1) * size,
            size,
            k * size,
            size,
            BLOCK=16_384,
        )


def test_more_rows_than_a_grid_has_are_refused() -> None:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(1).expand(MOST_ROWS + 1, *shape)

    one, taps = torch.ones(1), torch.ones(8, 4)
    calls = [
        lambda: conv.causal_conv1d(zeros(5, 8), taps),
        lambda: conv_step.causal_conv1d_step(zeros(3, 8), zeros(8), taps),
        lambda: ssd.ssd(zeros(5, 1, 4), zeros(5, 1), one, zeros(5, 1, 4), zeros(5, 1, 4)),
        lambda: state_update.selective_state_update(
            zeros(1, 4, 1), zeros(1, 4), zeros(1), one, zeros(1, 1), zeros(1, 1)
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="65536 rows; one launch takes at most 65535"):
            call()
