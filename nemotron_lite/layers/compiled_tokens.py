"""Tokens through the layers by compiled code: which layers it can run, and how it is called.

`CompiledLayers` holds the addresses of the weights, in the structs that every mixer fills for
itself (`Mixer.compiled_part`). It is made from layers that `TokenSteps` has looked at: this
package's own classes, without hooks, on the CPU, in one dtype. The same watch drops it as soon as a
weight is another object or lies elsewhere. Weights that are changed in place are used as they are.

Before each call a mixer says where its cache is (`Mixer.compiled_state`). A draft is read as
`Mixer.forward` reads one: Mamba states stay, and a `MambaDraft` is left for `accept`.

Sums are float32 and rounding differs from the ordinary way: by the order of sums in float32, and in
BF16 because activations are not rounded.

Left out: more than `MOST_ROWS` rows of activations, which products of whole matrices do faster.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron_lite.backends import compiled_step as c
from nemotron_lite.backends.compiled_step import NotCompiledError
from nemotron_lite.layers.block import Block
from nemotron_lite.layers.context import ForwardContext
from nemotron_lite.layers.mixer import CompiledCall, LayerCache

MOST_ROWS = 32  # rows times tokens
KEYS = 4096  # keys that the scratch memory has room for at first
LINE = 16  # float32 values of a cache line; no part of the scratch memory begins inside one


class CompiledLayers:
    """Layers as the compiled code sees them.

    Args:
        layers: blocks that `TokenSteps` has accepted.
        dtype: of the weights.

    Raises:
        NotCompiledError: a layer that the code cannot run.
        CompilerError: there is no compiled code here.
    """

    def __init__(self, layers: Iterable[Block], dtype: torch.dtype) -> None:
        self._layers: list[Any] = list(layers)
        # Kept, because C gets addresses only.
        self._parts = [layer.mixer.compiled_part() for layer in self._layers]
        self._table = (c.LayerStruct * len(self._layers))(
            *(
                c.LayerStruct(
                    part.KIND, c.address(layer.norm.weight), layer.norm.eps,
                    ctypes.addressof(part),
                )
                for layer, part in zip(self._layers, self._parts, strict=True)
            )
        )  # fmt: skip
        self._states = (c.StateStruct * len(self._layers))()
        self._wide = max(part.wide() for part in self._parts)
        self._spare = _whole_lines(max(part.spare() for part in self._parts))
        # The memory below belongs to one call at a time, and a call in C lets other threads run.
        self._lock = threading.Lock()
        self._scratch = torch.empty(0, dtype=torch.float32, device="cpu")
        self._call = c.CallStruct(self._table, self._states, count=len(self._layers))
        self._run = c.library(dtype).decode_step

    def run(
        self,
        x: Float[Tensor, "b t d"],
        cache: Sequence[LayerCache | None],
        context: ForwardContext,
    ) -> Float[Tensor, "b t d"]:
        """The residual stream after the layers, in the dtype of x.

        Args:
            x: embedded tokens.
            cache: of each layer.
            context: with `starts`, and `draft` if the tokens are a draft.

        Raises:
            NotCompiledError: a cache that the code cannot use, or more than `MOST_ROWS` rows of
                activations. Nothing has been read or changed.
        """
        rows, tokens = x.shape[:2]
        if rows * tokens > MOST_ROWS:
            raise NotCompiledError(f"{rows} rows of {tokens} tokens: at most {MOST_ROWS} in all")
        with self._lock:
            return self._run_alone(x, cache, context)

    def _run_alone(
        self, x: Tensor, cache: Sequence[LayerCache | None], context: ForwardContext
    ) -> Tensor:
        rows, tokens, width = x.shape
        starts, most = _starts(context.starts, rows)
        about = CompiledCall(rows, tokens, most + tokens, context.draft, x.dtype)
        after = [
            layer.mixer.compiled_state(part, state, entry, about)
            for layer, part, state, entry in zip(
                self._layers, self._parts, self._states, cache, strict=True
            )
        ]
        stream = torch.empty(x.shape, dtype=torch.float32, device="cpu").copy_(x)
        call, threads = self._call, torch.get_num_threads()
        call.rows, call.tokens, call.d, call.threads = rows, tokens, width, threads
        call.wide = _whole_lines(max(self._wide, width) * rows * tokens)
        call.keys = max(KEYS, 1 << (about.keys - 1).bit_length())
        room = 3 * call.wide + threads * (2 * call.wide + call.keys + self._spare)
        if self._scratch.numel() < room:
            self._scratch = torch.empty(room, dtype=torch.float32, device="cpu")
        call.scratch, call.stream = self._scratch.data_ptr(), stream.data_ptr()
        call.starts = starts.data_ptr()
        self._run(call, self._spare)
        for finish in after:
            if finish is not None:
                finish()
        return stream if x.dtype == torch.float32 else stream.to(x.dtype)


def _whole_lines(values: int) -> int:
    return -(-values // LINE) * LINE


def _starts(starts: int | Tensor, rows: int) -> tuple[Tensor, int]:
    """How many tokens each row had before, and the largest of these numbers."""
    if isinstance(starts, int):
        return torch.full((rows,), starts, dtype=torch.int64, device="cpu"), starts
    found = starts.to("cpu", torch.int64).contiguous()
    return found, int(found.max())
