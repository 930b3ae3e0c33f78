"""On a GPU: check every case against float64, twice, then time it, and write a record.

    python -m benchmarks.kernels.device                  everything
    python -m benchmarks.kernels.device --check          no timing
    python -m benchmarks.kernels.device --only "norm|conv"   cases whose name matches
    python -m benchmarks.kernels.device --minutes 9      as many cases as fit into nine minutes
    python -m benchmarks.kernels.device --rounds 30      more measurements of each
    python -m benchmarks.kernels.device --begin 40       start at the 41st case

1. Everything is compiled, on all cores at once (warm.py), including the peers.
2. Limits of this machine: the speed of a copy and of a bfloat16 matrix product, on random data.
3. Each case runs on random inputs, with uninitialized memory filled with NaN. Every output, or
   gradient, must be within its tolerance of the definition in float64, and a second run must give
   the same bits.
4. Each case that passed is timed: a CUDA graph of calls whose inputs rotate through more memory
   than the L2 cache holds, so that no call finds its inputs in the cache. The peers run alternately
   with it.

The cases that the models run come first, then the alternative configurations. With `--minutes` no
case starts after that time; the record names the cases that were not reached.

The record is benchmarks/records/kernels_<gpu>.json. It is written again after each case, so that an
interrupted run keeps what it has measured. A case that fails is recorded with its errors and
without a time, and the exit status is 1. After an illegal memory access CUDA is unusable in this
process, so a new process continues with the next case. Cases of earlier runs with the same versions
stay in the record, each with its date: ten minutes of a rented GPU are enough for one part, and
`--only` measures the next.

Peers that are not installed are left out; the record names them and the reason. peers.py says how
to install them. Left out: locked clocks, since a rented machine does not allow them; the spread
shows how much the times vary.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.kernels import ROOT
from benchmarks.kernels.peers import use_peers
from benchmarks.kernels.registry import Case, Draw, Inputs, all_cases, gradients, outputs_of

Call = Callable[[], Any]
DEVICE = "cuda"
COPIED, SQUARE = 2**29, 8192  # floats of the copy, side of the product: see measure_ceilings


def relative_rms(found: Tensor, exact: Tensor) -> float:
    """rms(found - exact) / rms(exact); inf where anything is not finite."""
    if not found.isfinite().all():
        return float("inf")
    error = (found.double() - exact.double()).square().mean().sqrt()
    return float(error / exact.double().square().mean().sqrt().clamp(min=1e-30))


def evaluate(case: Case, function: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """Outputs, or gradients for a fixed random gradient of the outputs; does not change inputs."""
    own = {k: v.clone() if k in case.in_place else v for k, v in inputs.items()}
    own = {k: v.detach() if isinstance(v, Tensor) else v for k, v in own.items()}
    with torch.set_grad_enabled(case.backward):
        own = case.with_leaves(own)
        found = outputs_of(function(**own))
        if case.backward:
            draw = Draw(DEVICE, seed=1)
            found = gradients(found, [own[name] for name in case.leaves], draw)
    return [x.detach() for x in found]


def wide(inputs: Inputs) -> Inputs:
    """The inputs with all floats converted to float64."""
    return {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }


def check(case: Case) -> dict[str, Any]:
    """Errors of every output, and whether two runs give the same bits."""
    inputs = case.inputs(Draw(DEVICE))
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        first = evaluate(case, case.run, inputs)
        second = evaluate(case, case.run, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    exact = evaluate(case, case.exact, wide(inputs))
    errors = [relative_rms(a, b) for a, b in zip(first, exact, strict=True)]
    allowed = case.tolerance
    limits = [allowed] * len(errors) if isinstance(allowed, float) else list(allowed)
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    within = all(e <= limit for e, limit in zip(errors, limits, strict=True))
    return {
        # JSON has no infinity.
        "errors": [e if e < float("inf") else None for e in errors],
        "tolerances": limits,
        "same_bits_twice": same,
        "passed": within and same,
    }


def calls(case: Case, function: Callable[..., Any], sets: list[Inputs]) -> list[Call]:
    """One call per set of inputs; for a backward case the forward pass runs here, before timing."""
    prepared: list[Call] = []
    for inputs in sets:
        own = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        if not case.backward:
            prepared.append(lambda own=own: function(**own))
            continue
        own = case.with_leaves(own)
        found = [y for y in outputs_of(function(**own)) if y.requires_grad]
        leaves = [own[name] for name in case.leaves]
        given = [torch.randn_like(y) for y in found]
        prepared.append(
            lambda found=found, leaves=leaves, given=given: torch.autograd.grad(
                found, leaves, given, retain_graph=True
            )
        )
    return prepared


def graph_of(case: Case, function: Callable[..., Any], sets: list[Inputs]) -> tuple[Call, str]:
    """All calls as one CUDA graph, so that only GPU time counts; one by one if capturing fails.

    Everything runs on one separate stream: autograd runs a backward pass on the stream of its
    forward pass, and a capture records only its own stream. The returned call keeps the tensors
    alive that a replay reads: a graph stores addresses only and does not own the memory.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work = calls(case, function, sets)
        for call in work:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            kept = [call() for call in work]
    except RuntimeError as error:
        torch.cuda.synchronize()
        return lambda: [call() for call in work], f"launched one by one: {error}"[:120]
    return lambda kept=(work, kept): graph.replay(), "CUDA graph"


