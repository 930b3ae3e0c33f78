"""What a small model loses without one of its parts: the record behind the chapters' comparisons.

    python -m benchmarks removal                     every part, three seeds, about 40 minutes
    python -m benchmarks removal --seeds 5
    python -m benchmarks removal --quick             a few steps, no record

`nemotron_lite.course.removal` builds and trains the models. Each variant is compared with the whole
model of the same seed: same data in the same order, and the same first weights where the shapes
are the same. The record has the score of every run and the differences of the pairs.

Left out: tuning of the learning rate for each variant, and model sizes beyond the small ones.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.record import write_record
from nemotron_lite.course import removal
from nemotron_lite.data import TextData

PATH = (
    "nemotron_lite.train.train on course.removal.small_model(task, without=part, seed=seed), then "
    "train.evaluate on the held-out text, or recall_score on questions about 16 pairs"
)


def parts_of(task: str) -> list[str]:
    """The parts that the model of a task has, and that can be taken out."""
    found = []
    for part in removal.PARTS:
        try:
            removal.config_without(task, part)
        except removal.RemovalError:
            continue
        found.append(part)
    return found


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, n and spread of the runs, and every run."""
    return {
        "median": statistics.median(values), "n": len(values), "min": min(values),
        "max": max(values), "runs": list(values),
    }  # fmt: skip


def measure_task(
    task: str, seeds: Sequence[int], data: TextData | None, steps: int | None
) -> list[dict[str, Any]]:
    """Train and score the whole model and every variant; one entry each, the whole one first."""
    scores: dict[str | None, list[float]] = {}
    parameters: dict[str | None, int] = {}
    for part in [None, *parts_of(task)]:
        for seed in seeds:
            model = removal.small_model(task, part, seed=seed)
            losses = removal.train_small(model, task, data, steps=steps, seed=seed)
            found = removal.score(model, task, data)
            scores.setdefault(part, []).append(found)
            parameters[part] = model.num_parameters()
            print(f"{task:7} {part or 'whole':10} seed {seed}: loss {losses[-1]:.3f}, {found:.4f}",
                  flush=True)  # fmt: skip
    return [
        {
            "what": "removal", "task": task, "without": part, "parameters": parameters[part],
            "score": summary(values),
            "difference": summary(
                [mine - whole for mine, whole in zip(values, scores[None], strict=True)]
            ),
        }
        for part, values in scores.items()
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure both tasks and write `removal.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks removal", allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--quick", action="store_true", help="a few steps, one seed, no record")
    asked = parser.parse_args(arguments)
    seeds = range(1 if asked.quick else asked.seeds)
    data = removal.text_data()
    results = []
    for task in removal.RECIPES:
        results += measure_task(task, seeds, data, 3 if asked.quick else None)
    if not asked.quick:
        payload = {
            "path": PATH,
            "recipes": {task: recipe.to_dict() for task, recipe in removal.RECIPES.items()},
            "patterns": {task: config.pattern for task, config in removal.CONFIGS.items()},
            "score": {"text": "bits per byte, lower is better", "recall": "share of right answers"},
            "results": results,
        }
        print(write_record("removal", payload))


if __name__ == "__main__":
    main()
