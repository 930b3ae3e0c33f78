"""Small files that are damaged or hostile: each ends in one short error that names the file."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from nemotron_lite import input_files
from nemotron_lite.input_files import FileError, parse_json, read_bytes, read_json, read_text


def named_pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


HOSTILE = {
    "pipe": (named_pipe, "is a named pipe"),
    "device": (link_to_zero, "is a device"),
    "folder": (Path.mkdir, "is a folder"),
    "sparse": (sparse, "expected at most"),
    "nested": (lambda p: p.write_text("[" * 100_000), "nested deeper"),
    "digits": (lambda p: p.write_text('{"a": ' + "1" * 100_000 + "}"), "100,000 digits"),
    "nan": (lambda p: p.write_text('{"a": NaN}'), "NaN"),
    "infinity": (lambda p: p.write_text('{"a": -Infinity}'), "Infinity"),
    "large": (lambda p: p.write_text('{"a": 1e999}'), "too large"),
    "list": (lambda p: p.write_text("[1]"), "holds an array, expected an object"),
    "null": (lambda p: p.write_text("null"), "holds null"),
    "empty": (lambda p: p.write_text(""), "no readable JSON"),
    "cut": (lambda p: p.write_text('{"a": 1'), "no readable JSON"),
    "bytes": (lambda p: p.write_bytes(b'{"a": "\xff"}'), "is not UTF-8"),
    "long": (lambda p: p.write_text('{"a": ' + "x" * 100_000), "no readable JSON"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_ends_in_a_short_error_at_once(name: str, tmp_path: Path) -> None:
    make, fault = HOSTILE[name]
    path = tmp_path / "config.json"
    make(path)
    started = time.monotonic()
    with pytest.raises(FileError, match=fault) as caught:
        read_json(path)
    assert time.monotonic() - started < 5
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 600


def test_a_missing_file_and_a_dangling_link_are_not_found(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("nowhere", "dangling"):
        with pytest.raises(FileNotFoundError):
            read_bytes(tmp_path / name)


def test_links_are_followed_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_text(tmp_path / "link") == "text"
    with pytest.raises(FileError, match="symbolic link"):
        read_text(tmp_path / "link", follow_links=False)


@pytest.mark.parametrize("value", ["a\0b", "a" * 5000])
def test_an_impossible_name_is_an_error_of_the_file(value: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be opened"):
        read_bytes(tmp_path / value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": "[[[["}', {"a": "[[[["}),
        ('["\\"[", "\\\\", 1.5e3, -7]', ['"[', "\\", 1500.0, -7]),
        ('"' + "[" * 1000 + '"', "[" * 1000),
        ("[" * input_files.DEPTH + "]" * input_files.DEPTH, None),
    ],
)
def test_brackets_count_only_outside_of_texts(text: str, value: Any) -> None:
    found = parse_json(text)
    assert value is None or found == value


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "c.json") == {"a": 1}


def test_the_error_crosses_a_process_boundary() -> None:
    error = FileError("/a/b", "is a folder")
    again = pickle.loads(pickle.dumps(error))
    assert (again.path, again.fault, str(again)) == (error.path, error.fault, str(error))


def test_infinity_only_where_it_is_asked_for(tmp_path: Path) -> None:
    """The config.json of released models has a bare Infinity."""
    path = tmp_path / "config.json"
    path.write_text('{"limit": [0.0, Infinity]}')
    assert read_json(path, infinity=True) == {"limit": [0.0, float("inf")]}
    with pytest.raises(FileError, match="Infinity is no JSON number"):
        read_json(path)
    path.write_text('{"limit": NaN}')
    with pytest.raises(FileError, match="NaN"):
        read_json(path, infinity=True)


@pytest.mark.parametrize(
    "text",
    ['"' + '\\"' * 300_000 + "[" * 100, '{"a": "\\\\"}' + "[" * 100, '["' + "[" * 200_000],
    ids=["escaped quotes", "escaped backslash", "text without an end"],
)
def test_brackets_in_texts_do_not_count_and_take_no_time(text: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError):
        parse_json(text)
    assert time.monotonic() - started < 2
    assert parse_json(json.dumps({"text": "[{" * 1000})) == {"text": "[{" * 1000}
