"""Linear layers and experts whose three matrix products read NVFP4 (or MXFP8) numbers.

A linear layer multiplies three times in training, and each product sums over another dimension:

    forward   y  = x W^T        over the inputs of the layer
    dgrad     dx = dy W         over its outputs
    wgrad     dW = dy^T x       over the tokens

A block of sixteen numbers with one scale has to lie along the dimension that is summed over. So x
and dy are each quantized twice, in two directions, both times from the unquantized tensor. W in
tiles of 16 x 16 serves two directions with the same values. The treatment of each of the five
operands (`GemmRecipe`) is the recipe's heart:

- stochastic rounding on dy: rounded to nearest, small gradients are lost in the same direction
  every time; by chance they are right on average. On x and W it adds noise and helps nothing;
- a Hadamard turn of x and dy along the tokens, which spreads an outlier over sixteen of them and
  cancels in dW. In y and dx it would have to be undone, so it is not used there;
- the weights that the optimiser moves stay FP32, and dW comes out in FP32.

**Emulation.** Numbers are rounded to NVFP4 and multiplied in FP32. E2M1 times E4M3 is exact in
FP32, and FP32 sums are what the tensor cores keep, so this is their arithmetic up to the order of
additions. (The scale of the tensor is multiplied in before the product, not after.) It shows what
the format does to training; it saves no time and no memory. The products of one layer inside
`torch.autocast` read BF16 activations and answer in BF16, as the BF16 layer does.

**Experts** are one product per expert. Each expert's tokens are a tensor of their own, with a scale
of their own, filled up with zero rows to a multiple of 16 so that no block spans two experts. The
router's weights multiply the activations before the second product, as in Megatron.

**Dice.** The seed of each rounding is a function of (seed of the run, micro-batch, module, call),
kept in `Dice`, and the bits a function of that seed and the place of the number. So a resumed run
throws the same dice.

Sources: reference sheet 6.3 and 6.5; arXiv 2509.25149; Transformer Engine, NVFP4BlockScaling and
MXFP8BlockScaling. Transformer Engine quantizes BF16 copies of the master weights; here they are
quantized from FP32 directly, which rounds once less. Left out: native kernels, and the weights'
quantized copy kept from one micro-batch to the next.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nemotron_lite import ops
from nemotron_lite.layers.moe import Experts
from nemotron_lite.ops.experts import squared_relu
from nemotron_lite.quantization.fp8 import fake_quantize_mxfp8
from nemotron_lite.quantization.nvfp4 import fake_quantize, hadamard
from nemotron_lite.quantization.recipe import GemmRecipe, Operand

BLOCK = 16
RECIPE = GemmRecipe()


class Call(NamedTuple):
    """One call of one module: whose it is, for errors, and the seeds of its two gradients."""

    name: str
    dgrad: int = 0
    wgrad: int = 0


class Dice:
    """Seeds for stochastic rounding, the same whenever the same place of a run is reached.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.at(0)

    def at(self, micro_batch: int) -> None:
        """Go to the beginning of a micro-batch, counted over the whole run."""
        self.micro_batch, self._calls = micro_batch, dict[int, int]()

    def take(self, module: int, name: str) -> Call:
        """Seeds for one call of a module; each call has its own."""
        if not torch.is_grad_enabled():
            return Call(name)
        call = self._calls[module] = self._calls.get(module, -1) + 1
        place = struct.pack("<4Q", self.seed, self.micro_batch, module, call)
        digest = hashlib.blake2b(place, digest_size=16).digest()
        dgrad, wgrad = struct.unpack("<2Q", digest)
        return Call(name, dgrad >> 1, wgrad >> 1)  # 63 bits


def along_rows(
    x: Float[Tensor, "*rows n"], operand: Operand, seed: int, *, batch_dims: int = 0,
    amax: Tensor | None = None, name: str = "tensor",
) -> Float[Tensor, "*rows n"]:  # fmt: skip
    """x as a product that sums over its last dimension reads it, in float32."""
    return fake_quantize(
        x.float(), block=operand.block, stochastic=operand.stochastic,
        seed=seed if operand.stochastic else None, batch_dims=batch_dims, amax=amax, name=name,
    )  # fmt: skip


