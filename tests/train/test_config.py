"""Every number of a run: NumPy's and torch's are taken, what does not work is named."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_lite.train import TrainConfig

INTEGERS = (
    "steps", "batch_size", "seq_len", "gradient_accumulation_steps", "seed", "eval_every",
    "eval_batches", "save_every", "keep_checkpoints", "merge_every",
)  # fmt: skip
NUMBERS = (
    "max_seconds", "lr", "min_lr", "warmup_fraction", "decay_fraction", "eps", "weight_decay",
    "grad_clip", "mtp_weight", "balance_weight", "bias_rate", "save_every_seconds",
)  # fmt: skip
OTHERS = (
    "gradient_checkpointing", "betas", "mtp_target", "optimizer", "precision", "merge_windows",
)  # fmt: skip
OPTIONAL = (
    "steps", "max_seconds", "eval_every", "save_every", "save_every_seconds", "merge_every",
)  # fmt: skip

VALUES = [
    None, True, False, -1, 0, 1, 2, 10**5000, -(10**400), 2**64, 2**31, 0.0, -0.0, 0.5, 1.5, 1e308,
    5e-324, math.nan, math.inf, -math.inf, "3", "", b"3", [], [1], (0.5, 0.5), {}, {1}, 1j,
    object(), np.int8(3), np.uint64(3), np.float32(0.25), np.float64("nan"), np.bool_(True),
    np.array([3]),
    np.array([1, 2]), torch.tensor(3), torch.tensor(0.25), torch.tensor([1.0, 2.0]),
    torch.tensor(True), torch.tensor(1j), lambda: 3, type,
]  # fmt: skip


def test_these_are_all_fields() -> None:
    assert sorted((*INTEGERS, *NUMBERS, *OTHERS)) == sorted(f.name for f in fields(TrainConfig))


@pytest.mark.parametrize("name", [f.name for f in fields(TrainConfig)])
def test_any_value_works_or_is_named(name: str) -> None:
    for value in VALUES:
        base = {} if name in ("steps", "max_seconds") else {"steps": 3}
        other = {"max_seconds": 5.0} if name == "steps" and value is None else {}
        if name == "max_seconds" and value is None:
            other = {"steps": 3}
        try:
            config = TrainConfig(**{**base, **other, name: value})
        except (TypeError, ValueError) as error:
            assert name in str(error) or "expected" in str(error)  # noqa: PT017
            assert len(str(error)) < 400  # noqa: PT017
            continue
        found = getattr(config, name)
        if found is None:
            assert name in OPTIONAL
            continue
        if name in INTEGERS:
            assert type(found) is int
        elif name in NUMBERS:
            assert type(found) is float
            assert math.isfinite(found)
        json.dumps(config.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("make", [np.int64, np.uint8, torch.tensor])
def test_integers_of_other_libraries_are_taken(name: str, make: Any) -> None:
    config = TrainConfig(**{"steps": 7, name: make(3)})
    assert getattr(config, name) == 3
    assert type(getattr(config, name)) is int
    assert config == TrainConfig(**{"steps": 7, name: 3})


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_other_libraries_are_taken(name: str) -> None:
    for value in (np.float32(2.0**-10), torch.tensor(2.0**-10), np.float64(2.0**-10)):
        config = TrainConfig(**{"steps": 7, "min_lr": 0.0, name: value})
        assert getattr(config, name) == 2.0**-10
        assert type(getattr(config, name)) is float


@pytest.mark.parametrize("wrong", [0.5, "ab", (0.9,), (0.9, 1.0), (0.9, -0.1), (0.9, math.nan),
                                   (True, 0.9), ("a", "b"), {0.1, 0.2}, None])  # fmt: skip
def test_betas_are_two_numbers(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="betas"):
        TrainConfig(steps=1, betas=wrong)
    assert TrainConfig(steps=1, betas=[np.float32(0.5), 0]).betas == (0.5, 0.0)


def test_a_batch_that_no_machine_holds_is_refused_before_it_is_made() -> None:
    with pytest.raises(ValueError, match=r"batch_size=2147483647 .* seq_len=2147483647"):
        TrainConfig(steps=1, batch_size=2**31 - 1, seq_len=2**31 - 1)


def test_the_largest_seed_trains(model: Any, text: Any) -> None:
    from nemotron_lite.train import train

    for seed in (0, 2**63, 2**64 - 1):
        config = TrainConfig(steps=1, batch_size=1, seq_len=16, seed=seed, precision="nvfp4")
        assert train(model, text, config, progress=False).step == 1
    with pytest.raises(ValueError, match="seed="):
        TrainConfig(steps=1, seed=2**64)


def test_options_of_merging_are_recorded_where_weights_are_merged() -> None:
    """The records of runs that older versions made have no such entries."""
    assert not {"merge_every", "merge_windows"} & set(TrainConfig(steps=3).to_dict())
    config = TrainConfig(steps=3, eval_every=2, merge_every=2, merge_windows=[4])
    assert config.to_dict()["merge_windows"] == [4]
    for each in (config, TrainConfig(steps=3)):
        assert TrainConfig(**each.to_dict()) == each
