"""to_gguf: a model in one file that llama.cpp and the programs around it run.

A GGUF file has keys (sizes, tokenizer, chat template) and tensors. It is complete: no config.json
and no tokenizer.json beside it. All that would go wrong is found before the first byte is written.
Then the tensors are written one after the other, so that the memory needed beside the model is that
of the largest one (in a mixture of experts: one stack of a layer). The old file stays until the new
one is complete (`nemotron_lite/files.py`).

Proven in tests/export by llama.cpp itself (`xllamacpp`): the same greedy tokens, log-probabilities
within 1e-4 in float32, the same tokens for a text, and as many drafts accepted. Two differences of
llama.cpp are known. They change drafts and never the text:

- Behind the MTP module it has a LayerNorm, which also takes the mean away, where ours, Megatron's
  and vLLM's have an RMSNorm.
- Before the first position the module reads one more: the first token with a hidden state of zeros.

In NVFP4 it rounds the inputs of a product to 8 bits on a CPU, so logits differ by more there.

Source: the `gguf` package, which writes the format. Left out: several files, and reading GGUF.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from nemotron_lite.arguments import flag
from nemotron_lite.checkpoint.errors import CheckpointError, shorten
from nemotron_lite.checkpoint.model_tree import read_tree
from nemotron_lite.export.gguf_config import architecture, config_problems, write_config
from nemotron_lite.export.gguf_tensors import FORMATS, NVFP4, Entry, plan
from nemotron_lite.export.gguf_tokenizer import read_vocabulary, write_vocabulary
from nemotron_lite.files import atomic_file, check_utf8, check_writable_folder
from nemotron_lite.generation.chat_template import ChatTemplate, ChatTemplateError
from nemotron_lite.generation.defaults import stop_tokens
from nemotron_lite.model import Nemotron
from nemotron_lite.progress import Progress

_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, NVFP4: 39}  # gguf.LlamaFileType


class ExportError(CheckpointError):
    """A model that the file format cannot hold. It lists every reason; nothing was written."""


def to_gguf(
    model: nn.Module,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    mtp: bool = True,
    tokenizer: Any = None,
    unpack: bool = False,
    pre_tokenizer: str | None = None,
    progress: bool = False,
) -> None:
    """Write `model` as a GGUF file, replacing a file that is there.

    Args:
        model: a `Nemotron` on any device; wrappers are left out, as `save` does.
        path: the file, by habit `….gguf`; its folder is created if it does not exist.
        dtype: of matrices: float32, bfloat16 or float16. None keeps the dtype of each (float64
            becomes float32). Norms, biases, convolution and router are always float32.
        mtp: write the MTP module too, if the model has one.
        tokenizer: a `tokenizers.Tokenizer`, or a fast one of transformers; None takes
            `model.tokenizer`.
        unpack: decode packed weights that GGUF cannot hold (FP8, short rows). Packed NVFP4 weights
            that it can hold always stay packed.
        pre_tokenizer: llama.cpp's name of the rule that splits texts, where it is not recognized.
        progress: show how far it is.

    Raises:
        ExportError: what a GGUF file cannot hold, all reasons together.
        TypeError, ValueError: an argument of another kind, or the package gguf is missing (the
            extra `export`).
        OSError: the file cannot be written; the old one is as it was.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FORMATS):
        expected = ", ".join(str(each).removeprefix("torch.") for each in FORMATS)
        raise ValueError(f"dtype={dtype}: expected None or one of {expected}.")
    mtp, unpack = flag("mtp", mtp), flag("unpack", unpack)
    file = _file_path(path)
    library = gguf_library()
    tree = read_tree(model)
    if tree.problems:
        raise ExportError(file, tree.problems)
    inside = tree.model
    tokenizer = _plain_tokenizer(inside.tokenizer if tokenizer is None else tokenizer)
    kind = type(inside)
    if kind.forward is not Nemotron.forward:
        warnings.warn(
            f"{kind.__module__}.{kind.__qualname__} has a forward of its own, which no file holds: "
            "llama.cpp computes what a plain Nemotron does with these weights.",
            stacklevel=2,
        )
    config, stops = inside.config, stop_tokens(inside)
    vocabulary, wrong = read_vocabulary(
        tokenizer, config.vocab_size, config.bos_token_id, stops, pre_tokenizer
    )
    problems = config_problems(config, mtp) + wrong
    entries: list[Entry] = []
    if not problems:

        def name(kind: str, block: int | None) -> str:
            return str(library.TENSOR_NAMES[library.MODEL_TENSOR[kind]]).format(bid=block)

        entries, problems = plan(tree, name, mtp, dtype, unpack)
    if problems:
        raise ExportError(file, problems)
    check_writable_folder(file.parent)
    file.parent.mkdir(parents=True, exist_ok=True)
    _check_space(file, entries)
    with atomic_file(file) as temporary:
        writer = library.GGUFWriter(temporary, architecture(config, mtp))
        writer.add_type("model")
        writer.add_name(file.stem)
        writer.add_file_type(_FILE_TYPES[_main_format(entries)])
        if any(entry.format == NVFP4 for entry in entries):
            writer.add_quantization_version(library.GGML_QUANT_VERSION)
        write_config(writer, config, mtp)
        write_vocabulary(writer, vocabulary, config.bos_token_id, stops, config.pad_token_id)
        if (template := _template(inside)) is not None:
            writer.add_chat_template(template)
        try:
            not_finite = _write(writer, library, file, entries, progress)
        finally:
            writer.close()
    if not_finite:
        warnings.warn(
            f"{file}: {len(not_finite)} tensors hold NaN or infinity and were written like that: "
            f"{shorten(not_finite)}. Take an earlier checkpoint.",
            stacklevel=2,
        )


