"""Figures of what our own techniques give and cost, as Markdown from the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.figures.markdown import link, percent, read, size_of, table, wrapped

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


def bfloat16(records: Path) -> str:
    """Quality in bfloat16."""
    found = read(records / "bf16_quality.json")
    bits = found["bits_per_byte"]
    return wrapped(
        f"Quality in bfloat16 ({link('bf16_quality.json')}): the model {found['model']} and with "
        f"{size_of(found)}, needs {bits['bfloat16']:.4f} bits per byte of held-out text in "
        f"bfloat16 and {bits['float32']:.4f} in float32."
    )


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
    }  # fmt: skip
    rows = []
    for entry in found["results"]:
        if "weights" in entry:
            rows.append(
                [
                    names.get(entry["as"], entry["as"]),
                    f"{entry['bits_a_weight']:.2f}",
                    *(
                        percent(entry[w]["change_percent"])
                        for w in ("weights", "weights and inputs")
                    ),
                ]
            )
    groups = found["results"][0]["nats_per_token"]["n"]
    text = (
        f"Change of held-out loss in percent, for the model `{found['model']}` with "
        f"{size_of(found)} after {found['training_seconds']:.0f} seconds of training "
        f"({link('nvfp4_checkpoints_loss.json')}): median, smallest and largest of {groups} "
        "groups of held-out files."
    )
    heads = ["format", "bits per weight", "weights quantized", "weights and inputs"]
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
    """Speculative decoding beside plain decoding."""
    found = read(records / "speculation.json")
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
        f"Record: {link('speculation.json', 'speculation.json')}. The model `{found['model']}` "
        f"with {size_of(found)} "
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
    return f"{wrapped(text)}\n\n{table(heads, list(by_way.values()))}\n\n{wrapped(after)}"


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
