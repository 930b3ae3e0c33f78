"""A folder, a folder of the hub's cache, or a hub id: found on disk, or an error that helps."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from nemotron_lite import CheckpointError, load
from nemotron_lite.checkpoint import storage_summary
from nemotron_lite.checkpoint.locations import cache_folder, resolve

COMMIT, OTHER = "a1" * 20, "a1b2" + "c3" * 18
VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no variable that names another."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def cached(cache: Path, saved: Path) -> Path:
    """A model in the cache, as the hub's programs keep it: links to blobs, and a ref."""
    folder = cache / "models--nvidia--tiny.Model-v1"
    for commit in (COMMIT, OTHER):
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (folder / "blobs").mkdir(exist_ok=True)
        for file in saved.iterdir():
            shutil.copy(file, folder / "blobs" / f"hash-{file.name}")
            (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    refs = {"main": COMMIT, "v2": OTHER, "refs/pr/3": OTHER}
    for name, commit in refs.items():
        (folder / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / name).write_text(commit)
    return folder


def problem(path: str | Path) -> str:
    with pytest.raises(CheckpointError) as error:
        resolve(path)
    return str(error.value)


@pytest.mark.parametrize(
    ("revision", "commit"),
    [
        ("", COMMIT),
        ("@main", COMMIT),
        ("@v2", OTHER),
        ("@refs/pr/3", OTHER),
        (f"@{OTHER}", OTHER),
        (f"@{OTHER[:8]}", OTHER),
    ],
)
def test_a_hub_id_is_found_in_the_cache(cached: Path, revision: str, commit: str) -> None:
    assert resolve(f"nvidia/tiny.Model-v1{revision}") == cached / "snapshots" / commit


def test_it_is_the_snapshot_that_the_hub_s_own_package_finds(cached: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    for revision in ("main", "v2", OTHER):
        theirs = hub.try_to_load_from_cache(
            "nvidia/tiny.Model-v1", "config.json", cache_dir=cached.parent, revision=revision
        )
        assert resolve(f"nvidia/tiny.Model-v1@{revision}") == Path(theirs).parent


def test_both_open(cached: Path) -> None:
    expected = load(cached / "snapshots" / COMMIT).num_parameters()
    assert load("nvidia/tiny.Model-v1").num_parameters() == expected
    assert load(cached).num_parameters() == expected
    assert storage_summary("nvidia/tiny.Model-v1") == storage_summary(cached)


def test_a_local_folder_is_preferred(cached: Path, saved: Path) -> None:
    shutil.copytree(saved, Path("nvidia/tiny.Model-v1"))
    assert resolve("nvidia/tiny.Model-v1") == Path("nvidia/tiny.Model-v1")


def test_without_a_ref_the_only_snapshot_is_taken(cached: Path) -> None:
    shutil.rmtree(cached / "refs")
    assert "has no revision 'main' of nvidia/tiny.Model-v1" in problem(cached)
    shutil.rmtree(cached / "snapshots" / OTHER)
    assert resolve(cached) == cached / "snapshots" / COMMIT


@pytest.mark.parametrize("revision", ["v3", "../../..", "a1", OTHER[:3] + "d", "a/../../../b"])
def test_an_unknown_revision_lists_those_there_are(cached: Path, revision: str) -> None:
    text = problem(f"nvidia/tiny.Model-v1@{revision}")
    assert COMMIT in text
    assert "hf download nvidia/tiny.Model-v1 --revision" in text


def test_a_ref_that_is_a_pipe_or_names_another_place(cached: Path) -> None:
    ref = cached / "refs" / "main"
    ref.write_text("../../../../etc")
    assert "has no revision" in problem(cached)
    ref.unlink()
    os.mkfifo(ref)
    assert "has no revision" in problem(cached)


def test_an_interrupted_download(cached: Path) -> None:
    (cached / "blobs" / "hash-model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a link to a file that"):
        load("nvidia/tiny.Model-v1")


def test_what_is_not_there_says_how_to_download_it(cache: Path) -> None:
    text = problem("nvidia/Nemotron-3@v1")
    assert f"the cache of the hub ({cache}) does not hold" in text
    assert "`hf download nvidia/Nemotron-3 --revision v1`" in text
    assert "`hf download nvidia/Nemotron-3 --revision v1 --local-dir DIR`" in text
    assert "runs/small" in problem("runs/mine")
    assert "runs/small" in problem("/nowhere/at/all")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/a"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"HF_HOME": "$TOP/b", "TOP": "/t"}, "/t/b/hub"),
        ({"HF_HOME": "~/b", "HOME": "/h"}, "/h/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HOME": "/h", "HF_HOME": ""}, "/h/.cache/huggingface/hub"),
    ],
)
def test_the_variables_of_the_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_the_home_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert resolve("~/model") == saved


def test_gguf_names_the_way(tmp_path: Path, saved: Path) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF\3\0\0\0")
    (folder / "README.md").write_text("")
    for path in (folder, folder / "model-Q4_K_M.gguf"):
        text = problem(path)
        assert "llama.cpp" in text
        assert "hf download" in text
    (saved / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    assert resolve(saved) == saved, "beside safetensors it does not matter"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
def test_a_file_of_a_folder_names_the_folder(saved: Path, name: str) -> None:
    (saved / "README.md").write_text("")
    assert f"give the folder that holds it, {saved}" in problem(saved / name)


@pytest.mark.parametrize(
    "path", ["", "a" * 5000, "a/" * 3000, "\0", "a\nb", "org/na\0me", "-", "[x]*", "a/b/c"]
)
def test_names_that_are_no_paths(cache: Path, path: str) -> None:
    if path == "":
        assert resolve(path) == Path()
        return
    text = problem(path)
    assert len(text) < 2000
    assert "\n\n" not in text


def test_a_checkpoint_with_a_folder_called_snapshots_is_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "snapshots" / "step100").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    assert resolve(tmp_path) == tmp_path
