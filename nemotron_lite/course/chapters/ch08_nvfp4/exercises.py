"""Exercises of chapter 08: from one number in four bits to a layer that is trained in them.

    08.to_e2m1           a number, rounded to the nearest of the fifteen values of E2M1
    08.stochastic        the same, rounded to one of its two neighbors at random
    08.quantize          a tensor: values, block scales and the tensor scale, to the bit
    08.dequantize        and back
    08.hadamard          the Hadamard transform of groups of 16, in four rounds
    08.quantized_linear  a class: the three products of a linear layer, as the recipe computes them
    08.weighs            optional: bytes of a model under a precision map

The order is that of `needs`: `quantize` rounds with `to_e2m1`, or with `stochastic` where it is
given random numbers. The last class computes with everything above.

Answers get random numbers as an argument, `uniform`, so they can be compared with the package to
the bit: `uniform = (2 r + 1) / 2^17` for 16 random bits r, as in `nvfp4/e2m1.py`.

The checks are in `checks.py`; the mistakes that they have to catch are in
`tests/course/chapters/ch08_nvfp4/mutants.py`.
"""

from __future__ import annotations

from nemotron_lite.course.chapters.ch08_nvfp4 import checks
from nemotron_lite.course.exercises import Check, Exercise

TO_E2M1 = Exercise(
    id="08.to_e2m1",
    title="A number in four bits",
    objective="O1: quantize a number by hand.",
    minutes=10,
    difficulty=2,
    points=6,
    task=r"""
Round each number to the nearest of $\pm\{0, 0.5, 1, 1.5, 2, 3, 4, 6\}$.

- What is larger than 6 becomes 6, and what is smaller than -6 becomes -6.
- A tie goes to the value whose last bit is 0: to 0, 1, 2 or 4, never to 0.5, 1.5, 3 or 6.
- The result has the sign of x, also where it is zero: -0.1 becomes -0.0.
""".strip(),
    stub='''
def to_e2m1(x):
    """The nearest value of E2M1, ties to even, at most 6 in size.

    Args:
        x: float32 tensor of any shape; no NaN.

    Returns:
        Float32 tensor of the same shape.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def to_e2m1(x):
    size = x.abs().clamp(max=6)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign(step * torch.round(size / step), x)
""",
    hints=(
        "Work with `x.abs()` and give the sign back at the end: `torch.copysign(size, x)` takes "
        "the sign of x, also that of -0.0. Multiplying with `torch.sign(x)` loses it.",
        "Two neighbors are 0.5 apart below 2, 1 apart below 4, and 2 apart above. So `step = "
        "torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))`, and the result is a "
        "multiple of step. `clamp(max=6)` comes first.",
        "`step * torch.round(size / step)`: `torch.round` gives a tie to the even number, and "
        "even multiples of the step are the values whose last bit is 0. `floor(x + 0.5)` rounds "
        "all ties up.",
    ),
    checks=(
        Check("the values of E2M1 stay", checks.e2m1_grid, hint=2, points=1),
        Check("numbers between them", checks.e2m1_between, hint=2, points=1),
        Check("ties", checks.e2m1_ties, hint=3, points=2),
        Check("beyond 6", checks.e2m1_saturates, hint=2, points=1),
        Check("the sign of zero, inputs unchanged", checks.e2m1_zero, hint=1, points=1),
    ),
)


STOCHASTIC = Exercise(
    id="08.stochastic",
    title="Stochastic rounding",
    objective="O3: write stochastic rounding.",
    minutes=10,
    difficulty=2,
    points=6,
    task=r"""
Round each number to one of its two neighbors in E2M1. It goes to the *upper* one, the one closer to
$+\infty$, if its distance from the lower one, measured in steps, plus its number in `uniform`
reaches 1. So a number 30 % of the way from 2 to 3 goes to 3 with a probability of 30 %, and the
mean of many roundings is the number itself.

What lies beyond 6 becomes 6, whatever `uniform` is, and the same holds below -6. The result has the
sign of x, also where it is zero.
""".strip(),
    stub='''
def stochastic(x, uniform):
    """One of the two neighbors of x in E2M1, at random; the mean is x.

    Args:
        x: float32 tensor; no NaN.
        uniform: float32 tensor of the same shape, uniform in [0, 1).

    Returns:
        Float32 tensor of the same shape.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def stochastic(x, uniform):
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    rounded = step * torch.floor(x / step + uniform)
    return torch.copysign(rounded.clamp(-6, 6), x)
""",
    hints=(
        "The step depends on the size, `x.abs()`, as in `to_e2m1`: 0.5 below 2, 1 below 4, then 2. "
        "`x / step` is the number in steps.",
        "`step * torch.floor(x / step + uniform)`: floor goes to the lower neighbor unless the "
        "sum reaches the next whole number. Divide x itself, not its size: the upper neighbor of "
        "-2.3 is -2.",
        "Clamp the result to -6 … 6 and not only the input, then take the sign of x with "
        "`torch.copysign`.",
    ),
    checks=(
        Check("the values of E2M1 stay", checks.stochastic_grid, hint=1, points=1),
        Check("the package's bits", checks.stochastic_bits, hint=2, points=2),
        Check("the mean of many roundings", checks.stochastic_mean, hint=2, points=2),
        Check("beyond 6, and the sign of zero", checks.stochastic_edges, hint=3, points=1),
    ),
)


