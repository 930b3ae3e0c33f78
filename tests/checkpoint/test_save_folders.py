"""save writes into every folder that can be written, and says before the work where it cannot."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron_lite import CheckpointError, Nemotron, folder_replacement, load, save
from nemotron_lite.files import check_writable_folder
from tests.checkpoint.test_save_atomic import contents
from tests.checkpoint.tiny import TINY

pytestmark = pytest.mark.usefixtures("no_fsync")
Make = Callable[..., Nemotron]
SMALL = TINY.replace(pattern="M", mtp_pattern="", mtp_depths=0)
NAMES = [
    "a b", "-dash", ".hidden", "ünïcode", "日本語", "new\nline", "tab\t", "[a-z]*?", "it's \"$A\"",
    "~", "x" * 255, "é" * 127, "a.saving-0123456789abcdef", "new",
]  # fmt: skip


@pytest.fixture(params=["exchange", "file by file"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "file by file":
        monkeypatch.setattr(folder_replacement, "exchange_is_safe", lambda new, path: False)
    return request.param


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_of_a_folder(tmp_path: Path, make: Make, name: str, way: str) -> None:
    for seed in (1, 2):
        save(make(SMALL, seed=seed), tmp_path / name)
    (tmp_path / name / "notes").write_text("mine")
    save(make(SMALL, seed=3), f"{tmp_path}/{name}//")
    assert (tmp_path / name / "notes").read_text() == "mine"
    found = load(tmp_path / name).lm_head.weight
    assert found.equal(make(SMALL, seed=3).lm_head.weight)
    assert os.listdir(tmp_path) == [name]
    check_writable_folder(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_a_name_that_safetensors_cannot_open_is_refused(tmp_path: Path, make: Make) -> None:
    with pytest.raises(ValueError, match="is not UTF-8"):
        save(make(SMALL), tmp_path / os.fsdecode(b"not-\xff-utf8"))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_was_renamed_to_such_a_name_says_what_to_do(
    tmp_path: Path, make: Make
) -> None:
    folder = tmp_path / os.fsdecode(b"not-\xff-utf8")
    save(make(SMALL), tmp_path / "m")
    (tmp_path / "m").rename(folder)
    with pytest.raises(CheckpointError, match=r"a path that is not UTF-8.*rename it"):
        load(folder)
    folder.rename(tmp_path / "m")
    assert load(tmp_path / "m").config == SMALL


@pytest.mark.parametrize("path", [".", "..", "../m", "inside/..", "./"])
def test_the_current_folder_is_written_in_place(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (tmp_path / "m" / "inside").mkdir(parents=True)
    (tmp_path / "m" / "inside" / "notes").write_text("mine")
    monkeypatch.chdir(tmp_path / "m" / "inside" if path == ".." else tmp_path / "m")
    for seed in (1, 2):
        save(make(SMALL, seed=seed), path)
    assert Path.cwd().exists()
    assert load(path).lm_head.weight.equal(make(SMALL, seed=2).lm_head.weight)
    assert (tmp_path / "m" / "inside" / "notes").read_text() == "mine"


def test_the_home_folder(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save(make(SMALL), "~/m")
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("path", ["", " ", "a\0b", "~nobody-has-this-name/m"])
def test_what_names_no_folder_is_refused(make: Make, path: str, tmp_path: Path) -> None:
    for call in (lambda: save(make(SMALL), path), lambda: check_writable_folder(path)):
        with pytest.raises(ValueError, match="path="):
            call()


def test_links_in_a_circle_are_refused(tmp_path: Path, make: Make) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises((ValueError, OSError), match="a"):
        save(make(SMALL), tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("dangling", [True, False])
def test_a_link_to_another_place(tmp_path: Path, make: Make, dangling: bool, way: str) -> None:
    if not dangling:
        (tmp_path / "far" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/real")
    save(make(SMALL), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load(tmp_path / "far" / "real").config == SMALL


def test_files_that_are_links_are_replaced_and_not_followed(
    tmp_path: Path, make: Make, way: str
) -> None:
    """As in a snapshot of the hub's cache, whose files other snapshots share."""
    save(make(SMALL, seed=1), tmp_path / "m")
    (tmp_path / "blobs").mkdir()
    for name in os.listdir(tmp_path / "m"):
        shutil.move(tmp_path / "m" / name, tmp_path / "blobs" / name)
        (tmp_path / "m" / name).symlink_to(tmp_path / "blobs" / name)
    before = contents(tmp_path / "blobs")
    save(make(SMALL, seed=2), tmp_path / "m")
    assert contents(tmp_path / "blobs") == before
    assert load(tmp_path / "m").lm_head.weight.equal(make(SMALL, seed=2).lm_head.weight)


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {name: stat.S_IMODE((folder / name).stat().st_mode) for name in os.listdir(folder)}


