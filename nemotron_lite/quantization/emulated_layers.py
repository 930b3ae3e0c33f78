"""Linear layers and experts whose three matrix products read NVFP4 (or MXFP8) numbers.

A linear layer multiplies three times in training, and each product sums over another dimension:

    forward   y  = x W^T        over the inputs of the layer
    dgrad     dx = dy W         over its outputs
    wgrad     dW = dy^T x       over the tokens

A block of sixteen numbers with one scale has to lie along the dimension that is summed over. So x
and dy are each quantized twice, in two directions, both times from the unquantized tensor. W in
tiles of 16 x 16 has the same values in both directions. How each of the five operands is quantized
(`GemmRecipe`) is the core of the recipe:

- dy is rounded stochastically. Rounding to nearest loses small gradients in the same direction
  every time; stochastic rounding is right on average. On x and W it adds noise without a benefit.
- For dW, x and dy get a Hadamard transform along the tokens. It spreads an outlier over sixteen
  tokens, and it cancels in dW. In y and dx it would have to be undone, so it is not used there.
- The weights that the optimizer updates stay in FP32, and dW is in FP32.

**Emulation.** Numbers are rounded to NVFP4 and multiplied in FP32. E2M1 times E4M3 is exact in
FP32, and tensor cores sum in FP32, so the results are theirs up to the order of additions. (The
scale of the tensor is multiplied in before the product, not after it.) Emulation shows the effect
of the format on training; it saves no time and no memory. Inside `torch.autocast` a layer reads
BF16 activations and returns BF16, as the BF16 layer does.

**Experts** are one product per expert. Each expert's tokens are a separate tensor with its own
scale, padded with zero rows to a multiple of 16, so that no block contains two experts. The
router's weights multiply the activations before the second product, as in Megatron.

**Random seeds.** The seed of each rounding is a function of the run's seed, the micro-batch, the
module and the call (`StochasticSeeds`). The random bits are a function of that seed and the
position of the number. So a resumed run gets the same random bits.

Sources: reference sheet 6.3 and 6.5; arXiv 2509.25149; Transformer Engine, NVFP4BlockScaling and
MXFP8BlockScaling. Transformer Engine quantizes BF16 copies of the master weights; here they are
quantized from FP32 directly, which rounds once less. Left out: products in FP4 hardware, and
keeping the weights' quantized copy from one micro-batch to the next.
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
from nemotron_lite.quantization.nvfp4 import fake_quantize, hadamard_transform
from nemotron_lite.quantization.nvfp4.scaling import BLOCK
from nemotron_lite.quantization.recipe import GemmRecipe, Operand

DEFAULT_RECIPE = GemmRecipe()


class CallSeeds(NamedTuple):
    """The random seeds of one call of a module, for its two gradients, and its name for errors."""

    name: str
    dgrad: int = 0
    wgrad: int = 0


class StochasticSeeds:
    """Seeds for stochastic rounding: the same seeds whenever a run reaches the same point.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.start_micro_batch(0)

    def start_micro_batch(self, micro_batch: int) -> None:
        """Go to the beginning of a micro-batch; micro-batches are counted over the whole run."""
        self.micro_batch, self._calls = micro_batch, dict[int, int]()

    def next_call(self, module: int, name: str) -> CallSeeds:
        """Seeds for the next call of a module in this micro-batch; each call has its own."""
        if not torch.is_grad_enabled():
            return CallSeeds(name)
        call = self._calls[module] = self._calls.get(module, -1) + 1
        key = struct.pack("<4Q", self.seed, self.micro_batch, module, call)
        digest = hashlib.blake2b(key, digest_size=16).digest()
        dgrad, wgrad = struct.unpack("<2Q", digest)
        return CallSeeds(name, dgrad >> 1, wgrad >> 1)  # 63 bits


