"""load: read a Hugging Face folder into a model, without holding the weights in memory twice.

    1. read config.json and the headers of the weight files, compare them, report all problems
    2. create the model on the meta device: it has shapes and names, but no memory
    3. for each stored tensor: read it, cast or decode it, and copy it into the model's tensor
    4. assign these tensors to the model

The usual way needs twice the memory: a model with random weights, and a dict of the stored ones.
Here the peak is the model plus a little of the files (weight_reading.py). weight_dtypes.py says
which dtype each weight gets.

Quantized weights (`modelopt`, `compressed_tensors`) are decoded while they are loaded. With
`packed=True` they stay quantized, in layers that decode them when they are used.

With `offload=True` steps 3 and 4 are left out: weights are read when a layer runs, so the folder
may be larger than the memory (`nemotron_lite/offload`, file_source.py).

In a multimodal release the text model is loaded, and a warning names the other parts.

Source: reference sheet section 10. Left out: downloading from the hub.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsIndex, TypeVar

import torch
from safetensors import SafetensorError

from nemotron_lite.arguments import flag, integer
from nemotron_lite.checkpoint import validation
from nemotron_lite.checkpoint.changes import (
    ATTEMPTS,
    changed_too_often,
    files_of,
    settled_files,
)
from nemotron_lite.checkpoint.companions import read_companions
from nemotron_lite.checkpoint.contents import read_contents
from nemotron_lite.checkpoint.declaration import check_declarations
from nemotron_lite.checkpoint.errors import CheckpointError, printable
from nemotron_lite.checkpoint.file_source import offload_files
from nemotron_lite.checkpoint.locations import resolve
from nemotron_lite.checkpoint.names import is_mtp
from nemotron_lite.checkpoint.packed_loading import check_cache_scales, install_packed_layers
from nemotron_lite.checkpoint.tokenizer import read_tokenizer
from nemotron_lite.checkpoint.weight_dtypes import (
    DTYPES,
    WeightDtypes,
    most_common_dtype,
    named_dtype,
)
from nemotron_lite.checkpoint.weight_files import StoredTensor, read_object
from nemotron_lite.checkpoint.weight_reading import read_weights
from nemotron_lite.config import ConfigError, NemotronConfig
from nemotron_lite.hf_config import from_hf, text_part
from nemotron_lite.model import Nemotron
from nemotron_lite.offload import DEFAULT_BUDGET, offloaded_class

M = TypeVar("M", bound=Nemotron)


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    mtp: Literal["auto", "require", "drop"] = "auto",
    packed: bool = False,
    offload: bool = False,
    budget: SupportsIndex | None = None,
    progress: bool = False,
) -> Nemotron:
    """Read a `nemotron_h` checkpoint: `model.safetensors`, or shards with their index.

    Names may have the prefix `backbone.` or `model.`, and experts may be stored one by one or
    stacked. If there is a `generation_config.json`, the end-of-sequence ids are taken from it,
    because released chat models list one more id there than in `config.json`.

    Args:
        path: the folder; or the name of a shipped model, "lite", whose weights are decoded to
            float32 if nothing else is said; or a folder `models--ORG--NAME` of the hub's cache, or
            an `ORG/NAME` or `ORG/NAME@REVISION` that this cache holds (`locations.resolve`).
        dtype: of the weights; None takes the one that config.json names, or that most of them have.
            A router in float32 stays in float32 beside weights of 16 bits.
        device: of the weights.
        mtp: "auto" loads the MTP module if config.json has one, and warns and leaves it out if the
            folder has none of its weights, as in folders that transformers has saved; "require"
            makes that an error; "drop" leaves the module out, whatever the folder holds.
        packed: keep NVFP4 and FP8 weights quantized and decode them when they are used; `save`
            then writes the same bits again. Otherwise they are decoded to `dtype`. FP8 with a scale
            for each row or tile can only be decoded.
        offload: leave the weights in the files and read them when a layer runs: of experts only
            those that tokens choose. For folders larger than the memory, on a CPU. The files stay
            open, and must not be written over in place; the model cannot be trained.
        budget: with `offload`, bytes of weights in memory at most; None is 4 GiB.
        progress: with `offload`, report on stderr how many layers a call has run.

    Returns:
        The model in eval mode. `model.tokenizer` is the `tokenizers.Tokenizer` of the folder's
        tokenizer.json, or None. `model.companion_files` holds its chat template, generation
        settings and other small files that `save` writes to a new folder.

    Raises:
        CheckpointError: all problems of the folder, in one message.
        TypeError: `budget` is no integer.
        ValueError: `dtype` or `mtp` has an unknown value; `offload` on a GPU, or with a budget that
            has no room for the largest tensor; `budget` or `progress` without it.
    """
    how = Offload.of(offload, budget, progress, device)
    return load_as(Nemotron, path, dtype=dtype, device=device, mtp=mtp, packed=packed, offload=how)


class Offload(NamedTuple):
    """How an offloaded model reads its files."""

    budget: int
    progress: bool

    @classmethod
    def of(
        cls,
        offload: bool,
        budget: SupportsIndex | None,
        progress: bool,
        device: str | torch.device,
    ) -> Offload | None:
        """The arguments of `load`, checked; None for a model in memory."""
        offload, progress = flag("offload", offload), flag("progress", progress)
        size = DEFAULT_BUDGET if budget is None else integer("budget", budget, low=1)
        if not offload and (budget is not None or progress):
            raise ValueError(
                "budget and progress are for offload=True: give it, or leave them out."
            )
        if offload and torch.device(device).type != "cpu":
            raise ValueError(
                f"offload=True keeps weights on the CPU; device={str(device)!r}. Leave out one of "
                "them."
            )
        return cls(size, progress) if offload else None


def load_as(
    model_class: type[M],
    path: str | Path,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device,
    mtp: Literal["auto", "require", "drop"],
    packed: bool,
    offload: Offload | None = None,
) -> M:
    """`load` for a subclass of `Nemotron`, which is made by `model_class(config)`.

    Its warning names the line that called the caller of this function: `load` or
    `Nemotron.from_pretrained`.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype={dtype} does not work: expected one of {list(DTYPES.values())}.")
    if mtp not in ("auto", "require", "drop"):
        raise ValueError(f'mtp={mtp!r} does not work: expected "auto", "require" or "drop".')
    folder = resolve(path)
    for _ in range(ATTEMPTS):
        before = settled_files(folder)
        failure: Exception | None = None
        try:
            with torch.inference_mode(False):  # inference tensors could never be trained
                model = _read_folder(model_class, folder, dtype, device, mtp, packed, offload)
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
    offload: Offload | None,
) -> M:
    """One attempt to read a folder; it may change meanwhile."""
    contents = read_contents(folder)
    hf, found = contents.hf, contents.found
    problems = [*contents.problems]
    floats = [item.name for item in found.stored if item.name not in found.modules]
    problems += check_declarations(
        contents.declarations, found.modules.values(), floats, complete=not problems
    )
    absent = mtp == "auto" and _mtp_is_absent(text_part(hf), contents.stored)
    config, config_problems = _config(folder, hf, "drop" if absent else mtp) if hf else (None, [])
    wanted, dtype_problems = named_dtype(text_part(hf))
    tokenizer, tokenizer_problems = read_tokenizer(folder, config)
    problems += config_problems + dtype_problems + tokenizer_problems
    if config is not None and not problems:
        too_large = validation.size_problem(config, found.stored)
        problems += [too_large] if too_large else []
    if config is None or problems:
        raise CheckpointError(folder, problems)

    with torch.device("meta"):
        kind = model_class if offload is None else offloaded_class(model_class)  # type: ignore[arg-type]
        model = kind(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = found.stored
    if mtp == "drop":
        stored = [item for item in stored if not is_mtp(item.name)]
    matched, problems = validation.match_tensors(shapes, stored)
    problems += check_cache_scales(found, shapes)
    if packed:
        problems += install_packed_layers(model, matched, found)
    if problems:
        raise CheckpointError(folder, problems)
    dtypes = WeightDtypes(dtype or wanted, most_common_dtype(stored))
    if offload is None:
        tensors = read_weights(folder, model, shapes, matched, found, dtypes, torch.device(device))
        model.load_state_dict(tensors, assign=True)
    else:
        offload_files(model, folder, matched, found, dtypes, **offload._asdict())
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
    if contents.other_parts:
        left_out = _left_out(folder, contents.other_parts, contents.other_tensors)
        warnings.warn(left_out, stacklevel=4)
    return model.eval()


def _left_out(folder: Path, parts: list[str], others: list[str]) -> str:
    """The warning about the parts of a multimodal release that are not loaded."""
    counts: dict[str, int] = {}
    for name in others:
        first = name.partition(".")[0]
        counts[first] = counts.get(first, 0) + 1
    tensors = ", ".join(f"{printable(name)} ({n:,})" for name, n in list(counts.items())[:12])
    return (
        f"{folder} is a multimodal release ({printable(', '.join(parts))}). Only its text model is "
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
