"""What chapter 03 runs beside the learner's own code: short trainings, and a look into a cache.

    teach      a short training on the recall task, with a bar
    recall_model, recall_of   such a model with another n, and its score for any number of pairs
    tiled      the model with its key heads in the wrong order
    book       one row of the task in words
    watch      what a trained model keeps and looks at, token by token
    shuffled   how far the last output moves when the tokens before it change places
    who_notices   the same for four stacks of layers, in the order that the text relies on
    at_full_scale   Super's attention layers in words

The models are those of `course.removal`: one Mamba-2 layer and one attention layer. `watch` reads
a row token by token with a cache, as a decoder does, and copies what each layer holds after every
token. The attention weights are computed from the layer's own projections.

Left out: batches, and models with more than these two layers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron_lite.config import NemotronConfig
from nemotron_lite.course import removal
from nemotron_lite.course.display import progress_hook
from nemotron_lite.course.factsheet import tell
from nemotron_lite.data.tasks.recall import recall_score
from nemotron_lite.masks import visible_keys
from nemotron_lite.model import Nemotron

STEPS = 200  # updates; the record of the course uses 400
SLOW = -2.8  # A_log of heads that remember about 16 tokens, as in `course.removal`
TOKENS = 64  # of the text that `shuffled` shuffles


def teach(model: Nemotron, label: str, steps: int | None = None) -> list[float]:
    """Train a model on the recall task, for `STEPS` updates unless you say more; its losses."""
    hook = progress_hook(label, steps or STEPS)
    return removal.train_small(model, "recall", steps=steps or STEPS, on_step=hook)


def recall_model(pattern: str, n: int) -> Nemotron:
    """An untrained model like that of `removal.small_model("recall")`, with other layers or n."""
    config = removal.CONFIGS["recall"].replace(pattern=pattern, ssm_state_size=n)
    model = Nemotron(config, seed=0)
    for layer in model.backbone.layers:
        mixer: Any = layer.mixer
        if layer.kind == "M":
            torch.nn.init.constant_(mixer.A_log, SLOW)
    return model


@torch.no_grad()
def recall_of(model: Nemotron, pairs: int) -> float:
    """Share of right answers about that many pairs, over 64 rows."""
    exam = removal.RECALL.test_set(pairs, rows=64)
    return recall_score(model.eval()(exam.tokens).logits, exam)


@torch.no_grad()
def tiled(model: Nemotron) -> Nemotron:
    """A copy of an `M*` model whose query heads read the key heads in the order of `repeat`.

    The query heads (and the columns of `o_proj` behind them) change places instead of the key
    heads, which gives the same numbers.
    """
    config, copied = model.config, copy.deepcopy(model)
    layers: Any = copied.backbone.layers
    mixer = layers[1].mixer
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    order = torch.arange(heads).view(-1, keys).T.flatten()
    queries = mixer.q_proj.weight.view(heads, config.head_dim, -1)
    mixer.q_proj.weight.copy_(queries[order].flatten(0, 1))
    columns = mixer.o_proj.weight.view(-1, heads, config.head_dim)
    mixer.o_proj.weight.copy_(columns[:, order].flatten(1))
    return copied


def book(pairs: int = 8, questions: int = 4) -> Tensor:
    """The tokens of one row of the task, `1 t`."""
    return removal.RECALL.test_set(pairs, rows=1, questions=questions).tokens


def spelled(tokens: Tensor) -> list[str]:
    """The tokens of one row as text: keys are numbers, values are letters."""
    keys = removal.RECALL.keys
    return [str(t) if t < keys else chr(ord("A") + t - keys) for t in tokens.flatten().tolist()]


@dataclass(frozen=True)
class Watched:
    """What a model of one Mamba-2 and one attention layer holds after every token of a row.

    Attributes:
        names: the tokens as text.
        keys: all keys of the attention layer's cache at the end; after token i rows 0 to i exist.
        weights: row i is what the query of token i puts on the tokens, mean over the heads.
        states: the state of one Mamba-2 head after each token.
    """

    names: list[str]
    keys: Float[Tensor, "t c"]
    weights: Float[Tensor, "t t"]
    states: Float[Tensor, "t n p"]


@torch.no_grad()
def watch(model: Nemotron, tokens: Tensor, head: int = 0) -> Watched:
    """Read one row token by token and keep what the layers hold.

    Args:
        model: with the pattern `M*`.
        tokens: `1 t`.
        head: which head of the Mamba-2 layer.

    Raises:
        ValueError: another pattern, or more than one row.
    """
    if model.config.pattern != "M*" or len(tokens) != 1:
        raise ValueError(
            f"pattern {model.config.pattern!r}, {len(tokens)} rows: expected 'M*' and one row."
        )
    cache = model.empty_cache(1, capacity=tokens.shape[1])
    mamba: Any = cache.layers[0]
    attention: Any = cache.layers[1]
    states = []
    for i in range(tokens.shape[1]):
        model(tokens[:, i : i + 1], cache)
        states.append(mamba.ssm[0, head].T.clone())
    keys = attention.k[0].transpose(0, 1).flatten(1)
    return Watched(spelled(tokens), keys, attention_weights(model, tokens), torch.stack(states))


@torch.no_grad()
def attention_weights(model: Nemotron, tokens: Tensor) -> Float[Tensor, "t t"]:
    """Weights of the attention layer of an `M*` model on one row, mean over its heads."""
    layers: Any = model.backbone.layers
    mixer = layers[1].mixer
    x = layers[1].norm(layers[0](model.backbone.embed(tokens)))
    width = model.config.head_dim
    q, k = (
        projection(x).unflatten(-1, (-1, width)).transpose(1, 2)
        for projection in (mixer.q_proj, mixer.k_proj)
    )
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    seen = visible_keys(tokens.shape[1], tokens.shape[1], 0, None, tokens.device)
    scores = (q @ k.mT * width**-0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1)[0].mean(0)


@torch.no_grad()
def shuffled(pattern: str, config: NemotronConfig, generator: torch.Generator) -> float:
    """How far the last output of some layers moves when the tokens before it are shuffled.

    The layers have fresh weights. The distance is relative to what the layers had added.
    """
    order = torch.cat([torch.randperm(TOKENS - 1, generator=generator), torch.tensor([TOKENS - 1])])
    x = torch.randn(1, TOKENS, config.hidden_size, generator=generator)
    y, other = x, x[:, order]
    for layer in Nemotron(config.replace(pattern=pattern), seed=0).backbone.layers:
        y, other = layer(y), layer(other)
    return float((y - other)[:, -1].norm() / (y - x)[:, -1].norm())


def who_notices(config: NemotronConfig, generator: torch.Generator) -> dict[str, float]:
    """`shuffled` for one and two attention layers, and for a Mamba layer without and with one.

    Raises:
        AssertionError: the order is not the one that the chapter explains.
    """
    moved = {stack: shuffled(stack, config, generator) for stack in ("*", "**", "M", "M*")}
    one, two, mamba = moved["*"], moved["**"], min(moved["M"], moved["M*"])
    if not one < 1e-5 < 0.02 < two < mamba:
        raise AssertionError(f"the changes are {moved}; expected * near 0, then **, then M and M*.")
    return moved


def at_full_scale() -> None:
    """Super's attention layers in words, with numbers from facts.toml."""
    tell("""
Super has {super.attention_layers} attention layers among {super.layers} layers, at
{super.attention_positions} (counted from 0). Each stands right behind a Mamba-2 layer; the first
comes after several of them. {super.query_heads} query heads share {super.kv_heads} key heads.
Together the attention layers store {super.kv_bytes_per_token:unit} for each token,
{super.kv_gib_at_1m:unit} at {super.context:unit}. With attention in every layer it would be
{super.all_attention_gib_at_1m:unit}.

All of Super has five Mamba-2 layers for each attention layer, so all its caches together are as
large as all its states after five times the length of the crossing:
{super.state_equals_kv_at:unit}.

Your hybrid has one task. In a trained Super an attention layer serves many purposes, and the states
hold far more than pairs. Whether so few attention layers are enough for a long text cannot be
derived. It is measured, with tests such as RULER, which hides facts in a long text and asks for
them. Super's base model scores {super.ruler_base_64k} % at 64K tokens, {super.ruler_base_256k} % at
256K and {super.ruler_base_1m} % at 1M. (The report exists in two versions with slightly different
scores. These are from the version of March.)""")
