"""Figures of speed beside other programs, as Markdown from the records.

Ratios are medians, with two decimals. If one part of the model benchmark was measured again alone
(a record `model_speed_S-decode.json`, say), the newer record counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures.markdown import lengths, link, read, size_of, table, to_be_made, wrapped

SIZES = ("S", "M")
PEER_SIZES = ("S", "M", "lite")


class Entries:
    """The measurements of one model size by what was done, each from the newest record with it."""

    def __init__(self, found: Iterable[tuple[str, dict[str, Any]]]) -> None:
        self.parameters = 0
        self.source: dict[str, str] = {}
        self.processors: set[str] = set()
        self._entries: dict[str, list[dict[str, Any]]] = {}
        for name, one in sorted(found, key=lambda pair: pair[1]["date"]):
            self.parameters = one["parameters"]
            self.processors.add(one["machine"]["cpu"])
            groups: dict[str, list[dict[str, Any]]] = {}
            for entry in one["measurements"]:
                groups.setdefault(entry["what"], []).append(entry)
            self._entries |= groups
            self.source |= dict.fromkeys(groups, name)

    def of(self, what: str, **labels: int) -> list[dict[str, Any]]:
        """All entries of one kind, in order; with labels, only those that have them.

        Raises:
            ValueError: there are none.
        """
        found = [
            entry
            for entry in self._entries.get(what, [])
            if all(entry[label] == value for label, value in labels.items())
        ]
        if not found:
            raise ValueError(f"no record has {what!r} {labels or ''}: run model_speed first.")
        return found

    def times(self, what: str, **labels: int) -> str:
        """Their ratios, as "1.98 / 2.35"."""
        ratios = (entry["times_faster"]["median"] for entry in self.of(what, **labels))
        return " / ".join(f"{ratio:.2f}" for ratio in ratios)


def newest(records: Path, stem: str) -> Entries:
    """The records of a benchmark: the whole one, and those of its parts."""
    files = [*records.glob(f"{stem}.json"), *records.glob(f"{stem}-*.json")]
    return Entries((file.name, read(file)) for file in files)


def processors(records: Path, stem: str) -> list[str]:
    """The processors on which a benchmark was measured, as they stand in the names of records.

    Args:
        records: the folder.
        stem: what stands before the processor, such as "cpu_peers_M". Records of parts, whose
            names go on with "-", do not count.
    """
    names = (file.stem.removeprefix(f"{stem}_") for file in records.glob(f"{stem}_*.json"))
    return sorted(name for name in names if "-" not in name)


def peers_by_processor(records: Path, size: str) -> dict[str, Path]:
    """The records of `cpu_peers` at one size, by processor."""
    stem = f"cpu_peers_{size}"
    return {name: records / f"{stem}_{name}.json" for name in processors(records, stem)}


def model(records: Path) -> str:
    """The whole model beside transformers, at both sizes, on each processor."""
    found = processors(records, f"model_speed_{SIZES[0]}")
    missing = [
        f"`python -m benchmarks model_speed` on {name}"
        for name in processors(records, "cpu_peers_M")
        if name not in found
    ]
    return "\n\n".join([*(_model_on(records, name) for name in found), *to_be_made(missing)])


def _model_on(records: Path, processor: str) -> str:
    speeds = {size: newest(records, f"model_speed_{size}_{processor}") for size in SIZES}
    sizes = []
    for size, entries in speeds.items():
        files: dict[str, list[str]] = {}
        for what, file in entries.source.items():
            files.setdefault(file, []).append(what)
        whole = max(files, key=lambda file: len(files[file]))
        links = ", ".join(
            link(file, "record" if file == whole else file.partition("-")[2][: -len(".json")])
            for file in files
        )
        sizes.append(f"size {size} has {entries.parameters / 1e6:.0f} million parameters ({links})")
    processors = sorted(set.union(*(entries.processors for entries in speeds.values())))
    text = f"Here {' and '.join(sizes)}. Processor: {', '.join(processors)}."

    rows: list[Sequence[str]] = []

    def row(name: str, what: str, **labels: int) -> None:
        rows.append([name, *(entries.times(what, **labels) for entries in speeds.values())])

    first = speeds[SIZES[0]]
    row(f"prefill of {lengths(first.of('prefill'), 'length')} tokens", "prefill")
    for batch, rows_named in ((1, "one row"), (8, "eight rows")):
        behind = lengths(first.of("decode", batch=batch), "context")
        row(f"decoding {rows_named} after {behind} tokens", "decode", batch=batch)
    shares = [
        f"{entries.times('train')}, with {100 * share['share_of_peer']:.0f} % of the memory"
        for entries in speeds.values()
        for share in entries.of("train memory")
    ]
    rows.append(["training step, four rows of 512 tokens", *shares])
    narrow = lengths(first.of("bf16"), "length")
    row(f"prefill of {narrow} tokens, both in bfloat16", "bf16 against the peer's")
    row("the same, our bfloat16 against transformers' float32", "bf16 against the peer's float32")
    row("the same, our bfloat16 against our float32", "bf16")
    row("one matrix product of ours, bfloat16 against float32", "bf16 bare product")
    return f"{wrapped(text)}\n\n{table(['work', *speeds], rows)}"


def cpu_peers(records: Path) -> str:
    """Ours beside each peer on each processor, at each size that has a record."""
    parts, missing = [], []
    sizes = {size: peers_by_processor(records, size) for size in PEER_SIZES}
    for name in sorted(set().union(*sizes.values())) or ["any processor"]:
        for size, measured in sizes.items():
            if name in measured:
                parts.append(_peers(measured[name], size))
            else:
                missing.append(f"`python -m benchmarks cpu_peers --size {size}` on {name}")
    return "\n\n".join([*parts, *to_be_made(missing)])


def _peers(file: Path, size: str) -> str:
    """One size on one processor."""
    found = read(file)
    entries = found["measurements"]
    peers = list(dict.fromkeys(name for entry in entries for name in entry["times_faster"]))
    rows = []
    for entry in entries:
        length = lengths([entry], "length" if "length" in entry else "context")
        work = f"{entry['what']}, {length} tokens"
        if "batch" in entry:
            count = {1: "one row", 8: "eight rows"}[entry["batch"]]
            work = f"{entry['what']}, {count} after {length} tokens"
        ratios = (entry["times_faster"].get(name) for name in peers)
        rows.append(
            [
                work,
                f"{entry['tokens_per_second']['ours']:,.0f}",
                *("–" if ratio is None else f"{ratio['median']:.2f}" for ratio in ratios),
            ]
        )
    equal = ", ".join(
        f"{name} {sizes['active_parameters'] / 1e6:.2f} of {sizes['parameters'] / 1e6:.1f} million"
        for name, sizes in found["transformers_of_equal_active_size"].items()
    )
    text = (
        f"Size {size} ({link(file.name)}), {found['parameters'] / 1e6:.1f} million "
        f"parameters, of which a token reads {found['active_parameters'] / 1e6:.2f} million"
        + (f" ({equal})" if equal else "")
        + f". Processor: {found['machine']['cpu']}, {found['machine']['threads']} threads."
    )
    heads = ["work", "tokens per second", *(f"times {name}" for name in peers)]
    return f"{wrapped(text)}\n\n{table(heads, rows)}"


def prefill_profile(records: Path) -> str:
    """Shares of the time of a prompt and its floor, at each size on each processor."""
    parts = []
    for size in SIZES:
        for name in processors(records, f"prefill_profile_{size}"):
            file = records / f"prefill_profile_{size}_{name}.json"
            found = read(file)
            kinds = list(found["measurements"][0]["parts"])
            rows = [
                [
                    lengths([entry], "length"),
                    f"{entry['of_floor']['median']:.2f}",
                    *(
                        f"{part['share']['median']:.0%} / {part['of_floor']['median']:.1f}"
                        for part in (entry["parts"][kind] for kind in kinds)
                    ),
                ]
                for entry in found["measurements"]
            ]
            speed = max(
                entry["product_flops_per_second"]["median"] for entry in found["measurements"]
            )
            text = (
                f"Size {size} ({link(file.name)}), float32. Processor: {found['machine']['cpu']}, "
                f"{found['machine']['threads']} threads; a large product has {speed / 1e9:.0f} "
                "GFLOP/s."
            )
            parts.append(f"{wrapped(text)}\n\n{table(['tokens', 'of the floor', *kinds], rows)}")
    return "\n\n".join(parts or to_be_made(["`python -m benchmarks prefill_profile`"]))


def busy(records: Path) -> str:
    """Speed beside a program that uses one of two cores, on each processor."""
    names = processors(records, "busy_machine")
    if not names:
        return "\n".join(to_be_made(["`python -m benchmarks busy_machine`"]))
    return "\n\n".join(_busy(records / f"busy_machine_{name}.json") for name in names)


def _busy(file: Path) -> str:
    found = read(file)
    rows = [
        [
            entry["start"],
            entry["what"],
            *(f"{entry['tokens_per_second'][w]['median']:,.0f}" for w in ("quiet", "busy")),
            "{median:.0%} ({min:.0%} to {max:.0%})".format(**entry["share_of_quiet"]),
        ]
        for entry in found["results"]
    ]
    text = (
        f"The model `{found['model']}` with {size_of(found)} ({link(file.name)}), tokens per "
        f"second. Processor: {found['machine']['cpu']}."
    )
    heads = ["started by", "work", "alone", "beside a neighbour", "share"]
    return f"{wrapped(text)}\n\n{table(heads, rows)}"


def operator_ratios(found: dict[str, Any]) -> dict[str, float]:
    """Speed over the fastest peer by what was done; the number of peers and of tokens."""
    ratios: dict[str, float] = {}
    for result in found["results"]:
        if result["what"] in ("forward", "forward + backward"):
            medians = [ratio["median"] for ratio in result["times_faster"].values()]
            ratios |= {"peers": len(medians), "tokens": result["tokens"]}
            ratios[result["what"]] = min(medians)
    return ratios


def operator(records: Path) -> str:
    """The state-space operator beside other implementations."""
    found = read(records / "ssd_operator.json")
    ratios = operator_ratios(found)
    (worst,) = (
        max(result["errors"]["ours"].values())
        for result in found["results"]
        if result["what"] == "relative rms error against float64" and result["decay"] == "strong"
    )
    error = f"{worst:.0e}".replace("e-0", "e-")
    peers = ratios["peers"]
    others = f"the best of {peers:.0f} peers" if peers > 1 else "transformers' implementation"
    return wrapped(
        f"With {ratios['tokens']:,.0f} tokens ({link('ssd_operator.json')}) our operator is "
        f"{ratios['forward']:.2f} times as fast as {others} forward, and "
        f"{ratios['forward + backward']:.2f} times forward and backward. Its relative rms error is "
        f"at most {error} in the result and in every gradient, with strong decay."
    )


def growth(records: Path) -> str:
    """Time and cache by the length of a prompt: the table behind docs/growth.svg."""
    found = read(records / "growth.json")
    rows = []
    for result in found["results"]:
        times = result["microseconds_per_token"]
        cache = result["state_bytes"]
        rows.append(
            [
                f"{result['length'] // 1024}K",
                f"{times['ours']['median']:.0f}",
                f"{times['peer']['median']:.0f}" if "peer" in times else "–",
                f"{sum(cache.values()) / 1e6:.1f} MB",
                f"{(cache['conv'] + cache['ssm']) / 1e6:.1f} MB",
                f"{result['all_attention_bytes'] / 1e6:.1f} MB",
            ]
        )
    heads = [
        "tokens", "us per token", "transformers", "cache", "of it Mamba layers",
        "if all were attention",
    ]  # fmt: skip
    text = f"Size {found['size']}, prefill in float32 ({link('growth.json')}):"
    return f"{wrapped(text)}\n\n{table(heads, rows)}"


def gpu(records: Path) -> str:
    """The first layers of large models on each GPU that has a record."""
    parts = []
    for file in sorted(records.glob("gpu_model_*.json")):
        found = read(file)
        layers = " and ".join(
            f"the first {len(part['pattern'])} layers of {name.title()}"
            for name, part in found["slices"].items()
        )
        text = f"On an {found['machine']['gpu']} ({link(file.name)}): {layers}."
        heads = ["layers of", "work", "tokens per second", "times transformers", "of the limit"]
        parts.append(f"{wrapped(text)}\n\n{table(heads, _gpu_rows(found))}")
    return "\n\n".join(parts)


def _gpu_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, part in found["slices"].items():
        for what, entries in itertools.groupby(part["measurements"], lambda entry: entry["what"]):
            for batch, group in itertools.groupby(entries, lambda entry: entry.get("batch", 1)):
                row = list(group)
                behind = lengths(row, "context" if what == "decode" else "length")
                work = {
                    "decode": f"decoding {batch} row{'s' * (batch > 1)} after {behind} tokens",
                    "prefill": f"prefill of {behind} tokens",
                    "train": f"forward and backward, {batch} x {behind} tokens",
                }[what]
                cells = [
                    [f"{entry['tokens_per_second']['ours']:,.0f}" for entry in row],
                    [
                        f"{entry['times_faster']['median']:.2f}" if "times_faster" in entry else "–"
                        for entry in row
                    ],
                    [f"{entry['share_of_floor']:.0%}" for entry in row],
                ]
                rows.append([name.title(), work, *(" / ".join(values) for values in cells)])
    return rows
