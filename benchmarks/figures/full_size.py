"""Figures of models that are larger than the memory, as Markdown from the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.figures.markdown import link, read, table, to_be_made, wrapped


def full_size(records: Path) -> str:
    """Models whose weights are fetched when a layer runs."""
    file = records / "full_size.json"
    if not file.exists():
        return "\n".join(to_be_made(["`python -m benchmarks full_size`"]))
    found = read(file)
    rows, notes = [], []
    for entry in found["results"]:
        if entry["what"] == "generated":
            what = f"Super in {entry['format']}, generated"
            rows.append(_full_size_row(what, entry))
            decode = entry["decode"]
            notes.append(
                f"{entry['format']}: a token of {entry['layers']} layers took "
                f"{decode['flops'] / 1e9:.2f} GFLOP and {decode['weights'] / 1e9:.2f} billion "
                f"weights; the prompt of {found['prompt']} tokens {entry['prompt']['seconds']:.1f} "
                f"s, {entry['prompt']['source_bytes'] / 1e9:.1f} GB."
            )
            continue
        for run in entry["runs"]:
            cache = "files in the page cache" if run["page_cache"] == "warm" else "empty page cache"
            rows.append(_full_size_row(f"`{entry['pattern']}` of a file, {cache}", run))
        limit = entry["runs"][0]["limit_gib"]
        notes.append(
            f"The checkpoint has {entry['checkpoint']['bytes'] / 1e9:.2f} GB; its process may ask "
            f"for {limit:g} GiB beside the {entry['runs'][0]['idle_gib']:.2f} GiB of address space "
            f"that Python and PyTorch take. Loading it into memory fails there "
            f"({entry['load_in_memory']}); without a limit it takes "
            f"{entry['in_memory_peak_gib']:.2f} GiB, and writes the same tokens."
        )
    machine = found["machine"]
    runs = [run for entry in found["results"] for run in entry.get("runs", [entry])]
    load = max(run["load_average"] for run in runs)
    text = (
        f"Record: {link(file.name, file.name)}. Median (smallest to largest) of "
        f"{found['new'] - 1} tokens. Processor: {machine['cpu']}, {machine['threads']} thread(s). "
        f"The machine had {machine['cores']} cores and a load average at most {load:.1f}, with "
        "that of the benchmark; other programs make the times longer, and change nothing else."
    )
    heads = [
        "weights", "budget", "peak memory", "seconds per token", "GB used", "GB fetched",
        "found in memory", "experts found",
    ]  # fmt: skip
    return f"{wrapped(text)}\n\n{table(heads, rows)}\n\n{wrapped(' '.join(notes))}"


def _full_size_row(what: str, run: dict[str, Any]) -> list[str]:
    decode = run["decode"]
    return [
        what,
        f"{run['budget_gib']:g} GiB",
        f"{run['peak_gib']:.2f} GiB",
        "{median:.3g} ({min:.3g} to {max:.3g})".format(**decode["seconds"]),
        f"{decode['used_bytes'] / 1e9:.2f}",
        f"{decode['source_bytes']['median'] / 1e9:.2f}",
        f"{decode['hit_rate']['median']:.0%}",
        f"{decode['expert_hit_rate']['median']:.0%}",
    ]
