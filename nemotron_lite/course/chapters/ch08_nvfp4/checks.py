"""Checks of chapter 08's exercises.

What is compared is bits: with the package's definition (`impl="naive"`), with the order of
operations that its docstrings name. A tolerance stands only where a product is summed. Random
numbers of stochastic rounding are given to the answer, as `uniform = (2 r + 1) / 2^17` for 16
random bits r, so that it can be compared with the package's rounding of the same bits.

Answers are only called, with tensors, numbers, lists and dicts, so they may run in another process.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemotron_lite.course.exercises import close, gradients, keeps_inputs, strided
from nemotron_lite.ops.philox import random_halves
from nemotron_lite.quantization import nvfp4
from nemotron_lite.quantization.emulated_layers import NVFP4Linear, StochasticSeeds

Answer = Callable[..., Any]
GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TIES = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
SIGNS = torch.tensor(nvfp4.SIGNS, dtype=torch.float32)


def same(found: Any, expected: Tensor, what: str) -> None:
    """Assert that every bit agrees, the sign of zeros included."""
    close(found, expected, what=what, rtol=0, atol=0, dtype=True)
    mine, theirs = torch.signbit(found.float()), torch.signbit(expected.float())
    wrong = (mine != theirs).nonzero()
    assert not len(wrong), (
        f"{what} has {len(wrong)} zeros with the wrong sign, the first at {wrong[0].tolist()}"
    )


def both_signs(*numbers: float) -> Tensor:
    return torch.tensor([*numbers, *(-x for x in numbers)])


def encoded(x: Tensor) -> Tensor:
    """x rounded to the nearest E2M1 value by the package."""
    return nvfp4.decode_e2m1(nvfp4.encode_e2m1(x))


def bits_for(x: Tensor) -> Tensor:
    """16 random bits for each number."""
    return torch.randint(2**16, x.shape, dtype=torch.int32)


def uniform_of(bits: Tensor) -> Tensor:
    """The dither that the package makes from random bits."""
    return (bits.float() * 2 + 1) / 2**17


def random_tensor(*shape: int) -> Tensor:
    """Normal numbers with outliers, in rows of very different sizes."""
    rows = torch.exp(2 * torch.randn(*shape[:-1], 1))
    spikes = 1 + 20 * (torch.rand(shape) < 0.02)
    return torch.randn(shape) * spikes * rows


# 08.to_e2m1


def e2m1_grid(answer: Answer) -> None:
    for value in GRID:
        close(answer(torch.tensor(value)), torch.tensor(value), what=f"of {value}, the result")
    x = both_signs(*GRID)
    what = "of the fifteen values of E2M1, the result"
    close(answer(x), x, what=what, rtol=0, atol=0, dtype=True)


def e2m1_between(answer: Answer) -> None:
    x = both_signs(0.1, 0.6, 0.9, 1.4, 1.9, 2.2, 2.6, 3.4, 3.6, 4.9, 5.1, 5.9)
    same(answer(x), encoded(x), f"of {x.tolist()[:12]} and the same below zero, the result")
    x = strided(2 * torch.randn(3, 5, 40))
    same(answer(x), encoded(x), "of random numbers, the result")


def e2m1_ties(answer: Answer) -> None:
    for tie, value in TIES.items():
        close(answer(torch.tensor(tie)), torch.tensor(value), what=f"of {tie}, the result")
        close(answer(torch.tensor(-tie)), torch.tensor(-value), what=f"of {-tie}, the result")
    ties = torch.tensor(list(TIES))
    for direction, what in ((0.0, "below"), (9.0, "above")):
        x = torch.nextafter(ties, torch.tensor(direction))
        same(answer(x), encoded(x), f"of the next float32 {what} each tie, the result")


def e2m1_saturates(answer: Answer) -> None:
    x = both_signs(6.5, 7.0, 7.1, 8.0, 100.0, 3e38, math.inf)
    same(answer(x), 6 * torch.sign(x), f"of {x.tolist()[:7]} and the same below zero, the result")


def e2m1_zero(answer: Answer) -> None:
    x = both_signs(0.0, 1e-30, 0.1, 0.25)
    found = keeps_inputs(answer, x, what="to_e2m1")
    same(found, torch.copysign(torch.zeros(8), x), f"of {x.tolist()}, the result")


# 08.stochastic


def stochastic_grid(answer: Answer) -> None:
    x = both_signs(*GRID)
    for number in (0.0, 0.5, 1 - 2.0**-17):
        what = f"of the values of E2M1 with uniform = {number:.6g}, the result"
        same(answer(x, torch.full_like(x, number)), x, what)


def stochastic_bits(answer: Answer) -> None:
    cases = (
        (2.3, 0.6, 2.0), (2.3, 0.8, 3.0), (-2.3, 0.2, -3.0), (-2.3, 0.4, -2.0),
        (0.1, 0.7, 0.0), (0.1, 0.9, 0.5), (5.0, 0.4, 4.0), (5.0, 0.6, 6.0),
    )  # fmt: skip
    for x, number, value in cases:
        found = answer(torch.tensor([x]), torch.tensor([number]))
        close(found, torch.tensor([value]), what=f"of {x} with uniform = {number}, the result")
    # Multiples of 2^-9, so that no sum with a dither is rounded, in whatever order it is computed.
    numbers = (2 * torch.randn(4, 300).clamp(-3, 3) * 512).round() / 512
    bits = bits_for(numbers)
    expected = nvfp4.decode_e2m1(nvfp4.encode_e2m1_stochastic(numbers, bits))
    same(answer(strided(numbers), uniform_of(bits)), expected, "of random numbers, the result")


def stochastic_mean(answer: Answer) -> None:
    x = both_signs(0.02, 0.2, 0.7, 1.1, 1.6, 2.1, 2.9, 3.3, 4.2, 5.5)
    many = 40_000
    found = answer(x.repeat(many, 1), torch.rand(many, len(x)))
    close(found.shape, (many, len(x)), what="the shape of the result")
    # The standard deviation of a mean is at most half a step over the square root of many: 0.005.
    what = f"the mean of {many:,} roundings of {[round(v, 2) for v in x.tolist()]}"
    close(found.mean(0), x, what=what, rtol=0, atol=0.03)


def stochastic_edges(answer: Answer) -> None:
    x = both_signs(6.0, 6.01, 7.0, 8.0, 100.0, math.inf)
    for number in (0.0, 1 - 2.0**-17):
        what = (
            f"of {x.tolist()[:6]} and the same below zero with uniform = {number:.6g}, the result"
        )
        same(answer(x, torch.full_like(x, number)), x.clamp(-6, 6), what)
    x = torch.tensor([0.0, -0.0, 0.1, -0.1])
    uniform = torch.tensor([0.5, 0.5, 0.1, 0.9])
    found = keeps_inputs(answer, x, uniform, what="stochastic")
    same(
        found, torch.tensor([0.0, -0.0, 0.0, -0.0]), f"of {x.tolist()}, rounded to zero, the result"
    )


# 08.quantize


def parts(found: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The three results, named if they are not what they should be."""
    if not isinstance(found, tuple | list) or len(found) != 3:
        raise AssertionError(
            f"quantize returns (values, block_scale, tensor_scale); found {type(found).__name__}."
        )
    for name, part in zip(("values", "block_scale", "tensor_scale"), found, strict=True):
        assert isinstance(part, Tensor), f"{name} is a {type(part).__name__}; expected a tensor."
    return found[0], found[1], found[2]


