"""The inputs of the commands: sizes, a text, a model with its tokenizer; with early checks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from nemotron_lite import shipped_models
from nemotron_lite.cli.common import DTYPES
from nemotron_lite.config import NemotronConfig, is_preset
from nemotron_lite.input_files import FileError, read_json, read_text

if TYPE_CHECKING:
    from nemotron_lite.model import Nemotron

PROMPT_BYTES = 64 << 20  # a million tokens have some 4 MB
TRAINING_BYTES = 16  # per parameter, in float32: weight, gradient and AdamW's two moments


def read_config(which: str) -> NemotronConfig:
    """The config of a preset, of a config.json, or of a checkpoint as `load` finds it.

    Raises:
        ConfigError: an unknown preset, or sizes that do not fit together.
        ValueError: the file is missing, or it is no readable JSON.
    """
    path = Path(which)
    unknown = "/" not in which and not path.exists() and shipped_models.folder(which) is None
    if is_preset(which) or unknown:
        return NemotronConfig.from_preset(which)
    if not path.is_dir() and path.exists():  # a file, or something that is refused with its kind
        return NemotronConfig.from_hf(read_json(path))
    from nemotron_lite.checkpoint.locations import resolve

    file = resolve(which) / "config.json"
    try:
        return NemotronConfig.from_hf(read_json(file))
    except FileNotFoundError:
        raise ValueError(
            f"no config.json in {file.parent}: give a checkpoint folder or a preset."
        ) from None


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The text of `--prompt`, of standard input (`--prompt -`) or of `--prompt-file`, as it is.

    Raises:
        typer.BadParameter: neither or both are given, or the argument is not UTF-8.
        ValueError: the file or the input cannot be read, is too long or not UTF-8.
    """
    if (prompt is None) == (file is None):
        raise typer.BadParameter(
            "give the text in --prompt, '-' there to read it from standard input, or --prompt-file."
        )
    if file is not None:
        try:
            return read_text(file, limit=PROMPT_BYTES)
        except FileError as error:
            if "named pipe" in error.fault:
                raise ValueError(f"{error} (or --prompt - with the pipe as input).") from error
            raise
    assert prompt is not None
    if prompt != "-":
        return _as_text(prompt)
    if sys.stdin is None:
        raise ValueError("--prompt -: standard input is closed.")
    content = sys.stdin.buffer.read(PROMPT_BYTES + 1)
    if len(content) > PROMPT_BYTES:
        raise ValueError(f"--prompt -: expected at most {PROMPT_BYTES:,} bytes.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt -: the input is not UTF-8 (byte {error.start:,}).") from error


def _as_text(argument: str) -> str:
    """An argument of the command line as text, whatever the locale: its bytes have to be UTF-8."""
    try:
        argument.encode("utf-8")
        return argument
    except UnicodeEncodeError:  # Python keeps bytes that the locale does not have as surrogates
        pass
    try:
        return os.fsencode(argument).decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"--prompt is not UTF-8 (position {error.start:,}).") from error


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