def _write(
    writer: Any, library: Any, file: Path, entries: list[Entry], progress: bool
) -> list[str]:
    """Write header and tensors; the names of tensors with NaN or infinity."""
    for entry in entries:
        shape = entry.shape
        if entry.format == NVFP4:
            shape = (*shape[:-1], entry.nbytes // int(np.prod(shape[:-1])))
        kinds = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, NVFP4: np.uint8}
        writer.add_tensor_info(
            entry.name,
            shape,
            np.dtype(kinds[entry.format]),
            entry.nbytes,
            raw_dtype=library.GGMLQuantizationType[entry.format],
        )
    not_finite: list[str] = []
    with Progress("writing", sum(e.nbytes for e in entries), enabled=progress) as report:
        done = 0
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in entries:
                array = entry.array()
                if not _is_finite(array, entry.format):
                    not_finite.append(entry.source)
                writer.write_tensor_data(array)
                del array  # before the next one is made
                done += entry.nbytes
                report.update(done, entry.name)
        except OverflowError as error:
            raise ExportError(file, [str(error)]) from None
        except OSError as error:
            if error.strerror:
                raise
            raise OSError(
                f"{file} cannot be written ({error}): the disk may be full. Free some space, or "
                "name a folder on another disk."
            ) from error
    return not_finite


def _is_finite(array: np.ndarray, format: str) -> bool:
    """Whether no number is NaN or infinite; codes of NVFP4 have neither."""
    if format == NVFP4 or not array.size:
        return True
    if format == "BF16":  # the bits of a float32 without the lower half
        return not bool(((array & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def _main_format(entries: list[Entry]) -> str:
    """The format of most numbers."""
    counts: dict[str, int] = {}
    for entry in entries:
        counts[entry.format] = counts.get(entry.format, 0) + int(np.prod(entry.shape))
    return max(counts, key=counts.__getitem__)


def _file_path(path: str | Path) -> Path:
    """The file that a user names.

    Raises:
        TypeError, ValueError: no path, or an empty one.
        IsADirectoryError: a folder.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"path={path!r} ({type(path).__name__}): expected a text or a Path.")
    if not str(path).strip() or "\0" in str(path):
        raise ValueError(f"path={str(path)!r}: expected the name of a file, as model.gguf.")
    file = Path(path).expanduser().absolute()
    check_utf8(file)
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder: name a file in it, such as model.gguf.")
    return file


def _plain_tokenizer(found: Any) -> Tokenizer:
    """The `tokenizers.Tokenizer` itself; transformers' fast tokenizers have one inside.

    Raises:
        ValueError: there is none.
        TypeError: something else.
    """
    if found is None:
        raise ValueError(
            "this model has no tokenizer, and a GGUF file holds one: put tokenizer.json into the "
            "checkpoint folder, or give tokenizer=..."
        )
    inside = getattr(found, "backend_tokenizer", found)
    if not isinstance(inside, Tokenizer):
        raise TypeError(
            f"tokenizer is a {type(found).__name__}: expected a tokenizers.Tokenizer or None."
        )
    return inside


def _template(model: Nemotron) -> str | None:
    """The chat template of a model, if it has one."""
    try:
        return ChatTemplate.of(model).source
    except ChatTemplateError:
        return None


def _check_space(file: Path, entries: list[Entry]) -> None:
    """Refuse to begin where the disk cannot hold the new file beside the old one.

    Raises:
        OSError: too little space.
    """
    needed, free = sum(entry.nbytes for entry in entries), shutil.disk_usage(file.parent).free
    if needed > free:
        raise OSError(
            f"{file} needs {needed / 2**30:,.1f} GiB and its disk has {free / 2**30:,.1f} GiB free "
            "(an old file stays until the new one is complete): free some space, or name a folder "
            "on another disk."
        )


def gguf_library() -> Any:
    """The package gguf.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            "writing GGUF files needs the package gguf: install it (pip install gguf, or the extra "
            '"export").'
        ) from error
    return gguf
