"""Training in emulated NVFP4: its loss, its ingredients, and the time of a step.

    python -m benchmarks nvfp4_training                       the small scale, then step times
    python -m benchmarks nvfp4_training --scale lite --minutes 20
    python -m benchmarks nvfp4_training --only times

Every variant starts from the same weights and reads the same batches as the BF16 run of its seed,
so its gap to that run is a paired difference. The variants:

    bf16, fp32            the reference, and the effect of rounding alone on a run of this length
    nvfp4                 the recipe of Nemotron 3 Super
    nvfp4 without ...     one ingredient less: stochastic rounding, Hadamard, square weight blocks,
                          the last layers in BF16

Reported per run: the training loss over the last tenth of the updates, held-out loss in the run's
own precision, and held-out loss of the same weights with BF16 products. Also the share of gradient
elements that are exactly zero, for each matrix, over the last tenth of the updates; experts that no
token reached are counted separately.

These runs take minutes. They can show that something is broken, and whether an ingredient matters
at this length. The gaps in the papers are measured over trillions of tokens, where small biases add
up.

A finished run is stored under runs/nvfp4_training and not repeated, and the record is written again
after each run. So an interrupted benchmark continues where it stopped. `--minutes` starts no run
after that time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from benchmarks import measure
from benchmarks.record import write_record
from nemotron_lite import Nemotron, NemotronConfig
from nemotron_lite.data import TextData, prepare
from nemotron_lite.files import atomic_file
from nemotron_lite.quantization.emulated_training import EmulatedPrecision
from nemotron_lite.quantization.recipe import INGREDIENTS, RECIPES, Recipe
from nemotron_lite.train import TrainConfig, evaluate, loop, train

KEPT = measure.ROOT / "runs" / "nvfp4_training"
LITE = NemotronConfig.from_preset("lite")
SMALL = LITE.replace(
    pattern="MEMEM*EME",
    vocab_size=1024,
    hidden_size=128,
    num_attention_heads=4,
    num_key_value_heads=1,
    mamba_num_heads=8,
    ssm_state_size=32,
    n_routed_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=96,
    moe_latent_size=32,
    moe_shared_expert_intermediate_size=176,
    mtp_pattern="",
    mtp_depths=0,
)
VARIANTS = {name: RECIPES[name] for name in ("bf16", "nvfp4")}
ABLATIONS = {f"nvfp4 without {name}": RECIPES["nvfp4"].without(name) for name in INGREDIENTS}
STEP_AIM = 2.5


@dataclass(frozen=True)
class Scale:
    """One size of run."""

    config: NemotronConfig
    variants: dict[str, Recipe]
    steps: int
    seeds: int
    batch_size: int
    length: int
    held_out_bytes: int

    def recipe(self, variant: str, seed: int) -> TrainConfig:
        """The configuration of a variant's run; only the precision differs between variants."""
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            seq_len=self.length,
            bias_rate=0.02,
            precision=self.variants[variant],
            seed=seed,
        )


SCALES = {
    "small": Scale(
        SMALL, {**VARIANTS, "fp32": RECIPES["fp32"], **ABLATIONS},
        steps=300, seeds=3, batch_size=2, length=128, held_out_bytes=32_768,
    ),
    "lite": Scale(
        LITE, VARIANTS, steps=200, seeds=3, batch_size=2, length=256, held_out_bytes=32_768
    ),
    "quick": Scale(
        SMALL.replace(pattern="ME*E", vocab_size=300, hidden_size=32), VARIANTS | ABLATIONS,
        steps=3, seeds=2, batch_size=1, length=32, held_out_bytes=2_000,
    ),
}  # fmt: skip


class Zeros:
    """Counts gradient elements that are exactly zero, matrix by matrix, while `counting`."""

    def __init__(self, model: Nemotron) -> None:
        self.counting = False
        self.seen: dict[str, list[int]] = {}
        for name, parameter in model.named_parameters():
            if name.startswith("backbone.layers.") and parameter.ndim >= 2:
                self._watch(name, parameter)

    def _watch(self, name: str, parameter: Tensor) -> None:
        def count(p: Tensor) -> None:
            if not self.counting or p.grad is None:
                return
            grad, unreached = p.grad, 0
            if grad.ndim == 3 and "experts" in name:
                reached = grad.flatten(1).any(1)
                grad, unreached = grad[reached], int((~reached).sum())
            sums = self.seen.setdefault(name, [0, 0, 0, 0])
            parts = (int((grad == 0).sum()), grad.numel(), unreached, len(p))
            self.seen[name] = [a + b for a, b in zip(sums, parts, strict=True)]

        parameter.register_post_accumulate_grad_hook(count)

    def shares(self) -> dict[str, dict[str, float]]:
        """For each matrix the share of zeros, and for experts the share that no token reached."""
        found: dict[str, dict[str, float]] = {}
        for name, (zero, total, unreached, rows) in self.seen.items():
            found[name] = {"zero": zero / max(1, total)}
            if name.endswith(("experts.up_proj", "experts.down_proj")):
                found[name]["unreached_experts"] = unreached / rows
        return found


