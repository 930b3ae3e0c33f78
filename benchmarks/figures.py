"""Write the figures of docs/benchmarks.md and README.md from the records; nobody copies them.

    python -m benchmarks figures           after measuring; `make bench` does it at its end

The figures stand between comments, in a text that people write:

    <!-- figures: operator -->
    ...
    <!-- end of figures -->

Each name is a function of this module. README has one block without a name, the three most
important figures. A test compares both files with the records, so a record that changes without
them, or the other way round, is found. Ratios are medians, with two decimals. If one part of the
model benchmark was measured again alone (a record `model_speed_S-decode.json`, say), the newer
record counts.
"""

from __future__ import annotations

import itertools
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from nemotron_lite import NemotronConfig, ledger

ROOT = record.RECORDS.parents[1]
README, DOCUMENT = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
BLOCK = re.compile(r"<!-- figures(?:: ([\w ]+))? -->\n(.*?)<!-- end of figures -->", re.S)
SIZES = ("S", "M")
PEER_SIZES = ("S", "M", "lite")
WIDTH = 100
EARLIER_LITE = 16_710_880  # parameters of `lite` when its experts were 168 wide


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
        "model": model, "bfloat16": bfloat16, "peers": cpu_peers, "busy": busy,
        "operator": operator, "growth": growth, "gpu": gpu,
        "checkpoints": checkpoints, "loss of checkpoints": loss_of_checkpoints,
        "training": training, "speculation": speculation, "removal": removal,
    }  # fmt: skip
    return {name: function(records) for name, function in functions.items()}


def for_readme(records: Path) -> dict[str, str]:
    """The block of README.md: three figures, each with its record and where to read more."""
    large = _newest(records, "model_speed_M")
    (prefill,) = large.of("prefill", length=8192)
    (decode,) = large.of("decode", batch=1, context=512)
    ratio = _operator_ratios(_read(records / "ssd_operator.json"))
    size = _read(records / "nvfp4_checkpoints_size.json")
    on_disk = {e["folder"]: e["bytes"] for e in size["results"] if e["what"] == "on disk"}

    def links(file: str, section: str) -> str:
        return f"([record](benchmarks/records/{file}), [details](docs/benchmarks.md#{section}))"

    items = [
        f"Prefill of 8K tokens is {prefill['times_faster']['median']:.2f} times as fast as in "
        f"transformers, decoding {decode['times_faster']['median']:.2f} times: one row, "
        f"{large.parameters / 1e6:.0f} million parameters, float32, on a CPU "
        + links(large.source["decode"], "the-whole-model-on-a-cpu"),
        f"A checkpoint of that model has {on_disk['nvfp4'] / 1e6:.0f} MB in NVFP4, "
        f"{on_disk['bf16'] / 1e6:.0f} MB in BF16 "
        + links("nvfp4_checkpoints_size.json", "checkpoints-in-four-bits"),
        f"The state-space operator is {ratio['forward']:.2f} times as fast as the best of "
        f"{ratio['peers']:.0f} PyTorch implementations by others "
        + links("ssd_operator.json", "the-state-space-operator"),
    ]
    return {"": "\n".join(_wrapped(f"- {item}", "  ") for item in items)}


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


def model(records: Path) -> str:
    """The whole model beside transformers, at both sizes."""
    speeds = {size: _newest(records, f"model_speed_{size}") for size in SIZES}
    sizes = []
    for size, entries in speeds.items():
        files: dict[str, list[str]] = {}
        for what, file in entries.source.items():
            files.setdefault(file, []).append(what)
        whole = max(files, key=lambda file: len(files[file]))
        links = ", ".join(
            _link(file, "record" if file == whole else file.partition("-")[2][: -len(".json")])
            for file in files
        )
        sizes.append(f"size {size} has {entries.parameters / 1e6:.0f} million parameters ({links})")
    processors = sorted(set.union(*(entries.processors for entries in speeds.values())))
    text = f"Here {' and '.join(sizes)}. Processor: {', '.join(processors)}."

    rows: list[Sequence[str]] = []

    def row(name: str, what: str, **labels: int) -> None:
        rows.append([name, *(entries.times(what, **labels) for entries in speeds.values())])

    first = speeds[SIZES[0]]
    row(f"prefill of {_lengths(first.of('prefill'), 'length')} tokens", "prefill")
    for batch, rows_named in ((1, "one row"), (8, "eight rows")):
        behind = _lengths(first.of("decode", batch=batch), "context")
        row(f"decoding {rows_named} after {behind} tokens", "decode", batch=batch)
    shares = [
        f"{entries.times('train')}, with {100 * share['share_of_peer']:.0f} % of the memory"
        for entries in speeds.values()
        for share in entries.of("train memory")
    ]
    rows.append(["training step, four rows of 512 tokens", *shares])
    narrow = _lengths(first.of("bf16"), "length")
    row(f"prefill of {narrow} tokens, both in bfloat16", "bf16 against the peer's")
    row("the same, our bfloat16 against transformers' float32", "bf16 against the peer's float32")
    row("the same, our bfloat16 against our float32", "bf16")
    row("one matrix product of ours, bfloat16 against float32", "bf16 bare product")
    return f"{_wrapped(text)}\n\n{_table(['work', *speeds], rows)}"


