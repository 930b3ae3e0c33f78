"""The state-space operator beside the best PyTorch implementations of it by others.

    python -m benchmarks ssd_operator --peers DIR      (DIR: see ssd_peers; optional)

The aims, on two CPU cores, in float32, with 1 row, 8 heads of 64, states of 128, 1 group:

    speed      twice as fast as the best peer at 4096 tokens, forward and forward + backward
    length     the same cost per token from 1K to 64K tokens
    exactness  relative rms error of at most 1e-6 of y and of every gradient, under strong decay too

All programs get the same inputs in one process and run alternately (`measure`). Each peer runs with
the chunk length (64, 128 or 256) that was fastest for it in a trial. Errors are relative to our
implementation in float64, which is first compared with the recurrence itself.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import alternate, summary
from benchmarks.model.ssd_peers import Peer, find_peers
from benchmarks.record import write_record
from nemotron_lite.ops import selective_scan, ssd

SIZES = {"b": 1, "h": 8, "p": 64, "n": 128, "g": 1}
QUANTITIES = ("y", "dx", "ddt", "dA", "dB", "dC")
SPEED_AIM, ERROR_AIM, FLAT_AIM = 2.0, 1e-6, 1.5
CHUNKS = (64, 128, 256)


def inputs_of(tokens: int, decay: str, seed: int = 0) -> list[Tensor]:
    """x, dt, A, B, C as a Mamba layer passes them: x, B and C are slices of one tensor.

    Args:
        tokens: t.
        decay: "mixed" (A from -1 to -16, dt around 0.1) or "strong" (A from -4 to -16, dt around
            1: a token is forgotten within the next two).
        seed: of the random numbers.
    """
    b, h, p, n, g = SIZES.values()
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(b, tokens, h * p + 2 * g * n, generator=generator)
    x, B, C = whole.split([h * p, g * n, g * n], dim=-1)
    noise = torch.randn(b, tokens, h, generator=generator)
    if decay == "strong":
        A, dt = -torch.linspace(4, 16, h), 0.5 + noise.sigmoid()
    else:
        A, dt = -torch.linspace(1, 16, h), F.softplus(noise - 2.5)
    return [x.unflatten(-1, (h, p)), dt, A, B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n))]


def values_and_gradients(call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs in the order of QUANTITIES, for a fixed random gradient of y."""
    leaves = [v.detach().requires_grad_() for v in inputs]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, _gradient(y.shape, y.dtype))]


