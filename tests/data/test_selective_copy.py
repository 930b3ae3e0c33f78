"""Selective copy: rows that can be answered, places that vary or do not, a stream without state."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite.data import BatchSource
from nemotron_lite.data.tasks.selective_copy import SelectiveCopy


@pytest.mark.parametrize("places", ["random", "fixed"])
def test_the_answers_are_the_letters_of_the_prompt_in_order(places: str) -> None:
    task = SelectiveCopy(items=3, letters=5, places=places)
    batch = task.batch(0, batch_size=200, seq_len=16, seed=0)
    assert batch.tokens.shape == (200, 16)
    assert batch.tokens.dtype == torch.int64
    assert batch.mask is not None
    for row, mask in zip(batch.tokens, batch.mask, strict=True):
        prompt, answers = row[:12], row[13:]
        assert row[12] == task.ASK
        assert torch.equal(prompt[prompt != task.SILENCE], answers)
        assert mask.tolist() == [False] * 13 + [True] * 3
    letters = batch.tokens[batch.mask]
    assert letters.unique().tolist() == [2, 3, 4, 5, 6]
    assert int(letters.max()) == task.vocab_size - 1


def _places(task: SelectiveCopy, batch_size: int = 300) -> torch.Tensor:
    prompt = task.batch(0, batch_size=batch_size, seq_len=25, seed=0).tokens[:, :20]
    return (prompt != task.SILENCE).float().mean(0)


def test_random_places_are_even_and_fixed_places_never_move() -> None:
    # 4 letters in 20 places: a share of 0.2 each, give or take 4.3 standard errors
    assert (_places(SelectiveCopy(4, 8)) - 0.2).abs().max() < 0.1
    fixed = _places(SelectiveCopy(4, 8, places="fixed"))
    assert fixed.nonzero().flatten().tolist() == [0, 5, 10, 15]
    assert fixed.sum() == 4


def test_a_batch_is_a_function_of_seed_and_index() -> None:
    task = SelectiveCopy()
    assert isinstance(task, BatchSource)
    size = dict(batch_size=8, seq_len=24)
    first = task.batch(3, seed=1, **size).tokens
    assert torch.equal(first, task.batch(3, seed=1, **size).tokens)
    assert not torch.equal(first, task.batch(4, seed=1, **size).tokens)
    assert not torch.equal(first, task.batch(3, seed=2, **size).tokens)


def test_the_exam_is_fresh_and_both_variants_ask_for_the_same_letters() -> None:
    task, control = SelectiveCopy(), SelectiveCopy(places="fixed")
    test, other = task.test_set(rows=64, seq_len=24), control.test_set(rows=64, seq_len=24)
    assert torch.equal(test.tokens[test.mask], other.tokens[other.mask])
    trained = task.batch(0, batch_size=64, seq_len=24, seed=0)
    assert not torch.equal(test.tokens, trained.tokens)
    assert not torch.equal(test.tokens, task.test_set(rows=64, seq_len=24, seed=1).tokens)


def test_a_row_as_text() -> None:
    task = SelectiveCopy(items=2, letters=3)
    assert task.text(torch.tensor([0, 4, 0, 2, 1, 4, 2])) == ". C . A ? C A"
    assert task.chance == 1 / 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(items=0), "items=0"),
        (dict(letters=1), "letters=1"),
        (dict(places="even"), "places='even' does not work: expected one of random, fixed"),
    ],
)
def test_impossible_tasks_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectiveCopy(**arguments)


def test_a_length_without_room_names_the_least_that_has() -> None:
    task = SelectiveCopy(items=4)
    with pytest.raises(ValueError, match="seq_len=8 does not work: expected at least 9"):
        task.batch(0, batch_size=1, seq_len=8, seed=0)
    assert task.batch(0, batch_size=1, seq_len=9, seed=0).tokens.shape == (1, 9)
