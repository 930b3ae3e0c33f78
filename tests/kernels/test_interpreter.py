"""The test-only patches of the interpreter change its speed and its manners, never its numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.kernels.interpreter import overflow_is_an_error

ROOT = Path(__file__).resolve().parents[2]


@triton.jit
def _softmax_rows(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    for row in range(0, rows):
        x = tl.load(x_ptr + row * BLOCK + columns)
        x = tl.exp(x - tl.max(x, axis=0))
        tl.store(y_ptr + row * BLOCK + columns, x / tl.sum(x, axis=0))


@triton.jit
def _far_offset(y_ptr, index, stride, WIDE: tl.constexpr):
    if WIDE:
        index = index.to(tl.int64)
    offset = index * stride
    tl.store(y_ptr + tl.arange(0, 16) + offset, 1.0, mask=tl.arange(0, 16) < 0)


PROGRAM = """
import sys, torch
sys.path.insert(0, "kernels")
from tests.kernels import interpreter, test_interpreter
interpreter.indices_from_arrays()  # without it Triton 3.6 cannot run a loop under numpy 2.4
if sys.argv[1] == "patched":
    interpreter.patch_once_per_launch()
torch.manual_seed(0)
x, y = torch.randn(5, 64), torch.empty(5, 64)
test_interpreter._softmax_rows[(1,)](x, y, 5, BLOCK=64)
sys.stdout.buffer.write(y.numpy().tobytes())
"""


def _in_a_process(name: str) -> bytes:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, name], cwd=ROOT, capture_output=True, timeout=120
    )
    assert run.returncode == 0, run.stderr.decode()
    return run.stdout


def test_patched_and_plain_interpreter_give_the_same_bits() -> None:
    patched = _in_a_process("patched")
    assert len(patched) == 5 * 64 * 4
    assert patched == _in_a_process("plain")


def test_softmax_is_right_under_the_patches() -> None:
    x = torch.randn(3, 64)
    y = torch.empty(3, 64)
    _softmax_rows[(1,)](x, y, 3, BLOCK=64)
    torch.testing.assert_close(y, x.softmax(-1))


def test_fresh_memory_is_poisoned() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(3)).isnan().all()
    assert torch.zeros(1).new_empty(3).isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()


def test_a_device_as_context_is_obeyed_while_fresh_memory_is_poisoned() -> None:
    with torch.device("meta"):
        made = [torch.empty(3), torch.empty_strided((3,), (1,)), torch.zeros(3)]
    assert all(tensor.is_meta for tensor in made)


def test_an_overflowing_offset_raises_and_a_wide_one_does_not() -> None:
    y = torch.zeros(16)
    with overflow_is_an_error():
        _far_offset[(1,)](y, 1_000_000, 18_432, WIDE=True)
        with pytest.raises(InterpreterError, match="overflow"):
            _far_offset[(1,)](y, 1_000_000, 18_432, WIDE=False)
    _far_offset[(1,)](y, 1_000_000, 18_432, WIDE=False)  # outside, it wraps in silence
    assert (y == 0).all()
