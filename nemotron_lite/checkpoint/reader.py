"""load: a Hugging Face folder becomes a model, without ever holding the weights twice.

    1. read config.json and the headers of the weight files; compare; report all faults at once
    2. build the model on the meta device: shapes and names, no memory
    3. for each stored tensor: take it from the file, cast it, write it where it belongs
    4. hand the filled tensors to the model

The usual way, a model with random weights beside a dict of stored ones, needs twice the memory.
Here the peak is the model plus `REOPEN` bytes of file (or one tensor, if that is larger): a
safetensors file is mapped into memory, and pages that were read count as used until the file is
closed, so it is closed and opened again every so often.

Number format: with `dtype=None` the model gets the one that config.json names (`torch_dtype` or
`dtype`), and where it names none, every tensor stays as stored. The router's selection bias is
float32 in any case: published biases are near 2^6 and differ by less than 2^-2, which BF16 cannot
tell apart.

Source: reference sheet section 10. Left out: quantised weights, and fetching from the hub.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from nemotron_lite.checkpoint import inventory
from nemotron_lite.checkpoint.inventory import CheckpointError, Stored
from nemotron_lite.checkpoint.names import Place
from nemotron_lite.config import ConfigError, NemotronConfig
from nemotron_lite.hf_config import from_hf
from nemotron_lite.model import Nemotron

REOPEN = 64 * 2**20  # bytes of a mapped file after which it is closed and opened again
STAYS_FLOAT32 = "e_score_correction_bias"

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    mtp: Literal["require", "drop"] = "require",
) -> Nemotron:
    """Read a `nemotron_h` checkpoint: `model.safetensors`, or shards with their index.

    Names may have the prefix `backbone.` or `model.`, and experts may be stored one by one or
    stacked. `generation_config.json`, where it is there, decides the end-of-sequence ids: released
    chat models list one more there than in `config.json`.

    Args:
        path: the folder.
        dtype: of the weights; None takes what config.json names.
        device: where they go.
        mtp: "require" loads the MTP module if config.json has one and fails if its weights are
            missing; "drop" leaves it out, whatever the folder holds.

    Returns:
        The model in eval mode. `model.tokenizer` is the `tokenizers.Tokenizer` of the folder's
        tokenizer.json, or None.

    Raises:
        CheckpointError: everything that is wrong with the folder, in one message.
        ValueError: `dtype` or `mtp` is none of the possible ones.
    """
    folder = Path(path)
    if dtype is not None and dtype not in _DTYPES.values():
        raise ValueError(f"dtype={dtype} does not work: expected one of {list(_DTYPES.values())}.")
    if mtp not in ("require", "drop"):
        raise ValueError(f'mtp={mtp!r} does not work: expected "require" or "drop".')
    _check_folder(folder)
    problems: list[str] = []
    hf = inventory.read_json(folder / "config.json", problems)
    files, weight_map = inventory.find_files(folder, problems)
    stored = inventory.read_headers(files, weight_map, problems)
    if quantised := inventory.quantised(folder, hf, stored):
        # Names and shapes would all be wrong as well; that is not news.
        raise CheckpointError(folder, [*problems, quantised])
    config = _config(folder, hf, mtp, problems) if hf else None
    dtype = dtype or _named_dtype(hf, problems)
    tokenizer = _tokenizer(folder, problems)
    if config is None or problems:
        raise CheckpointError(folder, problems)

    with torch.device("meta"):
        model = Nemotron(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if mtp == "drop":
        stored = [item for item in stored if not item.name.startswith("mtp.")]
    places = inventory.match(shapes, stored, problems)
    if problems:
        raise CheckpointError(folder, problems)
    tensors = _fill(folder, shapes, places, dtype, torch.device(device))
    model.load_state_dict(tensors, assign=True)
    model.tokenizer = tokenizer
    return model.eval()


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        way_out = f"it is a file; give the folder that holds it, {folder.parent}"
    elif left := sorted(folder.absolute().parent.glob(f".{folder.name}.old-*")):
        way_out = f"it is missing, but an interrupted save left the last one beside it: {left[-1]}"
    else:
        way_out = (
            "there is no such folder. Models are read from disk; fetch one first, for instance "
            f"with `hf download {folder} --local-dir DIR`"
        )
    raise CheckpointError(folder, [way_out])


def _config(
    folder: Path, hf: Mapping[str, Any], mtp: str, problems: list[str]
) -> NemotronConfig | None:
    """The sizes, with the end-of-sequence ids of generation_config.json."""
    if mtp == "drop":
        hf = {**hf, "num_nextn_predict_layers": 0}
    generation = {}
    if (folder / "generation_config.json").exists():
        generation = inventory.read_json(folder / "generation_config.json", problems)
    if generation.get("eos_token_id") is not None:
        hf = {**hf, "eos_token_id": generation["eos_token_id"]}
    try:
        return from_hf(hf)
    except ConfigError as error:
        problems.append(str(error))
        return None


def _named_dtype(hf: Mapping[str, Any], problems: list[str]) -> torch.dtype | None:
    """What config.json says the weights should be."""
    name = hf.get("torch_dtype") or hf.get("dtype")
    if name is None:
        return None
    dtype = _DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        problems.append(f"config.json names dtype {name!r}; expected one of {', '.join(_DTYPES)}")
    return dtype


def _tokenizer(folder: Path, problems: list[str]) -> Tokenizer | None:
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        problems.append(f"tokenizer.json is unreadable ({error}); download or copy it again")
        return None


def _fill(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    places: Mapping[Place, Stored],
    dtype: torch.dtype | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """The model's tensors, with the stored values in them."""
    tensors: dict[str, Tensor] = {}
    for place, source in _stream(folder, places):
        if place.name not in tensors:
            kept = torch.float32 if place.name.endswith(STAYS_FLOAT32) else dtype or source.dtype
            tensors[place.name] = torch.empty(shapes[place.name], dtype=kept, device=device)
        target = tensors[place.name]
        (target if place.expert is None else target[place.expert]).copy_(source)
    return tensors


def _stream(folder: Path, places: Mapping[Place, Stored]) -> Iterator[tuple[Place, Tensor]]:
    """Each place with its stored tensor, in file order, a limited stretch of file at a time."""
    batch: list[tuple[Place, Stored]] = []
    size = 0
    for place, item in places.items():
        if batch and (item.file != batch[0][1].file or size >= REOPEN):
            yield from _read(folder, batch)
            batch, size = [], 0
        batch.append((place, item))
        size += _BYTES[item.dtype] * max(1, torch.Size(item.shape).numel())
    yield from _read(folder, batch)


def _read(folder: Path, batch: list[tuple[Place, Stored]]) -> Iterator[tuple[Place, Tensor]]:
    if not batch:
        return
    file = batch[0][1].file
    try:
        with safe_open(file, framework="pt") as handle:
            for place, item in batch:
                yield place, handle.get_tensor(item.name)
    except OSError as error:
        problem = f"{file.name} could not be read to its end: {error}"
        raise CheckpointError(folder, [problem]) from error
