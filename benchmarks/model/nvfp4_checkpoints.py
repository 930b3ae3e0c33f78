"""Checkpoints in 4 and 8 bits: their size, the speed of generating, and the change of the loss.

    python -m benchmarks nvfp4_checkpoints                       the shipped model, rounded again
    python -m benchmarks nvfp4_checkpoints --only loss --model runs/lite-base/model
    python -m benchmarks nvfp4_checkpoints --only size

**Size and speed** of a model of size M (106 million random weights, as in `model_speed`), saved in
BF16 and packed in NVFP4: bytes on disk, bits per weight of the routed experts, peak memory of
loading a folder, and of loading it and generating (each in a separate process), and tokens per
second of the same folders, run alternately. "unpacked" is the NVFP4 folder, decoded to BF16 while
loading.

**Loss** of a trained model: BF16, FP8 and NVFP4 for all modules, NVFP4 with block scales from the
largest magnitude instead of searched ones, and the mix of least estimated cost under 4.75 bits per
weight. What a format costs is measured on weights that are not rounded yet, and the package does
not contain those of the shipped model: they are the folder that `make lite` leaves, for `--model`.
Then the model as it is shipped is measured too. Without `--model` the shipped weights are decoded
and rounded again. This says what a second rounding costs, and less than the first one did: a weight
that is an NVFP4 number already stays what it is, or nearly so.

Held-out loss is measured with plain inputs ("weights"), and with inputs rounded to the format of
each weight, as Blackwell's tensor cores need them ("weights and inputs"). The held-out documents
are cut to 1,024 tokens and divided into groups, and the change is given for each group, because a
change of a hundredth of a percent may be random. Nothing is tuned on these documents.

A CPU has no instructions for these formats: decoding takes time that BF16 does not need. On a CPU
packed weights save memory only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.model import peers, shipped
from benchmarks.record import write_record
from nemotron_lite import Nemotron, NemotronConfig, generate, load, save
from nemotron_lite.checkpoint import storage_summary, weight_bytes
from nemotron_lite.checkpoint.locations import resolve
from nemotron_lite.data import HeldOut, TextData, decode, prepare, sample_windows
from nemotron_lite.quantization import (  # fmt: skip
    Calibration,
    allocate_bits,
    bits_per_weight,
    calibrate,
    measure_sensitivity,
    quantizable_modules,
    quantize_model,
    single_format,
)
from nemotron_lite.quantization.packed_layers import PackedWeight
from nemotron_lite.train import Evaluation, evaluate

BUDGET = 4.75  # bits a weight
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
# Folder, packed, dtype: the ways to load the model.
WAYS: dict[str, tuple[str, bool, str]] = {
    "bf16": ("bf16", False, "bfloat16"),
    "packed": ("nvfp4", True, "bfloat16"),
    "unpacked": ("nvfp4", False, "bfloat16"),
    "packed, float32": ("nvfp4", True, "float32"),
    "float32": ("bf16", False, "float32"),
}


def write_folders(config: NemotronConfig, folder: Path) -> None:
    """One model twice: in BF16, and with every module in NVFP4."""
    torch.manual_seed(0)
    model = Nemotron(config, seed=0).eval()
    peers.randomize(model, config)
    save(model.to(torch.bfloat16), folder / "bf16")
    # A search for better scales would take longer and would not change the size.
    quantize_model(model, single_format(quantizable_modules(model), "nvfp4"), search=False)
    save(model, folder / "nvfp4")


def prepare_way(folder: Path, way: str, tokens: int) -> Callable[[], object]:
    """A call that loads a folder and generates some tokens (0: only loads)."""
    name, packed, dtype = WAYS[way]
    small = peers.SIZES["tiny"]
    with tempfile.TemporaryDirectory() as trial:  # memory that torch allocates once does not count
        save(Nemotron(small).to(torch.bfloat16), Path(trial) / "m")
        generate(
            load(Path(trial) / "m", dtype=getattr(torch, dtype)),
            [PROMPT],
            2,
            temperature=0,
            stop=(),
        )

    def work() -> None:
        model = load(folder / name, packed=packed, dtype=getattr(torch, dtype))
        if tokens:
            generate(model, [PROMPT], tokens, temperature=0, stop=())

    return work


def measure_size(config: NemotronConfig, folder: Path, tokens: int) -> list[dict[str, Any]]:
    """Bytes on disk, bits per weight, and peak memory."""
    found: list[dict[str, Any]] = []
    for name in ("bf16", "nvfp4"):
        experts = [held for held in storage_summary(folder / name) if held.role == "experts"]
        found.append(
            {
                "what": "on disk",
                "folder": name,
                "bytes": weight_bytes(folder / name),
                "routed_experts": {
                    "weights": sum(held.weights for held in experts),
                    "bytes": sum(held.num_bytes for held in experts),
                    "bits_a_weight": 8
                    * sum(h.num_bytes for h in experts)
                    / sum(h.weights for h in experts),
                },
            }
        )
    for way in WAYS:
        peaks = {
            what: measure.in_own_process(
                "benchmarks.model.nvfp4_checkpoints", "child", str(folder), way, str(count)
            )
            for what, count in (("load", 0), ("load_and_generate", tokens))
        }
        found.append({"what": "peak of memory", "way": way, "peak_bytes": peaks})
    for entry in found:
        print(f"  {entry}", flush=True)
    return found


def measure_speed(folder: Path, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Tokens per second of every way, compared with BF16 in the same rounds."""
    models = {
        way: load(folder / name, packed=packed, dtype=getattr(torch, dtype))
        for way, (name, packed, dtype) in WAYS.items()
    }
    found = []
    for rows in (1, 8):
        calls = {
            w: partial(generate, model, [PROMPT] * rows, tokens) for w, model in models.items()
        }
        seconds = measure.alternate(calls, rounds)
        for way in WAYS:
            if way == "bf16":
                continue
            entry = measure.compare(
                "decode",
                {"ours": seconds[way], "bf16": seconds["bf16"]},
                over="bf16",
                tokens=rows * tokens,
                way=way,
                rows=rows,
            )
            found.append(entry)
            print(f"  {measure.describe(entry)}", flush=True)
    return found