def decoded(q: nvfp4.QuantizedTensor) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of the package's tensor, as `quantize` of the exercise returns them."""
    return nvfp4.decode_e2m1(nvfp4.unpack_codes(q.codes)), q.scales, q.scale


def expected_parts(x: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return decoded(nvfp4.quantize(x, impl="naive", **options))


def same_parts(found: Any, expected: tuple[Tensor, Tensor, Tensor], case: str) -> None:
    values, block_scale, tensor_scale = parts(found)
    same(tensor_scale, expected[2], f"{case}, the tensor scale")
    same(block_scale, expected[1], f"{case}, the block scale")
    same(values, expected[0], f"{case}, values")


def quantize_tensor_scale(answer: Answer) -> None:
    x = torch.zeros(32)
    x[5] = -2688
    same(parts(answer(x))[2], torch.tensor(1.0), "if the largest size is 2688, the tensor scale")
    for _ in range(12):
        x = 10 ** random.uniform(-6, 6) * torch.randn(2, 32)
        same(parts(answer(x))[2], expected_parts(x)[2], "of random numbers, the tensor scale")


def quantize_block_scales(answer: Answer) -> None:
    x = torch.zeros(3, 16)
    x[0, 3], x[1, 7], x[2, 0] = 1, -0.5, 0.01
    scales = torch.tensor([[448.0], [224.0], [4.5]]).to(torch.float8_e4m3fn)
    what = "of blocks whose largest sizes are 1, 0.5 and 0.01, the block scales"
    same(parts(answer(x))[1], scales, what)
    for shape in ((64,), (5, 48), (2, 3, 32)):
        x = random_tensor(*shape)
        what = f"of random numbers {list(shape)}, the block scales"
        same(parts(answer(x))[1], expected_parts(x)[1], what)


def quantize_values(answer: Answer) -> None:
    x = torch.zeros(2, 16)
    x[0, :4], x[1, :2] = torch.tensor([6.0, -3.0, 1.2, 0.2]), torch.tensor([0.06, -0.01])
    values = torch.zeros(2, 16)
    values[0, :4], values[1, :2] = torch.tensor([6.0, -3.0, 1.0, 0.0]), torch.tensor([6.0, -1.0])
    close(parts(answer(x))[0], values, what="of a strong and a weak block, values", rtol=0, atol=0)
    for shape in ((64,), (5, 48), (2, 3, 32)):
        x = strided(random_tensor(*shape))
        found = keeps_inputs(answer, x, what="quantize")
        same_parts(found, expected_parts(x), f"of random numbers {list(shape)}")


def quantize_weak(answer: Answer) -> None:
    x = torch.zeros(2, 32)
    x[0, :16] = torch.randn(16)
    same_parts(answer(x), expected_parts(x), "with blocks of zeros")
    # A scale that E4M3 can only hold with few bits, and one that it rounds to zero.
    for times, what in ((1e-5, "100,000"), (1e-7, "10 million")):
        x[1, :16] = times * x[0, :16].abs().amax() * torch.linspace(-1, 1, 16)
        values, block_scale, tensor_scale = parts(answer(x))
        expected = expected_parts(x)
        case = f"with a block that is {what} times weaker than the strongest"
        same(tensor_scale, expected[2], f"{case}, the tensor scale")
        same(block_scale, expected[1], f"{case}, the block scales")
        assert (values.abs() <= 6).all(), f"{case}, a value is beyond 6 or not finite."


def quantize_zeros(answer: Answer) -> None:
    x = torch.zeros(2, 32)
    same_parts(answer(x), expected_parts(x), "of zeros")
    for size in (1e-36, 1e36):
        x = size * torch.randn(3, 32)
        same_parts(answer(x), expected_parts(x), f"of numbers of size {size}")


def quantize_square(answer: Answer) -> None:
    for rows, columns in ((16, 16), (48, 32)):
        x = random_tensor(rows, columns)
        found = parts(answer(x, True))
        same_parts(found, expected_parts(x, block="16x16"), f"with square=True, {rows} × {columns}")
        turned = parts(answer(x.T, True))
        same(turned[0], found[0].T, "of x transposed with square=True, values")
    x = random_tensor(16, 32)
    same_parts(answer(x, False), expected_parts(x), "with square=False")


def quantize_uniform(answer: Answer) -> None:
    for shape in ((32,), (6, 48)):
        x = torch.randn(*shape)
        bits = bits_for(x)
        expected = expected_parts(x, stochastic=True, bits=bits)
        same_parts(answer(x, False, uniform_of(bits)), expected, "with uniform numbers")


# 08.dequantize


def _quantized(*shape: int, square: bool = False) -> nvfp4.QuantizedTensor:
    return nvfp4.quantize(random_tensor(*shape), block="16x16" if square else "1x16")


def dequantize_values(answer: Answer) -> None:
    values = torch.zeros(2, 32)
    values[0, 3], values[0, 20], values[1, 31] = 6, -0.5, 1.5
    scales = torch.tensor([[2.0, 4.0], [8.0, 16.0]]).to(torch.float8_e4m3fn)
    expected = torch.zeros(2, 32)
    expected[0, 3], expected[0, 20], expected[1, 31] = 6, -1, 12
    found = answer(values, scales, torch.tensor(0.5))
    close(found, expected, what="with scales 2, 4, 8 and 16 times 0.5, the result", dtype=True)
    for shape in ((64,), (5, 48), (2, 3, 32)):
        q = _quantized(*shape)
        found = keeps_inputs(answer, *decoded(q), what="dequantize")
        close(found, q.dequantize(), what=f"of {list(shape)} numbers, the result", dtype=True)


def dequantize_factor(answer: Answer) -> None:
    for square in (False, True):
        q = _quantized(64, 256, square=square)
        same(answer(*decoded(q)), q.dequantize(impl="torch"), "of 16,384 numbers, the result")


# 08.hadamard


def _matrix() -> Tensor:
    """H, 16 × 16."""
    ones = [[(i & j).bit_count() for j in range(16)] for i in range(16)]
    return 1 - 2.0 * (torch.tensor(ones) % 2)


def _random_signs() -> Tensor:
    return 1 - 2 * torch.randint(2, (16,)).float()


def hadamard_spike(answer: Answer) -> None:
    matrix = _matrix()
    for place in (0, 1, 2, 4, 8, 13):
        x = torch.zeros(16)
        x[place] = 4
        what = f"of a single 4 at position {place}, with all signs 1, the result"
        close(answer(x, torch.ones(16)), matrix[place], what=what, dtype=True)


def hadamard_signs(answer: Answer) -> None:
    for _ in range(3):
        x, signs = torch.randn(16), _random_signs()
        what = "with random signs, the result"
        close(answer(x, signs), (x * signs) @ _matrix() / 4, what=what)


def hadamard_product(answer: Answer) -> None:
    a, b, signs = torch.randn(5, 48), torch.randn(7, 48), _random_signs()
    found = answer(a, signs) @ answer(b, signs).T
    close(found, a @ b.T, what="a product of two transformed matrices", rtol=1e-4, atol=1e-4)


def hadamard_groups(answer: Answer) -> None:
    signs = _random_signs()
    for shape in ((32,), (3, 48), (2, 5, 16)):
        x = strided(torch.randn(*shape))
        found = keeps_inputs(answer, x, signs, what="hadamard")
        expected = ((x.unflatten(-1, (-1, 16)) * signs) @ _matrix() / 4).flatten(-2)
        close(found, expected, what=f"of {list(shape)} numbers, the result", dtype=True)


def hadamard_bits(answer: Answer) -> None:
    x = random_tensor(40, 64)
    same(answer(x, SIGNS), nvfp4.hadamard_transform(x), "with the package's signs, the result")


def hadamard_gradients(answer: Answer) -> None:
    x, signs = torch.randn(3, 32), _random_signs()

    def by_matrix(x: Tensor) -> Tensor:
        return ((x.unflatten(-1, (-1, 16)) * signs) @ _matrix() / 4).flatten(-2)

    gradients(lambda x: answer(x, signs), by_matrix, (x,))


# 08.quantized_linear


def _layers(answer: Answer, inputs: int, outputs: int) -> tuple[Any, NVFP4Linear]:
    """The learner's layer and the package's, with the same weight."""
    seeds = StochasticSeeds(random.randrange(2**31))
    package = NVFP4Linear(inputs, outputs, seeds=seeds)
    with torch.no_grad():
        package.weight.copy_(random_tensor(outputs, inputs))
    mine = answer(inputs, outputs)
    state = mine.state_dict()
    assert list(state) == ["weight"], f"the layer has {sorted(state)}; expected only 'weight'."
    mine.load_state_dict(package.state_dict())
    return mine, package


def _read(x: Tensor, **options: Any) -> Tensor:
    """The numbers that a product reads of x."""
    return nvfp4.fake_quantize(x, impl="naive", **options)


def _near(found: Any, expected: Tensor, what: str) -> None:
    """Products may be summed in any order; one wrong value of a factor is far outside of this."""
    scale = float(expected.abs().amax())
    close(found, expected, what=what, rtol=1e-5, atol=1e-5 * scale, dtype=True)


def linear_output(answer: Answer) -> None:
    for tokens, inputs, outputs in ((1, 32, 16), (7, 48, 32)):
        mine, package = _layers(answer, inputs, outputs)
        x, weight = random_tensor(tokens, inputs), package.weight.detach()
        with torch.no_grad():
            found = mine.output(x)
        _near(found, _read(x) @ _read(weight, block="16x16").T, f"y of {tokens} tokens")


def linear_input_gradient(answer: Answer) -> None:
    mine, package = _layers(answer, 48, 32)
    dy, weight = random_tensor(9, 32), package.weight.detach()
    bits = bits_for(dy)
    with torch.no_grad():
        found = mine.input_gradient(dy, uniform_of(bits))
    read = _read(dy, stochastic=True, bits=bits)
    _near(found, read @ _read(weight, block="16x16"), "dx of 9 tokens")


def linear_weight_gradient(answer: Answer) -> None:
    mine, _ = _layers(answer, 48, 32)
    x, dy = random_tensor(64, 48), random_tensor(64, 32)
    bits = bits_for(dy.T)
    with torch.no_grad():
        found = mine.weight_gradient(x, dy, uniform_of(bits))
    read = _read(dy.T, hadamard=True, stochastic=True, bits=bits)
    _near(found, read @ _read(x.T, hadamard=True).T, "dW of 64 tokens")


def linear_package(answer: Answer) -> None:
    tokens = 32
    mine, package = _layers(answer, 16, 64)
    x, dy = random_tensor(tokens, 16).requires_grad_(), random_tensor(tokens, 64)
    y = package(x)
    y.backward(dy)
    package.seeds.start_micro_batch(0)  # the seeds of the call above, again
    seeds = package.seeds.next_call(package.number, package.name)
    dx, dw = x.grad, package.weight.grad
    assert dx is not None
    assert dw is not None
    along_rows = uniform_of(random_halves(seeds.dgrad, tokens, 64))
    along_tokens = uniform_of(random_halves(seeds.wgrad, 64, tokens))
    x = x.detach()
    with torch.no_grad():
        _near(mine.output(x), y.detach(), "y of the package's NVFP4Linear")
        what = "dx of the package's NVFP4Linear"
        _near(mine.input_gradient(dy, along_rows), dx, what)
        what = "dW of the package's NVFP4Linear"
        _near(mine.weight_gradient(x, dy, along_tokens), dw, what)


def linear_autograd(answer: Answer) -> None:
    mine, package = _layers(answer, 32, 48)
    x = torch.randn(2, 16, 32, requires_grad=True)
    y = mine(x)
    _near(y.detach(), package(x).detach(), "y of 2 rows of 16 tokens")
    dy = torch.randn(2, 16, 48)
    y.backward(dy)
    weight = dict(mine.named_parameters())["weight"]
    assert x.grad is not None, "no gradient reaches x"
    assert weight.grad is not None, "no gradient reaches the weight"
    exact = dy @ _read(package.weight.detach(), block="16x16")
    for name, found, right in (
        ("dx", x.grad, exact),
        ("dW", weight.grad, dy.flatten(0, 1).T @ x.detach().flatten(0, 1)),
    ):
        close(found.shape, tuple(right.shape), what=f"the shape of {name}")
        error = float((found - right).norm() / right.norm())
        assert error < 0.5, (
            f"{name} by autograd is {100 * error:.0f} % away from the exact gradient"
        )


def linear_mean(answer: Answer) -> None:
    mine, package = _layers(answer, 16, 16)
    with torch.no_grad():
        package.weight.copy_(torch.randn(16, 16))
        package.weight[0] = 0
    mine.load_state_dict(package.state_dict())
    # In each row a 3, and fifteen numbers of a fifth of a step, of which nearest would make zeros.
    # The 3 is the largest number of every block, so that nothing is clipped; it meets the zeros.
    dy = torch.full((1600, 16), 0.1)
    dy[:, 0] = 3
    exact = (dy @ _read(package.weight.detach(), block="16x16"))[0]
    with torch.no_grad():
        mean = mine.input_gradient(dy, torch.rand(dy.shape)).mean(0)
    close(mean.shape, tuple(exact.shape), what="the shape of a row of dx")
    error = float((mean - exact).norm() / exact.norm())
    assert error < 0.3, (
        f"the mean of 1,600 rows of dx is {100 * error:.0f} % away from the exact one"
    )


# 08.weighs


def _same_bytes(found: Any, expected: dict[str, int]) -> None:
    assert isinstance(found, dict), f"expected a dict, found a {type(found).__name__}."
    for kind, size in expected.items():
        assert kind in found, f"{kind!r} is not in the result, which has {sorted(found)}."
        close(found[kind], size, what=f"bytes of {kind!r}", rtol=0, atol=0)
    assert len(found) == len(expected), f"kinds are {sorted(found)}; expected {sorted(expected)}."


def _sizes(*factors: int) -> tuple[int, ...]:
    return tuple(factor * random.randint(1, 5) for factor in factors)


def weighs_plain(answer: Answer) -> None:
    rows, columns = _sizes(7, 11)
    tensors = [("router", (rows, columns)), ("head", (rows, columns)), ("norm", (columns,))]
    expected = {"router": 4 * rows * columns, "head": 2 * rows * columns, "norm": 2 * columns}
    _same_bytes(answer(tensors, {"router": "fp32", "head": "bf16"}), expected)


def weighs_fp8(answer: Answer) -> None:
    rows, columns = _sizes(7, 11)
    _same_bytes(answer([("in", (rows, columns))], {"in": "fp8"}), {"in": rows * columns + 4})


def weighs_nvfp4(answer: Answer) -> None:
    rows, columns = _sizes(6, 320)  # so large that another block size or padding shows
    found = answer([("up", (rows, columns))], {"up": "nvfp4"})
    _same_bytes(found, {"up": rows * columns // 2 + rows * columns // 16 + 4})
    q = nvfp4.quantize(torch.randn(rows, columns - 5))
    _same_bytes(answer([("up", (rows, columns - 5))], {"up": "nvfp4"}), {"up": q.nbytes})


def weighs_stacks(answer: Answer) -> None:
    experts, rows, columns = _sizes(2, 3, 16)
    for format, size in (
        ("nvfp4", nvfp4.quantize(torch.randn(experts, rows, columns), batch_dims=1).nbytes),
        ("fp8", experts * (rows * columns + 4)),
        ("bf16", 2 * experts * rows * columns),
    ):
        _same_bytes(answer([("experts", (experts, rows, columns))], {"experts": format}),
                    {"experts": size})  # fmt: skip


def weighs_kinds(answer: Answer) -> None:
    tensors: list[tuple[str, tuple[int, ...]]] = []
    expected: dict[str, int] = {}
    for _ in range(4):
        e, f, d = _sizes(2, 16, 16)
        sizes = {"experts": ((e, f, d), e * (f * d * 9 // 16 + 4)), "shared": ((f, d), f * d + 4),
                 "attention": ((f, d), 2 * f * d), "router": ((e, d), 4 * e * d)}  # fmt: skip
        for kind, (shape, size) in sizes.items():
            tensors.append((kind, shape))
            expected[kind] = expected.get(kind, 0) + size
    random.shuffle(tensors)
    formats = {"experts": "nvfp4", "shared": "fp8", "router": "fp32", "latent": "fp8"}
    _same_bytes(answer(tensors, formats), expected)
