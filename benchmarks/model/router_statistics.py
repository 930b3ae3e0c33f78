"""What the router statistics in the training log cost: their share of an update.

    python -m benchmarks router_statistics            the model `lite`, about two minutes
    python -m benchmarks router_statistics --quick    a tiny model, no record

After every update the loop computes load, MaxVio, entropy and unused experts of each router
(`train/balance.py`) and writes them into log.jsonl. Both are timed beside the update they belong
to: the statistics from the loads of that update, and the line of the log with and without them.
The share has to stay below 1 %.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.record import write_record
from nemotron_lite import Nemotron, NemotronConfig
from nemotron_lite.data import BatchSource, prepare
from nemotron_lite.train import TrainConfig, loop
from nemotron_lite.train.balance import router_balance
from nemotron_lite.train.run_log import open_log

AIM = 0.01  # of an update
LITE = NemotronConfig.from_preset("lite")
TINY = LITE.replace(
    pattern="MEE", vocab_size=300, hidden_size=64, moe_latent_size=16, mtp_pattern="", mtp_depths=0
)
SHAPES = ((2, 256), (8, 512))  # rows and tokens per row: the default, and the shipped model's


def measure_shares(
    config: NemotronConfig, data: BatchSource, shapes: Sequence[tuple[int, int]], rounds: int
) -> list[dict[str, Any]]:
    """Seconds of an update and of its statistics, for each shape of a batch."""
    results = []
    for batch_size, length in shapes:
        recipe = TrainConfig(
            steps=10_000, batch_size=batch_size, seq_len=length, optimizer="muon", precision="bf16"
        )
        run = loop._Run(Nemotron(config, seed=0).train(), data, recipe, None)
        seconds: dict[str, list[float]] = {"update": [], "statistics": [], "log line": []}
        with tempfile.TemporaryDirectory() as folder, run.precision:
            log, _ = open_log(Path(folder), 0)
            for number in range(rounds + 1):
                taken, record = _timed(run._update)
                loads = {n: torch.tensor(r["load"]) for n, r in record["routers"].items()}
                statistics, _ = _timed(
                    lambda loads=loads: {n: b._asdict() for n, b in router_balance(loads).items()}
                )
                with_them, _ = _timed(lambda record=record: log.write(record))
                del record["routers"]
                without, _ = _timed(lambda record=record: log.write(record))
                if number:  # the first update is slower
                    seconds["update"].append(taken)
                    seconds["statistics"].append(statistics)
                    seconds["log line"].append(max(0.0, with_them - without))
            log.close()
        shares = [
            (a + b) / update
            for a, b, update in zip(
                seconds["statistics"], seconds["log line"], seconds["update"], strict=True
            )
        ]
        entry: dict[str, Any] = {
            "what": "router statistics", "batch_size": batch_size, "length": length,
            "routers": len(loads), "experts": config.n_routed_experts,
            "seconds": {name: measure.summary(values) for name, values in seconds.items()},
            "share": measure.summary(shares), "aim": AIM,
        }  # fmt: skip
        entry["reached"] = entry["share"]["median"] < AIM
        print(
            f"{batch_size} x {length}: {entry['share']['median']:.3%} of an update of "
            f"{entry['seconds']['update']['median']:.2f} s (largest {entry['share']['max']:.3%})",
            flush=True,
        )
        results.append(entry)
    return results


def _timed(call: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write `router_statistics.json`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks router_statistics", allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="a trial: a tiny size, no record")
    asked = parser.parse_args(arguments)
    config = TINY if asked.quick else LITE
    data = prepare(vocab_size=config.vocab_size)
    results = measure_shares(
        config, data, [(1, 32)] if asked.quick else SHAPES, 2 if asked.quick else 20
    )
    if not asked.quick:
        payload = {
            "model": "lite", "parameters": Nemotron(LITE, device="meta").num_parameters(),
            "path": "one update of `train`, `router_balance` of its loads, and the line of the log",
            "results": results,
        }  # fmt: skip
        print(write_record("router_statistics", payload))


if __name__ == "__main__":
    main()
