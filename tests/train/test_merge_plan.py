"""Which checkpoints a merge takes: the stable phase of the log, or a warning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemotron_lite.train import TrainConfig, merge_weights
from nemotron_lite.train.merge_plan import plan_merge
from nemotron_lite.train.schedule import learning_rate

CONFIG = TrainConfig(steps=2000)


def rate(step: int) -> float:
    """Of the schedule: a warm-up until update 100, a decay after update 1200."""
    return learning_rate(
        step / 2000,
        peak=CONFIG.lr,
        floor=CONFIG.min_lr,
        warmup_fraction=CONFIG.warmup_fraction,
        decay_fraction=CONFIG.decay_fraction,
    )


def write_run(run: Path, rates: dict[int, float], every: int = 50) -> Path:
    (run / "snapshots").mkdir(parents=True)
    for step in range(0, max(rates) + 1, every):
        (run / "snapshots" / f"step-{step:08d}.pt").touch()  # a plan reads only the names
    lines = [json.dumps({"step": step, "lr": lr}) + "\n" for step, lr in rates.items()]
    (run / "log.jsonl").write_text("".join(lines))
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", {step: rate(step) for step in range(1, 2001)})


def test_the_default_is_the_stable_phase(run: Path) -> None:
    plan = plan_merge(run)
    assert plan.steps == [*range(100, 1201, 50)]
    assert plan.shares == merge_weights(plan.steps)
    assert plan.rates == [CONFIG.lr] * 23
    assert plan.warning == ""
    assert plan_merge(run, window=400) == plan_merge(run, window=400, until=1200)
    assert plan_merge(run, window=400).steps == [*range(800, 1201, 50)]
    assert plan_merge(run, until=600).steps == [*range(100, 601, 50)]


@pytest.mark.parametrize(
    ("window", "until", "low", "high"),
    [
        (400, 2000, "2.50e-05", f"{rate(1601):.2e}"),  # in the decay
        (100, 1250, f"{rate(1250):.2e}", "2.50e-03"),  # over its beginning
        (1200, 1200, f"{rate(1):.2e}", "2.50e-03"),  # random weights and a warm-up
    ],
)
def test_a_rate_that_changes_is_named(
    run: Path, window: int, until: int, low: str, high: str
) -> None:
    plan = plan_merge(run, window=window, until=until)
    assert f"updates {until - window + 1:,} to {until:,}: it was {low} to {high}" in plan.warning
    assert "The stable phase of this run has the checkpoints 100 to 1,200." in plan.warning
    assert plan.steps[-1] == until
    assert (plan.rates[0] is None) == (window == until)


def test_a_rate_that_a_resume_changed(tmp_path: Path) -> None:
    rates = {step: 1e-3 if step <= 300 else 5e-4 for step in range(1, 501)}
    run = write_run(tmp_path, rates)
    assert plan_merge(run).steps == [*range(0, 301, 50)]
    assert plan_merge(run, until=500).steps == [*range(300, 501, 50)]
    assert "5.00e-04 to 1.00e-03" in plan_merge(run, window=300, until=500).warning


def test_a_log_with_gaps(tmp_path: Path) -> None:
    rates = {step: 1e-3 for step in range(1, 501) if step != 320}
    run = write_run(tmp_path, rates)
    assert plan_merge(run).steps == [*range(0, 301, 50)]
    assert plan_merge(run, window=100, until=500).warning == ""
    assert "does not have" in plan_merge(run, window=200, until=500).warning
    (run / "log.jsonl").unlink()
    with pytest.raises(ValueError, match=r"no two checkpoints with a constant.*--window"):
        plan_merge(run)
    plan = plan_merge(run, window=100)
    assert plan.steps == [400, 450, 500]
    assert plan.rates == [None] * 3
    assert "does not have the learning rates of all updates from 401 to 500" in plan.warning


def test_a_decay_alone_needs_a_window(tmp_path: Path) -> None:
    run = write_run(tmp_path, {step: 1 / step for step in range(1, 501)})
    with pytest.raises(ValueError, match=r"constant learning rate.*after 400 updates.*--window"):
        plan_merge(run, until=400)
    assert "was not constant" in plan_merge(run, window=100, until=400).warning


def test_ends_that_are_no_checkpoints(run: Path) -> None:
    with pytest.raises(ValueError, match="needs a checkpoint after 1,210 updates"):
        plan_merge(run, until=1210)
    with pytest.raises(ValueError, match="needs a checkpoint after 1,190 updates"):
        plan_merge(run, window=10)
    with pytest.raises(ValueError, match="window=-50"):
        plan_merge(run, window=-50)
