"""Checkpoints in 4 and 8 bits: their size, the speed of generating, and the change of the loss.

    python -m benchmarks nvfp4_checkpoints                       trains for two minutes first
    python -m benchmarks nvfp4_checkpoints --model runs/small    a trained model that is there
    python -m benchmarks nvfp4_checkpoints --only size

**Size and speed** of a model of size M (106 million random weights, as in `model_speed`), saved in
BF16 and packed in NVFP4: bytes on disk, bits per weight of the routed experts, peak memory of
loading a folder, and of loading it and generating (each in a separate process), and tokens per
second of the same folders, run alternately. "unpacked" is the NVFP4 folder, decoded to BF16 while
loading.

**Loss** of a trained model: BF16, FP8 and NVFP4 for all modules, NVFP4 with block scales from the
largest magnitude instead of searched ones, and the mix of least estimated cost under 4.75 bits per
weight. Held-out loss is measured with plain inputs ("weights"), and with inputs rounded to the
format of each weight, as Blackwell's tensor cores need them ("weights and inputs"). The held-out
documents are divided into groups, and the change is given for each group, because a change of a
hundredth of a percent may be random. Nothing is tuned on these documents.

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
from benchmarks.model import peers
from benchmarks.record import write_record
from nemotron_lite import Nemotron, NemotronConfig, generate, load, save
from nemotron_lite.checkpoint import storage_summary, weight_bytes
from nemotron_lite.data import END_OF_TEXT_ID, HeldOut, TextData, prepare, sample_windows
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
from nemotron_lite.train import TrainConfig, evaluate, train

RUNS = measure.ROOT / "runs"
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


def trained_model(seconds: float) -> tuple[Nemotron, TextData]:
    """The `lite` model, trained once and stored in runs/."""
    data = prepare()
    config = NemotronConfig.from_preset(
        "lite", bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID
    )
    digest = measure.model_digest(config, data.tokenizer)
    folder = RUNS / f"nvfp4_checkpoints-{seconds:.0f}-{digest}"
    if not folder.is_dir():
        model = Nemotron(config, seed=0)
        train(model, data, TrainConfig(max_seconds=seconds, bias_rate=0.02))
        save(model, folder, data.tokenizer)
    return load(folder, dtype=torch.float32), data


def groups_of(held_out: HeldOut, count: int, most: int) -> list[HeldOut]:
    """Held-out documents in groups of about equal size, none longer than `most` tokens each."""
    documents = sorted((d[:most] for d in held_out.documents), key=len, reverse=True)
    groups: list[list[Any]] = [[] for _ in range(min(count, len(documents)))]
    for document in documents:
        min(groups, key=lambda group: sum(map(len, group))).append(document)
    # Only losses per token are read from these, so the bytes do not matter.
    return [HeldOut(tuple(group), 1) for group in groups]


def losses(model: Nemotron, groups: list[HeldOut]) -> list[float]:
    """Loss of each group in nats per token."""
    return [evaluate(model, group).nats_per_token for group in groups]


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
    model: Nemotron, data: TextData, *, bits: float, prompts: int, length: int, most: int
) -> list[dict[str, Any]]:
    """Held-out loss of every assignment of formats, and of the model before quantizing."""
    parts = data.train.tokens, data.train.starts
    documents = [part for part in _split(*parts) if len(part) >= length]
    batches = list(sample_windows(documents, prompts, length).split(4))
    groups = groups_of(data.held_out, 8, most)
    calibration, base = calibrate(model, batches), losses(model, groups)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    config, parts_of_model = model.config, quantizable_modules(model)
    found = [{"what": "loss", "as": "it was", "nats_per_token": measure.summary(base)}]
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
        for label, rounds in (("weights", False), ("weights and inputs", True)):
            for layer in other.modules():
                if isinstance(layer, PackedWeight):
                    layer.quantize_inputs = rounds
            now = losses(other, groups)
            changes = [100 * (after / before - 1) for after, before in zip(now, base, strict=True)]
            entry[label] = {
                "nats_per_token": measure.summary(now),
                "change_percent": {**measure.summary(changes), "each": changes},
            }
        found.append(entry)
        change = entry["weights"]["change_percent"], entry["weights and inputs"]["change_percent"]
        print(
            f"  {name}: {entry['bits_a_weight']:.3f} bits, weights {change[0]['median']:+.3f} % "
            f"({change[0]['min']:+.3f} to {change[0]['max']:+.3f}), and inputs "
            f"{change[1]['median']:+.3f} %",
            flush=True,
        )
    return found


def _split(tokens: Any, starts: Any) -> list[Any]:
    ends = [*starts[1:], len(tokens)]
    return [np.asarray(tokens[a:b], np.int64) for a, b in zip(starts, ends, strict=True)]


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write `nvfp4_checkpoints_size.json` and `nvfp4_checkpoints_loss.json`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks nvfp4_checkpoints", allow_abbrev=False
    )
    parser.add_argument("--only", default="size,loss", help="size, loss or both")
    parser.add_argument("--seconds", type=float, default=120.0, help="of training")
    parser.add_argument("--model", type=Path, help="a trained checkpoint folder instead")
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
    if asked.model:
        model, data = load(asked.model, dtype=torch.float32), prepare()
    else:
        model, data = trained_model(asked.seconds)
    results = measure_loss(model, data, bits=BUDGET, prompts=32, length=256, most=512)
    payload = {
        "path": "`evaluate` of the quantized model in float32",
        "model": "lite", "parameters": model.num_parameters(),
        "training_seconds": None if asked.model else asked.seconds,
        "calibration": {"passages": 32, "tokens": 256},
    }  # fmt: skip
    print(write_record("nvfp4_checkpoints_loss", {**payload, "results": results}))


def child(folder: str, way: str, tokens: str) -> None:
    """Print the peak memory of one way above an empty process, as JSON."""
    print(json.dumps(measure.peak_above(partial(prepare_way, Path(folder), way, int(tokens)))))


if __name__ == "__main__":  # what `measure_size` starts: child FOLDER WAY TOKENS
    child(*sys.argv[2:])
