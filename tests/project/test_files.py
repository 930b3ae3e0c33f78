"""Small rooms: no file over 400 lines, and each opens with a docstring that says something.

Ruff's D1 rules ask for a docstring on every public function, class and method. It lets private
modules pass, so the docstring of a module is asked for here.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 400
SHORTEST_LESSON = 60  # characters


def python_files() -> list[Path]:
    """Every Python file of the project, found by folder so that .venv is never walked."""
    folders = ("nemotron_lite", "benchmarks", "kernels", "tests", "exercises")
    return [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]


def faults(source: str) -> list[str]:
    """What is wrong with the size and the opening lines of one file."""
    found = []
    lines = len(source.splitlines())
    if lines > MOST_LINES:
        found.append(f"{lines} lines; at most {MOST_LINES}: two ideas in one file?")
    lesson = ast.get_docstring(ast.parse(source)) or ""
    if len(lesson) < SHORTEST_LESSON:
        found.append(f"the module docstring {lesson!r} does not say what the file is for")
    return found


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_file_is_a_small_room(path: Path) -> None:
    assert faults(path.read_text()) == []


def test_a_long_file_and_a_missing_lesson_are_found() -> None:
    lesson = f'"""{"What this room is for. " * 4}"""\n'
    assert faults(lesson + "x = 1\n" * 399) == []
    assert "401 lines" in faults(lesson + "x = 1\n" * 400)[0]
    assert "docstring 'Utils.'" in faults('"""Utils."""')[0]
    assert len(faults("x = 1")) == 1
