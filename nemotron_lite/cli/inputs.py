"""The inputs of the commands: sizes, a text, a model with its tokenizer; with early checks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_lite.cli.common import DTYPES, err
from nemotron_lite.config import PRESETS, NemotronConfig

if TYPE_CHECKING:
    from nemotron_lite.data import TextData
    from nemotron_lite.model import Nemotron

TRAINING_BYTES = 16  # per parameter, in float32: weight, gradient and AdamW's two moments


def read_config(which: str) -> NemotronConfig:
    """The config of a preset, of a config.json or of a folder that has one.

    Raises:
        ConfigError: an unknown preset, or sizes that do not fit together.
        ValueError: the file is missing or not JSON.
    """
    path = Path(which)
    if which in PRESETS or not path.exists():
        return NemotronConfig.from_preset(which)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no config.json in {path}: give a checkpoint folder or a preset.")
    try:
        return NemotronConfig.from_hf(json.loads(file.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error


def read_model(path: Path, dtype: str | None = None, *, packed: bool = False) -> Nemotron:
    """Load a checkpoint that has a tokenizer, so that the model can read text.

    Raises:
        CheckpointError: the folder cannot be loaded.
        ValueError: an unknown dtype, no tokenizer, or `packed` without quantized weights.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    import torch

    from nemotron_lite.checkpoint import load
    from nemotron_lite.quantization.packed_layers import PackedWeight

    model = load(path, dtype=getattr(torch, dtype) if dtype else None, packed=packed)
    if packed and not any(isinstance(module, PackedWeight) for module in model.modules()):
        raise ValueError(
            f"--packed: nothing in {path} is quantized. Omit this option, or make a quantized "
            "folder with `nemotron-lite quantize` first."
        )
    if model.tokenizer is None:
        raise ValueError(
            f"{path} has no tokenizer.json, so text cannot be encoded: copy the model's tokenizer "
            "there, or call nemotron_lite from Python with token ids."
        )
    return model


def for_our_tokenizer(config: NemotronConfig, vocab_size: int | None = None) -> NemotronConfig:
    """The same model with the special tokens of the tokenizer that `data` trains."""
    from nemotron_lite.data import END_OF_TEXT_ID

    return config.replace(
        vocab_size=vocab_size or config.vocab_size,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )


def check_memory(config: NemotronConfig) -> None:
    """Check that the training state fits into memory.

    Raises:
        ValueError: weights, gradients and AdamW's moments need more memory than the machine has.
    """
    from nemotron_lite import ledger

    needed = ledger.parameters(config).total * TRAINING_BYTES
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > have:
        raise ValueError(
            f"training this model needs {needed / 2**30:,.0f} GiB for weights, gradients and "
            f"AdamW's moments, but this machine has {have / 2**30:,.0f} GiB: choose a smaller "
            "model, such as lite."
        )


def prepare_text(config: NemotronConfig, text: Path | None) -> TextData:
    """The text to train on, with a tokenizer of the model's vocabulary size."""
    from nemotron_lite.data import prepare

    with err.status("reading files, training a tokenizer, measuring gzip and n-grams"):
        return prepare(vocab_size=config.vocab_size, root=text)
