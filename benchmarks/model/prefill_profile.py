"""Where the time of a prompt goes, kind of layer by kind of layer, and how far it is from a floor.

    python -m benchmarks prefill_profile --size S,M
    python -m benchmarks prefill_profile --quick         a trial: a tiny size, no record

A model reads a prompt as `generate` does, in float32 on the CPU. Timers around each mixer add up
the seconds of each kind of layer; "rest" is the embedding, the norms before the mixers, the
additions, the last norm, the head, and Python.

The floor of a kind of layer is the time of its arithmetic if all of it ran as fast as one large
matrix product:

    floor = FLOPs by the ledger / FLOPs per second of a product of 2,048 x 2,048 x 2,048

The product is timed in each round, next to the prompt, with the same threads. No program reaches
the floor: elementwise work, such as the decay of a scan, the convolution and the sorting of tokens
by expert, has no FLOPs in the ledger, small products are slower than large ones, and memory has a
limit of its own. `of_floor` is the time divided by the floor: 1 would be perfect, and a kind of
layer with a large share of the time and a large `of_floor` is where to look.

The five operations of PyTorch with the most time of their own are listed too, from its profiler in
one more call. They say what a kind of layer does, not how long it takes without a profiler.

Left out: decoding, which is bound by the bytes of the weights, and training.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import measure
from benchmarks.model import peers
from benchmarks.record import processor, write_record
from nemotron_lite import Nemotron, NemotronConfig, ledger

SIDE = 2048  # of the large product
OPERATIONS = 5
NAMES = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}  # as the ledger calls them


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: dict[int, int]  # length of the prompt: rounds
    side: int = SIDE


FULL = Plan({512: 15, 2048: 9, 8192: 5})
QUICK = Plan({40: 2}, side=64)


@contextmanager
def timers(model: Nemotron) -> Iterator[dict[str, float]]:
    """Seconds spent in the mixers of each kind while the context is open."""
    spent = dict.fromkeys((NAMES[kind] for kind in sorted(set(model.config.pattern))), 0.0)
    handles = []
    started: list[float] = []

    def before(*_: Any) -> None:
        started.append(time.perf_counter())

    def after(name: str) -> Callable[..., None]:
        def add(*_: Any) -> None:
            spent[name] += time.perf_counter() - started.pop()

        return add

    layers: Any = model.backbone.layers
    for layer in layers:
        handles.append(layer.mixer.register_forward_pre_hook(before))
        handles.append(layer.mixer.register_forward_hook(after(NAMES[layer.kind])))
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def arithmetic(config: NemotronConfig, length: int) -> dict[str, float]:
    """FLOPs of a prompt whose last logits are wanted, by kind of layer; the head is the rest."""
    parts = ledger.flops(config, length, logits_to_keep=1).by_part
    found = {name: float(parts[name]) * length for name in NAMES.values() if name in parts}
    return found | {"rest": float(parts["head"]) * length}


def product_speed(side: int) -> float:
    """FLOPs per second of one large matrix product in float32."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    start = time.perf_counter()
    torch.mm(a, b)
    return 2 * side**3 / (time.perf_counter() - start)


def measure_length(model: Nemotron, length: int, rounds: int, side: int) -> dict[str, Any]:
    """One entry of the record: shares, floors and the largest operations for one length."""
    tokens = peers.random_tokens(model.config, 1, length)
    flops = arithmetic(model.config, length)
    peers.prefill("ours", model, tokens)
    product_speed(side)
    whole: list[float] = []
    speeds: list[float] = []
    parts: dict[str, list[float]] = {name: [] for name in flops}
    for _ in range(rounds):
        speeds.append(product_speed(side))
        with timers(model) as spent:
            start = time.perf_counter()
            peers.prefill("ours", model, tokens)
            whole.append(time.perf_counter() - start)
        spent["rest"] = whole[-1] - sum(spent.values())
        for name, seconds in spent.items():
            parts[name].append(seconds)
    entry: dict[str, Any] = {
        "what": "prefill", "length": length, "seconds": measure.summary(whole),
        "product_flops_per_second": measure.summary(speeds), "parts": {},
        "operations": operations(model, tokens),
    }  # fmt: skip
    for name, taken in parts.items():
        floors = [flops[name] / speed for speed in speeds]
        entry["parts"][name] = {
            "flops": flops[name],
            "share": measure.summary([s / w for s, w in zip(taken, whole, strict=True)]),
            "of_floor": measure.summary([s / f for s, f in zip(taken, floors, strict=True)]),
        }
    every = sum(flops.values())
    entry["of_floor"] = measure.summary(
        [w * speed / every for w, speed in zip(whole, speeds, strict=True)]
    )
    return entry


def operations(model: Nemotron, tokens: torch.Tensor) -> list[dict[str, Any]]:
    """The operations with the most time of their own: name, calls, share of the profiled time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        peers.prefill("ours", model, tokens)
    found = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in found)
    largest = sorted(found, key=lambda event: event.self_cpu_time_total, reverse=True)
    return [
        {"name": one.key, "calls": one.count, "share": one.self_cpu_time_total / total}
        for one in largest[:OPERATIONS]
    ]


def measure_size(size: str, plan: Plan) -> dict[str, Any]:
    """The record's payload for one size."""
    config = peers.SIZES[size]
    model = Nemotron(config)
    torch.manual_seed(0)
    peers.randomize(model, config)
    model.eval()
    entries = []
    for length, rounds in plan.rounds.items():
        entry = measure_length(model, length, rounds, plan.side)
        shares = ", ".join(
            f"{name} {part['share']['median']:.0%} ({part['of_floor']['median']:.1f})"
            for name, part in entry["parts"].items()
        )
        print(f"  {length} tokens: {entry['of_floor']['median']:.2f} times the floor; {shares}")
        entries.append(entry)
    return {
        "size": size, "parameters": model.num_parameters(), "path": peers.PATHS["prefill"],
        "product": f"{plan.side} x {plan.side} x {plan.side}, float32", "measurements": entries,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure. Writes `prefill_profile_SIZE_PROCESSOR.json`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks prefill_profile", allow_abbrev=False
    )
    parser.add_argument("--size", default="S,M", help="S, M, lite, or several")
    parser.add_argument("--quick", action="store_true", help="a trial: a tiny size, no record")
    asked = parser.parse_args(arguments)
    sizes = ["tiny"] if asked.quick else asked.size.split(",")
    if unknown := [size for size in sizes if size not in peers.SIZES]:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(peers.SIZES)}")
    for size in sizes:
        print(f"{size}:", flush=True)
        found = measure_size(size, QUICK if asked.quick else FULL)
        if not asked.quick:
            print(write_record(f"prefill_profile_{size}_{processor()}", found))


if __name__ == "__main__":
    main()
