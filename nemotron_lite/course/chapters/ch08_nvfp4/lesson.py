"""What chapter 08 runs beside the learner's code: real tensors, small trainings, a long decode.

    continued        a line of code and how a model continues it
    by_package       values and scales of a tensor in NVFP4, from the package
    watch            what the linear layers of a model read, and the gradients of their outputs
    in_steps         numbers in units of their scales, so that E2M1 can round them, and the scales
    summed_errors    how far a sum of rounded gradients is from the exact sum
    zero_share       how many numbers that are not 0 are read as 0
    lost_blocks      how many blocks keep at most one number
    mamba_errors     of in_proj and out_proj: the error of the input, and such blocks of dyᵀ
    error_of_x       how far dW is from the exact one if only x is rounded
    weight_errors    how far dW is from the exact one, with each part of the recipe and without
    with_own_linear  a model whose NVFP4 matrices are computed by the learner's layer
    teach            a short training
    tensors          kind and shape of all weights of a model, without making the model
    giga, bits       gigabytes of a model, and bits a weight of all or of some kinds
    stored           bytes of one kind of matrices in the shipped file
    long_decode      one number of a state, written 4,000 times in float32 and float16
    block_errors     the error of blocks of several sizes, with two kinds of scales
    compared         numbers of this machine as a table
    at_full_scale, mxfp4   Super's precision, and another format, in words

The small model computes in float32 what the recipe keeps in BF16, so that a gap has one cause. The
recipe's last layers in BF16 are left out too: one of its four layers would be a quarter.

Left out: mixtures of experts in NVFP4 (the package has them), and products in FP4 hardware: all
numbers here are rounded to NVFP4 and multiplied in float32.
"""

from __future__ import annotations

import html
import inspect
import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron_lite import ops
from nemotron_lite.checkpoint import storage_summary
from nemotron_lite.config import NemotronConfig
from nemotron_lite.course import output
from nemotron_lite.course.display import progress_hook
from nemotron_lite.course.factsheet import facts_table, tell
from nemotron_lite.data import TextData, prepare
from nemotron_lite.generation.generate import generate
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization import nvfp4
from nemotron_lite.quantization.recipe import RECIPES, module_formats
from nemotron_lite.train import TrainConfig, train

