"""save: a model becomes a folder that Hugging Face's programs open.

The folder has the hub's layout: names with `backbone.`, one pair of tensors per expert, `mtp.*`
included, A as `A_log`. Up to `max_shard_bytes` everything is in `model.safetensors`; beyond that in
numbered shards with an index that says which tensor is where. Beside them lie config.json,
generation_config.json and, with a tokenizer, tokenizer.json.

A safetensors file is 8 bytes that give the length of a JSON header, the header

    {"backbone.norm_f.weight": {"dtype": "BF16", "shape": [4096], "data_offsets": [0, 8192]}, ...}

padded with spaces to a multiple of 8, and the bytes of the tensors. We write it ourselves, tensor
by tensor, because the library wants all tensors of a file at once and no two that share memory,
which slices of one stack of experts do; saving would then need a second copy of the weights.

Packed layers (`layers/packed.py`) are written bit by bit as they are, in ModelOpt's layout, with
hf_quant_config.json beside config.json.

Saving is atomic (see `nemotron_lite/files.py`): at every moment `path` holds the old checkpoint or
the new one.

Source: the safetensors format description; reference sheet 10.1. Left out: the chat template and
other tokenizer settings of the folder a model was loaded from, which are not part of the model;
files of that kind that already lie in `path` stay there.
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
from nemotron_lite.checkpoint.modelopt import CACHE_SCALES, FORM_OF
from nemotron_lite.checkpoint.names import hub_names
from nemotron_lite.checkpoint.reader import STAYS_FLOAT32
from nemotron_lite.checkpoint.validation import INDEX, WEIGHTS, CheckpointError
from nemotron_lite.files import atomic_folder
from nemotron_lite.hf_config import to_hf, without_dt_clamp
from nemotron_lite.layers.moe import Experts, Router
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.packed_layers import Packed, PackedExperts, ScaledLinear

MAX_SHARD_BYTES = 5_000_000_000  # the hub's habit

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_PACKED_CODES = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}  # in packed layers only
_ALGO_OF = {form: algo for algo, form in FORM_OF.items()}
_OURS = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|config\.json"
    r"|generation_config\.json|tokenizer\.json|hf_quant_config\.json"
)


class _Part(NamedTuple):
    """One tensor of the file to be."""

    name: str
    tensor: Tensor  # the model's own memory, or one expert's slice of it

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

    The old checkpoint stays complete until the new one is; that takes room for both. Other files in
    the folder are kept. Weights are written as they are; config.json names their dtype if all share
    one (the selection bias apart).

    Args:
        model: on any device.
        path: the folder; created if need be. Not the current folder.
        tokenizer: written as tokenizer.json; None takes `model.tokenizer` if there is one.
        max_shard_bytes: weights per file; a single larger tensor still gets a file of its own.

    Raises:
        CheckpointError: the model has no weights, weights of a type the format's readers do not
            know, or a tokenizer with ids beyond its vocabulary.
        OSError, ValueError: the folder cannot be written or replaced; the old one is as it was.
    """
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    parts = list(_parts(model))
    _check(model, parts, tokenizer, Path(path))
    shards = _shards(parts, max_shard_bytes)
    with atomic_folder(Path(path), lambda name: _OURS.fullmatch(name) is not None) as folder:
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = WEIGHTS
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                weight_map.update({part.name: name for part in shard})
            with (folder / name).open("wb") as file:
                _write_shard(file, shard)
        if weight_map:
            total = sum(part.size for part in parts)
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


def _parts(model: Nemotron) -> Iterator[_Part]:
    for name, tensor in model.state_dict().items():
        for disk_name, expert in hub_names(name, tensor.shape[0] if tensor.ndim else 1):
            yield _Part(disk_name, tensor if expert is None else tensor[expert])