@functools.cache
def _gradient(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The gradient of y, drawn once: drawing it takes a tenth of the time that is measured."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)


def ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Our operator with its defaults; only y."""
    return ssd(x, dt, A, B, C)[0]


def relative_rms(found: Tensor, exact: Tensor) -> float | None:
    """rms(found - exact) / rms(exact); None where `found` is not finite."""
    if not found.isfinite().all():
        return None
    return float((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def measure_errors(calls: Mapping[str, Callable[..., Tensor]], tokens: int) -> list[dict[str, Any]]:
    """One entry per decay: the errors of every program, by quantity."""
    entries = []
    for decay in ("mixed", "strong"):
        wide = [v.double() for v in inputs_of(256, decay)]
        scan = values_and_gradients(lambda *v: selective_scan(*v)[0], wide)
        exact = values_and_gradients(ours, wide)
        check = max(relative_rms(a, b) or 0.0 for a, b in zip(exact, scan, strict=True))
        if check > 1e-11:
            raise AssertionError(
                f"in float64 ours differs by {check:.1e} from the recurrence ({decay} decay), "
                "expected at most 1e-11."
            )
        inputs = inputs_of(tokens, decay)
        exact = values_and_gradients(ours, [v.double() for v in inputs])
        errors: dict[str, dict[str, float | None]] = {}
        for name, call in calls.items():
            found = values_and_gradients(call, inputs)
            pairs = zip(QUANTITIES, found, exact, strict=True)
            errors[name] = {quantity: relative_rms(a, b) for quantity, a, b in pairs}
        worst = max(e if e is not None else float("inf") for e in errors["ours"].values())
        entries.append(
            {
                "what": "relative rms error against float64",
                "decay": decay,
                "tokens": tokens,
                "float64_against_recurrence": check,
                "errors": errors,
                "aim": ERROR_AIM,
                "reached": worst <= ERROR_AIM,
            }
        )
    return entries


def forward(call: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    """Without recording gradients."""
    with torch.no_grad():
        return call(*inputs)


def best_chunk(peer: Peer, inputs: list[Tensor]) -> int:
    """The chunk length with which this peer is fastest, forward and backward."""
    seconds = {}
    for chunk in CHUNKS:
        call = functools.partial(peer, chunk=chunk)
        values_and_gradients(call, inputs)
        start = time.perf_counter()
        values_and_gradients(call, inputs)
        seconds[chunk] = time.perf_counter() - start
    return min(seconds, key=lambda chunk: seconds[chunk])


def measure_speed(
    calls: Mapping[str, Callable[..., Tensor]], tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Forward, and forward + backward, of all programs; ratios round by round."""
    inputs = inputs_of(tokens, "mixed")
    entries = []
    for what, work in (("forward", forward), ("forward + backward", values_and_gradients)):
        runs = {name: functools.partial(work, call, inputs) for name, call in calls.items()}
        seconds = alternate(runs, rounds)
        faster = {
            name: summary([b / a for a, b in zip(seconds["ours"], values, strict=True)])
            for name, values in seconds.items()
            if name != "ours"
        }
        least = min(entry["median"] for entry in faster.values())
        entries.append(
            {
                "what": what,
                "tokens": tokens,
                "threads": torch.get_num_threads(),
                "seconds": {name: summary(values) for name, values in seconds.items()},
                "times_faster": faster,
                "aim": SPEED_AIM,
                "reached": least >= SPEED_AIM,
            }
        )
    return entries


def measure_length(
    calls: Mapping[str, Callable[..., Tensor]], lengths: list[int], rounds: int
) -> dict[str, Any]:
    """Microseconds per token of the forward pass by length; the lengths alternate."""
    inputs = {tokens: inputs_of(tokens, "mixed") for tokens in lengths}
    curves: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        runs = {str(t): functools.partial(forward, call, inputs[t]) for t in lengths}
        seconds = alternate(runs, rounds)
        curves[name] = {
            t: summary([1e6 * s / int(t) for s in values]) for t, values in seconds.items()
        }
        gc.collect()
    first, last = (curves["ours"][str(t)]["median"] for t in (lengths[0], lengths[-1]))
    return {
        "what": "forward, microseconds per token by length", "microseconds_per_token": curves,
        "growth_of_ours": last / first, "aim": FLAT_AIM, "reached": last / first <= FLAT_AIM,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a line per result, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--peers", type=Path, help="folder of checkouts, see ssd_peers")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--longest", type=int, default=65536, help="tokens of the longest row")
    parser.add_argument("--quick", action="store_true", help="a trial: few rounds, no record")
    asked = parser.parse_args(arguments)
    rounds = 3 if asked.quick else asked.rounds
    tokens = 1024 if asked.quick else 4096
    peers = find_peers(asked.peers)
    trial = inputs_of(tokens, "mixed")
    chunks = {name: best_chunk(peer, trial) for name, peer in peers.items()}
    calls: dict[str, Callable[..., Tensor]] = {"ours": ours}
    calls |= {name: functools.partial(peer, chunk=chunks[name]) for name, peer in peers.items()}
    lengths = [
        t for t in (1024, 4096, 16384, 65536) if t <= (4096 if asked.quick else asked.longest)
    ]

    entries = measure_speed(calls, tokens, rounds)
    for entry in entries:
        for name, faster in entry["times_faster"].items():
            milliseconds = 1e3 * entry["seconds"][name]["median"]
            print(
                f"{entry['what']:<18} ours {1e3 * entry['seconds']['ours']['median']:.1f} ms, "
                f"{name} {milliseconds:.1f} ms: {faster['median']:.2f} times faster "
                f"({faster['min']:.2f} to {faster['max']:.2f})"
            )
    entries.append(measure_length(calls, lengths, 2 if asked.quick else 3))
    for name, curve in entries[-1]["microseconds_per_token"].items():
        print(name, ", ".join(f"{t}: {v['median']:.1f} us/token" for t, v in curve.items()))
    entries.extend(measure_errors(calls, 512 if asked.quick else 4096))
    for entry in entries[-2:]:
        for name, errors in entry["errors"].items():
            found = ", ".join(
                f"{k} {'not finite' if e is None else f'{e:.1e}'}" for k, e in errors.items()
            )
            print(f"{entry['decay']:<7} {name}: {found}")
    payload = {
        "path": "`nemotron_lite.ops.ssd` with its default arguments",
        "sizes": SIZES, "chunks": chunks, "results": entries,
    }  # fmt: skip
    if not asked.quick:
        print(write_record("ssd_operator", payload))


if __name__ == "__main__":
    main()