def quantize_along_rows(
    x: Float[Tensor, "*rows n"],
    operand: Operand,
    seed: int,
    *,
    batch_dims: int = 0,
    amax: Tensor | None = None,
    name: str = "tensor",
) -> Float[Tensor, "*rows n"]:
    """The values in float32 that a product reads of x if it sums over x's last dimension."""
    return fake_quantize(
        x.float(),
        block=operand.block,
        stochastic=operand.stochastic,
        seed=seed if operand.stochastic else None,
        batch_dims=batch_dims,
        amax=amax,
        name=name,
    )


def quantize_along_tokens(
    x: Float[Tensor, "t n"], operand: Operand, seed: int, *, name: str = "tensor"
) -> Float[Tensor, "s n"]:
    """The values in float32 that a product reads of x if it sums over x's tokens.

    s is t padded to a multiple of 16. The padding rows are zero before the Hadamard transform,
    which spreads the last tokens over them. Both operands of dW are transformed in the same way, so
    the sum over all s rows equals the sum over the tokens.
    """
    x = nn.functional.pad(x, (0, 0, 0, -x.shape[-2] % BLOCK))
    if operand.hadamard:
        x = hadamard_transform(x, dim=-2)  # rounded to x's dtype, as in Transformer Engine
    return fake_quantize(
        x.float(),
        dim=-2,
        stochastic=operand.stochastic,
        seed=seed if operand.stochastic else None,
        name=name,
    )


