"""The one door of an operation: an explicit choice between its implementations.

Each public function of `ops` takes `impl`. `"auto"` picks the fast one; a test, a chapter or a
debugging session can force any other. A choice that does not exist is an error, never a silent
fallback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, without a call into torch where nothing changes: decoding makes hundreds."""
    return x if x.dtype == dtype else x.to(dtype)


def choose(op: str, impl: str, **implementations: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation called `impl`; `"auto"` is the last one given.

    Raises:
        ValueError: `impl` names none of them.
    """
    if impl == "auto":
        return list(implementations.values())[-1]
    if impl not in implementations:
        names = ", ".join(repr(name) for name in ("auto", *implementations))
        raise ValueError(f"{op} has no implementation {impl!r}; choose one of {names}.")
    return implementations[impl]