def cpu_peers(records: Path) -> str:
    """Ours beside each peer on a CPU, at each size that has a record; and which have none yet."""
    parts, missing = [], []
    for size in PEER_SIZES:
        file = records / f"cpu_peers_{size}.json"
        if not file.exists():
            missing.append(f"`python -m benchmarks cpu_peers --size {size}`")
            continue
        found = _read(file)
        entries = found["measurements"]
        peers = list(dict.fromkeys(name for entry in entries for name in entry["times_faster"]))
        rows = []
        for entry in entries:
            length = _lengths([entry], "length" if "length" in entry else "context")
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
            f"{name} {sizes['active_parameters'] / 1e6:.2f} of "
            f"{sizes['parameters'] / 1e6:.1f} million"
            for name, sizes in found["transformers_of_equal_active_size"].items()
        )
        text = (
            f"Size {size} ({_link(file.name)}), {found['parameters'] / 1e6:.1f} million "
            f"parameters, of which a token reads {found['active_parameters'] / 1e6:.2f} million"
            + (f" ({equal})" if equal else "")
            + f". Processor: {found['machine']['cpu']}, {found['machine']['threads']} threads."
        )
        heads = ["work", "tokens per second", *(f"times {name}" for name in peers)]
        parts.append(f"{_wrapped(text)}\n\n{_table(heads, rows)}")
    return "\n\n".join([*parts, *_to_be_made(missing)])


def busy(records: Path) -> str:
    """Speed beside a program that uses one of two cores."""
    file = records / "busy_machine.json"
    if not file.exists():
        return "\n".join(_to_be_made(["`python -m benchmarks busy_machine`"]))
    found = _read(file)
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
        f"The model `{found['model']}` with {_size(found)} ({_link(file.name)}), tokens per "
        f"second. Processor: {found['machine']['cpu']}."
    )
    heads = ["started by", "work", "alone", "beside a neighbour", "share"]
    return f"{_wrapped(text)}\n\n{_table(heads, rows)}"


def _to_be_made(commands: Sequence[str]) -> list[str]:
    """A paragraph that says which records do not exist yet; none if all exist."""
    if not commands:
        return []
    return [_wrapped(f"Records that are still to be made: {', '.join(commands)}.")]


def bfloat16(records: Path) -> str:
    """Quality in bfloat16."""
    found = _read(records / "bf16_quality.json")
    bits = found["bits_per_byte"]
    return _wrapped(
        f"Quality in bfloat16 ({_link('bf16_quality.json')}): the model {found['model']} "
        f"and with {_size(found)}, needs {bits['bfloat16']:.4f} bits per byte of held-out text in "
        f"bfloat16 and {bits['float32']:.4f} in float32."
    )


def _size(found: dict[str, Any]) -> str:
    """The size of the model in a record; if it is `lite`, whether the preset has changed since."""
    name = next(found[key] for key in ("model", "size", "name") if key in found)
    # Records without the number are older than the change.
    parameters = found.get("parameters", EARLIER_LITE)
    text = f"{parameters / 1e6:.1f} million parameters"
    now = ledger.parameters(NemotronConfig.from_preset("lite")).total
    if name.startswith("lite") and parameters != now:
        text += f" (of an earlier preset; now {now / 1e6:.1f})"
    return text