_SCALES_HEAD = """FLT_MAX = torch.finfo(torch.float32).max
# Tensors: torch computes `number / tensor` as number * (1 / tensor), which rounds twice.
RANGE, SIXTH = torch.tensor(6 * 448.0), torch.tensor(1 / 6)"""

QUANTIZE = Exercise(
    id="08.quantize",
    title="A tensor in NVFP4",
    objective="O2: write quantize to the bit.",
    minutes=15,
    difficulty=3,
    points=9,
    task=r"""
Compute the two scales and the values, in float32 and in this order. $s_{enc}$ brings the largest
number to 2688 = 6 · 448; FLT_MAX is the largest float32:

$$\begin{aligned}
s_{enc} &= \min(2688\,/\,\max|x|,\ \mathrm{FLT\_MAX}) && \text{1 if all of x is zero}
\\ s_{dec} &= 1 / s_{enc} && \text{the tensor scale}
\\ c &= \mathrm{E4M3}(\max|\mathrm{block}| \cdot (s_{enc} \cdot \tfrac16)) && \text{the block scale}
\\ \mathrm{values} &= \mathrm{E2M1}(x \cdot \min(1 / (c \cdot s_{dec}),\ \mathrm{FLT\_MAX}))
\end{aligned}$$

A block is 16 neighbors along the last axis. With `square`, x is a matrix and a block is a tile of
16 × 16: each of its sixteen rows gets the same c. E2M1 is your `to_e2m1`, or your `stochastic`
where `uniform` is given. c can be zero; the second FLT_MAX keeps 0 · (1 / 0) from being NaN.
""".strip(),
    stub=f'''
{_SCALES_HEAD}


def quantize(x, square=False, uniform=None):
    """A tensor in NVFP4.

    Args:
        x: float32 tensor `… n`; n is a multiple of 16.
        square: one scale for each 16 × 16 numbers; x is then a matrix `m n`, and m is a multiple
            of 16, too.
        uniform: None, or random numbers of x's shape: then round stochastically.

    Returns:
        (values, block_scale, tensor_scale): float32 `… n`, values of E2M1; torch.float8_e4m3fn
        `… n/16`; float32 without axes.
    """
    raise NotImplementedError
'''.strip(),
    solution=f"""{_SCALES_HEAD}


def quantize(x, square=False, uniform=None):
    blocks = x.unflatten(-1, (-1, 16))
    largest = blocks.abs().amax(-1)
    if square:
        largest = largest.unflatten(0, (-1, 16)).amax(1).repeat_interleave(16, dim=0)
    top = largest.amax()
    encode = torch.where(top == 0, 1.0, (RANGE / top).clamp(max=FLT_MAX))
    tensor_scale = 1 / encode
    block_scale = (largest * (encode * SIXTH)).to(torch.float8_e4m3fn)
    times = (1 / (block_scale.float() * tensor_scale)).clamp(max=FLT_MAX)
    scaled = (blocks * times.unsqueeze(-1)).flatten(-2)
    values = to_e2m1(scaled) if uniform is None else stochastic(scaled, uniform)
    return values, block_scale, tensor_scale
""",
    hints=(
        "`blocks = x.unflatten(-1, (-1, 16))` and `largest = blocks.abs().amax(-1)`. Then `(RANGE "
        "/ top).clamp(max=FLT_MAX)` with `top = largest.amax()`, and 1 where top is 0. What you "
        "return as the tensor scale is `1 / encode`.",
        "`(largest * (encode * SIXTH)).to(torch.float8_e4m3fn)` is rounded to nearest by the cast. "
        "From here on read c as it was stored: `block_scale.float()`. The values that you round "
        "are `blocks * times.unsqueeze(-1)` with `times = (1 / (c * tensor_scale)).clamp("
        "max=FLT_MAX)`, flattened again.",
        "Square tiles: `largest.unflatten(0, (-1, 16)).amax(1)` has one number for each tile; "
        "`repeat_interleave(16, dim=0)` gives it to all sixteen rows. `uniform` has the shape of "
        "x: pass it to `stochastic` with the scaled numbers.",
    ),
    checks=(
        Check("the tensor scale", checks.quantize_tensor_scale, hint=1, points=1),
        Check("block scales", checks.quantize_block_scales, hint=2, points=2),
        Check("values", checks.quantize_values, hint=2, points=2),
        Check("blocks of zeros, and weak ones", checks.quantize_weak, hint=2, points=1),
        Check("zeros, and numbers of extreme size", checks.quantize_zeros, hint=1, points=1),
        Check("tiles of 16 × 16", checks.quantize_square, hint=3, points=1),
        Check("stochastic rounding", checks.quantize_uniform, hint=3, points=1),
    ),
    needs=("08.to_e2m1", "08.stochastic"),
)


