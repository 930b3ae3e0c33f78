"""Layers that keep stored weights quantized, and those that hold scales of keys and values.

With `packed=True`, `load` puts them in the place of plain layers before it reads the weights. Their
tensors have the names of ModelOpt, and are filled like all others (weight_reading.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nemotron_lite.checkpoint import modelopt
from nemotron_lite.checkpoint.errors import count_and_names
from nemotron_lite.checkpoint.modelopt import FORM_OF, GroupedTensors
from nemotron_lite.checkpoint.names import Destination, destination_of, is_mtp
from nemotron_lite.checkpoint.weight_files import StoredTensor
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.packed_layers import (
    LinearWithKVScale,
    empty_packed_layer,
    install_packed_layer,
)

FINER = (modelopt.FP8_ROWS, modelopt.FP8_TILES)


def install_packed_layers(
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
        module, part = module_and_scale(name)
        above, _, leaf = module.rpartition(".")
        try:
            parent = model.get_submodule(above)
        except AttributeError:  # this module is left out (MTP)
            continue
        linear = getattr(parent, leaf, None)
        if isinstance(linear, torch.nn.Linear):
            setattr(parent, leaf, LinearWithKVScale.from_linear(linear, part))
    return problems


def check_cache_scales(found: GroupedTensors, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The problem with scales of keys and values whose projection is not in the model, if any."""
    lost = [
        name
        for name in found.cache_scales
        if f"{module_and_scale(name)[0]}.weight" not in shapes and not is_mtp(name)
    ]
    if not lost:
        return []
    return [f"scales of keys or values without a projection: {count_and_names(lost)}"]


def module_and_scale(name: str) -> tuple[str, str]:
    """The projection that a stored cache scale belongs to, and `k_scale` or `v_scale`.

    ModelOpt stores `mixer.k_proj.k_scale`, compressed-tensors `mixer.k_scale`.
    """
    module, _, scale = destination_of(name).name.rpartition(".")
    projection = f"{scale[0]}_proj"
    return module if module.endswith(f".{projection}") else f"{module}.{projection}", scale
