"""The record of a shipped model: how it was trained, its loss curve, its scores.

`record.json` lies in the model's folder, so that chapters can draw how a model learns without
training one:

    model       name, preset, parameters
    text        SHA-256 of the manifest, what differed from it, held-out files and bytes
    training    every option of the run, updates, tokens, seconds
    curve       tokens, ce, mtp (one list per depth), lr: lists of at most 300 means; and validation
    scores      bits_per_byte before and after packing, baselines, acceptance by temperature
    machine     processor and cores;  versions: of Python and the libraries

Bits per byte are of the held-out files, and so are the baselines (`data/baselines.py`). Acceptance
is measured on the beginnings of held-out files, which the model continues with drafts of four
tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemotron_lite import ledger
from nemotron_lite.data import HeldOut
from nemotron_lite.data.baselines import Baselines
from nemotron_lite.files import atomic_file
from nemotron_lite.generation.generate import generate
from nemotron_lite.generation.options import SpeculationOptions
from nemotron_lite.model import Nemotron
from nemotron_lite.provenance import describe_machine, versions
from nemotron_lite.train.config import TrainConfig

FORMAT = 1
MOST_POINTS = 300
DRAFT_LENGTH = 4
TEMPERATURES = (0.0, 0.7)
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 64, 128
PACKAGES = ("nemotron-lite", "torch", "numpy", "tokenizers")


def thin_curve(records: Sequence[Mapping[str, Any]], most: int = MOST_POINTS) -> dict[str, Any]:
    """The loss curve of a log in at most `most` points.

    A point is the mean loss of neighboring updates, at the tokens and the rate of the last of them.
    """
    count = min(most, len(records))
    edges = [round(i * len(records) / count) for i in range(count + 1)]
    parts = [records[a:b] for a, b in pairwise(edges)]
    depths = len(records[0]["mtp"])
    checked = [record for record in records if "validation_loss" in record]
    return {
        "tokens": [part[-1]["tokens"] for part in parts],
        "ce": [_mean([record["ce"] for record in part]) for part in parts],
        "mtp": [
            [_mean([record["mtp"][depth] for record in part]) for part in parts]
            for depth in range(depths)
        ],
        "lr": [float(f"{part[-1]['lr']:.5g}") for part in parts],
        "validation": {
            "tokens": [record["tokens"] for record in checked],
            "loss": [round(record["validation_loss"], 4) for record in checked],
        },
    }


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def measure_acceptance(model: Nemotron, held_out: HeldOut) -> dict[str, Any]:
    """How many drafted tokens are right, on the beginnings of held-out files.

    Returns:
        For each temperature `acceptance_length` (tokens per verification) and `rates` by position.
    """
    prompts = [
        [int(token) for token in document[:PROMPT_TOKENS]]
        for document in held_out.documents
        if len(document) > PROMPT_TOKENS
    ][:PROMPTS]
    found: dict[str, Any] = {
        "draft_length": DRAFT_LENGTH, "prompts": len(prompts), "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS, "temperature": {},
    }  # fmt: skip
    if not prompts or model.mtp is None:
        return found
    for temperature in TEMPERATURES:
        _, statistics = generate(
            model,
            prompts,
            NEW_TOKENS,
            temperature=temperature,
            top_p=None,
            seed=0,
            stop=(),
            speculation=SpeculationOptions(draft_length=DRAFT_LENGTH, adaptive=False),
            return_statistics=True,
        )
        found["temperature"][str(temperature)] = {
            "acceptance_length": round(statistics.acceptance_length, 3),
            "rates": [round(rate, 3) for rate in statistics.acceptance_rates],
        }
    return found


def make_record(
    name: str,
    model: Nemotron,
    log: Sequence[Mapping[str, Any]],
    config: TrainConfig,
    *,
    nvfp4_from: float | None,
    text: Mapping[str, Any],
    baselines: Baselines,
    trained_bits: float,
    packed_bits: float,
    acceptance: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of record.json; the module text describes it.

    Args:
        log: of the run (`run_log.read_log`).
        text: what the model has read, and the held-out files.
        trained_bits, packed_bits: bits per byte before and after packing.
    """
    count = ledger.parameters(model.config)
    return {
        "format": FORMAT,
        "model": {
            "name": name, "pattern": model.config.pattern, "parameters": count.total,
            "active_parameters": count.active,
        },
        "text": dict(text),
        "training": {
            "updates": log[-1]["step"],
            "tokens": log[-1]["tokens"],
            "seconds": round(log[-1]["seconds"], 1),
            "nvfp4_from": nvfp4_from,
            "config": config.to_dict(),
        },
        "curve": thin_curve(log),
        "scores": {
            "bits_per_byte": {"trained": round(trained_bits, 4), "packed": round(packed_bits, 4)},
            "baselines": {name: round(value, 4) for name, value in asdict(baselines).items()},
            "acceptance": dict(acceptance),
        },
        "machine": describe_machine(),
        "versions": versions(PACKAGES),
    }  # fmt: skip


def save_record(record: Mapping[str, Any], folder: str | Path) -> None:
    """Write record.json into the folder of a model."""
    with atomic_file(Path(folder) / "record.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
