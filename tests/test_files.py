"""`atomic_file`: the path holds the old content or the new one, and no temporary file stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_lite.files import atomic_file


def test_the_new_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text("old")
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old", "nothing is visible before the block ends"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["scores.json"]


def test_an_error_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text("old")

    def write_half() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["scores.json"]


def test_a_full_disk_is_reported_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scores.json"
    path.write_text("old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["scores.json"]


KILLED_WHILE_WRITING = """
import os, signal, sys
from nemotron_lite.files import atomic_file

with atomic_file(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text("old")
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(path)]
    assert subprocess.run(command, cwd=Path(__file__).parents[1]).returncode < 0
    assert path.read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2, "the temporary file of the killed process"
    with atomic_file(tmp_path / "another") as temporary:
        temporary.write_text("new")
    assert sorted(os.listdir(tmp_path)) == ["another", "scores.json"]


def test_a_file_that_is_being_written_is_not_removed(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "one") as first:
        first.write_text("1")
        with atomic_file(tmp_path / "two") as second:
            second.write_text("2")
    assert (tmp_path / "one").read_text() == "1"
    assert (tmp_path / "two").read_text() == "2"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_file(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
