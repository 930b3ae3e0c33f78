"""The figures of models at equal compute show every seed, and refuse what the record lacks."""

from __future__ import annotations

from typing import Any

import pytest

from nemotron_lite.course.plotting import alt_of, quality_claims, quality_curves


def entry(words: str, runs: list[list[float]]) -> dict[str, Any]:
    points = [
        {
            "flops": (i + 1) * 2e12,
            "bits_per_byte": {"median": sorted(at)[len(at) // 2], "min": min(at), "max": max(at)},
        }
        for i, at in enumerate(zip(*runs, strict=True))
    ]
    return {"words": words, "seeds": list(range(len(runs))), "curve": points}


def claim(model: str, other: str, each: list[float], interval: list[float] | None) -> Any:
    mean = sum(each) / len(each) if each else None
    return {
        "model": model, "other": other, "each": each, "n": len(each), "mean": mean,
        "interval": interval, "verdict": "no" if interval else "not decided", "margin": 0.01,
    }  # fmt: skip


FOUND = {
    "models": {
        "a": entry("first model", [[2.0, 1.5], [2.2, 1.7], [2.1, 1.6]]),
        "b": entry("second model", [[2.3, 1.8]]),
        "c": entry("third model", []),
    },
    "claims": [
        claim("a", "b", [-0.1, -0.3], [-0.4, 0.0]),
        claim("b", "c", [], None),
    ],
}


def test_a_line_is_the_median_and_its_bars_reach_all_seeds() -> None:
    fig = quality_curves(found=FOUND)
    first, second = fig.data
    assert (first.name, second.name) == ("first model", "second model")  # the third has no run
    assert list(first.x) == [2.0, 4.0]
    assert list(first.y) == [2.1, 1.6]
    assert list(first.error_y.array) == pytest.approx([0.1, 0.1])
    assert list(first.error_y.arrayminus) == pytest.approx([0.1, 0.1])
    assert first.line.dash != second.line.dash
    (alone,) = quality_curves(["b"], found=FOUND).data
    assert alone.line.dash == second.line.dash  # a model looks the same in every figure
    assert "first model, second model" in str(alt_of(fig))
    with pytest.raises(ValueError, match=r"no runs of \['c'\]; it has those of \['a', 'b'\]"):
        quality_curves(["a", "c"], found=FOUND)


def test_a_claim_has_its_seeds_its_interval_and_its_verdict() -> None:
    fig = quality_claims(found=FOUND)
    traces = {trace.name: trace for trace in fig.data}
    assert list(traces["seeds of claim 1"].x) == [-0.1, -0.3]
    assert list(traces["mean of claim 1"].x) == [-0.2]
    assert traces["mean of claim 1"].error_x.array[0] == pytest.approx(0.2)
    assert "mean of claim 2" not in traces  # no seeds, no interval
    first, second = fig.layout.yaxis.ticktext
    assert first == "first model<br>minus second model<br><b>no</b>"
    assert second.endswith("<b>not decided</b>")
    band, _ = fig.layout.shapes
    assert (band.x0, band.x1) == (-0.01, 0.01)
    assert len(quality_claims([("a", "b")], found=FOUND).data) == 2
    with pytest.raises(ValueError, match="no claim about"):
        quality_claims([("a", "c")], found=FOUND)
