"""The log survives anything: what is damaged is left out, and every other line is kept."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nemotron_lite.input_files import FileError
from nemotron_lite.train import run_log
from nemotron_lite.train.run_log import check_kinds, open_log, read_log


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 4.0 / step, "mtp": [1.0, 2.0], **more}


def line(step: int) -> bytes:
    return json.dumps(record(step)).encode() + b"\n"


def resume(folder: Path, step: int, **options: Any) -> tuple[list[int], list[str]]:
    """Open the log after `step` updates and write one more; the steps in the file, and notes."""
    log, notes = open_log(folder, step, **options)
    log.write(record(step + 1))
    log.close()
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(each)["step"] for each in lines], notes


DAMAGE: dict[str, tuple[bytes, int]] = {  # what stands between lines 2 and 3, and lines it costs
    "nothing": (b"", 0),
    "garbage": (bytes(range(256)).replace(b"\n", b"") * 20 + b"\n", 1),
    "empty lines": (b"\n\n  \n", 0),
    "half a line": (b'{"step": 9, "lo\n', 1),
    "half a line before a record": (b'{"step": 9, "lo', 0),
    "zeros before a record": (b"\0" * 5000, 0),
    "a line of zeros": (b"\0" * 5000 + b"\n", 1),
    "a long line": (b"x" * (3 << 20) + b"\n", 1),
    "a deep line": (b"[" * 100_000 + b"\n", 1),
    "another value": (b'[1, 2]\n"text"\nnull\n7\n', 4),
    "a record without a step": (b'{"loss": 1}\n', 1),
    "steps that are none": (b'{"step": "x"}\n{"step": 1.5}\n{"step": true}\n{"step": -3}\n', 4),
    "a step of many digits": (b'{"step": ' + b"9" * 5000 + b"}\n", 1),
    "NaN": (b'{"step": 3, "loss": NaN}\n', 1),
    "not UTF-8": (b'{"step": 3, "x": "\xff"}\n', 1),
    "later updates": (line(9) + line(50), 0),
    "an update twice": (line(1) + line(2), 0),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_costs_nothing_but_itself(tmp_path: Path, damage: str) -> None:
    content, cost = DAMAGE[damage]
    (tmp_path / "log.jsonl").write_bytes(line(1) + line(2) + content + line(3) + line(4) + line(5))
    steps, notes = resume(tmp_path, 4)
    assert steps == [1, 2, 3, 4, 5]
    assert len(notes) == (cost > 0)
    assert all(f"{cost} damaged line" in note for note in notes)


def test_records_are_read_back_also_of_a_run_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with pytest.raises(FileNotFoundError, match="expected the folder of a training run"):
        read_log(tmp_path)
    path.write_bytes(line(1) + b"\xff\n" + line(3) + line(2) + line(4)[:9])
    assert read_log(tmp_path) == [record(1), record(2), record(3)]
    assert read_log(str(tmp_path)) == read_log(tmp_path)
    path.write_text("")
    with pytest.raises(FileError, match="has no records"):
        read_log(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(FileError, match="is no regular file"):
        read_log(tmp_path)


def test_a_kill_while_a_line_is_written_is_not_worth_a_note(tmp_path: Path) -> None:
    for length in range(len(line(3))):
        (tmp_path / "log.jsonl").write_bytes(line(1) + line(2) + line(3)[:length])
        assert resume(tmp_path, 2) == ([1, 2, 3], [])


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling", "link", "device"])
def test_what_is_no_file_is_renamed(tmp_path: Path, kind: str) -> None:
    folder, path = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    folder.mkdir()
    other = tmp_path / "other"
    if kind == "folder":
        path.mkdir()
        (path / "mine").write_text("x")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(other)
        if kind == "link":
            other.write_bytes(line(1) + line(2))
    (folder / "log.jsonl.old-1").write_text("in the way")
    steps, notes = resume(folder, 2)
    assert steps == ([1, 2, 3] if kind == "link" else [3])
    assert any("renamed to log.jsonl.old-2" in note for note in notes)
    assert path.is_file()
    assert not path.is_symlink()
    if kind == "link":  # the file that it pointed to is not ours
        assert other.read_bytes() == line(1) + line(2)
    assert other.exists() is (kind == "link")


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    log, _ = open_log(tmp_path, 0)
    values = {"loss": math.nan, "mtp": [math.inf, 1.0], "deep": {"x": -math.inf}}
    log.write({"step": 1, **values})
    log.close()
    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "step": 1, "loss": None, "mtp": [None, 1.0], "deep": {"x": None},
    }  # fmt: skip
    assert resume(tmp_path, 1) == ([1, 2], [])


def test_csv_has_the_same_records_also_after_a_resume(tmp_path: Path) -> None:
    log, _ = open_log(tmp_path, 0, ["csv"])
    for step in (1, 2, 3):
        more = {"validation_loss": 3.5, "best_validation_loss": 3.5} if step == 2 else {}
        log.write(record(step, **more))
    log.close()
    (tmp_path / "log.csv").write_text("=cmd(),@x\n")  # somebody edited it
    resume(tmp_path, 2, kinds=["csv"])
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    assert [float(row["mtp_2"]) for row in rows] == [2.0] * 3
    assert [row["validation_loss"] for row in rows] == ["", "3.5", ""]
    assert {len(row) for row in rows} == {6}


def test_csv_cells_are_numbers_whatever_the_log_holds(tmp_path: Path) -> None:
    evil = {"step": 1, "loss": 2.0, "=1+1": 3.0, "note": "=HYPERLINK(1)", "@x": [1.0]}
    (tmp_path / "log.jsonl").write_text(json.dumps(evil) + "\n")
    resume(tmp_path, 1, kinds=["csv"])
    text = (tmp_path / "log.csv").read_text()
    assert "=" not in text
    assert "@" not in text
    assert text.splitlines()[1].startswith("1,2.0")


def test_an_unknown_or_missing_log_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("csv", ["cvs"], ["csv", "wandb"]):
        with pytest.raises(ValueError, match="expected some of csv, tensorboard"):
            check_kinds(wrong)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if not installed
    with pytest.raises(ImportError, match=r"need the package tensorboard: install it"):
        check_kinds(["tensorboard"])


def test_tensorboard_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package, which the project does not need."""
    calls: list[Any] = []

    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int) -> None:
            calls.append((log_dir, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    check_kinds(["tensorboard"])
    resume(tmp_path, 4, kinds=["tensorboard"])
    assert calls == [
        (str(tmp_path / "tensorboard"), 5),
        ("loss", 0.8, 5),
        ("mtp_1", 1.0, 5),
        ("mtp_2", 2.0, 5),
        "closed",
    ]
    assert run_log.KINDS == ("csv", "tensorboard")
