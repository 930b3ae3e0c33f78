"""Wrong answers to chapter 08's exercises: mistakes that real projects have shipped.

Each has to fail, and the message has to name the hint that is given here. Most are the reference
solution with one place changed.
"""

from __future__ import annotations

from nemotron_lite.course.exercises import exercise
from tests.course.chapters.mutants import Mutant


def _with(exercise_id: str, *changes: tuple[str, str]) -> str:
    """The reference solution with places exchanged; each must be there exactly once."""
    source = exercise(exercise_id).solution
    for old, new in changes:
        assert source.count(old) == 1, f"{exercise_id}: {old!r} is there {source.count(old)} times"
        source = source.replace(old, new)
    return source


_STEP = "torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))"
_WEIGHT = "dequantize(*quantize(self.weight, square=True))"

MUTANTS: dict[str, list[Mutant]] = {
    "08.to_e2m1": [
        Mutant(
            name="all ties up",
            source=_with(
                "08.to_e2m1", ("torch.round(size / step)", "torch.floor(size / step + 0.5)")
            ),
            hint=3,
            bug="round-half-up in place of cvt.rn: sums of many rounded numbers grow.",
        ),
        Mutant(
            name="the first nearest value of a table",
            source="""
def to_e2m1(x):
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    nearest = (x.abs().clamp(max=6).unsqueeze(-1) - grid).abs().argmin(-1)
    return torch.copysign(grid[nearest], x)
""",
            hint=3,
            bug="argmin over the sixteen values, as early emulations had it: all ties go down.",
        ),
        Mutant(
            name="one step for all",
            source=_with("08.to_e2m1", (_STEP, "0.5")),
            hint=2,
            bug="The steps of INT4: 2.5 and 5 are no values of E2M1.",
        ),
        Mutant(
            name="steps that begin one value late",
            source=_with("08.to_e2m1", ("size < 2", "size < 3"), ("size < 4", "size < 6")),
            hint=2,
            bug="Thresholds between the wrong neighbors: 2.5 comes out, which has no code.",
        ),
        Mutant(
            name="no saturation",
            source=_with("08.to_e2m1", (".clamp(max=6)", "")),
            hint=2,
            bug="A cast without satfinite: 7.1 becomes 8, which has no code.",
        ),
        Mutant(
            name="the largest value is 4",
            source=_with("08.to_e2m1", ("clamp(max=6)", "clamp(max=4)")),
            hint=2,
            bug="The bound of the four-over-six variant in the plain format.",
        ),
        Mutant(
            name="the sign as a factor",
            source=_with(
                "08.to_e2m1",
                (
                    "torch.copysign(step * torch.round(size / step), x)",
                    "torch.sign(x) * step * torch.round(size / step)",
                ),
            ),
            hint=1,
            bug="Transformer Engine's Python reference gives -0.0 the code of +0.0; its kernels do "
            "not.",
        ),
        Mutant(
            name="no sign",
            source=_with(
                "08.to_e2m1",
                (
                    "torch.copysign(step * torch.round(size / step), x)",
                    "step * torch.round(size / step)",
                ),
            ),
            hint=2,
            bug="The sign bit is masked off and never put back.",
        ),
    ],
    "08.stochastic": [
        Mutant(
            name="rounding to nearest",
            source=_with("08.stochastic", ("x / step + uniform", "x / step + 0.5")),
            hint=2,
            bug="A flag that is set and not read: small gradients are lost in the same direction "
            "every time.",
        ),
        Mutant(
            name="up by one half too much",
            source=_with("08.stochastic", ("x / step + uniform", "x / step + uniform + 0.5")),
            hint=1,
            bug="Noise is added to a rounding that is to nearest already: the mean is half a step "
            "too large.",
        ),
        Mutant(
            name="a coin for every number",
            source=_with("08.stochastic", ("x / step + uniform", "x / step + (uniform > 0.5)")),
            hint=1,
            bug="Both neighbors with the same probability, wherever x lies between them.",
        ),
        Mutant(
            name="the size is rounded",
            source=_with("08.stochastic", ("torch.floor(x / step", "torch.floor(size / step")),
            hint=2,
            bug="Away from zero in place of up: also without a bias, but with other bits than the "
            "package for every negative number.",
        ),
        Mutant(
            name="noise of one size",
            source=_with(
                "08.stochastic",
                ("torch.floor(x / step + uniform)", "torch.round(x / step + uniform / 2)"),
            ),
            hint=2,
            bug="Dithering with noise that is narrower than a step.",
        ),
        Mutant(
            name="no saturation",
            source=_with("08.stochastic", ("rounded.clamp(-6, 6)", "rounded")),
            hint=3,
            bug="The largest value of a block lies above 6 in about half of the blocks.",
        ),
        Mutant(
            name="a zero without sign",
            source=_with(
                "08.stochastic",
                ("torch.copysign(rounded.clamp(-6, 6), x)", "rounded.clamp(-6, 6) + 0.0"),
            ),
            hint=1,
            bug="-0.0 + 0.0 is 0.0: another code than that of rounding to nearest.",
        ),
    ],
    "08.quantize": [
        Mutant(
            name="the scale for encoding is returned",
            source=_with("08.quantize", ("tensor_scale = 1 / encode", "tensor_scale = encode")),
            hint=1,
            bug="Serving code divided by weight_scale_2 where it had to multiply: the file holds "
            "the other one of the two scales.",
        ),
        Mutant(
            name="the largest value, without sign",
            source=_with(
                "08.quantize",
                ("top = largest.amax()", "top = x.amax().clamp(min=0)"),
            ),
            hint=1,
            bug="x.max() in place of x.abs().max().",
        ),
        Mutant(
            name="the range of E4M3 alone",
            source=_with("08.quantize", ("(RANGE / top)", "(RANGE / 6 / top)")),
            hint=1,
            bug="amax / 448, the scale of an FP8 tensor.",
        ),
        Mutant(
            name="the largest value becomes 4",
            source=_with("08.quantize", ("encode * SIXTH", "encode / 4")),
            hint=2,
            bug="The scale of the other choice in four over six.",
        ),
        Mutant(
            name="block scales before they are rounded",
            source=_with(
                "08.quantize",
                (
                    "(largest * (encode * SIXTH)).to(torch.float8_e4m3fn)",
                    "largest * (encode * SIXTH)",
                ),
                (
                    "return values, block_scale,",
                    "return values, block_scale.to(torch.float8_e4m3fn),",
                ),
            ),
            hint=2,
            bug="Values are made with the exact scale and decoded with the rounded one.",
        ),
        Mutant(
            name="block scales as powers of two",
            source=_with(
                "08.quantize",
                (
                    "(largest * (encode * SIXTH)).to",
                    "torch.exp2(torch.log2(largest * (encode * SIXTH)).ceil()).to",
                ),
            ),
            hint=2,
            bug="The scales of MXFP4: nearly a factor of two of the range is lost.",
        ),
        Mutant(
            name="block scales that are not below 2^-6",
            source=_with(
                "08.quantize",
                (
                    "(largest * (encode * SIXTH)).to",
                    "(largest * (encode * SIXTH)).clamp(min=2**-6).to",
                ),
            ),
            hint=2,
            bug="torchao's nvfp4_quantize: a weak block keeps a scale that is too large for it.",
        ),
        Mutant(
            name="blocks of 32",
            source=_with(
                "08.quantize",
                (
                    "largest = blocks.abs().amax(-1)",
                    "largest = blocks.abs().amax(-1)\n"
                    "    if largest.shape[-1] % 2 == 0:\n"
                    "        pairs = largest.unflatten(-1, (-1, 2)).amax(-1)\n"
                    "        largest = pairs.repeat_interleave(2, -1)",
                ),
            ),
            hint=2,
            bug="The block size of MXFP4.",
        ),
        Mutant(
            name="NaN in blocks of zeros",
            source=_with(
                "08.quantize",
                (
                    "(1 / (block_scale.float() * tensor_scale)).clamp(max=FLT_MAX)",
                    "1 / (block_scale.float() * tensor_scale)",
                ),
            ),
            hint=2,
            bug="0 times 1 / 0: one expert that was never trained makes the whole model NaN.",
        ),
        Mutant(
            name="a tensor of zeros with an infinite scale",
            source=_with(
                "08.quantize",
                ("torch.where(top == 0, 1.0, (RANGE / top).clamp(max=FLT_MAX))", "RANGE / top"),
            ),
            hint=1,
            bug="amax = 0 is not asked for.",
        ),
        Mutant(
            name="square without effect",
            source=_with("08.quantize", ("if square:", "if False:")),
            hint=3,
            bug="A flag of the recipe that does not reach the kernel: W and W^T are different "
            "matrices.",
        ),
        Mutant(
            name="tiles of neighboring blocks",
            source=_with(
                "08.quantize",
                (
                    "largest.unflatten(0, (-1, 16)).amax(1).repeat_interleave(16, dim=0)",
                    "largest.amax(0, keepdim=True).expand_as(largest)",
                ),
            ),
            hint=3,
            bug="One scale for a whole column of tiles.",
        ),
        Mutant(
            name="random numbers are not used",
            source=_with(
                "08.quantize",
                (
                    "to_e2m1(scaled) if uniform is None else stochastic(scaled, uniform)",
                    "to_e2m1(scaled)",
                ),
            ),
            hint=3,
            bug="Stochastic rounding is turned on and the code rounds to nearest.",
        ),
        Mutant(
            name="the unscaled numbers are rounded",
            source=_with("08.quantize", ("stochastic(scaled, uniform)", "stochastic(x, uniform)")),
            hint=3,
            bug="The noise is added before scaling.",
        ),
    ],
    "08.dequantize": [
        Mutant(
            name="without the tensor scale",
            source=_with(
                "08.dequantize", ("block_scale.float() * tensor_scale", "block_scale.float()")
            ),
            hint=1,
            bug="weight_scale_2 was not loaded: weights a thousand times too large.",
        ),
        Mutant(
            name="divided by the tensor scale",
            source=_with("08.dequantize", ("() * tensor_scale", "() / tensor_scale")),
            hint=1,
            bug="The scale for encoding and the one for decoding are mixed up.",
        ),
        Mutant(
            name="every scale for its own column",
            source=_with(
                "08.dequantize",
                (
                    "(values.unflatten(-1, (-1, 16)) * factor.unsqueeze(-1)).flatten(-2)",
                    "values * factor.repeat([1] * (factor.ndim - 1) + [16])",
                ),
            ),
            hint=1,
            bug="repeat in place of repeat_interleave: scales meet the wrong blocks, and the shape "
            "fits.",
        ),
        Mutant(
            name="two products",
            source="""
def dequantize(values, block_scale, tensor_scale):
    scaled = values.unflatten(-1, (-1, 16)) * block_scale.float().unsqueeze(-1)
    return (scaled * tensor_scale).flatten(-2)
""",
            hint=3,
            bug="Another order of operations than the checkpoint's writer had.",
        ),
        Mutant(
            name="one scale for each row",
            source=_with(
                "08.dequantize", ("factor.unsqueeze(-1)", "factor[..., :1].unsqueeze(-1)")
            ),
            hint=1,
            bug="The first block's scale is used for the whole row.",
        ),
    ],
    "08.hadamard": [
        Mutant(
            name="signs after the transform",
            source=_with(
                "08.hadamard",
                (" * (signs / 4)", " / 4"),
                ("return groups.flatten(-2)", "return (groups * signs).flatten(-2)"),
            ),
            hint=1,
            bug="That is the inverse. Signs that come last leave the sizes as they were without "
            "signs.",
        ),
        Mutant(
            name="signs are not used",
            source=_with("08.hadamard", (" * (signs / 4)", " / 4")),
            hint=1,
            bug="The plain transform: numbers that are all alike end up in one place.",
        ),
        Mutant(
            name="not orthonormal",
            source=_with("08.hadamard", ("signs / 4", "signs")),
            hint=2,
            bug="The factor 1/4 is left out: dW is sixteen times too large.",
        ),
        Mutant(
            name="divided by sixteen",
            source=_with("08.hadamard", ("signs / 4", "signs / 16")),
            hint=2,
            bug="The factor of both operands together in each of them.",
        ),
        Mutant(
            name="three rounds",
            source=_with("08.hadamard", ("(1, 2, 4, 8)", "(1, 2, 4)")),
            hint=2,
            bug="A loop to log2(16) that ends one round early: two groups of eight.",
        ),
        Mutant(
            name="sums first, then differences",
            source=_with(
                "08.hadamard",
                (
                    "torch.stack([first + second, first - second], dim=-2).flatten(-3)",
                    "torch.cat([(first + second).flatten(-2), (first - second).flatten(-2)], -1)",
                ),
            ),
            hint=2,
            bug="The rows of H in another order. It cancels in a product, and not if one operand "
            "comes from another library.",
        ),
        Mutant(
            name="rounds in the other order",
            source=_with("08.hadamard", ("(1, 2, 4, 8)", "(8, 4, 2, 1)")),
            hint=3,
            bug="The same transform, with other last bits.",
        ),
        Mutant(
            name="detached",
            source=_with("08.hadamard", ("x.unflatten", "x.detach().unflatten")),
            hint=2,
            bug="Right numbers, and no gradient through the transform.",
        ),
    ],
    "08.quantized_linear": [
        Mutant(
            name="the weight in rows of 16",
            source=_with(
                "08.quantized_linear",
                (f"@ {_WEIGHT}.T", "@ dequantize(*quantize(self.weight)).T"),
            ),
            hint=1,
            bug="1-D scaling of the weights.",
        ),
        Mutant(
            name="the weight is not quantized",
            source=_with("08.quantized_linear", (f"@ {_WEIGHT}.T", "@ self.weight.T")),
            hint=1,
            bug="Only activations are in four bits: a smaller error than the format has.",
        ),
        Mutant(
            name="activations rounded stochastically",
            source=_with(
                "08.quantized_linear",
                (
                    "dequantize(*quantize(x)) @",
                    "dequantize(*quantize(x, uniform=torch.rand_like(x))) @",
                ),
            ),
            hint=1,
            bug="Stochastic rounding for all operands: in the paper's ablation the loss rises.",
        ),
        Mutant(
            name="dx through another weight",
            source=_with(
                "08.quantized_linear",
                (f"weight = {_WEIGHT}", "weight = dequantize(*quantize(self.weight.T)).T"),
            ),
            hint=2,
            bug="W is quantized again along its columns: dx is the gradient of another function.",
        ),
        Mutant(
            name="dy to nearest",
            source=_with(
                "08.quantized_linear",
                ("dequantize(*quantize(dy, uniform=uniform))", "dequantize(*quantize(dy))"),
            ),
            hint=2,
            bug="Rounding to nearest for gradients: small ones are lost every time.",
        ),
        Mutant(
            name="the Hadamard transform in dx",
            source=_with(
                "08.quantized_linear",
                (
                    "dequantize(*quantize(dy, uniform=uniform))",
                    "dequantize(*quantize(hadamard(dy, SIGNS), uniform=uniform))",
                ),
            ),
            hint=2,
            bug="The transform on one operand alone, where it does not cancel.",
        ),
        Mutant(
            name="the Hadamard transform on one operand",
            source=_with(
                "08.quantized_linear", ("quantize(hadamard(x.T, SIGNS))", "quantize(x.T)")
            ),
            hint=3,
            bug="The flag of one operand is not passed on.",
        ),
        Mutant(
            name="no Hadamard transform",
            source=_with(
                "08.quantized_linear",
                ("quantize(hadamard(x.T, SIGNS))", "quantize(x.T)"),
                ("quantize(hadamard(dy.T, SIGNS), uniform", "quantize(dy.T, uniform"),
            ),
            hint=3,
            bug="An outlier of one token takes the bits of fifteen others.",
        ),
        Mutant(
            name="blocks along the features",
            source=_with(
                "08.quantized_linear",
                (
                    "x = dequantize(*quantize(hadamard(x.T, SIGNS)))",
                    "x = dequantize(*quantize(hadamard(x, SIGNS))).T",
                ),
            ),
            hint=3,
            bug="The copy of x from the forward pass is used for dW, although dW sums over tokens.",
        ),
        Mutant(
            name="rounded twice",
            source=_with(
                "08.quantized_linear",
                (
                    "quantize(hadamard(x.T, SIGNS))",
                    "quantize(hadamard(dequantize(*quantize(x)).T, SIGNS))",
                ),
            ),
            hint=3,
            bug="The second copy is made from the first: two roundings in place of one.",
        ),
        Mutant(
            name="dy of dW to nearest",
            source=_with(
                "08.quantized_linear",
                (
                    "quantize(hadamard(dy.T, SIGNS), uniform=uniform)",
                    "quantize(hadamard(dy.T, SIGNS))",
                ),
            ),
            hint=3,
            bug="Stochastic rounding in dx only.",
        ),
        Mutant(
            name="other random numbers",
            source=_with(
                "08.quantized_linear",
                (
                    "dequantize(*quantize(dy, uniform=uniform))",
                    "dequantize(*quantize(dy, uniform=torch.rand_like(dy)))",
                ),
            ),
            hint=2,
            bug="A global generator in place of the numbers that are given: a resumed run is "
            "another one.",
        ),
    ],
    "08.weighs": [
        Mutant(
            name="bits without scales",
            source=_with("08.weighs", ("9 * blocks", "8 * blocks")),
            hint=3,
            bug="Four bits a number: a ninth of the file is missing.",
        ),
        Mutant(
            name="blocks of 32",
            source=_with("08.weighs", ("shape[-1] / 16", "shape[-1] / 32"), ("9 *", "17 *")),
            hint=3,
            bug="The block size of MXFP4, 4.25 bits a number.",
        ),
        Mutant(
            name="no padding",
            source=_with("08.weighs", ("math.ceil(shape[-1] / 16)", "(shape[-1] // 16)")),
            hint=3,
            bug="The last, shorter block of each row is forgotten.",
        ),
        Mutant(
            name="padding of the whole tensor",
            source=_with(
                "08.weighs",
                ("rows * math.ceil(shape[-1] / 16)", "math.ceil(numbers / 16)"),
            ),
            hint=3,
            bug="A block that reaches over the end of a row.",
        ),
        Mutant(
            name="one scale for a stack",
            source=_with("08.weighs", ("math.prod(shape[:-2])", "1")),
            hint=2,
            bug="All experts share the scale of the largest one.",
        ),
        Mutant(
            name="the last tensor of a kind",
            source=_with("08.weighs", ("found.get(kind, 0) + ", "")),
            hint=1,
            bug="A dict by kind in which each layer overwrites the one before.",
        ),
        Mutant(
            name="everything else in float32",
            source=_with("08.weighs", ('formats.get(kind, "bf16")', 'formats.get(kind, "fp32")')),
            hint=1,
            bug="The dtype of torch in place of the checkpoint's.",
        ),
    ],
}
