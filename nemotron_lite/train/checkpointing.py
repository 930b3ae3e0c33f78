"""The files of a training run: written whole, checked whole, and never trusted.

`step-00000120.pt` is a file of `torch.save`: a zip archive with one entry per tensor. It ends in a
checksum of everything before it, in the archive's comment. Reading it back goes through four gates,
in this order:

    1. a regular file                   a named pipe would wait for ever
    2. the checksum                     a flipped bit anywhere, a missing end
    3. `weights_only=True`              a file from an unknown source cannot run code
    4. checkpoint_checks.py             keys, types, shapes, dtypes and ranges of every entry

Only then does a value reach the model or the optimizer. AdamW's fused update takes the moments by
their address and the weight's size, so that moments of a wrong shape would be read and written
beyond their end.

torch reads its archives without looking at the checksums in them. This module computes its own
while torch writes: a CRC-32 of the file costs a few milliseconds per hundred megabytes. A file
without it (one that was read and written again by torch.save) is checked by the CRC-32 that the
archive has for each entry.

Writing is atomic (`nemotron_lite/files.py`). A process that is killed while it writes, or a disk
that is full, leaves the previous checkpoint. A temporary file that a kill left is removed by the
next save.

These files are only for resuming. To publish a model or to load it elsewhere, use
`nemotron_lite.save`, which writes Hugging Face's layout.
"""

from __future__ import annotations

import os
import re
import stat
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from nemotron_lite.files import atomic_file
from nemotron_lite.train.errors import ResumeError

_NAME = re.compile(r"step-(\d{8,18})\.pt")
SNAPSHOTS = "snapshots"  # folder of weights in the folder of a run (snapshots.py)
DAMAGED = ".damaged"  # ending of a file that a resume has skipped
_TAG = b"nemotron_lite crc32 "
_COMMENT = len(_TAG) + 8  # bytes: the tag and 8 hexadecimal digits
_END = b"PK\x05\x06"  # begins the archive's last record, which ends in the comment and its length
_END_SIZE = 22  # bytes of that record without a comment
_BLOCK = 1 << 20
_SHOWN = 300  # characters of a cause


def save_checkpoint(folder: Path, step: int, content: Mapping[str, Any], *, keep: int) -> Path:
    """Write `content` as the checkpoint of `step`, then drop all but the newest `keep`.

    Returns:
        The path of the new checkpoint.

    Raises:
        OSError: the disk refused; the text says which checkpoint is still there.
    """
    path = folder / f"step-{step:08d}.pt"
    disk: _SummingFile | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            disk = _SummingFile(file)
            torch.save(dict(content), cast(BinaryIO, disk))
            disk.finish()
    except Exception as error:
        # torch turns an error of the disk into a RuntimeError about positions in its archive.
        noticed = None if disk is None else disk.error
        cause = error if isinstance(error, OSError) else noticed
        if cause is None:
            raise
        raise OSError(_not_written(path, cause)) from error
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = [(step_of(path), path) for path in folder.glob("step-*.pt")]
    return [path for step, path in sorted(found) if step >= 0]


def step_of(path: Path) -> int:
    """The update after which a checkpoint was written; -1 for another file."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def read_checkpoint(path: Path, *, mapped: bool = False) -> Any:
    """What `save_checkpoint` wrote, on the CPU, if the file is as it was written.

    Args:
        mapped: map the tensors into memory instead of reading them. Each is then read when it is
            used, so a reader of the weights alone does not hold the optimizer's moments.

    Raises:
        ResumeError: it does not exist, cannot be read, or has changed.
    """
    try:
        with _open_regular(path) as file:
            _check_sum(file)
            if mapped:  # torch maps a named file only
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ResumeError(
            f"{path} cannot be used: there is no such file, or not any more."
        ) from error
    except Exception as error:  # whatever a damaged archive or pickle makes torch raise
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ResumeError(f"{path} is damaged and cannot be used ({cause[:_SHOWN]}).") from error


class _SummingFile:
    """A file for torch.save that adds up the checksum and remembers the disk's error."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sum = 0
        self._last = b""  # the last bytes, which hold the archive's end record
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._sum = zlib.crc32(data, self._sum)
        self._last = (self._last + bytes(memoryview(data)[-_END_SIZE:]))[-_END_SIZE:]
        return written

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> None:
        """Append the checksum as the archive's comment."""
        if not self._last.startswith(_END) or self._last[20:] != b"\0\0":
            raise RuntimeError(
                f"torch {torch.__version__} wrote an archive that does not end as expected: please "
                "report this."
            )
        self._file.seek(-2, os.SEEK_END)
        self._file.write(_COMMENT.to_bytes(2, "little"))
        self._file.write(_TAG + b"%08x" % self._sum)


def _not_written(path: Path, error: OSError) -> str:
    if path.parent.name == SNAPSHOTS:  # which are not resumed from
        return (
            f"the snapshot {path} cannot be written ({error.strerror or error}), so the run stops. "
            "Free space or choose another disk. Where the run has a checkpoint, resume=True "
            "(--resume) continues it."
        )
    kept = [file.name for file in list_checkpoints(path.parent) if file != path]
    before = (
        f"The last checkpoint is {path.with_name(kept[-1])}"
        if kept
        else "There is no earlier checkpoint"
    )
    return (
        f"the checkpoint {path} cannot be written ({error.strerror or error}), so the run stops. "
        f"{before}. Free space or choose another disk, then continue with resume=True (--resume)."
    )


def _open_regular(path: Path) -> BinaryIO:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("no regular file")
    return os.fdopen(handle, "rb")


def _check_sum(file: BinaryIO) -> None:
    size = file.seek(0, os.SEEK_END)
    body = size - _COMMENT
    file.seek(max(0, body - 2))
    ending = file.read()
    if not ending[2:].startswith(_TAG):
        _check_entries(file)
        return
    expected = ending[2 + len(_TAG) :]
    found = zlib.crc32(b"\0\0", _sum_of(file, body - 2))  # the comment's length was 0 at the time
    if ending[:2] != _COMMENT.to_bytes(2, "little") or b"%08x" % found != expected:
        raise ValueError("its checksum does not fit its content")


def _sum_of(file: BinaryIO, size: int) -> int:
    file.seek(0)
    total, left = 0, size
    while left:
        block = file.read(min(left, _BLOCK))
        if not block:
            raise ValueError("it became shorter while it was read")
        total = zlib.crc32(block, total)
        left -= len(block)
    return total


def _check_entries(file: BinaryIO) -> None:
    """For an archive without our checksum: those that it has for each entry."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - _END_SIZE))
    end = file.read()
    if not (end.startswith(_END) and end.endswith(b"\0\0")):
        raise ValueError("its end is missing or damaged")
    with zipfile.ZipFile(file) as archive:
        wrong = archive.testzip()
    if wrong is not None:
        raise ValueError(f"the checksum of its entry {wrong} does not fit")
