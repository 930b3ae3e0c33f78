"""The log of a run: `log.jsonl`, and on request `log.csv` and TensorBoard's files.

`log.jsonl` has one JSON object per update and is always written. JSON has no NaN and no infinity,
so a number that is not finite is written as null.

A resumed run makes the updates after its checkpoint again. So `open_log` reads the old log, keeps
the records up to the checkpoint, and writes them back. The log is only for people and plots.
Nothing in the training depends on it, so no damage to it may stop a resume, and none may cost more
than the damaged lines:

    a half line, from a kill        left out; the next record starts a line of its own
    NUL bytes, from a power cut     left out; the record behind them is kept
    binary data, a line of 1 GB     left out
    an update that is there twice   the later line counts
    a folder or a pipe called log.jsonl, or a link   renamed, and a new log is started

`log.csv` is written anew from the records of `log.jsonl` at each start. TensorBoard's writer hides
the events after the checkpoint itself (`purge_step`). Both have the numbers of the run, but not
those of each router (`routers` in `log.jsonl`), which are hundreds for every update.

`read_log` returns the records, also of a run that is still going on.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import stat
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from nemotron_lite.files import atomic_file
from nemotron_lite.input_files import FileError, parse_json

LOG, CSV, TENSORBOARD = "log.jsonl", "log.csv", "tensorboard"
KINDS = ("csv", "tensorboard")  # what may be written beside log.jsonl
LONGEST_LINE = 1 << 20  # bytes; a record has a few hundred
_START = b'{"step":'
_EVALUATION = ("validation_loss", "best_validation_loss")


class RunLog:
    """Appends records to the files of a run. Made by `open_log`."""

    def __init__(self, folder: Path, step: int, kinds: Collection[str]) -> None:
        self._jsonl: TextIO = (folder / LOG).open("a", buffering=1, encoding="utf-8")
        self._csv: TextIO | None = None
        self._columns: list[str] = []
        self._folder, self._kinds = folder, kinds
        self._board = (
            _summary_writer(folder / TENSORBOARD, step) if "tensorboard" in kinds else None
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; it is in the file when this returns.

        Raises:
            OSError: the disk refused.
        """
        plain = finite(record)
        self._jsonl.write(json.dumps(plain, allow_nan=False) + "\n")
        if "csv" in self._kinds:
            self._write_csv(record)
        if self._board is not None:
            for name, value in _columns(record).items():
                if name != "step":
                    self._board.add_scalar(name, value, record["step"])

    def _write_csv(self, record: Mapping[str, Any]) -> None:
        row = _columns(record)
        if self._csv is None:
            self._csv = (self._folder / CSV).open("a", buffering=1, encoding="utf-8", newline="")
            self._columns = _header(self._folder / CSV)
        if not self._columns:
            self._columns = [*row, *(name for name in _EVALUATION if name not in row)]
            csv.writer(self._csv).writerow(self._columns)
        csv.writer(self._csv).writerow([row.get(name, "") for name in self._columns])

    def close(self) -> None:
        """Close all files. An error of a full disk is not repeated here."""
        for file in (self._jsonl, self._csv, self._board):
            if file is not None:
                with suppress(OSError):
                    file.close()


def check_kinds(kinds: Collection[str]) -> None:
    """Refuse an unknown kind of log, and one whose package is missing.

    Raises:
        ValueError: an unknown kind.
        ImportError: TensorBoard's writer is not installed.
    """
    if isinstance(kinds, str) or any(kind not in KINDS for kind in kinds):
        raise ValueError(f"logs={kinds!r} does not work: expected some of {', '.join(KINDS)}.")
    if "tensorboard" in kinds:
        _writer_class()


