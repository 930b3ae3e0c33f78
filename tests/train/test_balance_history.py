"""The balance of a run is read back from its log as it was, and thinned without losing a token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_lite.data import ConcatenatedDocuments
from nemotron_lite.model import Nemotron
from nemotron_lite.train import TrainConfig, train
from nemotron_lite.train.balance import router_balance
from nemotron_lite.train.balance_history import BalanceHistory


def record(step: int, **loads: list[int]) -> dict[str, Any]:
    balance = router_balance({name: torch.tensor(load) for name, load in loads.items()})
    return {"step": step, "routers": {name: b._asdict() for name, b in balance.items()}}


RECORDS = [
    record(1, a=[4, 0, 0, 0], b=[1, 1]),
    record(2, a=[2, 2, 0, 0], b=[2, 0]),
    record(3, a=[1, 1, 1, 1], b=[0, 2]),
]


def test_every_number_of_the_log() -> None:
    history = BalanceHistory.from_records(RECORDS)
    assert history.routers == ["a", "b"]
    assert history.steps.tolist() == [1, 2, 3]
    assert history.load["b"].tolist() == [[1, 1], [2, 0], [0, 2]]
    assert history.max_vio["a"].tolist() == [3.0, 1.0, 0.0]
    assert history.entropy["a"].tolist() == [0.0, 0.5, 1.0]
    assert history.unused["a"].tolist() == [3, 2, 0]
    assert history.relative_load("a")[0].tolist() == [4.0, 0.0, 0.0, 0.0]
    assert history.relative_load("b")[1].tolist() == [2.0, 0.0]
    with pytest.raises(ValueError, match="router='c': expected one of a, b"):
        history.relative_load("c")


def test_an_update_without_tokens_has_no_load() -> None:
    history = BalanceHistory.from_records([record(1, a=[0, 0])])
    assert history.relative_load("a").tolist() == [[0.0, 0.0]]


def test_thinning_keeps_every_token() -> None:
    history = BalanceHistory.from_records(RECORDS)
    thin = history.thinned(2)
    assert thin.steps.tolist() == [2, 3]
    assert thin.load["a"].tolist() == [[6, 2, 0, 0], [1, 1, 1, 1]]
    assert thin.max_vio["a"].tolist() == [2.0, 0.0]
    assert thin.unused["a"].tolist() == [2, 0]
    np.testing.assert_array_equal(history.thinned(10).load["b"], history.load["b"])
    long = BalanceHistory.from_records([record(s, a=[s, 1]) for s in range(1, 108)])
    assert long.thinned(10).load["a"].sum(0).tolist() == long.load["a"].sum(0).tolist()
    assert len(long.thinned(10).steps) == 10


def test_records_of_older_logs_are_left_out() -> None:
    old = [{"step": 1, "max_vio": 1.0}, {"step": 2, "routers": {}}]
    history = BalanceHistory.from_records([*old, *RECORDS[2:]])
    assert history.steps.tolist() == [3]
    with pytest.raises(ValueError, match="no router statistics"):
        BalanceHistory.from_records(old)


def test_it_is_read_from_the_folder_of_a_run(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    recipe = TrainConfig(steps=3, batch_size=2, seq_len=32, save_every=2)
    result = train(model, text, recipe, out_dir=tmp_path, progress=False)
    history = BalanceHistory.from_folder(tmp_path)
    expected = BalanceHistory.from_records(result.history)
    assert history.routers == expected.routers
    assert history.routers[-1].startswith("mtp.")
    for name in history.routers:
        np.testing.assert_array_equal(history.load[name], expected.load[name])
        np.testing.assert_array_equal(history.entropy[name], expected.entropy[name])
    # A run that was killed and resumed makes update 3 again; the history has it once.
    (tmp_path / "checkpoints" / "step-00000003.pt").unlink()
    train(model, text, recipe, out_dir=tmp_path, resume=True, progress=False)
    again = BalanceHistory.from_folder(tmp_path)
    assert again.steps.tolist() == [1, 2, 3]
    assert len(json.dumps(result.history[0])) < 2000
