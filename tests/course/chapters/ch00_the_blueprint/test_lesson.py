"""The small model of chapter 00: it has one layer of each kind, and it learns."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nemotron_lite import Nemotron
from nemotron_lite.course import factsheet
from nemotron_lite.course.chapters.ch00_the_blueprint import checks, lesson
from nemotron_lite.course.exercises import exercise
from nemotron_lite.data.batches import Batch
from nemotron_lite.ledger import cache
from tests.course.conftest import Shown

CONFIG = checks.tiny("ME*")


class Repeated:
    """Rows that repeat three tokens: a text that a model learns in a few steps."""

    def batch(self, index: int, *, batch_size: int, seq_len: int, seed: int) -> Batch:
        start = torch.arange(batch_size)[:, None] + index + seed
        return Batch((start + torch.arange(seq_len)) % 3)


def token_loss_of(logits: Tensor, tokens: Tensor) -> float:
    """The mean of -log p(token | the tokens before it)."""
    log_p = logits.log_softmax(-1)[:, :-1]
    return float(-log_p.gather(-1, tokens[:, 1:, None]).mean().detach())


def test_the_toy_has_one_layer_of_each_kind_and_a_state_larger_than_a_few_tokens() -> None:
    assert sorted(lesson.TOY.pattern) == sorted("ME*")
    assert lesson.TOY.mtp_pattern == ""
    kept = cache(lesson.TOY, 6, kv_dtype="float32", conv_dtype="float32")
    assert 0 < kept.kv < kept.conv + kept.ssm


def test_the_reference_and_the_package_learn_alike() -> None:
    package = Nemotron(CONFIG, seed=0)
    toy = exercise("00.toy_model").build()(CONFIG)
    toy.load_state_dict(package.state_dict())
    options = dict(steps=20, batch_size=4, seq_len=12, lr=0.02)
    mine = lesson.train_toy(toy, Repeated(), "mine", **options)
    theirs = lesson.train_toy(package, Repeated(), "theirs", **options)
    assert mine == pytest.approx(theirs, rel=1e-2)
    tokens = Repeated().batch(0, batch_size=4, seq_len=12, seed=0).tokens
    loss = token_loss_of(Nemotron(CONFIG, seed=0)(tokens).logits, tokens)
    assert mine[0] == pytest.approx(loss, rel=1e-4)
    assert mine[-1] < 0.5 * mine[0]
    assert not toy.training


def test_the_seed_of_the_data_changes_the_losses() -> None:
    package = Nemotron(CONFIG, seed=0)
    options = dict(steps=3, batch_size=2, seq_len=8)
    first, again, other = (
        lesson.train_toy(copy.deepcopy(package), Repeated(), "x", seed=seed, **options)
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_the_text_of_the_map_names_facts_that_exist_and_not_the_share_that_is_predicted() -> None:
    keys = re.findall(r"{([\w.]+)}", lesson.LETTERS_AND_CLAIMS)
    assert set(keys) <= set(factsheet.all_facts())
    assert not any("parameters" in key for key in keys)


def test_what_a_model_wrote_is_shown_as_html_only(shown: Callable[..., Shown]) -> None:
    found = shown(lesson.show_text, "A title", "x < 1")
    assert found.plain == "A title"
    assert "x &lt; 1" in found.html
