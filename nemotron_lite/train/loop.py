"""The training loop: batch, loss, gradient, update; with a log, checkpoints, and resuming.

One update:

    1. read `gradient_accumulation_steps` micro-batches; their numbers follow from the number of the
       update
    2. forward, loss and backward for each; the gradients are summed
    3. clip the gradients, set the learning rate, update the weights with AdamW
    4. update the routers' selection biases from the loads of all micro-batches
    5. write a line to the log, and a checkpoint every `save_every` updates

Ctrl-C (or SIGTERM) does not stop an update half-way: the loop finishes the update, saves, and
returns with `interrupted=True`. A second Ctrl-C stops at once, as usual.

The folder of a run has `log.jsonl`, with one JSON object per update, and `checkpoints/`. Resuming
removes the log lines after the checkpoint, because these updates are made again.

Left out: several devices, gradient checkpointing, and a validation loss during the run (a run of
minutes is evaluated at its end, see `evaluate.py`).
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nemotron_lite.data.batches import Batch, BatchSource
from nemotron_lite.files import atomic_file
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.emulated_training import EmulatedPrecision
from nemotron_lite.train.balance import (
    expert_loads,
    max_violation,
    sequence_balance_loss,
    update_biases,
)
from nemotron_lite.train.checkpointing import (
    ResumeError,
    check_same_run,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from nemotron_lite.train.config import TrainConfig
from nemotron_lite.train.distillation import distillation_loss
from nemotron_lite.train.loss import count_targets, token_loss
from nemotron_lite.train.optimizer import clip_gradients, make_optimizer
from nemotron_lite.train.schedule import learning_rate

# Fields that may change when a run is resumed.
_MAY_DIFFER = {"max_seconds", "save_every", "keep_checkpoints"}


@dataclass
class TrainResult:
    """What a run has done. Counts include the part of the run before it was resumed.

    Attributes:
        step: number of updates.
        tokens: number of tokens read.
        seconds: training time.
        interrupted: True if Ctrl-C or SIGTERM ended the run early.
        history: the log records of this call of `train`, one per update.
        checkpoint: the last file written; None without `out_dir`.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: Path | None = None


