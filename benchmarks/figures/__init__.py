"""Write the figures of docs/benchmarks.md and README.md from the records; nobody copies them.

    python -m benchmarks figures           after measuring; `make bench` does it at its end

The figures stand between comments, in a text that people write:

    <!-- figures: operator -->
    ...
    <!-- end of figures -->

Each name is a function that reads the records of a folder and returns Markdown:

    comparisons.py     beside other programs
    techniques.py      what our own techniques give and cost
    markdown.py        links, tables, paragraphs

README has one block without a name, the three most important figures. A test compares both files
with the records, so a record that changes without them, or the other way round, is found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.figures.architectures import quality_per_flop, router_statistics
from benchmarks.figures.comparisons import (
    busy,
    cpu_peers,
    gpu,
    growth,
    model,
    operator,
    operator_ratios,
    peers_by_processor,
    prefill_profile,
)
from benchmarks.figures.full_size import full_size
from benchmarks.figures.markdown import read, wrapped
from benchmarks.figures.techniques import (
    bfloat16,
    checkpoints,
    float16_states,
    loss_of_checkpoints,
    removal,
    speculation,
    training,
)

ROOT = record.RECORDS.parents[1]
README, DOCUMENT = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
BLOCK = re.compile(r"<!-- figures(?:: ([\w ]+))? -->\n(.*?)<!-- end of figures -->", re.S)


def rewrite(text: str, blocks: dict[str, str]) -> str:
    """A text with the content of its blocks replaced.

    Args:
        text: a Markdown file.
        blocks: content by name; "" is the block without a name.

    Raises:
        ValueError: the blocks of the text are not exactly these, each once.
    """
    found = [match[1] or "" for match in BLOCK.finditer(text)]
    if sorted(found) != sorted(blocks):
        raise ValueError(
            f"the text has blocks of figures named {sorted(found)}, expected {sorted(blocks)}, "
            "each once: <!-- figures: NAME --> ... <!-- end of figures -->."
        )

    def new(match: re.Match[str]) -> str:
        start = match[0].partition("\n")[0]
        return f"{start}\n{blocks[match[1] or '']}\n<!-- end of figures -->"

    return BLOCK.sub(new, text)


def for_document(records: Path) -> dict[str, str]:
    """The blocks of docs/benchmarks.md, by name."""
    functions: dict[str, Callable[[Path], str]] = {
        "model": model, "bfloat16": bfloat16,
        "peers": cpu_peers, "profile": prefill_profile, "busy": busy,
        "operator": operator, "growth": growth, "gpu": gpu,
        "checkpoints": checkpoints, "loss of checkpoints": loss_of_checkpoints,
        "float16 states": float16_states,
        "training": training, "full size": full_size, "speculation": speculation,
        "removal": removal,
        "quality per FLOP": quality_per_flop, "router statistics": router_statistics,
    }  # fmt: skip
    return {name: function(records) for name, function in functions.items()}


def for_readme(records: Path) -> dict[str, str]:
    """The block of README.md: three figures, each with its record and where to read more."""
    found = [read(file) for file in peers_by_processor(records, "M").values()]
    names = [one["machine"]["cpu"] for one in found]
    prefill = [_beside_transformers(one, what="prefill", length=8192) for one in found]
    decode = [_beside_transformers(one, what="decode", batch=1) for one in found]
    ratio = operator_ratios(read(records / "ssd_operator.json"))
    size = read(records / "nvfp4_checkpoints_size.json")
    on_disk = {e["folder"]: e["bytes"] for e in size["results"] if e["what"] == "on disk"}

    def links(files: Sequence[str], section: str) -> str:
        records = ", ".join(f"[record](benchmarks/records/{file})" for file in files)
        return f"({records}, [details](docs/benchmarks.md#{section}))"

    items = [
        f"Prefill of 8K tokens is {_each(prefill)} times as fast as in transformers, decoding "
        f"with a compiled step {_each(decode)} times ({_each(names)}): one row, "
        f"{found[0]['parameters'] / 1e6:.0f} million parameters, float32, on a CPU "
        + links(
            [file.name for file in peers_by_processor(records, "M").values()],
            "beside-other-programs-and-other-models-on-a-cpu",
        ),
        f"A checkpoint of that model has {on_disk['nvfp4'] / 1e6:.0f} MB in NVFP4, "
        f"{on_disk['bf16'] / 1e6:.0f} MB in BF16 "
        + links(["nvfp4_checkpoints_size.json"], "checkpoints-in-four-bits"),
        f"The state-space operator is {ratio['forward']:.2f} times as fast as the best of "
        f"{ratio['peers']:.0f} PyTorch implementations by others "
        + links(["ssd_operator.json"], "the-state-space-operator"),
    ]
    return {"": "\n".join(wrapped(f"- {item}", "  ") for item in items)}


def _beside_transformers(found: dict[str, Any], **labels: Any) -> str:
    """Our speed in float32 as a multiple of transformers', of one entry of a record of peers."""
    (entry,) = (
        one
        for one in found["measurements"]
        if all(one.get(label) == value for label, value in labels.items())
    )
    return f"{entry['times_faster']['transformers']['median']:.2f}"


def _each(values: Sequence[str]) -> str:
    """ "2.17 and 3.43"."""
    return " and ".join(values)


def main(arguments: list[str] | None = None) -> None:
    """Rewrite both files in place."""
    for file, blocks in ((DOCUMENT, for_document), (README, for_readme)):
        text = file.read_text()
        new = rewrite(text, blocks(record.RECORDS))
        file.write_text(new)
        print(f"{file.relative_to(ROOT)}: figures", "unchanged" if new == text else "rewritten")
