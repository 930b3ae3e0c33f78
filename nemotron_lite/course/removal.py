"""Small models with one part taken out: what does a model lose without it?

    full = small_model("text")
    less = small_model("text", without="conv")

Two tasks show different losses. "text" is Python source, scored in bits per byte of held-out files.
"recall" is associative recall (`data.tasks.recall`), scored as the share of right answers about 16
pairs. The removed part:

    conv        the convolution of every Mamba-2 layer lets its input through unchanged
    gate        the output of the scan is normalized, but not multiplied by silu(z)
    norm        it is multiplied by silu(z), but not normalized
    D           the direct path around the state, fixed at 0
    selection   dt, B and C are learned constants, the same for every token
    attention   the attention layers become Mamba-2 layers
    mamba       the Mamba-2 layers become attention layers
    experts     the mixtures become dense MLPs as wide as what one token uses of the mixture

The first five change no shape: the rest of the model starts from the same weights. In all cases the
data and their order are the same. `benchmarks/model/removal.py` trains every variant with several
seeds and writes the record that the chapters show; a chapter trains one of them live.

A result at this size (under a million parameters, a few hundred steps) says what this small model
loses in a short run. It does not say what Super would lose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_lite.config import NemotronConfig
from nemotron_lite.data import TextData, prepare
from nemotron_lite.data.tasks.recall import Recall, recall_score
from nemotron_lite.layers import Mamba2
from nemotron_lite.model import Nemotron
from nemotron_lite.train import TrainConfig, evaluate, train

PARTS: Mapping[str, str] = {
    "conv": "convolution",
    "gate": "gate",
    "norm": "norm behind the gate",
    "D": "direct path D",
    "selection": "selection (dt, B, C from the token)",
    "attention": "attention layers",
    "mamba": "Mamba-2 layers",
    "experts": "experts",
}
PATTERN_CHANGES = {"attention": ("*", "M"), "mamba": ("M", "*"), "experts": ("E", "-")}

CONFIGS: Mapping[str, NemotronConfig] = {
    "text": NemotronConfig(
        "MEM*EME", vocab_size=1024, hidden_size=96, initializer_range=0.09,
        num_attention_heads=4, num_key_value_heads=2, head_dim=24,
        mamba_num_heads=6, mamba_head_dim=32, ssm_state_size=32, n_groups=2,
        n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=64, moe_latent_size=32,
        moe_shared_expert_intermediate_size=96, intermediate_size=160, routed_scaling_factor=2.5,
        chunk_size=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    ),
    "recall": NemotronConfig(
        "M*", vocab_size=32, hidden_size=64, initializer_range=0.1, chunk_size=64,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=4,
    ),
}  # fmt: skip
RECALL = Recall(pairs=(2, 4, 8, 16), keys=16, values=16)
EXAM_PAIRS = 16
RECIPES: Mapping[str, TrainConfig] = {
    "text": TrainConfig(steps=300, batch_size=8, seq_len=128, lr=4e-3, min_lr=4e-5),
    "recall": TrainConfig(
        steps=400, batch_size=16, seq_len=48, lr=5e-3, min_lr=2e-4, weight_decay=0.01
    ),
}


class RemovalError(ValueError):
    """A task or a part that does not exist, or a part that the task's model does not have."""


def config_without(task: str, without: str | None = None) -> NemotronConfig:
    """The config of a task's model, with the letters changed if a kind of layer is taken out.

    Raises:
        RemovalError: an unknown task or part, or a part that this model does not have.
    """
    if task not in CONFIGS:
        raise RemovalError(f"task is {task!r}; expected one of {list(CONFIGS)}.")
    if without is not None and without not in PARTS:
        raise RemovalError(f"without is {without!r}; expected one of {list(PARTS)}, or None.")
    config = CONFIGS[task]
    if without not in PATTERN_CHANGES:
        return config
    old, new = PATTERN_CHANGES[without]
    if old not in config.pattern:
        raise RemovalError(f"the model of task {task!r} is {config.pattern}: it has no {old!r}.")
    return config.replace(pattern=config.pattern.replace(old, new))


