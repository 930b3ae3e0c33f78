"""A matrix without a bias, multiplied by `ops.linear`: every projection that NVIDIA released.

It is an `nn.Linear`, so that everything that looks for one (checkpoints, quantization, the
optimizer's groups) finds it; only the product is computed by `ops.linear`. `prepare_for_decoding`
keeps a second copy of the matrix in the layout in which few rows are multiplied fastest. The copy
is neither saved nor copied along with the module, and it is used only as long as the weight is
unchanged:

- A forward pass that records gradients drops the copy, because an optimizer step may follow it.
  (Fused optimizers change weights without raising PyTorch's version counter.)
- The copy belongs to one tensor object and to its version counter, which in-place operations and
  `load_state_dict` raise.
- A write through `weight.data` outside of training is not noticed.

Some callers want the matrix and not the layer: a loss that keeps no logits, a drafter that needs a
few rows of the head. `plain_weight` gives it to them, but only where the matrix is all there is to
the layer. An adapter (LoRA), a parametrization or a hook makes it None, and the caller then calls
the layer like everybody else.

Configs may ask for biases (`attention_bias`, `mlp_bias`, `use_bias`). `linear` then makes a
`BiasedLinear`. It is a class of its own, so that the class without a bias asks for none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules import module

from nemotron_lite import ops

# Past `ops.linear`: only this backend can read a prepacked copy, which is no ordinary matrix.
from nemotron_lite.backends.cpu_linear import prefers_prepacked, prepack, product, product_for


class Linear(nn.Linear):
    """y = x W^T."""

    _prepacked: Tensor | None = None
    _copied: tuple[Tensor, int] | None = None  # the weight that was copied, and its version then

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def init_weights(
        self, std: float, divisor: float = 1.0, generator: torch.Generator | None = None
    ) -> None:
        """Draw a normal matrix with standard deviation `std`, then divide it by `divisor`."""
        nn.init.normal_(self.weight, std=std, generator=generator)
        self.weight.div_(divisor)

    def forward(self, input: Float[Tensor, "*rows i"]) -> Float[Tensor, "*rows o"]:
        """Project the last axis."""
        if self._prepacked is not None and not torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                self.drop_prepared()
            elif self._may_use_copy(input):
                return product(input, self._prepacked)
        return ops.linear(input, self.weight)

    def product_for(self, rows: int) -> Callable[[Tensor], Tensor]:
        """What `forward` computes for `rows i`, with the choice of the library made once.

        It holds as long as `weight` and the prepared copy stay the same objects, and only without
        gradients and autocast, for a weight on the CPU and inputs of its dtype.
        """
        copy = self._prepacked if self._is_current() else None
        return product_for(self.weight, rows, copy)

    def prepare_for_decoding(self) -> None:
        """Keep a copy in oneDNN's own layout, unless there is one of this weight already.

        Nothing is copied where changes of the weight could not be noticed: for a weight that a
        parametrization computes at each access, for an inference tensor, and in memory that is
        shared with other processes.

        Raises:
            ValueError: the weight is not float32 on the CPU.
        """
        weight = self._parameters.get("weight")
        if weight is None or weight.is_inference() or (weight.is_cpu and weight.is_shared()):
            self.drop_prepared()
        elif self._prepacked is None or not self._is_current():
            self._prepacked = prepack(weight)
            self._copied = (weight, weight._version)

    def drop_prepared(self) -> None:
        """Forget the copy, if there is one."""
        self._prepacked = self._copied = None

    def _is_current(self) -> bool:
        """Whether the weight is still the one that was copied."""
        weight = self._parameters.get("weight")
        if self._copied is None or weight is not self._copied[0]:
            return False
        return self._copied[1] == weight._version

    def _may_use_copy(self, x: Tensor) -> bool:
        return (
            self._is_current()
            and not torch.is_grad_enabled()
            and x.dtype == torch.float32
            and x.is_cpu
            and prefers_prepacked(x.numel() // self.in_features, self.weight.numel())
            and not torch.is_autocast_enabled("cpu")
        )

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self.drop_prepared()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__
        return {name: state[name] for name in state if name not in ("_prepacked", "_copied")}


class BiasedLinear(Linear):
    """y = x W^T + b.

    float32 on the CPU is multiplied like the layer without a bias, and b is added to the product.
    Elsewhere `F.linear` adds b before it rounds: in BF16 that is more accurate, on a GPU faster.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.bias = nn.Parameter(torch.empty(out_features))

    def init_weights(
        self, std: float, divisor: float = 1.0, generator: torch.Generator | None = None
    ) -> None:
        """As without a bias, which starts at zero."""
        super().init_weights(std, divisor, generator)
        self.bias.zero_()

    def forward(self, input: Float[Tensor, "*rows i"]) -> Float[Tensor, "*rows o"]:
        """Project the last axis and add the bias."""
        wide = input.dtype == self.weight.dtype == torch.float32
        if wide and input.is_cpu and not torch.is_autocast_enabled("cpu"):
            return super().forward(input) + self.bias
        return F.linear(input, self.weight, self.bias)

    def product_for(self, rows: int) -> Callable[[Tensor], Tensor]:
        """As without a bias; it holds as long as the bias stays the same object too."""
        weight, bias = self.weight, self.bias
        if weight.dtype != torch.float32:
            return lambda x: F.linear(x, weight, bias)
        product = super().product_for(rows)
        return lambda x: product(x) + bias


def linear(in_features: int, out_features: int, bias: bool) -> Linear:
    """A projection, with or without a bias."""
    return (BiasedLinear if bias else Linear)(in_features, out_features)


def plain_weight(layer: nn.Module) -> Tensor | None:
    """The matrix of a linear layer that computes x W^T and nothing else; None for any other layer.

    An adapter around the layer, a subclass, a bias, a parametrization, a hook on the layer or on
    all modules, or a replaced `forward` may change what it computes.
    """
    hooks = (
        layer._forward_hooks, layer._forward_pre_hooks,
        layer._backward_hooks, layer._backward_pre_hooks,
        module._global_forward_hooks, module._global_forward_pre_hooks,
        module._global_backward_hooks, module._global_backward_pre_hooks,
    )  # fmt: skip
    if type(layer) not in (Linear, nn.Linear) or "forward" in layer.__dict__ or any(hooks):
        return None
    return layer._parameters["weight"] if layer.bias is None else None