DEQUANTIZE = Exercise(
    id="08.dequantize",
    title="And back",
    objective="O2: write dequantize to the bit.",
    minutes=4,
    difficulty=1,
    points=3,
    task="""
Each value is multiplied with one factor: the scale of its block times the scale of the tensor.
Compute the factor first, in float32, and multiply once.
""".strip(),
    stub='''
def dequantize(values, block_scale, tensor_scale):
    """The numbers that a tensor in NVFP4 stands for.

    Args:
        values, block_scale, tensor_scale: as `quantize` returns them.

    Returns:
        Float32 tensor `… n`.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def dequantize(values, block_scale, tensor_scale):
    factor = block_scale.float() * tensor_scale
    return (values.unflatten(-1, (-1, 16)) * factor.unsqueeze(-1)).flatten(-2)
""",
    hints=(
        "`values.unflatten(-1, (-1, 16))` has a block in each last row. It is multiplied with "
        "`factor.unsqueeze(-1)`, and `.flatten(-2)` gives the shape back.",
        "FP8 tensors cannot be multiplied: `block_scale.float()` first.",
        "`values * (c * s)`, not `(values * c) * s`: the second rounds in another order, and the "
        "last bit can differ.",
    ),
    checks=(
        Check("the package's numbers", checks.dequantize_values, hint=1, points=2),
        Check("one factor for a block", checks.dequantize_factor, hint=3, points=1),
    ),
)


HADAMARD = Exercise(
    id="08.hadamard",
    title="The Hadamard transform",
    objective="O4: write the Hadamard transform.",
    minutes=10,
    difficulty=3,
    points=6,
    task=r"""
Transform each group of 16 along the last axis: $y = x\,\mathrm{diag}(\mathrm{signs})\,H / 4$ with
$H_{ij} = (-1)^{\mathrm{ones}(i, j)}$, where ones(i, j) is the number of binary digits that are 1 in
both i and j. Do it in four rounds. The order of additions is then fixed, so the bits are the
same on every machine:

1. Multiply the sixteen numbers with `signs / 4`.
2. In a round, take the pairs of numbers that are `apart` positions from each other and replace
   `(first, second)` by `(first + second, first - second)`. `apart` is 1, then 2, 4 and 8. With
   `apart = 2` the first pairs are 0 and 2, 1 and 3, 4 and 6.
""".strip(),
    stub='''
def hadamard(x, signs):
    """The Hadamard transform of each group of 16 numbers, with signs; orthonormal.

    Args:
        x: float tensor `… n`; n is a multiple of 16.
        signs: float tensor of 16 numbers, each 1 or -1.

    Returns:
        Float tensor `… n`.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def hadamard(x, signs):
    groups = x.unflatten(-1, (-1, 16)) * (signs / 4)
    for apart in (1, 2, 4, 8):
        first, second = groups.unflatten(-1, (-1, 2, apart)).unbind(-2)
        groups = torch.stack([first + second, first - second], dim=-2).flatten(-3)
    return groups.flatten(-2)
""",
    hints=(
        "`x.unflatten(-1, (-1, 16)) * (signs / 4)`: the signs come before H, and 1/4 makes the "
        "transform orthonormal. At the end `.flatten(-2)`.",
        "`groups.unflatten(-1, (-1, 2, apart))` puts each pair into an axis of length 2: "
        "`first, second = ….unbind(-2)`.",
        "`torch.stack([first + second, first - second], dim=-2).flatten(-3)` puts sum and "
        "difference where first and second were. Four rounds, `apart` 1, 2, 4, 8; the order of "
        "the rounds decides the last bit.",
    ),
    checks=(
        Check("one large number among fifteen zeros", checks.hadamard_spike, hint=2, points=1),
        Check("signs", checks.hadamard_signs, hint=1, points=1),
        Check("orthonormal: a product stays", checks.hadamard_product, hint=1, points=1),
        Check("several groups, strided, unchanged", checks.hadamard_groups, hint=1, points=1),
        Check("the package's bits", checks.hadamard_bits, hint=3, points=1),
        Check("gradients", checks.hadamard_gradients, hint=2, points=1),
    ),
)


