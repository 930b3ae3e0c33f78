"""What SSM states in float16 cost: the loss of the shipped model over a long text, token by token.

    python -m benchmarks float16_states
    python -m benchmarks float16_states --model runs/lite-base/model

A decoder reads and writes each state at every token. In float16 each write is rounded, and the
errors of all earlier writes are in the state. So a text is read token by token, as a decoder reads
what it has written, with the text itself in place of the model's choices. Four caches read the same
tokens side by side:

    float32        the reference
    read at once   float32 too, in one pass: how far two orders of the same sums differ
    nearest        float16, rounded to nearest: writes that are small beside the state are lost
    stochastic     float16, rounded stochastically as `generate` does, with several seeds

For each stretch of the text: the change of the loss in percent for each file, the KL divergence
from the reference's distribution, and the share of tokens whose most likely next token is the same.
If errors added up, the last stretch would be worse than the first.

The files are the longest of those that the model has never seen. It was trained on pieces of 512
tokens. Left out: time (on a CPU, rounding stochastically costs more than half the memory saves),
and INT8 states.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.model import peers, shipped
from benchmarks.record import write_record
from nemotron_lite import Cache, Nemotron

EDGES = (0, 512, 1024, 2048, 4096)  # of the stretches
ROWS = 5
SEEDS = 2
REFERENCE, AT_ONCE, NEAREST, STOCHASTIC = "float32", "read at once", "nearest", "stochastic"


@dataclass
class Readings:
    """What one way of keeping the states predicted: a list entry for each token, `b` numbers each.

    Attributes:
        nll: nats of the next token of the text.
        kl: divergence of the prediction from the reference's.
        same: whether the most likely next token is the reference's.
    """

    nll: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, reference: Tensor, target: Tensor) -> None:
        """The predictions `b v` after one token."""
        p, q = (F.log_softmax(each.double(), -1) for each in (reference, logits))
        self.nll.append(-q.gather(1, target[:, None])[:, 0])
        self.kl.append((p.exp() * (p - q)).sum(-1))
        self.same.append(reference.argmax(-1) == logits.argmax(-1))


def long_rows(documents: Sequence[Any], rows: int, length: int) -> Tensor:
    """The beginnings of the longest documents, `rows length`.

    Raises:
        ValueError: there are not so many documents of that length.
    """
    longest = sorted(documents, key=len, reverse=True)[:rows]
    if len(longest) < rows or len(longest[-1]) < length:
        raise ValueError(
            f"the held-out files have {[len(d) for d in longest]} tokens: expected {rows} files of "
            f"{length} or more."
        )
    return torch.tensor([document[:length].tolist() for document in longest])


@torch.inference_mode()
def read_text(model: Nemotron, tokens: Tensor, seeds: int) -> dict[str, list[Readings]]:
    """Read tokens `b t` with every way of keeping the states; several entries for several seeds."""
    rows, length = tokens.shape

    def empty(**options: Any) -> Cache:
        return model.empty_cache(rows, capacity=length, **options)

    half = {"ssm_dtype": torch.float16}
    caches: dict[str, list[Cache]] = {
        REFERENCE: [empty()],
        NEAREST: [empty(**half, ssm_seed=None)],
        STOCHASTIC: [empty(**half, ssm_seed=seed) for seed in range(seeds)],
    }
    found = {name: [Readings() for _ in each] for name, each in caches.items()}
    found[AT_ONCE] = [Readings()]
    all_at_once = model(tokens[:, :-1]).logits
    model.prepare_for_decoding()
    started = time.perf_counter()
    for place in range(length - 1):
        now, target = tokens[:, place : place + 1], tokens[:, place + 1]
        reference = model(now, caches[REFERENCE][0]).logits[:, 0]
        found[REFERENCE][0].add(reference, reference, target)
        found[AT_ONCE][0].add(all_at_once[:, place], reference, target)
        for name in (NEAREST, STOCHASTIC):
            for cache, readings in zip(caches[name], found[name], strict=True):
                readings.add(model(now, cache).logits[:, 0], reference, target)
        if place % 512 == 511:
            print(f"  {place + 1} tokens, {time.perf_counter() - started:.0f} s", flush=True)
    return found


def compare(found: dict[str, list[Readings]], edges: Sequence[int]) -> list[dict[str, Any]]:
    """One entry for each way and stretch; rows and seeds are measurements of their own."""
    exact = torch.stack(found[REFERENCE][0].nll)
    entries: list[dict[str, Any]] = []
    for first, last in itertools.pairwise(edges):
        stretch = slice(first, last)
        base = exact[stretch].mean(0)
        entries.append(
            {
                "what": "states", "as": REFERENCE, "first": first, "last": last,
                "nats_per_token": measure.summary(base.tolist()),
            }
        )  # fmt: skip
        for name in (AT_ONCE, NEAREST, STOCHASTIC):
            changes: list[float] = []
            kl, same = [], []
            for readings in found[name]:
                mean = torch.stack(readings.nll)[stretch].mean(0)
                changes += (100 * (mean / base - 1)).tolist()
                kl.append(torch.stack(readings.kl)[stretch].mean())
                same.append(torch.stack(readings.same)[stretch].double().mean())
            entries.append(
                {
                    "what": "states", "as": name, "first": first, "last": last,
                    "change_percent": {**measure.summary(changes), "each": changes},
                    "mean_kl": float(torch.stack(kl).mean()),
                    "same_first_choice": float(torch.stack(same).mean()),
                }
            )  # fmt: skip
    return entries


def describe(entry: dict[str, Any]) -> str:
    """One line of progress."""
    where = f"tokens {entry['first']} to {entry['last']}, {entry['as']}"
    if entry["as"] == REFERENCE:
        return f"{where}: {entry['nats_per_token']['median']:.4f} nats per token"
    change = entry["change_percent"]
    return (
        f"{where}: {change['median']:+.4f} % ({change['min']:+.4f} to {change['max']:+.4f}), KL "
        f"{entry['mean_kl']:.1e}, {100 * entry['same_first_choice']:.2f} % same first choice"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write `float16_states.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks float16_states", allow_abbrev=False)
    parser.add_argument("--model", type=Path, help="a trained checkpoint folder")
    parser.add_argument("--quick", action="store_true", help="a trial: a tiny model, no record")
    asked = parser.parse_args(arguments)
    if asked.quick:
        config = peers.SIZES["tiny"]
        model, tokens = Nemotron(config, seed=0).eval(), peers.random_tokens(config, 2, 25)
        for entry in compare(read_text(model, tokens, 1), (0, 12, 24)):
            print(f"  {describe(entry)}")
        return
    trained = shipped.open_trained(asked.model)
    tokens = long_rows(trained.data.held_out.documents, ROWS, EDGES[-1] + 1)
    results = compare(read_text(trained.model, tokens, SEEDS), EDGES)
    for entry in results:
        print(f"  {describe(entry)}", flush=True)
    caches = {
        name: trained.model.empty_cache(1, capacity=1, ssm_dtype=dtype).nbytes
        for name, dtype in (("float32", None), ("float16", torch.float16))
    }
    payload = {
        "path": "model(token, cache) for every token, with model.empty_cache(ssm_dtype=...)",
        **trained.about,
        "files": ROWS, "tokens": EDGES[-1], "seeds": SEEDS,
        "cache_bytes_of_a_row": caches,
        "results": results,
    }  # fmt: skip
    print(write_record("float16_states", payload))


if __name__ == "__main__":
    main()
