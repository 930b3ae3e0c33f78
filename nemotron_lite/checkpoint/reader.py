"""load: a Hugging Face folder becomes a model, without ever holding the weights twice.

    1. read config.json and the headers of the weight files; compare; report all faults at once
    2. build the model on the meta device: shapes and names, no memory
    3. for each stored tensor: take it from the file, cast or decode it, write it where it belongs
    4. hand the filled tensors to the model

The usual way, a model with random weights beside a dict of stored ones, needs twice the memory.
Here the peak is the model plus `REOPEN` bytes of file (or one tensor, if that is larger): a
safetensors file is mapped into memory, and pages that were read count as used until the file is
closed, so it is closed and opened again every so often.

Number format: with `dtype=None` the model gets the one that config.json names (`torch_dtype` or
`dtype`), and where it names none, every tensor stays as stored. The router's selection bias is
float32 in any case: published biases are near 2^6 and differ by less than 2^-2, which BF16 cannot
tell apart.

Quantized weights in ModelOpt's layout (`modelopt`) are decoded on the way, or with `packed=True`
kept as they are in layers that decode them when they are used.

Source: reference sheet section 10. Left out: fetching from the hub.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from nemotron_lite.checkpoint import modelopt, modelopt_config, validation
from nemotron_lite.checkpoint.modelopt import FORM_OF, Gathered
from nemotron_lite.checkpoint.names import Place, place_of
from nemotron_lite.checkpoint.validation import CheckpointError, Stored
from nemotron_lite.config import ConfigError, NemotronConfig
from nemotron_lite.hf_config import from_hf
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.packed_layers import ScaledLinear, decode, install

REOPEN = 64 * 2**20  # bytes of a mapped file after which it is closed and opened again
STAYS_FLOAT32 = "e_score_correction_bias"

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "FP8": 1, "NVFP4": 0.5625}
Parts = dict[str, Tensor]


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    mtp: Literal["auto", "require", "drop"] = "auto",
    packed: bool = False,
) -> Nemotron:
    """Read a `nemotron_h` checkpoint: `model.safetensors`, or shards with their index.

    Names may have the prefix `backbone.` or `model.`, and experts may be stored one by one or
    stacked. `generation_config.json`, where it is there, decides the end-of-sequence ids: released
    chat models list one more there than in `config.json`.

    Args:
        path: the folder.
        dtype: of the weights; None takes what config.json names.
        device: where they go.
        mtp: "auto" loads the MTP module if config.json has one, and warns and leaves it out if the
            folder has none of its weights, as in folders that transformers has saved; "require"
            makes that an error; "drop" leaves the module out, whatever the folder holds.
        packed: keep weights in NVFP4 and FP8 as they are stored, to be decoded when they are used;
            `save` writes the same bits again. Otherwise they become `dtype` (bfloat16 where
            neither this nor config.json names one).

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
    if mtp not in ("auto", "require", "drop"):
        raise ValueError(f'mtp={mtp!r} does not work: expected "auto", "require" or "drop".')
    _check_folder(folder)
    problems: list[str] = []
    hf = validation.read_json(folder / "config.json", problems)
    files, weight_map = validation.find_files(folder, problems)
    stored = validation.read_headers(files, weight_map, problems)
    found = modelopt.gather(stored, problems)
    plain = [item.name for item in found.stored if item.name not in found.modules]
    modelopt_config.check(folder, hf, found.modules.values(), plain, problems)
    absent = mtp == "auto" and _mtp_is_absent(hf, stored)
    config = _config(folder, hf, "drop" if absent else mtp, problems) if hf else None
    dtype = dtype or _named_dtype(hf, problems)
    tokenizer = _tokenizer(folder, problems)
    if config is None or problems:
        raise CheckpointError(folder, problems)

    with torch.device("meta"):
        model = Nemotron(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = found.stored
    if mtp == "drop":
        stored = [item for item in stored if not item.name.startswith("mtp.")]
    places = validation.match(shapes, stored, problems)
    _check_cache_scales(found, shapes, problems)
    if packed:
        _install(model, places, found, problems)
    if problems:
        raise CheckpointError(folder, problems)
    tensors = _fill(folder, model, shapes, places, found, dtype, torch.device(device))
    model.load_state_dict(tensors, assign=True)
    model.tokenizer = tokenizer
    if absent:
        warnings.warn(
            f"{folder}: config.json has an MTP module (num_nextn_predict_layers="
            f"{hf['num_nextn_predict_layers']}), but the files hold none of its weights; "
            "transformers drops them when it saves. The model is loaded without it, so it cannot "
            'draft. Give load(path, mtp="drop") to leave it out without this warning, or '
            'mtp="require" to make it an error.',
            stacklevel=2,
        )
    return model.eval()


def _mtp_is_absent(hf: Mapping[str, Any], stored: list[Stored]) -> bool:
    """Whether config.json has an MTP module and the files have not one of its weights."""
    if not stored or hf.get("num_nextn_predict_layers") in (None, 0):
        return False
    return not any(item.name.startswith("mtp.") for item in stored)


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
        generation = validation.read_json(folder / "generation_config.json", problems)
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
        problems.append(
            f"config.json names dtype {name!r}; expected one of {', '.join(_DTYPES)}. Correct it,"
            " or say which: load(path, dtype=...)"
        )
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


def _check_cache_scales(
    found: Gathered, shapes: Mapping[str, tuple[int, ...]], problems: list[str]
) -> None:
    """Scales of keys and values belong to a projection that makes them."""
    lost = [
        name for name in found.cache_scales
        if f"{_place_of_scale(name)[0]}.weight" not in shapes and not name.startswith("mtp.")
    ]  # fmt: skip
    if lost:
        problems.append(f"scales of keys or values without a projection: {validation.some(lost)}")


def _place_of_scale(name: str) -> tuple[str, str]:
    module, _, part = place_of(name).name.rpartition(".")
    return module, part


def _install(
    model: Nemotron, places: Mapping[Place, Stored], found: Gathered, problems: list[str]
) -> None:
    """Packed layers for the weights that are stored packed, and places for the caches' scales."""
    kinds: dict[str, set[tuple[str, bool]]] = {}
    for place, item in places.items():
        stored = found.modules.get(item.name)
        calibrated = stored is not None and "input_scale" in stored.parts
        kinds.setdefault(place.name, set()).add((item.dtype, calibrated))
    for name, kind in kinds.items():
        if not any(dtype in FORM_OF for dtype, _ in kind):
            continue
        if len(kind) > 1:
            problems.append(
                f"{name}: its experts are stored in different ways ({sorted(kind)}), which one "
                "packed stack cannot hold. Load this checkpoint without packed=True"
            )
            continue
        dtype, calibrated = kind.pop()
        install(model, name, FORM_OF[dtype], calibrated=calibrated)
    for name in found.cache_scales:
        module, part = _place_of_scale(name)
        above, _, leaf = module.rpartition(".")
        try:
            parent = model.get_submodule(above)
        except AttributeError:  # of a module that is left out
            continue
        linear = getattr(parent, leaf, None)
        if isinstance(linear, torch.nn.Linear):
            setattr(parent, leaf, ScaledLinear.over(linear, part))


def _fill(
    folder: Path,
    model: Nemotron,
    shapes: Mapping[str, tuple[int, ...]],
    places: Mapping[Place, Stored],
    found: Gathered,
    dtype: torch.dtype | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """The model's tensors, with the stored values in them."""
    # What packed layers and the caches' scales are called and look like; empty without them.
    everything = model.state_dict()
    own = everything.keys() - shapes.keys()
    tensors: dict[str, Tensor] = {}
    wrong: list[str] = []

    def put(
        name: str, shape: tuple[int, ...], kept: torch.dtype, place: Place, value: Tensor
    ) -> None:
        if name not in tensors:
            tensors[name] = torch.empty(shape, dtype=kept, device=device)
        target = tensors[name] if place.expert is None else tensors[name][place.expert]
        target.copy_(value.view(target.shape))

    for place, item, source in _stream(folder, places, found):
        if isinstance(source, Tensor):
            kept = torch.float32 if place.name.endswith(STAYS_FLOAT32) else dtype or source.dtype
            if place.name in shapes:
                put(place.name, shapes[place.name], kept, place, source)
            continue
        wrong += modelopt.wrong_values(item.name.removesuffix(".weight"), source)
        module = place.name.removesuffix(".weight")
        if f"{module}.weight_scale" in own:
            for part, value in source.items():
                meta = everything[f"{module}.{part}"]
                put(f"{module}.{part}", tuple(meta.shape), meta.dtype, place, value)
        else:
            shape = shapes[place.name]
            numbers = decode(FORM_OF[item.dtype], source, shape[-2:], torch.float32)
            put(place.name, shape, dtype or torch.bfloat16, place, numbers)
    if wrong:
        raise CheckpointError(folder, [f"scales that no number has: {validation.some(wrong)}"])
    for name, item in found.cache_scales.items():
        place = Place(".".join(_place_of_scale(name)))
        if place.name in own:
            with safe_open(item.file, framework="pt") as handle:
                put(place.name, (), torch.float32, place, handle.get_tensor(name))
    return tensors


def _stream(
    folder: Path, places: Mapping[Place, Stored], found: Gathered
) -> Iterator[tuple[Place, Stored, Tensor | Parts]]:
    """Each place with what is stored for it, in file order, a limited stretch of file at a time."""
    batch: list[tuple[Place, Stored]] = []
    size = 0.0
    for place, item in places.items():
        if batch and (item.file != batch[0][1].file or size >= REOPEN):
            yield from _read(folder, batch, found)
            batch, size = [], 0.0
        batch.append((place, item))
        size += _BYTES[item.dtype] * max(1, torch.Size(item.shape).numel())
    yield from _read(folder, batch, found)


def _read(
    folder: Path, batch: list[tuple[Place, Stored]], found: Gathered
) -> Iterator[tuple[Place, Stored, Tensor | Parts]]:
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}

        def get(item: Stored) -> Tensor:
            # A weight and its scales may lie in two shards.
            try:
                if item.file not in handles:
                    opened = safe_open(item.file, framework="pt")
                    handles[item.file] = stack.enter_context(opened)
                return handles[item.file].get_tensor(item.name)
            except OSError as error:
                problem = f"{item.file.name} could not be read to its end: {error}"
                raise CheckpointError(folder, [problem]) from error

        for place, item in batch:
            if item.name in found.modules:
                parts = found.modules[item.name].parts
                yield place, item, {name: get(part) for name, part in parts.items()}
            else:
                yield place, item, get(item)
