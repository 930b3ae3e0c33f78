"""Numbers about NVIDIA's models from one file, each with its unit, its source and its caveat.

Nobody can tell where a number that was typed into a chapter comes from. So chapters read such
numbers from `facts.toml`:

    [super.latent_width]
    value = 1024
    unit = "channels"
    source = "S, Table 1"
    caveat = ""

`facts("super.latent_width")` returns such a fact, `tell` shows a sentence with facts in it and
their sources below, and `facts_table` shows our numbers beside NVIDIA's. A source is a tag of the
file's `[sources]` and a place in that source; several are separated by semicolons.

The file has published numbers, and numbers computed from those (tag D). The caveat says where
sources disagree, or where there is only a secondary source.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nemotron_lite.course import output

FILE = Path(__file__).with_name("facts.toml")
FAMILY = ("nano", "super", "ultra")
FIELDS = {"value", "unit", "source", "caveat", "name"}
_KEY = r"[a-z0-9_]+(?:\.[a-z0-9_]+)+"
_FACT_IN_TEXT = re.compile(r"\{(" + _KEY + r")(?::([^{}]*))?\}")
_VALUE_IN_TEXT = re.compile(r"\{([a-z_][a-z0-9_]*)(?::([^{}]*))?\}")


class FactError(LookupError):
    """A fact that is not in the file, or an entry of the file that is not valid."""


class PublishedFloat(float):
    """A decimal number that keeps the text it was written as, so that 48.30 keeps its zero."""

    text: str

    def __new__(cls, text: str) -> PublishedFloat:
        """The number in `text`."""
        number = super().__new__(cls, text)
        number.text = text
        return number


@dataclass(frozen=True)
class Fact:
    """One published number. `str` gives "1,024"; `f"{fact:unit}"` gives "1,024 channels"."""

    key: str
    value: float | int | str | bool
    unit: str
    places: tuple[tuple[str, str], ...]
    caveat: str
    name: str

    @property
    def source(self) -> str:
        """Where it was published, with the full name of the source."""
        return _cited(self.places)

    @property
    def model(self) -> str:
        """Super, Nano or Ultra; "" for a fact about something else."""
        first = self.key.partition(".")[0]
        return first.capitalize() if first in FAMILY else ""

    def __str__(self) -> str:
        return _as_published(self.value)

    def __format__(self, spec: str) -> str:
        if spec == "unit":
            return output.with_unit(str(self), self.unit)
        return format(self.value, spec) if spec else str(self)


def facts(key: str) -> Fact:
    """The fact under `key`, such as "super.latent_width".

    Raises:
        FactError: there is none; the message names similar keys.
    """
    known = all_facts()
    if key not in known:
        near = difflib.get_close_matches(key, known, n=4, cutoff=0.5)
        hint = f"Similar: {', '.join(near)}." if near else f"Known: {output.some_names(known)}."
        raise FactError(f"facts.toml has no {key!r}. {hint}")
    return known[key]


def tell(text: str, **values: Any) -> None:
    """Show a paragraph of markdown with facts in it, and their sources below.

        tell("Super has {super.layers} layers, {super.attention_layers} of them attention.")
        tell("One sequence keeps {super.ssm_state_bytes:unit}; ours keeps {ours:,} bytes.", ours=n)

    Args:
        text: markdown. A name with a dot in braces is a fact (`:unit` adds its unit, `:.2f` and
            the like format it); a name without a dot is one of `values`. Other braces, as in
            LaTeX, stay as they are.
        values: our own numbers, the same on every machine. Use `measured` for what was measured,
            because the tests of the chapters compare this text.

    Raises:
        FactError: an unknown fact, or a value that was not passed.
    """
    used: dict[str, Fact] = {}

    def fact(match: re.Match[str]) -> str:
        found = used.setdefault(match[1], facts(match[1]))
        return format(found, match[2] or "")

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            return match[0]
        given = values[match[1]]
        return format(given, match[2]) if match[2] else _as_published(given)

    told = _VALUE_IN_TEXT.sub(value, _FACT_IN_TEXT.sub(fact, text))
    unused = [name for name in values if not re.search(r"\{" + name + r"[:}]", text)]
    if unused:
        raise FactError(f"tell got {unused}, which its text does not use; remove them.")
    notes = _source_notes(used.values())
    markdown = told + (f"\n\n<small>{'<br>'.join(notes)}</small>" if notes else "")
    output.show_output("\n".join([told, *notes]), more={"text/markdown": markdown})


def facts_table(
    *keys: str,
    ours: Mapping[str, Any] | None = None,
    title: str = "",
    models: tuple[str, ...] = (),
    measured: bool = False,
) -> None:
    """Show facts as a table, our numbers beside NVIDIA's, with the sources below.

        facts_table("super.layers", "super.width", ours={"super.layers": 14, "super.width": 256})
        facts_table("layers", "width", models=("nano", "super", "ultra"), title="The family")

    Args:
        keys: keys of facts; with `models`, without the model's name in front.
        ours: our number for some of the keys.
        title: the title of the table.
        models: one column each.
        measured: our numbers were measured here; do not show them in the compared text.
    """
    column = dict(ours or {})
    unknown = [key for key in column if key not in keys]
    if unknown:
        raise FactError(f"ours has {unknown}, which are not rows of the table: {list(keys)}.")
    head = ["", *(["ours"] if column else [])]
    head += [model.capitalize() for model in models] or ["NVIDIA's"]
    rows, used = [], []
    for key in keys:
        found = [_fact_or_none(f"{model}.{key}") for model in models] if models else [facts(key)]
        first = next((fact for fact in found if fact is not None), None)
        if first is None:
            raise FactError(f"no model of {models} has a fact {key!r}.")
        used += [fact for fact in found if fact is not None]
        mine = [_as_published(column[key]) if key in column else "–"] if column else []
        theirs = ["–" if fact is None else str(fact) for fact in found]
        name = first.name + (f" [{first.unit}]" if first.unit else "")
        rows.append([name, *mine, *theirs])
    notes = _source_notes(used)
    rich = output.html_table(
        head, [[output.inline_html(cell) for cell in row] for row in rows], title=title
    )
    rich += "".join(f"<div><small>{output.inline_html(note)}</small></div>" for note in notes)
    if measured and column:
        head, rows = [head[0], *head[2:]], [[row[0], *row[2:]] for row in rows]
    output.show_output("\n".join([output.plain_table(head, rows, title=title), *notes]), rich)


@cache
def all_facts() -> dict[str, Fact]:
    """Key → fact, in the order of the file."""
    return parse_facts(FILE.read_text())


def parse_facts(text: str) -> dict[str, Fact]:
    """Facts from the text of a file.

    Raises:
        FactError: an entry without value, unit, source or caveat, or with an unknown source.
    """
    tree = tomllib.loads(text, parse_float=PublishedFloat)
    sources = tree.pop("sources", {})
    found: dict[str, Fact] = {}

    def visit(node: Any, path: tuple[str, ...]) -> None:
        if not isinstance(node, Mapping):
            raise FactError(f"{'.'.join(path)} is not part of a fact; a fact is a table.")
        if "value" in node:
            found[".".join(path)] = _read(".".join(path), node, sources)
            return
        for name, child in node.items():
            visit(child, (*path, name))

    visit(tree, ())
    return found


def _read(key: str, entry: Mapping[str, Any], sources: Mapping[str, str]) -> Fact:
    missing = sorted(FIELDS - {"name"} - set(entry))
    extra = sorted(set(entry) - FIELDS)
    if missing or extra:
        raise FactError(f"{key} has no {missing} and has the unknown fields {extra}.")
    if not re.fullmatch(_KEY, key):
        raise FactError(
            f"{key!r} is not a key; expected lower-case letters, digits and _, with a dot."
        )
    if not entry["source"]:
        raise FactError(f"{key} has an empty source; name one.")
    places = tuple(_place(key, part.strip(), sources) for part in entry["source"].split(";"))
    name = entry.get("name") or key.partition(".")[2].replace("_", " ").replace(".", ", ")
    return Fact(key, entry["value"], entry["unit"], places, entry["caveat"], name)


def _place(key: str, part: str, sources: Mapping[str, str]) -> tuple[str, str]:
    """`S, Table 1` → the name of the source, and the place in it."""
    tag, _, place = part.partition(",")
    if tag not in sources:
        raise FactError(f"{key} cites {tag!r}; [sources] has {sorted(sources)}.")
    return sources[tag], place.strip()


def _cited(places: Iterable[tuple[str, str]]) -> str:
    """Each source once, with all its places: `Nemotron 3 Super report, Table 1, section 2`."""
    by_source: dict[str, list[str]] = {}
    for source, place in places:
        known = by_source.setdefault(source, [])
        if place and place not in known:
            known.append(place)
    return "; ".join(", ".join([source, *known]) for source, known in by_source.items())


def _fact_or_none(key: str) -> Fact | None:
    return all_facts().get(key)


def _as_published(value: Any) -> str:
    """A number as it was published: 48.30 keeps its zero, 131072 becomes 131,072."""
    if isinstance(value, PublishedFloat):
        return value.text
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}"


def _source_notes(used: Iterable[Fact]) -> list[str]:
    """One line of sources, and one line for each caveat."""
    seen = list({fact.key: fact for fact in used}.values())
    if not seen:
        return []
    notes = [f"Sources: {_cited(place for fact in seen for place in fact.places)}."]
    models = {fact.model for fact in seen}
    about: dict[str, list[str]] = {}
    for fact in seen:
        if fact.caveat:
            of = f" ({fact.model})" if fact.model and len(models) > 1 else ""
            about.setdefault(fact.caveat, []).append(fact.name + of)
    for caveat, names in about.items():
        whose = "; ".join(names)
        notes.append(f"{whose[:1].upper()}{whose[1:]}: {caveat}")
    return notes