def along_tokens(
    x: Float[Tensor, "t n"], operand: Operand, seed: int, *, name: str = "tensor"
) -> Float[Tensor, "s n"]:
    """x as a product that sums over its tokens reads it, in float32; s is t filled up to 16s.

    The rows filled up are zero before the turn, which spreads the last tokens over them. Both
    inputs of dW are turned alike, so the sum over all s rows is the one over the tokens.
    """
    x = nn.functional.pad(x, (0, 0, 0, -x.shape[-2] % BLOCK))
    if operand.hadamard:
        x = hadamard(x, dim=-2)  # rounded to x's dtype, as Transformer Engine's kernel does
    return fake_quantize(
        x.float(), dim=-2, stochastic=operand.stochastic,
        seed=seed if operand.stochastic else None, name=name,
    )  # fmt: skip


class _NVFP4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, recipe, call):  # type: ignore[no-untyped-def]
        with torch.autocast(x.device.type, enabled=False):
            wide = weight.detach().float()
            quantized = along_rows(wide, recipe.weight, 0, name=f"the weight of {call.name}")
            rows = along_rows(x, recipe.activation, 0, name=f"the input of {call.name}")
            y = ops.linear(rows, quantized)
            if recipe.weight.block == "1x16":  # the backward pass sums along the columns
                quantized = wide
            ctx.save_for_backward(x, quantized)
            ctx.recipe, ctx.call = recipe, call
            return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        recipe: GemmRecipe = ctx.recipe
        call: Call = ctx.call
        gradient = f"the gradient of {call.name}'s output"
        grad_x = grad_weight = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                if recipe.weight.block == "1x16":
                    weight = fake_quantize(weight, dim=-2)
                dy = along_rows(grad, recipe.gradient, call.dgrad, name=gradient)
                grad_x = ops.linear(dy, weight.mT).to(x.dtype)
            if ctx.needs_input_grad[1]:
                dy = along_tokens(grad, recipe.gradient_along_tokens, call.wgrad, name=gradient)
                tokens = along_tokens(x, recipe.activation_along_tokens, 0)
                grad_weight = ops.linear(dy.mT, tokens.mT)
        return grad_x, grad_weight, None, None


class _MXFP8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def]
        with torch.autocast(x.device.type, enabled=False):
            ctx.save_for_backward(x, weight)
            y = ops.linear(fake_quantize_mxfp8(x.float()), fake_quantize_mxfp8(weight.float()))
            return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        with torch.autocast(x.device.type, enabled=False):
            wide = grad.float()
            if ctx.needs_input_grad[0]:
                columns = fake_quantize_mxfp8(weight.float(), dim=-2)
                grad_x = ops.linear(fake_quantize_mxfp8(wide), columns.mT).to(x.dtype)
            if ctx.needs_input_grad[1]:
                tokens = fake_quantize_mxfp8(x.float(), dim=-2)
                grad_weight = ops.linear(fake_quantize_mxfp8(wide, dim=-2).mT, tokens.mT)
        return grad_x, grad_weight


