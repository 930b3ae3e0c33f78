"""What chapter 05 runs beside the learner's code: costs of a token, short trainings, subspaces.

    weights_of_a_token   what one token reads of a layer, part by part
    crossing             the number of tokens above which the exchange takes longer than reading
    plain, latent        small models of equal cost: the mixture of chapter 04, and a latent one
    teach, bits          a short training, and the score on text that no model has read
    features             what the experts of each layer read and write
    kept_by              the share of the energy that a projection keeps
    bugs                 what five mistakes change in the learner's layer
    compressed           a latent model out of the weights of a plain one
    without_experts      a model whose routed experts write nothing
    recorded             the verdicts of `benchmarks/records/quality_per_flop.json`

The trainings compare a plain and a latent model that cost the same for a token, and a control that
costs less, on the same text in the same order. A training has a seed for its weights and its
batches. Two seeds of one model differ too, and a difference between two models means nothing as
long as it is not clearly larger than that.

A projection to l numbers keeps a subspace. `compressed` takes two of them for each layer: one for
what its experts read, one for what they write. Both are computed from tokens of the training text.

Left out: training after the compression, which would repair a part of the loss.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron_lite import ledger
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


MISTAKES = (  # as the predictions call them
    "the router reads z",
    "the shared expert reads z",
    "a ReLU behind W_down",
    "a norm behind W_down",
    "W_up before the sum",
)
NO_CHANGE = 1e-4  # a smaller error is rounding


@dataclass(frozen=True)
class Bug:
    """A mistake in a layer: how far its output is off, and what one token exchanges."""

    name: str
    error: float  # norm of the difference, divided by that of the right output; NaN: not run
    exchanged: int  # numbers


@torch.no_grad()
def bugs(layer: nn.Module, x: Float[Tensor, "t d"]) -> list[Bug]:
    """Make five mistakes in a layer, and compare its outputs with the right one.

    The `forward` of the layer computes all of them. It runs with other weights for 1, 2 and 5, and
    with a hook on `fc1_latent_proj` for 3 and 4. A router with the matrix W P, where P projects to
    what W_down reads, gives the scores that W gives for P x. For 5 each expert goes through W_up by
    itself: the layer runs once for each, with zeros in place of the others and of the shared one.

    Args:
        layer: one with the parameter names of the package, such as the learner's.
        x: tokens.
    """
    mine: Any = layer
    weights = {name: w.detach() for name, w in layer.state_dict().items()}
    fc1 = weights["fc1_latent_proj.weight"]
    reads = torch.linalg.pinv(fc1) @ fc1  # P, `d d`
    right = _with_weights(layer, x, {})

    def narrowed(name: str) -> float:
        return _error(_with_weights(layer, x, {name: weights[name] @ reads}), right)

    def behind(change: Callable[[Tensor], Tensor]) -> float:
        ran = []

        def hook(module: nn.Module, arguments: Any, z: Tensor) -> Tensor:
            ran.append(True)
            return change(z)

        handle = mine.fc1_latent_proj.register_forward_hook(hook)
        try:
            changed = _with_weights(layer, x, {})
        finally:
            handle.remove()
        return _error(changed, right) if ran else math.nan  # it reads the weight, and calls nothing

    experts, shared = "experts.down_proj", "shared_experts.down_proj.weight"
    nobody = torch.zeros_like(weights[experts])
    late = _with_weights(layer, x, {experts: nobody})  # the shared expert
    for number, down in enumerate(weights[experts]):
        alone = nobody.clone()
        alone[number] = down
        late += _with_weights(layer, x, {experts: alone, shared: 0 * weights[shared]})
    width, d = fc1.shape
    narrow, wide = 2 * mine.top_k * width, mine.top_k * (width + d)  # z there; back z, or d numbers
    errors = (
        narrowed("gate.weight"),
        narrowed("shared_experts.up_proj.weight"),
        behind(F.relu),
        behind(lambda z: F.rms_norm(z, z.shape[-1:])),
        _error(late, right),
    )
    sent = (narrow, narrow, narrow, narrow, wide)
    return [Bug(*row) for row in zip(MISTAKES, errors, sent, strict=True)]


def _with_weights(
    layer: nn.Module, x: Float[Tensor, "t d"], weights: Mapping[str, Tensor]
) -> Float[Tensor, "t d"]:
    """The output of a layer that has some other weights for this call."""
    found: Tensor = torch.func.functional_call(layer, dict(weights), (x[None],))
    return found[0]


def _error(got: Tensor, right: Tensor) -> float:
    return float((got - right).norm() / right.norm())


def harmless(found: Sequence[Bug]) -> str:
    """Names of the mistakes that do not change the output; "none" if all do."""
    return " and ".join(bug.name for bug in found if bug.error < NO_CHANGE) or "none"


def show_bugs(found: Sequence[Bug]) -> None:
    """A table of `bugs`; errors are in the HTML only."""
    head = ["mistake", "error", "numbers that a token exchanges"]
    rows = [
        [
            output.inline_html(bug.name),
            "not run: call `self.fc1_latent_proj`" if math.isnan(bug.error)
            else f"{100 * bug.error:.0f} %",
            f"{bug.exchanged:,}",
        ]
        for bug in found
    ]  # fmt: skip
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


@torch.no_grad()
def without_experts(model: Nemotron) -> Nemotron:
    """A copy of a model whose routed experts write nothing: the worst that a cut can do to them."""
    bare = copy.deepcopy(model)
    for name, weight in bare.named_parameters():
        if name.endswith(".experts.down_proj"):
            weight.zero_()
    return bare


def random_directions(generator: torch.Generator) -> Principal:
    """A function like `principal` that chooses its directions at random."""

    def choose(rows: Tensor, width: int) -> tuple[Tensor, Any]:
        drawn = torch.randn(rows.shape[1], width, generator=generator)
        basis = torch.linalg.qr(drawn)[0]
        return basis, float((rows @ basis).square().sum() / rows.square().sum())

    return choose


def recorded(found: dict[str, Any] | None = None) -> None:
    """What the record says about latent mixtures; all that runs may change is in the HTML only.

    Args:
        found: a record like quality_per_flop.json; None reads it.
    """
    whole = found or record(RECORD)
    claims = [claim for claim in whole["claims"] if claim["model"] in LATENT]
    rows = []
    for claim in claims:
        mean, ends = claim["mean"], claim["interval"]
        said = "no runs to compare" if mean is None else f"{mean:+.3f}"
        said += "" if ends is None else f" ({ends[0]:+.3f} to {ends[1]:+.3f})"
        pairs = f"{claim['n']} of {whole['planned']['seeds']}"
        verdict = f"<b>{claim['verdict']}</b>" if claim["n"] else "<b>not tested yet</b>"
        rows.append([output.inline_html(claim["claim"]), claim["kind"], pairs, said, verdict])
    hybrid = _hybrid_beside_dense(whole)
    if hybrid:
        pairs = f"{len(hybrid)} of {whole['planned']['seeds']}"
        words = "For comparison: the hybrid with a standard mixture beside the dense transformer."
        rows.append([words, "no claim", pairs, f"{fmean(hybrid):+.3f}", ""])
    head = ["claim", "kind", "pairs made", "difference in bits per byte (interval)", "verdict"]
    table = output.html_table(head, rows, title="The record")
    made = f"<p>{output.inline_html(_made(whole, claims))}</p>"
    rule = "".join(f"<p>{output.inline_html(words)}</p>" for words in _rules(whole, claims))
    plain_text = "\n".join(f"claim: {claim['claim']}" for claim in claims)
    last = next(c for c in claims if (c["model"], c["other"]) == ("latent", "dense"))
    known = hybrid and last["verdict"] == "yes"
    gain = f"<p>{_whose_gain(last, fmean(hybrid))}</p>" if known else ""
    output.show_output(plain_text, made + table + gain + rule)


def _hybrid_beside_dense(whole: dict[str, Any]) -> list[float]:
    """Bits per byte of the hybrid without LatentMoE, minus those of the dense model, by seed."""
    hybrid, dense = (
        dict(zip(model["seeds"], model["curve"][-1]["bits_per_byte"]["each"], strict=True))
        if model["seeds"]
        else {}
        for model in (whole["models"]["hybrid"], whole["models"]["dense"])
    )
    return [bits - dense[seed] for seed, bits in hybrid.items() if seed in dense]


def _whose_gain(claim: dict[str, Any], standard: float) -> str:
    """Whether the gain over the dense transformer is that of the hybrid or of LatentMoE.

    Args:
        claim: of the hybrid with LatentMoE beside the dense transformer.
        standard: the same difference of the hybrid with a standard mixture.
    """
    if claim["mean"] - standard > -claim["margin"]:
        so = "This gain comes from the hybrid, not from LatentMoE."
    else:
        so = "So not all of it comes from the hybrid."
    return (
        f"The last two rows: {claim['mean']:+.3f} with LatentMoE, {standard:+.3f} with a standard "
        f"mixture. {so}"
    )


def _made(whole: dict[str, Any], claims: Sequence[dict[str, Any]]) -> str:
    """How many updates and seeds were planned, and what has been made of it."""
    scale, seeds = whole["scale"], whole["planned"]["seeds"]
    used = dict.fromkeys(name for claim in claims for name in (claim["model"], claim["other"]))
    models = {name: whole["models"][name] for name in used}
    trained = "; ".join(f"{len(m['seeds'])} of {m['words']}" for m in models.values())
    longer = "".join(
        f" ({m['words']}: {m['longer']:.2f} times as many)"
        for m in models.values()
        if m["longer"] != 1
    )
    pairs = [claim["n"] for claim in claims]
    if not any(pairs):
        state = "**No pair of runs exists yet: this record says nothing about latent mixtures.**"
    elif min(pairs) < seeds:
        state = "Not all planned pairs exist, so the verdicts are provisional."
    else:
        state = "All planned pairs exist."
    return (
        f"A run has {scale['updates']:,} updates{longer} and reads {scale['tokens']:,} tokens in "
        f"all. {seeds} seeds are planned. Runs made: {trained}. {state}"
    )


def _rules(whole: dict[str, Any], claims: Sequence[dict[str, Any]]) -> list[str]:
    """The rule of the verdicts, with the numbers of the record."""
    margin = claims[0]["margin"]
    return [
        f"The difference is that of the first model minus the second, so below 0 the first is "
        f"better. The interval is that of the mean, at {100 * whole['confidence']:.0f} %. With "
        f"fewer than {whole['least_seeds']} pairs nothing is decided.",
        f"*better*: yes if the whole interval is below 0, no if all of it is above {-margin}. "
        f"*not worse*: yes if all of it is below +{margin}, no if all of it is above +{margin}. "
        "Anything else is not decided.",
    ]


def at_full_scale() -> None:
    """Super's layer and NVIDIA's experiments, with numbers from facts.toml."""
    tell("""
Super's tokens have {super.width} numbers, its experts read {super.latent_width}, and a token
chooses {super.experts_per_token} of {super.experts} experts. In one layer a token exchanges
{super.exchanged_numbers:unit}. With {latent_moe.standard_chosen} experts of full width it would be
{latent_moe.standard_exchanged_numbers}, with {super.experts_per_token} of them
{latent_moe.wide_exchanged_numbers}. Ultra has $d / l$ = {ultra.latent_ratio} too. Between its
devices the exchange takes {ultra.all_to_all_low} to {ultra.all_to_all_high} % of the serving time:
most of it goes to other parts, unlike on the device assumed above.

NVIDIA trained two hybrids on {latent_moe.training_tokens:unit}. One has
{latent_moe.standard_experts} experts at full width and {latent_moe.standard_chosen} per token; the
layers of the other have the latent sizes of Super.

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
rank of what the experts read; our cut shows no such limit. The serving speed of *acc* differs from
that of a standard mixture by at most {latent_moe.serving_difference} %; the projections add at most
{latent_moe.projection_cost:unit}. *Eff* lowers the active parameters from
{latent_moe.eff_standard_active} to {latent_moe.eff_active:unit}, at about equal accuracy.""")