def _operator_ratios(found: dict[str, Any]) -> dict[str, float]:
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
    found = _read(records / "ssd_operator.json")
    ratios = _operator_ratios(found)
    (worst,) = (
        max(result["errors"]["ours"].values())
        for result in found["results"]
        if result["what"] == "relative rms error against float64" and result["decay"] == "strong"
    )
    error = f"{worst:.0e}".replace("e-0", "e-")
    peers = ratios["peers"]
    others = f"the best of {peers:.0f} peers" if peers > 1 else "transformers' implementation"
    return _wrapped(
        f"With {ratios['tokens']:,.0f} tokens ({_link('ssd_operator.json')}) our operator is "
        f"{ratios['forward']:.2f} times as fast as {others} forward, and "
        f"{ratios['forward + backward']:.2f} times forward and backward. Its relative rms error is "
        f"at most {error} in the result and in every gradient, with strong decay."
    )


def growth(records: Path) -> str:
    """Time and cache by the length of a prompt: the table behind docs/growth.svg."""
    found = _read(records / "growth.json")
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
    text = f"Size {found['size']}, prefill in float32 ({_link('growth.json')}):"
    return f"{_wrapped(text)}\n\n{_table(heads, rows)}"


def gpu(records: Path) -> str:
    """The first layers of large models on each GPU that has a record."""
    parts = []
    for file in sorted(records.glob("gpu_model_*.json")):
        found = _read(file)
        layers = " and ".join(
            f"the first {len(part['pattern'])} layers of {name.title()}"
            for name, part in found["slices"].items()
        )
        text = f"On an {found['machine']['gpu']} ({_link(file.name)}): {layers}."
        heads = ["layers of", "work", "tokens per second", "times transformers", "of the limit"]
        parts.append(f"{_wrapped(text)}\n\n{_table(heads, _gpu_rows(found))}")
    return "\n\n".join(parts)


