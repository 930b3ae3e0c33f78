"""Update a learner's notebook to the new version of its chapter: a three-way merge by cell id.

    base     the chapter as it was when it was copied
    mine     the learner's copy
    new      the chapter as it is now

Each cell of a notebook has an id that stays the same while its text changes, so a cell is found
again without a comparison of texts:

    cell of the chapter     the learner …       the chapter …           result
    in all three            left it             changed or left it      the new cell
    in all three            changed it          left it                 the learner's cell
    in all three            changed it          changed it              the learner's cell, and the
                                                                        new text folded below it
    removed by the learner                      changed or left it      stays removed
    removed from chapter    left it                                     removed
    removed from chapter    changed it                                  the learner's cell
    added by the chapter                                                the new cell
    added by the learner                                                stays below the same cell

The output of a cell stays if the learner ran the cell and its source is still the same. A learner
may move cells; their order stays, unless the chapter itself changed the order of its cells.

Merging twice gives the same result as merging once, so an update that was interrupted is repeated
without harm.

nbdime does three-way merges too. It merges inside the text of a cell, line by line, and writes
conflict markers where it cannot; half of an old answer joined with half of a new stub is not what a
learner wants to find. It would also be a dependency, with a server and a web page, for what needs
two hundred lines here. Left out: a merge inside a cell.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Notebook = dict[str, Any]  # a notebook of format 4.5 or later, as in its JSON
Cell = dict[str, Any]

NOTE = "nl_changed_cell"  # metadata of the cell that shows a new text: the id of the cell above it


class MergeError(ValueError):
    """A notebook whose cells cannot be identified; the message says why."""


def merge(base: Notebook, mine: Notebook, new: Notebook) -> Notebook:
    """The learner's notebook `mine`, brought from the version `base` of its chapter to `new`.

    None of the arguments is changed. Pass an empty notebook as `base` if it is not known: then each
    cell in which `mine` and `new` differ counts as changed by both.

    Raises:
        MergeError: a notebook has a cell without an id, or two cells with the same id.
    """
    was, has, now = (_by_id(notebook) for notebook in (base, mine, new))
    kept: dict[str, Cell] = {}
    notes: dict[str, Cell] = {}  # by the id of the cell that they stand below
    for name, cell in has.items():
        if _is_note(cell, now):
            continue  # of an earlier update; `_note` keeps, renews or drops it
        if name in now:
            merged = _merge_cell(was.get(name), cell, now[name])
            kept[name] = merged
            note = _note(was.get(name), merged, now[name], has)
            if note is not None:
                notes[name] = note
        elif name not in was or _text(cell) != _text(was[name]):
            kept[name] = cell
    for name, cell in now.items():
        if name not in has and name not in was:
            kept[name] = cell
    order = _order(list(was), list(has), list(now), kept)
    cells = []
    for name in order:
        cells.append(kept[name])
        if name in notes:
            cells.append(notes[name])
    merged_notebook = {**mine, **{k: v for k, v in new.items() if k != "metadata"}}
    merged_notebook["metadata"] = _merge_values(
        base.get("metadata", {}), mine.get("metadata", {}), new.get("metadata", {})
    )
    return copy.deepcopy({**merged_notebook, "cells": cells})


def changed_by_both(merged: Notebook) -> list[str]:
    """Ids of the learner's cells below which a merge shows the new text of the chapter."""
    found = (cell.get("metadata", {}).get(NOTE) for cell in merged["cells"])
    return [str(name) for name in found if name is not None]


def _by_id(notebook: Notebook) -> dict[str, Cell]:
    """The cells by their id, in order."""
    cells: dict[str, Cell] = {}
    for position, cell in enumerate(notebook["cells"]):
        name = cell.get("id")
        if not isinstance(name, str):
            raise MergeError(
                f"cell {position} has no id, so the chapter's cells cannot be found again; an "
                "older program saved this notebook"
            )
        if name in cells:
            raise MergeError(f"two cells have the id {name!r}, which should belong to one")
        cells[name] = cell
    return cells