def groups_of(data: TextData, count: int, most: int) -> list[HeldOut]:
    """Held-out documents in groups of about equal size, none longer than `most` tokens each."""
    cut = [document[:most] for document in data.held_out.documents]
    groups: list[list[np.ndarray]] = [[] for _ in range(min(count, len(cut)))]
    for document in sorted(cut, key=len, reverse=True):
        min(groups, key=lambda group: sum(map(len, group))).append(document)
    return [
        HeldOut(tuple(g), sum(len(decode(data.tokenizer, d).encode()) for d in g)) for g in groups
    ]


def losses(model: Nemotron, groups: list[HeldOut]) -> list[Evaluation]:
    """The score of each group."""
    return [evaluate(model, group) for group in groups]


def bits_per_byte(found: list[Evaluation]) -> float:
    """Of all groups together."""
    return sum(e.bits_per_byte * e.num_bytes for e in found) / sum(e.num_bytes for e in found)


def assignments(
    model: Nemotron, batches: list[Tensor], found: Calibration, bits: float
) -> dict[str, tuple[dict[str, str], bool, float]]:
    """By name: format of each unit, whether scales are searched, and the estimate of its cost."""
    costs = measure_sensitivity(model, batches, found)
    nats = dict(zip([unit.path for unit in costs.modules], costs.nats, strict=True))
    chosen: dict[str, tuple[dict[str, str], bool]] = {
        f"{form} for all": (single_format(costs.modules, form), True)
        for form in ("bf16", "fp8", "nvfp4")
    }
    chosen["nvfp4 for all, scales by rule"] = (single_format(costs.modules, "nvfp4"), False)
    chosen[f"mixed, {bits} bits"] = (allocate_bits(costs, bits), True)
    return {
        name: (formats, search, sum(nats[path][form] for path, form in formats.items()))
        for name, (formats, search) in chosen.items()
    }


def measure_loss(
    model: Nemotron,
    data: TextData,
    *,
    bits: float,
    prompts: int,
    length: int,
    most: int,
    packed: Nemotron | None = None,
) -> list[dict[str, Any]]:
    """Held-out loss of every assignment of formats, and of the model before quantizing.

    Args:
        bits: the budget of the mix.
        prompts, length: pieces of text to calibrate on, and tokens of each.
        most: tokens of a held-out document.
        packed: the same model as it is shipped, which is measured too.
    """
    parts = data.train.tokens, data.train.starts
    documents = [part for part in _split(*parts) if len(part) >= length]
    batches = list(sample_windows(documents, prompts, length).split(4))
    groups = groups_of(data, 8, most)
    calibration, base = calibrate(model, batches), losses(model, groups)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    config, parts_of_model = model.config, quantizable_modules(model)
    found: list[dict[str, Any]] = [{"what": "loss", "as": "it was", **_scores(base)}]
    print(f"  as it was: {found[0]['bits_per_byte']:.4f} bits per byte", flush=True)
    for name, (formats, search, estimate) in assignments(model, batches, calibration, bits).items():
        other = Nemotron(config)
        other.load_state_dict(plain)
        quantize_model(other.eval(), formats, calibration, search=search)
        # What is not quantized is stored in BF16; the arithmetic is float32 for all.
        other.to(torch.bfloat16).float()
        entry: dict[str, Any] = {
            "what": "loss", "as": name,
            "bits_a_weight": bits_per_weight(parts_of_model, formats),
            "formats": dict(Counter(formats.values())),
            "estimated_nats": estimate,
        }  # fmt: skip
        if "mixed" in name:
            roles = {unit.path: unit.role for unit in parts_of_model}
            entry["by_role"] = dict(
                sorted(Counter(f"{roles[p]} {f}" for p, f in formats.items()).items())
            )
        found.append(entry | _with_and_without_inputs(name, other, groups, base))
    if packed is not None:
        entry = {"what": "loss", "as": "shipped", "bits_a_weight": stored_bits(shipped.LITE)}
        found.append(entry | _with_and_without_inputs("shipped", packed, groups, base))
    return found


