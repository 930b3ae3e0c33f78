"""The model of chapter 01: what selective means, which rows count as right, and that it learns."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite.course.chapters.ch01_selective_scan.lesson import (
    ScanLayer,
    ScanModel,
    exact_rows,
    train_scan,
)
from nemotron_lite.data.batches import Batch
from nemotron_lite.data.tasks.selective_copy import SelectiveCopy

TASK = SelectiveCopy(items=2, letters=3)
TOKENS = TASK.test_set(rows=6, seq_len=12).tokens


def test_both_kinds_have_the_same_parameters() -> None:
    one, other = (ScanModel(5, selective=kind, seed=3) for kind in (True, False))
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_time_invariant_layer_is_linear_in_time_and_a_selective_one_is_not() -> None:
    torch.manual_seed(0)
    u = torch.randn(1, 10, 32)
    for selective in (True, False):
        layer = ScanLayer(32, selective=selective)
        layer.norm = torch.nn.Identity()  # the norm is not linear in either
        change = lambda u: layer(u) - u  # noqa: B023, E731
        assert torch.allclose(change(2 * u), 2 * change(u), atol=1e-5) is not selective


def test_a_time_invariant_layer_only_knows_distances() -> None:
    torch.manual_seed(0)
    layer, u = ScanLayer(32, selective=False), torch.randn(2, 9, 32)
    later = torch.cat([torch.zeros(2, 4, 32), u], 1)
    assert torch.allclose(layer(later)[:, 4:], layer(u), atol=1e-6)


def test_step_sizes_are_those_of_the_forward_pass() -> None:
    for selective in (True, False):
        model = ScanModel(TASK.vocab_size, selective=selective)
        sizes = model.step_sizes(TOKENS)
        assert [tuple(s.shape) for s in sizes] == [(6, 12, 2)] * 2
        assert all((s > 0).all() for s in sizes)
        varies = [float(s.detach().std(dim=(0, 1)).max()) > 1e-4 for s in sizes]
        assert varies == [selective, selective]


def test_causal() -> None:
    model = ScanModel(TASK.vocab_size, selective=True)
    changed = TOKENS.clone()
    changed[:, 7:] = 1
    assert torch.allclose(model(changed)[:, :7], model(TOKENS)[:, :7], atol=1e-6)


def test_a_row_with_one_wrong_answer_does_not_count() -> None:
    batch = TASK.test_set(rows=4, seq_len=12)
    logits = torch.zeros(4, 12, TASK.vocab_size)
    logits[:, :-1] = torch.nn.functional.one_hot(batch.tokens[:, 1:], TASK.vocab_size).float()
    assert exact_rows(logits, batch) == 100
    logits[0, -2] = -logits[0, -2]  # the last answer of a row
    logits[1, 0] = -logits[1, 0]  # silence: nobody asks for it
    logits[2, -1] = 1.0  # behind the row
    assert exact_rows(logits, batch) == 75
    with pytest.raises(ValueError, match="no mask"):
        exact_rows(logits, Batch(batch.tokens))


def test_the_same_seed_learns_the_same_and_the_curve_has_its_points() -> None:
    exam = TASK.test_set(rows=16, seq_len=12)
    curves, losses = [], []
    for _ in range(2):
        model = ScanModel(TASK.vocab_size, selective=True)
        curves.append(train_scan(model, TASK, exam, "", steps=20, batch_size=16, every=10))
        losses.append(model.head.weight.detach().clone())
    assert len(curves[0]) == 3
    assert curves[0] == curves[1]
    assert torch.equal(*losses)


def test_it_learns_to_copy_two_letters() -> None:
    exam = TASK.test_set(rows=64, seq_len=12)
    curve = train_scan(
        ScanModel(TASK.vocab_size, selective=True), TASK, exam, "", steps=100, every=100
    )
    assert curve[0] < 40
    assert curve[-1] > 80
