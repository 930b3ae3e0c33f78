"""The training loop: batch, loss, gradient, update; with a log, checkpoints, and resuming.

One update:

    1. read `gradient_accumulation_steps` micro-batches; their numbers follow from the number of the
       update
    2. forward, loss and backward for each; the gradients are summed
    3. clip the gradients, set the learning rate, update the weights with AdamW
    4. update the routers' selection biases from the loads of all micro-batches

After it, what is due: a snapshot of the weights, a validation (also of merges of the snapshots), a
line of the log, the callbacks, a checkpoint.

The folder of a run has `log.jsonl`, with one JSON object per update, `checkpoints/`, `snapshots/`
if weights are merged (snapshots.py), the tokenizer of the run if it has one, and `run.lock`, which
keeps a second run out (run_folder.py).

A run that ends early keeps what it has learned:

    Ctrl-C, SIGTERM, SIGHUP     the update is finished, the run saved, and `train` returns with
                                `interrupted=True`; a second Ctrl-C stops at once
    an error between updates    (in a callback, in the data, in the log) the run is saved first
    a gradient with NaN         nothing is saved, because the weights may be bad already: the last
                                checkpoint stays

Left out: several devices.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_lite.data.batches import Batch, BatchSource
from nemotron_lite.layers import Block
from nemotron_lite.model import Nemotron
from nemotron_lite.openmp import watching
from nemotron_lite.progress import Progress
from nemotron_lite.quantization.emulated_training import EmulatedPrecision
from nemotron_lite.train.balance import (
    expert_loads,
    max_violation,
    router_balance,
    sequence_balance_loss,
    update_biases,
)
from nemotron_lite.train.callbacks import Callback, Callbacks
from nemotron_lite.train.checkpoint_checks import FORMAT, parameter_names
from nemotron_lite.train.config import TrainConfig
from nemotron_lite.train.distillation import distillation_loss
from nemotron_lite.train.errors import ResumeError
from nemotron_lite.train.fingerprint import run_fingerprint, run_tokenizer
from nemotron_lite.train.loss import count_targets, token_loss
from nemotron_lite.train.optimizer import clip_gradients, make_optimizer
from nemotron_lite.train.run_folder import RunFolder
from nemotron_lite.train.run_log import check_kinds
from nemotron_lite.train.schedule import learning_rate
from nemotron_lite.train.signals import StopOnSignal
from nemotron_lite.train.snapshots import Snapshots
from nemotron_lite.train.validation import validation_loss
from nemotron_lite.wrappers import plain_model, unwrap, wrappers

_log = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a run has done. Counts include the part of the run before it was resumed.

    Attributes:
        step: number of updates.
        tokens: number of tokens read.
        seconds: training time, without validation and saving.
        interrupted: True if a signal (Ctrl-C, SIGTERM, SIGHUP) ended the run early.
        stopped: True if a callback ended the run.
        history: the log records of this call of `train`, one per update.
        checkpoint: the last file that was written, or read by a resume; None without `out_dir`.
        best: `{"step": ..., "loss": ...}` of the lowest validation loss; None without validation.
        notes: sentences about a resume, which are logged as warnings too: versions that differ,
            snapshots that were removed, damaged lines of the log.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    stopped: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: Path | None = None
    best: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def train(
    model: nn.Module,
    data: BatchSource,
    config: TrainConfig,
    *,
    out_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[dict[str, Any]], Any] | None = None,
    callbacks: Sequence[Callback] = (),
    validation: BatchSource | None = None,
    logs: Collection[str] = (),
    allow_changes: Collection[str] = (),
    skip_damaged: bool = False,
) -> TrainResult:
    """Train `model` in place.

    Args:
        model: a `Nemotron` with float32 weights. It may be wrapped by `torch.compile` or by
            DistributedDataParallel, with `static_graph=True` where a parameter has no gradient.
        data: the source of batches; `config.seed` selects the random stream. If it has a
            `fingerprint` (see `BatchSource`), a resume compares it.
        config: all options of the run.
        out_dir: folder for the log and the checkpoints; None writes nothing.
        resume: continue from the newest checkpoint in `out_dir`.
        progress: report the progress on stderr.
        on_step: called with each log record; False ends the run.
        callbacks: called between updates (callbacks.py).
        validation: batches of other text, for a loss every `config.eval_every` updates. The record
            of such an update has `validation_loss` and `best_validation_loss`, and with
            `config.merge_windows` also `merged_validation_loss`, a dict by window.
        logs: what to write beside log.jsonl: "csv", "tensorboard" (needs that package).
        allow_changes: names of what may differ in a resumed run: fields of `TrainConfig`, or
            "text". Sizes of the model and the tokenizer may never differ.
        skip_damaged: resume from the newest intact checkpoint if the newest of all is damaged. The
            damaged file is renamed. Without it, a damaged one is an error that names the other.

    Returns:
        Counts and the log of this call. Without `max_seconds`, a run that was stopped and resumed
        has the same losses, bit for bit, as one that was not.

    Raises:
        ResumeError: `out_dir` holds a run, or snapshots of one, and `resume` is False; another
            process uses it; or the run cannot be continued, because something differs or the
            checkpoint is damaged.
        ValueError: weights that are not float32, nothing to train, or arguments that do not fit
            together.
        ImportError: a log needs a package that is not installed.
        OSError: the folder cannot be written; the last checkpoint stays.
        FloatingPointError: a gradient is not finite; the last checkpoint stays.
    """
    check_kinds(logs)
    if (config.eval_every is None) != (validation is None):
        raise ValueError(
            f"eval_every={config.eval_every} and validation={type(validation).__name__} do not "
            "fit together: a validation loss needs both, the batches and how often."
        )
    if out_dir is None and (resume or logs):
        raise ResumeError(
            f"{'resume=True' if resume else 'logs'} needs out_dir: give the folder of the run."
        )
    if out_dir is None and config.merge_every is not None:
        raise ValueError(
            f"merge_every={config.merge_every} needs out_dir, where the snapshots are kept: give "
            "the folder of the run."
        )
    if validation is not None:  # a text that is too short would be found out only at its turn
        validation.batch(0, batch_size=config.batch_size, seq_len=config.seq_len, seed=config.seed)
    run = _Run(model, data, config, Path(out_dir) if out_dir is not None else None, validation)
    with watching(), run.open(resume, allow_changes, skip_damaged, logs):
        return run.loop(progress, Callbacks(callbacks, on_step))


class _Run:
    """A model, its optimizer, and the progress of the run."""

    def __init__(
        self,
        model: nn.Module,
        data: BatchSource,
        config: TrainConfig,
        out_dir: Path | None,
        validation: BatchSource | None = None,
    ) -> None:
        # A wrapper is called as it is; everything else concerns the model inside.
        self.call: Callable[..., Any] = model
        model = plain_model(unwrap(model))
        _check_trainable(model)
        self.model, self.data, self.config, self.validation = model, data, config, validation
        self.optimizer = make_optimizer(
            model,
            name=config.optimizer,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self.precision = EmulatedPrecision(model, config.precision, config.seed)
        self.depths = model.config.mtp_depths if config.mtp_weight else 0
        _check_distributed(self.call, model, self.depths)
        self.folder = None if out_dir is None else RunFolder(out_dir)
        self.result = TrainResult()
        self.snapshots: Snapshots | None = None
        self._fingerprint: dict[str, Any] = {}
        self._updating = False  # whether weights and counts may not belong together
        self._saved = 0, 0.0  # step and seconds of the last checkpoint

    def open(
        self,
        resume: bool,
        allow_changes: Collection[str] = (),
        skip_damaged: bool = False,
        logs: Collection[str] = (),
    ) -> AbstractContextManager[object]:
        """Lock the folder, and load the newest checkpoint or check that there is none.

        Returns:
            What to close at the end of the run.
        """
        if self.folder is None:
            return nullcontext()
        self._fingerprint = run_fingerprint(self.model, self.data, self.config)
        self.folder.open(resume)
        try:
            if resume:
                saved = self.folder.read_newest(
                    self.model,
                    self.optimizer,
                    self._fingerprint,
                    allow_changes=allow_changes,
                    skip_damaged=skip_damaged,
                )
                self._restore(saved)
                self.folder.remove_snapshots_after(self.result.step)
            else:
                self.folder.write_tokenizer(run_tokenizer(self.model, self.data))
            self.folder.open_log(self.result.step, logs)
            self.result.notes = self.folder.notes
            for note in self.result.notes:
                _log.warning("%s", note)
            if self.config.merge_every is not None:
                self.snapshots = Snapshots(
                    self.folder.path,
                    self.model,
                    every=self.config.merge_every,
                    windows=self.config.merge_windows,
                    fingerprint=self._fingerprint,
                )
                self.snapshots.after_update(self.result.step)
        except BaseException:
            self.folder.close()
            raise
        return self.folder

    def _restore(self, saved: dict[str, Any]) -> None:
        """Take over a checkpoint that was checked."""
        self.model.load_state_dict(saved["model"])
        groups = self.optimizer.state_dict()["param_groups"]  # the options are those of the config
        self.optimizer.load_state_dict(
            {"state": saved["optimizer"]["state"], "param_groups": groups}
        )
        torch.set_rng_state(saved["rng"])
        if self.model.device.type == "cuda":
            torch.cuda.set_rng_state(saved["device_rng"], self.model.device)
        for name in ("step", "tokens", "seconds", "best"):
            setattr(self.result, name, saved[name])
        self.result.seconds = float(self.result.seconds)
        self.result.checkpoint = saved["path"]
        self._saved = self.result.step, self.result.seconds

    def _save(self) -> None:
        if self.folder is None or self._saved[0] == self.result.step:
            return
        done = self.result
        state = self.optimizer.state_dict()
        content: dict[str, Any] = {
            "format": FORMAT,
            "model": self.model.state_dict(),
            "parameters": {
                name: index in state["state"]
                for index, name in enumerate(parameter_names(self.model, self.optimizer))
            },
            "optimizer": state,
            "rng": torch.get_rng_state(),
            "fingerprint": self._fingerprint,
            "step": done.step, "tokens": done.tokens, "seconds": done.seconds, "best": done.best,
        }  # fmt: skip
        if self.model.device.type == "cuda":
            content["device_rng"] = torch.cuda.get_rng_state(self.model.device)
        done.checkpoint = self.folder.save(done.step, content, keep=self.config.keep_checkpoints)
        self._saved = done.step, done.seconds

    def loop(self, progress: bool, callbacks: Callbacks) -> TrainResult:
        """Make updates until `steps` or `max_seconds` are reached, or something ends the run."""
        done = self.result
        was_training = self.model.training
        self.model.train()
        report = Progress("training", 100, enabled=progress)
        try:
            with StopOnSignal() as stop, self.precision, _Recomputing(self.model, self.config):
                callbacks.start(done.step)
                while self._progress() < 1 and not stop.requested and not callbacks.stopped:
                    record = self._logged_update()
                    callbacks.step(record)
                    report.update(100 * self._progress(), _note_of(record))
                    if self._save_is_due():
                        self._save_and_tell(callbacks)
                unfinished = self._progress() < 1
                done.interrupted = stop.requested and unfinished
                done.stopped = callbacks.stopped and unfinished and not stop.requested
                self._save_and_tell(callbacks)
                callbacks.end(done.step)
        except Exception as error:
            self._save_after(error)
            raise
        finally:
            report.close()
            self.model.train(was_training)
        return done

    def _save_is_due(self) -> bool:
        config, done = self.config, self.result
        if config.save_every is not None:
            return done.step % config.save_every == 0
        if config.save_every_seconds is None:
            return False
        return done.seconds - self._saved[1] >= config.save_every_seconds

    def _save_and_tell(self, callbacks: Callbacks) -> None:
        before = self.result.checkpoint
        self._save()
        if self.result.checkpoint is not None and self.result.checkpoint != before:
            callbacks.save(self.result.checkpoint)

    def _save_after(self, error: Exception) -> None:
        """Save what was learned before an error, unless the weights may be wrong."""
        failed_save = self.folder is not None and self.folder.save_failed
        if self._updating or failed_save or isinstance(error, FloatingPointError):
            return
        self.optimizer.zero_grad(set_to_none=True)
        try:
            self._save()
        except Exception as second:
            error.add_note(f"The run could not be saved after this error: {second}")
        else:
            if self.folder is not None and self.result.checkpoint is not None:
                error.add_note(
                    f"The run is saved in {self.result.checkpoint}. Continue it with resume=True "
                    "(--resume)."
                )

    def _logged_update(self) -> dict[str, Any]:
        """An update, with a validation if it is due; its record is in the log on return."""
        record = self._update()
        every = self.config.eval_every
        try:
            if self.snapshots is not None:
                self.snapshots.after_update(record["step"])
            if self.validation is not None and every is not None and record["step"] % every == 0:
                record |= self._validate(self.validation)
        finally:
            self.result.history.append(record)
            if self.folder is not None:
                self.folder.log(record)
        return record

    def _validate(self, data: BatchSource) -> dict[str, Any]:
        done = self.result
        loss = validation_loss(self.model, data, self.config, self.precision)
        if done.best is None or loss < done.best["loss"]:
            done.best = {"step": done.step, "loss": loss}
        scores: dict[str, Any] = {
            "validation_loss": loss,
            "best_validation_loss": done.best["loss"],
        }
        if self.snapshots is not None and self.snapshots.windows:
            merged = scores["merged_validation_loss"] = {}
            for window in self.snapshots.windows:
                with self.snapshots.merged(window, done.step) as complete:
                    if complete:
                        merged[str(window)] = validation_loss(
                            self.model, data, self.config, self.precision
                        )
        return scores

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

        self._updating = True
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
        self._updating = False
        mtp = config.mtp_weight / max(1, self.depths) * sum(ce[1:])
        routers = router_balance(loads)
        return {
            "step": done.step, "loss": ce[0] + mtp + config.balance_weight * balance,
            "ce": ce[0], "mtp": ce[1:], "balance": balance, "lr": rate, "grad_norm": norm,
            "max_vio": max_violation(routers), "tokens": done.tokens, "seconds": done.seconds,
            "tokens_per_second": config.tokens_per_step / seconds,
            "routers": {name: router._asdict() for name, router in routers.items()},
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
            output = self.call(
                batch.tokens,
                seq_idx=batch.seq_idx,
                mtp_depths=self.depths,
                router_stats=True,
                apply_head=False,
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


def _shortened(mask: Tensor | None, length: int) -> Tensor | None:
    return None if mask is None else mask[:, :length]


def _check_trainable(model: Nemotron) -> None:
    parameters = [*model.parameters()]
    wrong = sorted({str(p.dtype) for p in parameters if p.dtype != torch.float32})
    if wrong:
        raise ValueError(
            f"the weights are {', '.join(wrong)}: expected float32 (model.float(), or "
            "load(path, dtype=torch.float32)). For matrix products in bfloat16, set "
            'precision="bf16".'
        )
    if any(p.is_meta for p in parameters):
        raise ValueError(
            "the model has no weights (device meta): create it on a real device, or load a "
            "checkpoint."
        )
    if not any(p.requires_grad for p in parameters):
        raise ValueError(
            "no parameter of the model has requires_grad=True, so there is nothing to train: set "
            "it where you want training (model.requires_grad_())."
        )


def _check_distributed(wrapped: object, model: Nemotron, depths: int) -> None:
    """Refuse a DistributedDataParallel that would fail at the first or at the second update."""
    parallel = [m for m in wrappers(wrapped) if isinstance(m, nn.parallel.DistributedDataParallel)]
    mtp = [] if model.mtp is None or depths else [*model.mtp.parameters()]
    for each in parallel:
        if each.static_graph:
            continue
        if each.find_unused_parameters:
            why = (
                "find_unused_parameters=True takes the weight of the head for unused, because the "
                "loss applies the head after the call of the model"
            )
        elif any(p.requires_grad for p in mtp):
            why = "mtp_weight=0 gives the parameters of the MTP module no gradient"
        else:
            continue
        raise ValueError(
            f"DistributedDataParallel cannot train like this: {why}. Wrap the model with "
            "DistributedDataParallel(model, static_graph=True)."
        )


class _Recomputing(AbstractContextManager[None]):
    """Gradient checkpointing in every block, while the context is open."""

    def __init__(self, model: Nemotron, config: TrainConfig) -> None:
        blocks = [m for m in model.modules() if isinstance(m, Block)]
        self._blocks = blocks if config.gradient_checkpointing else []

    def __enter__(self) -> None:
        for block in self._blocks:
            block.recompute = True

    def __exit__(self, *_: object) -> None:
        for block in self._blocks:
            block.recompute = False


def _note_of(record: dict[str, Any]) -> str:
    """What the progress report says about the last update."""
    text = (
        f"step {record['step']}, loss {record['ce']:.3f}, "
        f"{record['tokens_per_second']:,.0f} tokens/s"
    )
    if "validation_loss" in record:
        text += f", validation {record['validation_loss']:.3f}"
    return text
