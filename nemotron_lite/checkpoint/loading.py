"""load: read a Hugging Face folder into a model, without holding the weights in memory twice.

    1. read config.json and the headers of the weight files, compare them, report all problems
    2. create the model on the meta device: it has shapes and names, but no memory
    3. for each stored tensor: read it, cast or decode it, and copy it into the model's tensor
    4. assign these tensors to the model

The usual way needs twice the memory: a model with random weights, and a dict of the stored ones.
Here the peak is the model plus `REOPEN_AFTER` bytes of the file (or one tensor, if it is larger). A
safetensors file is mapped into memory, and pages that were read count as used memory until the file
is closed. Therefore it is closed and opened again after every `REOPEN_AFTER` bytes.

The dtype: with `dtype=None` the model gets the dtype that config.json names (`torch_dtype` or
`dtype`). If it names none, every tensor keeps its stored dtype. The router's selection bias is
always float32: published biases are near 2^6 and differ by less than 2^-2, which BF16 cannot
represent.

Quantized weights in ModelOpt's layout (`modelopt`) are decoded while they are loaded. With
`packed=True` they stay quantized, in layers that decode them when they are used.

Source: reference sheet section 10. Left out: downloading from the hub.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from nemotron_lite.checkpoint import modelopt, modelopt_config, validation
from nemotron_lite.checkpoint.companions import read_companions
from nemotron_lite.checkpoint.modelopt import FORM_OF, GroupedTensors
from nemotron_lite.checkpoint.names import Destination, destination_of
from nemotron_lite.checkpoint.validation import CheckpointError, StoredTensor
from nemotron_lite.config import ConfigError, NemotronConfig
from nemotron_lite.hf_config import from_hf
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.packed_layers import (
    LinearWithKVScale,
    decode_weight,
    empty_packed_layer,
    install_packed_layer,
)

REOPEN_AFTER = 64 * 2**20  # bytes read from a mapped file before it is opened again
ALWAYS_FLOAT32 = "e_score_correction_bias"

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "FP8": 1, "NVFP4": 0.5625}
QuantizedTensors = dict[str, Tensor]  # weight, weight_scale, ... of one module
M = TypeVar("M", bound=Nemotron)


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
    stacked. If there is a `generation_config.json`, the end-of-sequence ids are taken from it,
    because released chat models list one more id there than in `config.json`.

    Args:
        path: the folder.
        dtype: of the weights; None takes the one that config.json names.
        device: of the weights.
        mtp: "auto" loads the MTP module if config.json has one, and warns and leaves it out if the
            folder has none of its weights, as in folders that transformers has saved; "require"
            makes that an error; "drop" leaves the module out, whatever the folder holds.
        packed: keep NVFP4 and FP8 weights quantized and decode them when they are used; `save`
            then writes the same bits again. Otherwise they are decoded to `dtype` (bfloat16 if
            neither `dtype` nor config.json names one).

    Returns:
        The model in eval mode. `model.tokenizer` is the `tokenizers.Tokenizer` of the folder's
        tokenizer.json, or None. `model.companion_files` holds its chat template, generation
        settings and other small files that `save` writes to a new folder.

    Raises:
        CheckpointError: all problems of the folder, in one message.
        ValueError: `dtype` or `mtp` has an unknown value.
    """
    return load_as(Nemotron, path, dtype=dtype, device=device, mtp=mtp, packed=packed)


