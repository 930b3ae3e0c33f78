"""Quality per FLOP: which architecture learns more from the same arithmetic?

    python -m benchmarks quality_per_flop                    start no run after 60 minutes
    python -m benchmarks quality_per_flop --minutes 300      all of it, on two cores
    python -m benchmarks quality_per_flop --models hybrid,latent --seeds 8
    python -m benchmarks quality_per_flop --quick            a trial: a tiny size, no record

Six models (`equal_compute`) are trained on the text of the shipped model: a dense transformer, a
transformer and a hybrid with a standard mixture, and the hybrid with LatentMoE in the variants of
the paper. They cost the same FLOPs per token, except for the variant "eff", which is there to cost
less. In each seed all models read the same batches in the same order. The held-out text is scored
at five points of each run. The points before the last are measured at the full learning rate, so
they compare models with each other, not with a run that ends there.

The record has, for each model, the ledger's FLOPs, total and active parameters and bytes read for a
decoded token; the curve of bits per byte over training FLOPs of each run; the balance of the
routers; and the claims of the papers with a verdict (`verdicts`): yes, no or not decided.

Each run has a folder of its own under runs/quality_per_flop. A run that was interrupted goes on at
its last checkpoint, at most a minute back, and a finished one is not repeated. The record is
written again after each run, from all finished runs, so several processes may train different
models (`--models`). Seed 0 of all models comes first, then seed 1, so that a record of an
interrupted benchmark compares equal numbers of seeds.

Left out: a search of the learning rate for each model. Matrices are updated by Muon, whose updates
have the same size for every shape, and all models have the rate that was chosen for the shipped
hybrid. Left out too: other sizes. A verdict holds for models of four million parameters after 0.8
million tokens of Python source, and says little about a hundred billion.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import measure, quality_plot
from benchmarks.model.equal_compute import (
    ALPHA,
    TOLERANCE,
    Model,
    costs,
    model_list,
    optimizer_flops,
)
from benchmarks.model.verdicts import CONFIDENCE, LEAST_SEEDS, judge_all
from benchmarks.record import write_record
from nemotron_lite import Nemotron, NemotronConfig
from nemotron_lite.data import HeldOut, MixtureData, TextData, open_mixture, prepare
from nemotron_lite.files import atomic_file
from nemotron_lite.input_files import read_json
from nemotron_lite.train import Callback, TrainConfig, evaluate, train
from nemotron_lite.train.checkpointing import list_checkpoints
from nemotron_lite.train.run_log import read_log

NAME = "quality_per_flop"
KEPT = measure.ROOT / "runs" / NAME
CURVE, RUN = "curve.json", "run.json"
POINTS = (0.125, 0.25, 0.5, 0.75, 1.0)  # fractions of a run at which held-out text is scored
SAVE_SECONDS = 60.0

REFERENCE = NemotronConfig(
    "MEM*EME", vocab_size=1024, hidden_size=128, initializer_range=0.08,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    mamba_num_heads=8, mamba_head_dim=32, ssm_state_size=32, n_groups=2, chunk_size=64,
    n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=256,
    moe_shared_expert_intermediate_size=256,
    bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """One size of the experiment."""

    reference: NemotronConfig
    steps: int
    seeds: int
    batch_size: int
    length: int
    contexts: tuple[int, ...]  # tokens before the decoded one, for the bytes

    def models(self) -> Mapping[str, Model]:
        """The list of models."""
        return model_list(self.reference, self.length)

    def recipe(self, model: Model, seed: int) -> TrainConfig:
        """The options of one run; only the number of updates differs between models."""
        return TrainConfig(
            steps=round(self.steps * model.longer), batch_size=self.batch_size,
            seq_len=self.length, optimizer="muon", lr=4e-3, min_lr=4e-5, warmup_fraction=0.02,
            decay_fraction=0.35, bias_rate=0.02, precision="bf16", seed=seed,
            save_every_seconds=SAVE_SECONDS, keep_checkpoints=1,
        )  # fmt: skip


SCALES = {
    "full": Scale(REFERENCE, steps=384, seeds=5, batch_size=4, length=512, contexts=(512, 32_768)),
    "quick": Scale(
        REFERENCE.replace(vocab_size=300, hidden_size=64, moe_intermediate_size=128,
                          moe_shared_expert_intermediate_size=128),
        steps=4, seeds=1, batch_size=1, length=64, contexts=(64,),
    ),
}  # fmt: skip

Text = MixtureData | TextData


def open_text(scale: Scale, quick: bool = False) -> Text:
    """The text of the shipped model with a smaller vocabulary; the standard library for a trial."""
    vocabulary = scale.reference.vocab_size
    if quick:
        return prepare(vocab_size=vocabulary, held_out_bytes=2_000)
    return open_mixture(batches=scale.steps, vocab_size=vocabulary, strict=False)


class Curve(Callback):
    """Scores the held-out text after some updates, and keeps the scores in a file.

    Args:
        model: the one that is trained.
        held_out: the text.
        window: tokens per window. No more than a row of the training has: a longer window would
            test how well a model extrapolates.
        steps: the updates after which to score.
        tokens_per_update: that the model reads.
        file: of the scores; those of an earlier part of the run stay.
    """

    def __init__(
        self,
        model: Nemotron,
        held_out: HeldOut,
        window: int,
        steps: Collection[int],
        tokens_per_update: int,
        file: Path,
    ) -> None:
        self._model, self._held_out, self._window = model, held_out, window
        self._steps, self._tokens, self._file = set(steps), tokens_per_update, file
        self.points: list[dict[str, Any]] = read_json(file, kind=list) if file.exists() else []

    def on_start(self, step: int) -> None:
        """Forget scores after the checkpoint: those updates are made again.

        If an error in the scoring ended the run, the score of the checkpoint itself is missing.
        """
        self.points = [point for point in self.points if point["step"] <= step]
        if all(point["step"] != step for point in self.points):
            self._score(step)

    def on_step(self, record: dict[str, Any]) -> None:
        """Score the text if this update is one of those."""
        self._score(record["step"])

    def _score(self, step: int) -> None:
        if step not in self._steps:
            return
        self._model.eval()
        try:
            found = evaluate(self._model, self._held_out, window=self._window)
        finally:
            self._model.train()
        tokens = step * self._tokens
        self.points.append({"step": step, "tokens": tokens, "bits_per_byte": found.bits_per_byte})
        with atomic_file(self._file) as temporary:
            temporary.write_text(json.dumps(self.points))


def run_folder(kept: Path, model: Model, recipe: TrainConfig, text: Text) -> Path:
    """The folder of one run. Its name has a digest of all that the run depends on."""
    identity = [model.config.to_hf(), model.rotary, recipe.to_dict(), text.fingerprint(), POINTS]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return kept / f"{model.name}-seed{recipe.seed}-{digest}"


def one_run(scale: Scale, model: Model, seed: int, text: Text, kept: Path) -> dict[str, Any] | None:
    """Make, continue or read one run; None if a signal ended it early.

    Returns:
        What is in its `run.json`: the model's name, the seed, the curve, the training loss over
        the last tenth of the updates, the balance there, and tokens per second.
    """
    recipe = scale.recipe(model, seed)
    folder = run_folder(kept, model, recipe, text)
    if (folder / RUN).exists():
        found: dict[str, Any] = read_json(folder / RUN)
        return found
    assert recipe.steps is not None
    folder.mkdir(parents=True, exist_ok=True)
    network = model.build(seed)
    at = [max(1, round(point * recipe.steps)) for point in POINTS]
    curve = Curve(network, text.held_out, scale.length, at, recipe.tokens_per_step, folder / CURVE)
    result = train(
        network,
        text,
        recipe,
        out_dir=folder,
        resume=bool(list_checkpoints(folder / "checkpoints")),
        progress=False,
        callbacks=[curve],
    )
    if result.interrupted:
        return None
    found = {
        "model": model.name, "seed": seed, "steps": recipe.steps, "curve": curve.points,
        **from_log(read_log(folder)),
    }  # fmt: skip
    with atomic_file(folder / RUN) as temporary:
        temporary.write_text(json.dumps(found))
    shutil.rmtree(folder / "checkpoints")  # three times the weights, and nothing needs them
    return found


def from_log(log: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the last tenth of the updates, and the speed of the median update."""
    last = log[-max(1, len(log) // 10) :]
    speeds = sorted(record["tokens_per_second"] for record in log)
    return {
        "train_nats": statistics.fmean(record["ce"] for record in last),
        "max_vio": statistics.fmean(record["max_vio"] for record in last),
        "tokens_per_second": statistics.median(speeds),
    }


def summarize(scale: Scale, runs: Iterable[Mapping[str, Any]], text: Text) -> dict[str, Any]:
    """The record's payload: costs, scores and curves by model, and the claims."""
    models = scale.models()
    by_model: dict[str, dict[int, Mapping[str, Any]]] = {name: {} for name in models}
    for run in runs:
        by_model[run["model"]][run["seed"]] = run
    reference = costs(scale.reference, scale.length, scale.contexts)
    entries: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        cost = costs(model.config, scale.length, scale.contexts)
        made = dict(sorted(by_model[name].items()))
        entry = entries[name] = {
            "words": model.words, "pattern": model.config.pattern, "rotary": model.rotary,
            "sizes": _sizes(model.config), "longer": model.longer, **cost,
            "flops_of_reference": cost["flops_per_token"] / reference["flops_per_token"],
            "parameters_of_reference": cost["parameters"] / reference["parameters"],
            "optimizer_of_flops": optimizer_flops(model.config)
            / (cost["flops_per_token"] * scale.batch_size * scale.length),
            "seeds": list(made),
        }  # fmt: skip
        if made:
            finals = [run["curve"][-1]["bits_per_byte"] for run in made.values()]
            for key in ("train_nats", "max_vio", "tokens_per_second"):
                entry[key] = measure.summary([run[key] for run in made.values()])
            entry["bits_per_byte"] = measure.summary(finals)
            entry["curve"] = _curve([run["curve"] for run in made.values()], cost)
    scores = {
        name: {seed: run["curve"][-1]["bits_per_byte"] for seed, run in made.items()}
        for name, made in by_model.items()
    }
    return {
        "what": "bits per byte of held-out text over training FLOPs, at equal FLOPs per token",
        "path": "`train` with a callback that calls `evaluate` on all held-out files",
        "scale": {
            "reference": "hybrid", "updates": scale.steps, "tokens_per_update": scale.batch_size
            * scale.length, "tokens": scale.steps * scale.batch_size * scale.length,
            "tokens_per_row": scale.length, "vocab_size": scale.reference.vocab_size,
            "alpha": ALPHA, "tolerance": TOLERANCE, "held_out_bytes": text.held_out.num_bytes,
            "text": text.fingerprint(),
            "recipe": {**scale.recipe(models["hybrid"], 0).to_dict(), "seed": "that of the run"},
        },
        "planned": {"models": list(models), "seeds": scale.seeds},
        "confidence": CONFIDENCE, "least_seeds": LEAST_SEEDS,
        "models": entries,
        "claims": judge_all(scores),
    }  # fmt: skip


def _sizes(config: NemotronConfig) -> dict[str, Any]:
    """The sizes in which the models differ."""
    sizes: dict[str, Any] = {"hidden_size": config.hidden_size}
    if "-" in config.pattern:
        sizes["intermediate_size"] = config.intermediate_size
    if "E" in config.pattern:
        for name in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
                     "moe_latent_size", "moe_shared_expert_intermediate_size"):  # fmt: skip
            sizes[name] = getattr(config, name)
    return sizes


def _curve(curves: list[list[dict[str, Any]]], cost: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scores over all seeds, point by point, with the training FLOPs up to there."""
    return [
        {
            "tokens": points[0]["tokens"],
            "flops": points[0]["tokens"] * cost["flops_per_token"],
            "bits_per_byte": {
                **measure.summary([point["bits_per_byte"] for point in points]),
                "each": [point["bits_per_byte"] for point in points],
            },
        }
        for points in zip(*curves, strict=True)
    ]


def measure_runs(
    name: str,
    minutes: float,
    *,
    models: Collection[str] | None = None,
    seeds: int | None = None,
    record: bool = True,
) -> dict[str, Any]:
    """Make the missing runs, seed by seed, and write the record after each.

    Args:
        name: of the scale.
        minutes: start no run after these.
        models: names of the models to train; all of them by default. The record has the finished
            runs of the others too.
        seeds: how many seeds; those of the scale by default.
        record: keep the runs and write the record.

    Raises:
        ValueError: a model that is not in the list.
    """
    scale, started = SCALES[name], time.monotonic()
    listed = scale.models()
    wanted = list(listed if models is None else models)
    if unknown := sorted(set(wanted) - set(listed)):
        raise ValueError(f"models={unknown[0]!r}: expected some of {', '.join(listed)}.")
    text = open_text(scale, quick=not record)
    seeds = scale.seeds if seeds is None else seeds
    asked = [(seed, listed[each]) for seed in range(seeds) for each in wanted]
    with tempfile.TemporaryDirectory() as trial:
        kept = KEPT if record else Path(trial)

        def made() -> dict[tuple[str, int], dict[str, Any]]:
            # From the files each time: another process may train other models meanwhile.
            return finished(scale, kept, text, max(seeds, scale.seeds))

        for seed, model in asked:
            if (model.name, seed) in made():
                continue
            if time.monotonic() - started > 60 * minutes:
                break
            run = one_run(scale, model, seed, text, kept)
            if run is None:
                print(f"{model.words}, seed {seed}: interrupted; the same command continues it")
                break
            print(
                f"{model.words}, seed {seed}: {run['curve'][-1]['bits_per_byte']:.4f} bits per "
                f"byte, {run['tokens_per_second']:,.0f} tokens/s",
                flush=True,
            )
            if record:
                write_record(NAME, summarize(scale, made().values(), text))
        runs = made()
    found = summarize(scale, runs.values(), text)
    if record and runs:
        write_record(NAME, found)
    for claim in found["claims"]:
        print(f"{claim['verdict']:12} n={claim['n']} {claim['claim']}")
    return found


def finished(
    scale: Scale, kept: Path, text: Text, seeds: int
) -> dict[tuple[str, int], dict[str, Any]]:
    """The finished runs of exactly this scale and text."""
    found = {}
    for model in scale.models().values():
        for seed in range(seeds):
            file = run_folder(kept, model, scale.recipe(model, seed), text) / RUN
            if file.exists():
                found[model.name, seed] = read_json(file)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Make the missing runs, write `quality_per_flop.json`, draw `docs/quality_per_flop.svg`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {NAME}", allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=60.0, help="start no run after these")
    parser.add_argument("--seeds", type=int, help="runs of each model")
    parser.add_argument("--models", help="names, separated by commas; all of them by default")
    parser.add_argument("--quick", action="store_true", help="a trial: a tiny size, no record")
    asked = parser.parse_args(arguments)
    models = None if asked.models is None else asked.models.split(",")
    if models and (unknown := sorted(set(models) - set(SCALES["full"].models()))):
        parser.error(
            f"--models {unknown[0]}: expected some of {', '.join(SCALES['full'].models())}"
        )
    measure_runs(
        "quick" if asked.quick else "full",
        asked.minutes,
        models=models,
        seeds=asked.seeds,
        record=not asked.quick,
    )
    if not asked.quick and quality_plot.RECORD.exists():
        print(quality_plot.draw())


if __name__ == "__main__":
    main()
