"""Small exercises of a chapter 99 for tests: a function, a class that needs it, a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nemotron_lite.course import Check, Exercise, exercises, own_answers, progress_store
from nemotron_lite.course.exercises import close, gradients

STUB = '''def fade(dt, A):
    """How much of the state stays."""
    raise NotImplementedError
'''
SOLUTION = '''def fade(dt, A):
    """How much of the state stays."""
    return torch.exp(dt * A)
'''


def by_hand(function: Callable[..., Any]) -> None:
    close(function(torch.tensor(1.0), torch.tensor(0.0)), torch.tensor(1.0), what="fade at A = 0")


def many(function: Callable[..., Any]) -> None:
    dt, A = torch.rand(5), -torch.rand(5)
    close(function(dt, A), torch.exp(dt * A), what="fade")


def slopes(function: Callable[..., Any]) -> None:
    gradients(function, lambda dt, A: (dt * A).exp(), {"dt": torch.rand(3), "A": -torch.rand(3)})


FADE = Exercise(
    id="99.fade",
    title="Fade",
    objective="O1: fade.",
    minutes=5,
    difficulty=1,
    points=6,
    task="Write `fade`.",
    stub=STUB,
    solution=SOLUTION,
    hints=("Think of A = 0.", "Use `torch.exp`.", "Do not detach."),
    checks=(
        Check("by hand", by_hand, hint=1, points=1),
        Check("many values", many, hint=2, points=2),
        Check("gradients", slopes, hint=3, points=3),
    ),
)


def a_class(Gate: Callable[..., Any]) -> None:
    close(Gate(3.0).out(torch.ones(2)), torch.full((2,), 3.0), what="out")


def a_step(Gate: Callable[..., Any]) -> None:
    gate = Gate(2.0)
    gate.step()
    close(gate.out(torch.ones(2)), torch.full((2,), 2.0).mul(torch.tensor(-2.0).exp()), what="out")


GATE_HEAD = '''class Gate(nn.Module):
    """A gain that fades at each step."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain

'''
GATE_OUT = "    def out(self, x):\n        return self.gain * x\n\n"
GATE_STEP = (
    "    def step(self):\n"
    "        self.gain = self.gain * fade(torch.tensor(self.gain), torch.tensor(-1.0))\n"
)
TODO_OUT = (
    '    def out(self, x):\n        """x times the gain."""\n        raise NotImplementedError\n\n'
)
TODO_STEP = '    def step(self):\n        """Fade."""\n        raise NotImplementedError\n'
GATE = Exercise(
    id="99.gate",
    title="Gate",
    objective="O2: gate.",
    minutes=5,
    difficulty=2,
    points=2,
    task="Write `Gate`.",
    stub=GATE_HEAD + TODO_OUT + TODO_STEP,
    solution=GATE_HEAD + GATE_OUT + GATE_STEP,
    hints=("Multiply.", "Call `fade`.", "Store it."),
    checks=(Check("out", a_class), Check("step", a_step, hint=2)),
    needs=("99.fade",),
)

KERNEL = '''import torch
import triton
import triton.language as tl


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    """out = x + y."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
{body}

def add(x, y):
    """Launch the kernel."""
    out = torch.empty_like(x)
    add_kernel[(triton.cdiv(x.numel(), 4),)](x, y, out, x.numel(), BLOCK=4)
    return out
'''
STORE = (
    "    sum = tl.load(x + i, mask=mask) + tl.load(y + i, mask=mask)\n"
    "    tl.store(out + i, sum, mask=mask)\n"
)


def sums(function: Callable[..., Any]) -> None:
    x, y = torch.randn(2, 10)
    close(function(x, y), x + y, what="x + y")


ADD = Exercise(
    id="99.add",
    title="Add",
    objective="O3: add.",
    minutes=5,
    difficulty=3,
    points=1,
    task="Write `add_kernel`.",
    stub=KERNEL.format(body="    raise NotImplementedError\n"),
    solution=KERNEL.format(body=STORE),
    hints=("Load.", "Add.", "Store."),
    checks=(Check("ten numbers", sums),),
    kind="optional",
)

CHAPTER = (FADE, GATE, ADD)


def forget() -> None:
    """As after a restart of the kernel."""
    progress_store.forget_memory()
    own_answers.forget()


def use(monkeypatch: pytest.MonkeyPatch, chapter: tuple[Exercise, ...] = CHAPTER) -> None:
    """Make `chapter` the exercises of chapter 99; nothing was done yet."""
    real = exercises.exercises
    monkeypatch.setattr(exercises, "exercises", lambda c: chapter if c == "99" else real(c))
    forget()
