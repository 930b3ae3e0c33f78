"""The figure of what is lost without each part shows every run, and refuses unknown parts."""

from __future__ import annotations

import pytest

from nemotron_lite.course.plotting.figure import alt_of
from nemotron_lite.course.plotting.removal import removal_figure


def entry(part: str | None, runs: list[float]) -> dict[str, object]:
    difference = {"median": sorted(runs)[len(runs) // 2], "runs": runs}
    return {"task": "text", "without": part, "difference": difference}


FOUND = {"results": [entry(None, [0.0]), entry("conv", [0.3, 0.1, 0.2]), entry("D", [0.01, 0, 0])]}


def test_every_run_is_drawn_beside_its_part() -> None:
    fig = removal_figure("text", ["D", "conv"], title="Without", found=FOUND)
    rows = {trace.name: list(trace.x) for trace in fig.data}
    assert rows["convolution"] == [0.3, 0.1, 0.2]
    assert rows["direct path D"] == [0.01, 0, 0]
    assert rows["median"] == [0, 0.2]
    assert "direct path D, convolution" in str(alt_of(fig))


@pytest.mark.parametrize(("task", "part"), [("text", "gate"), ("recall", "conv")])
def test_what_the_record_lacks_is_named(task: str, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        removal_figure(task, [part], title="Without", found=FOUND)
