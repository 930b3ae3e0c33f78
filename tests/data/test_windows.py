"""Sampled windows: each within one document, repeatable, and errors that say what to change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemotron_lite.data import sample_windows

DOCUMENTS = [np.arange(n) + 100 * i for i, n in enumerate((3, 12, 5, 30))]


def test_a_window_is_a_piece_of_one_document() -> None:
    rows = sample_windows(DOCUMENTS, 200, 6, seed=1)
    assert rows.shape == (200, 6) and rows.dtype == torch.int64
    assert torch.equal(rows - rows[:, :1], torch.arange(6).expand(200, 6))
    assert set((rows[:, 0] // 100).tolist()) == {1, 3}, "the others are too short"
    assert torch.equal(rows, sample_windows(DOCUMENTS, 200, 6, seed=1))
    assert not torch.equal(rows, sample_windows(DOCUMENTS, 200, 6, seed=2))


def test_errors() -> None:
    with pytest.raises(ValueError, match="no document has 31 tokens; the longest has 30"):
        sample_windows(DOCUMENTS, 1, 31)
    with pytest.raises(ValueError, match="0 windows of 6 tokens do not work"):
        sample_windows(DOCUMENTS, 0, 6)
