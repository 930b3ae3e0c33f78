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

The weights of an offloaded model are fetched one by one, so a model larger than the memory is
written too.

Packed layers (`quantization/packed_layers.py`) are written with exactly the bits they have in
memory, in ModelOpt's layout and with hf_quant_config.json.

What is written is what `load` can open: a model in a wrapper is taken out of it, and one with
adapters or other foreign modules is refused before anything is written (`model_tree.py`). The small
files that belong to the model are written too (`companions.py`), and a tokenizer.json that a user
has put into the folder is not lost (`old_tokenizer.py`).

Saving is atomic (see `nemotron_lite/files.py`): at every moment `path` holds the old checkpoint or
the new one. Where the disk makes that impossible, there is a moment in which it holds no
config.json, and every program refuses it.

Source: the safetensors format description; reference sheet 10.1. Left out: sharded models, which
have to be gathered first, and several processes that write one checkpoint together.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Container, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, SupportsIndex

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from nemotron_lite.arguments import integer
from nemotron_lite.checkpoint import modelopt_config
from nemotron_lite.checkpoint.companions import files_to_write
from nemotron_lite.checkpoint.errors import CheckpointError, shorten
from nemotron_lite.checkpoint.model_tree import ModelTree, read_tree
from nemotron_lite.checkpoint.modelopt import CACHE_SCALES, FORM_OF
from nemotron_lite.checkpoint.names import hub_names
from nemotron_lite.checkpoint.old_tokenizer import RECORD, checksum, judge
from nemotron_lite.checkpoint.tokenizer import TOKENIZER, plain_tokenizer, vocabulary_problems
from nemotron_lite.checkpoint.weight_dtypes import ALWAYS_FLOAT32
from nemotron_lite.checkpoint.weight_files import INDEX, WEIGHTS
from nemotron_lite.files import atomic_folder, check_utf8, folder_path
from nemotron_lite.hf_config import to_hf, without_dt_clamp
from nemotron_lite.layers.moe import Experts, Router
from nemotron_lite.model import Nemotron
from nemotron_lite.offload import Offloaded
from nemotron_lite.quantization.packed_layers import LinearWithKVScale, PackedExperts

MAX_SHARD_BYTES = 5_000_000_000  # as usual on the hub

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",  # in packed layers only, like the next
    torch.float8_e4m3fn: "F8_E4M3",
}
_ALGO_OF = {form: algo for algo, form in FORM_OF.items()}
_OUR_FILES = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|config\.json"
    r"|tokenizer\.json|hf_quant_config\.json"
)


