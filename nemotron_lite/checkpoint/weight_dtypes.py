"""Which dtype each weight of a loaded model gets.

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
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from nemotron_lite.arguments import shown
from nemotron_lite.checkpoint.modelopt import FLOATS
from nemotron_lite.checkpoint.weight_files import StoredTensor

ALWAYS_FLOAT32 = "e_score_correction_bias"
# Stored in float32 by some releases of 16-bit models, and then kept so.
KEPT_FLOAT32 = (".mixer.gate.weight", ".mixer.A_log", ".mixer.D", ".mixer.dt_bias")

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_CODES = dict(zip(FLOATS, DTYPES.values(), strict=True))  # the names of the safetensors format


def named_dtype(hf: Mapping[str, Any]) -> tuple[torch.dtype | None, list[str]]:
    """The dtype that config.json names, if any; and the problems."""
    name = hf.get("torch_dtype") or hf.get("dtype")
    if name in (None, "auto"):
        return None, []
    dtype = DTYPES.get(str(name).removeprefix("torch.")) if isinstance(name, str) else None
    if dtype is not None:
        return dtype, []
    return None, [
        f"config.json names dtype {shown(name)}; expected one of {', '.join(DTYPES)}. "
        "Correct it, or give the dtype: load(path, dtype=...)"
    ]


def most_common_dtype(stored: Iterable[StoredTensor]) -> torch.dtype:
    """The dtype of most weights that are not quantized; bfloat16 if all are."""
    counts: dict[str, int] = {}
    for item in stored:
        if item.dtype in _CODES and not item.name.endswith((ALWAYS_FLOAT32, *KEPT_FLOAT32)):
            counts[item.dtype] = counts.get(item.dtype, 0) + item.numel
    return _CODES[max(counts, key=lambda code: counts[code])] if counts else torch.bfloat16


class WeightDtypes:
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
