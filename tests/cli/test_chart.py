"""Charts in characters: every point where it belongs, and what a terminal and a log show."""

from __future__ import annotations

import io
import random
import re
from typing import Any

import pytest
from rich.console import Console

from nemotron_lite.cli import live_curve
from nemotron_lite.cli.chart import Chart, Curve
from nemotron_lite.cli.common import settings
from nemotron_lite.cli.live_curve import LiveCurve

REFERENCE = {"seconds": [5.0, 10.0, 20.0, 30.0], "loss": [6.0, 5.0, 4.0, 3.0], "machine": {}}


def plain(chart: Chart, curves: list[Curve], **options: Any) -> list[str]:
    return [line.plain for line in chart.draw(curves, **options)]


@pytest.mark.parametrize("seed", range(8))
def test_each_point_is_one_dot(seed: int) -> None:
    choose = random.Random(seed)
    width, height = choose.randint(2, 70), choose.randint(2, 20)
    chart = Chart((0.0, 1.0), (0.0, 1.0), width, height)
    column, row = choose.randrange(2 * width), choose.randrange(4 * height)
    x, y = (column + 0.5) / (2 * width), 1 - (row + 0.5) / (4 * height)
    lines = [line[7:].ljust(width) for line in plain(chart, [Curve([x], [y])])[:height]]
    marks = [(i, j) for i, line in enumerate(lines) for j, c in enumerate(line) if c != " "]
    assert marks == [(row // 4, column // 2)]
    assert bin(ord(lines[row // 4][column // 2]) - 0x2800).count("1") == 1
    lines = [line[7:].ljust(width) for line in plain(chart, [Curve([x], [y])], ascii_only=True)]
    assert [(i, line.find("*")) for i, line in enumerate(lines[:height]) if "*" in line] == [
        (row // 4, column // 2)
    ]


def test_the_four_corners_of_a_cell() -> None:
    chart = Chart((0.0, 4.0), (0.0, 8.0), 2, 2)
    for x, y, expected in ((0.1, 7.9, "⠁"), (1.1, 7.9, "⠈"), (0.1, 4.1, "⡀"), (1.1, 4.1, "⢀")):
        assert plain(chart, [Curve([x], [y])])[0][7] == expected


def test_the_first_curve_is_in_front() -> None:
    chart = Chart((0.0, 20.0), (0.0, 2.0), 20, 4)
    flat = [1.1] * 20
    xs = [i + 0.5 for i in range(20)]
    ours, reference = Curve(xs[:5], flat[:5], "bold", "*"), Curve(xs, flat, "dim", ".")
    assert "*****..............." in "\n".join(plain(chart, [ours, reference], ascii_only=True))
    drawn = "\n".join(plain(chart, [ours, reference], ascii_only=True))
    assert drawn.isascii()
    assert drawn.splitlines()[0].startswith("  2.0 |")
    assert drawn.splitlines()[3].startswith("  0.0 |")
    assert drawn.splitlines()[-1].split() == ["0", "20", "seconds"]


def test_values_outside_are_drawn_at_the_edge_and_means_in_a_column() -> None:
    chart = Chart((0.0, 4.0), (0.0, 4.0), 4, 4)
    lines = plain(chart, [Curve([0.5, 1.5, 2.2, 2.8, 9.0], [99.0, -99.0, 1.0, 2.0, 1.0])],
                  ascii_only=True)  # fmt: skip
    assert [line[7:].rstrip() for line in lines[:4]] == ["*", "", "  *", " *"]


@pytest.mark.parametrize("wrong", [dict(width=1), dict(height=0), dict(x=(1, 1)), dict(y=(2, 1))])
def test_an_empty_chart_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected ranges"):
        Chart(**{"x": (0, 1), "y": (0, 1), **wrong})


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(step: int, seconds: float, loss: float) -> dict[str, Any]:
    return {"step": step, "seconds": seconds, "ce": loss, "tokens": 100 * step}


def training(live: LiveCurve, seconds: int = 30) -> None:
    with live:
        for i in range(1, 2 * seconds + 1):
            live.step(record(i, i / 2, 8 - i / 15))
    live.show_result()


@pytest.mark.parametrize("reference", [None, REFERENCE])
def test_a_log_has_a_line_every_ten_seconds_and_one_chart(
    capsys: pytest.CaptureFixture[str], reference: dict[str, Any] | None
) -> None:
    training(LiveCurve(30, reference))
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"training: {n} of 30 s" for n in (10, 20, 30)
    ]
    assert lines[0].endswith("200 tokens/s")
    assert ("(reference 5.000)" in lines[0]) == (reference is not None)
    assert shown.out.isascii()
    assert "*: this run, loss 4.633 at the end" in shown.out
    assert ("quiet machine (another machine), 3.000" in shown.out) == (reference is not None)
    assert len(shown.out.splitlines()) == 15


def test_a_terminal_has_a_chart_that_grows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = _Terminal()
    monkeypatch.setattr(live_curve, "is_terminal", lambda _: True)
    monkeypatch.setattr(
        live_curve, "err", Console(file=terminal, force_terminal=True, width=100, highlight=False)
    )
    ticks = iter(range(1000))
    monkeypatch.setattr(live_curve, "_clock", lambda: next(ticks) * 0.26)
    training(LiveCurve(30, REFERENCE))
    drawn = terminal.getvalue()
    pictures = drawn.count("tokens/s")
    assert 25 <= pictures <= 40  # one of two updates, 0.52 seconds apart
    assert any("\u2800" < c <= "\u28ff" for c in drawn)
    assert re.search(r"(29|30) of 30 s, update (59|60), loss 4\.[67]", drawn)
    final = capsys.readouterr().out
    assert any("\u2800" < c <= "\u28ff" for c in final)
    assert "bright dots: this run" in final


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    settings.quiet = True
    try:
        training(LiveCurve(30, REFERENCE))
    finally:
        settings.quiet = False
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("count", [1, 149, 150, 151, 1000, 1499])
def test_a_kept_curve_has_at_most_150_points(count: int) -> None:
    live = LiveCurve(10)
    for i in range(count):
        live.step(record(i + 1, (i + 1) / 1000, 5.0 + i))
    kept = live.as_json()
    assert len(kept["seconds"]) == len(kept["loss"]) <= 150
    assert kept["seconds"][-1] == pytest.approx(count / 1000, abs=0.006)
    parts = -(-count // 150)
    assert kept["loss"][0] == pytest.approx(5.0 + (min(parts, count) - 1) / 2, abs=1e-3)
    assert kept["seconds"] == sorted(kept["seconds"])