class _NamedTensor(NamedTuple):
    """A tensor and its name in the file."""

    name: str
    tensor: Tensor  # shares memory with the model; for experts, one slice
    fetch: Callable[[], Tensor] | None = None  # gives the numbers of a tensor on meta

    @property
    def size(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def values(self) -> Tensor:
        """Its numbers, on the CPU."""
        tensor = self.tensor if self.fetch is None else self.fetch()
        return tensor.detach().cpu().contiguous()


def save(
    model: nn.Module,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_bytes: SupportsIndex = MAX_SHARD_BYTES,
) -> None:
    """Write `model` into the folder `path`, replacing a checkpoint that is there.

    The old checkpoint stays complete until the new one is, so the disk needs space for both. Other
    files in the folder are kept, also its chat template, its tokenizer's settings and its
    generation settings, of which only the token ids are corrected. A new folder gets those in
    `model.companion_files`. A companion file that you have changed there replaces the folder's. A
    tokenizer.json that no save has written stays if it fits and the model has none; otherwise it
    gets another name, with a warning.

    Weights are written in their own dtypes, also in a model that mixes them; config.json names the
    dtype of most weights. NaN and infinity are written with a warning, and so is a subclass with a
    forward of its own. Two names for one tensor (tied weights) are written as two tensors.

    Args:
        model: a `Nemotron` on any device, or an offloaded one. The wrappers of torch.compile,
            DistributedDataParallel, DataParallel, AveragedModel and activation checkpointing are
            left out, at any depth. Call `save` on one process only.
        path: the folder; created if it does not exist. `~` is the home folder, "." the current one.
        tokenizer: written as tokenizer.json; None takes `model.tokenizer`, if there is one.
        max_shard_bytes: largest size of a file. A single larger tensor gets a file of its own.

    Raises:
        CheckpointError: what is not a whole Nemotron as its config describes it: foreign modules
            (adapters), parametrized, sharded or missing weights, an unsupported dtype; or a
            tokenizer with ids beyond the model's vocabulary. Nothing was written.
        TypeError, ValueError: an argument of another kind, such as a model of another library.
        OSError: the folder cannot be written; the old one is unchanged. If only its replacement
            failed, the text says where the new checkpoint is.
    """
    folder = folder_path(path)
    check_utf8(folder)
    limit = integer("max_shard_bytes", max_shard_bytes, low=1)
    tree = read_tree(model, offloaded=True)
    tokenizer = plain_tokenizer(tree.model.tokenizer if tokenizer is None else tokenizer)
    problems = tree.problems or vocabulary_problems(tokenizer, tree.model.config)
    if problems:
        raise CheckpointError(folder, problems)
    kind = type(tree.model)
    if kind.forward is not Nemotron.forward:
        warnings.warn(
            f"{kind.__module__}.{kind.__qualname__} has a forward of its own, which no file holds: "
            "`load` gives a plain Nemotron with these weights.",
            stacklevel=2,
        )
    others = files_to_write(tree.model, folder, tokenizer)
    old = judge(folder, tokenizer, tree.model.config.vocab_size)
    shards = _shards(list(_named_tensors(tree)), limit)
    metadata = {"format": "pt"}  # transformers opens no file without
    if tokenizer is not None:
        others[TOKENIZER] = words = tokenizer.to_str(pretty=True).encode()
        metadata[RECORD] = checksum(words)
    if old.renamed is not None:
        others[old.renamed[0]] = old.renamed[1]
    not_finite: list[str] = []
    replaced = _is_replaced(others, kept=(TOKENIZER,) if old.stays else ())
    with atomic_folder(folder, replaced, last="config.json") as new:
        _write_weights(new, shards, metadata, not_finite)
        config = _config(tree)
        if tree.packed:
            own, config[modelopt_config.KEY] = _quantization(tree)
            _write_json(new / modelopt_config.FILE, own)
        _write_json(new / "config.json", config)
        for name, content in others.items():
            if content is not None:
                (new / name).parent.mkdir(exist_ok=True)
                (new / name).write_bytes(content)
    if not_finite:
        warnings.warn(
            f"{folder}: {len(not_finite)} tensors hold NaN or infinity and were saved like that: "
            f"{shorten(not_finite)}. Do not go on with this model; take an earlier checkpoint.",
            stacklevel=2,
        )


def _is_replaced(others: Container[str], kept: Container[str]) -> Callable[[str], bool]:
    """Which files of the old folder the new checkpoint replaces or removes."""
    return lambda name: (
        name not in kept and (name in others or _OUR_FILES.fullmatch(name) is not None)
    )


def _named_tensors(tree: ModelTree) -> Iterator[_NamedTensor]:
    for name, tensor in tree.tensors.items():
        for disk_name, expert in hub_names(name, tensor.shape[0] if tensor.ndim else 1):
            part = tensor if expert is None else tensor[expert]
            part = part.resolve_neg()  # a view may be negated lazily
            if isinstance(tree.model, Offloaded):
                yield _NamedTensor(disk_name, part, partial(tree.model.read, name, expert))
            else:
                yield _NamedTensor(disk_name, part)


def _shards(tensors: list[_NamedTensor], limit: int) -> list[list[_NamedTensor]]:
    """Lists of consecutive tensors, each as long as fits into one file."""
    shards: list[list[_NamedTensor]] = []
    free = 0
    for each in tensors:
        if not shards or each.size > free:
            shards.append([])
            free = limit
        shards[-1].append(each)
        free -= each.size
    return shards


def _write_weights(
    folder: Path,
    shards: list[list[_NamedTensor]],
    metadata: dict[str, str],
    not_finite: list[str],
) -> None:
    """Write all weight files, and the index if there are several."""
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map.update({each.name: name for each in shard})
        with (folder / name).open("wb") as file:
            _write_shard(file, shard, metadata, not_finite)
    if weight_map:
        total = sum(each.size for shard in shards for each in shard)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_shard(
    file: BinaryIO,
    tensors: list[_NamedTensor],
    metadata: dict[str, str],
    not_finite: list[str],
) -> None:
    """Write one file; names of tensors with NaN or infinity are added to `not_finite`."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    # The format requires each tensor to be aligned to its element size: wide dtypes come first.
    tensors = sorted(tensors, key=lambda each: -each.tensor.element_size())
    for each in tensors:
        header[each.name] = {
            "dtype": _CODES[each.tensor.dtype],
            "shape": list(each.tensor.shape),
            "data_offsets": [offset, offset + each.size],
        }
        offset += each.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for each in tensors:
        values = each.values
        if not _is_finite(values):
            not_finite.append(each.name)
        file.write(values.view(-1).view(torch.uint8).numpy().data)


def _is_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite; one pass without a copy. Eight-bit codes are not read.

    The extremes of numbers with a NaN are NaN.
    """
    if values.element_size() == 1 or not values.numel():
        return True
    low, high = torch.aminmax(values)
    return math.isfinite(low) and math.isfinite(high)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _config(tree: ModelTree) -> dict[str, Any]:
    """The content of config.json: the sizes, and the dtype that most weights have."""
    hf = without_dt_clamp(to_hf(tree.model.config))
    if "time_step_limit" in hf:  # strict JSON has no infinity; transformers writes it like this
        hf["time_step_limit"] = [
            {"__float__": "Infinity"} if value == math.inf else value
            for value in hf["time_step_limit"]
        ]
    packed = tuple(f"{name}." for name in tree.packed)
    sizes: dict[torch.dtype, int] = {}
    for name, tensor in tree.tensors.items():
        special = name.endswith((ALWAYS_FLOAT32, *CACHE_SCALES)) or name.startswith(packed or "/")
        if not special:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    if sizes:
        hf["torch_dtype"] = str(max(sizes, key=sizes.__getitem__)).removeprefix("torch.")
    return hf


def _quantization(tree: ModelTree) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of `hf_quant_config.json` and of `quantization_config`."""
    formats = {}
    for name, module in tree.packed.items():
        for disk_name, _ in hub_names(f"{name}.weight", module.shape[0]):
            formats[disk_name.removesuffix(".weight")] = _ALGO_OF[module.format]
    not_quantized = []
    for name, each in tree.modules.items():
        if isinstance(each, nn.Linear | nn.Conv1d | Router):
            not_quantized.append(name)
        elif isinstance(each, Experts | PackedExperts):
            not_quantized += [
                f"{name}.{matrix}"
                for matrix in ("up_proj", "down_proj")
                if isinstance(getattr(each, matrix), nn.Parameter)
            ]
    cache = any(isinstance(each, LinearWithKVScale) for each in tree.modules.values())
    return modelopt_config.describe(formats, not_quantized, cache)