_LINEAR_HEAD = '''SIGNS = torch.tensor([1.0, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1])


class Products(torch.autograd.Function):
    """The three products of a layer, as autograd calls them; new random numbers for each dy."""

    @staticmethod
    def forward(ctx, x, weight, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer.output(x)

    @staticmethod
    def backward(ctx, dy):
        (x,), layer = ctx.saved_tensors, ctx.layer
        dx = layer.input_gradient(dy, torch.rand_like(dy))
        return dx, layer.weight_gradient(x, dy, torch.rand_like(dy.T)), None


class QuantizedLinear(nn.Linear):
    """y = x Wᵀ, whose three products read NVFP4 numbers; the weight itself stays in float32."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x):
        """x `… d` → y `… f`; for training, the number of tokens is a multiple of 16."""
        rows = x.flatten(0, -2)
        return Products.apply(rows, self.weight, self).unflatten(0, x.shape[:-1])
'''

QUANTIZED_LINEAR = Exercise(
    id="08.quantized_linear",
    title="A layer that is trained in four bits",
    objective="O4: say which product each part of the recipe belongs to.",
    minutes=20,
    difficulty=4,
    points=9,
    task=r"""
A linear layer multiplies three times in training. Each product sums over another axis, and blocks
of 16 lie along the axis that is summed over. So dy and x are quantized twice, each time from the
unquantized numbers. Write the three products:

| method | product | sum over | recipe |
| --- | --- | --- | --- |
| `output` | $y = x W^T$ | inputs of the layer | x to nearest, W in tiles of 16 × 16 |
| `input_gradient` | $dx = dy\,W$ | outputs of the layer | dy stochastically, the same W |
| `weight_gradient` | $dW = dy^T x$ | tokens | `hadamard` on both; dy stochastically, x to nearest |

To read NVFP4 numbers, quantize and dequantize, and multiply in float32. `forward` and `Products`
are given; they call your methods with rows of tokens, and with new random numbers each time.
""".strip(),
    stub=f'''
{_LINEAR_HEAD}
    def output(self, x):
        """y, `t f`.

        Args:
            x: float tensor `t d`; d and f are multiples of 16.
        """
        raise NotImplementedError

    def input_gradient(self, dy, uniform):
        """dx, `t d`.

        Args:
            dy: float tensor `t f`.
            uniform: random numbers `t f`, for dy.
        """
        raise NotImplementedError

    def weight_gradient(self, x, dy, uniform):
        """dW, `f d`.

        Args:
            x: float tensor `t d`; t is a multiple of 16.
            dy: float tensor `t f`.
            uniform: random numbers `f t`, for dy transposed.
        """
        raise NotImplementedError
'''.strip(),
    solution=f"""{_LINEAR_HEAD}
    def output(self, x):
        return dequantize(*quantize(x)) @ dequantize(*quantize(self.weight, square=True)).T

    def input_gradient(self, dy, uniform):
        weight = dequantize(*quantize(self.weight, square=True))
        return dequantize(*quantize(dy, uniform=uniform)) @ weight

    def weight_gradient(self, x, dy, uniform):
        x = dequantize(*quantize(hadamard(x.T, SIGNS)))
        dy = dequantize(*quantize(hadamard(dy.T, SIGNS), uniform=uniform))
        return dy @ x.T
""",
    hints=(
        "`dequantize(*quantize(x))` are the numbers that a product reads of x. The weight is "
        "`dequantize(*quantize(self.weight, square=True))` in `output` and in `input_gradient`; "
        "the first multiplies with its transpose.",
        "`input_gradient` rounds dy with `quantize(dy, uniform=uniform)`, along the outputs of the "
        "layer. There is no Hadamard transform in y and dx: W would be transformed along its "
        "inputs for y and along its outputs for dx, so the two would read different matrices.",
        "`weight_gradient` sums over tokens, so blocks and groups lie along tokens: `hadamard(x.T, "
        "SIGNS)` and `hadamard(dy.T, SIGNS)`, then `quantize`, the second with `uniform`. Both are "
        "now `… t`, and dW is `dy @ x.T`.",
    ),
    checks=(
        Check("y = x Wᵀ", checks.linear_output, hint=1, points=2),
        Check("dx = dy W", checks.linear_input_gradient, hint=2, points=2),
        Check("dW = dyᵀ x", checks.linear_weight_gradient, hint=3, points=2),
        Check("the package's layer", checks.linear_package, hint=3, points=1),
        Check("gradients by autograd", checks.linear_autograd, hint=3, points=1),
        Check("the mean of many dx", checks.linear_mean, hint=2, points=1),
    ),
    needs=("08.quantize", "08.dequantize", "08.hadamard"),
)


