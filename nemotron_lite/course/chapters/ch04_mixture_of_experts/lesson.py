"""What chapter 04 runs beside the learner's code: a look into a router, and short trainings.

    look           what one router of a model decides about every token of a text
    zero_share     how many hidden numbers of the experts are 0 behind the squared ReLU
    text, exam     the text of the trainings, and files that no model has read
    mixture, dense   small models of equal FLOPs per token, with experts and without
    teach          a short training with a live map of the load
    OwnBalance     a callback that balances by the learner's `update_bias`
    max_vio_of_sequences   how uneven the load inside one sequence is
    starved        experts with hardly any load at the end of a training
    compared       the held-out scores of several models as a table
    drift          what becomes of two devices that do not add up their counts
    distinct       the share of the experts that several tokens read together
    at_full_scale  Super's experts in words

The small models have one mixture of 16 experts, at the full width of the model; the dense model has
one MLP as wide as what a token uses of it. In `teach` all balancing is off unless it is asked for,
because the chapter shows first what happens without.

Left out: LatentMoE, which is the next chapter, and training on several devices. `drift` is a
calculation on the counts of one router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nemotron_lite import ledger
from nemotron_lite.config import NemotronConfig
from nemotron_lite.course import output
from nemotron_lite.course.display import progress_hook
from nemotron_lite.course.factsheet import tell
from nemotron_lite.course.plotting.balance import LiveBalance
from nemotron_lite.data import HeldOut, TextData, prepare
from nemotron_lite.layers.moe import MoE
from nemotron_lite.model import Nemotron
from nemotron_lite.outputs import Hidden
from nemotron_lite.train import Callback, TrainConfig, evaluate, train
from nemotron_lite.train.balance_history import BalanceHistory

CONFIG = NemotronConfig(
    "ME*E", vocab_size=1024, hidden_size=64, initializer_range=0.1,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=16, n_groups=1, chunk_size=64,
    n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=64, intermediate_size=192, routed_scaling_factor=2.5,
    bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
WATCHED = 3  # the layer whose router is drawn
ROUTER = f"backbone.layers.{WATCHED}.mixer"
STEPS = 200
RATE = 0.02  # of the bias; Super's is a twentieth of it, and its run is far longer
LOSS_WEIGHT = 0.05  # of the balance loss, for the same reason
RECIPE = TrainConfig(
    steps=STEPS, batch_size=8, seq_len=64, lr=8e-3, min_lr=8e-5, balance_weight=0.0, bias_rate=0.0
)
LAST = 20  # updates at the end over which the load is added up
STARVED = 0.1  # of the mean load
EXAM_BYTES = 40_000  # all held-out files would take longer than a training

UpdateBias = Callable[[Tensor, Tensor, float], Tensor]
BalanceLoss = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Looked:
    """What one router decided about each token of a text.

    Attributes:
        names: the tokens as text.
        scores: sigmoid scores.
        bias: the selection bias.
        chosen: True where an expert was chosen.
        weights: 0 where it was not.
    """

    names: list[str]
    scores: Float[Tensor, "t e"]
    bias: Float[Tensor, "e"]
    chosen: Bool[Tensor, "t e"]
    weights: Float[Tensor, "t e"]


@torch.no_grad()
def look(model: Nemotron, text: str, layer: int) -> Looked:
    """Run a text through the layers before `layer`, and ask its router.

    Raises:
        ValueError: that layer has no experts, or the model has no tokenizer.
    """
    if model.config.pattern[layer] != "E" or model.tokenizer is None:
        raise ValueError(
            f"layer {layer} of {model.config.pattern}: expected a layer E and a model with a "
            "tokenizer."
        )
    ids = model.tokenizer.encode(text).ids
    blocks: Any = model.backbone.layers
    x = model.backbone.embed(torch.tensor([ids]))
    for block in blocks[:layer]:
        x = block(x)
    gate = blocks[layer].mixer.gate
    routing = gate(blocks[layer].norm(x)[0])
    weights = torch.zeros_like(routing.scores).scatter(1, routing.indices, routing.weights)
    names = [repr(model.tokenizer.decode([i]))[1:-1].replace(" ", "␣") for i in ids]
    bias = gate.e_score_correction_bias.clone()
    return Looked(names, routing.scores, bias, weights > 0, weights)


@torch.no_grad()
def zero_share(model: Nemotron, text: str) -> dict[str, float]:
    """The share of zeros among the hidden numbers of the chosen experts, for each `E` layer.

    Only the experts that a token chose are counted; the shared expert is not.
    """
    shares: dict[str, float] = {}
    handles = []

    def count(mixer: Any, name: str) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Any, ...], result: Any) -> None:
            rows = arguments[0].reshape(-1, model.config.hidden_size)
            routing = mixer.gate(rows)
            z = mixer.fc1_latent_proj(rows) if mixer.latent else rows
            up = mixer.experts.up_proj[routing.indices].to(z.dtype)
            hidden = torch.einsum("tkfl,tl->tkf", up, z)
            shares[name] = float((hidden <= 0).double().mean())

        return hook

    blocks: Any = model.backbone.layers
    for number, block in enumerate(blocks):
        if isinstance(block.mixer, MoE):
            handles.append(block.mixer.register_forward_hook(count(block.mixer, f"layer {number}")))
    try:
        model(torch.tensor([model.tokenizer.encode(text).ids]))
    finally:
        for handle in handles:
            handle.remove()
    return shares


@cache
def text() -> TextData:
    """Python source of the standard library, with a vocabulary of 1,024 tokens."""
    return prepare(vocab_size=CONFIG.vocab_size)


@cache
def exam() -> HeldOut:
    """The first held-out files, `EXAM_BYTES` or a little more."""
    data, documents, size = text(), [], 0
    for document in data.held_out.documents:
        documents.append(document)
        size += len(data.tokenizer.decode(document.tolist()).encode())
        if size >= EXAM_BYTES:
            break
    return HeldOut(tuple(documents), size)


def mixture(seed: int = 0) -> Nemotron:
    """An untrained model with two mixtures."""
    return Nemotron(CONFIG, seed=seed)


def dense(seed: int = 0) -> Nemotron:
    """The same with an MLP in place of each mixture, as wide as what one token uses of it."""
    return Nemotron(CONFIG.replace(pattern=CONFIG.pattern.replace("E", "-")), seed=seed)


@dataclass(frozen=True)
class Taught:
    """A training: its losses, and the history of its routers if it has any."""

    losses: list[float]
    history: BalanceHistory | None

    @property
    def max_vio(self) -> Float[np.ndarray, "s"]:
        """MaxVio of the watched router after each update."""
        assert self.history is not None, "a dense model has no router"
        return self.history.max_vio[ROUTER]


def teach(
    model: Nemotron,
    title: str,
    *,
    update: UpdateBias | None = None,
    loss: BalanceLoss | None = None,
    steps: int | None = None,
) -> Taught:
    """Train a model on `text()`; a mixture with a live map of its load.

    Args:
        model: it is trained in place.
        title: of the map, or the label of the bar of a dense model.
        update: the function that moves the selection bias after each update; None moves nothing.
        loss: a balance loss like the answer to 04.balance_loss; it is added to the loss of the
            text, times `LOSS_WEIGHT`. None adds nothing.
        steps: updates, `STEPS` unless you say more.
    """
    count = steps or STEPS
    recipe = replace(RECIPE, steps=count)
    callbacks: list[Callback] = []
    hook = None
    if "E" in model.config.pattern:
        callbacks.append(LiveBalance(model.config, WATCHED, count, title=title))
    else:
        hook = progress_hook(title, count)
    if update is not None:
        callbacks.append(OwnBalance(model, update, RATE))
    with nullcontext() if loss is None else _with_loss(model, loss):
        result = train(model, text(), recipe, progress=False, on_step=hook, callbacks=callbacks)
    losses = [float(record["ce"]) for record in result.history]
    routers = any(record["routers"] for record in result.history)
    return Taught(losses, BalanceHistory.from_records(result.history) if routers else None)


@contextmanager
def _with_loss(model: Nemotron, loss: BalanceLoss) -> Iterator[None]:
    """Train with a balance loss of every router, beside the losses that `train` knows."""

    def add(module: Any, arguments: tuple[Any, ...], found: Hidden) -> Hidden:
        top_k = model.config.num_experts_per_tok
        terms = [loss(router.scores, top_k) for router in found.router]
        hidden: Tensor = _AddedLoss.apply(found.hidden, LOSS_WEIGHT * torch.stack(terms).sum())
        return replace(found, hidden=hidden)

    handle = model.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


class _AddedLoss(torch.autograd.Function):
    """Gives back the hidden states; in the backward pass the loss is added to the other losses."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        return grad, grad.new_ones(())


