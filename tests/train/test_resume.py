"""Stopping and resuming: a run that was killed or interrupted has the same losses, bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron_lite.data import ConcatenatedDocuments
from nemotron_lite.model import Nemotron
from nemotron_lite.train import ResumeError, TrainConfig, loop, train

RECIPE = dict(
    steps=12,
    batch_size=2,
    seq_len=24,
    gradient_accumulation_steps=2,
    lr=1e-2,
    min_lr=1e-4,
    save_every=4,
)
TIMES = ("seconds", "tokens_per_second")  # the only fields of a record that may differ


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def whole(
    model: Nemotron, text: ConcatenatedDocuments
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Records and weights of an uninterrupted run."""
    fresh = Nemotron(model.config, seed=0)
    history = train(fresh, text, TrainConfig(**RECIPE), progress=False).history
    return without_times(history), fresh.state_dict()


class KilledError(BaseException):
    """Simulates a process that is killed between two updates: nothing is saved after it."""


@pytest.mark.parametrize("at", [2, 4, 6, 11])
def test_a_killed_run_resumes_bit_for_bit(
    model: Nemotron, text: ConcatenatedDocuments, whole: Any, tmp_path: Path, at: int
) -> None:
    def kill(record: dict[str, Any]) -> None:
        if record["step"] == at:
            raise KilledError

    config = TrainConfig(**RECIPE)
    with pytest.raises(KilledError):
        train(model, text, config, out_dir=tmp_path, progress=False, on_step=kill)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 99, "lo')  # the line that was being written
    # another process: other weights in memory, another random state
    other = Nemotron(model.config, seed=5)
    torch.manual_seed(99)
    saved = (at - 1) // 4 * 4  # the process is killed before the save of that update
    if not saved:
        with pytest.raises(ResumeError, match="no checkpoint"):
            train(other, text, config, out_dir=tmp_path, resume=True, progress=False)
        return
    result = train(other, text, config, out_dir=tmp_path, resume=True, progress=False)
    records, weights = whole
    assert without_times(result.history) == records[saved:]
    assert without_times(log_of(tmp_path)) == records
    assert result.tokens == records[-1]["tokens"]
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_a_run_with_muon_resumes_bit_for_bit(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    config = TrainConfig(**{**RECIPE, "optimizer": "muon"})
    whole = Nemotron(model.config, seed=0)
    history = train(whole, text, config, progress=False).history
    stopped = train(
        model, text, config, out_dir=tmp_path, progress=False, on_step=lambda r: r["step"] < 5
    )
    other = Nemotron(model.config, seed=5)
    rest = train(other, text, config, out_dir=tmp_path, resume=True, progress=False)
    assert without_times(stopped.history + rest.history) == without_times(history)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_resume_restores_the_random_state(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    """Code that uses random numbers in training (such as dropout) gets the same ones."""
    config = TrainConfig(**{**RECIPE, "steps": 4})
    torch.manual_seed(7)
    train(model, text, config, out_dir=tmp_path, progress=False)
    expected = torch.rand(3)
    torch.manual_seed(8)
    train(model, text, config, out_dir=tmp_path, resume=True, progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_resuming_a_finished_run_does_nothing(
    model: Nemotron, text: ConcatenatedDocuments, whole: Any, tmp_path: Path
) -> None:
    train(model, text, TrainConfig(**RECIPE), out_dir=tmp_path, progress=False)
    result = train(
        model, text, TrainConfig(**RECIPE), out_dir=tmp_path, resume=True, progress=False
    )
    assert result.history == []
    assert result.step == 12
    assert without_times(log_of(tmp_path)) == whole[0]


def test_runs_are_not_overwritten_or_mixed(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    config = TrainConfig(**RECIPE)
    train(model, text, config, out_dir=tmp_path, progress=False)
    with pytest.raises(ResumeError, match="already holds a run: give resume=True"):
        train(model, text, config, out_dir=tmp_path, progress=False)
    changed = TrainConfig(**{**RECIPE, "lr": 0.02})
    with pytest.raises(ResumeError, match=r"(?s)1 thing differs.*lr  0.01 +0.02\n"):
        train(model, text, changed, out_dir=tmp_path, resume=True, progress=False)
    wider = Nemotron(model.config.replace(moe_intermediate_size=16))
    with pytest.raises(ResumeError, match=r"model.moe_intermediate_size  24 +16"):
        train(wider, text, config, out_dir=tmp_path, resume=True, progress=False)
    with pytest.raises(ResumeError, match="needs out_dir"):
        train(model, text, config, resume=True, progress=False)


def test_a_stop_request_ends_after_the_update_and_saves(
    model: Nemotron, text: ConcatenatedDocuments, whole: Any, tmp_path: Path
) -> None:
    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 5:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    config = TrainConfig(**RECIPE)
    result = train(model, text, config, out_dir=tmp_path, progress=False, on_step=stop)
    assert result.interrupted
    assert result.step == 5
    assert signal.getsignal(signal.SIGINT) is before
    rest = train(model, text, config, out_dir=tmp_path, resume=True, progress=False)
    assert not rest.interrupted
    assert without_times([*result.history, *rest.history]) == whole[0]


def test_a_second_request_stops_at_once(model: Nemotron, text: ConcatenatedDocuments) -> None:
    def stop_twice(record: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(model, text, TrainConfig(**RECIPE), progress=False, on_step=stop_twice)


def test_a_diverged_run_keeps_its_last_checkpoint(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loop.clip_gradients, []

    def diverge(parameters: Any, max_norm: float) -> float:
        calls.append(1)
        if len(calls) == 6:
            raise FloatingPointError("the gradient norm is nan")
        return real(parameters, max_norm)

    monkeypatch.setattr(loop, "clip_gradients", diverge)
    with pytest.raises(FloatingPointError):
        train(model, text, TrainConfig(**RECIPE), out_dir=tmp_path, progress=False)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000004.pt"]


SCRIPT = """
import sys
import numpy as np
from nemotron_lite.config import NemotronConfig
from nemotron_lite.data import ConcatenatedDocuments
from nemotron_lite.model import Nemotron
from nemotron_lite.train import TrainConfig, train

config = NemotronConfig(
    pattern="ME", vocab_size=64, hidden_size=16, mamba_num_heads=2, mamba_head_dim=8,
    ssm_state_size=8, n_routed_experts=4, moe_intermediate_size=8,
    moe_shared_expert_intermediate_size=16,
)
text = ConcatenatedDocuments(np.random.default_rng(0).integers(0, 64, 5000), np.array([0]))
result = train(
    Nemotron(config, seed=0), text, TrainConfig(steps=100_000, batch_size=2, seq_len=16),
    out_dir=sys.argv[1], progress=False,
)
print("stopped at", result.step, result.interrupted, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_from_another_process_saves_and_exits_cleanly(tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    last = log_of(tmp_path)[-1]["step"]
    assert out == f"stopped at {last} True\n"
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{last:08d}.pt"
    assert torch.load(checkpoint, weights_only=True)["step"] == last
