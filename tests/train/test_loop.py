"""The training loop: loss falls, the log is complete, and updates equal the formulas."""

from __future__ import annotations

import copy
import json
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemotron_lite.data import ConcatenatedDocuments
from nemotron_lite.model import Nemotron
from nemotron_lite.train import TrainConfig, learning_rate, loop, train
from nemotron_lite.train.balance import expert_loads, sequence_balance_loss, update_biases
from nemotron_lite.train.loss import token_loss
from nemotron_lite.train.optimizer import make_optimizer

SMALL = dict(batch_size=4, seq_len=32, lr=1e-2, min_lr=1e-4)


def run(model: Nemotron, text: ConcatenatedDocuments, **changes: Any) -> list[dict[str, Any]]:
    return train(model, text, TrainConfig(**{**SMALL, **changes}), progress=False).history


def test_learns_to_count_at_every_depth(model: Nemotron, text: ConcatenatedDocuments) -> None:
    history = run(model, text, steps=60)
    assert history[0]["ce"] == pytest.approx(4.56, abs=0.15)  # log 96: all tokens equally likely
    assert history[-1]["ce"] < 2.0
    assert all(ce < 3.0 for ce in history[-1]["mtp"])
    assert [r["step"] for r in history] == list(range(1, 61))
    assert history[-1]["tokens"] == 60 * 4 * 32


def test_two_updates_by_hand(model: Nemotron, text: ConcatenatedDocuments) -> None:
    """Weights and biases equal those of a loop without slices of logits and micro-batches."""
    other = copy.deepcopy(model)
    config = TrainConfig(
        steps=2, gradient_accumulation_steps=1, warmup_fraction=0.5, decay_fraction=0.5, **SMALL
    )
    history = train(model, text, config, progress=False).history

    optimizer = make_optimizer(
        other, lr=1e-2, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    for step in (1, 2):
        batch = text.batch(step - 1, batch_size=4, seq_len=32, seed=0)
        out = other.forward_hidden(
            batch.tokens, seq_idx=batch.seq_idx, mtp_depths=2, router_stats=True
        )
        tokens = token_loss(out.hidden, out.mtp_hidden, other.lm_head, batch, mtp_weight=0.3)
        balance = sum(sequence_balance_loss(s.scores, 2) for s in out.router)
        loss = tokens.total + 1e-4 * balance
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step / 2, peak=1e-2, floor=1e-4, warmup_fraction=0.5, decay_fraction=0.5
            )
        optimizer.step()
        optimizer.zero_grad()
        update_biases(other, expert_loads(out.router), 1e-3)
        record = history[step - 1]
        assert record["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
        assert record["grad_norm"] == pytest.approx(float(norm), rel=1e-6)
        assert record["balance"] == pytest.approx(float(balance.detach()), rel=1e-6)
    assert [r["lr"] for r in history] == [1e-2, 1e-4]
    assert len(out.router) == 2 + 2  # two layers, and those of MTP at two depths
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)


