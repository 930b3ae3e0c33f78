"""FLOPs counted while a model runs, from the operands of each product.

    with count_flops(model) as count:
        model(tokens, cache)
    count.total, count.by_name            {"in_proj": …, "experts": …, …}

Hooks on the modules look at the tensors of each call: the rows that a matrix is multiplied with,
the experts that tokens chose, the keys that a query reads, the positions of a chunk that a token of
the scan reads. A multiply-add is two. What is counted, and what is left out, is the ledger's choice
(ledger.py), and so are the names. The numbers come from the run: a layer that ran twice, or an
expert that nobody chose, shows in them.

It works for every Nemotron, in memory or offloaded, and in every form of the layers, because it
counts the arithmetic that a product needs and not the instructions of a program. Padding is counted
as far as it is multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_lite.layers.attention import Attention
from nemotron_lite.layers.context import ForwardContext
from nemotron_lite.layers.conv import CausalConv1d
from nemotron_lite.layers.mamba2 import Mamba2
from nemotron_lite.layers.moe import Experts, Router
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.packed_layers import PackedExperts, PackedLinear


@dataclass
class FlopCount:
    """FLOPs since the block began.

    Attributes:
        by_name: by the last part of the module's path, and "scan" and "scores and values".
    """

    by_name: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.by_name.values())

    def add(self, name: str, flops: int) -> None:
        """Count FLOPs under a name."""
        self.by_name[name] = self.by_name.get(name, 0) + flops


@contextmanager
def count_flops(model: Nemotron, chunk: int | None = None) -> Iterator[FlopCount]:
    """Count the FLOPs of all calls of `model` inside the block.

    Args:
        chunk: chunk length of the scan in a prompt, as in `ledger.flops`; by default the config's.
    """
    count = FlopCount()
    chunk = model.config.chunk_size if chunk is None else chunk
    handles = []
    for path, module in model.named_modules():
        counter = _counter(module, chunk)
        if counter is not None:
            hook = _Hook(count, path.rpartition(".")[2], counter)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


Counter = Callable[..., dict[str, int]]  # arguments of a call -> FLOPs; "" is the module's name


class _Hook:
    def __init__(self, count: FlopCount, name: str, counter: Counter) -> None:
        self._count, self._name, self._counter = count, name, counter

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        for name, flops in self._counter(*args, **kwargs).items():
            self._count.add(name or self._name, flops)


def _counter(module: nn.Module, chunk: int) -> Counter | None:
    """How the products of a module are counted; None for a module without any of its own."""
    if isinstance(module, Mamba2):
        return lambda *args, **kwargs: _scan(module, chunk, *args, **kwargs)
    if isinstance(module, Attention):
        return lambda *args, **kwargs: _scores(module, *args, **kwargs)
    if isinstance(module, CausalConv1d):
        taps = module.kernel_size[0]
        return lambda x, *_, **__: {"": 2 * taps * x.numel()}
    if isinstance(module, Experts | PackedExperts):
        up, down = tuple(module.up_proj.shape), tuple(module.down_proj.shape)
        each = 2 * (up[1] * up[2] + down[1] * down[2])
        return lambda z, routing: {"": each * routing.indices.numel()}
    if isinstance(module, nn.Linear | PackedLinear | Router):
        weight = module.weight if isinstance(module, nn.Linear | Router) else module
        rows = weight.shape[0]
        return lambda x, *_: {"": 2 * rows * x.numel()}  # a row of x for each column
    return None


def _scores(
    module: Attention,
    x: Tensor,
    cache: Any = None,
    context: ForwardContext = ForwardContext(),
) -> dict[str, int]:
    """Both products of attention: query i of a row reads the keys before it, and its own."""
    batch, tokens = x.shape[:2]
    starts = torch.as_tensor(context.starts).expand(batch).tolist()
    pairs = sum(tokens * start + tokens * (tokens + 1) // 2 for start in starts)
    width = module.q_proj.weight.shape[0]
    return {"scores and values": 2 * 2 * width * pairs}


def _scan(
    module: Mamba2,
    chunk: int,
    u: Tensor,
    cache: Any = None,
    context: ForwardContext = ForwardContext(),
) -> dict[str, int]:
    """A step of the recurrence with a cache; chunks without one, or for several tokens."""
    batch, tokens = u.shape[:2]
    inner, shared = module.splits[0], module.groups * module.state_size
    state = inner * module.state_size  # numbers of a row's state
    if cache is not None and tokens == 1:
        return {"scan": batch * 5 * state}  # decay, outer product, sum, and a multiply-add with C
    flops = 0
    for first in range(0, tokens, chunk):
        length = min(chunk, tokens - first)
        pairs = length * (length + 1) // 2
        flops += 2 * pairs * (shared + inner)  # C with B, and the scores with x
        flops += 4 * length * state + 2 * state  # write and read the state; carry it
    return {"scan": batch * flops}