def small_model(task: str, without: str | None = None, *, seed: int = 0) -> Nemotron:
    """An untrained model of a task, whole or with one part taken out.

    Args:
        task: "text" or "recall".
        without: a key of `PARTS`; None takes nothing out.
        seed: of the weights.

    Raises:
        RemovalError: as `config_without`.
    """
    model = Nemotron(config_without(task, without), seed=seed)
    for layer in model.backbone.layers:
        mixer: Any = layer.mixer
        if not isinstance(mixer, Mamba2):
            continue
        if task == "recall":  # heads that remember for about 16 tokens and more
            nn.init.constant_(mixer.A_log, -2.8)
        if without in _REMOVERS:
            with torch.no_grad():
                _REMOVERS[without](mixer)
    return model


def _without_conv(mixer: Mamba2) -> None:
    """Only the tap of the newest input is left, with weight 1."""
    taps = mixer.conv1d.weight
    taps.zero_()
    taps[:, :, -1] = 1.0
    taps.requires_grad_(False)
    if mixer.conv1d.bias is not None:
        mixer.conv1d.bias.zero_()
        mixer.conv1d.bias.requires_grad_(False)


def _without_d(mixer: Mamba2) -> None:
    mixer.D.zero_()
    mixer.D.requires_grad_(False)


def _without_selection(mixer: Mamba2) -> None:
    """The rows of `in_proj` that make dt, B and C stay zero; the biases behind them are learned."""
    inner, conv, _ = mixer.splits
    constant = torch.zeros(mixer.in_proj.weight.shape[0], 1, dtype=torch.bool)
    constant[2 * inner :] = True  # z and x come first, then B, C and dt
    mixer.in_proj.weight.masked_fill_(constant, 0.0)
    mixer.in_proj.weight.register_hook(lambda grad: grad.masked_fill(constant, 0.0))
    assert mixer.conv1d.bias is not None
    mixer.conv1d.bias[inner:conv].normal_()


class _OnlyNorm(nn.Module):
    """The norm without its gate: with the same z everywhere, silu(z) is one constant factor."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        normalized: Tensor = self.norm(y, torch.ones_like(z))
        return normalized


class _OnlyGate(nn.Module):
    """The gate without its norm; the scale per channel stays."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return y * nn.functional.silu(z) * self.weight


def _without_gate(mixer: Mamba2) -> None:
    mixer.norm = _OnlyNorm(mixer.norm)  # type: ignore[assignment]


def _without_norm(mixer: Mamba2) -> None:
    mixer.norm = _OnlyGate(mixer.norm)  # type: ignore[assignment]


_REMOVERS: Mapping[str | None, Callable[[Mamba2], None]] = {
    "conv": _without_conv,
    "gate": _without_gate,
    "norm": _without_norm,
    "D": _without_d,
    "selection": _without_selection,
}


def text_data() -> TextData:
    """The text of task "text": the standard library, with a vocabulary of 1,024 tokens."""
    return prepare(vocab_size=CONFIGS["text"].vocab_size)


def train_small(
    model: Nemotron,
    task: str,
    data: TextData | None = None,
    *,
    steps: int | None = None,
    seed: int = 0,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> list[float]:
    """Train a model of `small_model`; returns the loss of every step in nats per token.

    Args:
        model: it is trained in place.
        task: the task that the model was made for.
        data: of `text_data()`, for task "text".
        steps: number of updates; None takes the number of `RECIPES`.
        seed: of the order of the data.
        on_step: called with each log record, such as a `progress_hook`.
    """
    if task not in RECIPES:
        raise RemovalError(f"task is {task!r}; expected one of {list(RECIPES)}.")
    recipe = RECIPES[task]
    config = replace(recipe, seed=seed, steps=steps or recipe.steps)
    source = RECALL if task == "recall" else data or text_data()
    result = train(model, source, config, progress=False, on_step=on_step)
    return [float(record["ce"]) for record in result.history]


def score(model: Nemotron, task: str, data: TextData | None = None) -> float:
    """Bits per byte of the held-out text, or the share of right answers about 16 pairs."""
    model.eval()
    if task == "recall":
        exam = RECALL.test_set(EXAM_PAIRS, rows=128)
        with torch.no_grad():
            return float(recall_score(model(exam.tokens).logits, exam))
    return float(evaluate(model, (data or text_data()).held_out, window=256).bits_per_byte)
