"""load: read a Hugging Face folder into a model, without holding the weights in memory twice.

    1. read config.json and the headers of the weight files, compare them, report all problems
    2. create the model on the meta device: it has shapes and names, but no memory
    3. for each stored tensor: read it, cast or decode it, and copy it into the model's tensor
    4. assign these tensors to the model

The usual way needs twice the memory: a model with random weights, and a dict of the stored ones.
Here the peak is the model plus `REOPEN_AFTER` bytes of the file (or one tensor, if it is larger). A
safetensors file is mapped into memory, and pages that were read count as used memory until the file
is closed. Therefore it is closed and opened again after every `REOPEN_AFTER` bytes.

The dtype of the model is `dtype` if the caller gives one, else the one that config.json names
(`torch_dtype` or `dtype`), else the dtype of most of the stored weights. All weights are cast to it
but these:

    the router's selection bias     always float32: published biases are near 2^6 and differ by less
                                    than 2^-2, which BF16 cannot represent
    the router's matrix, and A_log, D and dt_bias of Mamba
                                    float32 where the files store them in float32 beside weights of
                                    16 bits, whatever 16-bit dtype the model gets, also if the
                                    caller gave it. They are few, they are used in float32
                                    (reference sheet 1.4), and rounding them changes which experts
                                    are chosen. `model.to(dtype)` casts them too.

Quantized weights (`modelopt`, `compressed_tensors`) are decoded while they are loaded. With
`packed=True` they stay quantized, in layers that decode them when they are used.

In a multimodal release the text model is loaded, and a warning names the other parts.

Source: reference sheet section 10. Left out: downloading from the hub.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from nemotron_lite import arguments
from nemotron_lite.checkpoint import modelopt, modelopt_config, validation
from nemotron_lite.checkpoint.changes import (
    ATTEMPTS,
    changed_too_often,
    files_of,
    settled_files,
)
from nemotron_lite.checkpoint.companions import read_companions
from nemotron_lite.checkpoint.declaration import check_declarations
from nemotron_lite.checkpoint.errors import CheckpointError, count_and_names, shown
from nemotron_lite.checkpoint.locations import resolve
from nemotron_lite.checkpoint.modelopt import FLOATS, FORM_OF, TILE, GroupedTensors
from nemotron_lite.checkpoint.names import Destination, destination_of, is_mtp, split_multimodal
from nemotron_lite.checkpoint.weight_files import StoredTensor, read_headers, read_object
from nemotron_lite.config import ConfigError, NemotronConfig
from nemotron_lite.hf_config import from_hf, other_parts, text_part
from nemotron_lite.input_files import FileError, read_text
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.packed_layers import (
    LinearWithKVScale,
    empty_packed_layer,
    install_packed_layer,
)

REOPEN_AFTER = 64 * 2**20  # bytes read from a mapped file before it is opened again
ALWAYS_FLOAT32 = "e_score_correction_bias"
# Stored in float32 by some releases of 16-bit models, and then kept so.
KEPT_FLOAT32 = (".mixer.gate.weight", ".mixer.A_log", ".mixer.D", ".mixer.dt_bias")

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_CODES = dict(zip(FLOATS, _DTYPES.values(), strict=True))  # the names of the safetensors format
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, modelopt.NVFP4: 0.5625}  # the others 1
FINER = (modelopt.FP8_ROWS, modelopt.FP8_TILES)
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
        path: the folder; or a folder `models--ORG--NAME` of the hub's cache, or an `ORG/NAME` or
            `ORG/NAME@REVISION` that this cache holds (`locations.resolve`).
        dtype: of the weights; None takes the one that config.json names, or that most of them have.
            A router in float32 stays in float32 beside weights of 16 bits.
        device: of the weights.
        mtp: "auto" loads the MTP module if config.json has one, and warns and leaves it out if the
            folder has none of its weights, as in folders that transformers has saved; "require"
            makes that an error; "drop" leaves the module out, whatever the folder holds.
        packed: keep NVFP4 and FP8 weights quantized and decode them when they are used; `save`
            then writes the same bits again. Otherwise they are decoded to `dtype`. FP8 with a scale
            for each row or tile can only be decoded.

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
    if dtype is not None and dtype not in _DTYPES.values():
        raise ValueError(f"dtype={dtype} does not work: expected one of {list(_DTYPES.values())}.")
    if mtp not in ("auto", "require", "drop"):
        raise ValueError(f'mtp={mtp!r} does not work: expected "auto", "require" or "drop".')
    folder = resolve(path)
    for _ in range(ATTEMPTS):
        before = settled_files(folder)
        failure: Exception | None = None
        try:
            model = _read_folder(model_class, folder, dtype, device, mtp, packed)
        except (CheckpointError, OSError, SafetensorError) as error:
            failure = error
        if files_of(folder) == before:
            if failure is not None:
                raise failure
            return model
    raise changed_too_often(folder)


def _read_folder(
    model_class: type[M],
    folder: Path,
    dtype: torch.dtype | None,
    device: str | torch.device,
    mtp: str,
    packed: bool,
) -> M:
    """One attempt to read a folder; it may change meanwhile."""
    hf, problems = read_object(folder / "config.json", infinity=True)
    stored, header_problems = read_headers(folder)
    problems += header_problems
    parts = other_parts(hf)
    others: list[str] = []
    if parts:
        names, others = split_multimodal(item.name for item in stored)
        text_names = set(names)
        stored = [item for item in stored if item.name in text_names]
    declarations, declaration_problems = modelopt_config.read_declarations(folder, hf)
    tile = next((each.tile for each in declarations if each.tile != TILE), TILE)
    found = modelopt.group_quantized(stored, tile)
    problems += found.problems + declaration_problems
    floats = [item.name for item in found.stored if item.name not in found.modules]
    problems += check_declarations(
        declarations, found.modules.values(), floats, complete=not problems
    )
    absent = mtp == "auto" and _mtp_is_absent(text_part(hf), stored)
    config, config_problems = _config(folder, hf, "drop" if absent else mtp) if hf else (None, [])
    named_dtype, dtype_problems = _named_dtype(text_part(hf))
    tokenizer, tokenizer_problems = _tokenizer(folder, config)
    problems += config_problems + dtype_problems + tokenizer_problems
    if config is not None and not problems:
        too_large = validation.size_problem(config, found.stored)
        problems += [too_large] if too_large else []
    if config is None or problems:
        raise CheckpointError(folder, problems)

    with torch.device("meta"):
        model = model_class(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = found.stored
    if mtp == "drop":
        stored = [item for item in stored if not is_mtp(item.name)]
    matched, problems = validation.match_tensors(shapes, stored)
    problems += _check_cache_scales(found, shapes)
    if packed:
        problems += _install_packed_layers(model, matched, found)
    if problems:
        raise CheckpointError(folder, problems)
    dtypes = _Dtypes(dtype or named_dtype, _most_common_dtype(stored))
    tensors = _read_weights(folder, model, shapes, matched, found, dtypes, torch.device(device))
    model.load_state_dict(tensors, assign=True)
    model.tokenizer = tokenizer
    model.companion_files = read_companions(folder)
    if absent:
        warnings.warn(
            f"{folder}: config.json has an MTP module (num_nextn_predict_layers="
            f"{text_part(hf)['num_nextn_predict_layers']}), but the files hold none of its "
            "weights; transformers drops them when it saves. The model is loaded without it, so it "
            'cannot draft. Give load(path, mtp="drop") to leave it out without this warning, or '
            'mtp="require" to make it an error.',
            stacklevel=4,
        )
    if parts:
        warnings.warn(_left_out(folder, parts, others), stacklevel=4)
    return model.eval()


def _left_out(folder: Path, parts: list[str], others: list[str]) -> str:
    """The warning about the parts of a multimodal release that are not loaded."""
    counts: dict[str, int] = {}
    for name in others:
        first = name.partition(".")[0]
        counts[first] = counts.get(first, 0) + 1
    tensors = ", ".join(f"{shown(name)} ({n:,})" for name, n in list(counts.items())[:12])
    return (
        f"{folder} is a multimodal release ({shown(', '.join(parts))}). Only its text model is "
        f"loaded; left out are the tensors of {tensors or 'no other part'}."
    )


def _mtp_is_absent(hf: Mapping[str, Any], stored: list[StoredTensor]) -> bool:
    """Whether config.json has an MTP module and the files have not one of its weights."""
    if not stored or not hf.get("num_nextn_predict_layers"):
        return False
    return not any(is_mtp(item.name) for item in stored)


def _config(
    folder: Path, hf: Mapping[str, Any], mtp: str
) -> tuple[NemotronConfig | None, list[str]]:
    """The sizes, with the end-of-sequence ids of generation_config.json; and the problems."""
    hf = text_part(hf)
    if mtp == "drop":
        hf = {**hf, "num_nextn_predict_layers": 0}
    generation: dict[str, Any] = {}
    problems: list[str] = []
    if (folder / "generation_config.json").exists():
        generation, problems = read_object(folder / "generation_config.json")
    if generation.get("eos_token_id") is not None:
        hf = {**hf, "eos_token_id": generation["eos_token_id"]}
    try:
        return from_hf(hf), problems
    except ConfigError as error:
        return None, [*problems, str(error)]


def _named_dtype(hf: Mapping[str, Any]) -> tuple[torch.dtype | None, list[str]]:
    """The dtype that config.json names, if any; and the problems."""
    name = hf.get("torch_dtype") or hf.get("dtype")
    if name in (None, "auto"):
        return None, []
    dtype = _DTYPES.get(str(name).removeprefix("torch.")) if isinstance(name, str) else None
    if dtype is not None:
        return dtype, []
    return None, [
        f"config.json names dtype {arguments.shown(name)}; expected one of {', '.join(_DTYPES)}. "
        "Correct it, or give the dtype: load(path, dtype=...)"
    ]


def _most_common_dtype(stored: Iterable[StoredTensor]) -> torch.dtype:
    """The dtype of most weights that are not quantized; bfloat16 if all are."""
    counts: dict[str, int] = {}
    for item in stored:
        if item.dtype in _CODES and not item.name.endswith((ALWAYS_FLOAT32, *KEPT_FLOAT32)):
            counts[item.dtype] = counts.get(item.dtype, 0) + item.numel
    return _CODES[max(counts, key=lambda code: counts[code])] if counts else torch.bfloat16


class _Dtypes:
    """Which dtype each tensor of the model gets.

    Args:
        wanted: by the caller or config.json; None is that of most stored weights.
        stored: the dtype of most stored weights.
    """

    def __init__(self, wanted: torch.dtype | None, stored: torch.dtype) -> None:
        self.main = wanted or stored
        # A file that is float32 throughout says nothing about the router.
        self.kept = KEPT_FLOAT32 if stored.itemsize == self.main.itemsize == 2 else ()

    def of(self, name: str, stored: torch.dtype) -> torch.dtype:
        """The dtype of the model's tensor `name`, which is stored in another."""
        wide = stored in (torch.float32, torch.float64)
        if name.endswith(ALWAYS_FLOAT32) or (wide and name.endswith(self.kept)):
            return torch.float32
        return self.main


