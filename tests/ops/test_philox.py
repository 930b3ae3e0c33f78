"""Random bits in PyTorch against published values and a reference in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from nemotron_lite.ops import philox
from tests.kernels import philox as reference


def test_the_published_answer_of_counter_and_key_zero() -> None:
    """Random123's kat_vectors: philox4x32, 10 rounds, all zero."""
    found = philox.words(0, torch.zeros(1, dtype=torch.int64), rounds=10)
    assert [int(w) for w in found] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("rounds", [1, 2, 5, 10])
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 7, 2**63 - 1])
def test_words_equal_the_numpy_reference(seed: int, rounds: int) -> None:
    for start in (0, 2**32 - 3, 2**40):  # counters of 64 bits as well
        counter = np.arange(start, start + 7, dtype=np.uint64)
        zero = 0 * counter
        words = [counter & reference.WORD, counter >> np.uint64(32), zero, zero]
        exact = reference.philox(words, (seed % 2**32, seed >> 32), rounds)
        found = philox.words(seed, torch.from_numpy(counter.astype(np.int64)), rounds)
        for one, other in zip(found, exact, strict=True):
            assert (np.broadcast_to(np.asarray(one), 7) == other).all()


def test_halves_are_laid_out_by_eights() -> None:
    found = philox.random_halves(11, 5, 20)
    assert np.array_equal(found.numpy(), reference.random_halves(11, 5, 20, philox.ROUNDS))
    assert found.min() >= 0 and found.max() < 65536


def test_halves_are_uniform() -> None:
    halves = philox.random_halves(3, 64, 4096)
    counts = torch.bincount(halves.flatten() >> 8, minlength=256)
    chi_square = stats.chisquare(counts).statistic
    assert 255 - 5 * 510**0.5 < chi_square < 255 + 5 * 510**0.5


@pytest.mark.parametrize(("seed", "rounds"), [(-1, 5), (2**63, 5), (0, 0), (0, 11)])
def test_seeds_and_rounds_out_of_range_are_refused(seed: int, rounds: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        philox.words(seed, torch.zeros(1, dtype=torch.int64), rounds)
