"""Which chapters there are: the folders `chapters/chNN_name` of this package, by number."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).with_name("chapters")


def chapter_folders() -> dict[str, Path]:
    """The number of each chapter ("00", "01", ...) and its folder, in order."""
    return {path.name[2:4]: path for path in sorted(FOLDER.glob("ch[0-9][0-9]_*"))}
