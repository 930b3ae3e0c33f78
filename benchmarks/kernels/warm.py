"""Compile everything a device run will launch, ours and the peers', on all processors at once.

    python benchmarks/kernels/warm.py                    for the GPU of this machine
    python benchmarks/kernels/warm.py --arch 90          for another one; no GPU is needed
    python benchmarks/kernels/warm.py --only ssd --workers 4

A compiler works on one processor. Hundreds of kernels, one after another, would take most of a
borrowed GPU's ten minutes: mamba_ssm's autotuner alone tries about ten configurations of each of
its kernels. So device.py runs this first: the cases are dealt out to as many processes as there are
processors, each compiles its share for this GPU and launches nothing (dry_run.py), and what comes
out lies in Triton's cache, where the real launches find it. That they do depends on the same
compiler and the same specialisation; a launch that differs is compiled when it comes.

It is a rehearsal too: on a machine without a GPU it shows whether each peer still takes the
arguments that the cases give it.
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
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: this process compiles

import torch
from dry_run import SHARED_LIMIT, compile_only
from peers import MODULES, use_peers
from registry import Case, Draw, all_cases, gradients, outputs_of


def work() -> Iterator[tuple[Case, str]]:
    """Each distinct thing to compile: a case's own kernel, and its peers made of Triton."""
    seen = set()
    for case in all_cases():
        if ": " in case.name or case.compiled_as not in seen:  # ": " is another configuration
            yield case, "kernel"
        seen.add(case.compiled_as)
        yield from ((case, peer) for peer in case.peers if peer.startswith(tuple(MODULES)))


@contextlib.contextmanager
def _peers_see_a_gpu() -> Iterator[None]:
    """What peers ask torch about the GPU of their tensors, which lie on the CPU here."""
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
    """Compile what one case, or one of its peers, launches; how many kernels that were."""
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
    """Every `shares`-th piece of work from `share` on; what failed, in words."""
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
    """Deal the work out to processes of this script; what failed, in words."""
    workers = workers or os.cpu_count() or 1
    command = [sys.executable, str(Path(__file__).resolve()), "--arch", str(arch), "--only", only]
    running = [
        subprocess.Popen(
            [*command, "--share", str(share), str(workers)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for share in range(workers)
    ]  # fmt: skip
    failed = []
    for process in running:
        said = process.communicate()[1]
        if process.returncode:
            failed += said.strip().splitlines()[-20:] or [f"exit status {process.returncode}"]
    return failed


def this_gpu() -> int:
    """Compute capability of the GPU here, as 80, 90, ..."""
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA GPU here; say which one to compile for with --arch.")
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def main() -> None:
    """Compile, and say what took how long and what failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, help=f"such as {', '.join(map(str, SHARED_LIMIT))}")
    parser.add_argument("--only", default="", help="cases whose name matches (regex)")
    parser.add_argument("--workers", type=int, help="processes; as many as processors")
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
