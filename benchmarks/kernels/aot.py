"""Compile every case for every GPU and keep what it takes: registers, spills, memory, instructions.

    python benchmarks/kernels/aot.py                 compare with the committed snapshot
    python benchmarks/kernels/aot.py --write         write it anew (after looking at the changes)
    python benchmarks/kernels/aot.py --arch 90       one architecture
    python benchmarks/kernels/aot.py --only conv     cases whose name matches "conv"
    python benchmarks/kernels/aot.py --write --only conv   write those, leave the others as they are

No GPU is needed. The snapshot is kept per Triton version, because another compiler gives another
result: what spills nothing with one spills kilobytes with the next. A kernel may take less than the
snapshot says, never more; and it has to keep its matrix instructions. Cases that no longer exist
are dropped only by `--write` without `--only`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: this process compiles

import torch
import triton
from dry_run import SHARED_LIMIT, compile_only, resources
from registry import ROOT, Case, Draw, all_cases, gradients, outputs_of

from nemotron_lite.files import atomic_file

SNAPSHOT = ROOT / "kernels" / "aot_snapshot.json"
ARCHS = tuple(SHARED_LIMIT)
GROWS = ("registers", "stack", "shared")

# case -> kernels, each once, in the order of their launch
Report = dict[str, list[dict[str, Any]]]


def compile_case(case: Case, arch: int) -> list[dict[str, Any]]:
    """Resources of every kernel that one case launches on `arch`."""
    draw = Draw("cpu", dry=True)
    with compile_only(arch) as compiled:
        inputs = case.with_leaves(case.inputs(draw))
        found = outputs_of(case.run(**inputs))
        if case.backward:
            compiled.clear()  # the forward kernels belong to the forward case
            gradients(found, [inputs[name] for name in case.leaves], draw)
    if not compiled:
        raise RuntimeError(f"{case}: no Triton kernel was launched.")
    for kernel in compiled:
        if "enable_fp_fusion" not in kernel.asked:
            raise RuntimeError(
                f"{kernel.metadata.name} leaves fused multiply-add to Triton's default, which is "
                "another one from version to version; pass enable_fp_fusion."
            )
    kernels: dict[str, dict[str, Any]] = {}
    for kernel in compiled:
        kernels.setdefault(kernel.hash, resources(kernel).as_dict())
    return list(kernels.values())


def compile_all(arch: int, only: str = "") -> Report:
    """The report of one architecture; cases that compile the same kernels appear once."""
    report: Report = {}
    for case in all_cases():
        if re.search(only, str(case)) and case.compiled_as not in report:
            try:
                report[case.compiled_as] = compile_case(case, arch)
            except Exception as error:
                raise RuntimeError(f"{case} does not compile for sm_{arch}: {error}") from error
    return report


def over_the_limit(report: Report, arch: int) -> list[str]:
    """Kernels that no block of this GPU has the shared memory for."""
    return [
        f"{case}: {kernel['kernel']} takes {kernel['shared']} bytes of shared memory; "
        f"sm_{arch} has {SHARED_LIMIT[arch]}."
        for case, kernels in report.items()
        for kernel in kernels
        if kernel["shared"] > SHARED_LIMIT[arch]
    ]


def worse(found: Report, kept: Report) -> list[str]:
    """What has grown or gone missing since the snapshot was written."""
    faults = []
    for case, kernels in found.items():
        if case not in kept:
            faults.append(f"{case}: not in the snapshot.")
            continue
        before = _numbered(kept[case])
        for place, kernel in _numbered(kernels).items():
            old = before.get(place)
            name = f"{case}: {kernel['kernel']}"
            if old is None:
                faults.append(f"{name} is not in the snapshot.")
                continue
            faults += [
                f"{name}: {what} grew from {old[what]} to {kernel[what]}."
                for what in GROWS
                if kernel[what] > old[what]
            ]
            lost = set(old["matrix"]) - set(kernel["matrix"])
            if lost:
                faults.append(f"{name}: no {', '.join(sorted(lost))} any more.")
            if old["wide"] and not kernel["wide"]:
                faults.append(f"{name}: no 16-byte loads any more.")
    return faults + [f"{case}: gone." for case in kept if case not in found]


def _numbered(kernels: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Kernels by name and by which of that name: one function may be compiled in several ways."""
    seen: dict[str, int] = {}
    numbered = {}
    for kernel in kernels:
        name = kernel["kernel"]
        seen[name] = seen.get(name, -1) + 1
        numbered[name, seen[name]] = kernel
    return numbered


def read_snapshot(path: Path = SNAPSHOT) -> dict[str, dict[str, Report]]:
    """Triton version -> architecture -> report; empty where none was written."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_snapshot(
    reports: dict[int, Report], path: Path = SNAPSHOT, *, merge: bool = False
) -> None:
    """Write this Triton version's part of the snapshot; one kernel a line, for readable diffs.

    An architecture's report replaces the one before it. With `merge` it is a part of the cases:
    those are replaced or added, and the others stay.
    """
    kept = read_snapshot(path)
    archs = kept.setdefault(triton.__version__, {})
    for arch, report in reports.items():
        before = archs.get(str(arch), {}) if merge else {}
        archs[str(arch)] = {**before, **report}
    lines = []
    for version, archs in sorted(kept.items()):
        lines.append(f' "{version}": {{')
        for arch, report in archs.items():
            lines.append(f'  "{arch}": {{')
            for case, kernels in sorted(report.items()):
                rows = ",\n".join("    " + json.dumps(kernel) for kernel in kernels)
                lines.append(f"   {json.dumps(case)}: [\n{rows}\n   ],")
            lines[-1] = lines[-1].removesuffix(",")
            lines.append("  },")
        lines[-1] = lines[-1].removesuffix(",")
        lines.append(" },")
    lines[-1] = lines[-1].removesuffix(",")
    with atomic_file(path) as temporary:
        temporary.write_text("{\n" + "\n".join(lines) + "\n}\n")


def main() -> None:
    """Compile, compare or write, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the snapshot")
    parser.add_argument("--arch", type=int, choices=ARCHS, help="this architecture only")
    parser.add_argument("--only", default="", help="cases whose name matches (regex)")
    options = parser.parse_args()
    if not any(re.search(options.only, str(case)) for case in all_cases()):
        sys.exit(f"--only {options.only}: no case matches.")
    torch.set_num_threads(1)
    kept = read_snapshot().get(triton.__version__, {})
    faults, reports = [], {}
    for arch in [options.arch] if options.arch else ARCHS:
        report = compile_all(arch, options.only)
        reports[arch] = report
        faults += over_the_limit(report, arch)
        old = {c: k for c, k in kept.get(str(arch), {}).items() if c in report or not options.only}
        if not options.write:
            faults += [f"sm_{arch}: {fault}" for fault in worse(report, old)]
        for case, kernels in report.items():
            for kernel in kernels:
                print(
                    f"sm_{arch} {case}: {kernel['kernel']} {kernel['registers']} registers, "
                    f"{kernel['stack']} stack, {kernel['shared']} shared, "
                    f"{kernel['warps']} warps {' '.join(kernel['matrix'])}"
                )
    if options.write:
        write_snapshot(reports, merge=bool(options.only))
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