class _NVFP4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, recipe, seeds):  # type: ignore[no-untyped-def]
        with torch.autocast(x.device.type, enabled=False):
            wide = weight.detach().float()
            quantized = quantize_along_rows(
                wide, recipe.weight, 0, name=f"the weight of {seeds.name}"
            )
            rows = quantize_along_rows(x, recipe.activation, 0, name=f"the input of {seeds.name}")
            y = ops.linear(rows, quantized)
            if recipe.weight.block == "1x16":  # the backward pass sums along the columns
                quantized = wide
            ctx.save_for_backward(x, quantized)
            ctx.recipe, ctx.seeds = recipe, seeds
            return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        recipe: GemmRecipe = ctx.recipe
        seeds: CallSeeds = ctx.seeds
        gradient = f"the gradient of {seeds.name}'s output"
        grad_x = grad_weight = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                if recipe.weight.block == "1x16":
                    weight = fake_quantize(weight, dim=-2)
                dy = quantize_along_rows(grad, recipe.gradient, seeds.dgrad, name=gradient)
                grad_x = ops.linear(dy, weight.mT).to(x.dtype)
            if ctx.needs_input_grad[1]:
                dy = quantize_along_tokens(
                    grad, recipe.gradient_along_tokens, seeds.wgrad, name=gradient
                )
                tokens = quantize_along_tokens(x, recipe.activation_along_tokens, 0)
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
    """x in the dtype of an enclosing autocast, as a BF16 layer would read it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class _EmulatedLinear(nn.Linear):
    """A linear layer that can share weight and bias of another layer.

    The bias stays in its own precision and is added to the product.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Any:
        """A layer of this class that shares weight and bias of `linear`."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, **options)
        made.weight, made.bias = linear.weight, linear.bias
        return made

    def _add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.to(y.dtype)


class NVFP4Linear(_EmulatedLinear):
    """y = x W^T with every product in NVFP4.

    Args:
        in_features, out_features: as for `nn.Linear`; without a bias, but for `from_linear`.
        recipe: how the five operands are quantized.
        seeds: of stochastic rounding; one `StochasticSeeds` serves a whole model.
        number: of this module in the model, from which its seeds are made.
        name: of this module, for errors about NaN and infinity.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        recipe: GemmRecipe = DEFAULT_RECIPE,
        seeds: StochasticSeeds | None = None,
        number: int = 0,
        name: str = "a linear layer",
    ) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.recipe, self.number, self.name = recipe, number, name
        self.seeds = seeds or StochasticSeeds()

    def forward(self, input: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows f"]:
        """Multiply; in the dtype of the input, or that of an enclosing autocast."""
        x = _in_working_dtype(input)
        seeds = self.seeds.next_call(self.number, self.name)
        y = _NVFP4Product.apply(x.flatten(0, -2), self.weight, self.recipe, seeds)
        return self._add_bias(y.view(*x.shape[:-1], self.out_features))


class MXFP8Linear(_EmulatedLinear):
    """y = x W^T with every product in MXFP8, rounded to nearest."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows f"]:
        """Multiply; in the dtype of the input, or that of an enclosing autocast."""
        x = _in_working_dtype(input)
        y = _MXFP8Product.apply(x.flatten(0, -2), self.weight)
        return self._add_bias(y.view(*x.shape[:-1], self.out_features))


class TokensByExpert:
    """Where each (token, slot) pair goes if the rows of each expert are padded to whole blocks.

    Attributes:
        num_experts: of the layer.
        num_rows: of all experts together, padding included.
        row_of_pair: row of each (token, slot) pair, in the order of the pairs.
        ranges: (expert, first row, row after the last), for experts with tokens only.
        expert_of_block: the expert of each block of 16 rows.
    """

    def __init__(self, indices: Int[Tensor, "t k"], num_experts: int) -> None:
        expert_of_pair = indices.flatten()
        counts = torch.bincount(expert_of_pair, minlength=num_experts)
        padded = (counts + BLOCK - 1) // BLOCK * BLOCK
        ends, padded_ends = counts.cumsum(0), padded.cumsum(0)
        pairs = expert_of_pair.argsort(stable=True)
        shift = ((padded_ends - padded) - (ends - counts))[expert_of_pair[pairs]]
        self.row_of_pair = torch.empty_like(pairs)
        self.row_of_pair[pairs] = torch.arange(len(pairs), device=pairs.device) + shift
        experts = torch.arange(num_experts, device=pairs.device)
        self.expert_of_block = experts.repeat_interleave(padded // BLOCK)
        self.ranges, start = [], 0
        for expert, count in enumerate(padded.tolist()):
            if count:
                self.ranges.append((expert, start, start + count))
            start += count
        self.num_rows = start
        self.num_experts = num_experts

    def blocks_and_amax(self, x: Float[Tensor, "r n"]) -> tuple[Tensor, Tensor]:
        """x as blocks `c 16 n`, and for each block the largest magnitude of its expert's rows."""
        blocks = x.unflatten(0, (-1, BLOCK))
        block_amax = blocks.abs().amax((1, 2)).float()
        expert_amax = block_amax.new_zeros(self.num_experts)
        expert_amax.scatter_reduce_(0, self.expert_of_block, block_amax, "amax")
        return blocks, expert_amax[self.expert_of_block]

    def scatter(self, x: Float[Tensor, "t n"], slots: int) -> Float[Tensor, "r n"]:
        """Each token's row of x in the rows of its pairs; padding rows are zero."""
        rows = x.new_zeros(self.num_rows, x.shape[1])
        return rows.index_copy(0, self.row_of_pair, x.repeat_interleave(slots, 0))


def _experts_along_rows(
    x: Tensor, operand: Operand, seed: int, by_expert: TokensByExpert, name: str
) -> Tensor:
    """`quantize_along_rows` with one scale per expert."""
    blocks, amax = by_expert.blocks_and_amax(x)
    quantized = quantize_along_rows(blocks, operand, seed, batch_dims=1, amax=amax, name=name)
    return quantized.flatten(0, 1)


def _experts_along_tokens(
    x: Tensor, operand: Operand, seed: int, by_expert: TokensByExpert, name: str
) -> Tensor:
    """`quantize_along_tokens` with one scale per expert."""
    if operand.hadamard:
        x = hadamard_transform(x.unflatten(0, (-1, BLOCK)), dim=-2).flatten(0, 1)
    blocks, amax = by_expert.blocks_and_amax(x)
    quantized = fake_quantize(
        blocks.float(),
        dim=-2,
        stochastic=operand.stochastic,
        seed=seed if operand.stochastic else None,
        batch_dims=1,
        amax=amax,
        name=name,
    )
    return quantized.flatten(0, 1)


class _GroupedProduct(torch.autograd.Function):
    """One product per expert: y = x W^T for the rows of each expert."""

    @staticmethod
    def forward(ctx, x, weight, by_expert, recipe, seeds):  # type: ignore[no-untyped-def]
        with torch.autocast(x.device.type, enabled=False):
            wide = weight.detach().float()
            name = f"the weight of {seeds.name}"
            quantized = quantize_along_rows(wide, recipe.weight, 0, batch_dims=1, name=name)
            name = f"the input of {seeds.name}"
            rows = _experts_along_rows(x, recipe.activation, 0, by_expert, name)
            y = rows.new_empty(x.shape[0], weight.shape[1])
            for e, start, stop in by_expert.ranges:
                torch.mm(rows[start:stop], quantized[e].t(), out=y[start:stop])
            ctx.save_for_backward(x, wide if recipe.weight.block == "1x16" else quantized)
            ctx.by_expert, ctx.recipe, ctx.seeds = by_expert, recipe, seeds
            return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        by_expert: TokensByExpert = ctx.by_expert
        recipe: GemmRecipe = ctx.recipe
        seeds: CallSeeds = ctx.seeds
        name = f"the gradient of {seeds.name}'s output"
        grad_x = grad_weight = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                if recipe.weight.block == "1x16":
                    weight = fake_quantize(weight, dim=-2, batch_dims=1)
                dy = _experts_along_rows(grad, recipe.gradient, seeds.dgrad, by_expert, name)
                wide = dy.new_empty(x.shape)
                for e, start, stop in by_expert.ranges:
                    torch.mm(dy[start:stop], weight[e], out=wide[start:stop])
                grad_x = wide.to(x.dtype)
            if ctx.needs_input_grad[1]:
                operand = recipe.gradient_along_tokens
                dy = _experts_along_tokens(grad, operand, seeds.wgrad, by_expert, name)
                operand, name = recipe.activation_along_tokens, f"the input of {seeds.name}"
                tokens = _experts_along_tokens(x, operand, 0, by_expert, name)
                grad_weight = torch.zeros(weight.shape, dtype=dy.dtype, device=dy.device)
                for e, start, stop in by_expert.ranges:
                    torch.mm(dy[start:stop].t(), tokens[start:stop], out=grad_weight[e])
        return grad_x, grad_weight, None, None, None


class NVFP4Experts(Experts):
    """Routed experts with every product in NVFP4; shares the weights of `experts`.

    Args:
        experts: the layer to replace.
        recipe, seeds, number, name: as for `NVFP4Linear`; the two products take the seeds of
            `number` and `number + 1`.
    """

    def __init__(
        self,
        experts: Experts,
        *,
        recipe: GemmRecipe = DEFAULT_RECIPE,
        seeds: StochasticSeeds | None = None,
        number: int = 0,
        name: str = "the experts",
    ) -> None:
        nn.Module.__init__(self)
        self.up_proj, self.down_proj = experts.up_proj, experts.down_proj
        self.recipe, self.number, self.name = recipe, number, name
        self.seeds = seeds or StochasticSeeds()

    def forward(self, z: Float[Tensor, "t l"], routing: ops.Routing) -> Float[Tensor, "t l"]:
        """The weighted sum of each token's chosen experts."""
        z = _in_working_dtype(z)
        tokens, slots = routing.indices.shape
        by_expert = TokensByExpert(routing.indices, self.up_proj.shape[0])
        weights = routing.weights.new_zeros(by_expert.num_rows)
        weights = weights.index_copy(0, by_expert.row_of_pair, routing.weights.flatten())
        hidden = self._multiply(by_expert.scatter(z, slots), self.up_proj, by_expert, self.number)
        active = (squared_relu(hidden) * weights.unsqueeze(1)).to(z.dtype)
        answers = self._multiply(active, self.down_proj, by_expert, self.number + 1)
        return answers[by_expert.row_of_pair].view(tokens, slots, -1).sum(1)

    def _multiply(
        self, x: Tensor, weight: Tensor, by_expert: TokensByExpert, number: int
    ) -> Tensor:
        seeds = self.seeds.next_call(number, self.name)
        return _GroupedProduct.apply(x, weight, by_expert, self.recipe, seeds)
