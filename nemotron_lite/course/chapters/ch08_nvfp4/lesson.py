"""What chapter 08 runs beside the learner's code: real tensors, small trainings, a long decode.

    watch            what the linear layers of a model read, and the gradients of their outputs
    in_steps         a gradient in units of its block scales, so that E2M1 can round it
    summed_errors    how far a sum of rounded gradients is from the exact sum
    zero_share       how many numbers that are not 0 are read as 0
    weight_errors    how far dW is from the exact one, with each part of the recipe and without
    with_own_linear  a model whose NVFP4 matrices are computed by the learner's layer
    teach            a short training
    tensors          kind and shape of all weights of a model, without making the model
    giga, stored     bytes for a reader; bytes of one kind in the shipped file
    long_decode      one number of a state, written 4,000 times in float32 and float16
    at_full_scale    Super's precision in words

The small model computes in float32 what the recipe keeps in BF16, so that a gap has one cause. The
recipe's last layers in BF16 are left out too: one of its four layers would be a quarter.

Left out: mixtures of experts in NVFP4 (the package has them), and products in FP4 hardware: all
numbers here are rounded to NVFP4 and multiplied in float32.
"""

from __future__ import annotations

import inspect
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
from nemotron_lite.course.display import progress_hook
from nemotron_lite.course.factsheet import facts_table, tell
from nemotron_lite.data import TextData, prepare
from nemotron_lite.model import Nemotron
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

Rounding = Callable[[Tensor], Tensor]
Read = Callable[[Tensor, Tensor | None], Tensor]


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
            inputs[name], outputs[name] = arguments[0].detach()[0], output

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
    return {name: Watched(inputs[name], dy[0]) for name, dy in zip(outputs, gradients, strict=True)}


def in_steps(gradient: Float[Tensor, "t f"]) -> Float[Tensor, "t f"]:
    """A gradient, divided block by block so that its largest numbers stay below 6 if they vary."""
    blocks = gradient.unflatten(-1, (-1, 16))
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return (blocks * (6 / (1 + VARIED) / largest)).flatten(-2)


@torch.no_grad()
def summed_errors(
    round_: Rounding, gradient: Float[Tensor, "t f"], generator: torch.Generator
) -> dict[int, float]:
    """How far sums of rounded gradients are from the exact sums, relative to these.

    Args:
        round_: rounds to E2M1.
        gradient: as of `in_steps`. Each gradient of the sum is this one, and every number of it
            varies by up to `VARIED` of its size.
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
        rounded += round_(one)
        if count & (count - 1) == 0:
            found[count] = _off(rounded, exact)
    return found


def zero_share(x: Tensor, read: Tensor) -> float:
    """The share of the numbers of x other than 0 that are read as 0."""
    return float((read == 0)[x != 0].double().mean())


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
    """Kind and shape of each tensor of weights: its role in a recipe, or "other"."""
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
        for name, value in zip(found, (exact, nearest, random.mean()), strict=True):
            found[name].append(float(value))
    return found


def at_full_scale() -> None:
    """Super's precision in words and a table, with numbers from facts.toml."""
    tell("""
**Trained in four bits.** The recipe was tested on a hybrid of 12 billion parameters and
{nvfp4.tokens:unit}. Its loss was less than {nvfp4.gap_stable:unit} above that of FP8 in the stable
phase, and about {nvfp4.gap_end:unit} at the end; MMLU-Pro was {nvfp4.mmlu_pro:unit} against
{fp8.mmlu_pro:unit}. In Super, Mamba's out_proj is in MXFP8, because NVFP4 flushed up to
{super.mxfp8_out_proj_flushed:unit} of it to zero. At the end of pre-training the weight gradients
of {super.zero_gradients:unit} were exactly zero.

**Quantized after training.** A search chose NVFP4, FP8 or BF16 for each matrix of the released
checkpoint, within {super.quantized_bits:unit} a weight. It keeps {super.quantized_accuracy:unit} of
the accuracy, as a median over benchmarks.

**SSM states.** With states in float16, rounded to nearest, a benchmark got
{super.state_fp16_verbosity:unit}. With stochastic rounding the change was
{super.state_fp16_sr_verbosity} %.""")
    facts_table("super.bf16_mmlu_pro", "super.fp8_mmlu_pro", "super.nvfp4_mmlu_pro")
