"""The glossary agrees with the chapters: every term is used, linked once at least, and defined."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
TERMS = re.findall(
    r"^### (.+?)\n\n(.+?)(?=\n\n|\Z)", GLOSSARY.partition("\n## Terms\n")[2], re.M | re.S
)
LEAST_WORDS = 6  # of a definition
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def anchor(term: str) -> str:
    """The fragment of a link to a heading."""
    return re.sub(r"[^\w\- ]", "", term.lower()).replace(" ", "-")


def texts(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


LINKS = {path.name: set(re.findall(r"glossary\.md#([\w-]+)", texts(path))) for path in CHAPTERS}


def test_there_are_terms_in_alphabetical_order() -> None:
    names = [name.lower() for name, _ in TERMS]
    assert len(names) > 20
    assert names == sorted(names)
    assert len(set(map(anchor, names))) == len(names), "a term is there twice"


@pytest.mark.parametrize(("term", "text"), TERMS, ids=[name for name, _ in TERMS])
def test_a_term_is_defined_and_linked(term: str, text: str) -> None:
    assert len(text.split()) >= LEAST_WORDS, text
    users = [name for name, found in LINKS.items() if anchor(term) in found]
    assert users, f"no chapter links to {term!r}; link it at its first use, or drop it"
    said = re.search(r"\(chapter (\d\d)\)\s*$", text)
    assert said, "end the definition with (chapter NN)"
    assert said[1] == users[0][:2], f"it says chapter {said[1]}; the first link is in {users[0]}"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_links_its_terms_and_papers(path: Path) -> None:
    if path.stem.endswith("_deeper"):
        return
    assert len(LINKS[path.name]) >= 5, "few terms are linked"
    bare = re.findall(r"(?<!abs/)(?<!\[arXiv )\barXiv[ :]+\d{4}\.\d{5}", texts(path))
    assert not bare, f"link {bare} to https://arxiv.org/abs/…"
