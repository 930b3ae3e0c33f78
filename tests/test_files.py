"""Atomic writes: the path holds the old content or the new one, and no temporary file stays."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemotron_lite import files
from nemotron_lite.files import atomic_file, atomic_folder, check_writable_folder


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


def test_a_library_may_replace_the_temporary_file(tmp_path: Path) -> None:
    """safetensors does: the lock has to outlive the first file of that name."""
    with atomic_file(tmp_path / "one") as first:
        (first.parent / ".tmp123").write_text("1")
        (first.parent / ".tmp123").replace(first)
        with atomic_file(tmp_path / "two") as second:
            second.write_text("2")
        (first.parent / ".tmp456").write_text("left over")
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
    assert (tmp_path / "one").read_text() == "1"


def test_a_folder_that_was_taken_for_abandoned_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the creation of a temporary folder and its lock, another process may delete it."""
    real, names = secrets.token_hex, []

    def name(size: int) -> str:
        names.append(real(size))
        return names[-1]

    def delete_first(handle: int, operation: int) -> None:
        if len(names) == 1:
            shutil.rmtree(tmp_path / f".nemotron-lite.writing-{names[0]}")

    monkeypatch.setattr(files.secrets, "token_hex", name)
    monkeypatch.setattr(files.fcntl, "flock", delete_first)
    with atomic_file(tmp_path / "one") as temporary:
        temporary.write_text("1")
    assert len(names) == 2
    assert os.listdir(tmp_path) == ["one"]


def test_files_of_others_are_not_removed(tmp_path: Path) -> None:
    digits = "0123456789abcdef"
    kept = [
        ".novel.writing-2026",
        f".novel.writing-{digits}",
        f".nemotron-lite.writing-{digits}.txt",
        ".nemotron-lite.writing-draft",
        ".m.saving-20261129",
        ".m.saving-anything",
        f".other.saving-{digits}",
    ]
    for other in kept:
        (tmp_path / other).mkdir()
        (tmp_path / other / "chapter1").write_text("x")
    abandoned = [f".nemotron-lite.writing-{digits}", f".m.saving-{digits}"]
    for ours in abandoned:
        (tmp_path / ours).mkdir()
    with atomic_file(tmp_path / "scores.json") as temporary:
        temporary.write_text("{}")
    with atomic_folder(tmp_path / "m") as folder:
        (folder / "file").touch()
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "m", "scores.json"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_or_a_link_with_our_name_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    pipe, link = (tmp_path / f".nemotron-lite.writing-{digit * 16}" for digit in "01")
    os.mkfifo(pipe)  # opening it to read would wait for ever
    link.symlink_to(tmp_path / "mine")
    with atomic_file(tmp_path / "scores.json") as temporary:
        temporary.write_text("{}")
    assert (tmp_path / "mine" / "file").exists()


def test_what_cannot_be_removed_does_not_stop_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the folder that a killed process of another user left in a shared folder."""
    left = tmp_path / f".nemotron-lite.writing-{'0' * 16}"
    left.mkdir()
    real = os.open

    def refuse(path: Any, *args: Any) -> int:
        if Path(path) == left:
            raise PermissionError(13, "Permission denied")
        return real(path, *args)

    monkeypatch.setattr(files.os, "open", refuse)
    with atomic_file(tmp_path / "scores.json") as temporary:
        temporary.write_text("{}")
    assert (tmp_path / "scores.json").read_text() == "{}"


def test_permissions_are_kept(tmp_path: Path) -> None:
    """Also where a library replaces the temporary file by one with other permissions."""
    usual = tmp_path / "usual"
    usual.touch()
    old, new = tmp_path / "old", tmp_path / "new"
    old.touch()
    old.chmod(0o640)
    for path in (old, new):
        with atomic_file(path) as temporary:
            temporary.unlink()
            temporary.touch(mode=0o600)
    assert old.stat().st_mode & 0o777 == 0o640
    assert new.stat().st_mode == usual.stat().st_mode


def test_permissions_of_a_folder_are_kept(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    for permissions in (0o700, 0o750):
        (tmp_path / "old").mkdir(exist_ok=True)
        (tmp_path / "old").chmod(permissions)
        with atomic_folder(tmp_path / "old") as folder:
            (folder / "file").touch()
            assert folder.stat().st_mode & 0o777 & ~permissions == 0, "nor open while it is written"
        assert (tmp_path / "old").stat().st_mode & 0o777 == permissions
    with atomic_folder(tmp_path / "new") as folder:
        (folder / "file").touch()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("name", [".", "m", "new", "new/deep/er", "link", "m/../new"])
def test_a_probe_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes").touch()
    (tmp_path / "link").symlink_to("m")
    before = sorted(tmp_path.rglob("*"))
    check_writable_folder(tmp_path / name)
    check_writable_folder(str(tmp_path / name))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("file", NotADirectoryError, "is a file; name a folder"),
        ("file/below", NotADirectoryError, "a part of this path is a file"),
        ("x" * 256, OSError, "the name is too long"),
        ("x" * 256 + "/below", OSError, "the name is too long"),
    ],
)
def test_a_probe_says_why_a_folder_cannot_be_written(
    tmp_path: Path, name: str, kind: type[OSError], text: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(kind, match=text) as raised:
        check_writable_folder(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "your disk quota is used up; free some space"),
        (errno.EROFS, "mounted read-only"),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_errors_of_a_disk_are_explained_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, text: str, exists: bool
) -> None:
    if exists:
        (tmp_path / "m").mkdir()
    before = os.listdir(tmp_path)

    def full(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=text) as raised:
        check_writable_folder(tmp_path / "m")
    assert raised.value.errno == code
    assert f"{tmp_path / 'm'} cannot be written ({os.strerror(code)})" in str(raised.value)
    with pytest.raises(OSError, match=text), atomic_folder(tmp_path / "m") as folder:
        (folder / "file").touch()
    assert os.listdir(tmp_path) == before


def test_errors_about_other_files_stay_as_they_are(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match="nowhere"),
        atomic_folder(tmp_path / "m") as folder,
    ):
        (folder / "copy").write_bytes((tmp_path / "nowhere").read_bytes())
    assert os.listdir(tmp_path) == []
