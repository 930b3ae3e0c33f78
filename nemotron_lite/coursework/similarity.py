"""Which answers to the same exercise are alike: a reason to read both, and no proof of anything.

The method is that of MOSS (Schleimer, Wilkerson and Aiken, "Winnowing", SIGMOD 2003), without the
selection that long texts need:

1. An answer is parsed, which drops comments and layout. Docstrings, annotations and imports are
   dropped too. Names that the code itself chooses (arguments, variables, helpers) become one letter
   each time; names of attributes, of torch's functions and of what was given keep their text.
2. The rest is a list of words. All runs of `RUN` words that follow each other are its fingerprint.
3. Runs that the stub also has are removed, and, with enough learners, runs that more than half of
   all answers have: an idiom that everybody writes says nothing.
4. The similarity of two answers is the number of runs that they share, divided by the number of the
   smaller one. 1 means that one answer lies inside the other.

So renaming, comments, layout and the order of functions change nothing. Rewriting expressions does:
the report finds copies, not every shared idea. Answers with fewer than `SHORTEST` words of their
own are left out, since there are only a few ways to write a short answer; two honest answers of
three lines are often equal. The reference solution takes part as one more learner: it is public,
and an answer that equals it was probably not built.
"""

from __future__ import annotations

import ast
import builtins
import html
import io
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from nemotron_lite.course.syntax import parse
from nemotron_lite.coursework.pages import page
from nemotron_lite.coursework.tables import write_table
from nemotron_lite.coursework.texts import writable

RUN = 6  # words that follow each other
SHORTEST = 80  # words of an answer
LONGEST = 200_000  # characters of an answer
LEAST = 0.6  # similarity of a pair that is reported
COMMON_FROM = 6  # answers; with fewer, no run is called common
REFERENCE = "(the reference solution)"
COLUMNS = ("exercise", "student", "other", "similarity", "words", "words_other", "remark")


@dataclass(frozen=True)
class Answer:
    """One answer to an exercise."""

    student: str
    source: str


@dataclass(frozen=True)
class Pair:
    """Two answers to an exercise that are alike."""

    exercise: str
    one: Answer
    other: Answer
    similarity: float
    words: tuple[int, int]


