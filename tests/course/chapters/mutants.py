"""A mutant: an answer that is wrong in one way, as people have been wrong before.

`mutants.py` in the folder of a chapter holds them, by exercise; `test_graders.py` asks that the
checks catch every one and send the learner to the hint that helps.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A wrong answer: what is wrong, its source, the hint a learner needs, where it was seen."""

    name: str
    source: str
    hint: int
    bug: str
