"""`snapshot` and `rollback` of tests/cache_oracles.py, with which other tests compare `accept`."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite.model import Nemotron
from tests.cache_oracles import rollback, snapshot
from tests.test_model import TINY, _tokens


@pytest.fixture(scope="module")
def model() -> Nemotron:
    return Nemotron(TINY, dtype=torch.float64, seed=1)


def test_a_cache_that_was_rolled_back_continues_the_same(model: Nemotron) -> None:
    tokens = _tokens(2, 20)
    cache = model.empty_cache(2, capacity=4)
    model(tokens[:, :8], cache)
    taken = snapshot(cache)
    for _ in range(2):
        model(_tokens(2, 5), cache)  # a draft that is thrown away
        model(_tokens(2, 1), cache)
        rollback(cache, taken)
        assert cache.lengths.tolist() == [8, 8]
    out = model(tokens[:, 8:], cache).logits
    torch.testing.assert_close(out, model(tokens).logits[:, 8:], rtol=1e-9, atol=1e-9)


def test_a_snapshot_does_not_grow_with_the_context(model: Nemotron) -> None:
    cache = model.empty_cache(1)
    model(_tokens(1, 3), cache)
    short = snapshot(cache).nbytes
    model(_tokens(1, 300), cache)
    assert snapshot(cache).nbytes == short > 0
