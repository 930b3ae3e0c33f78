"""Every "reference sheet 2.3" in the repository leads to a heading of docs/reference.md.

A citation names one section or several: "reference sheet 1.4 and 2.2", "reference sheet section 3".
It may be broken over two lines of a docstring, a comment or a notebook.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reference.md").read_text()
SUFFIXES = {".py", ".md", ".toml", ".ipynb"}

NUMBER = r"\d+(?:\.\d+)*"
CITATION = re.compile(
    rf"reference sheet,?(?: sections?)? ({NUMBER}(?:(?:, | and |, and ){NUMBER})*)", re.I
)
MENTION = re.compile(r"reference sheet", re.I)
NOT_A_CITATION = {"docs/reference.md", "tests/project/test_reference.py", "CONTRIBUTING.md"}


def sections(page: str) -> set[str]:
    """Numbers of the headings: "2" and "2.3"."""
    return set(re.findall(rf"^#+ ({NUMBER})\.? ", page, re.M))


def one_line(text: str) -> str:
    """The text without line breaks, and without what notebooks and comments put at them."""
    text = re.sub(r'\\n",\s*"', " ", text)
    return re.sub(r"\s+(?:# )?\s*", " ", text)


def dangling(text: str, known: set[str]) -> list[str]:
    """Cited sections that do not exist, and mentions of the sheet that name no section."""
    text = one_line(text)
    cited = [number for m in CITATION.finditer(text) for number in re.findall(NUMBER, m[1])]
    found = [number for number in cited if number not in known]
    vague = len(MENTION.findall(text)) - len(CITATION.findall(text))
    return found + ["a citation without a section"] * vague


def test_every_citation_has_its_section() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    faults = {}
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix not in SUFFIXES or name in NOT_A_CITATION or not path.is_file():
            continue
        if wrong := dangling(path.read_text(), sections(PAGE)):
            faults[name] = wrong
    assert faults == {}


def test_a_source_stands_behind_every_tag() -> None:
    listed = set(re.findall(r"^\| `\[(\w+)\]` \|", PAGE, re.M))
    used = set(re.findall(r"\[([A-Z][A-Z]{0,2}|2nd)\]", PAGE))
    assert used <= listed
    assert {"S", "N", "W", "F", "L", "HF"} <= listed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Source: reference sheet 2.3.", []),
        ("Source: reference sheet 2.3 and 7.1; arXiv 2405.21060.", ["7.1"]),
        ("(reference sheet\n    # 7.1), here", ["7.1"]),
        ("Source: Reference sheet sections 2 and 2.3, 9.", ["9"]),
        ('"Source: reference\\n",\n    "sheet 2.4"', ["2.4"]),
        ("as the reference sheet says", ["a citation without a section"]),
    ],
)
def test_a_citation_that_leads_nowhere_is_found(text: str, expected: list[str]) -> None:
    page = "# Title\n\n## 2. Mixer\n\n### 2.3 Chunked form\n\nSee 7.1 and [S].\n"
    assert sections(page) == {"2", "2.3"}
    assert dangling(text, sections(page)) == expected