def test_permissions_follow_the_umask_or_the_old_files(
    tmp_path: Path, make: Make, umask: int, way: str
) -> None:
    folder = tmp_path / "m"
    save(make(SMALL), folder)
    assert set(modes(folder).values()) == {0o666 & ~umask}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
    folder.chmod(0o750)
    (folder / "model.safetensors").chmod(0o600)
    (folder / "config.json").chmod(0o444)
    save(make(SMALL), folder)
    found = modes(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert (found["model.safetensors"], found["config.json"]) == (0o600, 0o444)


def test_the_owner_and_the_group_of_a_folder_stay(tmp_path: Path, make: Make) -> None:
    folder = tmp_path / "m"
    save(make(SMALL), folder)
    folder.chmod(0o2775)  # a folder of a project: what is in it belongs to the group
    if os.geteuid() == 0:
        os.chown(folder, 12, 34)
    before = folder.stat()
    save(make(SMALL), folder)
    after = folder.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (
        before.st_uid, before.st_gid, before.st_mode
    )  # fmt: skip
    assert (folder / "config.json").stat().st_gid == before.st_gid


@pytest.fixture
def plain_user(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of a user whom permissions bind, as they do not bind root."""
    with tempfile.TemporaryDirectory() as name:
        root = os.geteuid() == 0
        if root:
            os.chown(name, 65534, 65534)
            os.setegid(65534)
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            if root:
                os.seteuid(0)
                os.setegid(0)
            for folder in [name, *(root for root, _, _ in os.walk(name))]:
                Path(folder).chmod(0o700)


def test_below_a_folder_that_one_may_not_write(plain_user: Path, make: Make) -> None:
    (plain_user / "parent" / "m").mkdir(parents=True)
    (plain_user / "parent").chmod(0o555)
    (plain_user / "parent" / "m" / "notes").write_text("mine")
    check_writable_folder(plain_user / "parent" / "m")
    for seed in (1, 2):
        save(make(SMALL, seed=seed), plain_user / "parent" / "m")
    found = load(plain_user / "parent" / "m").lm_head.weight
    assert found.equal(make(SMALL, seed=2).lm_head.weight)
    assert (plain_user / "parent" / "m" / "notes").read_text() == "mine"


@pytest.mark.parametrize("where", ["m", "m/new", "m/new/deep"])
def test_a_folder_that_one_may_not_write(plain_user: Path, make: Make, where: str) -> None:
    save(make(SMALL), plain_user / "m")
    before = contents(plain_user / "m")
    (plain_user / "m").chmod(0o555)
    written: list[Any] = []
    for call in (check_writable_folder, lambda path: save(make(SMALL, seed=9), path)):
        with pytest.raises(PermissionError, match="give yourself write permission") as raised:
            call(plain_user / where)
        assert str(plain_user / where) in str(raised.value)
        assert raised.value.errno is not None
    assert contents(plain_user / "m") == before
    assert not written


MOUNTS = """
import json, os, subprocess, sys
from pathlib import Path

from nemotron_lite import Nemotron, load, save
from nemotron_lite.files import check_writable_folder
from tests.checkpoint.test_save_folders import SMALL, contents

top = Path(sys.argv[1])
found = {}
size = 0


def mount(*arguments):
    subprocess.run(["mount", *map(str, arguments)], check=True)


def seed_of(folder):
    weight = load(folder).lm_head.weight
    return next(s for s in range(9) if weight.equal(Nemotron(SMALL, seed=s).lm_head.weight))


def twice(name, folder):
    (folder / "notes").write_text("mine")
    check_writable_folder(folder)
    for seed in (1, 2):
        save(Nemotron(SMALL, seed=seed), folder)
    kept = (folder / "notes").read_text() == "mine"
    rest = [entry for entry in os.listdir(folder) if entry.startswith(".")]
    found[name] = [seed_of(folder), kept, rest, os.path.ismount(folder)]


for name in ("volume", "bound", "source", "other/inside", "full", "read"):
    (top / name).mkdir(parents=True)
mount("-t", "tmpfs", "none", top / "volume")
twice("mount point", top / "volume")
mount("--bind", top / "source", top / "bound")
twice("bind mount", top / "bound")
found["bind mount"][3] = seed_of(top / "source") == 2
mount("-t", "tmpfs", "none", top / "other" / "inside")
(top / "other" / "inside" / "moments").write_text("mine")
twice("mount inside", top / "other")
found["mount inside"][3] = os.path.ismount(top / "other" / "inside")

save(Nemotron(SMALL, seed=1), top / "sized")
size = sum(len(content) for content in contents(top / "sized").values())
mount("-t", "tmpfs", "-o", f"size={int(size * 1.6)}", "none", top / "full")
for name, folder in (("full mount", top / "full"), ("full disk", top / "full" / "m")):
    save(Nemotron(SMALL, seed=1), folder)
    before = contents(folder)
    try:
        save(Nemotron(SMALL, seed=2), folder)
        found[name] = "it fits"
    except OSError as error:
        found[name] = [error.errno, str(error).replace(str(top), ""), contents(folder) == before]
    for file in before:
        (folder / file).unlink()
    found[name].append(os.listdir(top / "full"))
(top / "full" / "m").rmdir()

save(Nemotron(SMALL, seed=1), top / "read" / "m")
mount("--bind", top / "read", top / "read")
mount("-o", "remount,ro,bind", top / "read")
for name, call in (
    ("read-only save", lambda: save(Nemotron(SMALL, seed=2), top / "read" / "m")),
    ("read-only probe", lambda: check_writable_folder(top / "read" / "m")),
    ("read-only new", lambda: save(Nemotron(SMALL, seed=2), top / "read" / "new")),
):
    try:
        call()
        found[name] = "written"
    except OSError as error:
        found[name] = [error.errno, str(error).replace(str(top), "")]
print(json.dumps(found))
"""


def test_mounts_full_disks_and_read_only_ones(tmp_path: Path) -> None:
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"]).returncode:
        pytest.skip("this system does not let us mount")
    done = subprocess.run(
        [*unshare, sys.executable, "-c", MOUNTS, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("mount point") == [2, True, [], True]
    assert found.pop("bind mount") == [2, True, [], True]
    assert found.pop("mount inside") == [2, True, [], True]
    for name in ("full mount", "full disk"):
        code, text, unchanged, left = found.pop(name)
        assert code == 28
        assert "/full" in text
        assert "the disk is full; free some space" in text
        assert unchanged
        assert left in ([], ["m"]), "no partial file stays"
    for text in found.values():
        assert text[0] == 30
        assert "mounted read-only; name a folder on another one" in text[1]
    assert len(found) == 3


def test_a_folder_in_use_keeps_its_place(tmp_path: Path, make: Make) -> None:
    """A file that another program appends to is still the same file after a save."""
    save(make(SMALL, seed=1), tmp_path / "m")
    with (tmp_path / "m" / "log.csv").open("a") as log:
        log.write("1\n")
        log.flush()
        save(make(SMALL, seed=2), tmp_path / "m")
        log.write("2\n")
    assert (tmp_path / "m" / "log.csv").read_text() == "1\n2\n"