def _gpu_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, part in found["slices"].items():
        for what, entries in itertools.groupby(part["measurements"], lambda entry: entry["what"]):
            for batch, group in itertools.groupby(entries, lambda entry: entry.get("batch", 1)):
                row = list(group)
                lengths = _lengths(row, "context" if what == "decode" else "length")
                work = {
                    "decode": f"decoding {batch} row{'s' * (batch > 1)} after {lengths} tokens",
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
                rows.append([name.title(), work, *(" / ".join(values) for values in cells)])
    return rows


def checkpoints(records: Path) -> str:
    """Size, memory and speed of a checkpoint in NVFP4."""
    found = _read(records / "nvfp4_checkpoints_size.json")
    results = found["results"]
    disk = {entry["folder"]: entry for entry in results if entry["what"] == "on disk"}
    bits = disk["nvfp4"]["routed_experts"]["bits_a_weight"]
    peaks = {e["way"]: e["peak_bytes"] for e in results if e["what"] == "peak of memory"}
    speeds = {
        (entry["way"], entry["rows"]): entry["times_faster"]["median"]
        for entry in results
        if entry["what"] == "decode"
    }
    names = {
        "bf16": "BF16", "packed": "NVFP4, kept packed", "unpacked": "NVFP4, decoded to BF16",
        "packed, float32": "NVFP4, kept packed, computing in float32",
        "float32": "BF16, decoded to float32",
    }  # fmt: skip
    rows = [
        [
            names[way],
            *(f"{peak[what] / 1e6:.0f} MB" for what in ("load", "load_and_generate")),
            *(f"{speeds[way, n]:.2f}" if way != "bf16" else "1" for n in (1, 8)),
        ]
        for way, peak in peaks.items()
    ]
    text = (
        f"Size {found['size']} ({_link('nvfp4_checkpoints_size.json')}): the folder has "
        f"{disk['nvfp4']['bytes'] / 1e6:.0f} MB instead of {disk['bf16']['bytes'] / 1e6:.0f} MB in "
        f"BF16, and the routed experts {bits:.2f} bits per weight."
    )
    heads = [
        "loaded from", "peak while loading", "and generating", "speed, one row", "eight rows"
    ]  # fmt: skip
    return f"{_wrapped(text)}\n\n{_table(heads, rows)}"


def loss_of_checkpoints(records: Path) -> str:
    """Change of held-out loss by format."""
    found = _read(records / "nvfp4_checkpoints_loss.json")
    names = {
        "bf16 for all": "BF16", "fp8 for all": "FP8", "nvfp4 for all": "NVFP4",
        "nvfp4 for all, scales by rule": "NVFP4, scales without search",
    }  # fmt: skip
    rows = []
    for entry in found["results"]:
        if "weights" in entry:
            rows.append(
                [
                    names.get(entry["as"], entry["as"]),
                    f"{entry['bits_a_weight']:.2f}",
                    *(
                        _percent(entry[w]["change_percent"])
                        for w in ("weights", "weights and inputs")
                    ),
                ]
            )
    groups = found["results"][0]["nats_per_token"]["n"]
    text = (
        f"Change of held-out loss in percent, for the model `{found['model']}` with {_size(found)} "
        f"after {found['training_seconds']:.0f} seconds of training "
        f"({_link('nvfp4_checkpoints_loss.json')}): median, smallest and largest of {groups} "
        "groups of held-out files."
    )
    heads = ["format", "bits per weight", "weights quantized", "weights and inputs"]
    return f"{_wrapped(text)}\n\n{_table(heads, rows)}"


def training(records: Path) -> str:
    """What emulated training in NVFP4 costs in time and in loss."""
    timed = _read(records / "nvfp4_training_times.json")
    ratios = " and ".join(
        f"{entry['times_bf16']['median']:.2f} times a BF16 step for {entry['batch_size']} x "
        f"{entry['length']} tokens"
        for entry in timed["results"]
    )
    text = (
        f"A step of the model `{timed['size']}` with {_size(timed)} takes {ratios} "
        f"({_link('nvfp4_training_times.json')})."
    )
    rows = []
    for name in ("lite", "small"):
        file = f"nvfp4_training_{name}.json"
        found = _read(records / file)
        scale = found["scale"]
        size = f"{name}, {_size(scale)}, {scale['steps']} steps"
        for variant, entry in found["variants"].items():
            if variant != "bf16":
                gap = _percent(entry["held_out_nats_gap_percent"])
                rows.append([f"{size} ({_link(file)})", variant, gap, str(len(entry["seeds"]))])
    heads = ["model", "variant", "held-out loss against BF16, percent", "seeds"]
    return f"{_wrapped(text)}\n\n{_table(heads, rows)}"


def speculation(records: Path) -> str:
    """Speculative decoding beside plain decoding."""
    found = _read(records / "speculation.json")
    story = found["training"]
    names = {
        "adaptive": "adaptive, at most 6", "poor": "adaptive, MTP module with random weights"
    }  # fmt: skip
    names |= {f"fixed {k}": f"drafts of {k}" for k in (1, 2, 3, 4, 6)}
    by_way: dict[str, list[str]] = {}
    differ = 0
    for entry in found["results"]:
        if entry["what"] == "decode":
            ratio = entry["times_faster"]
            predicted = entry["predicted_times_faster"]
            by_way.setdefault(entry["way"], [names[entry["way"]]]).extend(
                [
                    f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})",
                    f"{predicted['ledger']:.2f} / {predicted['measured']:.2f}",
                    f"{entry['statistics']['acceptance_length']:.2f}",
                ]
            )
            differ += entry.get("texts_that_differ", 0)
    text = (
        f"Record: {_link('speculation.json', 'speculation.json')}. The model `{found['model']}` "
        f"with {_size(found)} "
        f"was trained with {story['threads']} thread{'s' * (story['threads'] > 1)}: "
        f"{story['backbone']['seconds']:.0f} seconds for the whole model "
        f"({story['backbone']['tokens']:,} tokens, {story['held_out_bits_per_byte']:.2f} bits per "
        f"byte of held-out text), {story['writing']['seconds']:.0f} seconds in which the backbone "
        f"continues pieces of its training text, and {story['healing']['seconds']:.0f} seconds of "
        "training the MTP module on that text. This last step raised the acceptance length of "
        "drafts of four on held-out prompts from "
        f"{story['acceptance_length_before_healing']:.2f} to "
        f"{story['acceptance_length_after_healing']:.2f}. Drafts use the {found['shortlist']:,} "
        f"tokens that the backbone writes most often. {found['prompts']} prompts of "
        f"{found['prompt_tokens']} tokens, {found['new_tokens']} new tokens each. Greedy texts "
        f"that differ from those of plain decoding: {differ}."
    )
    heads = [
        "drafts", "greedy", "predicted", "acceptance length", "temperature 0.7", "predicted",
        "acceptance length",
    ]  # fmt: skip
    ways = [entry for entry in found["results"] if entry["what"] == "rollback"]
    rollback = "; ".join(
        f"{entry['bytes_kept']:,} bytes and "
        f"{entry['verify_and_keep_over_a_plain_step']:.2f} plain steps with "
        # Records of before the one way to roll back call it "hold".
        f"{ROLLBACK[entry['way'] if 'way' in entry else entry['hold']]}"
        for entry in ways
    )
    after = (
        f"While a draft of {ways[0]['draft_length']} tokens is verified, something must be stored "
        "to roll the cache back. Bytes stored, and time of verifying and accepting the draft: "
        f"{rollback}."
    )
    return f"{_wrapped(text)}\n\n{_table(heads, list(by_way.values()))}\n\n{_wrapped(after)}"


