"""How the cost of a prompt grows with its length, from 1K to 64K tokens: time and cache.

    python -m benchmarks growth            size S; transformers up to 32K tokens

The Mamba layers of a hybrid take the same time for every token, and their cache has the same size
for every length of text. Only the few attention layers read all earlier tokens and store keys and
values for each. This benchmark measures both and writes the record behind docs/growth.svg:

    seconds    of one prefill, ours and transformers', run alternately
    bytes      of the cache afterwards, by kind: keys and values, convolution, SSM
    all_attention_bytes    of a cache if every Mamba layer were an attention layer (computed)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from benchmarks import measure, plot
from benchmarks.model import peers
from benchmarks.record import write_record
from nemotron_lite import Cache, Nemotron, NemotronConfig, ledger
from nemotron_lite.layers import KVCache, MambaCache

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
PEER_LIMIT = 32768  # with longer prompts transformers takes minutes and gigabytes


def rounds_for(length: int) -> int:
    """Fewer rounds for long prompts."""
    return 5 if length <= 4096 else 3 if length <= 16384 else 2


def cache_bytes(cache: Cache, length: int) -> dict[str, int]:
    """Bytes of a cache that are in use: keys and values up to `length`, and all other caches."""
    found = {"kv": 0, "conv": 0, "ssm": 0}
    for layer in cache.layers:
        if isinstance(layer, KVCache):
            found["kv"] += layer.k[:, :, :length].nbytes + layer.v[:, :, :length].nbytes
        elif isinstance(layer, MambaCache):
            found["conv"] += layer.conv.nbytes
            found["ssm"] += layer.ssm.nbytes
    return found


def all_attention_bytes(config: NemotronConfig, length: int) -> int:
    """Bytes of keys and values in float32 if every Mamba layer were an attention layer."""
    attention = config.replace(pattern=config.pattern.replace("M", "*"))
    return ledger.cache(attention, length, kv_dtype="float32").kv


def measure_length(
    ours: Nemotron, peer: nn.Module | None, length: int, rounds: int
) -> dict[str, Any]:
    """Time of one prefill and size of its cache."""
    tokens = peers.random_tokens(ours.config, 1, length)
    caches: list[Cache] = []

    def prefill_ours() -> None:
        caches[:] = [peers.prefill("ours", ours, tokens)[1]]

    calls: dict[str, Callable[[], object]] = {"ours": prefill_ours}
    if peer is not None:
        calls["peer"] = partial(peers.prefill, "peer", peer, tokens)
    seconds = measure.alternate(calls, rounds, warmup=1 if length <= 8192 else 0)
    in_use = cache_bytes(caches[0], length)
    expected = ledger.cache(ours.config, length, kv_dtype="float32", conv_dtype="float32")
    if in_use != {"kv": expected.kv, "conv": expected.conv, "ssm": expected.ssm}:
        raise RuntimeError(f"the cache uses {in_use} bytes, but the ledger expects {expected}.")
    entry: dict[str, Any] = {
        "what": "growth",
        "length": length,
        "seconds": {name: measure.summary(values) for name, values in seconds.items()},
        "microseconds_per_token": {
            name: measure.summary([1e6 * s / length for s in values])
            for name, values in seconds.items()
        },
        "state_bytes": in_use,
        "all_attention_bytes": all_attention_bytes(ours.config, length),
    }
    return entry


def main(arguments: list[str] | None = None) -> None:
    """Measure, write `growth.json`, draw `docs/growth.svg`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks growth", allow_abbrev=False)
    parser.add_argument("--size", default="S", choices=["S", "M"])
    parser.add_argument("--peer-limit", type=int, default=PEER_LIMIT, help="tokens")
    parser.add_argument("--quick", action="store_true", help="a trial: a tiny size, no record")
    asked = parser.parse_args(arguments)
    size = "tiny" if asked.quick else asked.size
    ours, peer = peers.build_pair(size)
    difference = peers.check_same_model(ours, peer)
    results = []
    for length in (64, 128) if asked.quick else LENGTHS:
        rounds = 2 if asked.quick else rounds_for(length)
        timed_peer = peer if length <= asked.peer_limit else None
        results.append(measure_length(ours, timed_peer, length, rounds))
        print(measure.describe(results[-1]), flush=True)
    if not asked.quick:
        payload = {
            "size": size, "path": peers.PATHS["prefill"],
            "largest_logit_difference": difference, "results": results,
        }  # fmt: skip
        path = write_record("growth", payload)
        print(path)
        print(plot.draw(path))


if __name__ == "__main__":
    main()
