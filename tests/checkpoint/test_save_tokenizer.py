"""A tokenizer.json that is already in the folder: removed with its model, or kept for its user."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from nemotron_lite import Nemotron, load, save
from nemotron_lite.checkpoint.old_tokenizer import judge
from tests.checkpoint.test_round_trip import tokenizer
from tests.checkpoint.tiny import TINY

pytestmark = pytest.mark.usefixtures("no_fsync")
Make = Callable[..., Nemotron]
SMALL = TINY.replace(pattern="M", mtp_pattern="", mtp_depths=0)  # 128 tokens
SHARDS: dict[str, Any] = dict(max_shard_bytes=4000)
OTHER_WORDS = Tokenizer.from_str(tokenizer(128).to_str().replace('"w', '"other'))
FITTING = {
    "a smaller one": tokenizer(100).to_str(),
    "one of the same size": tokenizer(128).to_str(pretty=True),
    "one with other words": OTHER_WORDS.to_str(),
}
NOT_FITTING = {
    "a larger one": tokenizer(129).to_str(),
    "an empty object": "{}",
    "no json": "tokens: a, b, c",
    "an empty file": "",
    "half of one": tokenizer(128).to_str()[:500],
}
ALL = FITTING | NOT_FITTING


def kept(folder: Path) -> dict[str, str]:
    """Content of the renamed files by name."""
    return {file.name: file.read_text() for file in sorted(folder.glob("tokenizer.json.kept*"))}


@pytest.fixture(params=["never saved", "saved without", "saved with", "saved in shards"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, make: Make) -> Path:
    """What a user may put a tokenizer.json into."""
    path = tmp_path / "m"
    path.mkdir()
    if request.param != "never saved":
        shards = SHARDS if "shards" in request.param else {}
        own = None if "without" in request.param else tokenizer(120)
        save(make(SMALL, seed=3), path, own, **shards)
    return path


@pytest.mark.parametrize("content", FITTING.values(), ids=FITTING)
def test_a_file_of_the_user_that_fits_stays(folder: Path, make: Make, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    for shards in ({}, SHARDS, {}):
        save(make(SMALL), folder, **shards)
        assert (folder / "tokenizer.json").read_text() == content
        assert load(folder).tokenizer.get_vocab() == Tokenizer.from_str(content).get_vocab()
    assert kept(folder) == {}


@pytest.mark.parametrize("content", NOT_FITTING.values(), ids=NOT_FITTING)
def test_a_file_of_the_user_that_does_not_fit_is_renamed(
    folder: Path, make: Make, content: str
) -> None:
    """The folder loads, and nothing is lost, however often it is saved."""
    for _ in range(2):
        (folder / "tokenizer.json").write_text(content)
        with pytest.warns(UserWarning, match=r"does not fit this model.*kept as tokenizer\.json\."):
            save(make(SMALL), folder)
        assert load(folder).tokenizer is None
        assert kept(folder) == {"tokenizer.json.kept": content}
    save(make(SMALL), folder)
    (folder / "tokenizer.json").write_text("another")
    with pytest.warns(UserWarning, match=r"kept as tokenizer\.json\.kept-2"):
        save(make(SMALL), folder)
    assert kept(folder) == {"tokenizer.json.kept": content, "tokenizer.json.kept-2": "another"}


@pytest.mark.parametrize("content", ALL.values(), ids=ALL)
def test_a_model_with_a_tokenizer_does_not_overwrite_the_user_s(
    folder: Path, make: Make, content: str
) -> None:
    (folder / "tokenizer.json").write_text(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(make(SMALL), folder, tokenizer(128))
    assert load(folder).tokenizer.to_str() == tokenizer(128).to_str()
    if content == FITTING["one of the same size"]:
        assert (kept(folder), caught) == ({}, [])
    else:
        assert kept(folder) == {"tokenizer.json.kept": content}
        (warning,) = caught
        assert "is not the one of this model" in str(warning.message)


def test_what_a_save_has_written_goes_with_its_model(tmp_path: Path, make: Make) -> None:
    """Without a warning, and nothing is renamed: it is part of the checkpoint that is replaced."""
    folder = tmp_path / "m"
    for first in ({}, SHARDS):
        save(make(SMALL), folder, tokenizer(128), **first)
        save(make(SMALL), folder, tokenizer(100), **first)
        assert load(folder).tokenizer.get_vocab_size() == 100
        save(make(SMALL), folder)
        assert not (folder / "tokenizer.json").exists() and kept(folder) == {}


def test_the_tokenizer_of_a_file_with_settings_of_a_call_is_the_same(
    tmp_path: Path, make: Make
) -> None:
    """`load` leaves truncation and padding out, so saving the model does not rename the file."""
    save(make(SMALL), tmp_path)
    words = tokenizer(128)
    words.enable_truncation(2)
    words.enable_padding(length=9)
    words.save(str(tmp_path / "tokenizer.json"))
    save(load(tmp_path), tmp_path)
    assert kept(tmp_path) == {}


def test_an_edited_file_is_the_user_s(tmp_path: Path, make: Make) -> None:
    """Also if a save has written it: one change of its bytes, and it may be the only copy."""
    save(make(SMALL), tmp_path, tokenizer(128))
    edited = (tmp_path / "tokenizer.json").read_text().replace("WhitespaceSplit", "Whitespace")
    (tmp_path / "tokenizer.json").write_text(edited)
    with pytest.warns(UserWarning, match="kept as"):
        save(make(SMALL), tmp_path, tokenizer(128))
    assert kept(tmp_path) == {"tokenizer.json.kept": edited}


def test_a_link_of_the_user(tmp_path: Path, make: Make) -> None:
    """As in a hub cache: the file that it leads to is never touched."""
    save(make(SMALL), tmp_path / "m")
    blob = tmp_path / "blob"
    for content, model_has in ((FITTING["a smaller one"], None), ("{}", None), ("{}", 128)):
        blob.write_text(content)
        path = tmp_path / "m" / "tokenizer.json"
        path.unlink(missing_ok=True)
        path.symlink_to(blob)
        fits = content != "{}"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            save(make(SMALL), tmp_path / "m", model_has and tokenizer(model_has))
        assert blob.read_text() == content
        assert path.is_symlink() == fits and len(caught) == (not fits)
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    save(make(SMALL), tmp_path / "m")
    assert path.is_symlink()


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_stays(tmp_path: Path, make: Make, kind: str) -> None:
    save(make(SMALL), tmp_path)
    path = tmp_path / "tokenizer.json"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    save(make(SMALL), tmp_path)
    assert path.is_fifo() if kind == "pipe" else path.is_dir()
    with pytest.raises(ValueError, match=r"tokenizer\.json is a"):
        load(tmp_path)


@pytest.mark.parametrize("weights", [b"", b"\xff" * 100, b"\x02" + bytes(7) + b"{}"])
def test_damaged_weights_say_nothing(tmp_path: Path, weights: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "tokenizer.json").write_text(tokenizer(100).to_str())
    assert judge(tmp_path, None, 128).stays
    assert judge(tmp_path / "nothing", None, 128) == (False, None)
