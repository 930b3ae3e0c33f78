"""The model: embeddings, a string of residual layers, a final norm, and a head.

    x = Emb(tokens);   x = x + Mixer_l(RMSNorm_l(x))  for each layer l;   logits = W RMSNorm_f(x)

The pattern string of the config says which layer has which mixer. There are no position encodings:
the model knows the order of tokens from the Mamba layers and the causal mask. Embedding and head
are separate matrices. Parameters have the names of published checkpoints
(`backbone.layers.0.mixer.in_proj.weight`).

Without gradients a long input is read in segments, each of which continues the cache of the one
before. The result is the same up to rounding, and the memory needed for activations no longer grows
with the length.

Source: Nemotron 3 Super report section 2; reference sheet 1.4 and 1.6. Left out: dropout, tied
embeddings and logit caps, which the family does not use.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeVar, cast

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from nemotron_lite.arguments import integer, shown
from nemotron_lite.backbone import Backbone
from nemotron_lite.backends.private_torch import pass_to_export
from nemotron_lite.cache import MODEL_DTYPES, Cache, as_device
from nemotron_lite.config import NemotronConfig
from nemotron_lite.dtypes import widened
from nemotron_lite.input_checks import (
    check_call,
    check_draft,
    check_logits_to_keep,
    check_vocabulary,
    to_int64,
)
from nemotron_lite.input_files import parse_json
from nemotron_lite.layers import MTP, ForwardContext, Linear, Router, RouterStats
from nemotron_lite.outputs import Hidden, Output, last_tokens, refuse_backward

M = TypeVar("M", bound="Nemotron")

pass_to_export(Cache)  # `forward` says what to do instead

# Prefill segments: tokens per row that one pass of a long input without gradients reads.
SEGMENT = 2048
GPU_SEGMENT = 8192  # larger on a GPU: the rows are spread over 512 experts, and each needs many


def segment(tokens: Tensor) -> int:
    """Length of a prefill segment on the device of `tokens`."""
    return GPU_SEGMENT if tokens.is_cuda else SEGMENT


class Nemotron(nn.Module):
    """A hybrid Mamba-2, attention and LatentMoE language model.

    Args:
        config: its sizes.
        device, dtype: where and in what precision the weights are made. None takes PyTorch's
            defaults. The random numbers are drawn in float32, so all dtypes get the same weights.
        seed: makes the initial weights repeatable, -2^63 to 2^64 - 1. They are drawn from a
            generator of their own: other threads change nothing, and nothing changes for them.
            None draws from PyTorch's global generator.

    Raises:
        TypeError: a seed that is not an integer.
        ValueError: a seed out of range, an unknown device, or a dtype that models do not have.
    """

    def __init__(
        self,
        config: NemotronConfig,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        seed: SupportsIndex | None = None,
    ) -> None:
        super().__init__()
        if seed is not None:
            seed = integer("seed", seed, low=-(2**63), high=2**64 - 1)
        self.config = config
        self._prepared = False  # whether layers have copies for decoding
        self.tokenizer: Any = None  # a `tokenizers.Tokenizer` where `load` found one
        # Small files that belong to the model, by name: `load` reads them and `save` writes them
        # to a new folder (checkpoint/companions.py).
        self.companion_files: dict[str, bytes] = {}
        self.built_from = config  # `save` asks whether `config` was changed since
        device = as_device(device or torch.get_default_device())
        if dtype is not None and dtype not in MODEL_DTYPES:
            raise ValueError(f"dtype={dtype}: expected one of {', '.join(map(str, MODEL_DTYPES))}.")
        with torch.inference_mode(False):  # inference tensors could never be trained
            with torch.device("meta"):  # no memory and no random numbers until `init_weights`
                self.backbone = Backbone(config)
                self.lm_head = Linear(config.hidden_size, config.vocab_size)
                self.mtp = MTP(config) if config.mtp_pattern else None
            if device.type != "meta":
                self.float().to_empty(device=device)
                self.init_weights(
                    None if seed is None else torch.Generator(device).manual_seed(seed)
                )
            self.to(dtype or torch.get_default_dtype())

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights from `generator`, or from PyTorch's global one.

        Each layer initializes itself. Matrices are normal with `initializer_range`; those that
        write into the residual stream are divided by sqrt(layers), so that the sum of all layers
        has the scale of a single one.

        Source: reference sheet 1.6.
        """
        std = self.config.initializer_range
        scaled = self.config.rescale_prenorm_residual
        residual_divisor = math.sqrt(self.config.num_layers) if scaled else 1.0
        self.backbone.init_weights(std, residual_divisor, generator)
        self.lm_head.init_weights(std, generator=generator)
        if self.mtp is not None:
            self.mtp.init_weights(std, residual_divisor, generator)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Weights are ordinary tensors again, also when copied or unpickled in inference mode."""
        super().__setstate__(state)
        with torch.inference_mode(False), torch.no_grad():
            for module in self.modules():
                for name, weight in module._parameters.items():
                    if weight is not None and weight.is_inference():
                        copy = nn.Parameter(weight.clone(), requires_grad=weight.requires_grad)
                        module._parameters[name] = copy
                for name, buffer in module._buffers.items():
                    if buffer is not None and buffer.is_inference():
                        module._buffers[name] = buffer.clone()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._some_weight().device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._some_weight().dtype

    def _some_weight(self) -> Tensor:
        """The head's matrix; the first parameter where the head is an adapter or computes it."""
        weight = self.lm_head._parameters.get("weight")
        return next(self.parameters()) if weight is None else weight

    @property
    def generation_config(self) -> dict[str, Any]:
        """The fields of generation_config.json in `companion_files`; empty if there is none.

        A new dict at each call. To change a setting that `save` writes, replace the file:

            settings = model.generation_config | {"temperature": 0.6}
            model.companion_files["generation_config.json"] = json.dumps(settings).encode()

        Raises:
            ValueError: the file is no JSON object.
        """
        content = self.companion_files.get("generation_config.json")
        if content is None:
            return {}
        try:
            found = parse_json(content.decode("utf-8-sig"))
        except ValueError as error:
            raise ValueError(
                f'companion_files["generation_config.json"] is no readable JSON ({error}).'
            ) from error
        if not isinstance(found, dict):
            raise ValueError(
                f'companion_files["generation_config.json"] holds a {type(found).__name__}; '
                "expected an object."
            )
        return found

    @classmethod
    def from_pretrained(
        cls: type[M],
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        mtp: Literal["auto", "require", "drop"] = "auto",
        packed: bool = False,
        offload: bool = False,
        budget: SupportsIndex | None = None,
        progress: bool = False,
    ) -> M:
        """`nemotron_lite.load` under the name that transformers gives it; the same arguments.

        Called on a subclass, it returns a model of that class, made by `cls(config)`.
        """
        from nemotron_lite.checkpoint import Offload, load_as

        how = Offload.of(offload, budget, progress, device)
        return load_as(cls, path, dtype=dtype, device=device, mtp=mtp, packed=packed, offload=how)

    @classmethod
    def from_config(
        cls: type[M],
        config: NemotronConfig,
        *,
        weights: Literal["initial", "generated"] = "initial",
        seed: SupportsIndex | None = None,
        dtype: torch.dtype | None = None,
        packed: bool = False,
        budget: SupportsIndex | None = None,
        progress: bool = False,
    ) -> M:
        """A model of these sizes: `cls(config)`, or one whose weights are generated when used.

        With generated weights a model of any size runs in bounded memory, on a CPU: all 88 layers
        of Super in a few gigabytes. It has the times and the memory traffic of a real model, and it
        writes noise. `nemotron_lite.offload.generated` says what these weights are and are not.

        Args:
            config: its sizes.
            weights: "initial" makes an ordinary model; "generated" computes each weight from the
                seed at its use.
            seed: as for `Nemotron`; with generated weights None is 0.
            dtype: as for `Nemotron`; with generated weights None is bfloat16.
            packed: with generated weights, matrices in NVFP4.
            budget: with generated weights, bytes of weights in memory at most; None is 4 GiB.
            progress: with generated weights, report on stderr how many layers a call has run.

        Raises:
            TypeError: an argument of another kind.
            ValueError: unknown weights or dtype, a budget without room for the largest tensor, or
                an argument of generated weights for an ordinary model.
        """
        if weights == "initial":
            if packed or progress or budget is not None:
                raise ValueError(
                    'packed, budget and progress are for weights="generated"; weights="initial" '
                    "makes an ordinary model in memory."
                )
            return cls(config, dtype=dtype, seed=seed)
        if weights != "generated":
            raise ValueError(f'weights={shown(weights)}: expected "initial" or "generated".')
        from nemotron_lite.offload import generated_model

        return generated_model(
            cls, config, seed=seed, dtype=dtype, packed=packed, budget=budget, progress=progress
        )

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
        batch: SupportsIndex,
        capacity: SupportsIndex = 256,
        mtp: bool = False,
        *,
        ssm_dtype: torch.dtype | None = None,
        ssm_seed: SupportsIndex | None = 0,
    ) -> Cache:
        """`Cache.empty` for this model's sizes, device and dtype."""
        cache = Cache.empty(
            self.config,
            batch,
            capacity=capacity,
            mtp=mtp,
            device=self.device,
            dtype=self.dtype,
            ssm_dtype=ssm_dtype,
            ssm_seed=ssm_seed,
        )
        cache.checked_for = (self.config, self.dtype)
        return cache

    def prepare_for_decoding(self, smallest: int = 80_000) -> Nemotron:
        """Make decoding on a CPU faster: copy every projection into the layout oneDNN prefers.

        `generate` calls it where it pays. A step for one token, or for a few, then takes about half
        the time. The matrices (all but experts and embedding) are kept twice. If a weight changes
        afterwards, its copy is no longer used; the next call copies it again.

        Args:
            smallest: only copy matrices with at least that many numbers; for smaller ones the call
                of oneDNN costs more than it saves.

        Returns:
            The model itself.

        Raises:
            ValueError: weights that are not float32 on the CPU.
        """
        for module in self.modules():
            # A weight that a parametrization computes is not here, and is not asked for: asking
            # would compute it, and may change it.
            weight = module._parameters.get("weight")
            if isinstance(module, Linear) and weight is not None and weight.numel() >= smallest:
                module.prepare_for_decoding()
        self._prepared = True
        return self

    def _drop_prepared(self) -> None:
        """Drop every copy that `prepare_for_decoding` made; the losses read `lm_head.weight`."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.drop_prepared()
        self._prepared = False

    def forward(
        self,
        tokens: Integer[Tensor, "b t"],
        cache: Cache | None = None,
        *,
        lengths: Integer[Tensor, "b"] | None = None,
        seq_idx: Integer[Tensor, "b t"] | None = None,
        mtp_depths: SupportsIndex = 0,
        router_stats: bool = False,
        logits_to_keep: SupportsIndex = 0,
        draft: bool = False,
        apply_head: bool = True,
    ) -> Output | Hidden:
        """Logits for every token, or for the last ones of each row.

        Args:
            tokens: ids; rows that are shorter than t are padded on the right with any ids.
            cache: of the tokens before; advanced in place. With a cache no gradients are recorded:
                `backward()` from such logits raises a RuntimeError.
            lengths: real tokens in each row; all t when None.
            seq_idx: the document of each token, in rows of concatenated documents: nothing is
                carried from one document to the next.
            mtp_depths: how often to apply the MTP module (Super trains 2).
            router_stats: return each router's scores and choices.
            logits_to_keep: compute logits for the last n real tokens of each row only; 0 for all
                tokens. Prefill needs 1. The logits of a row end with its last real token. A row
                with fewer than n real tokens repeats the logits of its first token before them.
            draft: read a draft without advancing the cache. `cache.accept(counts)` then takes in
                its first `counts` tokens.
            apply_head: False returns what `forward_hidden` does.

        Under autocast the linear layers compute in its dtype. Cache and residual stream keep the
        dtype of the weights, so a cache can be continued outside of autocast, and the reverse.

        Raises:
            TypeError: an argument that is no tensor or no integer.
            ValueError: arguments that do not fit together; the message says which.
        """
        tokens = to_int64("tokens", tokens)
        lengths = None if lengths is None else to_int64("lengths", lengths)
        seq_idx = None if seq_idx is None else to_int64("seq_idx", seq_idx)
        depths = mtp_depths if type(mtp_depths) is int else integer("mtp_depths", mtp_depths)
        logits_to_keep = check_logits_to_keep(logits_to_keep, tokens)
        found = self._hidden(
            tokens, cache, lengths, seq_idx, depths, router_stats=router_stats, draft=draft
        )
        if not apply_head:
            return found
        logits = self.head(last_tokens(found.hidden, lengths, logits_to_keep))
        if cache is not None and logits.requires_grad and not torch.compiler.is_compiling():
            logits = refuse_backward(logits)
        return Output(
            found.hidden,
            found.mtp_hidden,
            found.router,
            logits=logits,
            mtp_logits=[self.head(h) for h in found.mtp_hidden],
        )

    if TYPE_CHECKING:  # torch says that a call of a module may return anything

        def __call__(
            self,
            tokens: Tensor,
            cache: Cache | None = None,
            *,
            lengths: Tensor | None = None,
            seq_idx: Tensor | None = None,
            mtp_depths: SupportsIndex = 0,
            router_stats: bool = False,
            logits_to_keep: SupportsIndex = 0,
            draft: bool = False,
        ) -> Output:
            """`forward` with the head, and the hooks on the model."""

    def forward_hidden(
        self,
        tokens: Integer[Tensor, "b t"],
        cache: Cache | None = None,
        *,
        lengths: Integer[Tensor, "b"] | None = None,
        seq_idx: Integer[Tensor, "b t"] | None = None,
        mtp_depths: SupportsIndex = 0,
        router_stats: bool = False,
        draft: bool = False,
    ) -> Hidden:
        """`forward` without the head, for a loss that applies the head piece by piece.

        It is a call of the model: hooks on the model run, and a model that was compiled in place
        (`model.compile()`) runs compiled.
        """
        options: dict[str, Any] = dict(
            lengths=lengths,
            seq_idx=seq_idx,
            mtp_depths=mtp_depths,
            router_stats=router_stats,
            draft=draft,
        )
        return cast(Hidden, nn.Module.__call__(self, tokens, cache, apply_head=False, **options))

    def _hidden(
        self,
        tokens: Tensor,
        cache: Cache | None,
        lengths: Tensor | None,
        seq_idx: Tensor | None,
        mtp_depths: int,
        *,
        router_stats: bool,
        draft: bool,
    ) -> Hidden:
        if cache is not None and torch.compiler.is_exporting():
            raise ValueError(
                "torch.export cannot follow a cache that a model changes in place: export "
                "nemotron_lite.generation.decode_step.DecodeStep(model), which takes and returns "
                "the cache as tensors."
            )
        if self._prepared and torch.is_grad_enabled():  # an optimizer step may follow
            self._drop_prepared()
        check_call(self.config, self.dtype, tokens, cache, lengths, seq_idx, mtp_depths)
        if draft:
            check_draft(cache, lengths)
        stats: list[RouterStats] | None = [] if router_stats else None
        if cache is not None and draft:
            with torch.no_grad():
                context = ForwardContext(cache.starts, draft=True, router_stats=stats)
                hidden = self.backbone(tokens, cache.layers, context)
            cache.draft_length = tokens.shape[1]
        elif cache is not None:
            with torch.no_grad():
                hidden = self._continue(tokens, cache, lengths, stats)
        elif torch.is_grad_enabled() or seq_idx is not None or tokens.shape[1] <= segment(tokens):
            context = ForwardContext(lengths=lengths, seq_idx=seq_idx, router_stats=stats)
            hidden = self.backbone(tokens, None, context)
        else:
            cache = self.empty_cache(*tokens.shape)
            hidden = self._continue(tokens, cache, lengths, stats)
        depths = self._apply_mtp(hidden, tokens, seq_idx, stats, mtp_depths) if mtp_depths else []
        # A copy: if a backward pass computes layers again, their routers append to `stats` again.
        return Hidden(hidden, depths, list(stats or []))

    def _continue(
        self,
        tokens: Int[Tensor, "b t"],
        cache: Cache,
        lengths: Int[Tensor, "b"] | None,
        stats: list[RouterStats] | None,
    ) -> Float[Tensor, "b t d"]:
        """Read tokens after a cache, segment by segment; in one pass for router statistics."""
        total, longest = tokens.shape[1], segment(tokens)
        if total > longest and stats is None:
            check_vocabulary(self.config, tokens)
            parts = []
            for start in range(0, total, longest):
                part = tokens[:, start : start + longest]
                real = None if lengths is None else (lengths - start).clamp(0, part.shape[1])
                parts.append(self._continue(part, cache, real, None))
            return torch.cat(parts, dim=1)
        context = ForwardContext(cache.starts, lengths, router_stats=stats)
        hidden = self.backbone(tokens, cache.layers, context)
        cache.advance(total if lengths is None else lengths)
        return hidden

    def _apply_mtp(
        self,
        hidden: Float[Tensor, "b t d"],
        tokens: Int[Tensor, "b t"],
        seq_idx: Int[Tensor, "b t"] | None,
        stats: list[RouterStats] | None,
        depths: int,
    ) -> list[Tensor]:
        """Apply the MTP module `depths` times; each depth has one position fewer."""
        assert self.mtp is not None
        embedded = self.backbone.embed(tokens)
        found: list[Tensor] = []
        for depth in range(1, depths + 1):
            count = tokens.shape[1] - depth
            documents = None if seq_idx is None else seq_idx[:, :count]
            context = ForwardContext(seq_idx=documents, router_stats=stats)
            hidden = self.mtp(hidden[:, :count], embedded[:, depth:], context=context)
            found.append(hidden)
        return found

    def head(self, hidden: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows v"]:
        """Logits in float32 (float64 for a float64 model)."""
        return widened(self.lm_head(hidden))
