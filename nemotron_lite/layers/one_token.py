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

Inside `compiled_decoding` the same layers go through compiled code instead, where rounding differs.
That takes a few tokens per row, too, and so drafts and the MTP module.

Left out: prompts, and tensors outside the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules import module as hooks

# Past `ops`: the question is which implementation they would all choose.
from nemotron_lite.backends.compiled_step import NotCompiledError
from nemotron_lite.backends.dispatch import chooses_cpu
from nemotron_lite.layers.attention import Attention
from nemotron_lite.layers.block import Block
from nemotron_lite.layers.compiled_tokens import CompiledLayers
from nemotron_lite.layers.context import ForwardContext
from nemotron_lite.layers.conv import CausalConv1d
from nemotron_lite.layers.linear import BiasedLinear, Linear
from nemotron_lite.layers.mamba2 import GatedRMSNorm, Mamba2
from nemotron_lite.layers.mixer import LayerCache, TokenStep
from nemotron_lite.layers.mlp import MLP
from nemotron_lite.layers.moe import Experts, MoE, Router
from nemotron_lite.layers.norm import RMSNorm

DTYPES = (torch.float32, torch.bfloat16)
_CLASSES: tuple[type[nn.Module], ...] = (
    Block, RMSNorm, Linear, BiasedLinear, Mamba2, CausalConv1d, GatedRMSNorm, Attention, MoE,
    Router, Experts, MLP, nn.ModuleList,
)  # fmt: skip
_FORWARD, _CALL = attrgetter("forward"), attrgetter("__call__")
_FORWARDS = list(map(_FORWARD, _CLASSES))  # somebody may exchange one later
_CALLS = list(map(_CALL, _CLASSES))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ALL_HOOKS = [
    hooks._global_forward_hooks, hooks._global_forward_pre_hooks,
    hooks._global_backward_hooks, hooks._global_backward_pre_hooks,
]  # fmt: skip


_refusals: ContextVar[list[str] | None] = ContextVar("refusals", default=None)


@contextmanager
def compiled_decoding() -> Iterator[list[str]]:
    """Inside, decoded tokens and drafts go through compiled code (compiled_tokens.py) on a CPU.

    Where that is not possible everything goes on in the ordinary way, and the reason is added to
    the list that this gives. The list stays empty until a token has been read. Single calls that
    want something else have no reason: router statistics, gradients, autocast, and rows of which
    some read nothing (`lengths`).

        with compiled_decoding() as refusals:
            out = model(token, cache)
    """
    refusals: list[str] = []
    token = _refusals.set(refusals)
    try:
        yield refusals
    finally:
        _refusals.reset(token)


def decodes_compiled() -> bool:
    """Whether this is inside `compiled_decoding`."""
    return _refusals.get() is not None


class TokenSteps:
    """The functions of a model's layers, by number of rows.

    Args:
        layers: the blocks.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers
        self._watch: _Watch | None = None
        self._steps: dict[tuple[int, int], list[TokenStep]] = {}
        self._compiled: CompiledLayers | NotCompiledError | None = None
        self._refused = ""

    def run(
        self,
        x: Float[Tensor, "b t d"],
        cache: Sequence[LayerCache | None],
        context: ForwardContext,
    ) -> Float[Tensor, "b t d"] | None:
        """What `run_layers` computes; None where it has to be asked.

        Args:
            x: the embedded tokens: one per row, or a few for compiled code.
            cache: of each layer.
            context: of the call.
        """
        refusals = _refusals.get()
        if not self._may_run(x, context):
            if refusals is not None and (reason := self._reason(x)):
                refusals.append(reason)
            return None
        if refusals is not None:
            try:
                return self._compiled_layers(x.dtype).run(x, cache, context)
            except NotCompiledError as error:
                refusals.append(str(error))
        if x.shape[1] > 1 or context.draft:
            return None
        key = x.shape[0], torch.get_num_threads()  # the libraries are chosen for both
        if key not in self._steps:
            blocks: Any = self.layers
            self._steps[key] = [block.token_step(x.shape[0]) for block in blocks]
        rows, starts = x.squeeze(1), context.starts
        for step, entry in zip(self._steps[key], cache, strict=True):
            rows = step(rows, entry, starts)
        return rows.unsqueeze(1)

    def forget_refusal(self) -> None:
        """Look at the layers again at the next token: a prompt was read, a decoding begins."""
        self._refused = ""

    def _reason(self, x: Tensor) -> str:
        """Why the whole model goes the ordinary way; empty if only this call does."""
        if not chooses_cpu(x):
            return f"the model is on {x.device}"
        if any(_ALL_HOOKS):
            return "there are hooks on all modules"
        return self._refused

    def _compiled_layers(self, dtype: torch.dtype) -> CompiledLayers:
        if self._compiled is None:
            blocks: Any = self.layers
            try:
                self._compiled = CompiledLayers(blocks, dtype)
            except NotCompiledError as error:
                self._compiled = error
        if isinstance(self._compiled, NotCompiledError):
            raise self._compiled
        return self._compiled

    def _may_run(self, x: Tensor, context: ForwardContext) -> bool:
        if (
            torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.jit.is_tracing()
            or context.last_only
            or context.lengths is not None
            or context.router_stats is not None
        ):
            return False
        if not chooses_cpu(x) or any(_ALL_HOOKS):
            return False
        if self._watch is None or not self._watch.unchanged():
            self._steps, self._compiled = {}, None
            if not self._refused:
                self._refused = self._why_not(x.dtype)
            if self._refused:
                self._watch = None
                return False
            self._watch = _Watch(self.layers)
        return True

    def _why_not(self, dtype: torch.dtype) -> str:
        """Empty if the layers are this package's own, without hooks, on the CPU, in `dtype`."""
        if dtype not in DTYPES:
            return f"the model is in {dtype}"
        if not _classes_are_ours():
            return "the forward function of a layer has been replaced"
        for name, module in self.layers.named_modules():
            own, which = module.__dict__, f"layer {name or 'list'}"
            if type(module) not in _CLASSES and not _is_block(module):
                return f"{which} is of the class {type(module).__name__}"
            if "forward" in own or "token_step" in own or any(own[hooks] for hooks in _HOOKS):
                return f"{which} has a hook or a function of its own"
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is None:
                    continue
                if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_cpu:
                    return f"a weight of {which} is a {type(tensor).__name__} on {tensor.device}"
            if any(p is not None and p.dtype != dtype for p in module._parameters.values()):
                return f"{which} has weights in another dtype than {dtype}"
        return ""


def _is_block(module: nn.Module) -> bool:
    """Whether it computes what a `Block` does; the first layer of the MTP module has more parts."""
    kind: Any = type(module)
    names = "forward", "__call__", "token_step"
    same = all(getattr(kind, name, None) is getattr(Block, name) for name in names)
    return isinstance(module, Block) and same


def _classes_are_ours() -> bool:
    return list(map(_FORWARD, _CLASSES)) == _FORWARDS and list(map(_CALL, _CLASSES)) == _CALLS


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
