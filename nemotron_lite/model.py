"""The model: embeddings, a string of residual layers, a final norm, and a head.

    x = Emb(tokens);   x = x + Mixer_l(RMSNorm_l(x))  for each layer l;   logits = W RMSNorm_f(x)

Which mixer stands where is the pattern string of the config. There are no positions anywhere: order
is known through the Mamba layers and the causal mask. Embedding and head are separate matrices.
Parameters carry the names of published checkpoints (`backbone.layers.0.mixer.in_proj.weight`).

Without gradients a long input is taken in segments, each continuing the memory of the one before.
The result is the same, and the working memory no longer grows with the length.

Source: Nemotron 3 Super report section 2; reference sheet 1.4 and 1.6. Left out: dropout, tied
embeddings and logit caps, which the family does not use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron_lite.cache import Cache
from nemotron_lite.config import NemotronConfig
from nemotron_lite.input_checks import check_call, check_hold
from nemotron_lite.layers import (
    MLP,
    MTP,
    Attention,
    Block,
    Experts,
    ForwardContext,
    GatedRMSNorm,
    LayerCache,
    Linear,
    Mamba2,
    MoE,
    RMSNorm,
    Router,
    RouterStats,
)

SEGMENT = 2048  # tokens per row and pass of a long prefill
GPU_SEGMENT = 8192  # on a GPU: 512 experts share the rows, and each wants a tile full of them


def segment(tokens: Tensor) -> int:
    """Tokens per row that one pass takes, where `tokens` lie."""
    return GPU_SEGMENT if tokens.is_cuda else SEGMENT


@dataclass
class Hidden:
    """What the model knows before the head.

    Attributes:
        hidden: after the final norm, `b t d`.
        mtp_hidden: entry k-1 is depth k, `b t-k d`; its row i predicts token i+k+1.
        router: statistics of every mixture layer, backbone first; empty unless asked for.
    """

    hidden: Float[Tensor, "b t d"]
    mtp_hidden: list[Tensor] = field(default_factory=list)
    router: list[RouterStats] = field(default_factory=list)


@dataclass
class Output(Hidden):
    """`Hidden` with the head applied.

    Attributes:
        logits: float32 (float64 for a float64 model), `b t v`, or `b 1 v` with `last_only`.
        mtp_logits: entry k-1 is depth k, `b t-k v`; its row i predicts token i+k+1.
    """

    logits: Tensor = field(kw_only=True)
    mtp_logits: list[Tensor] = field(default_factory=list)


class Backbone(nn.Module):
    """Everything between token ids and the head."""

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, kind, f"backbone.layers.{i}") for i, kind in enumerate(config.pattern)
        )
        self.norm_f = RMSNorm(config.hidden_size, config.norm_eps)

    def embed(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """Look tokens up.

        Raises:
            ValueError: a token outside the vocabulary.
        """
        try:
            return self.embeddings(tokens)
        except IndexError as error:
            raise ValueError(
                f"tokens range from {int(tokens.min())} to {int(tokens.max())}, but the vocabulary "
                f"has {self.embeddings.num_embeddings} entries. Is this the model's tokenizer?"
            ) from error

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        cache: Sequence[LayerCache] | None,
        context: ForwardContext,
    ) -> Float[Tensor, "b t d"]:
        """The residual stream after the final norm."""
        x = self.embed(tokens)
        for layer, memory in zip(self.layers, cache or [None] * len(self.layers), strict=True):
            x = layer(x, memory, context)
        return self.norm_f(x)


class Nemotron(nn.Module):
    """A hybrid Mamba-2, attention and LatentMoE language model.

    Args:
        config: its sizes.
        device, dtype: where and in what precision the weights are made.
        seed: makes the initial weights repeatable without touching the global random state.
    """

    def __init__(
        self,
        config: NemotronConfig,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Any = None  # a `tokenizers.Tokenizer` where `load` found one
        with torch.device("meta"):  # no memory and no random numbers until `initialize`
            self.backbone = Backbone(config)
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
            self.mtp = MTP(config) if config.mtp_pattern else None
        device = torch.device(device or torch.get_default_device())
        if device.type != "meta":
            self.to_empty(device=device)
            with torch.random.fork_rng(enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                initialize(self)
        if dtype is not None:
            self.to(dtype)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.lm_head.weight.dtype

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Nemotron:
        """`nemotron_lite.load` under the name that transformers gives it; the same arguments."""
        from nemotron_lite.checkpoint import load

        return load(path, **options)

    def save_pretrained(self, path: str | Path, **options: Any) -> None:
        """`nemotron_lite.save` under the name that transformers gives it; the same arguments."""
        from nemotron_lite.checkpoint import save

        save(self, path, **options)

    def num_parameters(self) -> int:
        """Weights and selection biases, MTP included."""
        biases = (m.e_score_correction_bias for m in self.modules() if isinstance(m, Router))
        return sum(p.numel() for p in self.parameters()) + sum(b.numel() for b in biases)

    def empty_cache(
        self,
        batch: int,
        capacity: int = 256,
        mtp: bool = False,
        *,
        ssm_dtype: torch.dtype | None = None,
        ssm_seed: int | None = 0,
    ) -> Cache:
        """`Cache.empty` for this model's sizes, device and dtype."""
        return Cache.empty(
            self.config, batch, capacity=capacity, mtp=mtp, device=self.device, dtype=self.dtype,
            ssm_dtype=ssm_dtype, ssm_seed=ssm_seed,
        )  # fmt: skip

    def prepare_for_decoding(self, smallest: int = 80_000) -> Nemotron:
        """Prepare to decode on a CPU: a copy of every projection in the layout of its kernels.

        `generate` calls it where it pays. One token, or a few, then cost about half of what they do
        without. The matrices (without experts and embedding) are held twice. A copy is not used any
        more when its weight changes; the next call copies it again.

        Args:
            smallest: numbers in a matrix that is worth it; below, a call costs more than it gains.

        Returns:
            The model itself.

        Raises:
            ValueError: weights that are not float32 on the CPU, or a PyTorch without oneDNN.
        """
        for module in self.modules():
            if isinstance(module, Linear) and module.weight.numel() >= smallest:
                module.prepare_for_decoding()
        return self

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        cache: Cache | None = None,
        *,
        lengths: Int[Tensor, "b"] | None = None,
        seq_idx: Int[Tensor, "b t"] | None = None,
        mtp_depths: int = 0,
        router_stats: bool = False,
        last_only: bool = False,
        hold: str | None = None,
    ) -> Output:
        """Logits for every token, or for the last one of each row.

        Args:
            tokens: ids; rows that are shorter than t are padded on the right with anything.
            cache: what came before; advanced in place. With a cache no gradients are recorded.
            lengths: real tokens in each row; all t when None.
            seq_idx: documents of packed rows: nothing is carried from one to the next.
            mtp_depths: how often to apply the MTP module (Super trains 2).
            router_stats: return each router's scores and choices.
            last_only: logits of the last real token only; what prefill needs.
            hold: read a draft without advancing the cache; `cache.keep(counts)` then takes in its
                first tokens. "replay" or "snapshots": what is kept for that (see cache.py).

        Raises:
            ValueError: arguments that do not fit together; the message says which.
        """
        found = self.forward_hidden(
            tokens,
            cache,
            lengths=lengths,
            seq_idx=seq_idx,
            mtp_depths=mtp_depths,
            router_stats=router_stats,
            hold=hold,
        )
        hidden = found.hidden
        if last_only and lengths is not None:
            last = (lengths.to(hidden.device) - 1).clamp(min=0)
            hidden = hidden[torch.arange(len(last), device=hidden.device), last].unsqueeze(1)
        elif last_only:
            hidden = hidden[:, -1:]
        return Output(
            found.hidden,
            found.mtp_hidden,
            found.router,
            logits=self.head(hidden),
            mtp_logits=[self.head(h) for h in found.mtp_hidden],
        )

    def forward_hidden(
        self,
        tokens: Int[Tensor, "b t"],
        cache: Cache | None = None,
        *,
        lengths: Int[Tensor, "b"] | None = None,
        seq_idx: Int[Tensor, "b t"] | None = None,
        mtp_depths: int = 0,
        router_stats: bool = False,
        hold: str | None = None,
    ) -> Hidden:
        """`forward` without the head, for a loss that applies it piece by piece."""
        check_call(self.config, self.dtype, tokens, cache, lengths, seq_idx, mtp_depths)
        check_hold(hold, cache, lengths)
        router: list[RouterStats] | None = [] if router_stats else None
        if cache is not None and hold is not None:
            with torch.no_grad():
                context = ForwardContext(cache.starts, router=router, hold=hold)
                hidden = self.backbone(tokens, cache.layers, context)
            cache.held = tokens.shape[1]
        elif cache is not None:
            with torch.no_grad():
                hidden = self._continue(tokens, cache, lengths, router)
        elif torch.is_grad_enabled() or seq_idx is not None or tokens.shape[1] <= segment(tokens):
            context = ForwardContext(lengths=lengths, seq_idx=seq_idx, router=router)
            hidden = self.backbone(tokens, None, context)
        else:
            cache = self.empty_cache(*tokens.shape)
            hidden = self._continue(tokens, cache, lengths, router)
        depths: list[Tensor] = []
        if mtp_depths:
            depths = self._look_ahead(hidden, tokens, seq_idx, mtp_depths, router)
        return Hidden(hidden, depths, router or [])

    def _continue(
        self,
        tokens: Int[Tensor, "b t"],
        cache: Cache,
        lengths: Int[Tensor, "b"] | None,
        router: list[RouterStats] | None,
    ) -> Float[Tensor, "b t d"]:
        """Take tokens in behind a cache, segment by segment."""
        total, longest = tokens.shape[1], segment(tokens)
        if total > longest and router is None:
            parts = []
            for start in range(0, total, longest):
                part = tokens[:, start : start + longest]
                real = None if lengths is None else (lengths - start).clamp(0, part.shape[1])
                parts.append(self._continue(part, cache, real, None))
            return torch.cat(parts, dim=1)
        hidden = self.backbone(
            tokens, cache.layers, ForwardContext(cache.starts, lengths, None, router)
        )
        cache.advance(total if lengths is None else lengths)
        return hidden

    def _look_ahead(
        self,
        hidden: Float[Tensor, "b t d"],
        tokens: Int[Tensor, "b t"],
        seq_idx: Int[Tensor, "b t"] | None,
        depths: int,
        router: list[RouterStats] | None,
    ) -> list[Tensor]:
        """Apply the MTP module `depths` times; each depth has one position fewer."""
        assert self.mtp is not None
        embedded, found = self.backbone.embed(tokens), []
        for depth in range(1, depths + 1):
            where = None if seq_idx is None else seq_idx[:, : tokens.shape[1] - depth]
            hidden = self.mtp(
                hidden[:, : tokens.shape[1] - depth],
                embedded[:, depth:],
                context=ForwardContext(seq_idx=where, router=router),
            )
            found.append(hidden)
        return found

    def head(self, hidden: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows v"]:
        """Logits in float32 (float64 for a float64 model)."""
        logits = self.lm_head(hidden)
        return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


@torch.no_grad()
def initialize(model: Nemotron) -> None:
    """Fresh weights from torch's global generator.

    Matrices are normal with `initializer_range`; those that write into the residual stream are
    divided by sqrt(layers), so that the sum of all layers starts at the scale of one. A is uniform
    in [1, 16]; dt_bias puts the first step sizes log-uniformly in [time_step_min, time_step_max].

    Source: reference sheet 1.6.
    """
    config = model.config
    std = config.initializer_range
    depth = math.sqrt(config.num_layers) if config.rescale_prenorm_residual else 1.0
    for module in model.modules():
        if isinstance(module, (RMSNorm, GatedRMSNorm)):
            module.weight.fill_(1)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, Router):
            nn.init.normal_(module.weight, std=std)
            module.e_score_correction_bias.zero_()
        elif isinstance(module, Experts):
            nn.init.normal_(module.up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std / (1.0 if config.moe_latent_size else depth))
        elif isinstance(module, Mamba2):
            module.A_log.uniform_(1, 16).log_()
            module.D.fill_(1)
            low, high = math.log(config.time_step_min), math.log(config.time_step_max)
            dt = module.dt_bias.uniform_(low, high).exp_().clamp_(min=config.time_step_floor)
            dt.add_(torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            module.conv1d.reset_parameters()
    for module in model.modules():
        for writer in _residual_writers(module):
            writer.weight.div_(depth)


def _residual_writers(module: nn.Module) -> list[nn.Linear]:
    """The matrices of a mixer whose output is added to the residual stream."""
    if isinstance(module, Mamba2):
        return [module.out_proj]
    if isinstance(module, Attention):
        return [module.o_proj]
    if isinstance(module, MLP):
        return [module.down_proj]
    if isinstance(module, MoE) and module.latent:
        return [module.fc2_latent_proj]
    return []