def test_biases_change_once_per_update_with_gradient_accumulation(
    model: Nemotron, text: ConcatenatedDocuments
) -> None:
    run(model, text, steps=3, gradient_accumulation_steps=3, batch_size=2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            moves = buffer / 1e-3
            torch.testing.assert_close(moves, moves.round(), rtol=0, atol=1e-3)
            assert moves.any()
            assert moves.abs().max() <= 3.001


def test_accumulation_equals_a_larger_batch(model: Nemotron, text: ConcatenatedDocuments) -> None:
    """Three micro-batches of two rows, or one batch of the same six rows."""
    joined = copy.deepcopy(model)

    class Joined:
        def batch(self, index: int, *, batch_size: int, seq_len: int, seed: int) -> Any:
            parts = [
                text.batch(3 * index + i, batch_size=batch_size // 3, seq_len=seq_len, seed=seed)
                for i in range(3)
            ]
            return parts[0]._replace(
                tokens=torch.cat([p.tokens for p in parts]),
                seq_idx=torch.cat([p.seq_idx for p in parts]),
            )

    a = run(model, text, steps=4, batch_size=2, gradient_accumulation_steps=3)
    b = train(joined, Joined(), TrainConfig(steps=4, **{**SMALL, "batch_size": 6}), progress=False)
    for x, y in zip(a, b.history, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
        assert x["mtp"] == pytest.approx(y["mtp"], rel=1e-4)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3)
        assert x["max_vio"] == pytest.approx(y["max_vio"])


def test_log_file_is_the_history(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    seen: list[dict[str, Any]] = []
    result = train(
        model,
        text,
        TrainConfig(steps=3, **SMALL),
        out_dir=tmp_path,
        progress=False,
        on_step=seen.append,
    )
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records == result.history == seen
    assert set(records[0]) == {
        "step",
        "loss",
        "ce",
        "mtp",
        "balance",
        "lr",
        "grad_norm",
        "max_vio",
        "tokens",
        "seconds",
        "tokens_per_second",
        "routers",
    }
    assert result.checkpoint == tmp_path / "checkpoints" / "step-00000003.pt"
    assert result.checkpoint.exists()
    for r in records:
        parts = r["ce"] + 0.15 * sum(r["mtp"]) + 1e-4 * r["balance"]
        assert r["loss"] == pytest.approx(parts, rel=1e-6)
        # 4 rows of 32 tokens, 2 experts each; the MTP router has positions 1 to 31 and 2 to 31.
        sums = {name: sum(router["load"]) for name, router in r["routers"].items()}
        layers = {f"backbone.layers.{i}.mixer": 4 * 32 * 2 for i in (1, 3)}
        assert sums == layers | {"mtp.layers.1.mixer": 4 * (31 + 30) * 2}
        assert r["max_vio"] == max(router["max_vio"] for router in r["routers"].values())


def test_a_time_limit_ends_the_run_after_the_whole_decay(
    model: Nemotron, text: ConcatenatedDocuments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a fake clock: computing gradients takes one second, and so does the update."""
    ticks = count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    shape = dict(warmup_fraction=0.1, decay_fraction=0.5)
    config = TrainConfig(max_seconds=41.0, **shape, **SMALL)
    result = train(model, text, config, progress=False)
    # Each update reads the clock at 0, 1 and 2 seconds, and the rate is set at second 1. The clock
    # is not read between updates, so the training time is 2 seconds per update.
    assert [r["seconds"] for r in result.history] == [2.0 * s for s in range(1, 22)]
    for s, record in enumerate(result.history):
        share = (2 * s + 1) / 41
        assert record["lr"] == learning_rate(share, peak=1e-2, floor=1e-4, **shape)
        assert record["tokens_per_second"] == 4 * 32 / 2
    assert result.history[-1]["lr"] == pytest.approx(1e-4)
    assert not result.interrupted


def test_steps_can_end_a_run_before_its_time_limit(
    model: Nemotron, text: ConcatenatedDocuments
) -> None:
    result = train(model, text, TrainConfig(steps=2, max_seconds=600.0, **SMALL), progress=False)
    assert result.step == 2
    assert result.history[-1]["lr"] == 1e-4


def test_bf16_trains_float32_weights(model: Nemotron, text: ConcatenatedDocuments) -> None:
    exact = copy.deepcopy(model)
    a = run(model, text, steps=8, precision="bf16")
    b = run(exact, text, steps=8)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert a[-1]["ce"] == pytest.approx(b[-1]["ce"], rel=0.03)
    assert a[-1]["ce"] != b[-1]["ce"]


def test_without_mtp_weight_the_module_does_not_change(
    model: Nemotron, text: ConcatenatedDocuments
) -> None:
    before = copy.deepcopy(model.mtp.state_dict())
    history = run(model, text, steps=2, mtp_weight=0.0)
    assert history[0]["mtp"] == []
    for name, tensor in model.mtp.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_half_precision_weights_are_refused(model: Nemotron, text: ConcatenatedDocuments) -> None:
    with pytest.raises(ValueError, match=r"torch.bfloat16: expected float32"):
        run(model.bfloat16(), text, steps=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(), "steps and max_seconds are both None"),
        (dict(steps=0), r"steps=0 \(int\): expected an integer from 1"),
        (dict(max_seconds=-1.0), "max_seconds=-1.0"),
        (dict(steps=1, batch_size=0), "batch_size=0"),
        (dict(steps=1, keep_checkpoints=0), "keep_checkpoints=0"),
        (dict(steps=1, lr=0.0), "lr=0.0"),
        (dict(steps=1, lr=float("nan")), "lr=nan"),
        (dict(steps=1, min_lr=1.0), "min_lr=1.0"),
        (
            dict(steps=1, warmup_fraction=0.7, decay_fraction=0.5),
            r"warmup_fraction=0.7 .* decay_fraction=0.5",
        ),
        (dict(steps=1, betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\)"),
        (dict(steps=1, precision="fp8"), "precision='fp8'"),
        (dict(steps=1, seed=-1), "seed=-1"),
        (dict(steps=1, weight_decay=-0.1), "weight_decay=-0.1"),
    ],
)
def test_invalid_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)