def _check(model: Nemotron, parts: list[_Part], tokenizer: Tokenizer | None, path: Path) -> None:
    problems = []
    empty = [part.name for part in parts if part.tensor.is_meta]
    if empty:
        problems.append(
            f"the model has no weights: {len(empty)} tensors are on the meta device, such as "
            f"{empty[0]}. Build it on a real device, or load a checkpoint"
        )
    bytes_of_packed = {
        part.data_ptr() for module in _packed(model).values() for part in module.parts().values()
    }
    odd = [
        part for part in parts
        if part.tensor.dtype not in _CODES
        and part.tensor.untyped_storage().data_ptr() not in bytes_of_packed
    ]  # fmt: skip
    if odd:
        problems.append(
            f"{len(odd)} tensors are of a type that is not written, such as {odd[0].name} "
            f"({odd[0].tensor.dtype}); expected one of {', '.join(map(str, _CODES))}"
        )
    if tokenizer is not None:
        highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if highest >= model.config.vocab_size:
            problems.append(
                f"the tokenizer has ids up to {highest}, the model's vocabulary only "
                f"{model.config.vocab_size} entries: this is another model's tokenizer"
            )
    if problems:
        raise CheckpointError(path, problems)


def _shards(parts: list[_Part], limit: int) -> list[list[_Part]]:
    """Consecutive tensors, as many per file as fit."""
    if limit < 1:
        raise ValueError(f"max_shard_bytes={limit} does not work: expected a number above 0.")
    shards: list[list[_Part]] = []
    room = 0
    for part in parts:
        if not shards or part.size > room:
            shards.append([])
            room = limit
        shards[-1].append(part)
        room -= part.size
    return shards


def _write_shard(file: BinaryIO, parts: list[_Part]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wide types first keeps each tensor aligned to its own width, which the format asks for.
    parts = sorted(parts, key=lambda part: -part.tensor.element_size())
    for part in parts:
        header[part.name] = {
            "dtype": (_CODES | _PACKED_CODES)[part.tensor.dtype],
            "shape": list(part.tensor.shape),
            "data_offsets": [offset, offset + part.size],
        }
        offset += part.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for part in parts:
        whole = part.tensor.detach().cpu().contiguous()
        file.write(whole.view(-1).view(torch.uint8).numpy().data)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _config(model: Nemotron) -> dict[str, Any]:
    """config.json: the sizes, and the dtype if there is one for all."""
    hf = without_dt_clamp(to_hf(model.config))
    if "time_step_limit" in hf:  # strict JSON has no infinity; this is transformers' way
        hf["time_step_limit"] = [
            {"__float__": "Infinity"} if value == math.inf else value
            for value in hf["time_step_limit"]
        ]
    packed = tuple(f"{name}." for name in _packed(model))
    dtypes = {
        tensor.dtype for name, tensor in model.state_dict().items()
        if not name.endswith((STAYS_FLOAT32, *CACHE_SCALES)) and not name.startswith(packed or "/")
    }  # fmt: skip
    if len(dtypes) == 1:
        hf["torch_dtype"] = str(dtypes.pop()).removeprefix("torch.")
    return hf


def _packed(model: Nemotron) -> dict[str, Packed]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Packed)}


def _quantization(
    model: Nemotron, packed: dict[str, Packed]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the two places say: `hf_quant_config.json` and `quantization_config`."""
    formats = {}
    for name, module in packed.items():
        for disk_name, _ in hub_names(f"{name}.weight", module.shape[0]):
            formats[disk_name.removesuffix(".weight")] = _ALGO_OF[module.form]
    plain = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | Router):
            plain.append(name)
        elif isinstance(module, Experts | PackedExperts):
            plain += [
                f"{name}.{matrix}" for matrix in ("up_proj", "down_proj")
                if isinstance(getattr(module, matrix), nn.Parameter)
            ]  # fmt: skip
    cache = any(isinstance(module, ScaledLinear) for module in model.modules())
    return modelopt_config.describe(formats, plain, cache)


def _tokenizer_config(model: Nemotron) -> dict[str, Any]:
    """The least that makes transformers' AutoTokenizer open tokenizer.json as it is."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
