"""The best choice within a budget, compared with trying every combination."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_lite.quantization import (
    QuantizableModule,
    Sensitivity,
    allocate_bits,
    bits_per_weight,
    minimize_cost,
)

option = st.tuples(st.integers(0, 60), st.floats(0, 100))
items = st.lists(st.lists(option, min_size=1, max_size=3), min_size=1, max_size=5)


def total(table: list[list[float]], picks: list[int]) -> float:
    return sum(row[pick] for row, pick in zip(table, picks, strict=True))


@settings(deadline=None, max_examples=200)
@given(items=items, slack=st.integers(0, 150))
def test_no_combination_is_cheaper(items: list[list[tuple[int, float]]], slack: int) -> None:
    sizes = [[size for size, _ in item] for item in items]
    costs = [[cost for _, cost in item] for item in items]
    budget = sum(min(size) for size in sizes) + slack
    picks = minimize_cost(sizes, costs, budget)
    assert total(sizes, picks) <= budget
    fitting = [
        total(costs, list(pick))
        for pick in itertools.product(*(range(len(item)) for item in items))
        if total(sizes, list(pick)) <= budget
    ]
    assert total(costs, picks) == pytest.approx(min(fitting), abs=1e-9)


def test_the_budget_holds_where_steps_are_coarse() -> None:
    sizes = [[1, 1_000_003 * (i + 1)] for i in range(9)]
    costs = [[float(i + 1), 0.0] for i in range(9)]
    for budget in (9, 10_000_000, 44_999_999):
        picks = minimize_cost(sizes, costs, budget)
        assert total(sizes, picks) <= budget
    assert total(costs, minimize_cost(sizes, costs, 46_000_000)) == 0


def test_a_greedy_choice_would_be_wrong() -> None:
    # The small one gains 3 a bit, but only without it do the other two fit.
    sizes, costs = [[0, 2], [0, 5], [0, 5]], [[6.0, 0.0], [10.0, 0.0], [10.0, 0.0]]
    assert minimize_cost(sizes, costs, 10) == [0, 1, 1]


def test_an_impossible_budget_and_costs_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="the smallest options take 3"):
        minimize_cost([[3, 4]], [[1.0, 0.0]], 2)
    with pytest.raises(ValueError, match="NaN or infinite"):
        minimize_cost([[3, 4]], [[float("nan"), 0.0]], 9)


def test_a_budget_of_bits_a_weight() -> None:
    formats = ("nvfp4", "fp8", "bf16")
    modules = [
        QuantizableModule(f"m{i}", "mlp", {f"m{i}.weight": (32, 32)}, formats) for i in range(4)
    ]
    nats = [{"nvfp4": 1.0 + i // 3, "fp8": 0.1, "bf16": 0.0} for i in range(4)]
    sensitivity = Sensitivity(modules, nats)
    for bits, expected in ((4.5, {"nvfp4"}), (16.0, {"bf16"})):
        assert set(allocate_bits(sensitivity, bits).values()) == expected
    chosen = allocate_bits(sensitivity, 6.0)
    assert bits_per_weight(modules, chosen) <= 6.0
    assert chosen["m3"] == "fp8", "costs twice as much as its equals"
    with pytest.raises(ValueError, match=r"bits=4\.4: the smallest formats .* take 4\.500"):
        allocate_bits(sensitivity, 4.4)
