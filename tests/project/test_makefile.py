"""The Makefile lists its targets, sets up once, and says what is missing.

Nothing is installed here. Each test runs make in an empty folder that holds the three files its
rules read.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with a space in its name, and what make needs to plan a set-up."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


# What an outer make hands down: its own flags, and variables of its command line.
OUTER = (
    "MAKEFLAGS",
    "MAKELEVEL",
    "MFLAGS",
    "MAKEOVERRIDES",
    "ORDER",
    "ARGS",
    "WORKERS",
    "SUBMISSIONS",
)


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run make without the variables that an outer `make test` hands down."""
    env = {k: v for k, v in os.environ.items() if k not in OUTER}
    command = ["make", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def fake_python(folder: Path, body: str) -> str:
    """An interpreter that is nothing but a shell script."""
    path = folder / "fake-python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return f"PYTHON=./{path.name}"


def stamp(folder: Path) -> Path:
    """The stamp that make would leave, read from its own plan."""
    plan = make(folder, "-n", "setup").stdout
    (name,) = {word for word in plan.split() if "/.installed-" in word and "*" not in word}
    return folder / name


def test_make_alone_lists_every_target(clone: Path) -> None:
    listed = make(clone).stdout
    targets = "run test check lab progress notebooks grade bench lint clean"
    for target in targets.split():
        assert f"\n  {target} " in listed


def planned(clone: Path, *words: str) -> str:
    """What make would run in a clone that is set up."""
    if not (clone / ".venv").exists():
        done = stamp(clone)
        done.parent.mkdir()
        done.touch()
    return make(clone, "-n", *words).stdout


def test_tests_run_in_their_order_or_in_a_random_one(clone: Path) -> None:
    assert "random" not in planned(clone, "test")
    shuffled = planned(clone, "test", "ORDER=random")
    assert "--random-order" in shuffled.split()
    assert "seed" not in shuffled
    repeated = planned(clone, "test", "ORDER=42")
    assert {"--random-order", "--random-order-seed=42"} <= set(repeated.split())


def test_check_is_lint_and_the_fast_tests(clone: Path) -> None:
    plan = planned(clone, "check")
    for command in ("ruff check", "mypy", "lint-imports", '-m "not slow" tests'):
        assert command in plan
    assert "slow" not in planned(clone, "test")


def test_chapters_named_reach_the_publisher(clone: Path) -> None:
    plan = make(clone, "-n", "notebooks", "ARGS=01 03").stdout
    assert plan.rstrip().endswith("-m nemotron_lite.authoring.publish 01 03")


def test_arguments_for_jupyter_reach_the_lab(clone: Path) -> None:
    plan = make(clone, "-n", "lab", "ARGS=--port 8899").stdout
    assert plan.rstrip().endswith("-m nemotron_lite.course.lab --port 8899")


def test_progress_is_read_from_work(clone: Path) -> None:
    plan = make(clone, "-n", "progress").stdout
    assert plan.rstrip().endswith("-m nemotron_lite.course.progress_report work")


def test_grading_asks_for_a_folder_and_hands_it_on(clone: Path) -> None:
    done = stamp(clone)
    done.parent.mkdir()
    done.touch()
    refused = make(clone, "grade")
    assert refused.returncode != 0
    assert "make grade SUBMISSIONS=folder" in refused.stdout
    plan = make(clone, "-n", "grade", "SUBMISSIONS=my class").stdout
    assert 'nemotron_lite.coursework.grade "my class"' in plan


def test_a_second_call_installs_nothing(clone: Path) -> None:
    assert "pip install" in make(clone, "-n", "test").stdout
    done = stamp(clone)
    done.parent.mkdir()
    done.touch()
    again = make(clone, "-n", "test").stdout
    assert "pip install" not in again
    assert "pytest" in again


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_dependency_installs_itself(clone: Path, name: str) -> None:
    before = stamp(clone)
    with (clone / name).open("a") as file:
        file.write("# changed\n")
    assert stamp(clone) != before


def test_torch_index_reaches_the_torch_step_alone(clone: Path) -> None:
    plan = make(clone, "-n", "setup", "TORCH_INDEX=elsewhere").stdout.splitlines()
    (line,) = [line for line in plan if "elsewhere" in line]
    assert line.endswith("pip install --extra-index-url elsewhere torch")


def test_an_old_python_is_refused_with_the_way_out(clone: Path) -> None:
    python = fake_python(clone, '[ "$1" = --version ] && echo Python 3.9.2; exit 1')
    run = make(clone, "test", python)
    assert run.returncode != 0
    assert "is Python 3.9.2; nemotron_lite needs Python 3.11 or newer" in run.stdout
    assert not (clone / ".venv").exists()


def test_a_missing_python_is_named(clone: Path) -> None:
    run = make(clone, "test", "PYTHON=python-that-is-not-there")
    assert run.returncode != 0
    assert "There is no 'python-that-is-not-there' here" in run.stdout


def test_a_python_without_venv_is_told_what_to_install(clone: Path) -> None:
    python = fake_python(clone, '[ "$1" = -c ] && exit 0; mkdir -p .venv; exit 1')
    run = make(clone, "test", python)
    assert run.returncode != 0
    assert "apt install python3-venv" in run.stdout
    assert not (clone / ".venv").exists(), "a half-made .venv would look finished next time"