def stored_bits(model: str) -> float:
    """Bits per weight of what is quantized in a checkpoint, with the scales."""
    held = [part for part in storage_summary(resolve(model)) if part.format in ("NVFP4", "FP8")]
    return 8 * sum(part.num_bytes for part in held) / sum(part.weights for part in held)


def _with_and_without_inputs(
    name: str, model: Nemotron, groups: list[HeldOut], base: list[Evaluation]
) -> dict[str, Any]:
    """The scores with plain inputs and with rounded ones, and their changes in percent."""
    entry: dict[str, Any] = {}
    for label, rounds in (("weights", False), ("weights and inputs", True)):
        for layer in model.modules():
            if isinstance(layer, PackedWeight):
                layer.quantize_inputs = rounds
        now = losses(model, groups)
        pairs = zip(now, base, strict=True)
        changes = [100 * (after.nats_per_token / b.nats_per_token - 1) for after, b in pairs]
        change = {**measure.summary(changes), "each": changes}
        entry[label] = {**_scores(now), "change_percent": change}
        print(
            f"  {name}, {label}: {entry[label]['bits_per_byte']:.4f} bits per byte, "
            f"{change['median']:+.3f} % ({change['min']:+.3f} to {change['max']:+.3f})",
            flush=True,
        )
    return entry


def _scores(found: list[Evaluation]) -> dict[str, Any]:
    return {
        "bits_per_byte": bits_per_byte(found),
        "nats_per_token": measure.summary([e.nats_per_token for e in found]),
    }


def _split(tokens: Any, starts: Any) -> list[Any]:
    ends = [*starts[1:], len(tokens)]
    return [np.asarray(tokens[a:b], np.int64) for a, b in zip(starts, ends, strict=True)]


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write `nvfp4_checkpoints_size.json` and `nvfp4_checkpoints_loss.json`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks nvfp4_checkpoints", allow_abbrev=False
    )
    parser.add_argument("--only", default="size,loss", help="size, loss or both")
    parser.add_argument("--model", type=Path, help="a trained checkpoint folder")
    parser.add_argument("--tokens", type=int, default=48, help="written by each way")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a trial: tiny, no record")
    asked = parser.parse_args(arguments)
    works = set(asked.only.split(","))
    if not works <= {"size", "loss"}:
        parser.error(f"--only {asked.only}: expected size, loss or both.")
    if "size" in works:
        size, tokens, rounds = "M", asked.tokens, asked.rounds
        if asked.quick:
            size, tokens, rounds = "tiny", 4, 2
        with tempfile.TemporaryDirectory() as folder:
            write_folders(peers.SIZES[size], Path(folder))
            results = measure_size(peers.SIZES[size], Path(folder), tokens)
            results += measure_speed(Path(folder), tokens, rounds)
        payload = {
            "size": size, "path": "`load(folder, packed=...)`, then `generate`",
            "prompt_tokens": len(PROMPT), "new_tokens": tokens,
        }  # fmt: skip
        if not asked.quick:
            print(write_record("nvfp4_checkpoints_size", {**payload, "results": results}))
    if "loss" not in works:
        return
    if asked.quick:
        data = prepare(vocab_size=300, held_out_bytes=2_000)
        config = peers.SIZES["tiny"].replace(vocab_size=300)
        measure_loss(Nemotron(config, seed=0), data, bits=6.0, prompts=2, length=16, most=64)
        return
    trained = shipped.open_trained(asked.model)
    packed = None
    if shipped.is_before_packing(trained.model):
        packed = load(shipped.LITE, dtype=torch.float32, packed=True).eval()
    results = measure_loss(
        trained.model, trained.data, bits=BUDGET, prompts=32, length=256, most=1024, packed=packed
    )
    payload = {
        "path": "`evaluate` of the quantized model in float32",
        **trained.about,
        "before_packing": packed is not None,
        "calibration": {"passages": 32, "tokens": 256},
        "tokens_of_a_document": 1024,
    }
    print(write_record("nvfp4_checkpoints_loss", {**payload, "results": results}))


def child(folder: str, way: str, tokens: str) -> None:
    """Print the peak memory of one way above an empty process, as JSON."""
    print(json.dumps(measure.peak_above(partial(prepare_way, Path(folder), way, int(tokens)))))


if __name__ == "__main__":  # what `measure_size` starts: child FOLDER WAY TOKENS
    child(*sys.argv[2:])
