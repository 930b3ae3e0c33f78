"""What a learner's process can import: what the cells need, and nothing that scores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_lite.course import exercises
from nemotron_lite.coursework import make
from nemotron_lite.coursework.learner_package import needed_modules, write_package

NEVER = ("exercises", "checks", "compare", "own_answers", "scoring", "grade", "make", "mutants")


def test_imports_are_followed() -> None:
    found = set(needed_modules(["from nemotron_lite import NemotronConfig"]))
    assert {"nemotron_lite", "nemotron_lite.config", "nemotron_lite.hf_config"} <= found
    assert not {name.rpartition(".")[2] for name in found} & set(NEVER)
    found = set(needed_modules(["def f():\n    from nemotron_lite.ops.norm import rms_norm"]))
    assert {"nemotron_lite.ops.norm", "nemotron_lite.ops", "nemotron_lite.ops.scan"} <= found
    assert needed_modules(["import torch", "from os import path"]) == {}


@pytest.mark.parametrize(
    "source",
    ["from nemotron_lite.course import exercises", "import nemotron_lite.coursework.scoring",
     "from nemotron_lite.course.chapters.ch01_selective_scan import checks",
     "from nemotron_lite.authoring import publish"],
)  # fmt: skip
def test_what_scores_is_never_copied(source: str, tmp_path: Path) -> None:
    write_package(tmp_path, [source])
    assert not {path.stem for path in tmp_path.rglob("*.py")} & set(NEVER)


@pytest.mark.parametrize("chapter", make.chapters())
def test_no_chapter_needs_what_scores(chapter: str, tmp_path: Path) -> None:
    write_package(tmp_path, [e.stub for e in exercises.exercises(chapter)])
    assert not {path.stem for path in tmp_path.rglob("*.py")} & set(NEVER)
    assert not list(tmp_path.rglob("*.toml"))


def test_the_copy_can_be_imported_and_the_rest_says_why_not(tmp_path: Path) -> None:
    write_package(tmp_path, ["%matplotlib inline\nfrom nemotron_lite import NemotronConfig"])
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from nemotron_lite.coursework.learner_process import OnlyHere
sys.meta_path.insert(0, OnlyHere)
from nemotron_lite import NemotronConfig
from nemotron_lite.course import check, hint, own, setup, progress, show_source
assert check("01.x", len).points == 0
assert [*progress([1, 2], "label", 2)] == [1, 2]
assert own("01.x", len) is len
setup("01").anything(hint("01.x"), show_source)
for name in ("nemotron_lite.ops", "nemotron_lite.course.exercises", "nemotron_kernels"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        assert "not available where coursework is graded" in str(error), error
    else:
        raise SystemExit(name)
print(NemotronConfig.from_preset("tiny-super").hidden_size > 0)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout == "True\n", done.stderr
