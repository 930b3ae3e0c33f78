"""What chapter 05 runs beside the learner's code: costs of a token, short trainings, subspaces.

    weights_of_a_token   what one token reads of a layer, part by part
    crossing             from how many tokens on the exchange takes longer than reading weights
    plain, latent        small models of equal cost: the mixture of chapter 04, and a latent one
    teach, bits          a short training, and the score on text that no model has read
    features             what the experts of each layer read and write
    kept_by              the share of the energy that a projection keeps
    bugs                 what five mistakes change in a layer
    compressed           a latent model out of the weights of a plain one
    recorded             the verdicts of `benchmarks/records/quality_per_flop.json`

The trainings compare models that cost the same for a token, on the same text in the same order. A
training has a seed for its weights and its batches. Two seeds of one model differ too, and a
difference between two models means nothing as long as it is not clearly larger than that.

A projection to l numbers keeps a subspace. `compressed` takes two of them for each layer: one for
what its experts read, one for what they write. Both are computed from tokens of the training text.

Left out: training after the compression, which would repair a part of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron_lite import ledger, ops
from nemotron_lite.config import NemotronConfig
from nemotron_lite.course import output
from nemotron_lite.course.chapters.ch04_mixture_of_experts.lesson import (
    CONFIG,
    bits,
    compared,
    exam,
    text,
)
from nemotron_lite.course.display import progress_hook
from nemotron_lite.course.factsheet import tell
from nemotron_lite.course.records import record
from nemotron_lite.model import Nemotron
from nemotron_lite.train import TrainConfig, train

__all__ = ["CONFIG", "bits", "compared", "exam", "text"]  # the small model is chapter 04's

ALPHA = 4
STEPS = 120
RECIPE = TrainConfig(
    steps=STEPS, batch_size=8, seq_len=64, lr=8e-3, min_lr=8e-5, balance_weight=0.0, bias_rate=0.02
)
BYTES = 2  # BF16, of weights and of what devices exchange
RECORD = "quality_per_flop"
LATENT = ("latent", "latent_eff", "latent_eff_longer")  # models of the record
CROSSING_ENDS = 1 << 20  # tokens after which `crossing` gives up

Costs = Sequence[float | int]
StepCosts = Callable[..., Costs]
EqualCost = Callable[[int, int, int, int, int], Sequence[int]]
Principal = Callable[[Tensor, int], tuple[Tensor, Any]]
Compress = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of one layer, in the order in which `step_costs` takes them."""

    d: int
    latent: int | None
    experts: int
    top_k: int
    f: int

    @classmethod
    def of(cls, config: NemotronConfig) -> Sizes:
        """The sizes of the `E` layers of a config."""
        return cls(
            config.hidden_size, config.moe_latent_size, config.n_routed_experts,
            config.num_experts_per_tok, config.moe_intermediate_size,
        )  # fmt: skip

    def costs(self, step_costs: StepCosts, tokens: int) -> Costs:
        """FLOPs, bytes of weights and bytes exchanged, in BF16, by the learner's function."""
        return step_costs(
            tokens, self.d, self.latent, self.experts, self.top_k, self.f, BYTES, BYTES
        )


@dataclass(frozen=True)
class Device:
    """What a device can do in a second; the numbers are assumed, not those of a product."""

    memory: float = 3000.0  # GB read
    link: float = 100.0  # GB exchanged with other devices
    flops: float = 1000.0  # times 10^12, in BF16

    def microseconds(self, costs: Costs) -> tuple[float, float, float]:
        """Time for the FLOPs, for reading the weights and for the exchange, each by itself."""
        flops, read, exchanged = costs
        return 1e-6 * flops / self.flops, 1e-3 * read / self.memory, 1e-3 * exchanged / self.link


PARTS = ("router", "latent projections", "experts")


def weights_of_a_token(config: NemotronConfig) -> dict[str, int]:
    """Weights that one token reads in one layer, by part; the shared expert is left out."""
    rows = {row.name: row for row in ledger.parameters(config).rows if row.part == "moe"}
    return {part: int(rows[part].active_each) if part in rows else 0 for part in PARTS}


