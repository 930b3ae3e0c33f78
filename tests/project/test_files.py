"""Every Python file opens with a docstring that says what the file is for.

Ruff's D1 rules ask for a docstring on every public function, class and method. They let private
modules pass, so the docstring of a module is checked here. The length of a file is not: one idea in
100 to 400 lines is a habit, and a longer file that holds one idea is better than two that need each
other.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORTEST = 60  # characters


def python_files() -> list[Path]:
    """Every Python file of the project, found by folder so that .venv is never walked."""
    folders = ("nemotron_lite", "benchmarks", "kernels", "tests", "exercises")
    return [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]


def faults(source: str) -> list[str]:
    """What is wrong with the opening lines of one file."""
    opening = ast.get_docstring(ast.parse(source)) or ""
    if len(opening) < SHORTEST:
        return [f"the module docstring {opening!r} does not say what the file is for"]
    return []


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_says_what_it_is_for(path: Path) -> None:
    assert faults(path.read_text()) == []


def test_a_missing_explanation_is_found() -> None:
    explained = f'"""{"What this file is for. " * 4}"""\n'
    assert faults(explained + "x = 1\n" * 600) == []
    assert "docstring 'Utils.'" in faults('"""Utils."""')[0]
    assert len(faults("x = 1")) == 1