CONFIG = NemotronConfig(
    "M-*-", vocab_size=1024, hidden_size=64, initializer_range=0.1,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    mamba_num_heads=16, mamba_head_dim=8, ssm_state_size=16, n_groups=1, chunk_size=64,
    intermediate_size=192, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
RECIPE = TrainConfig(steps=150, batch_size=8, seq_len=64, lr=8e-3, min_lr=8e-5)
LAST = 40  # updates whose losses are averaged: one batch differs more than the precisions do
TOKENS = 256  # that the shipped model reads, whole blocks of 16
MANY = 256  # gradients in a sum
VARIED = 0.1  # how far one gradient differs from the next, at most
FADE, WRITE, DECODED = 0.9995, 0.05, 4_000  # of `long_decode`

MATRICES = ("experts", "shared", "mamba.in_proj", "mamba.out_proj", "latent", "attention")

Rounding = Callable[[Tensor], Tensor]
Read = Callable[[Tensor, Tensor | None], Tensor]


def continued(model: Nemotron, line: str, tokens: int = 24) -> None:
    """Show a line of code and the tokens that a model adds to it; only the HTML has them."""
    added = generate(model, line, tokens, temperature=0, stop=())
    code = html.escape(line + str(added))
    output.show_output("The packed model continues a line of code.", f"<pre>{code}</pre>")


def by_package(x: Float[Tensor, "*rows n"]) -> tuple[Tensor, Tensor, Tensor]:
    """Values of E2M1, block scales and the tensor scale, as the answer to 08.quantize returns them.

    For what a chapter shows before that exercise.
    """
    found = nvfp4.quantize(x)
    values = nvfp4.decode_e2m1(nvfp4.unpack_codes(found.codes))
    return values, found.scales, found.scale


@dataclass(frozen=True)
class Watched:
    """What one linear layer has seen.

    Attributes:
        x: its input.
        dy: the gradient of the loss with respect to its output.
    """

    x: Float[Tensor, "t d"]
    dy: Float[Tensor, "t f"]


def watch(model: Nemotron, text: str | None = None) -> dict[str, Watched]:
    """Read a text, ask for the gradient of the loss, and keep what the mixers' linear layers saw.

    Args:
        model: with a tokenizer; its parameters and their gradients stay as they are.
        text: at least `TOKENS` tokens long; a module of Python's standard library by default.

    Returns:
        A layer's name, such as "layer 0 in_proj", and what it has seen.
    """
    assert model.tokenizer is not None, "the model has no tokenizer"
    ids = model.tokenizer.encode(text or inspect.getsource(textwrap)).ids[: TOKENS + 1]
    assert len(ids) == TOKENS + 1, f"the text has {len(ids)} tokens; expected {TOKENS + 1} or more"
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = arguments[0].detach().flatten(0, -2), output

        return hook

    for path, module in model.backbone.named_modules():
        parts = path.split(".")
        if isinstance(module, nn.Linear) and len(parts) == 4 and parts[2] == "mixer":
            handles.append(module.register_forward_hook(keep(f"layer {parts[1]} {parts[3]}")))
    try:
        tokens = torch.tensor([ids])
        logits = model(tokens[:, :-1]).logits[0]
        loss = nn.functional.cross_entropy(logits, tokens[0, 1:])
        gradients = torch.autograd.grad(loss, list(outputs.values()))
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: Watched(inputs[name], dy.flatten(0, -2))
        for name, dy in zip(outputs, gradients, strict=True)
    }


def in_steps(x: Float[Tensor, "t n"]) -> tuple[Float[Tensor, "t n"], Float[Tensor, "t n"]]:
    """Numbers divided by their scales in NVFP4, and the scale of each number.

    The scales are the package's: E4M3 rounds them, so the largest number of a block is about 6 and
    not exactly 6. In a block whose scale is 0, numbers stay as they are.
    """
    _, block_scale, tensor_scale = by_package(x)
    scale = (block_scale.float() * tensor_scale).repeat_interleave(16, -1)
    scale = torch.where(scale == 0, 1.0, scale)
    return x / scale, scale


@torch.no_grad()
def summed_errors(
    round_: Rounding, gradient: Float[Tensor, "t f"], generator: torch.Generator
) -> dict[int, float]:
    """How far sums of rounded gradients are from the exact sums, relative to these.

    Args:
        round_: rounds to E2M1.
        gradient: each gradient of the sum is this one, and every number of it varies by up to
            `VARIED` of its size. Each has its own scales, those of `in_steps`.
        generator: of what varies.

    Returns:
        The number of gradients, 1, 2, 4 up to `MANY`, and the error of their sum.
    """
    exact, rounded = torch.zeros_like(gradient), torch.zeros_like(gradient)
    found = {}
    for count in range(1, MANY + 1):
        varied = 1 + VARIED * (2 * torch.rand(gradient.shape, generator=generator) - 1)
        one = gradient * varied
        exact += one
        steps, scale = in_steps(one)
        rounded += round_(steps) * scale
        if count & (count - 1) == 0:
            found[count] = _off(rounded, exact)
    return found


def zero_share(x: Tensor, read: Tensor) -> float:
    """The share of the numbers of x other than 0 that are read as 0."""
    return float((read == 0)[x != 0].double().mean())


def lost_blocks(read: Float[Tensor, "t n"]) -> float:
    """The share of the blocks of 16 of which at most one number is read as other than 0."""
    zeros = (read == 0).unflatten(-1, (-1, 16)).sum(-1)
    return float((zeros >= 15).double().mean())


