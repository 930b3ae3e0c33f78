"""Figures of what our own techniques give and cost, as Markdown from the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.figures.markdown import link, percent, read, size_of, table, to_be_made, wrapped

# The ways of drafting and of rolling a cache back, by their names in the records.
DRAFTS = {f"fixed {k}": f"drafts of {k}" for k in (1, 2, 3, 4, 6)}
DRAFTS |= {
    "shortlist": "drafts of 4, from a shortlist", "adaptive": "adaptive, at most 6",
    "poor": "adaptive, MTP module with random weights",
}  # fmt: skip
ROLLBACK = {
    "accept": "the inputs of each token, as `Cache.accept` does it",
    "clone": "a copy of the whole cache (`Cache.clone`), and the accepted tokens read again",
}


def bfloat16(records: Path) -> str:
    """Quality in bfloat16."""
    found = read(records / "bf16_quality.json")
    bits = found["bits_per_byte"]
    return wrapped(
        f"Quality in bfloat16 ({link('bf16_quality.json')}): the model {found['model']}, with "
        f"{size_of(found)}, needs {bits['bfloat16']:.4f} bits per byte of held-out text in "
        f"bfloat16 and {bits['float32']:.4f} in float32."
    )


def float16_states(records: Path) -> str:
    """Quality with SSM states in float16."""
    file = records / "float16_states.json"
    if not file.exists():
        return "\n".join(to_be_made(["`python -m benchmarks float16_states`"]))
    found = read(file)
    stretches: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for entry in found["results"]:
        stretches.setdefault((entry["first"], entry["last"]), {})[entry["as"]] = entry
    rows = []
    for (first, last), ways in stretches.items():
        row = [f"{first:,} to {last:,}", f"{ways['float32']['nats_per_token']['median']:.3f}"]
        for name in ("stochastic", "nearest", "read at once"):
            row += [percent(ways[name]["change_percent"], 3), f"{ways[name]['mean_kl']:.0e}"]
        rows.append(row)
    sizes = found["cache_bytes_of_a_row"]
    text = (
        f"The model `{found['model']}` with {size_of(found)} ({link(file.name)}) reads the "
        f"beginnings of its {found['files']} longest held-out files token by token. Change of the "
        "loss in percent (median, smallest and largest of the files; "
        f"{found['seeds']} seeds for stochastic rounding), and mean KL divergence, both against "
        "states in float32. The last two columns are float32 in one pass: they show what another "
        "order of the sums changes. A cache of one row without keys and values has "
        f"{sizes['float16']:,} bytes instead of {sizes['float32']:,}."
    )
    heads = [
        "tokens", "nats per token", "rounded stochastically", "KL", "rounded to nearest", "KL",
        "float32 at once", "KL",
    ]  # fmt: skip
    return f"{wrapped(text)}\n\n{table(heads, rows)}"


def checkpoints(records: Path) -> str:
    """Size, memory and speed of a checkpoint in NVFP4."""
    found = read(records / "nvfp4_checkpoints_size.json")
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
        f"Size {found['size']} ({link('nvfp4_checkpoints_size.json')}): the folder has "
        f"{disk['nvfp4']['bytes'] / 1e6:.0f} MB instead of {disk['bf16']['bytes'] / 1e6:.0f} MB in "
        f"BF16, and the routed experts {bits:.2f} bits per weight."
    )
    heads = [
        "loaded from", "peak while loading", "and generating", "speed, one row", "eight rows"
    ]  # fmt: skip
    return f"{wrapped(text)}\n\n{table(heads, rows)}"


def loss_of_checkpoints(records: Path) -> str:
    """Change of held-out loss by format."""
    found = read(records / "nvfp4_checkpoints_loss.json")
    names = {
        "bf16 for all": "BF16", "fp8 for all": "FP8", "nvfp4 for all": "NVFP4",
        "nvfp4 for all, scales by rule": "NVFP4, scales without search",
        "shipped": "as shipped: NVFP4 and FP8, head and MTP module too",
    }  # fmt: skip
    before, *others = found["results"]
    rows = [["as it was", "32.00", f"{before['bits_per_byte']:.4f}", "", ""]]
    for entry in others:
        changes = (entry[w]["change_percent"] for w in ("weights", "weights and inputs"))
        rows.append(
            [
                names.get(entry["as"], entry["as"]),
                f"{entry['bits_a_weight']:.2f}",
                f"{entry['weights']['bits_per_byte']:.4f}",
                *map(percent, changes),
            ]
        )
    if found["before_packing"]:
        which = "The shipped model before its weights were packed"
    else:
        which = f"The model `{found['model']}`"
    rounded = sorted({"NVFP4", "FP8"} & set(found["stored_as"]))
    text = (
        f"{which}, with {size_of(found)} ({link('nvfp4_checkpoints_loss.json')}): bits per byte of "
        f"the first {found['tokens_of_a_document']:,} tokens of each held-out file, and the change "
        "of the loss in percent: median, smallest and largest of "
        f"{before['nats_per_token']['n']} groups of these files."
        + f" It is stored in {' and '.join(rounded)}, so this is a second rounding."
        * bool(rounded)
    )
    heads = [
        "format", "bits per weight", "bits per byte", "weights quantized", "weights and inputs"
    ]  # fmt: skip
    return f"{wrapped(text)}\n\n{table(heads, rows)}"


def training(records: Path) -> str:
    """What emulated training in NVFP4 costs in time and in loss."""
    timed = read(records / "nvfp4_training_times.json")
    ratios = " and ".join(
        f"{entry['times_bf16']['median']:.2f} times a BF16 step for {entry['batch_size']} x "
        f"{entry['length']} tokens"
        for entry in timed["results"]
    )
    text = (
        f"A step of the model `{timed['size']}` with {size_of(timed)} takes {ratios} "
        f"({link('nvfp4_training_times.json')})."
    )
    rows = []
    for name in ("lite", "small"):
        file = f"nvfp4_training_{name}.json"
        found = read(records / file)
        scale = found["scale"]
        size = f"{name}, {size_of(scale)}, {scale['steps']} steps"
        for variant, entry in found["variants"].items():
            if variant != "bf16":
                gap = percent(entry["held_out_nats_gap_percent"])
                rows.append([f"{size} ({link(file)})", variant, gap, str(len(entry["seeds"]))])
    heads = ["model", "variant", "held-out loss against BF16, percent", "seeds"]
    return f"{wrapped(text)}\n\n{table(heads, rows)}"


def speculation(records: Path) -> str:
    """How many drafts are accepted, and what drafting gains."""
    files = (records / "speculation_acceptance.json", records / "speculation.json")
    commands = [
        f"`python -m benchmarks speculation --only {part}`"
        for part, file in zip(("acceptance", "speed"), files, strict=True)
        if not file.exists()
    ]
    parts = [
        part(read(file))
        for part, file in zip((_acceptance, _gain), files, strict=True)
        if file.exists()
    ]
    return "\n\n".join([*parts, *to_be_made(commands)])


def _texts(found: dict[str, Any], file: str) -> str:
    return (
        f"The model `{found['model']}` with {size_of(found)} ({link(file)}), {found['prompts']} "
        f"prompts of {found['prompt_tokens']} tokens, {found['new_tokens']} new tokens each."
    )


def _acceptance(found: dict[str, Any]) -> str:
    by_way: dict[str, list[str]] = {}
    for entry in found["results"]:
        spread = entry["by_prompt"]
        by_way.setdefault(entry["way"], [DRAFTS[entry["way"]]]).extend(
            [
                f"{entry['acceptance_length']:.2f} ({spread['min']:.2f}-{spread['max']:.2f})",
                " ".join(f"{rate:.2f}" for rate in entry["rates"]),
            ]
        )
    text = (
        f"Acceptance. {_texts(found, 'speculation_acceptance.json')} The acceptance length over "
        "all prompts (smallest and largest of single prompts), and by position the share of "
        "drafted tokens that were accepted where everything before them was. The shortlist has the "
        f"{found['shortlist']:,} tokens that are most frequent in the training text."
    )
    heads = ["drafts", "greedy", "by position", "temperature 0.7", "by position"]
    return f"{wrapped(text)}\n\n{table(heads, list(by_way.values()))}"


def _gain(found: dict[str, Any]) -> str:
    decoding = [entry for entry in found["results"] if entry["what"] == "decode"]
    differ = sum(entry.get("texts_that_differ", 0) for entry in decoding)
    text = (
        f"Speed. {_texts(found, 'speculation.json')} Processor: {found['machine']['cpu']}, "
        f"{found['machine']['threads']} threads. Greedy texts that differ from those of plain "
        f"decoding: {differ}."
    )
    parts = [wrapped(text)]
    for temperature in sorted({entry["temperature"] for entry in decoding}):
        entries = [entry for entry in decoding if entry["temperature"] == temperature]
        rows = [["none", f"{entries[0]['tokens_per_second']['plain']:,.0f}", "1", "", "1"]]
        for entry in entries:
            ratio, predicted = entry["times_faster"], entry["predicted_times_faster"]
            rows.append(
                [
                    DRAFTS[entry["way"]],
                    f"{entry['tokens_per_second']['ours']:,.0f}",
                    f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})",
                    f"{predicted['ledger']:.2f} / {predicted['measured']:.2f}",
                    f"{entry['statistics']['acceptance_length']:.2f}",
                ]
            )
        name = f"temperature {temperature}" if temperature else "greedy"
        heads = [
            f"drafts, {name}", "tokens per second", "times plain", "predicted", "acceptance length"
        ]  # fmt: skip
        parts.append(table(heads, rows))
    ways = [entry for entry in found["results"] if entry["what"] == "rollback"]
    rollback = "; ".join(
        f"{entry['bytes_kept']:,} bytes and "
        f"{entry['verify_and_keep_over_a_plain_step']:.2f} plain steps with "
        f"{ROLLBACK[entry['way']]}"
        for entry in ways
    )
    after = (
        f"While a draft of {ways[0]['draft_length']} tokens is verified, something must be stored "
        "to roll the cache back. Bytes stored, and time of verifying and accepting the draft: "
        f"{rollback}."
    )
    return "\n\n".join([*parts, wrapped(after)])


def removal(records: Path) -> str:
    """What small models lose without one of their parts."""
    found = read(records / "removal.json")
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
        f"Record: {link('removal.json', 'removal.json')}. {seeds} seeds; {steps['text']} steps on "
        f"text, {steps['recall']} on recall. Median, and in brackets the smallest and largest "
        "difference between runs of one seed."
    )
    heads = ["without", "bits per byte", "more than whole", "recall", "more than whole"]
    return f"{wrapped(text)}\n\n{table(heads, rows)}"
