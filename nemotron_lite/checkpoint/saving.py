"""save: write a model to a folder that Hugging Face's programs can open.

The folder has the hub's layout: names with `backbone.`, one pair of tensors per expert, `mtp.*`
included, A as `A_log`. Up to `max_shard_bytes`, all weights are in `model.safetensors`. Larger
models are in numbered shards, with an index that maps tensors to files. The folder also has
config.json, generation_config.json and, if there is a tokenizer, tokenizer.json.

A safetensors file is 8 bytes that give the length of a JSON header, the header

    {"backbone.norm_f.weight": {"dtype": "BF16", "shape": [4096], "data_offsets": [0, 8192]}, ...}

padded with spaces to a multiple of 8, and the bytes of the tensors. This module writes it itself,
tensor by tensor. The safetensors library needs all tensors of a file at once, and refuses tensors
that share memory, as the slices of one stack of experts do. With it, saving would need a second
copy of the weights.

Packed layers (`quantization/packed_layers.py`) are written with exactly the bits they have in
memory, in ModelOpt's layout and with hf_quant_config.json.

Saving is atomic (see `nemotron_lite/files.py`): at every moment `path` holds the old checkpoint or
the new one.

Source: the safetensors format description; reference sheet 10.1. Left out: the chat template and
other tokenizer settings of the folder that a model was loaded from, because they are not part of
the model. If `path` already has such files, they stay there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from nemotron_lite.checkpoint import modelopt_config
from nemotron_lite.checkpoint.errors import CheckpointError
from nemotron_lite.checkpoint.loading import ALWAYS_FLOAT32
from nemotron_lite.checkpoint.modelopt import CACHE_SCALES, FORM_OF
from nemotron_lite.checkpoint.names import hub_names
from nemotron_lite.checkpoint.weight_files import INDEX, WEIGHTS
from nemotron_lite.files import atomic_folder
from nemotron_lite.hf_config import to_hf, without_dt_clamp
from nemotron_lite.layers.moe import Experts, Router
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.packed_layers import LinearWithKVScale, PackedExperts, PackedWeight

MAX_SHARD_BYTES = 5_000_000_000  # as usual on the hub

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_PACKED_CODES = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}  # in packed layers only
_ALGO_OF = {form: algo for algo, form in FORM_OF.items()}
_OUR_FILES = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|config\.json"
    r"|generation_config\.json|tokenizer\.json|hf_quant_config\.json"
)


class _NamedTensor(NamedTuple):
    """A tensor and its name in the file."""

    name: str
    tensor: Tensor  # shares memory with the model; for experts, one slice

    @property
    def size(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


def save(
    model: Nemotron,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model` into the folder `path`, replacing a checkpoint that is there.

    The old checkpoint stays complete until the new one is, so the disk needs space for both. Other
    files in the folder are kept. Weights are written in their own dtype. config.json names it if
    all weights have the same one (except the selection bias, which is always float32).

    Args:
        model: on any device.
        path: the folder; created if it does not exist. It must not be the current folder.
        tokenizer: written as tokenizer.json; None takes `model.tokenizer`, if there is one.
        max_shard_bytes: largest size of a file. A single larger tensor gets a file of its own.

    Raises:
        CheckpointError: the model has no weights, a weight has an unsupported dtype, or the
            tokenizer has ids beyond the model's vocabulary.
        OSError, ValueError: the folder cannot be written or replaced; the old one is unchanged.
    """
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    tensors = list(_named_tensors(model))
    _check(model, tensors, tokenizer, Path(path))
    shards = _shards(tensors, max_shard_bytes)
    with atomic_folder(Path(path), lambda name: _OUR_FILES.fullmatch(name) is not None) as folder:
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = WEIGHTS
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                weight_map.update({each.name: name for each in shard})
            with (folder / name).open("wb") as file:
                _write_shard(file, shard)
        if weight_map:
            total = sum(each.size for each in tensors)
            _write_json(
                folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
        config = _config(model)
        if packed := _packed(model):
            own, config[modelopt_config.KEY] = _quantization(model, packed)
            _write_json(folder / modelopt_config.FILE, own)
        _write_json(folder / "config.json", config)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        hf = to_hf(model.config)
        _write_json(folder / "generation_config.json", {name: hf[name] for name in ids})
        if tokenizer is not None:
            tokenizer.save(str(folder / "tokenizer.json"))
            if not (Path(path) / "tokenizer_config.json").exists():
                _write_json(folder / "tokenizer_config.json", _tokenizer_config(model))


def _named_tensors(model: Nemotron) -> Iterator[_NamedTensor]:
    for name, tensor in model.state_dict().items():
        for disk_name, expert in hub_names(name, tensor.shape[0] if tensor.ndim else 1):
            yield _NamedTensor(disk_name, tensor if expert is None else tensor[expert])


def _check(
    model: Nemotron, tensors: list[_NamedTensor], tokenizer: Tokenizer | None, path: Path
) -> None:
    problems = []
    empty = [each.name for each in tensors if each.tensor.is_meta]
    if empty:
        problems.append(
            f"the model has no weights: {len(empty)} tensors are on the meta device, such as "
            f"{empty[0]}. Create it on a real device, or load a checkpoint"
        )
    packed_storage = {
        part.data_ptr() for module in _packed(model).values() for part in module.tensors().values()
    }
    unsupported = [
        each
        for each in tensors
        if each.tensor.dtype not in _CODES
        and each.tensor.untyped_storage().data_ptr() not in packed_storage
    ]
    if unsupported:
        problems.append(
            f"{len(unsupported)} tensors have a dtype that cannot be saved, such as "
            f"{unsupported[0].name} ({unsupported[0].tensor.dtype}); expected one of "
            f"{', '.join(map(str, _CODES))}"
        )
    if tokenizer is not None:
        highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if highest >= model.config.vocab_size:
            problems.append(
                f"the tokenizer has ids up to {highest}, but the model's vocabulary has only "
                f"{model.config.vocab_size} entries: give the tokenizer of this model"
            )
    if problems:
        raise CheckpointError(path, problems)


def _shards(tensors: list[_NamedTensor], limit: int) -> list[list[_NamedTensor]]:
    """Lists of consecutive tensors, each as long as fits into one file."""
    if limit < 1:
        raise ValueError(f"max_shard_bytes={limit} does not work: expected a number above 0.")
    shards: list[list[_NamedTensor]] = []
    free = 0
    for each in tensors:
        if not shards or each.size > free:
            shards.append([])
            free = limit
        shards[-1].append(each)
        free -= each.size
    return shards


def _write_shard(file: BinaryIO, tensors: list[_NamedTensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # The format requires each tensor to be aligned to its element size: wide dtypes come first.
    tensors = sorted(tensors, key=lambda each: -each.tensor.element_size())
    for each in tensors:
        header[each.name] = {
            "dtype": (_CODES | _PACKED_CODES)[each.tensor.dtype],
            "shape": list(each.tensor.shape),
            "data_offsets": [offset, offset + each.size],
        }
        offset += each.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for each in tensors:
        values = each.tensor.detach().cpu().contiguous()
        file.write(values.view(-1).view(torch.uint8).numpy().data)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _config(model: Nemotron) -> dict[str, Any]:
    """The content of config.json: the sizes, and the dtype if all weights have the same."""
    hf = without_dt_clamp(to_hf(model.config))
    if "time_step_limit" in hf:  # strict JSON has no infinity; transformers writes it like this
        hf["time_step_limit"] = [
            {"__float__": "Infinity"} if value == math.inf else value
            for value in hf["time_step_limit"]
        ]
    packed = tuple(f"{name}." for name in _packed(model))
    dtypes = {
        tensor.dtype
        for name, tensor in model.state_dict().items()
        if not name.endswith((ALWAYS_FLOAT32, *CACHE_SCALES)) and not name.startswith(packed or "/")
    }
    if len(dtypes) == 1:
        hf["torch_dtype"] = str(dtypes.pop()).removeprefix("torch.")
    return hf


def _packed(model: Nemotron) -> dict[str, PackedWeight]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)
    }


def _quantization(
    model: Nemotron, packed: dict[str, PackedWeight]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of `hf_quant_config.json` and of `quantization_config`."""
    formats = {}
    for name, module in packed.items():
        for disk_name, _ in hub_names(f"{name}.weight", module.shape[0]):
            formats[disk_name.removesuffix(".weight")] = _ALGO_OF[module.format]
    not_quantized = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | Router):
            not_quantized.append(name)
        elif isinstance(module, Experts | PackedExperts):
            not_quantized += [
                f"{name}.{matrix}"
                for matrix in ("up_proj", "down_proj")
                if isinstance(getattr(module, matrix), nn.Parameter)
            ]
    cache = any(isinstance(module, LinearWithKVScale) for module in model.modules())
    return modelopt_config.describe(formats, not_quantized, cache)


def _tokenizer_config(model: Nemotron) -> dict[str, Any]:
    """The fields that AutoTokenizer in transformers needs to open tokenizer.json unchanged."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
