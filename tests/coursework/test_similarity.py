"""Copies are found behind new names and new layout; other answers are not called copies."""

from __future__ import annotations

import csv
from pathlib import Path

from nemotron_lite.coursework.similarity import (
    REFERENCE,
    SHORTEST,
    Answer,
    compare,
    words,
    write_report,
)

STUB = 'def scan(x, dt, state):\n    """Scan."""\n    raise NotImplementedError'
ONE = '''
import torch
def scan(x, dt, state):
    """Mine."""
    outputs = []
    shared = x.shape[2] // state.shape[2]
    for step in range(x.shape[1]):
        fade = torch.exp(dt[:, step] * state)[..., None, None]  # decay
        write = (dt[:, step].unsqueeze(-1) * x[:, step]).unsqueeze(-1)
        state = fade * state + write * shared
        read = (state * x[:, step].unsqueeze(-2)).sum(-1)
        outputs.append(read + dt.unsqueeze(-1) * x[:, step])
    return torch.stack(outputs, dim=1), state
'''
RENAMED = """
def scan(x, dt, state):
    # all my own work
    ys: list = []
    per_group: int = x.shape[2] // state.shape[2]

    for t in range(x.shape[1]):
        a = torch.exp(
            dt[:, t] * state
        )[..., None, None]
        b = (dt[:, t].unsqueeze(-1) * x[:, t]).unsqueeze(-1)
        state = a * state + b * per_group
        c = (state * x[:, t].unsqueeze(-2)).sum(-1)
        ys.append(c + dt.unsqueeze(-1) * x[:, t])
    return torch.stack(ys, dim=1), state
"""
OTHER = """
def scan(x, dt, state):
    b, t, h, p = x.shape
    y = x.new_zeros(b, t, h, p)
    A = -torch.arange(1, h + 1)
    position = 0
    while position < t:
        decay = (A * dt[:, position]).exp().view(b, h, 1, 1)
        update = torch.einsum("bhp,bhn->bhpn", x[:, position], state[:, :, 0])
        state = state.mul(decay).add(update)
        y[:, position] = torch.einsum("bhpn,bhn->bhp", state, state[:, :, 0])
        position += 1
    return y, state
"""


def pairs(*answers: tuple[str, str]) -> list[tuple[str, str]]:
    found, _ = compare("99.scan", STUB, [Answer(*one) for one in answers])
    return [(pair.one.student, pair.other.student) for pair in found]


def test_names_comments_and_layout_do_not_count() -> None:
    assert len(words(ONE)) > SHORTEST
    found, _ = compare("99.scan", STUB, [Answer("ann", ONE), Answer("bob", RENAMED)])
    assert found[0].similarity > 0.95
    assert pairs(("ann", ONE), ("bob", RENAMED), ("cem", OTHER)) == [("ann", "bob")]


def test_a_copy_of_the_reference_is_reported() -> None:
    assert pairs(("ann", RENAMED), (REFERENCE, ONE), ("cem", OTHER)) == [("ann", REFERENCE)]


def test_short_answers_and_stubs_are_left_out_with_the_reason() -> None:
    short = "def scan(x, dt, state):\n    return x * dt, state"
    answers = [Answer("ann", short), Answer("bob", short), Answer("cem", STUB)]
    found, left_out = compare("99.scan", STUB, answers)
    assert found == []
    assert [(a.student, "too short" in reason) for a, reason in left_out] == [
        ("ann", True),
        ("bob", True),
    ]


def test_what_most_have_written_says_nothing() -> None:
    """Six answers share a long opening; two of them share the rest too."""
    opening = (
        ONE.partition("    for step")[0].strip()
        + "\n"
        + "".join(
            f"    outputs.append(torch.exp(x[:, {i}]).sum(-1) * dt[{i}])\n" for i in range(20)
        )
    )
    names = ("tanh", "relu", "sigmoid", "sqrt", "cumsum")
    different = [
        opening
        + f"    y = torch.{name}(x)\n"
        + "".join(
            f"    y = y.{name}() {'+-*/@'[k]} dt.{names[k - 1]}(dim={i + k})\n" for i in range(12)
        )
        + "    return y, state\n"
        for k, name in enumerate(names)
    ]
    answers = [(f"s{i}", source) for i, source in enumerate(different)]
    assert pairs(*answers, ("copy", different[0])) == [("s0", "copy")]


def test_what_is_not_python_is_not_compared() -> None:
    assert words("def scan(:") == []
    assert words("x" * 300_000) == []


def test_the_report_has_pairs_and_what_was_left_out(tmp_path: Path) -> None:
    answers = {
        "99.scan": [Answer("=ann", ONE), Answer("<b>", RENAMED)],
        "99.tiny": [Answer("ann", "def tiny(x):\n    return x + 1")],
    }
    given = {"99.scan": (STUB, OTHER), "99.tiny": ("def tiny(x):\n    raise E", "def tiny(x): 1")}
    assert len(write_report(tmp_path, answers, given)) == 1
    with (tmp_path / "similarity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (rows[0]["student"], rows[0]["other"]) == ("'=ann", "<b>")
    assert float(rows[0]["similarity"]) > 0.95
    assert rows[1]["remark"].startswith("too short to compare")
    page = (tmp_path / "similarity.html").read_text()
    assert "&lt;b&gt;" in page
    assert "<b><b></b>" not in page
    assert "99.tiny: 1 answers too short" in page
    assert "no proof" in page
