"""Compile all that a device run will launch, our kernels and the peers', on all cores at once.

    python -m benchmarks.kernels.warm                    for the GPU of this machine
    python -m benchmarks.kernels.warm --arch 90          for another one; no GPU is needed
    python -m benchmarks.kernels.warm --only ssd --workers 4

The compiler uses one core. Compiling hundreds of kernels one after another would take most of ten
minutes on a rented GPU: mamba_ssm's autotuner alone tries about ten configurations of each of its
kernels. So device.py runs this module first. It starts one process per core; each compiles its
share of the cases for this GPU and launches nothing (dry_run.py). The results go to Triton's cache
on disk, where the real launches find them. A launch with another specialization is not found and is
compiled when it happens.

On a machine without a GPU this also shows whether each peer still accepts the arguments that the
cases pass.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time
import types
from collections.abc import Iterator

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: this process compiles

import torch

from benchmarks.kernels import ROOT
from benchmarks.kernels.dry_run import SHARED_LIMIT, compile_only
from benchmarks.kernels.peers import MODULES, use_peers
from benchmarks.kernels.registry import Case, Draw, all_cases, gradients, outputs_of


def work() -> Iterator[tuple[Case, str]]:
    """Each distinct thing to compile: the kernel of a case, and its peers written in Triton."""
    seen = set()
    for case in all_cases():
        if ": " in case.name or case.compiled_as not in seen:  # ": " is another configuration
            yield case, "kernel"
        seen.add(case.compiled_as)
        yield from ((case, peer) for peer in case.peers if peer.startswith(tuple(MODULES)))


@contextlib.contextmanager
def _peers_see_a_gpu() -> Iterator[None]:
    """Fake answers to what the peers ask torch about their GPU; the tensors are on the CPU here."""
    properties = types.SimpleNamespace(multi_processor_count=132, warp_size=32, major=9, minor=0)
    asked = {
        "device": lambda *_: contextlib.nullcontext(),
        "get_device_properties": lambda *_: properties,
    }
    before = {name: getattr(torch.cuda, name) for name in asked}
    for name, answer in asked.items():
        setattr(torch.cuda, name, answer)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(torch.cuda, name, function)


def compile_one(case: Case, name: str, arch: int) -> int:
    """Compile what one case, or one of its peers, launches; returns the number of kernels."""
    draw = Draw("cpu", dry=True)
    function = case.run if name == "kernel" else case.peers[name]
    with compile_only(arch) as compiled, _peers_see_a_gpu():
        inputs = case.with_leaves(case.inputs(draw))
        found = outputs_of(function(**inputs))
        if case.backward:
            learned = [y for y in found if y.requires_grad]
            gradients(learned, [inputs[leaf] for leaf in case.leaves], draw)
    return len({kernel.hash for kernel in compiled})


def compile_share(arch: int, only: str, share: int, shares: int) -> list[str]:
    """Compile every `shares`-th piece of work, starting at `share`; returns error messages."""
    missing = {name for name, found in use_peers().items() if found.startswith("left out")}
    failed = []
    for i, (case, name) in enumerate(w for w in work() if re.search(only, str(w[0]))):
        if i % shares != share or any(name.startswith(peer) for peer in missing):
            continue
        start = time.perf_counter()
        try:
            count = compile_one(case, name, arch)
        except Exception as error:
            failed.append(f"{case}, {name}: {type(error).__name__}: {error}"[:400])
            continue
        print(
            f"{time.perf_counter() - start:6.1f} s  {count:3} kernels  {case}, {name}", flush=True
        )
    return failed


def compile_in_parallel(arch: int, only: str = "", workers: int | None = None) -> list[str]:
    """Compile all in `workers` processes of this module; returns error messages."""
    workers = workers or os.cpu_count() or 1
    command = [sys.executable, "-m", "benchmarks.kernels.warm"]
    command += ["--arch", str(arch), "--only", only]
    running = [
        subprocess.Popen(
            [*command, "--share", str(share), str(workers)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for share in range(workers)
    ]
    failed = []
    for process in running:
        said = process.communicate()[1]
        if process.returncode:
            failed += said.strip().splitlines()[-20:] or [f"exit status {process.returncode}"]
    return failed


def this_gpu() -> int:
    """Compute capability of the GPU here, as 80, 90, ..."""
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA GPU here; name the architecture to compile for with --arch.")
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def main() -> None:
    """Compile; print the times and the errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, help=f"such as {', '.join(map(str, SHARED_LIMIT))}")
    parser.add_argument("--only", default="", help="cases whose name matches (regex)")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument("--share", type=int, nargs=2, metavar=("I", "N"), help="one worker's part")
    options = parser.parse_args()
    arch = options.arch or this_gpu()
    if options.share:
        failed = compile_share(arch, options.only, *options.share)
    else:
        start = time.perf_counter()
        failed = compile_in_parallel(arch, options.only, options.workers)
        print(f"compiled for sm_{arch} in {time.perf_counter() - start:.0f} s")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