def microseconds(replay: Call, count: int) -> float:
    """GPU time of one of the `count` calls of a replay."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3 / count


def summary(values: list[float]) -> dict[str, float]:
    """n, median and quartiles."""
    q1, median, q3 = statistics.quantiles(values, n=4)
    return {"n": len(values), "median": median, "q1": q1, "q3": q3}


def rotating_inputs(case: Case) -> list[Inputs]:
    """Sets of inputs that together are larger than twice the L2 cache; at least three."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(3, min(64, 2 * cache // max(1, case.bytes) + 1))
    return [case.inputs(Draw(DEVICE, seed=seed)) for seed in range(count)]


def measure(case: Case, rounds: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """Times of the kernel and of each peer, run alternately; ratios within each round.

    `floor_us` is the lower bound of the time: bytes or FLOPs at the limits of this machine.
    """
    sets = rotating_inputs(case)
    replays, result, skipped = {}, {}, {}
    for name, function in {"kernel": case.run, **case.peers}.items():
        try:
            with torch.set_grad_enabled(case.backward):
                replays[name], how = graph_of(case, function, sets)
            result[name] = {"how": how}
        except Exception as error:
            if name == "kernel":
                raise
            skipped[name] = f"{type(error).__name__}: {error}"[:200]
    times: dict[str, list[float]] = {name: [] for name in replays}
    for round_number in range(rounds + 1):
        names = list(replays) if round_number % 2 == 0 else list(reversed(replays))
        for name in names:
            took = microseconds(replays[name], len(sets))
            if round_number:  # the first is a warm-up
                times[name].append(took)
    bound = max(case.bytes / ceilings["bytes_per_s"], case.flops / ceilings["flops_per_s"]) * 1e6
    own = times.pop("kernel")
    peers = {
        name: {
            **result[name],
            "time_us": summary(took),
            "ratio": summary([theirs / ours for theirs, ours in zip(took, own, strict=True)]),
        }
        for name, took in times.items()
    }
    return {
        **result["kernel"],
        "time_us": summary(own),
        "floor_us": bound,
        "share_of_floor": bound / statistics.median(own),
        "input_sets": len(sets),
        "peers": peers,
        "peers_skipped": skipped,
    }


def measure_ceilings() -> dict[str, float]:
    """Bytes per second of a 2 GiB copy, FLOP/s of an 8192^3 bfloat16 product; best of ten."""
    source = torch.randn(COPIED, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(SQUARE, SQUARE, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        target.copy_(source)
        a @ b
    copy = min(microseconds(lambda: target.copy_(source), 1) for _ in range(10))
    product = min(microseconds(lambda: a @ b, 1) for _ in range(10))
    return {
        "bytes_per_s": 2 * source.nbytes / copy * 1e6,
        "flops_per_s": 2 * SQUARE**3 / product * 1e6,
    }


def judge(case: Case, rounds: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """Check one case; time it if it passed and there are `ceilings`. Errors go into the result."""
    try:
        result = check(case)
        if result["passed"] and ceilings:
            result |= measure(case, rounds, ceilings)
    except Exception as error:
        result = {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
    return {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **result}


def broken() -> bool:
    """Whether a kernel has made CUDA unusable for this process."""
    try:
        torch.cuda.synchronize()
        return False
    except RuntimeError:
        return True


def warm(arch: int, only: str) -> str:
    """Compile everything beforehand (warm.py, in a subprocess); returns its output."""
    command = [sys.executable, "-m", "benchmarks.kernels.warm"]
    command += ["--arch", str(arch), "--only", only]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return (done.stdout + done.stderr).strip()


def in_order(only: str) -> list[Case]:
    """Cases of the models first, then alternative configurations, in the order of the files."""
    cases = [case for case in all_cases() if re.search(only, str(case))]
    return sorted(cases, key=lambda case: ": " in case.name)


def earlier(name: str) -> dict[str, Any]:
    """Cases of the existing record, if it was made with the versions that run now."""
    path = record.RECORDS / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found["cases"] if found.get("versions") == record.versions(record.PACKAGES) else {}


def line(case: Case, result: dict[str, Any]) -> str:
    """One line of progress."""
    took = "not timed"
    if "time_us" in result:
        took = f"{result['time_us']['median']:.1f} us, "
        took += f"{result['share_of_floor']:.0%} of the possible speed"
        for name, peer in result["peers"].items():
            took += f", {peer['ratio']['median']:.2f}x {name}"
    found = result.get("errors", result.get("error"))
    return f"{'ok  ' if result['passed'] else 'FAIL'} {case}: {took}; errors {found}"


def continue_in_a_new_process(
    options: argparse.Namespace, began: float, done: int, failed: list[str]
) -> None:
    """Replace this process by a new one that continues after the cases of this one."""
    print("CUDA is unusable in this process; a new process continues", flush=True)
    os.chdir(ROOT)  # where `-m` finds this module
    command = [sys.executable, "-m", "benchmarks.kernels.device"]
    command += ["--cold", "--only", options.only]
    command += ["--rounds", str(options.rounds), "--begin", str(options.begin + done)]
    command += ["--check"] if options.check else []
    if options.minutes is not None:
        left = options.minutes - (time.monotonic() - began) / 60
        command += ["--minutes", str(max(0.0, left))]
    os.execv(sys.executable, command + [word for name in failed for word in ("--failed", name)])


def main() -> None:
    """Compile, check, time, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="check only, write nothing")
    parser.add_argument("--only", default="", help="cases whose name matches (regex)")
    parser.add_argument("--rounds", type=int, default=20, help="measurements of each case")
    parser.add_argument("--minutes", type=float, help="start no case after this time")
    parser.add_argument("--cold", action="store_true", help="do not compile everything beforehand")
    parser.add_argument("--begin", type=int, default=0, help="skip this many cases")
    parser.add_argument(
        "--failed", action="append", default=[], help="cases that failed before --begin"
    )
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # before all_cases() imports triton
    began = time.monotonic()
    cases = in_order(options.only)[options.begin :]
    if options.rounds < 4:
        sys.exit(
            f"--rounds {options.rounds}: expected at least 4, for the median and the quartiles."
        )
    if not cases:
        sys.exit(f"--only {options.only} --begin {options.begin}: no case matches.")
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA GPU here. `python -m benchmarks.kernels.aot` needs none.")
    peers = use_peers()
    print("\n".join(f"{name}: {found}" for name, found in peers.items()), flush=True)
    gpu = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    if not options.cold:
        print(warm(10 * major + minor, options.only), flush=True)
    name = "kernels_" + "".join(c if c.isalnum() else "_" for c in gpu.lower())
    ceilings = {} if options.check else measure_ceilings()
    results: dict[str, Any] = {}
    for i, case in enumerate(cases):
        late = [str(c) for c in cases[i:]]
        if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            print(f"{len(late)} cases not reached: {', '.join(late)}")
            break
        results[str(case)] = judge(case, options.rounds, ceilings)
        print(line(case, results[str(case)]), flush=True)
        dead = broken()
        if not dead:
            torch.cuda.empty_cache()
        if not options.check:
            payload = {
                "path": "the public functions of nemotron_kernels",
                "gpu": {"name": gpu, "capability": f"{major}.{minor}"},
                "ceilings": ceilings,
                "peers": peers,
                "not_reached": late[1:],
                "cases": {**earlier(name), **results},
            }
            path = record.write_record(name, payload)
        if dead and late[1:]:
            failed = options.failed + [k for k, v in results.items() if not v["passed"]]
            continue_in_a_new_process(options, began, len(results), failed)
    if not options.check and results:
        print(path)
    failed = options.failed + [k for k, result in results.items() if not result["passed"]]
    if failed:
        done = options.begin + len(results)
        sys.exit(f"{len(failed)} of {done} cases failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
