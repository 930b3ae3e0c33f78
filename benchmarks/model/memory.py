"""Peak memory of one program doing one thing, above the model itself, in a separate process.

    python -m benchmarks.model.memory ours train S      bytes, or null where it cannot be measured

Everything besides the weights counts: activations, gradients, optimizer state, caches. Each process
builds only one program, with weights drawn as in `peers`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial

import torch

from benchmarks import measure
from benchmarks.model import peers
from nemotron_lite import Nemotron

TRAIN_BATCH, TRAIN_LENGTH = 4, 512


def prepare(who: str, work: str, size: str, length: int) -> Callable[[], object]:
    """Build a model; the returned call does the work."""
    config = peers.SIZES[size]
    model: torch.nn.Module
    if who == "ours":
        model = Nemotron(config, seed=0).eval()
        peers.randomize(model, config)
    else:
        model = peers.build_peer(config)
    if work == "train":
        tokens = peers.random_tokens(config, TRAIN_BATCH, length)
        optimizer = peers.new_optimizer(model.train())
        step = peers.train_step_ours if who == "ours" else peers.train_step_peer
        return lambda: [step(model, optimizer, tokens) for _ in range(2)]
    tokens = peers.random_tokens(config, 1, length)
    return lambda: peers.prefill(who, model, tokens)


def peak(who: str, work: str, size: str, length: int) -> int | None:
    """Bytes above the model, measured in a fresh process."""
    arguments = (who, work, size, "--length", str(length))
    return measure.in_own_process("benchmarks.model.memory", *arguments)


def main() -> None:
    """Measure one thing and print the bytes as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("who", choices=["ours", "peer"])
    parser.add_argument("work", choices=["train", "prefill"])
    parser.add_argument("size", choices=list(peers.SIZES))
    parser.add_argument("--length", type=int, default=TRAIN_LENGTH)
    asked = parser.parse_args()
    build = partial(prepare, asked.who, asked.work, asked.size, asked.length)
    print(json.dumps(measure.peak_above(build)))


if __name__ == "__main__":
    main()
