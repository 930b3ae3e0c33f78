"""The models that come with the package: one folder each in `nemotron_lite/models`.

    load("lite")            opens one by its name; `--model lite` on the command line
    folder("lite")          its folder: a checkpoint as `save` writes it, with packed NVFP4 weights
    read_record("lite")     how it was trained, its loss curve and its scores (record.json)

A folder on disk of the same name comes first: `load("lite")` opens `./lite` where there is one.

config.json names float32, so `load("lite")` decodes the weights to float32. That is the fastest
dtype on most processors, and the one to train and to score in. `load("lite", packed=True)` keeps
them in four bits.

Nothing writes into these folders: they are part of the installation, may be read-only, and belong
to everybody who uses it. `nemotron_lite/files.py`, through which every file is written, refuses
(`check_not_shipped`). A new version of a model is copied there by hand.

Left out: downloading others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemotron_lite.input_files import read_json

FOLDER = Path(__file__).resolve().parent / "models"
RECORD = "record.json"
CURVE = "live_run.json"  # of the training that `nemotron-lite run` shows
LARGEST = 12_000_000  # bytes of a folder, because every installation has it


def names() -> list[str]:
    """The names of the shipped models, sorted."""
    return sorted(found.parent.name for found in FOLDER.glob("*/config.json"))


def folder(name: str) -> Path | None:
    """The folder of a shipped model; None if there is none of this name."""
    return FOLDER / name if name in names() else None


def read_record(name: str) -> dict[str, Any]:
    """How a shipped model was trained: the content of its record.json.

    Returns:
        `training` (the run), `text` (its manifest), `curve` (at most 300 points of the loss),
        `scores`, `machine` and `versions`; `train/lite_record.py` describes the fields.

    Raises:
        ValueError: there is no such model.
    """
    found = folder(name)
    if found is None:
        raise ValueError(f"no shipped model {name!r}: expected one of {', '.join(names())}.")
    record: dict[str, Any] = read_json(found / RECORD)
    return record


def read_live_curve() -> dict[str, Any] | None:
    """The loss curve of the short run that `nemotron-lite run` shows, made on a quiet machine.

    Returns:
        `seconds` and `loss`, lists of equal length, and what the run was; None if none is shipped.
    """
    try:
        curve: dict[str, Any] = read_json(FOLDER / CURVE)
    except FileNotFoundError:
        return None
    return curve


def check_not_shipped(path: Path) -> None:
    """Refuse to write to a shipped model.

    Args:
        path: absolute, without links.

    Raises:
        PermissionError: the path is in the folder of the shipped models, or it is that folder.
    """
    if path == FOLDER or FOLDER in path.parents:
        raise PermissionError(
            f"{path} belongs to the models that come with the package, which are never changed: "
            "name a folder of your own."
        )