def _text(cell: Cell) -> tuple[str, str]:
    """Kind and source of a cell; the source is a string or a list of lines in the file."""
    return cell["cell_type"], _joined(cell["source"])


def _joined(source: str | Sequence[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def _merge_cell(was: Cell | None, mine: Cell, new: Cell) -> Cell:
    """One cell that the learner and the new chapter both have."""
    if _text(mine) != _text(new) and (was is None or _text(mine) != _text(was)):
        return mine  # the learner's text; its output belongs to it
    cell = dict(new)
    before = {} if was is None else was
    cell["metadata"] = _merge_values(
        before.get("metadata", {}), mine.get("metadata", {}), new.get("metadata", {})
    )
    ran = was is None or _outputs(mine) != _outputs(was)
    if new["cell_type"] == "code" and _text(mine) == _text(new) and ran:
        cell.update({key: mine[key] for key in ("outputs", "execution_count") if key in mine})
    return cell


def _outputs(cell: Cell) -> tuple[Any, Any]:
    return cell.get("outputs"), cell.get("execution_count")


def _merge_values(
    was: Mapping[str, Any], mine: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, Any]:
    """Metadata, key by key: the learner's where the learner changed it, else the new one."""
    merged = {}
    for key in [*new, *(key for key in mine if key not in new)]:
        left = key in mine and key in was and mine[key] == was[key]
        absent = key not in mine and key not in was
        chosen = new if left or absent else mine
        if key in chosen:
            merged[key] = chosen[key]
    return merged


def _note_id(name: str) -> str:
    return f"{name[:50]}-new"  # an id has at most 64 characters


def _is_note(cell: Cell, now: Mapping[str, Cell]) -> bool:
    """Whether a merge put this cell below a cell that the chapter still has.

    A copy that the learner made of such a cell has another id: it is the learner's.
    """
    above = cell.get("metadata", {}).get(NOTE)
    return above in now and cell["id"] == _note_id(above)


def _note(was: Cell | None, merged: Cell, new: Cell, has: Mapping[str, Cell]) -> Cell | None:
    """The cell that shows the new text below a cell that both changed.

    A note of an earlier update stays until the learner deletes it, or the texts agree.
    """
    name = _note_id(merged["id"])
    if _text(merged) == _text(new):
        return None
    if was is not None and _text(was) == _text(new):
        return has.get(name)
    body = _joined(new["source"])
    if new["cell_type"] == "code":
        longest = max((len(ticks) for ticks in re.findall("`+", body)), default=0)
        fence = "`" * max(3, longest + 1)
        body = f"{fence}python\n{body}\n{fence}"
    summary = "The course has a new version of the cell above. Yours stays; click to compare."
    return {
        "cell_type": "markdown",
        "id": name,
        "metadata": {NOTE: merged["id"]},
        "source": f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>",
    }


def _order(
    was: Sequence[str], has: Sequence[str], now: Sequence[str], kept: Iterable[str]
) -> list[str]:
    """The ids of the kept cells, in order.

    One list gives the order: the learner's, or the chapter's if the chapter was reordered. Cells
    that only the other list has are put below the cell that they followed there.
    """
    stays = set(kept)
    shared = set(was) & set(now)
    reordered = [n for n in was if n in shared] != [n for n in now if n in shared]
    first, second = (now, has) if reordered or not was else (has, now)
    order = [name for name in first if name in stays]
    learners = set() if first is now else set(order) - set(now)
    above: str | None = None
    for name in second:
        if name not in stays:
            continue
        if name not in order:
            at = 0 if above is None else order.index(above) + 1
            # A cell that the learner put below this one stays directly below it.
            while above is not None and at < len(order) and order[at] in learners:
                at += 1
            order.insert(at, name)
        above = name
    return order