def one_run(scale: Scale, variant: str, seed: int, data: TextData) -> dict[str, Any]:
    """Train one variant and measure its losses."""
    model = Nemotron(scale.config, seed=seed)
    zeros, last = Zeros(model), max(1, scale.steps // 10)

    def watch(record: dict[str, Any]) -> None:
        zeros.counting = record["step"] >= scale.steps - last

    result = train(model, data, scale.recipe(variant, seed), progress=False, on_step=watch)
    losses = [record["ce"] for record in result.history]
    held_out = {}
    for name, recipe in (("own", scale.variants[variant]), ("bf16", RECIPES["bf16"])):
        with EmulatedPrecision(model.eval(), recipe, seed) as precision, precision.autocast():
            held_out[name] = evaluate(model, data.held_out, window=2 * scale.length).nats_per_token
    return {
        "variant": variant, "seed": seed,
        "train_nats": statistics.fmean(losses[-last:]),
        "held_out_nats": held_out["own"],
        "held_out_nats_bf16_products": held_out["bf16"],
        "curve": [statistics.fmean(losses[i : i + last]) for i in range(0, len(losses), last)],
        "zeros": zeros.shares(),
        "seconds": result.seconds,
    }  # fmt: skip


def kept_runs(name: str, scale: Scale) -> dict[tuple[str, int], dict[str, Any]]:
    """Finished runs of exactly this scale, from earlier calls."""
    folder, found = KEPT / name, {}
    for file in sorted(folder.glob("*.json")):
        saved = json.loads(file.read_text())
        if saved["scale"] == _identity(scale, saved["run"]["variant"]):
            found[saved["run"]["variant"], saved["run"]["seed"]] = saved["run"]
    return found


def keep(name: str, scale: Scale, run: dict[str, Any]) -> None:
    """Store a finished run."""
    folder = KEPT / name
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{run['variant'].replace(' ', '-')}-{run['seed']}.json"
    content = {"scale": _identity(scale, run["variant"]), "run": run}
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(content))


def _identity(scale: Scale, variant: str) -> Any:
    """What a run depends on, as JSON returns it."""
    if variant not in scale.variants:
        return None
    parts = asdict(scale) | {"variants": asdict(scale.variants[variant]), "seeds": None}
    return json.loads(json.dumps(parts))