WEIGHS = Exercise(
    id="08.weighs",
    title="What a model weighs",
    objective="O5: count what a model weighs.",
    minutes=8,
    difficulty=2,
    points=5,
    task="""
Count the bytes of a model's weights. Each tensor has a kind, such as "experts", and `formats` names
the format of a kind; a kind that it does not name is in "bf16".

| format | bytes |
| --- | --- |
| "fp32" | 4 a number |
| "bf16" | 2 a number |
| "fp8" | 1 a number, and 4 for each matrix |
| "nvfp4" | half a byte a number and 1 for each block, and 4 for each matrix |

A row of a matrix in NVFP4 is padded to whole blocks of 16. A tensor with three axes is a stack of
matrices, each with a scale of its own.
""".strip(),
    stub='''
def weighs(tensors, formats):
    """Bytes of the weights of a model, by kind.

    Args:
        tensors: a list of (kind, shape); the shapes are tuples with 1 to 3 numbers.
        formats: kind → "nvfp4", "fp8", "bf16" or "fp32".

    Returns:
        A dict, kind → bytes as an int.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def weighs(tensors, formats):
    found = {}
    for kind, shape in tensors:
        format, rows = formats.get(kind, "bf16"), math.prod(shape[:-1])
        numbers, matrices = rows * shape[-1], math.prod(shape[:-2])
        blocks = rows * math.ceil(shape[-1] / 16)
        size = {
            "fp32": 4 * numbers,
            "bf16": 2 * numbers,
            "fp8": numbers + 4 * matrices,
            "nvfp4": 9 * blocks + 4 * matrices,
        }
        found[kind] = found.get(kind, 0) + size[format]
    return found
""",
    hints=(
        '`formats.get(kind, "bf16")` is the format. Several tensors can have the same kind: add '
        "to `found.get(kind, 0)`.",
        "`math.prod(shape[:-1])` rows, each of `shape[-1]` numbers; `math.prod(shape[:-2])` "
        "matrices. `math.prod(())` is 1, so both work for vectors, too.",
        "A block in NVFP4 is 16 numbers of half a byte and one scale: 9 bytes. A row has "
        "`math.ceil(shape[-1] / 16)` of them, the last one padded.",
    ),
    checks=(
        Check("formats without scales", checks.weighs_plain, hint=1, points=1),
        Check("FP8 and its scale", checks.weighs_fp8, hint=2, points=1),
        Check("NVFP4, whole blocks", checks.weighs_nvfp4, hint=3, points=1),
        Check("stacks of matrices", checks.weighs_stacks, hint=2, points=1),
        Check("a model of several kinds", checks.weighs_kinds, hint=1, points=1),
    ),
    kind="optional",
)

EXERCISES: tuple[Exercise, ...] = (
    TO_E2M1,
    STOCHASTIC,
    QUANTIZE,
    DEQUANTIZE,
    HADAMARD,
    QUANTIZED_LINEAR,
    WEIGHS,
)
