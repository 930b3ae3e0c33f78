"""Write the tables of kernels/README.md from the snapshot, the cases and the device's record.

    python kernels/benchmarks/catalogue.py           rewrite what stands between the markers
    python kernels/benchmarks/catalogue.py --check   fail if that would change anything

Times come from benchmarks/records/kernels_*.json, one file per GPU, which device.py writes. Where
there is none the catalogue says so. The floor is what the bytes or the arithmetic of a case take at
the ceilings of an H200, 4.3 TB/s and 788 TFLOP/s in bfloat16 (both measured once through PyTorch);
records carry the ceilings of their own machine.
"""

from __future__ import annotations

import argparse
import json
import sys

from registry import ROOT, Case, all_cases

README = ROOT / "kernels" / "README.md"
SNAPSHOT = ROOT / "kernels" / "aot_snapshot.json"
RECORDS = ROOT / "benchmarks" / "records"
BEGIN, END = "<!-- written by kernels/benchmarks/catalogue.py -->", "<!-- end -->"
BYTES_PER_SECOND, FLOPS_PER_SECOND = 4.3e12, 788e12


def floor(case: Case) -> tuple[float, str]:
    """Microseconds that no kernel can do without on an H200, and what they are spent on."""
    memory, arithmetic = case.bytes / BYTES_PER_SECOND, case.flops / FLOPS_PER_SECOND
    return max(memory, arithmetic) * 1e6, "bytes" if memory >= arithmetic else "FLOPs"


def measured(case: Case) -> str:
    """Median time of each GPU's record, its share of that machine's floor, and the peers."""
    found = []
    for path in sorted(RECORDS.glob("kernels_*.json")):
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
        text += f", {result['share_of_floor']:.0%} of the floor"
        found.append(f"{text}; {peers}" if peers else text)
    return "<br>".join(found) or "not yet measured"


def table_of_cases(cases: list[Case]) -> list[str]:
    """One row a case: floor and time."""
    lines = [
        "| operation | case | floor on an H200 | set by | measured |",
        "| --- | --- | ---: | --- | --- |",
    ]
    for case in cases:
        if ": " in case.name:
            continue
        microseconds, reason = floor(case)
        lines.append(
            f"| `{case.op}` | {case.name}, {case.shape} | {microseconds:.3g} us | {reason} "
            f"| {measured(case)} |"
        )
    return lines


def table_of_resources(snapshot: dict[str, dict]) -> list[str]:
    """One row a kernel: registers, stack bytes and shared memory, for each architecture."""
    lines = []
    for version, archs in snapshot.items():
        names = list(archs)
        lines += [
            f"Triton {version}; registers a thread / bytes of stack (0: nothing spilled) / KiB of "
            "shared memory a block:",
            "",
            "| case | kernel | " + " | ".join(f"sm_{a}" for a in names) + " | matrix units |",
            "| --- | --- | " + " | ".join("---:" for _ in names) + " | --- |",
        ]
        for case, kernels in sorted(archs[names[0]].items()):
            if ": " in case:
                continue
            for i, first in enumerate(kernels):
                cells, units = [], []
                for arch in names:
                    there = archs[arch].get(case, [])
                    kernel = there[i] if i < len(there) else None
                    cells.append("–" if kernel is None else _cell(kernel))
                    units += kernel["matrix"] if kernel else []
                lines.append(
                    f"| {case} | `{first['kernel']}` | {' | '.join(cells)} "
                    f"| {', '.join(dict.fromkeys(units)) or '–'} |"
                )
        lines.append("")
    return lines[:-1]


def _cell(kernel: dict) -> str:
    return f"{kernel['registers']} / {kernel['stack']} / {kernel['shared'] / 1024:.3g}"


def written() -> str:
    """The README with fresh tables.

    Raises:
        ValueError: the README has lost its markers.
    """
    text = README.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{README.name} needs the lines {BEGIN!r} and {END!r}, once each.")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    snapshot = json.loads(SNAPSHOT.read_text())
    body = [
        "### Time", "", *table_of_cases(all_cases()), "",
        "### Resources", "", *table_of_resources(snapshot),
    ]  # fmt: skip
    return f"{before}{BEGIN}\n\n" + "\n".join(body) + f"\n\n{END}{after}"


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if anything would change")
    if not parser.parse_args().check:
        README.write_text(written())
    elif README.read_text() != written():
        sys.exit("kernels/README.md is out of date: run python kernels/benchmarks/catalogue.py.")


if __name__ == "__main__":
    main()
