"""Write the figures of the README's "How fast" from the records; nobody copies them by hand.

    python -m benchmarks figures           after measuring; `make bench` does it at its end

The block between two comments in README.md is what `block` says; a test of the house compares the
two, so a record that changes without the README, or the other way round, is found. Ratios are
medians, with two decimals. A part of the model benchmark that was measured again on its own (a
record `model_speed_S-decode.json`, say) counts where it is the newer one.

Left out: figures of speculation and of quantized weights, which stand in paragraphs of their own.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

README = record.RECORDS.parents[1] / "README.md"
START, END = "<!-- figures: python -m benchmarks figures -->", "<!-- end of figures -->"
SIZES = ("S", "M")
WIDTH = 100


def rewrite(text: str, records: Path) -> str:
    """A README with its figures replaced by those of the records.

    Raises:
        ValueError: the two comments are not there, once each and in order.
    """
    pattern = re.compile(re.escape(START) + r"\n.*?" + re.escape(END), re.S)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"expected one stretch of text between {START!r} and {END!r}.")
    return pattern.sub(lambda _: f"{START}\n{block(records)}{END}", text)


def block(records: Path) -> str:
    """What stands between the comments."""
    speeds = {size: _newest(records, f"model_speed_{size}") for size in SIZES}
    paragraphs = [
        _wrapped(_whole_model(speeds)),
        _table(speeds),
        _wrapped(_quality(_read(records / "bf16_quality.json"))),
        _wrapped(_operator(_read(records / "ssd_operator.json"))),
    ]
    for file in sorted(records.glob("gpu_model_*.json")):
        found = _read(file)
        paragraphs += [_wrapped(_gpu(found, file.name)), _gpu_table(found)]
    return "\n\n".join(paragraphs) + "\n"


class Entries:
    """The measurements of one size by what was done, each from the newest record that has it."""

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
        """All entries of one kind, in order; those with these labels only.

        Raises:
            ValueError: there are none.
        """
        found = [
            entry for entry in self._entries.get(what, [])
            if all(entry[label] == value for label, value in labels.items())
        ]  # fmt: skip
        if not found:
            raise ValueError(f"no record has {what!r} {labels or ''}: run model_speed first.")
        return found

    def times(self, what: str, **labels: int) -> str:
        """Their ratios, as "1.98 / 2.35"."""
        ratios = (entry["times_faster"]["median"] for entry in self.of(what, **labels))
        return " / ".join(f"{ratio:.2f}" for ratio in ratios)


def _newest(records: Path, stem: str) -> Entries:
    files = [*records.glob(f"{stem}.json"), *records.glob(f"{stem}-*.json")]
    return Entries((file.name, _read(file)) for file in files)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def _link(text: str, file: str) -> str:
    return f"[{text}](benchmarks/records/{file})"


def _whole_model(speeds: dict[str, Entries]) -> str:
    told = []
    for size, entries in speeds.items():
        files: dict[str, list[str]] = {}
        for what, file in entries.source.items():
            files.setdefault(file, []).append(what)
        whole = max(files, key=lambda file: len(files[file]))
        links = ", ".join(
            _link("record" if file == whole else file.partition("-")[2][: -len(".json")], file)
            for file in files
        )
        told.append(
            f"at size {size} with {entries.parameters / 1e6:.0f} million parameters ({links})"
        )
    processors = sorted(set.union(*(entries.processors for entries in speeds.values())))
    return (
        f"The whole model, {' and '.join(told)}, as multiples of transformers' speed. Processor: "
        f"{', '.join(processors)}."
    )


def _table(speeds: dict[str, Entries]) -> str:
    rows: list[tuple[str, Sequence[str]]] = []

    def row(name: str, what: str, **labels: int) -> None:
        rows.append((name, [entries.times(what, **labels) for entries in speeds.values()]))

    first = speeds[SIZES[0]]
    row(f"prefill of {_lengths(first.of('prefill'), 'length')} tokens", "prefill")
    for batch, rows_named in ((1, "one row"), (8, "eight rows")):
        behind = _lengths(first.of("decode", batch=batch), "context")
        row(f"decoding {rows_named}, behind {behind} tokens", "decode", batch=batch)
    rows.append((
        "training step, four rows of 512 tokens",
        [
            f"{entries.times('train')}, with {100 * share['share_of_peer']:.0f} % of the memory"
            for entries in speeds.values()
            for share in entries.of("train memory")
        ],
    ))  # fmt: skip
    narrow = _lengths(first.of("bf16"), "length")
    row(f"prefill of {narrow} tokens, both in bfloat16", "bf16 against the peer's")
    row("the same, our bfloat16 against transformers' float32", "bf16 against the peer's float32")
    row("the same, our bfloat16 against our float32", "bf16")
    row("one bare product of ours, bfloat16 against float32", "bf16 bare product")
    lines = [f"| work | {' | '.join(speeds)} |", "| --- " * (1 + len(speeds)) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    return "\n".join(lines)


def _lengths(entries: Iterable[dict[str, Any]], label: str) -> str:
    """The lengths of some entries, as "512 / 2K"."""
    values = (entry[label] for entry in entries)
    return " / ".join(f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in values)


def _quality(found: dict[str, Any]) -> str:
    bits = found["bits_per_byte"]
    return (
        f"What bfloat16 costs in quality ({_link('record', 'bf16_quality.json')}): the model "
        f"{found['model']}, codes held-out text in {bits['bfloat16']:.4f} bits per byte, and in "
        f"{bits['float32']:.4f} in float32."
    )


def _operator(found: dict[str, Any]) -> str:
    best, tokens, peers = {}, 0, 0
    for result in found["results"]:
        if result["what"] in ("forward", "forward + backward"):
            ratios = [ratio["median"] for ratio in result["times_faster"].values()]
            best[result["what"]], peers, tokens = min(ratios), len(ratios), result["tokens"]
    (worst,) = (
        max(result["errors"]["ours"].values()) for result in found["results"]
        if result["what"] == "relative rms error against float64" and result["decay"] == "strong"
    )  # fmt: skip
    error = f"{worst:.0e}".replace("e-0", "e-")
    others = f"the best of {peers} peers" if peers > 1 else "transformers' form of it"
    return (
        f"The state-space operator alone, {tokens:,} tokens "
        f"({_link('record', 'ssd_operator.json')}): {best['forward']:.2f} times as fast as "
        f"{others} forward, and {best['forward + backward']:.2f} times forward and "
        f"backward, with a relative rms error of at most {error} in every value and gradient under "
        "strong decay."
    )


def _gpu(found: dict[str, Any], file: str) -> str:
    layers = " and ".join(
        f"the first {len(part['pattern'])} layers of {name.title()}"
        for name, part in found["slices"].items()
    )
    return (
        f"On an {found['machine']['gpu']} ({_link('record', file)}; kernel by kernel in the "
        f"[catalogue](kernels/README.md)): {layers}, at full width, with embeddings and head, in "
        "bfloat16. Beside them transformers on the same weights, without its optional CUDA "
        "packages, and what the hardware allows: the ledger's FLOPs, or the bytes of the weights "
        "and memories, at the speed of a large product and copy. For each new number of keys "
        "transformers has cuDNN plan its attention; who is measured later finds plans made."
    )


def _gpu_table(found: dict[str, Any]) -> str:
    lines = [
        "| layers of | work | tokens a second | times transformers | of what is possible |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, part in found["slices"].items():
        for what, entries in itertools.groupby(part["measurements"], lambda entry: entry["what"]):
            for batch, group in itertools.groupby(entries, lambda entry: entry.get("batch", 1)):
                row = list(group)
                lengths = _lengths(row, "context" if what == "decode" else "length")
                work = {
                    "decode": f"decoding {batch} row{'s' * (batch > 1)}, behind {lengths} tokens",
                    "prefill": f"prefill of {lengths} tokens",
                    "train": f"forward and backward, {batch} x {lengths} tokens",
                }[what]
                cells = [
                    [f"{entry['tokens_per_second']['ours']:,.0f}" for entry in row],
                    [
                        f"{entry['times_faster']['median']:.2f}" if "times_faster" in entry else "–"
                        for entry in row
                    ],
                    [f"{entry['share_of_floor']:.0%}" for entry in row],
                ]
                told = " | ".join(" / ".join(values) for values in cells)
                lines.append(f"| {name.title()} | {work} | {told} |")
    return "\n".join(lines)


def _wrapped(paragraph: str) -> str:
    """Lines of at most WIDTH characters."""
    lines, line = [], ""
    for word in paragraph.split(" "):
        if line and len(line) + 1 + len(word) > WIDTH:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])


def main(arguments: list[str] | None = None) -> None:
    """Rewrite README.md in place."""
    text = README.read_text()
    new = rewrite(text, record.RECORDS)
    README.write_text(new)
    print("README.md: figures", "as they were" if new == text else "written anew")


if __name__ == "__main__":
    main()
