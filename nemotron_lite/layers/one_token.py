"""One decoded token through the layers, with every choice made once instead of at each token.

A decoding step multiplies vectors and not matrices. Finding out how takes as long as the arithmetic
of a small model: hooks, autocast, gradients, a compiler, the library of each product. All of that
is the same at the next token. So each layer makes a function that has the answers in it
(`Mixer.token_step`), and `TokenSteps` keeps these functions as long as the answers hold:

    once per token      gradients, autocast, a compiler, a GPU, hooks on all modules
    `_Watch`            classes, attributes, hooks, children and weights of each layer are the
                        objects that they were, and the weights are in the same memory
    everything else     the ordinary way, module by module

Weights may be changed in place: no function holds a copy of one, only the prepared copies of
`Linear`, whose rules stay as they are. The results are those of the ordinary way, bit for bit.

Only layers made of this package's own classes have such functions: a layer with an adapter, a hook,
a parametrization or packed weights goes the ordinary way, and all layers of its model with it.

Left out: drafts, the MTP module, prompts, and tensors outside the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules import module as hooks

# Past `ops`: the question is which implementation they would all choose.
from nemotron_lite.backends.dispatch import chooses_cpu
from nemotron_lite.layers.attention import Attention
from nemotron_lite.layers.block import Block
from nemotron_lite.layers.context import ForwardContext
from nemotron_lite.layers.conv import CausalConv1d
from nemotron_lite.layers.linear import Linear
from nemotron_lite.layers.mamba2 import GatedRMSNorm, Mamba2
from nemotron_lite.layers.mixer import LayerCache, TokenStep
from nemotron_lite.layers.mlp import MLP
from nemotron_lite.layers.moe import Experts, MoE, Router
from nemotron_lite.layers.norm import RMSNorm

DTYPES = (torch.float32, torch.bfloat16)
_CLASSES: tuple[type[nn.Module], ...] = (
    Block, RMSNorm, Linear, Mamba2, CausalConv1d, GatedRMSNorm, Attention, MoE, Router, Experts,
    MLP, nn.ModuleList,
)  # fmt: skip
_FORWARDS = [kind.forward for kind in _CLASSES]  # somebody may exchange one later
_CALLS = [kind.__call__ for kind in _CLASSES]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ALL_HOOKS = [
    hooks._global_forward_hooks, hooks._global_forward_pre_hooks,
    hooks._global_backward_hooks, hooks._global_backward_pre_hooks,
]  # fmt: skip


class TokenSteps:
    """The functions of a model's layers, by number of rows.

    Args:
        layers: the blocks.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers
        self._watch: _Watch | None = None
        self._steps: dict[tuple[int, int], list[TokenStep]] = {}
        self._refused = False

    def run(
        self,
        x: Float[Tensor, "b 1 d"],
        cache: Sequence[LayerCache | None],
        context: ForwardContext,
    ) -> Float[Tensor, "b 1 d"] | None:
        """What `run_layers` computes; None where it has to be asked.

        Args:
            x: the embedded tokens, one per row.
            cache: of each layer.
            context: of the call.
        """
        steps = self._find(x, context)
        if steps is None:
            return None
        rows, starts = x.squeeze(1), context.starts
        for step, entry in zip(steps, cache, strict=True):
            rows = step(rows, entry, starts)
        return rows.unsqueeze(1)

    def forget_refusal(self) -> None:
        """Look at the layers again at the next token: a prompt was read, a decoding begins."""
        self._refused = False

    def _find(self, x: Tensor, context: ForwardContext) -> list[TokenStep] | None:
        if (
            torch.is_grad_enabled()
            or not chooses_cpu(x)
            or torch.is_autocast_enabled("cpu")
            or torch.jit.is_tracing()
            or context.draft
            or context.last_only
            or context.lengths is not None
            or context.router_stats is not None
            or any(_ALL_HOOKS)
        ):
            return None
        if self._watch is None or not self._watch.unchanged():
            self._steps = {}
            if self._refused or not self._plain(x.dtype):
                self._refused, self._watch = True, None
                return None
            self._watch = _Watch(self.layers)
        key = x.shape[0], torch.get_num_threads()  # the libraries are chosen for both
        if key not in self._steps:
            blocks: Any = self.layers
            self._steps[key] = [block.token_step(x.shape[0]) for block in blocks]
        return self._steps[key]

    def _plain(self, dtype: torch.dtype) -> bool:
        """Whether the layers are this package's own, without hooks, on the CPU, in `dtype`."""
        if dtype not in DTYPES or not _classes_are_ours():
            return False
        for module in self.layers.modules():
            own = module.__dict__
            replaced = "forward" in own or "token_step" in own
            if type(module) not in _CLASSES or replaced or any(own[name] for name in _HOOKS):
                return False
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is None:
                    continue
                if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_cpu:
                    return False
            if any(p is not None and p.dtype != dtype for p in module._parameters.values()):
                return False
        return True


def _classes_are_ours() -> bool:
    forwards, calls = [kind.forward for kind in _CLASSES], [kind.__call__ for kind in _CLASSES]
    return forwards == _FORWARDS and calls == _CALLS


class _Watch:
    """Whether modules are still what they were, found out in few calls.

    Loops over modules are in C, and comparing two lists asks for identity first: thousands of
    comparisons take microseconds.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._modules = list(layers.modules())
        self._attributes = [module.__dict__ for module in self._modules]
        self._hooks = [own[name] for own in self._attributes for name in _HOOKS]
        named = ("_modules", "_parameters", "_buffers")
        self._parts = [own[name] for own in self._attributes for name in named if own[name]]
        self._held = self._contents()
        self._weights = [thing for thing in self._held if isinstance(thing, Tensor)]
        self._seen = self._look()

    def unchanged(self) -> bool:
        """Whether everything is the same as when this object was made."""
        if any(self._hooks) or not _classes_are_ours():
            return False
        held = self._contents()
        if len(held) != len(self._held) or not all(map(is_, held, self._held)):
            return False
        try:
            return self._look() == self._seen
        except (RuntimeError, TypeError, ValueError):  # tensors that differ cannot be compared
            return False

    def _contents(self) -> list[Any]:
        """Children, parameters and buffers."""
        return list(chain.from_iterable(map(dict.values, self._parts)))

    def _look(self) -> list[Any]:
        """Classes, attributes, and where the weights are."""
        return [
            list(map(type, self._modules)),
            list(map(list, map(dict.values, self._attributes))),
            list(map(Tensor.data_ptr, self._weights)),
        ]