def train(
    model: Nemotron,
    data: BatchSource,
    config: TrainConfig,
    *,
    out_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train `model` in place.

    Args:
        model: with float32 weights.
        data: the source of batches; `config.seed` selects the random stream.
        config: all options of the run.
        out_dir: folder for the log and the checkpoints; None writes nothing.
        resume: continue from the newest checkpoint in `out_dir`.
        progress: show a progress bar.
        on_step: called with each log record.

    Returns:
        Counts and the log of this call. Without `max_seconds`, a run that was stopped and resumed
        has the same losses, bit for bit, as one that was not.

    Raises:
        ResumeError: `out_dir` holds a run and `resume` is False, or the run cannot be continued.
        ValueError: the weights are not float32.
        FloatingPointError: a gradient is not finite; the last checkpoint stays.
    """
    run = _Run(model, data, config, Path(out_dir) if out_dir is not None else None)
    run.open(resume)
    return run.loop(progress, on_step)


class _Run:
    """A model, its optimizer, and the progress of the run."""

    def __init__(
        self, model: Nemotron, data: BatchSource, config: TrainConfig, folder: Path | None
    ) -> None:
        if model.dtype != torch.float32:
            raise ValueError(
                f"the weights are {model.dtype}: expected float32 (model.float()). For matrix "
                'products in bfloat16, set precision="bf16".'
            )
        self.model, self.data, self.config, self.folder = model, data, config, folder
        self.optimizer = make_optimizer(
            model,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self.precision = EmulatedPrecision(model, config.precision, config.seed)
        self.depths = model.config.mtp_depths if config.mtp_weight else 0
        self.result = TrainResult()

    def open(self, resume: bool) -> None:
        """Load the newest checkpoint, or check that there is no run to overwrite."""
        if self.folder is None:
            if resume:
                raise ResumeError(
                    "resume=True needs out_dir: give the folder of the run to resume."
                )
            return
        checkpoints = self.folder / "checkpoints"
        if resume:
            self._restore(load_checkpoint(checkpoints))
        elif list_checkpoints(checkpoints):
            raise ResumeError(
                f"{self.folder} already holds a run: give resume=True (--resume) to continue it, "
                "or another out_dir (--out)."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        _truncate_log(self.folder / "log.jsonl", self.result.step)

    def _restore(self, saved: Mapping[str, Any]) -> None:
        check_same_run(saved["model_config"], asdict(self.model.config), may_differ=set())
        check_same_run(saved["train_config"], self.config.to_dict(), may_differ=_MAY_DIFFER)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        if self.model.device.type == "cuda":
            torch.cuda.set_rng_state(saved["device_rng"], self.model.device)
        for name in ("step", "tokens", "seconds"):
            setattr(self.result, name, saved[name])

    def _save(self) -> None:
        if self.folder is None:
            return
        done = self.result
        content: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "model_config": asdict(self.model.config),
            "train_config": self.config.to_dict(),
            "step": done.step, "tokens": done.tokens, "seconds": done.seconds,
        }  # fmt: skip
        if self.model.device.type == "cuda":
            content["device_rng"] = torch.cuda.get_rng_state(self.model.device)
        done.checkpoint = save_checkpoint(
            self.folder / "checkpoints", done.step, content, keep=self.config.keep_checkpoints
        )

    def loop(self, progress: bool, on_step: Callable[[dict[str, Any]], None] | None) -> TrainResult:
        """Make updates until `steps` or `max_seconds` are reached, or a signal asks to stop."""
        done, config = self.result, self.config
        was_training = self.model.training
        self.model.train()
        bar = tqdm(total=100, disable=not progress, desc="training", bar_format=_BAR)
        log = None if self.folder is None else (self.folder / "log.jsonl").open("a", buffering=1)
        saved_step = done.step
        try:
            with _StopOnSignal() as stop, self.precision:
                while self._progress() < 1 and not stop.requested:
                    record = self._update()
                    done.history.append(record)
                    if log is not None:
                        log.write(json.dumps(record) + "\n")
                    if on_step is not None:
                        on_step(record)
                    bar.n = round(100 * self._progress(), 1)
                    bar.set_postfix_str(
                        f"step {done.step}, loss {record['ce']:.3f}, "
                        f"{record['tokens_per_second']:,.0f} tokens/s"
                    )
                    if config.save_every and done.step % config.save_every == 0:
                        self._save()
                        saved_step = done.step
                done.interrupted = stop.requested and self._progress() < 1
                if done.step != saved_step:
                    self._save()
        finally:
            bar.close()
            if log is not None:
                log.close()
            self.model.train(was_training)
        return done

    def _progress(self) -> float:
        """Fraction of the run that is done, by updates or by time; the larger of the two."""
        by_steps = self.result.step / self.config.steps if self.config.steps else 0.0
        by_clock = self.result.seconds / self.config.max_seconds if self.config.max_seconds else 0.0
        return min(1.0, max(by_steps, by_clock))

    def _update(self) -> dict[str, Any]:
        """Make one optimizer step and return its log record."""
        started = time.perf_counter()
        done, config = self.result, self.config
        first = done.step * config.gradient_accumulation_steps
        batches = [self._batch(first + i) for i in range(config.gradient_accumulation_steps)]
        counts = count_targets(batches, self.depths)
        ce, balance, loads = [0.0] * (self.depths + 1), 0.0, dict[str, Tensor]()
        for i, batch in enumerate(batches):
            self.precision.start_micro_batch(first + i)
            part_ce, part_balance, part_loads = self._forward_backward(batch, counts)
            ce = [a + b for a, b in zip(ce, part_ce, strict=True)]
            balance += part_balance
            loads = {n: x + loads[n] if n in loads else x for n, x in part_loads.items()}
        norm = clip_gradients(self.model.parameters(), config.grad_clip)

        done.step += 1
        elapsed = time.perf_counter() - started
        done.seconds += elapsed
        rate = learning_rate(
            self._progress(),
            peak=config.lr,
            floor=config.min_lr,
            warmup_fraction=config.warmup_fraction,
            decay_fraction=config.decay_fraction,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        update_biases(self.model, loads, config.bias_rate)

        seconds = time.perf_counter() - started
        done.seconds += seconds - elapsed
        done.tokens += config.tokens_per_step
        mtp = config.mtp_weight / max(1, self.depths) * sum(ce[1:])
        return {
            "step": done.step, "loss": ce[0] + mtp + config.balance_weight * balance,
            "ce": ce[0], "mtp": ce[1:], "balance": balance, "lr": rate, "grad_norm": norm,
            "max_vio": max_violation(loads), "tokens": done.tokens, "seconds": done.seconds,
            "tokens_per_second": config.tokens_per_step / seconds,
        }  # fmt: skip

    def _batch(self, index: int) -> Batch:
        config = self.config
        batch = self.data.batch(
            index, batch_size=config.batch_size, seq_len=config.seq_len, seed=config.seed
        )
        return batch.to(self.model.device)

    def _forward_backward(
        self, batch: Batch, counts: list[int]
    ) -> tuple[list[float], float, dict[str, Tensor]]:
        """Add a micro-batch's gradients; return its losses by depth, balance loss and loads."""
        with self.precision.autocast():
            output = self.model.forward_hidden(
                batch.tokens, seq_idx=batch.seq_idx, mtp_depths=self.depths, router_stats=True
            )
            loss = distillation_loss if self.config.mtp_target == "backbone" else token_loss
            tokens = loss(
                output.hidden,
                output.mtp_hidden,
                self.model.lm_head,
                batch,
                mtp_weight=self.config.mtp_weight,
                counts=counts,
            )
        total = tokens.total
        top_k = self.model.config.num_experts_per_tok
        terms = [
            sequence_balance_loss(s.scores, top_k, _shortened(batch.mask, s.scores.shape[1]))
            for s in output.router
        ]
        balance = None
        if terms:
            balance = torch.stack(terms).sum() / self.config.gradient_accumulation_steps
            total = total + self.config.balance_weight * balance
        total.backward()
        loads = expert_loads(output.router, batch.mask)
        return tokens.by_depth, 0.0 if balance is None else float(balance.detach()), loads


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} {postfix}"


def _shortened(mask: Tensor | None, length: int) -> Tensor | None:
    return None if mask is None else mask[:, :length]


def _truncate_log(path: Path, step: int) -> None:
    """Remove the records after `step`; a resumed run makes these updates again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the run was killed while it wrote this line
            break
        if record["step"] <= step:
            kept.append(line + "\n")
    with atomic_file(path) as temporary:
        temporary.write_text("".join(kept))


class _StopOnSignal(AbstractContextManager["_StopOnSignal"]):
    """Sets `requested` on the first SIGINT or SIGTERM; the second one acts as usual.

    Python delivers signals to the main thread only, so in other threads this changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
