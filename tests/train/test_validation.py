"""The validation loss is what its name says, and the training does not notice it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_lite.data import ConcatenatedDocuments
from nemotron_lite.model import Nemotron
from nemotron_lite.train import TrainConfig, train

RECIPE: dict[str, Any] = dict(steps=4, batch_size=2, seq_len=24, lr=1e-2)
EVALUATED = ("validation_loss", "best_validation_loss")


@pytest.mark.parametrize("precision", ["fp32", "nvfp4"])
def test_training_is_the_same_with_validation(
    model: Nemotron, text: ConcatenatedDocuments, precision: str
) -> None:
    plain = Nemotron(model.config, seed=0)
    a = train(plain, text, TrainConfig(precision=precision, **RECIPE), progress=False)
    config = TrainConfig(precision=precision, eval_every=1, eval_batches=2, **RECIPE)
    torch.manual_seed(3)
    b = train(model, text, config, validation=text, progress=False)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(state, torch.get_rng_state())
    assert [r["loss"] for r in a.history] == [r["loss"] for r in b.history]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_loss_is_the_mean_over_targets(model: Nemotron, text: ConcatenatedDocuments) -> None:
    class Check:
        """The training text, with the validation computed by hand before each update."""

        def batch(self, index: int, **arguments: Any) -> Any:
            nats, targets = 0.0, 0
            for number in range(3):
                batch = text.batch(number, batch_size=2, seq_len=24, seed=0)
                with torch.no_grad():
                    logits = model(batch.tokens, seq_idx=batch.seq_idx).logits
                loss = logits.log_softmax(-1).gather(2, batch.tokens[:, 1:, None])[:, :, 0]
                same = batch.seq_idx[:, 1:] == batch.seq_idx[:, :-1]
                nats -= float((loss * same).sum())
                targets += int(same.sum())
            expected.append(nats / targets)
            return text.batch(index, **arguments)

    expected: list[float] = []
    config = TrainConfig(eval_every=1, eval_batches=3, **RECIPE)
    history = train(model, Check(), config, validation=text, progress=False).history
    found = [r["validation_loss"] for r in history[:-1]]
    assert found == pytest.approx(expected[1:], rel=1e-5)
    assert [r["best_validation_loss"] for r in history[:-1]] == [
        min(found[: i + 1]) for i in range(len(found))
    ]


def test_it_comes_every_so_often_and_the_best_survives_a_resume(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    whole = train(
        Nemotron(model.config, seed=0), text, TrainConfig(eval_every=2, **RECIPE),
        validation=text, progress=False,
    )  # fmt: skip
    options = dict(out_dir=tmp_path, validation=text, progress=False)
    config = TrainConfig(eval_every=2, **RECIPE)
    train(model, text, config, on_step=lambda r: r["step"] < 3, **options)
    rest = train(model, text, config, resume=True, **options)
    assert rest.best == whole.best
    assert rest.best["step"] in (2, 4)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert ["validation_loss" in r for r in records] == [False, True] * 2
    assert [[r.get(name) for name in EVALUATED] for r in records] == [
        [r.get(name) for name in EVALUATED] for r in whole.history
    ]


def test_batches_and_how_often_belong_together(
    model: Nemotron, text: ConcatenatedDocuments
) -> None:
    for config, validation in (
        (TrainConfig(**RECIPE), text),
        (TrainConfig(eval_every=2, **RECIPE), None),
    ):
        with pytest.raises(ValueError, match="needs both"):
            train(model, text, config, validation=validation, progress=False)
    short = ConcatenatedDocuments(text.tokens[:20], text.starts[:1])
    calls: list[Any] = []
    with pytest.raises(ValueError, match=r"seq_len=24 .* 20 tokens"):
        train(model, text, TrainConfig(eval_every=3, **RECIPE), validation=short, progress=False,
              on_step=calls.append)  # fmt: skip
    assert calls == []  # found before the first update
