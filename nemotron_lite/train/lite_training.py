"""Train the shipped model, pack it, score it: what `nemotron-lite train-lite` (`make lite`) does.

    result = train_lite("runs/lite-base", data)         the run; the same call again continues it
    pack_lite(model, data, "runs/lite-base/lite")       four bits a weight, as it is shipped
    write_record("runs/lite-base", ...)                 lite_record.py

Where the recipe has a last part in NVFP4 (`nvfp4_from`), the run has two stages in one folder. The
first stops itself at that update; the second continues it with the one option changed. A run that
was interrupted in either stage goes on there.

Left out: several devices.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemotron_lite.checkpoint import save
from nemotron_lite.data import BatchSource
from nemotron_lite.files import atomic_file
from nemotron_lite.input_files import read_json
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization import (
    allocate_bits,
    calibrate,
    measure_sensitivity,
    quantize_model,
)
from nemotron_lite.train.callbacks import Callback
from nemotron_lite.train.checkpointing import list_checkpoints
from nemotron_lite.train.config import TrainConfig
from nemotron_lite.train.loop import TrainResult, train

BITS = 4.9  # a weight, on average over what can be packed: 12 MB in all
CHOICES = "everything"
CALIBRATION = dict(batches=8, batch_size=4, seq_len=256)


def train_in_stages(
    model: Nemotron,
    data: BatchSource,
    config: TrainConfig,
    folder: str | Path,
    *,
    nvfp4_from: float | None = None,
    progress: bool = True,
    on_step: Callable[[dict[str, Any]], Any] | None = None,
) -> TrainResult:
    """Train a model in a folder; continue the run that is there.

    Args:
        config: with `steps`.
        nvfp4_from: the fraction of the updates after which products are in NVFP4; None: never.

    Raises:
        ValueError: a fraction outside 0 to 1, or no `steps`.
        ResumeError, OSError: as for `train`.
    """
    folder = Path(folder)
    resume = bool(list_checkpoints(folder / "checkpoints"))
    if nvfp4_from is None:
        return train(
            model, data, config, out_dir=folder, resume=resume, progress=progress, on_step=on_step
        )
    if config.steps is None or not 0 < nvfp4_from < 1:
        raise ValueError(
            f"nvfp4_from={nvfp4_from!r} with steps={config.steps} does not work: expected a "
            "fraction between 0 and 1 of a number of updates."
        )
    last = max(1, round(config.steps * nvfp4_from))
    first_part = _StopAt(last)
    changed = ("precision",)
    result = train(
        model,
        data,
        config,
        out_dir=folder,
        resume=resume,
        progress=progress,
        on_step=on_step,
        callbacks=(first_part,),
        allow_changes=changed if resume else (),
    )
    if result.interrupted or result.step < last:
        return result
    second = TrainConfig(**{**config.to_dict(), "precision": "nvfp4"})
    return train(
        model,
        data,
        second,
        out_dir=folder,
        resume=True,
        progress=progress,
        on_step=on_step,
        allow_changes=changed,
    )


class _StopAt(Callback):
    """Ends a run after an update; before the first one if that update was made already."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_start(self, step: int) -> bool:
        return step < self._step

    def on_step(self, record: dict[str, Any]) -> bool:
        return bool(record["step"] < self._step)


def pack_lite(model: Nemotron, data: BatchSource, folder: str | Path) -> None:
    """Quantize a trained model in place, and write it as it is shipped.

    Head and MTP module are packed too, and all formats together stay within `BITS` a weight: most
    modules get NVFP4, the most sensitive ones FP8. Weights that stay plain are stored in bfloat16.
    config.json names float32, so that `load` decodes to the dtype that most processors are fastest
    in.

    Args:
        model: with its tokenizer.
        data: some of its text is read to find how large activations get.
    """
    batches = [
        data.batch(
            i, batch_size=CALIBRATION["batch_size"], seq_len=CALIBRATION["seq_len"], seed=1
        ).tokens
        for i in range(CALIBRATION["batches"])
    ]
    batches = [tokens.to(model.device) for tokens in batches]
    model.eval()
    calibration = calibrate(model, batches, choices=CHOICES)
    sensitivity = measure_sensitivity(model, batches, calibration, choices=CHOICES)
    modules = sensitivity.modules
    least = sum(min(map(m.bits, m.formats)) for m in modules) / sum(m.num_weights for m in modules)
    formats = allocate_bits(sensitivity, max(BITS, least + 0.01))  # a tiny model needs more
    quantize_model(model, formats, calibration).to(torch.bfloat16)
    save(model, folder)
    config = Path(folder) / "config.json"
    content = {**read_json(config), "torch_dtype": "float32"}
    with atomic_file(config) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