class _Plain(ast.NodeTransformer):
    """Drops what says nothing about the work, and gives chosen names one letter."""

    def __init__(self, chosen: set[str]) -> None:
        self.chosen = chosen

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.chosen:
            node.id = "v"
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.arg, node.annotation = "v", None
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        self.generic_visit(node)
        if node.arg in self.chosen:
            node.arg = "v"
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        if node.name in self.chosen:
            node.name = "v"
        return self._without_docstring(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        if node.name in self.chosen:
            node.name = "v"
        return self._without_docstring(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        self.generic_visit(node)
        if node.value is None:
            return None
        plain = ast.Assign(targets=[node.target], value=node.value)
        return ast.copy_location(plain, node)

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def _without_docstring(self, node: Any) -> ast.AST:
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
            node.body = node.body[1:] or [ast.Pass()]
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node


def _chosen_names(tree: ast.AST) -> set[str]:
    """Names that the code itself gives to something."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
    return found - set(dir(builtins)) - {"self"}


def words(source: str) -> list[str]:
    """The words of an answer after normalising; none if it is not Python."""
    if len(source) > LONGEST:
        return []
    try:
        with warnings.catch_warnings():  # of the learner's code, such as "invalid escape sequence"
            warnings.simplefilter("ignore")
            tree = parse(source)
        tree = _Plain(_chosen_names(tree)).visit(tree)
        plain = ast.unparse(ast.fix_missing_locations(tree))
        kept = (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP)
        lines = io.StringIO(plain).readline
        return [t.string for t in tokenize.generate_tokens(lines) if t.type in kept]
    except Exception:  # no Python, nested too deeply, too large: whatever it is, it has no words
        return []


def runs(found: list[str]) -> set[tuple[str, ...]]:
    """All runs of RUN words."""
    return {tuple(found[i : i + RUN]) for i in range(len(found) - RUN + 1)}


def compare(
    exercise: str, stub: str, answers: Iterable[Answer]
) -> tuple[list[Pair], list[tuple[Answer, str]]]:
    """The pairs of answers that are alike, and the answers that were left out with the reason."""
    given, left_out, prints = runs(words(stub)), [], []
    beside = len(words(stub))
    for answer in answers:
        found = words(answer.source)
        number = max(0, len(found) - beside)
        if number < SHORTEST:
            reason = f"too short to compare: {number} words of its own, fewer than {SHORTEST}"
            if answer.student != REFERENCE and found != words(stub):
                left_out.append((answer, reason))
        else:
            prints.append((answer, runs(found) - given, number))
    learners = [one for one in prints if one[0].student != REFERENCE]
    if len(learners) >= COMMON_FROM:
        count = Counter(run for _, found, _ in learners for run in found)
        common = {run for run, times in count.items() if times > len(learners) / 2}
        # A run that most have may be one that most have copied: it counts again if nothing is left.
        prints = [(a, found - common or found, n) for a, found, n in prints]
    pairs = []
    for (one, runs_one, n), (other, runs_other, m) in combinations(prints, 2):
        smaller = min(len(runs_one), len(runs_other))
        alike = len(runs_one & runs_other) / smaller if smaller else 0.0
        if alike >= LEAST:
            pairs.append(Pair(exercise, one, other, alike, (n, m)))
    return sorted(pairs, key=lambda pair: -pair.similarity), left_out


def write_report(
    folder: Path,
    answers: Mapping[str, list[Answer]],
    given: Mapping[str, tuple[str, str]],
) -> list[Pair]:
    """Write similarity.csv and similarity.html; returns the pairs.

    Args:
        folder: for both files.
        answers: of each exercise.
        given: stub and reference solution of each exercise.
    """
    pairs: list[Pair] = []
    rows: list[dict[str, Any]] = []
    for exercise, of in answers.items():
        stub, solution = given[exercise]
        found, left_out = compare(exercise, stub, [*of, Answer(REFERENCE, solution)])
        pairs += found
        rows += [
            {"exercise": exercise, "student": a.student, "remark": reason} for a, reason in left_out
        ]
    alike = [
        {
            "exercise": p.exercise, "student": p.one.student, "other": p.other.student,
            "similarity": round(p.similarity, 2), "words": p.words[0], "words_other": p.words[1],
            "remark": "",
        }
        for p in pairs
    ]  # fmt: skip
    write_table(folder / "similarity.csv", COLUMNS, [*alike, *rows])
    (folder / "similarity.html").write_text(writable(_page(pairs, rows)), encoding="utf-8")
    return pairs


def _page(pairs: list[Pair], left_out: list[dict[str, Any]]) -> str:
    method = html.escape((__doc__ or "").partition("\n\n")[2])
    parts = []
    for pair in pairs:
        title = (
            f"{pair.exercise}: {pair.one.student} and {pair.other.student}, {pair.similarity:.0%}"
        )
        sides = "".join(
            f"<td><b>{html.escape(a.student)}</b><pre>{html.escape(a.source)}</pre></td>"
            for a in (pair.one, pair.other)
        )
        parts.append(
            f"<details><summary>{html.escape(title)}</summary><table><tr>{sides}</tr></table>"
            "</details>"
        )
    short = Counter(row["exercise"] for row in left_out)
    lines = "".join(
        f"<li>{html.escape(exercise)}: {number} answers too short to compare</li>"
        for exercise, number in short.items()
    )
    none = "" if pairs else f"<p>No pair of answers reaches {LEAST:.0%}.</p>"
    return page(
        "Similar answers",
        "body { max-width: 80rem; } td { vertical-align: top; width: 50%; } "
        "pre { white-space: pre-wrap; }",
        "<h1>Similar answers</h1><p>A reason to read both answers, and no proof of anything.</p>"
        f"{none}{''.join(parts)}<h2>Left out</h2><ul>{lines or '<li>nothing</li>'}</ul>"
        f"<h2>Method</h2><pre>{method}</pre>",
    )
