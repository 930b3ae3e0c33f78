"""Temporary folders of the grading, in which code of learners may have worked.

`tempfile.TemporaryDirectory` is not made for that. Its removal recurses into folders that can be
deeper than Python recurses, follows links when it changes permissions (CVE-2023-6597, Python before
3.11.8), and raises if something is in its way. Here `chmod` and `rm` of the system do it, which do
neither, and a folder that cannot be removed stays.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE = 120.0  # seconds for the removal of one folder


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A new folder that only this user can enter; it is removed when the block ends."""
    folder = make_folder(prefix)
    try:
        yield folder
    finally:
        remove_folder(folder)


def make_folder(prefix: str) -> Path:
    """A new folder among the temporary files, with its path resolved."""
    return Path(tempfile.mkdtemp(prefix=prefix)).resolve()


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it, whatever that is; never raises an error of it."""
    name = str(folder)
    with suppress(OSError, subprocess.SubprocessError):
        for command in (["rm", "-rf", "--", name], ["chmod", "-R", "u+rwX", "--", name]):
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.run(command, check=False, timeout=PATIENCE, **quiet)  # type: ignore[call-overload]
            if not folder.exists():
                return
        subprocess.run(["rm", "-rf", "--", name], check=False, timeout=PATIENCE, **quiet)  # type: ignore[call-overload]
    with suppress(OSError, RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
