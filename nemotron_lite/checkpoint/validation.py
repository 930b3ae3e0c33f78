"""Checks of a checkpoint folder: everything that is wrong with it, before any weight is read.

The headers of the weight files (`weight_files`) are compared with config.json before a single
weight is read, and one `CheckpointError` reports all problems. Otherwise a user would download
again and again, and find one problem each time.

First the sizes: a config of a few bytes may describe a model of any size, and only to list its
tensors could take hours. `size_problem` compares numbers that cost nothing to compute. After it,
each tensor of the model is looked for in the files.

These are problems: tensors that are missing, that the config does not expect, that have another
shape, or that occur twice; dtypes that are not supported. No tensor is skipped silently, even if it
looks harmless. The exceptions are parts that are left out: the MTP module if the caller says so,
and the vision and audio parts of a multimodal release, which a warning names.

Functions that can find several problems return them as a list of sentences.

Source: reference sheet section 10.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import islice

from nemotron_lite.checkpoint.errors import count_and_names, shorten
from nemotron_lite.checkpoint.modelopt import BLOCK, FLOATS, NVFP4, QUANTIZED
from nemotron_lite.checkpoint.names import Destination, destination_of, is_mtp
from nemotron_lite.checkpoint.weight_files import StoredTensor
from nemotron_lite.config import NemotronConfig
from nemotron_lite.ledger import parameters

# A config may be the wrong one and describe a model of another size; then the tensors that are
# missing and have other shapes are listed. Beyond this factor that would tell nothing.
MOST_TIMES = 32
SMALL = 1_000_000  # weights; models of this size are always compared tensor by tensor
NAMES = 100  # of missing tensors that are collected; the others are counted
# Which key of config.json gives these projections a bias.
_BIASES = {
    "attention_bias": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp_bias": ("up_proj", "down_proj", "fc1_latent_proj", "fc2_latent_proj"),
    "use_bias": ("in_proj", "out_proj"),
}
_EXPERT_BIAS = re.compile(r"\.experts\.[0-9]+\.(up|down)_proj\.bias$")


def size_problem(config: NemotronConfig, stored: Iterable[StoredTensor]) -> str | None:
    """The problem with a config that describes a far larger model than the files hold, if it does.

    Args:
        config: read from config.json.
        stored: the entries of the files, quantized weights with the shape of the decoded weight.
    """
    stored = list(stored)
    layers = config.num_layers + len(config.mtp_pattern)
    if layers > len(stored) + 64:
        return (
            f"config.json describes {layers:,} layers, but the files hold only {len(stored):,} "
            "tensors. Take the config.json that belongs to them"
        )
    held = sum(item.numel for item in stored)
    needed = parameters(config).total
    if needed > MOST_TIMES * held + SMALL:
        return (
            f"config.json describes a model of {needed:,} weights, but the files hold only "
            f"{held:,}. Take the config.json that belongs to them"
        )
    return None


def match_tensors(
    expected: Mapping[str, tuple[int, ...]], stored: Iterable[StoredTensor]
) -> tuple[dict[Destination, StoredTensor], list[str]]:
    """Which stored tensor belongs to which tensor of the model.

    Args:
        expected: the shapes of the model's tensors, by name.
        stored: the tensors in the files.

    Returns:
        The stored tensor of each destination, and the problems: tensors that are missing,
        unexpected, stored twice, or of a wrong shape or dtype.
    """
    matched: dict[Destination, StoredTensor] = {}
    # The first tensor of each name, and whether it is a stack and not one expert.
    first: dict[str, tuple[StoredTensor, bool]] = {}
    wrong: set[Destination] = set()  # stored, but not usable: not to be reported as missing too
    unexpected, shapes, duplicates, dtypes = [], [], [], []
    for item in stored:
        destination = destination_of(item.name)
        stacked = destination.expert is None
        shape = expected.get(destination.name)
        if shape is not None and destination.expert is not None:
            # The model has no tensor for an expert number that is too large.
            shape = shape[1:] if destination.expert < shape[0] else None
        if shape is None:
            unexpected.append(item.name)
        elif item.shape != _stored_shape(shape, item.dtype):
            shapes.append(f"{item.name} {list(item.shape)} for {list(shape)}")
            wrong.add(destination)
        elif item.dtype not in FLOATS + QUANTIZED:
            dtypes.append(f"{item.name} ({item.dtype})")
            wrong.add(destination)
        elif destination in matched:
            duplicates.append(_duplicate(item, matched[destination]))
        elif stacked != first.setdefault(destination.name, (item, stacked))[1]:
            duplicates.append(_duplicate(item, first[destination.name][0]))
        else:
            matched[destination] = item
    problems = []
    for names, count in _missing(expected, {*matched, *wrong}):
        problems.append(f"missing: {_counted(names, count)}{_advice_for_missing(names)}")
    for names in _backbone_and_mtp(unexpected):
        problems.append(
            "not in the model that config.json describes: "
            f"{count_and_names(names)}{_advice_for_unexpected(names)}"
        )
    for label, found in (
        ("of another shape than config.json says (stored for expected)", shapes),
        ("stored twice", duplicates),
        (f"of a dtype that is not supported (expected {', '.join(FLOATS)})", dtypes),
    ):
        if found:
            problems.append(
                f"{label}: {count_and_names(found)}. Take files that were saved together"
            )
    return matched, problems


def _stored_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """The shape in the file of a tensor that has `shape` in the model: NVFP4 pads rows."""
    if dtype != NVFP4 or not shape:
        return shape
    return (*shape[:-1], -(-shape[-1] // BLOCK) * BLOCK)


def _duplicate(one: StoredTensor, other: StoredTensor) -> str:
    if one.name == other.name:
        return f"{one.name} (in {other.file.name} and {one.file.name})"
    return f"{one.name} (also as {other.name})"


def _missing(
    expected: Mapping[str, tuple[int, ...]], found: set[Destination]
) -> list[tuple[list[str], int]]:
    """The first names of tensors that are not stored and their number: backbone, then MTP.

    If some experts of a stack are stored, the others are named. Experts are counted and not listed:
    a config may name any number of them.
    """
    stored_experts: dict[str, int] = {}
    for destination in found:
        if destination.expert is not None:
            stored_experts[destination.name] = stored_experts.get(destination.name, 0) + 1
    names: dict[bool, list[str]] = {False: [], True: []}
    counts = {False: 0, True: 0}
    for name, shape in expected.items():
        if Destination(name) in found:
            continue
        mtp = name.startswith("mtp.")
        stored = stored_experts.get(name, 0)
        counts[mtp] += shape[0] - stored if stored else 1
        if len(names[mtp]) >= NAMES:
            continue
        if not stored:
            names[mtp].append(name)
            continue
        stem, _, matrix = name.rpartition(".")
        absent = (e for e in range(shape[0]) if Destination(name, e) not in found)
        names[mtp] += [f"{stem}.{e}.{matrix}.weight" for e in islice(absent, NAMES)]
    return [(names[mtp], counts[mtp]) for mtp in (False, True) if names[mtp]]


def _counted(names: list[str], count: int) -> str:
    """`count_and_names` of a list that holds only the first `NAMES` of its names."""
    if count <= len(names):
        return count_and_names(names)
    return f"{count:,} tensors, such as {shorten(names[:8])}"


def _backbone_and_mtp(names: list[str]) -> list[list[str]]:
    """The names of the backbone and those of MTP, without empty lists; their causes differ."""
    mtp = [name for name in names if is_mtp(name)]
    rest = [name for name in names if not is_mtp(name)]
    return [group for group in (rest, mtp) if group]


def _advice_for_missing(names: list[str]) -> str:
    """What to do about missing tensors, if their names show the cause."""
    if not names[0].startswith("mtp."):
        return ". Copy the files again, or take the config.json that belongs to them"
    return (
        ". config.json says that there is an MTP module (num_nextn_predict_layers); transformers"
        " drops it when it saves. Load the original files, or load without it:"
        ' load(path, mtp="drop")'
    )


def _advice_for_unexpected(names: list[str]) -> str:
    """What to do about unexpected tensors, if their names show the cause."""
    if is_mtp(names[0]):
        return (
            ". If they are an MTP module that config.json does not mention, set"
            " num_nextn_predict_layers to 1 in it, or leave the module out:"
            ' load(path, mtp="drop")'
        )
    if all(".shared_experts." in name for name in names):
        return (
            ". config.json says n_shared_experts is 0, which transformers ignores: set it to 1 if"
            " the weights were trained with a shared expert"
        )
    if all(name.endswith("_proj.bias") for name in names):
        return _advice_for_biases(names)
    return ". Take the config.json that belongs to the weights, or save them again without these"


def _advice_for_biases(names: list[str]) -> str:
    """What to do about biases of projections that config.json does not mention."""
    if any(_EXPERT_BIAS.search(name) for name in names):
        return ". Routed experts have no biases here, as in transformers, whatever mlp_bias says"
    last = {name.split(".")[-2] for name in names}
    keys = [key for key, projections in _BIASES.items() if last & set(projections)]
    return f". If the weights were trained with them, set {' and '.join(keys)} to true in it"
