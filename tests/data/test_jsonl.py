"""JSON Lines: every usable line, in order, and a count with a reason of the others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_lite.data import load_corpus, read_jsonl
from nemotron_lite.data.jsonl import LINE_LIMIT, _lines
from nemotron_lite.input_files import FileError

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1)


@given(texts=TEXTS, pure_ascii=st.booleans(), ending=st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=100)
def test_any_texts_come_back(
    texts: list[str], pure_ascii: bool, ending: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    lines = [json.dumps({"id": 3, "text": t}, ensure_ascii=pure_ascii) for t in [*texts, "end"]]
    file.write_bytes(ending.join(lines).encode())
    found = read_jsonl(file)
    expected = [(i, t) for i, t in enumerate([*texts, "end"], start=1) if t]
    assert list(found.documents) == expected
    assert found.skipped == {} and found.first_skipped is None


BAD = {
    b"{": "not JSON",
    b'{"text": "cut o': "not JSON",
    b"[" * 100_000: "not JSON",
    b'{"text": NaN}': "not JSON",
    b'{"text": "a"} {"text": "b"}': "not JSON",
    b'{"text": ' + b"9" * 5000 + b"}": "not JSON",
    b'["text"]': "not an object",
    b'"text"': "not an object",
    b"null": "not an object",
    b'{"content": "a"}': "without a field 'text'",
    b'{"text": null}': "with a field 'text' that is no text",
    b'{"text": 3}': "with a field 'text' that is no text",
    b'{"text": ["a"]}': "with a field 'text' that is no text",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "\\ud800"}': "with a character that UTF-8 does not have",
}


@pytest.mark.parametrize("line", list(BAD), ids=lambda line: repr(line[:20]))
def test_a_bad_line_is_left_out_and_counted(line: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n  \n' + line + b'\n{"text": "two"}')
    found = read_jsonl(file)
    assert found.documents == ((1, "one"), (5, "two"))
    assert found.skipped == {BAD[line]: 1}
    assert found.first_skipped == 4


def test_a_line_that_is_too_long(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"text": "one"}\n{"text": "' + b"a" * LINE_LIMIT + b'"}\n')
    assert read_jsonl(file).skipped == {"longer than 16 MiB": 1}


def test_only_a_line_feed_ends_a_line() -> None:
    assert list(_lines("a\u2028b\x85c\rd\ne".encode())) == [
        (1, "a\u2028b\x85c\rd".encode()), (2, b"e"),
    ]  # fmt: skip


def test_a_file_without_a_usable_line_names_the_fields(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"content": "a", "id": 1}\n{"content": "b"}\n[]\n')
    with pytest.raises(FileError) as caught:
        read_jsonl(file)
    assert str(caught.value) == (
        f"{file} holds no usable line of JSON: 2 without a field 'text', 1 not an object (the "
        "first is line 1); fields found: 'content', 'id'"
    )
    assert len(read_jsonl(file, text_field="content").documents) == 2
    file.write_text("\n\n")
    with pytest.raises(FileError, match="it is empty"):
        read_jsonl(file)
    os.remove(file)
    with pytest.raises(FileNotFoundError):
        read_jsonl(file)
    os.mkfifo(file)
    with pytest.raises(FileError, match="named pipe"):
        read_jsonl(file)


def test_lines_are_documents_of_a_corpus(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": f"document {i} " * 20}) for i in range(30)]
    file.write_text("\n".join([*lines, "broken"]))
    found = load_corpus(file, held_out_bytes=1000)
    assert len(found.train) + len(found.held_out) == 30
    assert found.skipped == {"lines not JSON": 1}
    assert caplog.records[0].getMessage() == f"{file}: left out of the text: lines not JSON (1)."
    assert found.train[0].content.startswith(b"document ")
