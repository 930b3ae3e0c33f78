"""The trained model of the benchmarks, and text that it has never seen.

A model of random weights is enough for a time. A loss, or how many drafts are accepted, says
something only of a trained model, and the package has one: "lite" (`nemotron_lite.shipped_models`).
It is scored on the files that its manifest holds out. `--model PATH` of a benchmark takes another
checkpoint folder, such as `runs/lite-base/model`: `make lite` leaves the shipped model there as it
was before its weights were packed.

The weights of "lite" are stored in four and eight bits. A benchmark that rounds weights again says
so, because rounding a number that is rounded already costs less.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemotron_lite import Nemotron, load
from nemotron_lite.checkpoint import storage_summary
from nemotron_lite.checkpoint.locations import resolve
from nemotron_lite.data import TextData, load_corpus, prepare, read_manifest

LITE = "lite"


@dataclass(frozen=True)
class Trained:
    """A model with its text.

    Attributes:
        model: in float32, in evaluation mode.
        data: the standard library in the model's tokens; the held-out files are the manifest's.
        about: what a record says of both.
    """

    model: Nemotron
    data: TextData
    about: dict[str, Any]


def open_trained(folder: Path | None = None, *, cache: Path | None = None) -> Trained:
    """The shipped model, or that of a folder.

    Args:
        folder: None opens the shipped model.
        cache: folder for the prepared text; the usual one by default.

    Raises:
        CheckpointError: there is no model.
        ValueError: it has no tokenizer.
    """
    model = load(folder or LITE, dtype=torch.float32).eval()
    if model.tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer.json, so it cannot be scored on text.")
    config, manifest = model.config, read_manifest()
    data = prepare(
        tokenizer=model.tokenizer,
        special_ids=(config.bos_token_id, config.eos_token_ids[0]),
        held_out_names=manifest.held_out,
        cache=cache,
    )
    here = {
        document.name: hashlib.sha256(document.content).hexdigest()
        for document in load_corpus(held_out_names=manifest.held_out).held_out
    }
    about = {
        "model": LITE if folder is None else folder.name,
        "shipped": folder is None,
        "parameters": model.num_parameters(),
        "stored_as": formats_of(folder or LITE),
        "held_out": {
            "files": len(data.held_out.documents),
            "bytes": data.held_out.num_bytes,
            "files_as_in_the_manifest": sum(manifest.held_out[n] == here[n] for n in here),
        },
    }
    return Trained(model, data, about)


def is_before_packing(model: Nemotron) -> bool:
    """Whether these are the weights of the shipped model, before they were packed.

    Packing leaves some weights in BF16, the embedding among them. In BF16 these are equal, and the
    others are not.
    """
    packed = load(LITE, dtype=torch.float32)
    if model.config != packed.config:
        return False
    mine, theirs = model.state_dict(), packed.state_dict()
    equal = {n for n in mine if torch.equal(mine[n].bfloat16(), theirs[n].bfloat16())}
    return "backbone.embeddings.weight" in equal and len(equal) < len(mine)


def formats_of(model: str | Path) -> list[str]:
    """The formats that a checkpoint's weights are stored in, sorted."""
    return sorted({held.format for held in storage_summary(resolve(model))})
