"""`setup`: the same numbers twice, a line that holds everywhere, Triton asked in time."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from nemotron_lite.course import predictions, progress_store, session, setup
from tests.course.conftest import Shown

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    import plotly.io as pio

    threads, theme = torch.get_num_threads(), pio.templates.default
    yield
    torch.set_num_threads(threads)
    pio.templates.default = theme


def test_the_line_is_the_same_everywhere(shown: Callable[..., Shown]) -> None:
    first, last = shown(setup, "01").bundles  # in a notebook the last one replaces the first
    assert first["text/plain"] == last["text/plain"] == "Chapter 01 · ready"
    assert "loading torch" in first["text/html"]
    assert torch.__version__ in last["text/html"]
    assert "<style>/* The look of the chapters" in last["text/html"]


def test_the_same_numbers_twice() -> None:
    draws = []
    for _ in range(2):
        own = torch.rand(2, generator=setup("01", seed=3).generator).tolist()
        draws.append((own, torch.rand(2).tolist(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]
    setup("01", seed=4)
    assert torch.rand(2).tolist() != draws[0][1]


def test_threads_are_set_and_shown() -> None:
    assert setup("01", threads=1).threads == 1
    assert torch.get_num_threads() == 1


def test_stored_guesses_stay() -> None:
    progress_store.put("guesses/01.speed", 3)
    setup("01")
    assert progress_store.get("guesses/01.speed") == 3
    assert predictions._CURRENT["chapter"] == "01"
    progress_store.forget_memory()


def test_a_cell_that_ends_in_setup_says_it_once(shown: Callable[..., Shown]) -> None:
    result = shown(setup, "01").result
    assert shown(result._ipython_display_).bundles == []


@pytest.mark.parametrize("chapter", ["1", "chapter 01", "", "001"])
def test_a_chapter_is_two_digits(chapter: str) -> None:
    with pytest.raises(ValueError, match="expected two digits"):
        setup(chapter)


def test_no_threads_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 or more"):
        setup("01", threads=0)


PROGRAM = """
import sys
for name in ("plotly", "IPython", "ipywidgets"):
    sys.modules[name] = None  # as if it were not installed
import os, torch
torch.cuda.is_available = lambda: False
from nemotron_lite.course import measured, predict, progress, setup, show, show_source, tell
setup("01")
from nemotron_lite.course import predictions
asked = predictions.Prediction("x", "How many?", low=4)
predictions.load_predictions = lambda chapter: {"x": asked}
predict("x")
measured("x", 4)
tell("{super.layers} layers.")
list(progress(range(2), "steps"))
print(os.environ["TRITON_INTERPRET"])
try:
    show(object())
except ImportError as error:
    print(error)
"""


def test_without_the_lab_the_verbs_still_speak_and_triton_is_asked_for_its_interpreter() -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    messages = run.stdout.splitlines()
    assert messages[:2] == ["Chapter 01 · ready", "Predict: How many?"]
    assert "measured: x" in messages
    assert messages[-2] == "1"
    assert messages[-1].startswith("This needs plotly, which is not installed.")
    assert "pip install 'nemotron-lite[lab]'" in messages[-1]


@pytest.mark.parametrize(
    ("interpret", "imported", "expected", "words"),
    [
        (None, False, "1", "in its interpreter"),
        (None, True, None, "restart the kernel"),
        ("0", False, "0", "restart the kernel"),
        ("1", True, "1", "in its interpreter"),
    ],
)
def test_triton_is_asked_in_time_and_a_choice_is_respected(
    monkeypatch: pytest.MonkeyPatch,
    interpret: str | None,
    imported: bool,
    expected: str | None,
    words: str,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", interpret or "")
    if interpret is None:
        monkeypatch.delenv("TRITON_INTERPRET")
    if not imported:
        monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert words in session._choose_triton_mode()
    assert os.environ.get("TRITON_INTERPRET") == expected
