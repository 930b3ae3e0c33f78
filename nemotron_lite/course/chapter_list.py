"""The chapters of the course: the folders `chapters/chNN_name`, by number."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).with_name("chapters")


def chapter_folders() -> dict[str, Path]:
    """Number of a chapter ("00", "01", ...) → its folder, in order."""
    return {path.name[2:4]: path for path in sorted(FOLDER.glob("ch[0-9][0-9]_*"))}