def load_as(
    model_class: type[M],
    path: str | Path,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device,
    mtp: Literal["auto", "require", "drop"],
    packed: bool,
) -> M:
    """`load` for a subclass of `Nemotron`, which is made by `model_class(config)`.

    Its warning names the line that called the caller of this function: `load` or
    `Nemotron.from_pretrained`.
    """
    folder = Path(path)
    if dtype is not None and dtype not in _DTYPES.values():
        raise ValueError(f"dtype={dtype} does not work: expected one of {list(_DTYPES.values())}.")
    if mtp not in ("auto", "require", "drop"):
        raise ValueError(f'mtp={mtp!r} does not work: expected "auto", "require" or "drop".')
    _check_folder(folder)
    hf, problems = validation.read_json(folder / "config.json")
    stored, header_problems = validation.read_headers(folder)
    found = modelopt.group_quantized(stored)
    problems += header_problems + found.problems
    floats = [item.name for item in found.stored if item.name not in found.modules]
    problems += modelopt_config.check(
        folder, hf, found.modules.values(), floats, complete=not problems
    )
    absent = mtp == "auto" and _mtp_is_absent(hf, stored)
    config, config_problems = _config(folder, hf, "drop" if absent else mtp) if hf else (None, [])
    named_dtype, dtype_problems = _named_dtype(hf)
    dtype = dtype or named_dtype
    tokenizer, tokenizer_problems = _tokenizer(folder)
    problems += config_problems + dtype_problems + tokenizer_problems
    if config is None or problems:
        raise CheckpointError(folder, problems)

    with torch.device("meta"):
        model = model_class(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = found.stored
    if mtp == "drop":
        stored = [item for item in stored if not item.name.startswith("mtp.")]
    matched, problems = validation.match_tensors(shapes, stored)
    problems += _check_cache_scales(found, shapes)
    if packed:
        problems += _install_packed_layers(model, matched, found)
    if problems:
        raise CheckpointError(folder, problems)
    tensors = _read_weights(folder, model, shapes, matched, found, dtype, torch.device(device))
    model.load_state_dict(tensors, assign=True)
    model.tokenizer = tokenizer
    model.companion_files = read_companions(folder)
    if absent:
        warnings.warn(
            f"{folder}: config.json has an MTP module (num_nextn_predict_layers="
            f"{hf['num_nextn_predict_layers']}), but the files hold none of its weights; "
            "transformers drops them when it saves. The model is loaded without it, so it cannot "
            'draft. Give load(path, mtp="drop") to leave it out without this warning, or '
            'mtp="require" to make it an error.',
            stacklevel=3,
        )
    return model.eval()


def _mtp_is_absent(hf: Mapping[str, Any], stored: list[StoredTensor]) -> bool:
    """Whether config.json has an MTP module and the files have not one of its weights."""
    if not stored or hf.get("num_nextn_predict_layers") in (None, 0):
        return False
    return not any(item.name.startswith("mtp.") for item in stored)


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        problem = f"it is a file; give the folder that holds it, {folder.parent}"
    elif left := sorted(folder.absolute().parent.glob(f".{folder.name}.old-*")):
        problem = (
            f"it is missing, but an interrupted save left the old one as {left[-1]}: rename it"
        )
    elif _looks_like_hub_name(folder):
        problem = (
            "there is no such folder. Models are read from disk: download one first, for example "
            f"with `hf download {folder} --local-dir DIR`"
        )
    else:
        problem = (
            "there is no such folder. `make run` trains a small model and saves it as runs/lite; "
            f"`hf download OWNER/NAME --local-dir {folder}` downloads a published one"
        )
    raise CheckpointError(folder, [problem])


def _looks_like_hub_name(folder: Path) -> bool:
    """Whether this is rather OWNER/NAME on the hub than a place on this disk."""
    two_names = len(folder.parts) == 2 and not folder.is_absolute()
    return two_names and folder.parts[0] != "runs" and not folder.parent.is_dir()


def _config(
    folder: Path, hf: Mapping[str, Any], mtp: str
) -> tuple[NemotronConfig | None, list[str]]:
    """The sizes, with the end-of-sequence ids of generation_config.json; and the problems."""
    if mtp == "drop":
        hf = {**hf, "num_nextn_predict_layers": 0}
    generation: dict[str, Any] = {}
    problems: list[str] = []
    if (folder / "generation_config.json").exists():
        generation, problems = validation.read_json(folder / "generation_config.json")
    if generation.get("eos_token_id") is not None:
        hf = {**hf, "eos_token_id": generation["eos_token_id"]}
    try:
        return from_hf(hf), problems
    except ConfigError as error:
        return None, [*problems, str(error)]


def _named_dtype(hf: Mapping[str, Any]) -> tuple[torch.dtype | None, list[str]]:
    """The dtype that config.json names, if any; and the problems."""
    name = hf.get("torch_dtype") or hf.get("dtype")
    if name is None:
        return None, []
    dtype = _DTYPES.get(str(name).removeprefix("torch."))
    if dtype is not None:
        return dtype, []
    return None, [
        f"config.json names dtype {name!r}; expected one of {', '.join(_DTYPES)}. Correct it, or"
        " give the dtype: load(path, dtype=...)"
    ]


def _tokenizer(folder: Path) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer of the folder, if any, without truncation and padding; and the problems.

    A call such as `tokenizer(texts, truncation=True)` in transformers leaves its truncation and
    padding in the tokenizer, and so in the tokenizer.json that is saved later. They belong to that
    call and not to the model: transformers sets both anew at every call. Here they would cut
    prompts, or add padding tokens to them, without a message.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        return None, []
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        return None, [f"tokenizer.json is unreadable ({error}); download or copy it again"]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, []


def _check_cache_scales(found: GroupedTensors, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The problem with scales of keys and values whose projection is not in the model, if any."""
    lost = [
        name
        for name in found.cache_scales
        if f"{_module_and_scale(name)[0]}.weight" not in shapes and not name.startswith("mtp.")
    ]
    if not lost:
        return []
    return [f"scales of keys or values without a projection: {validation.shorten(lost)}"]


def _module_and_scale(name: str) -> tuple[str, str]:
    """The projection that a stored cache scale belongs to, and `k_scale` or `v_scale`."""
    module, _, scale = destination_of(name).name.rpartition(".")
    return module, scale


def _install_packed_layers(
    model: Nemotron, matched: Mapping[Destination, StoredTensor], found: GroupedTensors
) -> list[str]:
    """Replace layers by packed ones where the weight is stored quantized; add cache scales.

    Returns:
        The problems: stacks of experts that are not all stored in the same format.
    """
    problems = []
    kinds: dict[str, set[tuple[str, bool]]] = {}
    for destination, item in matched.items():
        stored = found.modules.get(item.name)
        calibrated = stored is not None and "input_scale" in stored.tensors
        kinds.setdefault(destination.name, set()).add((item.dtype, calibrated))
    for name, kind in kinds.items():
        if not any(dtype in FORM_OF for dtype, _ in kind):
            continue
        if len(kind) > 1:
            problems.append(
                f"{name}: its experts are stored in different formats ({sorted(kind)}), but a "
                "packed layer has one format. Load this checkpoint without packed=True"
            )
            continue
        dtype, calibrated = kind.pop()
        layer = empty_packed_layer(model, name, FORM_OF[dtype], calibrated=calibrated)
        install_packed_layer(model, name, layer)
    for name in found.cache_scales:
        module, part = _module_and_scale(name)
        above, _, leaf = module.rpartition(".")
        try:
            parent = model.get_submodule(above)
        except AttributeError:  # this module is left out (MTP)
            continue
        linear = getattr(parent, leaf, None)
        if isinstance(linear, torch.nn.Linear):
            setattr(parent, leaf, LinearWithKVScale.from_linear(linear, part))
    return problems


def _read_weights(
    folder: Path,
    model: Nemotron,
    shapes: Mapping[str, tuple[int, ...]],
    matched: Mapping[Destination, StoredTensor],
    found: GroupedTensors,
    dtype: torch.dtype | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """The model's tensors with the stored values, by name."""
    # The tensors that `_install_packed_layers` added: of packed layers, and scales of the cache.
    state = model.state_dict()
    added = state.keys() - shapes.keys()
    tensors: dict[str, Tensor] = {}
    invalid: list[str] = []

    def copy_into(
        name: str, shape: tuple[int, ...], dtype: torch.dtype, expert: int | None, value: Tensor
    ) -> None:
        if name not in tensors:
            tensors[name] = torch.empty(shape, dtype=dtype, device=device)
        target = tensors[name] if expert is None else tensors[name][expert]
        target.copy_(value.view(target.shape))

    for (name, expert), item, source in _stream(folder, matched, found):
        if isinstance(source, Tensor):
            kept = torch.float32 if name.endswith(ALWAYS_FLOAT32) else dtype or source.dtype
            if name in shapes:
                copy_into(name, shapes[name], kept, expert, source)
            continue
        invalid += modelopt.invalid_values(item.name.removesuffix(".weight"), source)
        module = name.removesuffix(".weight")
        if f"{module}.weight_scale" in added:
            for part, value in source.items():
                meta = state[f"{module}.{part}"]
                copy_into(f"{module}.{part}", tuple(meta.shape), meta.dtype, expert, value)
        else:
            shape = shapes[name]
            weight = decode_weight(FORM_OF[item.dtype], source, shape[-2:], torch.float32)
            copy_into(name, shape, dtype or torch.bfloat16, expert, weight)
    if invalid:
        raise CheckpointError(
            folder, [f"invalid values: {validation.shorten(invalid)}; copy the files again"]
        )
    for disk_name, item in found.cache_scales.items():
        name = ".".join(_module_and_scale(disk_name))
        if name in added:
            with safe_open(item.file, framework="pt") as handle:
                copy_into(name, (), torch.float32, None, handle.get_tensor(disk_name))
    return tensors


def _stream(
    folder: Path, matched: Mapping[Destination, StoredTensor], found: GroupedTensors
) -> Iterator[tuple[Destination, StoredTensor, Tensor | QuantizedTensors]]:
    """Each destination with its stored values, in file order; files are reopened now and then."""
    batch: list[tuple[Destination, StoredTensor]] = []
    size = 0.0
    for destination, item in matched.items():
        if batch and (item.file != batch[0][1].file or size >= REOPEN_AFTER):
            yield from _read(folder, batch, found)
            batch, size = [], 0.0
        batch.append((destination, item))
        size += _BYTES[item.dtype] * max(1, torch.Size(item.shape).numel())
    yield from _read(folder, batch, found)


def _read(
    folder: Path, batch: list[tuple[Destination, StoredTensor]], found: GroupedTensors
) -> Iterator[tuple[Destination, StoredTensor, Tensor | QuantizedTensors]]:
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}

        def get(item: StoredTensor) -> Tensor:
            # A weight and its scales may be in different shards.
            try:
                if item.file not in handles:
                    opened = safe_open(item.file, framework="pt")
                    handles[item.file] = stack.enter_context(opened)
                return handles[item.file].get_tensor(item.name)
            except OSError as error:
                problem = f"{item.file.name} could not be read to its end: {error}"
                raise CheckpointError(folder, [problem]) from error

        for destination, item in batch:
            if item.name in found.modules:
                parts = found.modules[item.name].tensors
                yield destination, item, {name: get(part) for name, part in parts.items()}
            else:
                yield destination, item, get(item)