@torch.no_grad()
def max_vio_of_sequences(model: Nemotron, sequences: int = 64) -> float:
    """MaxVio of the watched router inside one sequence, averaged over some of the training text."""
    batch = text().batch(0, batch_size=sequences, seq_len=RECIPE.seq_len, seed=1)
    found = model(batch.tokens, seq_idx=batch.seq_idx, router_stats=True)
    (indices,) = (router.indices for router in found.router if router.name == ROUTER)
    load = torch.nn.functional.one_hot(indices, model.config.n_routed_experts).sum((1, 2)).double()
    return float((load.amax(1) / load.mean(1) - 1).mean())


class OwnBalance(Callback):
    """Moves the selection bias of every router after each update, by the learner's function.

    Args:
        model: the one that is trained.
        update: like the answer to 04.update_bias.
        rate: the step.
    """

    def __init__(self, model: Nemotron, update: UpdateBias, rate: float | int) -> None:
        self._model, self._update, self._rate = model, update, float(rate)

    @torch.no_grad()
    def on_step(self, record: dict[str, Any]) -> None:
        """Take the loads of the update from its log record; there is one device."""
        for name, router in record["routers"].items():
            gate = self._model.get_submodule(f"{name}.gate")
            bias = gate.get_buffer("e_score_correction_bias")
            bias.copy_(self._update(bias, torch.tensor([router["load"]]), self._rate))