@torch.no_grad()
def mamba_errors(seen: dict[str, Watched], read: Read) -> dict[str, float]:
    """How well the tensors of the Mamba layers are read, in %, as means over the layers.

    Args:
        seen: what the layers saw, as `watch` returns it.
        read: as for `weight_errors`.

    Returns:
        The relative error of the input of in_proj and of out_proj; then, for each of the two, the
        `lost_blocks` of dyᵀ, whose blocks lie along the tokens, as dW needs them.
    """
    found = {}
    for kind in ("in_proj", "out_proj"):
        inputs = [one.x for name, one in seen.items() if name.endswith(f" {kind}")]
        errors = [_off(read(x, None), x) for x in inputs]
        found[f"{kind}: relative error of its input"] = 100 * sum(errors) / len(errors)
    for kind in ("in_proj", "out_proj"):
        outputs = [one.dy.T for name, one in seen.items() if name.endswith(f" {kind}")]
        shares = [lost_blocks(read(dy, None)) for dy in outputs]
        name = f"{kind}: blocks of dyᵀ with 15 or 16 zeros"
        found[name] = 100 * sum(shares) / len(shares)
    return found


@torch.no_grad()
def error_of_x(seen: Watched, read: Read) -> float:
    """The error of dW if x is read and dy is exact; the arguments are those of `weight_errors`."""
    exact = seen.dy.T @ seen.x
    return _off(seen.dy.T @ read(seen.x.T, None).T, exact)


@torch.no_grad()
def weight_errors(
    seen: Watched,
    read: Read,
    transform: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    draws: int = 16,
) -> dict[str, tuple[float, float]]:
    """The error of dW in four variants: of one dW, and of the mean of `draws` of them.

    Args:
        seen: what the layer saw; both widths may be cut.
        read: the numbers that a product reads of a tensor `… t`, along its last axis. Its second
            argument is uniform random numbers for stochastic rounding, or None.
        transform: the Hadamard transform along the last axis.
        generator: of stochastic rounding.
        draws: how many dW are averaged.
    """
    x, dy = seen.x.T, seen.dy.T
    exact = dy @ x.T
    found = {}
    for spread in (False, True):
        a, b = (transform(dy), transform(x)) if spread else (dy, x)
        columns = read(b, None).T
        for stochastic in (False, True):
            total, first = torch.zeros_like(exact), 0.0
            for draw in range(draws if stochastic else 1):
                uniform = torch.rand(a.shape, generator=generator) if stochastic else None
                total += read(a, uniform) @ columns
                first = _off(total, exact) if draw == 0 else first
            name = ("stochastic" if stochastic else "nearest") + ", Hadamard" * spread
            found[name] = (first, _off(total / (draws if stochastic else 1), exact))
    return found


@torch.no_grad()
def block_errors(
    round_: Rounding, x: Float[Tensor, "t n"], sizes: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
) -> dict[str, dict[int, float]]:
    """The error of x in blocks of several sizes, with scales in E4M3 and with powers of two.

    Powers of two are those of MXFP4: the exponent of the block's largest number, less 2.

    Args:
        round_: rounds to E2M1.
        x: numbers; a row is a multiple of every size.
        sizes: numbers in a block.

    Returns:
        The kind of scale, and for each size the error, relative to x.
    """
    found: dict[str, dict[int, float]] = {"E4M3": {}, "powers of two": {}}
    encode, decode = nvfp4.tensor_scales(x.abs().amax())
    for size in sizes:
        blocks = x.unflatten(-1, (-1, size))
        largest = blocks.abs().amax(-1, keepdim=True)
        scales = {
            "E4M3": nvfp4.block_scales(largest, encode).float() * decode,
            "powers of two": torch.exp2(torch.floor(torch.log2(largest)) - 2),
        }
        for kind, scale in scales.items():
            found[kind][size] = _off(round_(blocks / scale) * scale, blocks)
    return found