def crossing(step_costs: StepCosts, sizes: Sizes, device: Device) -> int:
    """The first number of tokens at which the exchange takes longer than reading the weights.

    Raises:
        ValueError: there is none up to `CROSSING_ENDS`.
    """
    low, high = 1, 1
    while True:
        _, read, exchanged = device.microseconds(sizes.costs(step_costs, high))
        if exchanged > read:
            break
        low, high = high, 2 * high
        if high > CROSSING_ENDS:
            raise ValueError(f"the exchange takes less time up to {CROSSING_ENDS:,} tokens.")
    while high - low > 1:
        middle = (low + high) // 2
        _, read, exchanged = device.microseconds(sizes.costs(step_costs, middle))
        low, high = (low, middle) if exchanged > read else (middle, high)
    return high


def digits(experts: int, top_k: int) -> int:
    """Decimal digits of the number of ways to choose `top_k` of `experts`."""
    return len(str(math.comb(experts, top_k)))


def resized(config: NemotronConfig, equal_cost: EqualCost, alpha: int = ALPHA) -> NemotronConfig:
    """A config with a latent space, whose token costs no more: sizes by the learner's function."""
    sizes = Sizes.of(config)
    width, experts, top_k = equal_cost(sizes.d, sizes.experts, sizes.top_k, sizes.f, alpha)
    return config.replace(
        moe_latent_size=width, n_routed_experts=experts, num_experts_per_tok=top_k
    )


def plain(seed: int = 0) -> Nemotron:
    """An untrained model with two mixtures at full width."""
    return Nemotron(CONFIG, seed=seed)


def latent(equal_cost: EqualCost, seed: int = 0) -> Nemotron:
    """The same with latent mixtures of equal cost."""
    return Nemotron(resized(CONFIG, equal_cost), seed=seed)


def teach(model: Nemotron, title: str, seed: int = 0, *, steps: int | None = None) -> Nemotron:
    """Train a model on `text()`, balanced by the selection bias; returns the same model.

    Args:
        model: it is trained in place.
        title: of the bar.
        seed: of the batches.
        steps: updates, `STEPS` unless you say more.
    """
    count = steps or STEPS
    recipe = replace(RECIPE, steps=count, seed=seed)
    bar = progress_hook(title, count)
    # The bar shows a loss if it gets one, and that would answer the question who learns most.
    train(model, text(), recipe, progress=False, on_step=lambda record: bar({}))
    return model


@dataclass(frozen=True)
class Features:
    """What the routed experts of one layer read and write, a row for each token."""

    inputs: Float[Tensor, "t d"]
    outputs: Float[Tensor, "t d"]


def held_out_tokens(model: Nemotron, most: int = 1536) -> Int[Tensor, "1 t"]:
    """Tokens of the first held-out files, in the model's vocabulary."""
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer: expected one that was loaded.")
    words = "".join(text().tokenizer.decode(part.tolist()) for part in exam().documents[:4])
    return torch.tensor([model.tokenizer.encode(words).ids[:most]])


def training_tokens(rows: int = 32) -> Int[Tensor, "b t"]:
    """Rows of the text of the trainings."""
    return text().batch(0, batch_size=rows, seq_len=RECIPE.seq_len, seed=2).tokens


@torch.no_grad()
def features(model: Nemotron, tokens: Int[Tensor, "b t"]) -> dict[int, Features]:
    """What the experts of each `E` layer read and write while the model reads some tokens."""
    found: dict[int, Features] = {}
    handles = []
    blocks: Any = model.backbone.layers
    for number, block in enumerate(blocks):
        if block.kind != "E":
            continue

        def keep(module: Any, arguments: Any, result: Tensor, number: int = number) -> None:
            rows, layer = arguments[0].flatten(0, -2), _layer(module)
            shared = layer.shared_experts
            everyone = shared.down_proj(F.relu(shared.up_proj(rows)) ** 2)
            found[number] = Features(rows, result.flatten(0, -2) - everyone)

        handles.append(block.mixer.register_forward_hook(keep))
    try:
        model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _layer(mixer: Any) -> Any:
    """The learner's layer inside of a mixer, or the package's."""
    return getattr(mixer, "own", mixer)


@torch.no_grad()
def kept_by(projection: Float[Tensor, "l d"], rows: Float[Tensor, "t d"]) -> float:
    """The share of the energy of some rows in the directions that a projection reads."""
    basis = torch.linalg.qr(projection.detach().T)[0]
    return float((rows @ basis).square().sum() / rows.square().sum())