def _tokenizer(folder: Path, config: NemotronConfig | None) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer of the folder, if any, without truncation and padding; and the problems.

    A call such as `tokenizer(texts, truncation=True)` in transformers leaves its truncation and
    padding in the tokenizer, and so in the tokenizer.json that is saved later. They belong to that
    call and not to the model: transformers sets both anew at every call. Here they would cut
    prompts, or add padding tokens to them, without a message.
    """
    try:
        text = read_text(folder / "tokenizer.json")
    except FileNotFoundError:
        return None, []
    except FileError as error:
        return None, [f"tokenizer.json {error.fault}; download or copy it again"]
    try:
        tokenizer = Tokenizer.from_str(text)
        highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    except BaseException as error:  # the library raises bare Exception, and panics are not even one
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        cause = shown(str(error), 200)
        return None, [f"tokenizer.json is unreadable ({cause}); download or copy it again"]
    if config is not None and highest >= config.vocab_size:
        return None, [
            f"tokenizer.json has ids up to {highest:,}, but the vocabulary of config.json has only "
            f"{config.vocab_size:,} entries; take the file that belongs to this model"
        ]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, []


def _check_cache_scales(found: GroupedTensors, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The problem with scales of keys and values whose projection is not in the model, if any."""
    lost = [
        name
        for name in found.cache_scales
        if f"{_module_and_scale(name)[0]}.weight" not in shapes and not is_mtp(name)
    ]
    if not lost:
        return []
    return [f"scales of keys or values without a projection: {count_and_names(lost)}"]