def _in_working_dtype(x: Tensor) -> Tensor:
    """x in the dtype of an enclosing autocast, which is what the BF16 layer would read."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class _Quantized(nn.Linear):
    """A bias-free linear layer that can stand on the weight of another."""

    @classmethod
    def over(cls, linear: nn.Linear, **how: Any) -> Any:
        """A layer of this kind over the very weight of `linear`.

        Raises:
            ValueError: a linear layer with a bias, which the family does not have.
        """
        if getattr(linear, "bias", None) is not None:
            raise ValueError("quantized layers have no bias; this linear layer has one.")
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, **how)
        made.weight = linear.weight
        return made


class NVFP4Linear(_Quantized):
    """y = x W^T with every product in NVFP4.

    Args:
        in_features, out_features: as for `nn.Linear`; there is no bias.
        recipe: of the five operands.
        dice: seeds of the stochastic operands; one `Dice` serves a whole model.
        number: of this module in the model, for the dice.
        name: for errors about NaN and infinity.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        recipe: GemmRecipe = RECIPE,
        dice: Dice | None = None,
        number: int = 0,
        name: str = "a linear layer",
    ) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.recipe, self.dice, self.number, self.name = recipe, dice or Dice(), number, name

    def forward(self, input: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows f"]:
        """Multiply; in the dtype of the input, or that of an enclosing autocast."""
        x = _in_working_dtype(input)
        call = self.dice.take(self.number, self.name)
        y = _NVFP4Product.apply(x.flatten(0, -2), self.weight, self.recipe, call)
        return y.view(*x.shape[:-1], self.out_features)


class MXFP8Linear(_Quantized):
    """y = x W^T with every product in MXFP8: E4M3 with a power of two for each 32, to nearest."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows f"]:
        """Multiply; in the dtype of the input, or that of an enclosing autocast."""
        x = _in_working_dtype(input)
        y = _MXFP8Product.apply(x.flatten(0, -2), self.weight)
        return y.view(*x.shape[:-1], self.out_features)


class Groups:
    """(token, slot) pairs by expert, each expert's rows filled up to a multiple of 16.

    Attributes:
        rows: of the filled-up layout.
        places: row of each pair, in the order of the pairs.
        blocks: (expert, first row, row behind the last), experts with tokens only.
        owners: the expert of each 16 rows.
    """

    def __init__(self, indices: Int[Tensor, "t k"], experts: int) -> None:
        flat = indices.flatten()
        counts = torch.bincount(flat, minlength=experts)
        filled = (counts + BLOCK - 1) // BLOCK * BLOCK
        ends, filled_ends = counts.cumsum(0), filled.cumsum(0)
        pairs = flat.argsort(stable=True)
        shift = (filled_ends - filled) - (ends - counts)
        self.places = torch.empty_like(pairs)
        self.places[pairs] = torch.arange(flat.numel(), device=flat.device) + shift[flat[pairs]]
        self.owners = torch.arange(experts, device=flat.device).repeat_interleave(filled // BLOCK)
        self.blocks, start = [], 0
        for expert, count in enumerate(filled.tolist()):
            if count:
                self.blocks.append((expert, start, start + count))
            start += count
        self.rows = start
        self.experts = experts

    def by_sixteen(self, x: Float[Tensor, "r n"]) -> tuple[Tensor, Tensor]:
        """x as `c 16 n`, and for each c the largest magnitude of its expert's rows."""
        runs = x.unflatten(0, (-1, BLOCK))
        largest = runs.abs().amax((1, 2)).float()
        of_expert = largest.new_zeros(self.experts)
        of_expert.scatter_reduce_(0, self.owners, largest, "amax")
        return runs, of_expert[self.owners]

    def spread(self, x: Float[Tensor, "t n"], slots: int) -> Float[Tensor, "r n"]:
        """Each token's row at the places of its pairs, zero elsewhere."""
        rows = x.new_zeros(self.rows, x.shape[1])
        return rows.index_copy(0, self.places, x.repeat_interleave(slots, 0))


def _rows_of_experts(x: Tensor, operand: Operand, seed: int, groups: Groups, name: str) -> Tensor:
    """`along_rows` with one scale per expert."""
    runs, amax = groups.by_sixteen(x)
    return along_rows(runs, operand, seed, batch_dims=1, amax=amax, name=name).flatten(0, 1)


def _tokens_of_experts(x: Tensor, operand: Operand, seed: int, groups: Groups, name: str) -> Tensor:
    """`along_tokens` with one scale per expert."""
    if operand.hadamard:
        x = hadamard(x.unflatten(0, (-1, BLOCK)), dim=-2).flatten(0, 1)
    runs, amax = groups.by_sixteen(x)
    return fake_quantize(
        runs.float(), dim=-2, stochastic=operand.stochastic,
        seed=seed if operand.stochastic else None, batch_dims=1, amax=amax, name=name,
    ).flatten(0, 1)  # fmt: skip


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, groups, recipe, call):  # type: ignore[no-untyped-def]
        with torch.autocast(x.device.type, enabled=False):
            wide = weight.detach().float()
            name = f"the weight of {call.name}"
            quantized = along_rows(wide, recipe.weight, 0, batch_dims=1, name=name)
            name = f"the input of {call.name}"
            rows = _rows_of_experts(x, recipe.activation, 0, groups, name)
            y = rows.new_empty(x.shape[0], weight.shape[1])
            for e, start, stop in groups.blocks:
                torch.mm(rows[start:stop], quantized[e].t(), out=y[start:stop])
            ctx.save_for_backward(x, wide if recipe.weight.block == "1x16" else quantized)
            ctx.groups, ctx.recipe, ctx.call = groups, recipe, call
            return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        groups: Groups = ctx.groups
        recipe: GemmRecipe = ctx.recipe
        call: Call = ctx.call
        gradient = f"the gradient of {call.name}'s output"
        grad_x = grad_weight = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                if recipe.weight.block == "1x16":
                    weight = fake_quantize(weight, dim=-2, batch_dims=1)
                dy = _rows_of_experts(grad, recipe.gradient, call.dgrad, groups, gradient)
                wide = dy.new_empty(x.shape)
                for e, start, stop in groups.blocks:
                    torch.mm(dy[start:stop], weight[e], out=wide[start:stop])
                grad_x = wide.to(x.dtype)
            if ctx.needs_input_grad[1]:
                dy = _tokens_of_experts(
                    grad, recipe.gradient_along_tokens, call.wgrad, groups, gradient
                )
                operand = recipe.activation_along_tokens
                tokens = _tokens_of_experts(x, operand, 0, groups, f"the input of {call.name}")
                grad_weight = torch.zeros(weight.shape, dtype=dy.dtype, device=dy.device)
                for e, start, stop in groups.blocks:
                    torch.mm(dy[start:stop].t(), tokens[start:stop], out=grad_weight[e])
        return grad_x, grad_weight, None, None, None


