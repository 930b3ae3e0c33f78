"""A mutant: a wrong answer with one mistake that a real project has made.

`mutants.py` in the folder of a chapter lists them by exercise. `test_graders.py` tests that the
checks refuse every one and name the hint that helps.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A wrong answer: its name, its source, the hint that helps, and where the bug was seen."""

    name: str
    source: str
    hint: int
    bug: str
