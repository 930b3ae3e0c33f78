"""Notice that a folder changes while it is read.

A training run saves its model every hour, and another process loads it now and then. A load opens
config.json and then one weight file after the other, by name. If a save comes between, it would
read one half of the old model and one half of the new one, and the shapes would fit. So `load`
compares which files the folder holds before and after, and reads again if they differ.

A save that was killed in the middle may have left a folder without config.json (see
`nemotron_lite/folder_replacement.py`). It is completed first.

Left out: folders whose files are written over in place by another program.
"""

from __future__ import annotations

import os
from pathlib import Path

from nemotron_lite.checkpoint.errors import CheckpointError
from nemotron_lite.folder_replacement import recover

ATTEMPTS = 5

Files = dict[str, tuple[int, int, int, int]]  # name -> what tells one file from another


def settled_files(folder: Path) -> Files:
    """Which files a folder holds, once no interrupted save is left in it.

    Raises:
        CheckpointError: an interrupted save cannot be completed.
    """
    try:
        recover(folder)
    except OSError as error:
        raise CheckpointError(
            folder,
            [
                f"a save into it was interrupted and cannot be completed ({error}); load it once "
                "as a user who may write there"
            ],
        ) from error
    return files_of(folder)


def files_of(folder: Path) -> Files:
    """Weights and settings in a folder; links are followed."""
    found: Files = {}
    try:
        names = os.listdir(folder)
    except OSError:
        return found
    for name in names:
        if name.endswith((".safetensors", ".json")):
            try:
                file = (folder / name).stat()
            except OSError:  # a dangling link
                continue
            found[name] = (file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns)
    return found


def changed_too_often(folder: Path) -> CheckpointError:
    """The error after `ATTEMPTS` attempts."""
    problem = (
        f"another process replaced it {ATTEMPTS} times while it was read; load it when nobody "
        "saves into it"
    )
    return CheckpointError(folder, [problem])