def open_log(folder: Path, step: int, kinds: Collection[str] = ()) -> tuple[RunLog, list[str]]:
    """The log of a run that has made `step` updates.

    Returns:
        The open log, and sentences about what was wrong with the old one.

    Raises:
        OSError: the disk refused to write.
    """
    path = folder / LOG
    notes: list[str] = []
    records: list[dict[str, Any]] = []
    if path.is_symlink() or path.exists():
        found, damaged, problem = _read(path, step)
        if problem:
            notes.append(f"{path} {problem}")
        if damaged:
            lines = "1 damaged line" if damaged == 1 else f"{damaged} damaged lines"
            notes.append(f"{lines} of {path} were left out")
        if problem or path.is_symlink():
            notes.append(f"it was renamed to {_set_aside(path).name}, and a new log was started")
        with atomic_file(path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line, _ in found))
        records = [record for _, record in found]
    if "csv" in kinds:
        _rewrite_csv(folder / CSV, records)
    return RunLog(folder, step, kinds), notes


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The records of the log of a run, one per update; damaged lines are left out.

    Raises:
        FileNotFoundError: there is no log.
        FileError: it cannot be read, or has no record.
    """
    path = Path(folder) / LOG
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected the folder of a training run.")
    found, _, problem = _read(path, sys.maxsize)
    if problem:
        raise FileError(path, problem)
    if not found:
        raise FileError(path, "has no records; expected one for each update")
    return [record for _, record in found]


def finite(value: Any) -> Any:
    """The same value with None for NaN and infinity, in lists and dicts too."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(path: Path, step: int) -> tuple[list[tuple[bytes, dict[str, Any]]], int, str]:
    """The lines up to `step` in order, how many others were damaged, and why none can be read."""
    found: dict[int, tuple[bytes, dict[str, Any]]] = {}
    damaged = 0
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        return [], 0, f"cannot be read ({error.strerror})"
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        return [], 0, "is no regular file"
    with os.fdopen(handle, "rb") as file:
        try:
            for line, complete in _lines(file):
                if line is not None and not line.strip():
                    continue
                record = None if line is None else _record(line)
                if record is None:
                    # A last line without an end is what a kill leaves: nothing to report.
                    damaged += complete
                elif record[1]["step"] <= step:
                    found[record[1]["step"]] = record
        except OSError as error:
            return _ordered(found), damaged, f"cannot be read to its end ({error.strerror})"
    return _ordered(found), damaged, ""


def _ordered(
    found: dict[int, tuple[bytes, dict[str, Any]]],
) -> list[tuple[bytes, dict[str, Any]]]:
    return [found[step] for step in sorted(found)]


def _lines(file: BinaryIO) -> Iterator[tuple[bytes | None, bool]]:
    """Each line without its end, or None for a line that is too long; and whether it had an end."""
    while line := file.readline(LONGEST_LINE):
        complete = line.endswith(b"\n")
        if complete or len(line) < LONGEST_LINE:
            yield line.rstrip(b"\n"), complete
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE)
        yield None, True


def _record(line: bytes) -> tuple[bytes, dict[str, Any]] | None:
    """The record of a line, with the bytes that are it; None if there is none."""
    line = line.replace(b"\0", b"").strip()
    # What a kill cut off has no line end, so the next record may stand behind it.
    starts = {0, max(0, line.rfind(_START))}
    for start in sorted(starts):
        part = line[start:]
        try:
            record = parse_json(part.decode("utf-8"))
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int and record["step"] > 0:
            return part, record
    return None


def _set_aside(path: Path) -> Path:
    """Rename what is at `path` to the first free name."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.old-{number}")):
        number += 1
    path.rename(aside)
    return aside


def _columns(record: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers of a record by column: a list `mtp` becomes mtp_1, mtp_2, ..."""
    row: dict[str, int | float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            row |= {f"{name}_{i}": item for i, item in enumerate(value, 1)}
        else:
            row[name] = value
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name.isidentifier()
    }


def _rewrite_csv(path: Path, records: list[dict[str, Any]]) -> None:
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        _set_aside(path)
    rows = [_columns(record) for record in records]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns += [name for name in _EVALUATION if rows and name not in columns]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerows([columns] if columns else [])
    writer.writerows([row.get(name, "") for name in columns] for row in rows)
    with atomic_file(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")


def _header(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file), [])


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "logs for TensorBoard need the package tensorboard: install it "
            '(pip install tensorboard, or the extra "logs"), or choose logs=["csv"] (--log csv).'
        ) from error
    return SummaryWriter


def _summary_writer(folder: Path, step: int) -> Any:
    return _writer_class()(log_dir=str(folder), purge_step=step + 1)