def _module_and_scale(name: str) -> tuple[str, str]:
    """The projection that a stored cache scale belongs to, and `k_scale` or `v_scale`.

    ModelOpt stores `mixer.k_proj.k_scale`, compressed-tensors `mixer.k_scale`.
    """
    module, _, scale = destination_of(name).name.rpartition(".")
    projection = f"{scale[0]}_proj"
    return module if module.endswith(f".{projection}") else f"{module}.{projection}", scale


def _install_packed_layers(
    model: Nemotron, matched: Mapping[Destination, StoredTensor], found: GroupedTensors
) -> list[str]:
    """Replace layers by packed ones where the weight is stored quantized; add cache scales.

    Returns:
        The problems: formats that no packed layer holds, and stacks of experts that are not all
        stored in the same format.
    """
    kinds: dict[str, set[tuple[str, bool]]] = {}
    for destination, item in matched.items():
        stored = found.modules.get(item.name)
        calibrated = stored is not None and stored.calibrated
        kinds.setdefault(destination.name, set()).add((item.dtype, calibrated))
    quantized = {
        name: kind for name, kind in kinds.items() if any(t in modelopt.QUANTIZED for t, _ in kind)
    }
    mixed = [name for name, kind in quantized.items() if len(kind) > 1]
    finer = [name for name, kind in quantized.items() if any(t in FINER for t, _ in kind)]
    problems = []
    if finer:
        problems.append(
            f"{count_and_names(finer)}: stored in FP8 with a scale for each row or tile, but a "
            "packed layer has one scale. Load this checkpoint without packed=True"
        )
    if mixed:
        problems.append(
            f"{count_and_names(mixed)}: the experts of a stack are stored in different formats "
            f"({sorted(quantized[mixed[0]])}), but a packed layer has one format. Load this "
            "checkpoint without packed=True"
        )
    if problems:
        return problems
    for name, kind in quantized.items():
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
    dtypes: _Dtypes,
    device: torch.device,
) -> dict[str, Tensor]:
    """The model's tensors with the stored values, by name."""
    # The tensors that `_install_packed_layers` added: of packed layers, and scales of the cache.
    state = model.state_dict()
    added = state.keys() - shapes.keys()
    tensors: dict[str, Tensor] = {}
    invalid: dict[str, float] = {}  # names of tensors with invalid values, and one such value

    def copy_into(
        name: str, shape: tuple[int, ...], dtype: torch.dtype, expert: int | None, value: Tensor
    ) -> None:
        if name not in tensors:
            tensors[name] = torch.empty(shape, dtype=dtype, device=device)
        target = tensors[name] if expert is None else tensors[name][expert]
        target.copy_(value.view(target.shape))

    for (name, expert), item, source in _stream(folder, matched, found):
        if isinstance(source, Tensor):
            if name in shapes:
                copy_into(name, shapes[name], dtypes.of(name, source.dtype), expert, source)
            continue
        stored = found.modules[item.name]
        for part, wrong in modelopt.invalid_values(source):
            invalid[f"{stored.module}.{part}"] = wrong
        if invalid:
            continue  # the model will not be used
        module = name.removesuffix(".weight")
        if f"{module}.weight_scale" in added:
            for part, value in modelopt.as_packed(stored, source).items():
                meta = state[f"{module}.{part}"]
                copy_into(f"{module}.{part}", tuple(meta.shape), meta.dtype, expert, value)
        else:
            weight = modelopt.decode(stored, source, shapes[name][-2:])
            copy_into(name, shapes[name], dtypes.main, expert, weight)
    for disk_name, value in _read_scales(folder, found.cache_scales.values()):
        name = ".".join(_module_and_scale(disk_name))
        if not bool(value.isfinite()) or float(value) <= 0:
            invalid[disk_name] = float(value)
        elif name in added:
            copy_into(name, (), torch.float32, None, value)
    if invalid:
        first, wrong = next(iter(invalid.items()))
        others = f" ({count_and_names(invalid)})" if len(invalid) > 1 else ""
        problem = (
            f"invalid values{others}: {shown(first)} holds {wrong:g}; expected finite numbers, and "
            "scales above 0. Copy the files again"
        )
        raise CheckpointError(folder, [problem])
    return tensors


def _read_scales(folder: Path, items: Iterable[StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """The numbers in these tensors, with their names."""
    by_file: dict[Path, list[str]] = {}
    for item in items:
        by_file.setdefault(item.file, []).append(item.name)
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt") as handle:
                for name in names:
                    yield name, handle.get_tensor(name).float().reshape(())
        except OSError as error:
            problem = f"{file.name} could not be read to its end: {error}"
            raise CheckpointError(folder, [problem]) from error


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
        size += _BYTES.get(item.dtype, 1) * max(1, item.numel)
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
