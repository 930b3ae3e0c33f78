"""Weights that are computed from a seed when a layer asks for them, in BF16 or NVFP4.

A random number generator is too slow for 12.8 billion numbers per token. Copying memory is not. So
one table of 4,194,224 normal numbers is drawn, and every matrix is a stretch of it, times the
standard deviation that `init_weights` gives this matrix:

    W[i] = std * table[(start + i) mod N]        i counts the numbers of the matrix row by row
    start = 16 * hash(seed, name, expert)        N = 16 * 262139, and 262139 is a prime

N is not a multiple of any row length. So where a matrix is longer than the table, its rows repeat
with other columns, and no two rows of a matrix are equal. The table is quantized to NVFP4 once, in
blocks of 16 numbers. A packed matrix is the same stretch of the table of codes and of the table of
block scales, with `weight_scale_2 = scale of the table * std`. So the packed model is what rounding
the BF16 model to NVFP4 gives (with a tensor scale that all matrices share), and no matrix is ever
in BF16.

The table is computed in integers: a number is the sum of eight random 16-bit numbers (Philox,
ops/philox.py), centered and divided by its standard deviation. So it is the same, bit for bit, on
every machine. The sum is nearly normal: its kurtosis is 2.85 instead of 3, and nothing is beyond
4.9 standard deviations.

**What this is.** Matrices with the mean, the variance and nearly the distribution of an ordinary
initialization. Activations and logits have its scale, and routers spread tokens over experts like
random routers do. Times, memory and traffic are those of a real model of this size.

**What it is not.** Independent random matrices: all of them are made of 4 million numbers. Some
rows of two matrices are equal, in another order (two experts of Super with a probability of one in
64, the number of blocks in a row). Do not train it and do not study its spectrum. And it is not a
trained model: it writes noise, and a trained router chooses experts differently.

Norms, step sizes, convolutions and biases are initialized as their layers do it, from random
numbers of their own.

Source: Irwin-Hall distribution for the sum; layers' `init_weights` for scales and constants. Left
out: FP8.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import SupportsIndex, TypeVar

import torch
from torch import Tensor

from nemotron_lite.arguments import flag, integer
from nemotron_lite.cache import MODEL_DTYPES
from nemotron_lite.config import NemotronConfig
from nemotron_lite.model import Nemotron
from nemotron_lite.offload.model import attach_weights, offloaded_class
from nemotron_lite.offload.plan import DEFAULT_BUDGET
from nemotron_lite.ops import philox
from nemotron_lite.quantization import quantizable_modules
from nemotron_lite.quantization.nvfp4 import quantize
from nemotron_lite.quantization.nvfp4.scaling import BLOCK
from nemotron_lite.quantization.packed_layers import (
    PackedWeight,
    empty_packed_layer,
    install_packed_layer,
)

M = TypeVar("M", bound=Nemotron)

BLOCKS = 262_139  # a prime, so that it shares no factor with the blocks of a row
NUMBERS = BLOCK * BLOCKS
STEP = 104_729  # blocks between the starts of two experts; a prime too
ROUNDS = 7  # of Philox: the fewest that pass all tests of randomness
_AT_ONCE = 2**17  # numbers of the table drawn at once
_SUM_MEAN = 8 * 65_535 / 2  # of eight numbers from 0 to 65535
_SUM_STD = math.sqrt(8 * (65_536**2 - 1) / 12)
# Matrices that write into the residual stream; `init_weights` divides them by sqrt(layers).
_INTO_RESIDUAL = ("out_proj", "o_proj", "down_proj", "fc2_latent_proj")


def generated_model(
    model_class: type[M],
    config: NemotronConfig,
    *,
    seed: SupportsIndex | None = None,
    dtype: torch.dtype | None = None,
    packed: bool = False,
    budget: SupportsIndex | None = None,
    progress: bool = False,
) -> M:
    """A model of any size whose weights are generated when they are used.

    Args:
        model_class: the model is of a subclass of it.
        config: its sizes.
        seed: -2^63 to 2^64 - 1; None is 0. The same seed gives the same weights on every machine.
        dtype: of the weights; None is bfloat16.
        packed: matrices in NVFP4, but for embedding, router, q, k, v, head and MTP module, as in
            NVIDIA's releases. Those have `dtype`.
        budget: bytes of weights in memory at most; None is 4 GiB.
        progress: report on stderr how many layers a call has run.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an unknown dtype, or a budget without room for the largest tensor.
    """
    seed = integer("seed", 0 if seed is None else seed, low=-(2**63), high=2**64 - 1)
    dtype = torch.bfloat16 if dtype is None else dtype
    if dtype not in MODEL_DTYPES:
        expected = ", ".join(map(str, MODEL_DTYPES))
        raise ValueError(
            f"dtype={dtype}: expected one of {expected}. packed=True gives matrices in NVFP4."
        )
    packed = flag("packed", packed)
    with torch.device("meta"):
        model: M = offloaded_class(model_class)(config)  # type: ignore[arg-type]
    model.to(dtype)
    if packed:
        for name in [n for module in quantizable_modules(model) for n in module.shapes]:
            layer = empty_packed_layer(model, name, "nvfp4", calibrated=False)
            install_packed_layer(model, name, layer)
    packed_columns = {
        path: module.shape[-1]
        for path, module in model.named_modules()
        if isinstance(module, PackedWeight)
    }
    source = GeneratedWeights(config, seed, dtype, packed_columns)
    attach_weights(
        model,
        source,
        budget=DEFAULT_BUDGET if budget is None else integer("budget", budget, low=1),
        progress=flag("progress", progress),
    )
    return model.eval()


class GeneratedWeights:
    """A `WeightSource` that computes every weight.

    Args:
        config: sizes and initial scales.
        seed: any integer.
        dtype: of plain weights.
        packed: columns of each packed weight, by the path of its module.
    """

    def __init__(
        self, config: NemotronConfig, seed: int, dtype: torch.dtype, packed: Mapping[str, int]
    ) -> None:
        self.config, self.seed, self._packed = config, seed, packed
        layers = config.num_layers if config.rescale_prenorm_residual else 1
        self._std = config.initializer_range
        self._residual_std = self._std / math.sqrt(layers)
        with torch.device("cpu"):  # whatever the default device is
            table = normal_table(_hash(seed, "table") >> 1)
            self._plain = {std: (table * std).to(dtype) for std in (self._std, self._residual_std)}
            self._codes = self._scales = self._scale = torch.empty(0)
            if packed:
                quantized = quantize(table)
                self._codes, self._scale = quantized.codes, quantized.scale
                self._scales = quantized.scales.view(torch.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        plain = sum(table.nbytes for table in self._plain.values())
        return plain + self._codes.nbytes + self._scales.nbytes

    def read(
        self, name: str, out: Tensor, *, expert: int | None = None, row: int | None = None
    ) -> int:
        """Compute a weight; see `WeightSource.read`."""
        module, _, leaf = name.rpartition(".")
        if module in self._packed and leaf != "bias":  # a packed layer may have a plain bias
            self._read_packed(module, leaf, out, expert)
        elif (std := self._std_of(name)) is not None:
            self._read_matrix(name, std, out, expert, row)
        else:
            with torch.device("cpu"):
                out.copy_(self._small(name, out.shape))
        return out.nbytes

    def _std_of(self, name: str) -> float | None:
        """The standard deviation of a matrix; None for anything else."""
        path = name.removesuffix(".weight")
        leaf = path.rpartition(".")[2]
        if "norm" in leaf or leaf in ("conv1d", "A_log", "D", "dt_bias") or leaf.endswith("bias"):
            return None
        # Routed experts in a latent space write into that, and not into the residual stream.
        inside = self.config.moe_latent_size is not None and path.endswith("experts.down_proj")
        inside = inside and not path.endswith("shared_experts.down_proj")
        return self._residual_std if leaf in _INTO_RESIDUAL and not inside else self._std

    def _start(self, name: str, expert: int | None) -> int:
        """The block of the table with which a matrix begins."""
        return (_hash(self.seed, name) + (expert or 0) * STEP) % BLOCKS

    def _read_matrix(
        self, name: str, std: float, out: Tensor, expert: int | None, row: int | None
    ) -> None:
        columns = out.shape[-1]
        blocks = -(-columns // BLOCK)
        start = self._start(name, expert) + (row or 0) * blocks
        if columns % BLOCK == 0:
            _copy_stretch(self._plain[std], start * BLOCK, out.view(-1))
            return
        padded = out.new_empty(*out.shape[:-1], blocks * BLOCK)
        _copy_stretch(self._plain[std], start * BLOCK, padded.view(-1))
        out.copy_(padded[..., :columns])

    def _read_packed(self, module: str, leaf: str, out: Tensor, expert: int | None) -> None:
        """One of the tensors of a packed weight."""
        # By the name of the plain weight: the packed model is the plain one, rounded.
        name = module if ".experts." in module else f"{module}.weight"
        if leaf == "weight_scale_2":
            std = self._std_of(name)
            assert std is not None
            out.copy_(self._scale * std)
            return
        start, flat = self._start(name, expert), out.view(torch.uint8).view(-1)
        if leaf == "weight_scale":
            _copy_stretch(self._scales, start, flat)
            return
        _copy_stretch(self._codes, start * BLOCK // 2, flat)
        if padding := -self._packed[module] % BLOCK:  # zeros, as ModelOpt writes them
            out[..., out.shape[-1] - padding // 2 :] = 0
            if padding % 2:
                out[..., out.shape[-1] - padding // 2 - 1] &= 0x0F

    def _small(self, name: str, shape: torch.Size) -> Tensor:
        """What is no matrix: norms, step sizes, convolutions and biases, in float64."""
        above, _, leaf = name.rpartition(".")
        if leaf == "A_log":
            return self._uniform(name, shape, 1, 16).log()
        if leaf == "dt_bias":
            config = self.config
            low, high = math.log(config.time_step_min), math.log(config.time_step_max)
            dt = self._uniform(name, shape, low, high).exp().clamp(min=config.time_step_floor)
            return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
        if above.endswith("conv1d"):
            bound = 1 / math.sqrt(self.config.conv_kernel)
            return self._uniform(name, shape, -bound, bound)
        ones = leaf == "D" or leaf == "weight"
        return torch.full(shape, 1.0 if ones else 0.0, dtype=torch.float64)

    def _uniform(self, name: str, shape: torch.Size, low: int | float, high: int | float) -> Tensor:
        counter = torch.arange(shape.numel())
        word = philox.words(_hash(self.seed, name) >> 1, counter, ROUNDS)[0]
        share = (torch.as_tensor(word).double() + 0.5) / 2**32
        return (low + (high - low) * share).view(shape)


def normal_table(key: int) -> Tensor:
    """`NUMBERS` nearly normal numbers with mean 0 and variance 1, float32, the same everywhere."""
    parts = []
    for first in range(0, NUMBERS, _AT_ONCE):
        counter = torch.arange(first, min(first + _AT_ONCE, NUMBERS))
        words = (torch.as_tensor(word) for word in philox.words(key, counter, ROUNDS))
        total = sum((word & 0xFFFF) + (word >> 16) for word in words)
        parts.append(((torch.as_tensor(total).double() - _SUM_MEAN) / _SUM_STD).float())
    return torch.cat(parts)


def _copy_stretch(table: Tensor, start: int, out: Tensor) -> None:
    """Copy numbers of the table from `start` on, and from its beginning again at its end."""
    position, done = start % len(table), 0
    while done < len(out):
        count = min(len(table) - position, len(out) - done)
        out[done : done + count].copy_(table[position : position + count])
        position, done = 0, done + count


def _hash(seed: int, name: str) -> int:
    """A number of 64 bits for each seed and name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=8).digest())
