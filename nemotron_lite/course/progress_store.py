"""What a learner has done, kept on disk so that a restarted kernel and a later chapter find it.

Answers that passed, checks, hints that were read, guesses and quiz answers are facts. Each fact is
one small file below `.course/` in the folder of the notebook:

    .course/answers/01.discretise.py         the source of an answer that passed
    .course/checks/01.discretise.json        {"saved": "2026-…", "value": {"passed": true, …}}
    .course/guesses/01.speed.json            {"saved": "2026-…", "value": 3.0}

    put("guesses/01.speed", 3.0)             # writes the file
    get("guesses/01.speed")                  # 3.0; None if there is no such fact

One file per fact, replaced as a whole: two kernels that are open at the same time write different
files, or the later one wins. Neither can leave a file that is half written.

`make lab` makes the folder `.course`, in `work/`. Where it does not exist, the facts stay in the
memory of the kernel: the committed notebooks, their tests and plain Python never read or write
anybody's progress.

A disk can be full, a folder read-only, a file damaged by hand. A chapter has to go on all the same:
what cannot be written stays in memory, what cannot be read counts as missing, and one line says so.
What stands in the place of a fact (a folder, a pipe, a link to nowhere) is renamed, not deleted.

Left out: locks, and a history of what changed. A fact has one value, the last one.
"""

from __future__ import annotations

import errno
import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nemotron_lite.course import output
from nemotron_lite.files import atomic_file
from nemotron_lite.input_files import FileError, parse_json, read_text

FOLDER = ".course"
_KEY = re.compile(r"[a-z]+/[A-Za-z0-9_][A-Za-z0-9._-]*")
LARGEST = 1 << 20  # bytes of one fact; an answer of a learner has a few thousand
_IN_THE_WAY = (errno.ELOOP, errno.ENXIO, errno.ENODEV)  # a loop of links, a socket, no device
_TEXT = ".py"  # a key with this ending holds text; every other holds a JSON value

# Facts that are not on disk: there is no folder, or it refused the write. Key → (value, saved).
_MEMORY: dict[str, tuple[Any, str]] = {}
_WARNED: set[str] = set()
# The folder of the notebook, from `begin`; None: the current folder.
_NOTEBOOK: list[Path] = []


def begin() -> None:
    """Keep facts beside this notebook, also after a cell changed the folder; `setup` calls this."""
    _NOTEBOOK[:] = [Path.cwd()]


def folder() -> Path | None:
    """The folder of the facts, None if there is none and they stay in memory."""
    try:
        found = (_NOTEBOOK[0] if _NOTEBOOK else Path.cwd()) / FOLDER
        return found if found.is_dir() else None
    except OSError:  # the current folder was deleted
        return None


def put(key: str, value: Any) -> None:
    """Keep a fact; an earlier value of the same key is replaced, an equal one keeps its date.

    Args:
        key: group and name, such as "guesses/01.speed". Keys that end in ".py" hold text.
        value: what JSON can hold; text for a key that ends in ".py".

    Raises:
        ValueError: the key is not valid.
        TypeError: the value cannot be written as JSON.
    """
    _check(key)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    text = str(value) if key.endswith(_TEXT) else json.dumps({"saved": now, "value": value})
    if key.endswith(_TEXT):  # half a surrogate pair cannot be written; in a string its escape is it
        value = text = text.encode("utf-8", "backslashreplace").decode()
    path = _path(key)
    if key not in _MEMORY and get(key) == value:
        return
    if path is not None:
        try:
            path.parent.mkdir(exist_ok=True)
            with atomic_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            _warn(
                "write",
                f"Your progress cannot be written into {path.parent.parent}: "
                f"{error.strerror or error}. The chapter goes on, but what you do now is forgotten "
                "when the kernel stops. Free some space, or make the folder writable.",
            )
        else:
            _MEMORY.pop(key, None)
            return
    _MEMORY[key] = (value, now)


def get(key: str, default: Any = None) -> Any:
    """The value of a fact, `default` if there is none or its file cannot be read."""
    found = _read(key)
    return default if found is None else found[0]


def saved_at(key: str) -> str | None:
    """When the fact was kept, such as "2026-11-29T20:31:05+00:00"; None if there is none."""
    found = _read(key)
    return None if found is None else found[1]


def forget_memory() -> None:
    """Forget what is only in memory, and which warnings were shown; files stay."""
    _NOTEBOOK.clear()
    _MEMORY.clear()
    _WARNED.clear()


def _check(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise ValueError(f"key is {key!r}; expected a group and a name, such as 'guesses/01.speed'")


def _path(key: str) -> Path | None:
    _check(key)
    base = folder()
    if base is None:
        return None
    return base / (key if key.endswith(_TEXT) else f"{key}.json")


def _read(key: str) -> tuple[Any, str] | None:
    """Value and time of a fact. What is in memory is newer than the file: its write failed."""
    path = _path(key)
    if key in _MEMORY:
        return _MEMORY[key]
    if path is None:
        return None
    try:
        text = read_text(path, limit=LARGEST)
        if key.endswith(_TEXT):
            changed = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            return text, changed.isoformat(timespec="seconds")
        fact = parse_json(text)
        saved = datetime.fromisoformat(fact["saved"])
        if not 1970 <= saved.year < 9999:  # beyond, no time zone can be added
            raise ValueError("no date of this course")
        return fact["value"], saved.isoformat(timespec="seconds")
    except FileNotFoundError:
        # A dangling link is no file either, but it stands in the way of one.
        if path.is_symlink():
            _set_aside(path)
    except FileError as error:
        cause = error.__cause__
        if isinstance(cause, NotADirectoryError):
            return None
        if isinstance(cause, OSError) and cause.errno not in _IN_THE_WAY:
            _warn(key, f"{path} cannot be read: {cause.strerror or cause}. It counts as missing.")
        else:
            _set_aside(path)
    except OSError as error:
        _warn(key, f"{path} cannot be read: {error.strerror or error}. It counts as missing.")
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        _set_aside(path)
    return None


def _set_aside(path: Path) -> None:
    """Rename a damaged file, so that its content is not lost and the next write succeeds."""
    aside = path.with_name(f"{path.name}.damaged")
    number = 1
    while os.path.lexists(aside):  # what was set aside before is not lost either
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    try:
        path.rename(aside)
        kept = f"It was renamed to {aside.name}"
    except OSError:
        kept = "It could not be renamed"
    _warn(str(path), f"{path} is damaged and cannot be read. {kept}; that fact counts as missing.")


def _warn(what: str, text: str) -> None:
    """Show a line, once for each kind of trouble."""
    if what not in _WARNED:
        _WARNED.add(what)
        output.show_output(text, output.box(output.inline_html(text), edge=output.WRONG))
