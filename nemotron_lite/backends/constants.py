"""Constant tensors, such as tables of codes, that are made once and kept.

Two things could make a kept tensor useless for later calls. In inference mode PyTorch makes tensors
that autograd refuses, so constants are made outside of it. Modes such as `FakeTensorMode` make
tensors without numbers, so what they make is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

MOST_KEPT = 64  # results of one function
Constant = TypeVar("Constant", bound="Tensor | tuple[Tensor, ...]")


def kept_constant(make: Callable[..., Constant]) -> Callable[..., Constant]:
    """Call `make` once for each combination of arguments, and keep what it returns.

    `make` must name the device of every tensor, so that the default device does not matter.
    """
    kept: dict[tuple[Hashable, ...], Constant] = {}

    @wraps(make)
    def get(*args: Hashable) -> Constant:
        value = kept.get(args)
        if value is not None:
            return value
        with torch.inference_mode(False):
            value = make(*args)
        if all(type(v) is Tensor for v in (value if isinstance(value, tuple) else (value,))):
            if len(kept) >= MOST_KEPT:
                kept.clear()
            kept[args] = value
        return value

    return get