@torch.no_grad()
def energies(
    model: Nemotron, found: Mapping[int, Features], widths: Sequence[int], principal: Principal
) -> tuple[list[float], float]:
    """Shares of the energy that are kept, in %, averaged over the layers.

    Returns:
        (best, learned): one share for each width, of the best directions by the learner's
        function; and that of the directions that the trained projections read.
    """
    blocks: Any = model.backbone.layers
    best = [
        [float(principal(layer.inputs, width)[1]) for width in widths] for layer in found.values()
    ]
    learned = [
        kept_by(_layer(blocks[number].mixer).fc1_latent_proj.weight, layer.inputs)
        for number, layer in found.items()
    ]
    means = torch.tensor(best).mean(0)
    return (100 * means).tolist(), 100 * sum(learned) / len(learned)


@dataclass(frozen=True)
class Bug:
    """A mistake in a layer: how far its output is off, and what one token exchanges."""

    name: str
    error: float  # norm of the difference, divided by the norm of the right output
    exchanged: int  # numbers


@torch.no_grad()
def bugs(layer: nn.Module, x: Float[Tensor, "t d"]) -> list[Bug]:
    """The outputs of five mistaken forms of a latent layer, compared with the right one.

    Args:
        layer: one with the parameter names of the package, such as the learner's.
        x: tokens.
    """
    mine: Any = layer
    gate, experts, shared = mine.gate, mine.experts, mine.shared_experts
    fc1, fc2 = mine.fc1_latent_proj, mine.fc2_latent_proj
    inside = x @ torch.linalg.pinv(fc1.weight @ fc1.weight.T).matmul(fc1.weight).T @ fc1.weight

    def routed(rows: Tensor) -> ops.Routing:
        bias = gate.e_score_correction_bias
        return ops.route(rows, gate.weight, bias, top_k=mine.top_k, scale=mine.scale)

    def mixed(z: Tensor, routing: ops.Routing) -> Tensor:
        up, down = experts.up_proj, experts.down_proj
        return ops.expert_mlp(z, up, down, routing.weights, routing.indices)

    def everyone(rows: Tensor) -> Tensor:
        result: Tensor = shared.down_proj(F.relu(shared.up_proj(rows)) ** 2)
        return result

    z, routing = fc1(x), routed(x)
    slots = [
        ops.Routing(routing.weights[:, i : i + 1], routing.indices[:, i : i + 1], routing.scores)
        for i in range(mine.top_k)
    ]
    right = fc2(mixed(z, routing)) + everyone(x)
    narrow, wide = (2 * mine.top_k * width for width in (z.shape[1], x.shape[1]))
    wrong = {
        "the router reads only what z holds": fc2(mixed(z, routed(inside))) + everyone(x),
        "the shared expert reads only what z holds": fc2(mixed(z, routing)) + everyone(inside),
        "a ReLU behind W_down": fc2(mixed(F.relu(z), routing)) + everyone(x),
        "an RMS norm behind W_down": fc2(mixed(F.rms_norm(z, z.shape[1:]), routing)) + everyone(x),
    }
    late = sum((fc2(mixed(z, slot)) for slot in slots), everyone(x))
    found = [Bug(name, _error(y, right), narrow) for name, y in wrong.items()]
    return [*found, Bug("W_up before the sum, for each expert", _error(late, right), wide)]


def _error(got: Tensor, right: Tensor) -> float:
    return float((got - right).norm() / right.norm())


def show_bugs(found: Sequence[Bug]) -> None:
    """A table of `bugs`; errors are in the HTML only."""
    head = ["mistake", "error", "numbers that a token exchanges"]
    rows = [
        [output.inline_html(bug.name), f"{100 * bug.error:.0f} %", f"{bug.exchanged:,}"]
        for bug in found
    ]
    lines = [f"{bug.name}: exchanges {bug.exchanged:,} numbers" for bug in found]
    output.show_output("\n".join(lines), output.html_table(head, rows))


