"""The files of `work/`: copy each chapter once, then bring each copy up to date.

    work/01_selective_scan.ipynb            the learner's copy
    work/progress.ipynb                     the page that shows what is done
    work/.course/                           what the course stores: checks passed, guesses, answers
    work/.course/base/01_….5f0c….ipynb      a version of a chapter that was copied
    work/.course/backups/01_….ipynb         a copy as it was before an update changed it

A copy names the version it was made from: the notebook's metadata has `nl_base`, the beginning of
that version's SHA-256, and the version itself is in `base/`. `merge` needs all three. Because the
name is inside the copy, one rename replaces the text and the name together, so an update that is
killed at any point leaves the old copy or the new one, each with its right base. It also holds for
a copy that a browser saved over a newer one, and for a backup that was put back.

A file that the merge cannot read is never touched: a line says what is wrong with it. Nothing is
deleted. A learner who deletes or renames a copy gets the chapter afresh at the next start. A copy
that the learner never ran or changed needs no backup, because its base is one.

A notebook is trusted if its owner ran it, or signed it: then JupyterLab shows its HTML and styles
before it is run. A fresh copy is signed for this user. An update is signed only if the copy was
trusted before, because a copy may have come from somebody else.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat
from nbformat.sign import NotebookNotary
from nbformat.v4.rwbase import rejoin_lines
from nbformat.validator import iter_validate

from nemotron_lite.course.lab import merge as merging
from nemotron_lite.course.progress_store import FOLDER
from nemotron_lite.files import atomic_file
from nemotron_lite.input_files import FileError, parse_json, read_bytes, read_text

BASE = "nl_base"  # metadata of a copy: the version of the chapter it was made from
PROGRESS = "progress.ipynb"
EMPTY: merging.Notebook = {"cells": [], "metadata": {}}
HOW_TO_RESTART = "Rename it and start again, and you get a fresh copy beside it."


class CopyError(RuntimeError):
    """There are no chapters to copy, or no folder to copy to; the message says what to do."""


@dataclass(frozen=True)
class Outcome:
    """What happened to one copy.

    what: "copied", "updated", "current" (nothing to do), or "left alone".
    line: the same in words, for the learner; empty for "current".
    """

    path: Path
    what: str
    line: str = ""


def update(chapters: Path, work: Path) -> list[Outcome]:
    """Copy the chapters to `work`, or bring the copies there up to date.

    Args:
        chapters: the folder of the chapters, `notebooks/` of a checkout.
        work: the learner's folder; it is created.

    Raises:
        CopyError: there are no chapters in `chapters`, or `work` cannot be written.
    """
    sources = sorted(chapters.glob("[0-9]*.ipynb"))
    if not sources:
        raise CopyError(
            f"{chapters} has no chapters. `make lab` needs a checkout of the repository; the "
            "installed package does not contain them."
        )
    try:
        with _locked(work):
            pages = {path.name: path.read_text(encoding="utf-8") for path in sources}
            pages[PROGRESS] = progress_page()
            done = [_update_or_leave(work / name, text) for name, text in pages.items()]
    except OSError as error:
        raise CopyError(
            f"The chapters cannot be copied to {work}: {error}. Everything that was there before "
            "is still there."
        ) from error
    return done + [_no_longer_there(path) for path in _copies(work) if path.name not in pages]


def progress_page() -> str:
    """The notebook that shows what the learner has done, as its text."""
    words = (
        "# Your progress\n\nRun the cell below: it shows the exercises whose checks you passed, "
        "the quiz questions you answered and the guesses you made. All of it is stored in "
        "`.course`, a folder beside the notebooks."
    )
    call = "from nemotron_lite.course import progress_page\n\nprogress_page()"
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    cells = [
        {"cell_type": "markdown", "id": "progress-title", "metadata": {}, "source": words},
        {
            "cell_type": "code", "id": "progress-page", "metadata": {}, "source": call,
            "outputs": [], "execution_count": None,
        },
    ]  # fmt: skip
    page = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(page)


def _update_or_leave(path: Path, text: str) -> Outcome:
    """`_update_file`; a copy that cannot be read or merged does not keep the others from it."""
    try:
        return _update_file(path, text)
    except (ValueError, IsADirectoryError, FileNotFoundError) as error:
        why = {
            UnicodeDecodeError: "it is not a text file in UTF-8",
            UnicodeEncodeError: "it has characters that cannot be written as UTF-8",
            IsADirectoryError: "it is a folder",
            FileNotFoundError: "it is a link to a file that is not there",
        }.get(type(error.__cause__ if isinstance(error, FileError) else error), "")
        if not why:
            why = f"it {error.fault}" if isinstance(error, FileError) else str(error)
        return Outcome(
            path, "left alone", f"{path.name}: left as it is, because {why}. {HOW_TO_RESTART}"
        )


def _update_file(path: Path, text: str) -> Outcome:
    """Copy or update one file; `text` is the chapter as it is now.

    Raises:
        ValueError: the copy cannot be read or merged; json's errors and MergeError are ValueErrors.
    """
    version = hashlib.sha256(text.encode()).hexdigest()[:16]
    new = _parsed(text)
    store = path.parent / FOLDER
    base_path = store / "base" / f"{path.stem}.{version}.ipynb"
    if not _is_version(base_path, version):
        _write(base_path, text)
    if not os.path.lexists(path):
        fresh = _named(new, version)
        _write(path, _formatted(fresh))
        _sign(path)
        return Outcome(path, "copied", f"{path.name}: copied")
    before = read_text(path)
    mine = _parsed(before)
    was = mine["metadata"].get(BASE)
    if was == version:
        return Outcome(path, "current")
    base = _base(store, path, was)
    merged = _named(merging.merge(base, mine, new), version)
    trusted = _is_signed(before)
    line = f"{path.name}: updated"
    if mine["cells"] != base["cells"]:
        backup = store / "backups" / f"{path.stem}.{datetime.now():%Y-%m-%d-%H%M%S-%f}.ipynb"
        _write(backup, before)
        line += f"; your copy as it was before is {os.path.relpath(backup, path.parents[1])}"
    _write(path, _formatted(merged))
    if trusted:
        _sign(path)
    both = len(merging.changed_by_both(merged))
    if both:
        has = "cell that you changed has" if both == 1 else "cells that you changed have"
        line += f". {both} {has} a new version, folded below yours"
    return Outcome(path, "updated", line)


def _base(store: Path, path: Path, version: Any) -> merging.Notebook:
    """The chapter from which the copy was made; empty if it is not known."""
    if not isinstance(version, str) or not re.fullmatch("[0-9a-f]{16}", version):
        return EMPTY
    try:
        path = store / "base" / f"{path.stem}.{version}.ipynb"
        return _parsed(read_text(path)) if _is_version(path, version) else EMPTY
    except (OSError, ValueError):
        return EMPTY


def _is_version(path: Path, version: str) -> bool:
    """Whether a base is there and undamaged: its name has the beginning of its SHA-256."""
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()[:16] == version
    except (OSError, FileError):
        return False


def _parsed(text: str) -> merging.Notebook:
    """A notebook of format 4.5 or later, its lines joined to strings.

    Raises:
        ValueError: it is something else; the message ends a sentence that begins with "because".
    """
    try:
        notebook = parse_json(text)
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    is_notebook = isinstance(notebook, dict) and isinstance(notebook.get("cells"), list)
    if not is_notebook or not isinstance(notebook.get("metadata"), dict):
        raise ValueError("it has no cells or no metadata, so it is not a notebook of format 4")
    written = (notebook.get("nbformat"), notebook.get("nbformat_minor"))
    if written[0] != 4 or not isinstance(written[1], int) or written[1] < 5:
        raise ValueError(
            f"another program saved it in format {written[0]}.{written[1]}, which does not keep "
            "the ids of the cells; format 4.5 does"
        )
    node = nbformat.from_dict(notebook)
    fault = next(iter_validate(node, relax_add_props=True), None)
    if fault is not None:
        first = str(fault).partition("\n")[0]
        raise ValueError(f"it is not a valid notebook ({first})")
    return dict(json.loads(json.dumps(rejoin_lines(node))))


def _named(notebook: merging.Notebook, version: str) -> merging.Notebook:
    return {**notebook, "metadata": {**notebook["metadata"], BASE: version}}


def _formatted(notebook: merging.Notebook) -> str:
    """The text of a notebook, in the layout that Jupyter writes."""
    return str(nbformat.writes(nbformat.from_dict(notebook))).rstrip("\n") + "\n"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _is_signed(text: str) -> bool:
    return bool(NotebookNotary().check_signature(nbformat.reads(text, as_version=4)))


def _sign(path: Path) -> None:
    NotebookNotary().sign(nbformat.read(path, as_version=4))


def _copies(work: Path) -> list[Path]:
    return sorted(path for path in work.glob("[0-9]*.ipynb") if _has_base(path))


def _has_base(path: Path) -> bool:
    """Whether this is a copy of a chapter; a learner may have notebooks of other names here."""
    try:
        return BASE in _parsed(read_text(path))["metadata"]
    except (OSError, ValueError):
        return False


def _no_longer_there(path: Path) -> Outcome:
    line = f"{path.name}: no longer a chapter of the course; your copy stays"
    return Outcome(path, "left alone", line)


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Hold the lock of the store, so that two starts do not update at the same time."""
    store = work / FOLDER
    store.mkdir(parents=True, exist_ok=True)
    handle = os.open(store, os.O_RDONLY)
    try:
        with suppress(OSError):  # a disk without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
