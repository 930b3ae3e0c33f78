"""The recall task: rows are what the docstring says, and the score counts what it should."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite.data.batches import Batch, BatchSource
from nemotron_lite.data.tasks.recall import Recall, recall_score

TASK = Recall((3, 5), keys=11, values=7)


def lookup(batch: Batch, pairs: int) -> list[list[bool]]:
    """Whether each answer is the value that the row's own book gives to the question."""
    found = []
    for row in batch.tokens.tolist():
        both = list(zip(row[::2], row[1::2], strict=True))
        book = dict(both[:pairs])
        found.append([book[question] == answer for question, answer in both[pairs:]])
    return found


def test_a_row_is_a_book_and_questions_about_it() -> None:
    batch = Recall((5,), keys=11, values=7).batch(0, batch_size=40, seq_len=26, seed=0)
    assert batch.tokens.shape == (40, 26)
    assert batch.tokens.dtype == torch.int64
    assert batch.seq_idx is None
    keys, values = batch.tokens[:, ::2], batch.tokens[:, 1::2]
    assert int(keys.max()) < 11 <= int(values.min())
    assert int(values.max()) < 18
    assert all(len(set(row)) == 5 for row in keys[:, :5].tolist())
    assert all(all(row) for row in lookup(batch, 5))


def test_the_mask_marks_the_answers_and_nothing_else() -> None:
    batch = Recall((4,)).batch(0, batch_size=2, seq_len=14, seed=0)
    assert batch.mask is not None
    assert batch.mask.tolist() == [[i in (9, 11, 13) for i in range(14)]] * 2


def test_every_key_is_asked_once_before_any_is_asked_again() -> None:
    batch = Recall((4,)).batch(0, batch_size=30, seq_len=2 * (4 + 4 + 4), seed=0)
    asked = batch.tokens[:, 8::2]
    for row in asked.tolist():
        assert len(set(row[:4])) == len(set(row[4:])) == 4
    assert (asked[:, :4] != asked[:, 4:]).any()


def test_batches_are_a_function_of_seed_and_index() -> None:
    first, again = (TASK.batch(3, batch_size=2, seq_len=20, seed=1) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    others = [TASK.batch(i, batch_size=2, seq_len=20, seed=s) for i, s in ((4, 1), (3, 2))]
    assert all(not torch.equal(first.tokens, other.tokens) for other in others)
    assert isinstance(TASK, BatchSource)


def test_every_number_of_pairs_is_drawn() -> None:
    asked = {int(TASK.batch(i, batch_size=1, seq_len=20, seed=0).mask.sum()) for i in range(20)}
    assert asked == {10 - 3, 10 - 5}


def test_the_test_asks_no_key_twice_and_is_not_the_training_stream() -> None:
    test = TASK.test_set(5, rows=8, questions=4)
    assert test.tokens.shape == (8, 2 * (5 + 4))
    assert all(len(set(row)) == 4 for row in test.tokens[:, 10::2].tolist())
    assert TASK.test_set(3, rows=1, questions=4).tokens.shape == (1, 12)
    train = Recall((5,), 11, 7).batch(0, batch_size=8, seq_len=18, seed=0)
    assert not torch.equal(test.tokens, train.tokens)
    assert not torch.equal(test.tokens, TASK.test_set(5, rows=8, questions=4, seed=1).tokens)


def test_the_score_is_the_share_of_right_answers() -> None:
    batch = TASK.test_set(4, rows=3)
    right = torch.nn.functional.one_hot(batch.tokens, TASK.vocab_size).float().roll(-1, dims=1)
    assert recall_score(right, batch) == 1.0
    assert recall_score(-right, batch) == 0.0
    half = right.clone()
    half[:, 8] = half[:, 10] = 0  # two of the four questions: token 0, a key, is never an answer
    assert recall_score(half, batch) == 0.5


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pairs=\(\)"):
        Recall(())
    with pytest.raises(ValueError, match="at most 4 pairs"):
        Recall((2, 5), keys=4)
    with pytest.raises(ValueError, match="values=1"):
        Recall((2,), values=1)
    with pytest.raises(ValueError, match="seq_len=11"):
        TASK.batch(0, batch_size=1, seq_len=11, seed=0)
    with pytest.raises(ValueError, match="at least 12"):
        TASK.batch(0, batch_size=1, seq_len=10, seed=0)
    with pytest.raises(ValueError, match="no questions"):
        recall_score(torch.zeros(1, 4, 8), Batch(torch.zeros(1, 4, dtype=torch.int64)))