@torch.no_grad()
def compressed(
    model: Nemotron,
    found: Mapping[int, Features],
    width: int,
    principal: Principal,
    compress: Compress,
) -> Nemotron:
    """A model with a latent space whose experts are those of a plain model, cut to `width`.

    Router, shared expert and all other layers are copied.

    Args:
        model: trained, without a latent space.
        found: its `features`.
        width: the latent width l.
        principal: like the answer to 05.principal. It gives one basis for what the experts read,
            and one for what they write.
        compress: like the answer to 05.compress.
    """
    smaller = Nemotron(model.config.replace(moe_latent_size=width), seed=0)
    weights = {name.replace(".mixer.own.", ".mixer."): v for name, v in model.state_dict().items()}
    for number, layer in found.items():
        name = f"backbone.layers.{number}.mixer"
        up, down = (weights[f"{name}.experts.{part}"] for part in ("up_proj", "down_proj"))
        fc1, narrow_up, _, _ = compress(up, down, principal(layer.inputs, width)[0])
        _, _, narrow_down, fc2 = compress(up, down, principal(layer.outputs, width)[0])
        weights |= {
            f"{name}.fc1_latent_proj.weight": fc1, f"{name}.experts.up_proj": narrow_up,
            f"{name}.experts.down_proj": narrow_down, f"{name}.fc2_latent_proj.weight": fc2,
        }  # fmt: skip
    smaller.load_state_dict(weights)
    return smaller


def random_directions(generator: torch.Generator) -> Principal:
    """A function like `principal` that chooses its directions at random."""

    def choose(rows: Tensor, width: int) -> tuple[Tensor, Any]:
        drawn = torch.randn(rows.shape[1], width, generator=generator)
        basis = torch.linalg.qr(drawn)[0]
        return basis, float((rows @ basis).square().sum() / rows.square().sum())

    return choose


def recorded(found: dict[str, Any] | None = None) -> None:
    """What the record says about latent mixtures; numbers and verdicts are in the HTML only.

    Args:
        found: a record like quality_per_flop.json; None reads it.
    """
    whole = found or record(RECORD)
    claims = [claim for claim in whole["claims"] if claim["model"] in LATENT]
    rows = []
    for claim in claims:
        mean, ends = claim["mean"], claim["interval"]
        said = "–" if mean is None else f"{mean:+.3f}"
        said += "" if ends is None else f" ({ends[0]:+.3f} to {ends[1]:+.3f})"
        words, verdict = output.inline_html(claim["claim"]), f"<b>{claim['verdict']}</b>"
        rows.append([words, str(claim["n"]), said, verdict])
    head = ["claim", "pairs of runs", "bits per byte more (interval of the mean)", "verdict"]
    table = output.html_table(head, rows, title="The record")
    plain_text = "\n".join(f"tested: {claim['claim']}" for claim in claims)
    output.show_output(plain_text, table)


def at_full_scale() -> None:
    """Super's layer and NVIDIA's experiments, with numbers from facts.toml."""
    tell("""
Super's tokens have {super.width} numbers, its experts read {super.latent_width}, and a token
chooses {super.experts_per_token} of {super.experts} experts. In one layer a token exchanges
{super.exchanged_numbers:unit}. With {nano.experts_per_token} experts of full width it would be
{latent_moe.standard_exchanged_numbers}, with {super.experts_per_token} of them
{latent_moe.wide_exchanged_numbers}. Ultra has $d / l$ = {ultra.latent_ratio} too. Between its
devices the exchange takes {ultra.all_to_all_low} to {ultra.all_to_all_high} % of the serving time.

NVIDIA trained two hybrids on {latent_moe.training_tokens:unit}. One has 128 experts at full width
and 6 per token; the layers of the other have the latent sizes of Super.

| | standard | LatentMoE |
|---|---|---|
| parameters, billions | {latent_moe.standard_total} | {latent_moe.latent_total} |
| active parameters, billions | {latent_moe.standard_active} | {latent_moe.latent_active} |
| MMLU-Pro | {latent_moe.standard_mmlu_pro} | {latent_moe.latent_mmlu_pro} |
| MMLU | {latent_moe.standard_mmlu} | {latent_moe.latent_mmlu} |
| code, average | {latent_moe.standard_code} | {latent_moe.latent_code} |
| mathematics, average | {latent_moe.standard_math} | {latent_moe.latent_math} |
| common sense, average | {latent_moe.standard_commonsense} | {latent_moe.latent_commonsense} |

The LatentMoE paper has other models, with a {latent_moe.router} router. There the quality holds
up to about $\\alpha$ = {latent_moe.largest_ratio} and drops beyond. The paper explains this by the
rank of what the experts read; our cut shows no such limit. The variant *eff* lowers the active
parameters from {latent_moe.eff_standard_active} to {latent_moe.eff_active:unit}, at about equal
accuracy. Serving is as fast as with a standard mixture, within {latent_moe.serving_difference} %.
The projections add at most {latent_moe.projection_cost:unit}.""")
