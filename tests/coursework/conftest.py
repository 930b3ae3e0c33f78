"""The coursework, made once for all tests: nbgrader takes seconds to start.

Tests that use it have the same xdist group, so that one process makes it for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from nemotron_lite.coursework import make


@dataclass(frozen=True)
class Fresh:
    """A course folder with source/, release/ and gradebook.db, and the notebooks' texts by path."""

    root: Path
    texts: dict[str, str]


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    root = tmp_path_factory.mktemp("course")
    return Fresh(root, make.generate(root))