class NVFP4Experts(Experts):
    """Routed experts with every product in NVFP4, over the very weights of `experts`.

    Args:
        experts: the layer to stand in for.
        recipe, dice, number, name: as for `NVFP4Linear`; two numbers are used, this and the next.
    """

    def __init__(
        self,
        experts: Experts,
        *,
        recipe: GemmRecipe = RECIPE,
        dice: Dice | None = None,
        number: int = 0,
        name: str = "the experts",
    ) -> None:
        nn.Module.__init__(self)
        self.up_proj, self.down_proj = experts.up_proj, experts.down_proj
        self.recipe, self.dice, self.number, self.name = recipe, dice or Dice(), number, name

    def forward(self, z: Float[Tensor, "t l"], routing: ops.Routing) -> Float[Tensor, "t l"]:
        """The weighted sum of each token's chosen experts."""
        z = _in_working_dtype(z)
        tokens, slots = routing.indices.shape
        groups = Groups(routing.indices, self.up_proj.shape[0])
        weights = routing.weights.new_zeros(groups.rows)
        weights = weights.index_copy(0, groups.places, routing.weights.flatten())
        hidden = self._multiply(groups.spread(z, slots), self.up_proj, groups, self.number)
        active = (squared_relu(hidden) * weights.unsqueeze(1)).to(z.dtype)
        answers = self._multiply(active, self.down_proj, groups, self.number + 1)
        return answers[groups.places].view(tokens, slots, -1).sum(1)

    def _multiply(self, x: Tensor, weight: Tensor, groups: Groups, number: int) -> Tensor:
        call = self.dice.take(number, self.name)
        return _GroupedProduct.apply(x, weight, groups, self.recipe, call)
