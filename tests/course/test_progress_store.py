"""The store: values come back, files are small and whole, trouble is a line and no error."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron_lite.course import progress_store
from tests.course.conftest import Shown

KEY = "guesses/01.speed"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    progress_store.forget_memory()
    yield
    progress_store.forget_memory()


@pytest.fixture
def course(tmp_path: Path) -> Path:
    folder = tmp_path / ".course"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    "value", [3.0, "so much", {"chosen": "ö", "right": True}, [1, 3], 0, False]
)
def test_a_value_comes_back_after_a_restart(course: Path, value: Any) -> None:
    progress_store.put(KEY, value)
    progress_store.forget_memory()
    assert progress_store.get(KEY) == value
    assert [p.name for p in course.rglob("*") if p.is_file()] == ["01.speed.json"]


def test_text_is_a_file_that_can_be_read(course: Path) -> None:
    progress_store.put("answers/01.discretise.py", "x = 'ö'\n")
    assert (course / "answers" / "01.discretise.py").read_text("utf-8") == "x = 'ö'\n"
    assert progress_store.get("answers/01.discretise.py") == "x = 'ö'\n"


def test_without_a_folder_values_stay_in_memory(tmp_path: Path) -> None:
    progress_store.put(KEY, 3)
    assert progress_store.get(KEY) == 3
    assert list(tmp_path.iterdir()) == []
    progress_store.forget_memory()
    assert progress_store.get(KEY, "none") == "none"
    assert progress_store.saved_at(KEY) is None


def test_an_equal_value_keeps_its_date(course: Path) -> None:
    progress_store.put(KEY, 3)
    path = course / f"{KEY}.json"
    path.write_text(json.dumps({"saved": "2026-01-02T03:04:05+00:00", "value": 3}))
    progress_store.put(KEY, 3)
    assert progress_store.saved_at(KEY) == "2026-01-02T03:04:05+00:00"
    progress_store.put(KEY, 4)
    assert progress_store.saved_at(KEY) > "2026-01-02"
    assert progress_store.get(KEY) == 4


@pytest.mark.parametrize(
    "key", ["speed", "../x/y", "guesses/../x", "guesses/.x", "guesses/a/b", ""]
)
def test_a_key_that_leaves_the_folder_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="expected a group and a name"):
        progress_store.put(key, 1)
    with pytest.raises(ValueError, match="expected a group and a name"):
        progress_store.get(key)


DAMAGED = {
    "cut off": b'{"saved": "2026',
    "empty": b"",
    "not a fact": b"[1, 2]",
    "no value": b'{"saved": "2026-01-02"}',
    "no date": b'{"saved": "yesterday", "value": 1}',
    "not text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_set_aside(course: Path, name: str, shown: Callable[..., Shown]) -> None:
    path = course / f"{KEY}.json"
    path.parent.mkdir()
    path.write_bytes(DAMAGED[name])
    seen = shown(progress_store.get, KEY, "default")
    assert seen.result == "default"
    assert "is damaged" in seen.plain
    assert "renamed to 01.speed.json.damaged" in seen.plain
    assert path.with_name("01.speed.json.damaged").read_bytes() == DAMAGED[name]
    progress_store.put(KEY, 5)
    assert progress_store.get(KEY) == 5


def test_a_folder_that_cannot_be_written_is_one_line(
    course: Path, shown: Callable[..., Shown], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full_disk:
        full_disk.setattr(Path, "write_text", refuse)
        seen = shown(progress_store.put, KEY, 3)
        assert "cannot be written" in seen.plain
        assert "No space left on device" in seen.plain
        assert shown(progress_store.put, "guesses/01.size", 4).bundles == []
        assert progress_store.get(KEY) == 3
        assert progress_store.get("guesses/01.size") == 4
    progress_store.put(KEY, 3)  # space was freed: the same value is written now
    progress_store.forget_memory()
    assert progress_store.get(KEY) == 3


def test_a_file_that_may_not_be_read_counts_as_missing(
    course: Path, shown: Callable[..., Shown], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress_store.put(KEY, 3)

    def refuse(*arguments: object, **named: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    seen = shown(progress_store.get, KEY)
    assert seen.result is None
    assert "cannot be read: Permission denied. It counts as missing." in seen.plain
    assert shown(progress_store.get, KEY).bundles == []
    assert (course / f"{KEY}.json").exists()


def test_an_answer_whose_bytes_are_no_text_is_set_aside(course: Path) -> None:
    (course / "answers").mkdir()
    (course / "answers" / "01.discretise.py").write_bytes(b"\xff\xfe")
    assert progress_store.get("answers/01.discretise.py") is None
    assert (course / "answers" / "01.discretise.py.damaged").exists()


def test_a_value_in_memory_is_newer_than_the_file(course: Path) -> None:
    progress_store.put(KEY, 3)
    (course / "guesses").rename(course / "other")
    (course / "guesses").write_text("a file where the folder was")
    progress_store.put(KEY, 4)
    assert progress_store.get(KEY) == 4


def test_a_folder_that_was_deleted_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    progress_store.put(KEY, 3)
    assert progress_store.folder() is None
    assert progress_store.get(KEY) == 3


PROGRAM = """
import sys
from nemotron_lite.course import progress_store
for i in range(40):
    progress_store.put("guesses/01.shared", [sys.argv[1]] * 500 + [i])
    progress_store.put(f"guesses/01.{sys.argv[1]}{i % 4}", i)
    assert len(progress_store.get("guesses/01.shared")) == 501