def summarize(name: str, scale: Scale, runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The record's payload: by variant, over seeds, with gaps to the BF16 run of the same seed."""
    by_variant: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        by_variant.setdefault(run["variant"], {})[run["seed"]] = run
    base = by_variant.get("bf16", {})
    variants = {}
    for variant, seeds in by_variant.items():
        entry: dict[str, Any] = {"seeds": sorted(seeds)}
        for field in ("train_nats", "held_out_nats", "held_out_nats_bf16_products"):
            entry[field] = measure.summary([run[field] for run in seeds.values()])
            pairs = [(run[field], base[s][field]) for s, run in seeds.items() if s in base]
            if pairs and variant != "bf16":
                gaps = [100 * (found / exact - 1) for found, exact in pairs]
                entry[f"{field}_gap_percent"] = {**measure.summary(gaps), "each": gaps}
        variants[variant] = entry
    config, tokens = scale.config, scale.batch_size * scale.length
    return {
        "what": "training in emulated NVFP4: loss gaps to BF16 on the same weights and batches",
        "path": "`train`, then `evaluate`, with the precision of the variant",
        "scale": {
            "name": name, "pattern": config.pattern, "hidden_size": config.hidden_size,
            "routed_experts": config.n_routed_experts, "vocab_size": config.vocab_size,
            "mtp_depths": config.mtp_depths, "parameters": Nemotron(config).num_parameters(),
            "steps": scale.steps, "tokens_per_step": tokens, "tokens": tokens * scale.steps,
            "held_out_bytes": scale.held_out_bytes, "tail_layers": RECIPES["nvfp4"].tail_layers(
                config.num_layers
            ),
        },
        "planned": {"variants": list(scale.variants), "seeds": scale.seeds},
        "variants": variants,
        "zero_gradient_share": {v: _zeros(by_variant[v].values()) for v in by_variant},
        "curves": {v: {s: run["curve"] for s, run in r.items()} for v, r in by_variant.items()},
    }  # fmt: skip


def _zeros(runs: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Share of zeros by matrix, over seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for matrix, shares in run["zeros"].items():
            for what, share in shares.items():
                found.setdefault(matrix, {}).setdefault(what, []).append(share)
    return {
        matrix: {what: measure.summary(values) for what, values in shares.items()}
        for matrix, shares in found.items()
    }


def measure_runs(name: str, minutes: float, record: bool = True) -> dict[str, Any]:
    """Make the runs of a scale that are missing, seed by seed, and write the record after each."""
    scale, started = SCALES[name], time.monotonic()
    data = prepare(vocab_size=scale.config.vocab_size, held_out_bytes=scale.held_out_bytes)
    runs = kept_runs(name, scale) if record else {}
    for seed in range(scale.seeds):
        for variant in scale.variants:
            if (variant, seed) in runs or time.monotonic() - started > 60 * minutes:
                continue
            run = runs[variant, seed] = one_run(scale, variant, seed, data)
            print(
                f"{variant}, seed {seed}: held out {run['held_out_nats']:.4f} nats, "
                f"last tenth {run['train_nats']:.4f}, {run['seconds']:.0f} s",
                flush=True,
            )
            if record:
                keep(name, scale, run)
                write_record(f"nvfp4_training_{name}", summarize(name, scale, runs.values()))
    if record and runs:
        write_record(f"nvfp4_training_{name}", summarize(name, scale, runs.values()))
    return summarize(name, scale, runs.values())


def step_times(
    config: NemotronConfig, data: TextData, shapes: Sequence[tuple[int, int]], rounds: int
) -> list[dict[str, Any]]:
    """Seconds of one update in each precision, run alternately; ratios within each round."""
    results = []
    for batch_size, length in shapes:
        updates = {}
        for name in ("bf16", "nvfp4", "fp32"):
            recipe = TrainConfig(
                steps=10_000, batch_size=batch_size, seq_len=length, precision=name
            )
            updates[name] = _update(loop._Run(Nemotron(config, seed=0).train(), data, recipe, None))
        seconds = measure.alternate(updates, rounds)
        entry: dict[str, Any] = {
            "what": "one update", "batch_size": batch_size, "length": length, "aim": STEP_AIM,
            "seconds": {name: measure.summary(values) for name, values in seconds.items()},
        }  # fmt: skip
        for name in ("bf16", "fp32"):
            ratios = [a / b for a, b in zip(seconds["nvfp4"], seconds[name], strict=True)]
            entry[f"times_{name}"] = measure.summary(ratios)
        ratio = entry["times_bf16"]
        print(
            f"{batch_size} x {length}: an NVFP4 step takes {ratio['median']:.2f} times a BF16 step "
            f"({ratio['min']:.2f}-{ratio['max']:.2f}), {entry['times_fp32']['median']:.2f} times "
            "an FP32 step",
            flush=True,
        )
        results.append(entry)
    return results


def _update(run: loop._Run) -> Any:
    def call() -> None:
        with run.precision:
            run._update()

    return call


def main(arguments: list[str] | None = None) -> None:
    """Make the missing runs, measure step times, write `nvfp4_training_*.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks nvfp4_training", allow_abbrev=False)
    parser.add_argument("--scale", default="small", choices=["small", "lite"])
    parser.add_argument("--only", default="runs,times", help="runs, times or both")
    parser.add_argument("--minutes", type=float, default=30.0, help="start no run after these")
    parser.add_argument("--quick", action="store_true", help="a trial: a tiny size, no record")
    asked = parser.parse_args(arguments)
    works = set(asked.only.split(","))
    if not works <= {"runs", "times"}:
        parser.error(f"--only {asked.only}: expected runs, times or both.")
    if "runs" in works:
        measure_runs("quick" if asked.quick else asked.scale, asked.minutes, not asked.quick)
    if "times" in works and asked.quick:
        config = SCALES["quick"].config
        step_times(config, prepare(vocab_size=config.vocab_size), [(1, 32)], 2)
    elif "times" in works:
        data = prepare(vocab_size=LITE.vocab_size)
        results = step_times(LITE, data, [(2, 256), (4, 512)], 5)
        payload = {
            "size": "lite", "parameters": Nemotron(LITE, device="meta").num_parameters(),
            "path": "one update of `train`", "results": results,
        }  # fmt: skip
        print(write_record("nvfp4_training_times", payload))


if __name__ == "__main__":
    main()