# The ways of rolling a cache back, by their names in new records and in older ones.
ROLLBACK = {
    "accept": "the inputs of each token, as `Cache.accept` does it",
    "clone": "a copy of the whole cache (`Cache.clone`), and the accepted tokens read again",
}
ROLLBACK |= {
    "replay": ROLLBACK["accept"],
    "snapshots": "a copy of the Mamba layers' states after every token, which `Cache` did earlier "
    "and does no longer",
}


def removal(records: Path) -> str:
    """What small models lose without one of their parts."""
    found = _read(records / "removal.json")
    by_part: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in found["results"]:
        by_part.setdefault(entry["without"] or "nothing", {})[entry["task"]] = entry
    rows = []
    for part, tasks in by_part.items():
        row = [part]
        for task in ("text", "recall"):
            if task not in tasks:
                row += ["", ""]
                continue
            score, gap = tasks[task]["score"], tasks[task]["difference"]
            row.append(f"{score['median']:.3f}")
            spread = f"{gap['median']:+.3f} ({gap['min']:+.3f} to {gap['max']:+.3f})"
            row.append("" if part == "nothing" else spread)
        rows.append(row)
    steps = {task: recipe["steps"] for task, recipe in found["recipes"].items()}
    seeds = found["results"][0]["score"]["n"]
    text = (
        f"Record: {_link('removal.json', 'removal.json')}. {seeds} seeds; {steps['text']} steps on "
        f"text, {steps['recall']} on recall. Median, and in brackets the smallest and largest "
        "difference between runs of one seed."
    )
    heads = ["without", "bits per byte", "more than whole", "recall", "more than whole"]
    return f"{_wrapped(text)}\n\n{_table(heads, rows)}"


def _percent(summary: dict[str, float]) -> str:
    """A change in percent: "+0.05 (-0.04 to +0.10)"."""
    return f"{summary['median']:+.2f} ({summary['min']:+.2f} to {summary['max']:+.2f})"


def _newest(records: Path, stem: str) -> Entries:
    files = [*records.glob(f"{stem}.json"), *records.glob(f"{stem}-*.json")]
    return Entries((file.name, _read(file)) for file in files)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def _link(file: str, text: str = "record") -> str:
    """A link to a record, as seen from docs/."""
    return f"[{text}](../benchmarks/records/{file})"


def _lengths(entries: Iterable[dict[str, Any]], label: str) -> str:
    """The lengths of some entries, as "512 / 2K"."""
    values = (entry[label] for entry in entries)
    return " / ".join(f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in values)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _wrapped(paragraph: str, indent: str = "") -> str:
    """Lines of at most WIDTH characters, broken only at spaces."""
    return textwrap.fill(
        paragraph, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def main(arguments: list[str] | None = None) -> None:
    """Rewrite both files in place."""
    for file, blocks in ((DOCUMENT, for_document), (README, for_readme)):
        text = file.read_text()
        new = rewrite(text, blocks(record.RECORDS))
        file.write_text(new)
        print(f"{file.relative_to(ROOT)}: figures", "unchanged" if new == text else "rewritten")


if __name__ == "__main__":
    main()