"""


def test_two_kernels_do_not_damage_each_others_files(course: Path) -> None:
    both = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, name], cwd=course.parent, stdout=-1)
        for name in "ab"
    ]
    for one in both:
        printed, _ = one.communicate(timeout=120)
        assert (one.returncode, printed) == (0, b"")
    assert {progress_store.get(f"guesses/01.{name}3") for name in "ab"} == {39}
    shared = progress_store.get("guesses/01.shared")
    assert set(shared[:500]) in ({"a"}, {"b"})
    assert shared[-1] == 39
    assert sorted(p.suffix for p in (course / "guesses").iterdir()) == [".json"] * 9


def test_facts_stay_beside_the_notebook_when_a_cell_changes_the_folder(
    course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress_store.begin()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    progress_store.put(KEY, 7)
    assert (course / "guesses" / "01.speed.json").is_file()
    progress_store.forget_memory()
    assert progress_store.get(KEY) is None, "a new kernel in that folder finds nothing"


GOOD = b'{"saved": "2026-01-02T03:04:05+00:00", "value": %s}'
BAD_FACTS = {
    **{f"cut at {n}": (GOOD % b"3")[:n] for n in range(0, 50, 4)},
    "nested": GOOD % (b"[" * 100_000),
    "nested and closed": GOOD % (b"[" * 5000 + b"]" * 5000),
    "5,000 digits": GOOD % (b"9" * 5000),
    "infinite": GOOD % b"1e999",
    "not a number": GOOD % b"NaN",
    "a large file": GOOD % (b'"' + b"x" * 2**21 + b'"'),
    "zeros": bytes(4096),
    "year 1": b'{"saved": "0001-01-01T00:00:00+00:00", "value": 3}',
    "year 9999": b'{"saved": "9999-12-31T23:59:59-23:59", "value": 3}',
    "a date that is a number": b'{"saved": 3, "value": 3}',
    "a list as the whole": b"[[]]",
    "another version": b'{"version": 9, "facts": {"speed": 3}}',
}


def put_special(path: Path, kind: str) -> None:
    if kind == "folder":
        (path / "inner").mkdir(parents=True)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            here = Path.cwd()
            os.chdir(path.parent)
            made.bind(path.name)
            os.chdir(here)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(2**40)


@pytest.mark.parametrize(
    "name", [*BAD_FACTS, "folder", "fifo", "socket", "device", "dangling", "loop", "sparse"]
)
@pytest.mark.parametrize("ending", ["", ".py"])
def test_whatever_stands_in_the_place_of_a_fact_is_kept_aside_and_replaced(
    course: Path, name: str, ending: str, shown: Callable[..., Shown]
) -> None:
    key = f"guesses/01.speed{ending}"
    path = course / (key if ending else f"{key}.json")
    path.parent.mkdir()
    progress_store.put("guesses/01.other", 5)
    if name in BAD_FACTS:
        path.write_bytes(BAD_FACTS[name])
    else:
        put_special(path, name)
    seen = shown(progress_store.get, key, "default")
    text = ending and name in BAD_FACTS and name != "a large file"
    if not text:  # any text is a text
        assert seen.result == "default"
        assert os.path.lexists(path.with_name(f"{path.name}.damaged"))
        assert "is damaged" in seen.plain
    progress_store.put(key, "x = 1")
    progress_store.forget_memory()
    assert progress_store.get(key) == "x = 1"
    assert progress_store.get("guesses/01.other") == 5


def test_nothing_that_was_set_aside_is_replaced(course: Path) -> None:
    path = course / f"{KEY}.json"
    path.parent.mkdir()
    for number in range(3):
        path.write_text(f"damaged {number}")
        assert progress_store.get(KEY) is None
    kept = sorted(p.read_text() for p in path.parent.iterdir())
    assert kept == ["damaged 0", "damaged 1", "damaged 2"]


def test_a_bit_that_flips_never_ends_in_an_error(course: Path) -> None:
    progress_store.put(KEY, {"chosen": "ö", "right": True, "n": [1, 2.5]})
    path = course / f"{KEY}.json"
    good = path.read_bytes()
    chance = random.Random(1)
    for _ in range(300):
        damaged = bytearray(good)
        damaged[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        progress_store.get(KEY)
        progress_store.saved_at(KEY)
        progress_store.put(KEY, 4)
        assert progress_store.get(KEY) == 4


@pytest.mark.parametrize("what", ["file", "dangling", "fifo", "loop"])
def test_a_folder_that_is_none_leaves_the_facts_in_memory(tmp_path: Path, what: str) -> None:
    path = tmp_path / ".course"
    path.touch() if what == "file" else put_special(path, what)
    progress_store.put(KEY, 3)
    assert progress_store.get(KEY) == 3
    (tmp_path / "other").mkdir()
    assert os.path.lexists(path)


def test_an_answer_with_half_a_surrogate_pair_is_kept_as_its_escape(course: Path) -> None:
    progress_store.put("answers/01.x.py", "x = '\ud83d'")
    progress_store.forget_memory()
    assert progress_store.get("answers/01.x.py") == "x = '\\ud83d'"


ANY_JSON: list[Any] = [None, True, 0, -1.5, 10**399, 1e300, "x", [], [[1], {}], {}, {"a": [None]},
                       {"passed": 1, "points": [], "chosen": {}, "right": "yes"}]  # fmt: skip


@pytest.mark.parametrize("value", ANY_JSON, ids=lambda value: ascii(value)[:20])
def test_a_fact_of_another_form_ends_no_cell_in_an_error(
    course: Path, value: Any, shown: Callable[..., Shown]
) -> None:
    from nemotron_lite.course import checking, exercises, predictions, progress_report, quizzes

    chapter = "01"
    (exercise, *_) = exercises.exercises(chapter)
    asked = predictions.load_predictions(chapter)
    (question, *_) = quizzes.load_quiz(chapter)
    for key in (f"checks/{exercise.id}", f"hints/{exercise.id}", f"quiz/{chapter}.questions.1",
                *(f"guesses/{chapter}.{name}" for name in asked)):  # fmt: skip
        progress_store.put(key, value)
    progress_store.forget_memory()
    progress_store.begin()
    shown(progress_report.chapter_progress, chapter)
    shown(checking.hint, exercise.id)
    shown(checking.solution, exercise.id)
    assert quizzes._stored_answer(f"quiz/{chapter}.questions.1", question) is None
    for name in asked:
        guess = predictions.guess_of(chapter, name)
        assert guess is None or isinstance(guess, int | float | str)
