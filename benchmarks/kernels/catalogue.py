"""Write the tables of kernels/README.md from the snapshot, the cases and the device's record.

    python -m benchmarks.kernels.catalogue           rewrite what stands between the markers
    python -m benchmarks.kernels.catalogue --check   fail if that would change anything

Measured times come from benchmarks/records/kernels_<gpu>.json, one file per GPU, written by
device.py. A case without a record is "not yet measured". Beside it stands a lower bound: the time
that the bytes or the arithmetic of the case take at the limits of an H200, 4.3 TB/s and 788 TFLOP/s
in bfloat16 (both measured once through PyTorch). The share in the records uses the limits measured
on the machine of the record.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.kernels import ROOT
from benchmarks.kernels.registry import Case, all_cases

README = ROOT / "kernels" / "README.md"
RECORDS = ROOT / "benchmarks" / "records"
SNAPSHOT = RECORDS / "kernels_aot.json"
CONSTRAINTS = ROOT / "constraints.txt"
Snapshot = dict[str, dict[str, Any]]  # Triton version -> architecture -> case -> kernels
BEGIN, END = "<!-- written by benchmarks/kernels/catalogue.py -->", "<!-- end -->"
BYTES_PER_SECOND, FLOPS_PER_SECOND = 4.3e12, 788e12


def lower_bound(case: Case) -> tuple[float, str]:
    """Microseconds that a kernel needs at least on an H200, and which limit sets them."""
    memory, arithmetic = case.bytes / BYTES_PER_SECOND, case.flops / FLOPS_PER_SECOND
    return max(memory, arithmetic) * 1e6, "bytes" if memory >= arithmetic else "FLOPs"


def measured(case: Case) -> str:
    """Median time on each recorded GPU, the share of the possible speed, and the peers' ratios."""
    found = []
    for path in sorted(set(RECORDS.glob("kernels_*.json")) - {SNAPSHOT}):
        record = json.loads(path.read_text())
        result = record["cases"].get(str(case))
        if result is None or "time_us" not in result:
            continue
        peers = ", ".join(
            f"{peer['ratio']['median']:.2f}x {name}"
            for name, peer in result.get("peers", {}).items()
            if "ratio" in peer
        )
        text = f"{result['time_us']['median']:.1f} us on {record['gpu']['name']}"
        text += f", {result['share_of_floor']:.0%}"
        found.append(f"{text}; {peers}" if peers else text)
    return "<br>".join(found) or "not yet measured"


def table_of_cases(cases: list[Case]) -> list[str]:
    """One row per case: lower bound and measured time."""
    lines = [
        "The last column has the median time, the share of the possible speed (lower bound / time)",
        "and how many times faster it is than each peer.",
        "",
        "| operation | case | lower bound on an H200 | set by | measured |",
        "| --- | --- | ---: | --- | --- |",
    ]
    for case in cases:
        if ": " in case.name:
            continue
        microseconds, reason = lower_bound(case)
        lines.append(
            f"| `{case.op}` | {case.name}, {case.shape} | {microseconds:.3g} us "
            f"| {reason} | {measured(case)} |"
        )
    return lines


def pinned() -> str:
    """The Triton version that constraints.txt pins and CI runs.

    Raises:
        ValueError: constraints.txt pins no Triton.
    """
    found = re.search(r"^triton==([\w.]+)", CONSTRAINTS.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{CONSTRAINTS.name} pins no triton: expected a line triton==<version>.")
    return found[1]


def table_of_resources(snapshot: Snapshot) -> list[str]:
    """One row per kernel: registers, stack and shared memory, with the pinned Triton version."""
    version = pinned()
    archs = snapshot[version]
    lines = [
        f"Triton {version}; registers per thread / bytes of stack (0: nothing spilled) / KiB of "
        "shared memory per block:",
        "",
        "| case | kernel | " + " | ".join(f"sm_{a}" for a in archs) + " | matrix units |",
        "| --- | --- | " + " | ".join("---:" for _ in archs) + " | --- |",
    ]
    for case, _, kernels in _rows(archs):
        cells = [_cell(kernel) for kernel in kernels.values()]
        units = [unit for kernel in kernels.values() if kernel for unit in kernel["matrix"]]
        name = next(kernel["kernel"] for kernel in kernels.values() if kernel)
        kinds = ", ".join(dict.fromkeys(units)) or "–"
        lines.append(f"| {case} | `{name}` | {' | '.join(cells)} | {kinds} |")
    return lines


def table_of_spills(snapshot: Snapshot) -> list[str]:
    """One row per kernel that spills with any Triton version: bytes of stack with each version."""
    versions = sorted(snapshot, key=lambda v: [int(part) for part in v.split(".")])
    archs = list(snapshot[pinned()])
    stacks: dict[tuple[str, int, str], dict[str, list[int]]] = {}
    for version in versions:
        for case, i, kernels in _rows(snapshot[version]):
            for place, arch in enumerate(archs):
                kernel = kernels.get(arch)
                if kernel:
                    row = stacks.setdefault((case, i, kernel["kernel"]), {})
                    row.setdefault(version, [0] * len(archs))[place] = kernel["stack"]
    lines = [
        "Bytes of stack on " + ", ".join(f"sm_{arch}" for arch in archs) + ", for each kernel that "
        "spills with any of the Triton versions that were tried:",
        "",
        "| case | kernel | " + " | ".join(versions) + " |",
        "| --- | --- | " + " | ".join("---:" for _ in versions) + " |",
    ]
    for (case, _, name), row in sorted(stacks.items()):
        if any(map(any, row.values())):
            cells = [" / ".join(map(str, row[v])) if v in row else "–" for v in versions]
            lines.append(f"| {case} | `{name}` | {' | '.join(cells)} |")
    return lines


def _rows(archs: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, dict[str, Any] | None]]]:
    """(case, number of the kernel, architecture -> that kernel), in the order of the names."""
    for case, kernels in sorted(archs[next(iter(archs))].items()):
        if ": " not in case:
            for i in range(len(kernels)):
                there = {arch: report.get(case, []) for arch, report in archs.items()}
                yield (
                    case,
                    i,
                    {a: found[i] if i < len(found) else None for a, found in there.items()},
                )


def _cell(kernel: dict[str, Any] | None) -> str:
    if kernel is None:
        return "–"
    return f"{kernel['registers']} / {kernel['stack']} / {kernel['shared'] / 1024:.3g}"


def written() -> str:
    """The README with new tables.

    Raises:
        ValueError: the README does not have both markers exactly once.
    """
    text = README.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{README.name} must have the lines {BEGIN!r} and {END!r}, each once.")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    snapshot = json.loads(SNAPSHOT.read_text())
    body = [
        "### Time", "", *table_of_cases(all_cases()), "",
        "### Resources", "", *table_of_resources(snapshot), "",
        "### Spills", "", *table_of_spills(snapshot),
    ]  # fmt: skip
    return f"{before}{BEGIN}\n\n" + "\n".join(body) + f"\n\n{END}{after}"


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if anything would change")
    if not parser.parse_args().check:
        README.write_text(written())
    elif README.read_text() != written():
        sys.exit("kernels/README.md is out of date: run python -m benchmarks.kernels.catalogue.")


if __name__ == "__main__":
    main()