def _off(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@cache
def text() -> TextData:
    """Python source of the standard library, with a vocabulary of 1,024 tokens."""
    return prepare(vocab_size=CONFIG.vocab_size)


def small(seed: int = 0) -> Nemotron:
    """An untrained model of four layers without experts."""
    return Nemotron(CONFIG, seed=seed)


def quantized_paths(config: NemotronConfig) -> list[str]:
    """The linear layers that the recipe computes in NVFP4, if no layer is kept for its place."""
    recipe = RECIPES["nvfp4"].without("tail")
    found = module_formats(config, recipe)
    return [entry.path for entry in found if entry.format == "nvfp4" and entry.role != "experts"]


def with_own_linear(model: Nemotron, make: Callable[[int, int], nn.Module]) -> Nemotron:
    """Replace the linear layers of `quantized_paths` in place, and keep their weights.

    Args:
        model: a model without experts.
        make: the learner's class, called with the numbers of inputs and outputs.
    """
    for path in quantized_paths(model.config):
        old = model.get_submodule(path)
        assert isinstance(old, nn.Linear)
        new = make(old.in_features, old.out_features)
        new.load_state_dict({"weight": old.weight.detach()})
        model.set_submodule(path, new)
    return model


def teach(model: Nemotron, title: str, *, steps: int | None = None, seed: int = 0) -> list[float]:
    """Train a model on `text()`; returns the loss of every update in nats per token.

    Args:
        model: it is trained in place.
        title: the label of the bar.
        steps: updates, those of `RECIPE` unless you say more.
        seed: of the random numbers of the learner's layer.
    """
    count = steps or RECIPE.steps
    recipe = TrainConfig(
        steps=count, batch_size=RECIPE.batch_size, seq_len=RECIPE.seq_len, lr=RECIPE.lr,
        min_lr=RECIPE.min_lr,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        result = train(model, text(), recipe, progress=False, on_step=progress_hook(title, count))
    return [float(record["ce"]) for record in result.history]


def gap(found: list[float], exact: list[float]) -> float:
    """By how many percent the mean of the last `LAST` losses is higher."""
    last = [sum(losses[-LAST:]) / len(losses[-LAST:]) for losses in (found, exact)]
    return 100 * (last[0] / last[1] - 1)


def tensors(config: NemotronConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Kind and shape of each parameter: its role in a recipe, or "other".

    The selection biases of the routers are no parameters; they are a few kilobytes in float32.
    """
    with torch.device("meta"):
        model = Nemotron(config)
    roles = {entry.path: entry.role for entry in module_formats(config, "bf16")}
    return [
        (next(_roles_of(name, roles), "other"), tuple(parameter.shape))
        for name, parameter in model.named_parameters()
    ]


def _roles_of(name: str, roles: dict[str, str]) -> Iterator[str]:
    """The role of the module that holds a parameter, if it has one."""
    path = name
    while "." in path:
        path = path.rpartition(".")[0]
        if path in roles:
            yield roles[path]


def giga(sizes: dict[str, int]) -> str:
    """The sum of some sizes in gigabytes."""
    return f"{sum(sizes.values()) / 1e9:.1f} GB"


def bits(
    config: NemotronConfig, sizes: dict[str, int], kinds: tuple[str, ...] | None = None
) -> float:
    """Bits a weight.

    Args:
        config: of the model.
        sizes: kind → bytes.
        kinds: over which tensors, such as `MATRICES`, those that a format may be chosen for; None
            is all.
    """
    chosen = [one for one in tensors(config) if kinds is None or one[0] in kinds]
    numbers = sum(math.prod(shape) for _, shape in chosen)
    return 8 * sum(sizes[kind] for kind in {kind for kind, _ in chosen}) / numbers


def stored(kind: str, model: str = "lite") -> int:
    """Bytes of a kind of matrices in the files of a checkpoint."""
    return sum(row.num_bytes for row in storage_summary(model) if row.role == kind)


@torch.no_grad()
def long_decode(steps: int | None = None) -> dict[str, list[float]]:
    """A number of a state that fades by 1 in 2,000 and gets 0.05 added, at each token.

    Returns:
        Its value after each token: in float32, in float16 rounded to nearest, and in float16
        rounded stochastically (the mean of 64 such states).
    """
    exact, nearest, random = 0.0, torch.zeros(1), torch.zeros(64)
    found: dict[str, list[float]] = {"float32": [], "nearest": [], "stochastic": []}
    for token in range(steps or DECODED):
        exact = exact * FADE + WRITE
        nearest = (nearest * FADE + WRITE).half().float()
        random = ops.round_to_float16(random * FADE + WRITE, seed=token).float()
        values = (exact, float(nearest), float(random.mean()))
        for name, value in zip(found, values, strict=True):
            found[name].append(value)
    return found


def at_full_scale() -> None:
    """Super's precision in words and tables, with numbers from facts.toml."""
    tell("""
**Trained in NVFP4.** The recipe was tested on a hybrid of 12 billion parameters and
{nvfp4.tokens:unit}. In the stable phase its loss was less than {nvfp4.gap_stable:unit} above that
of FP8, at the end about {nvfp4.gap_end:unit}; with a forward pass in BF16 at the end,
{nvfp4.gap_bf16_forward:unit}. For Ultra the gap to BF16 was at most {ultra.nvfp4_gap:unit}.

**Without each part.** NVIDIA took one part at a time out of this hybrid, in which
{nvfp4.bf16_linears:unit} are in BF16, after {nvfp4.ablation_from:unit}. Without stochastic
rounding, without the Hadamard transform, without square tiles, and with fewer layers in BF16 the
loss was worse each time. The paper shows curves and prints no numbers; it says that small models in
short trainings may not need every part. In a model of {nvfp4.sensitivity_model:unit}, training
diverged with all linear layers in NVFP4 and no other part of the recipe; with the last four blocks
in BF16 it converged. With stochastic rounding of weights or activations it diverged, too.

**In Super**, Mamba's out_proj is in MXFP8, because in Nano NVFP4 flushed up to
{super.mxfp8_out_proj_flushed:unit} of its values to zero. At the end the weight gradients of
{super.zero_gradients:unit} were exactly zero; in a test at Nano's size NVFP4 had about
{nano.nvfp4_zero_gradients:unit} of them as BF16.

**Quantized after training.** For the released checkpoint, a search chose NVFP4, FP8 or BF16 for
each operator, within {super.quantized_bits:unit} a weight, with {super.calibration_samples:unit} to
calibrate. It keeps {super.quantized_accuracy:unit} of the accuracy, as a median over benchmarks.

**SSM states.** In float16, rounded to nearest, LiveCodeBench got
{super.state_fp16_verbosity:unit}. With stochastic rounding the length changed by
{super.state_fp16_sr_verbosity} %.""")
    benchmarks, formats = ("mmlu_pro", "scicode", "hmmt"), ("bf16", "fp8", "nvfp4")
    facts_table(*(f"super.{format}_{name}" for name in benchmarks for format in formats))


def mxfp4() -> None:
    """What MXFP4 costs beside NVFP4, as published."""
    tell("""
In a test with 8 billion parameters the loss gap was {nvfp4.gap_8b:unit} in NVFP4 and
{mxfp4.gap_8b:unit} in MXFP4, which needed {mxfp4.more_tokens:unit} to reach the same loss.""")


def compared(numbers: dict[str, float], unit: str) -> None:
    """Show one number for each name; only the HTML has the numbers."""
    rows = [[output.inline_html(name), f"{number:.3g}"] for name, number in numbers.items()]
    table = output.html_table(["", unit], rows, title="Measured here")
    output.show_output(f"{unit}: {', '.join(numbers)}", table)