def starved(taught: Taught) -> int:
    """Experts of the watched router with less than a tenth of the mean load at the end."""
    assert taught.history is not None, "a dense model has no router"
    load = taught.history.load[ROUTER][-LAST:].sum(0)
    return int((load < STARVED * load.mean()).sum())


def flops_per_token(model: Nemotron) -> float:
    """FLOPs of a forward pass for a token, from the ledger."""
    config = model.config
    return float(ledger.flops(config, RECIPE.seq_len).per_token)


def bits(model: Nemotron) -> float:
    """Bits per byte of `exam()`; lower is better."""
    return float(evaluate(model, exam(), window=2 * RECIPE.seq_len).bits_per_byte)


def compared(scores: Mapping[str, float], unit: str) -> None:
    """Show one number for each model; only the HTML has the numbers."""
    rows = [[output.inline_html(name), f"{score:.3f}"] for name, score in scores.items()]
    table = output.html_table(["model", unit], rows, title="Measured here")
    output.show_output(f"{unit}: {', '.join(scores)}", table)


@torch.no_grad()
def drift(
    update: UpdateBias, chances: Float[Tensor, "devices e"], steps: int, generator: torch.Generator
) -> Float[Tensor, "devices e"]:
    """Biases of devices that each balance their own counts, after some updates.

    Args:
        update: like the answer to 04.update_bias.
        chances: how often a token of each device would choose each expert without a bias.
        steps: updates.
        generator: of the tokens.

    Returns:
        The biases. Equal rows would be one model; they are not.
    """
    biases = torch.zeros_like(chances)
    for _ in range(steps):
        for device, chance in enumerate(chances):
            shifted = (chance.log() + biases[device]).softmax(-1)
            drawn = torch.multinomial(shifted, 256, replacement=True, generator=generator)
            load = torch.bincount(drawn, minlength=len(chance))
            biases[device] = update(biases[device], load[None], RATE)
    return biases


def distinct(
    experts: int, top_k: int, tokens: int, generator: torch.Generator, trials: int = 64
) -> float:
    """The share of the experts that some tokens read together, if every choice is random."""
    order = torch.rand(trials, tokens, experts, generator=generator)
    chosen = order.topk(top_k, dim=-1).indices.flatten(1)
    read = torch.zeros(trials, experts).scatter_(1, chosen, 1.0)
    return float(read.mean())


def expert_weights(config: NemotronConfig) -> int:
    """Weights of all chosen experts of one token, in all layers."""
    k, f, width = config.num_experts_per_tok, config.moe_intermediate_size, config.expert_size
    return config.pattern.count("E") * k * 2 * f * width


def at_full_scale() -> None:
    """Super's experts in words, with numbers from facts.toml."""
    tell("""
Super has {super.moe_layers} layers of {super.experts} experts, of which a token reads
{super.experts_per_token}, {super.expert_density:unit}; Nano chooses {nano.experts_per_token} of
{nano.experts}. Of {super.total_parameters:unit} parameters {super.active_parameters} billion take
part in a token. The experts that one token chose have
{super.chosen_expert_weights:unit} in each layer. In all {super.moe_layers} layers that is
{super.chosen_expert_weights_all:unit}, {super.expert_gb_per_token_bf16:unit} in BF16 and
{super.expert_gb_per_token_nvfp4:unit} in NVFP4.

In training Super's bias moves by {super.bias_rate} after each update, and the balance loss has the
coefficient {super.balance_weight}. MaxVio is about {super.max_vio_training} in training and
{super.max_vio_validation} in validation ({nano.max_vio_training} and {nano.max_vio_validation} for
Nano). So the busiest expert has a few times the mean load. In Ultra's routers the median is
{ultra.max_vio_median}; the largest is about {ultra.max_vio_max}. NVIDIA's MaxVio may be without our
minus 1.""")
