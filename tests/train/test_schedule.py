"""The schedule against its closed form, at Super's milestones and at every update of a run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_lite.train import learning_rate

SUPER = dict(peak=4.5e-4, floor=4.5e-6, warmup_fraction=0.008, decay_fraction=0.2)


def test_super_at_its_milestones() -> None:
    assert learning_rate(0.0, **SUPER) == 0.0
    assert learning_rate(0.004, **SUPER) == pytest.approx(2.25e-4)
    assert learning_rate(0.008, **SUPER) == 4.5e-4
    assert learning_rate(0.8, **SUPER) == 4.5e-4
    # after a quarter of the decay, half of the fall is done: sqrt(1/4) = 1/2
    assert learning_rate(0.85, **SUPER) == pytest.approx((4.5e-4 + 4.5e-6) / 2)
    assert learning_rate(1.0, **SUPER) == pytest.approx(4.5e-6)


def test_every_update_of_a_run_of_steps() -> None:
    steps, warmup, decay = 200, 20, 80
    for s in range(1, steps + 1):
        found = learning_rate(
            s / steps, peak=1.0, floor=0.1, warmup_fraction=0.1, decay_fraction=0.4
        )
        if s <= warmup:
            expected = s / warmup
        elif s <= steps - decay:
            expected = 1.0
        else:
            expected = 0.1 + 0.9 * (1 - math.sqrt((s - (steps - decay)) / decay))
        assert found == pytest.approx(expected, abs=1e-9)


@given(
    progress=st.floats(0, 1),
    later=st.floats(0, 1),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 0.5),
)
def test_warm_up_constant_and_decay_within_bounds(
    progress: float, later: float, warmup: float, decay: float
) -> None:
    shape = dict(peak=2.0, floor=0.5, warmup_fraction=warmup, decay_fraction=decay)
    progress, later = sorted((progress, later))
    a, b = learning_rate(progress, **shape), learning_rate(later, **shape)
    assert 0 <= a <= 2.0
    assert 0 <= b <= 2.0
    if later < warmup:
        assert a <= b
    if progress >= warmup:
        assert a >= b >= 0.5 - 1e-12


def test_edges_without_warm_up_or_decay() -> None:
    shape = dict(peak=1.0, floor=0.0)
    assert learning_rate(0.0, warmup_fraction=0.0, decay_fraction=0.0, **shape) == 1.0
    assert learning_rate(1.0, warmup_fraction=0.0, decay_fraction=0.0, **shape) == 1.0
    assert learning_rate(0.5, warmup_fraction=1.0, decay_fraction=0.0, **shape) == 0.5
    assert learning_rate(0.25, warmup_fraction=0.0, decay_fraction=1.0, **shape) == 0.5


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_progress_outside_the_run(progress: float) -> None:
    with pytest.raises(ValueError, match="expected a number from 0 to 1"):
        learning_rate(progress, **SUPER)
