"""The Mamba-2 mixer: it mixes tokens along time, and its cache does not grow.

    z | xBC | dt  =  W_in u                    one matrix, three parts of its output
    xBC           =  silu(causal_conv(xBC))    each channel sees its last k inputs
    x | B | C     =  xBC
    dt            =  softplus(dt + dt_bias)    one step size per head
    S_t           =  exp(dt_t A) S_{t-1} + dt_t x_t (x) B_t,     A = -exp(A_log) < 0
    y_t           =  S_t C_t + D x_t
    out           =  W_out  norm(y * silu(z))  gate first, one norm per group

dt is not clamped (`time_step_limit` is (0, inf) in every Nemotron 3 model). transformers clamps it
in prefill and not in decode, so its prefill and its decode disagree for small steps.

The cache of a sequence is the last k-1 inputs of the convolution and one matrix S of p x n per
head, however long the sequence is. Padding on the right of a row must change neither. So dt = 0 for
padding, which leaves S as it is, and the inputs of the convolution are taken from before the row's
last real token.

A draft is read without changing the cache. Afterwards `MambaCache.accept` computes the state after
the accepted tokens from x, dt and B of the draft (ops/draft_scan.py).

The projections have biases only where a config asks for them (`use_bias`).

Source: Mamba-2 (arXiv 2405.21060); reference sheet section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron_lite import ops
from nemotron_lite.backends import cpu_norm
from nemotron_lite.backends.compiled_step import (
    LinearStruct,
    MambaStruct,
    NotCompiledError,
    StateStruct,
    address,
)
from nemotron_lite.config import NemotronConfig
from nemotron_lite.dtypes import cast, widened
from nemotron_lite.layers.context import ForwardContext
from nemotron_lite.layers.conv import CausalConv1d
from nemotron_lite.layers.linear import linear
from nemotron_lite.layers.mixer import (
    WIDE_DTYPE,
    CacheOptions,
    CompiledCall,
    LayerCache,
    LedgerLine,
    Matrix,
    Mixer,
    SavedLayer,
    SavedSizes,
    TokenStep,
    ordinary_tensors,
)
from nemotron_lite.ops.conv import plain_step
from nemotron_lite.ops.scan import cpu_step, step_sizes


class MambaDraft:
    """A draft of t tokens that a Mamba layer has read and not yet taken into its cache.

    `window` holds the k-1 inputs of the convolution before the draft and the t inputs of the draft:
    the inputs after c tokens are a slice of it. `inputs` are x, dt, A and B of the draft's tokens,
    and `decays` come from `ops.draft_decays`: with them the SSM state after c tokens is computed.
    """

    def __init__(
        self,
        window: Float[Tensor, "b s c"],
        inputs: tuple[Tensor, Tensor, Tensor, Tensor],
        decays: tuple[Tensor, Tensor],
    ) -> None:
        self.window, self.inputs, self.decays = window, inputs, decays

    @property
    def nbytes(self) -> int:
        """Bytes kept beside the cache itself."""
        return sum(part.nbytes for part in (self.window, *self.inputs, *self.decays))

    def conv_after(
        self, counts: int | Int[Tensor, "b"], length: int
    ) -> Float[Tensor, "b length c"]:
        """The last `length` inputs of the convolution after the first `counts` tokens."""
        if isinstance(counts, int):
            return self.window[:, counts : counts + length]
        places = counts[:, None] + torch.arange(length, device=counts.device)
        width = self.window.shape[2]
        return self.window.gather(1, places.unsqueeze(-1).expand(-1, -1, width))

    def state_after(
        self, state: Float[Tensor, "b h p n"], counts: int | Int[Tensor, "b"]
    ) -> Float[Tensor, "b h p n"]:
        """The SSM state after the first `counts` tokens, from the one before. May overwrite it."""
        return ops.ssd_accept_draft(state, *self.inputs, counts, decays=self.decays)


class MambaCache(LayerCache):
    """The cache of one Mamba layer: `conv` b k-1 c in the model's dtype, `ssm` b h p n.

    `draft` is a draft that waits for `accept`. `rounding_seeds` are the seeds of the stochastic
    rounding of a float16 state; None for a state in float32 or float64.
    """

    TENSORS = ("conv", "ssm")

    def __init__(
        self,
        conv: Float[Tensor, "b km1 c"],
        ssm: Float[Tensor, "b h p n"],
        rounding_seeds: ops.RoundingSeeds | None = None,
    ) -> None:
        self.conv, self.ssm, self.rounding_seeds = conv, ssm, rounding_seeds
        self.draft: MambaDraft | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Inputs and channels of the convolution; heads, head width and state size."""
        return (*self.conv.shape[1:], *self.ssm.shape[1:])

    @property
    def draft_nbytes(self) -> int:
        """Bytes kept for a draft."""
        return 0 if self.draft is None else self.draft.nbytes

    @ordinary_tensors
    def clone(self) -> MambaCache:
        """A copy without the draft. A float16 copy rounds its next states as this one would."""
        seeds = None if self.rounding_seeds is None else replace(self.rounding_seeds)
        return MambaCache(self.conv.clone(), self.ssm.clone(), seeds)

    def read_state(self) -> Float[Tensor, "b h p n"]:
        """The state for arithmetic: itself, or a float32 copy of a float16 state."""
        return self.ssm if self.rounding_seeds is None else self.ssm.float()

    def write_state(self, ssm: Float[Tensor, "b h p n"]) -> None:
        """Keep a new state; a float16 cache rounds it."""
        if self.rounding_seeds is None:
            ssm = ssm.to(self.ssm.dtype)
        else:
            ssm = ops.round_to_float16(ssm.float(), self.rounding_seeds.next())
        # Later steps change the state in place, in any mode. A compiler cannot ask for the mode.
        if torch.compiler.is_compiling() or ssm.is_inference():
            self.ssm.copy_(ssm)
        else:
            self.ssm = ssm

    def write_conv(self, conv: Float[Tensor, "b km1 c"]) -> None:
        """Keep new inputs of the convolution, in the dtype of the cache."""
        self.conv = cast(conv, self.conv.dtype)

    def next_seed(self) -> int | None:
        """The seed of the rounding, for a step that writes the state itself."""
        return None if self.rounding_seeds is None else self.rounding_seeds.next()

    def accept(self, counts: int | Int[Tensor, "b"]) -> None:
        """Take in the first `counts` tokens of the draft and drop the others.

        With 0 for all rows nothing is written and no rounding seed is used. So a float16 cache
        continues exactly as if it had not read the draft.
        """
        draft, self.draft = self.draft, None
        assert draft is not None
        if isinstance(counts, int) and counts == 0:
            return
        if not isinstance(counts, int):
            counts = counts.to(self.conv.device)
        self.write_conv(draft.conv_after(counts, self.conv.shape[1]))
        self.write_state(draft.state_after(self.read_state(), counts))

    def reserve(self, tokens: int) -> None:
        """Nothing to do: this cache does not grow."""

    def saved_extra(self) -> dict[str, Any] | None:
        """The rounding seeds, so that a loaded cache rounds as if it had not been saved."""
        if self.rounding_seeds is None:
            return None
        return {"rounding_seeds": asdict(self.rounding_seeds)}

    @classmethod
    def check_saved(cls, saved: SavedLayer) -> SavedSizes:
        """Inputs of the convolution, a state, and rounding seeds if the state is in float16."""
        (conv, dtype), (ssm, state_dtype) = saved.stored["conv"], saved.stored["ssm"]
        fits = len(conv) == 3 and len(ssm) == 4 and conv[0] == ssm[0] == saved.rows
        wanted = WIDE_DTYPE.get(dtype) if saved.extra is None else "F16"
        if not fits or not all((conv[2], *ssm)) or dtype not in WIDE_DTYPE or state_dtype != wanted:
            raise saved.misfit()
        seed = None if saved.extra is None else _saved_seeds(saved.extra, saved.layer).seed
        return SavedSizes(dtype, (*conv[1:], *ssm[1:]), (state_dtype, seed))

    @classmethod
    def from_saved(
        cls, tensors: Mapping[str, Tensor], extra: Mapping[str, Any] | None
    ) -> MambaCache:
        """Buffers as they were saved, with the rounding seeds that go with them."""
        seeds = None if extra is None else ops.RoundingSeeds(**extra["rounding_seeds"])
        return cls(tensors["conv"], tensors["ssm"], seeds)


def _saved_seeds(extra: Mapping[str, Any], layer: int) -> ops.RoundingSeeds:
    """The rounding seeds in a file.

    Raises:
        ValueError: other fields, types or ranges than those that `saved_extra` gives.
    """
    seeds = extra.get("rounding_seeds")
    if set(extra) != {"rounding_seeds"} or not isinstance(seeds, dict):
        raise ValueError(f"layer {layer} has no readable rounding seeds")
    seed, writes = seeds.get("seed"), seeds.get("writes")
    if (
        set(seeds) != {"seed", "layer", "writes"}
        or not (seed is None or (type(seed) is int and 0 <= seed < 2**64))
        or type(seeds["layer"]) is not int
        or seeds["layer"] != layer
        or type(writes) is not int
        or not 0 <= writes < 2**62
    ):
        raise ValueError(f"layer {layer} has rounding seeds out of range: {str(seeds)[:80]}")
    return ops.RoundingSeeds(**seeds)


class GatedRMSNorm(nn.Module):
    """`ops.gated_rms_norm` with a learned scale per channel."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(size))

    def init_weights(self) -> None:
        """Start with scales of one."""
        self.weight.fill_(1)

    def forward(
        self, y: Float[Tensor, "*rows c"], z: Float[Tensor, "*rows c"]
    ) -> Float[Tensor, "*rows c"]:
        """Gate y with silu(z), then normalize."""
        return ops.gated_rms_norm(y, z, self.weight, self.groups, self.eps)


class Mamba2(Mixer):
    """Projections, convolution, scan and gated norm of one Mamba-2 layer."""

    LETTERS: ClassVar[Mapping[str, str]] = {
        "h": "mamba_num_heads",
        "p": "mamba_head_dim",
        "n": "ssm_state_size",
        "g": "n_groups",
        "k": "conv_kernel",
    }
    CACHE = MambaCache

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__()
        heads, inner = config.mamba_num_heads, config.mamba_inner_size
        self.head_dim = config.mamba_head_dim
        self.groups, self.state_size = config.n_groups, config.ssm_state_size
        self.dt_limit = config.time_step_limit
        self.clamps_dt = config.time_step_limit != (0.0, math.inf)
        self.initial_dt = (config.time_step_min, config.time_step_max, config.time_step_floor)
        self.splits = (inner, config.conv_dim, heads)
        self.in_proj = linear(config.hidden_size, config.mamba_in_proj_size, config.use_bias)
        self.conv1d = CausalConv1d(config.conv_dim, config.conv_kernel, config.use_conv_bias)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.norm = GatedRMSNorm(inner, config.n_groups, config.norm_eps)
        self.out_proj = linear(inner, config.hidden_size, config.use_bias)

    def init_weights(
        self, std: float, residual_divisor: float, generator: torch.Generator | None = None
    ) -> None:
        """Normal matrices, and rates A and step sizes dt that cover short and long memories.

        A is uniform in [1, 16]; dt_bias makes the first step sizes log-uniform in [time_step_min,
        time_step_max]. `out_proj` writes into the residual stream.
        """
        self.A_log.uniform_(1, 16, generator=generator).log_()
        self.D.fill_(1)
        low, high, floor = self.initial_dt
        dt = self.dt_bias.uniform_(math.log(low), math.log(high), generator=generator)
        dt = dt.exp_().clamp_(min=floor)
        dt.add_(torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        # As nn.Conv1d.reset_parameters does it, which takes no generator.
        nn.init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5), generator=generator)
        if self.conv1d.bias is not None:
            bound = 1 / math.sqrt(self.conv1d.kernel_size[0])
            nn.init.uniform_(self.conv1d.bias, -bound, bound, generator=generator)
        self.in_proj.init_weights(std, generator=generator)
        self.norm.init_weights()
        self.out_proj.init_weights(std, residual_divisor, generator)

    def forward(
        self,
        u: Float[Tensor, "b t d"],
        cache: MambaCache | None = None,
        context: ForwardContext = ForwardContext(),
    ) -> Float[Tensor, "b _ d"]:
        """Mix along time; with `cache`, continue from it and leave the new state there."""
        if cache is not None and context.draft:
            return self._read_draft(u, cache, context)
        if cache is not None and context.lengths is None and u.shape[1] == 1:
            return self._step(u, cache)
        z, xBC, dt = self.in_proj(u).split_with_sizes(self.splits, dim=-1)
        xBC, conv = self.conv1d(xBC, None if cache is None else cache.conv, context)
        x, B, C = self._split_heads(xBC)
        dt, to_steps = self._raw_steps(dt)
        real = context.real_tokens(u)
        if real is not None:  # padding gets a step size of zero
            dt = dt.masked_fill(~real.unsqueeze(-1), -math.inf if to_steps else 0.0)
        y, ssm = ops.ssd(
            x,
            dt,
            self._rates(),
            B,
            C,
            D=self.D,
            initial_state=None if cache is None else cache.read_state(),
            seq_idx=context.seq_idx,
            **to_steps,
        )
        if cache is not None:
            cache.write_conv(conv)
            cache.write_state(ssm)
        return self.out_proj(context.kept(self.norm(y.flatten(2), z)))

    def _step(self, u: Float[Tensor, "b 1 d"], cache: MambaCache) -> Float[Tensor, "b 1 d"]:
        """One token per row: one step of the recurrence, without a time axis."""
        parts = self.in_proj, self.conv1d, ops.ssd_step, self.norm, self.out_proj
        return self._one_token(u[:, 0], cache, *parts).unsqueeze(1)

    def _one_token(
        self,
        u: Float[Tensor, "b d"],
        cache: MambaCache,
        in_proj: Callable[..., Tensor],
        conv: Callable[..., tuple[Tensor, Tensor]],
        scan: Callable[..., tuple[Tensor, Tensor]],
        norm: Callable[..., Tensor],
        out_proj: Callable[..., Tensor],
    ) -> Float[Tensor, "b d"]:
        """The step itself, with the parts of the layer as modules or as functions."""
        z, xBC, dt = in_proj(u).split_with_sizes(self.splits, dim=-1)
        xBC, cache.conv = conv(xBC, cache.conv)
        x, B, C = self._split_heads(xBC)
        dt, to_steps = self._raw_steps(dt)
        y, cache.ssm = scan(
            cache.ssm, x, dt, self._rates(), B, C, D=self.D, seed=cache.next_seed(), **to_steps
        )
        return out_proj(norm(y.flatten(1), z))

    def token_step(self, rows: int) -> TokenStep:
        """`_one_token` with functions."""
        taps, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        scales, groups, eps = self.norm.weight, self.norm.groups, self.norm.eps

        def conv(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return plain_step(state, x, taps, bias)

        def norm(y: Tensor, z: Tensor) -> Tensor:
            return cpu_norm.gated_rms_norm(y, z, scales, groups, eps)

        into, out = self.in_proj.product_for(rows), self.out_proj.product_for(rows)
        one_token = self._one_token
        return lambda u, cache, starts: one_token(u, cache, into, conv, cpu_step, norm, out)

    def compiled_part(self) -> MambaStruct:
        """The whole mixer; without a limit on dt, the limits are 0 and infinity."""
        conv = self.conv1d
        return MambaStruct(
            LinearStruct.of(self.in_proj), LinearStruct.of(self.out_proj),
            address(conv.weight), None if conv.bias is None else address(conv.bias),
            *map(address, (self.A_log, self.D, self.dt_bias, self.norm.weight)),
            self.splits[2], self.head_dim, self.groups, self.state_size, conv.weight.shape[2],
            self.norm.eps, *self.dt_limit,
        )  # fmt: skip

    def compiled_state(
        self, part: MambaStruct, state: StateStruct, cache: MambaCache, call: CompiledCall
    ) -> Callable[[], None] | None:
        """Inputs of the convolution and state, both changed in place unless a draft is read."""
        if cache.ssm.dtype != torch.float32 or cache.conv.dtype != call.dtype:
            raise NotCompiledError(
                f"states are in {cache.ssm.dtype} and inputs of the convolution in "
                f"{cache.conv.dtype}: expected float32 and {call.dtype}"
            )
        cache.conv = cache.conv.contiguous()
        state.first, state.second = address(cache.conv), address(cache.ssm)
        if not call.draft:
            state.window = None
            return None
        b, t, g, n = call.rows, call.tokens, self.groups, self.state_size
        window = cache.conv.new_empty(b, cache.conv.shape[1] + t, cache.conv.shape[2])
        x = cache.conv.new_empty(b, t, self.splits[2], self.head_dim)
        B = cache.conv.new_empty(b, t, g, n)
        dt = cache.ssm.new_empty(b, t, self.splits[2])
        state.window, state.x, state.B, state.dt = map(address, (window, x, B, dt))

        def keep() -> None:
            A = self._rates()
            decays = ops.draft_decays(dt, A, cache.ssm.dtype)
            cache.draft = MambaDraft(window, (x, dt, A, B), decays)

        return keep

    def _read_draft(
        self, u: Float[Tensor, "b t d"], cache: MambaCache, context: ForwardContext
    ) -> Float[Tensor, "b t d"]:
        """Read a draft; the state stays as it is, and `cache.draft` gets what `accept` needs."""
        z, xBC, dt = self.in_proj(u).split_with_sizes(self.splits, dim=-1)
        xBC, window = self.conv1d(xBC, cache.conv, context)
        x, B, C = self._split_heads(xBC)
        dt, A, state = self._step_sizes(dt), self._rates(), cache.read_state()
        decays = ops.draft_decays(dt, A, state.dtype)
        y = ops.ssd_read_draft(state, x, dt, A, B, C, D=self.D, decays=decays)
        cache.draft = MambaDraft(window, (x, dt, A, B), decays)
        return self.out_proj(self.norm(y.flatten(2), z))

    def _split_heads(self, xBC: Float[Tensor, "*bt c"]) -> tuple[Tensor, Tensor, Tensor]:
        """x `*bt h p`, B and C `*bt g n`."""
        shared = self.groups * self.state_size
        x, B, C = xBC.split_with_sizes((self.splits[0], shared, shared), dim=-1)
        each, shape = xBC.shape[:-1], (self.groups, self.state_size)
        return (
            x.view(*each, self.splits[2], self.head_dim),
            B.view(*each, *shape),
            C.view(*each, *shape),
        )

    def _raw_steps(self, dt: Float[Tensor, "*bt h"]) -> tuple[Tensor, dict[str, Any]]:
        """dt, and the arguments with which the scan converts it to step sizes inside its kernel.

        Where step sizes are clamped, they are computed here instead.
        """
        if self.clamps_dt:
            return self._step_sizes(dt), {}
        return dt, {"dt_bias": self.dt_bias, "dt_softplus": True}

    def _step_sizes(self, dt: Float[Tensor, "*bt h"]) -> Float[Tensor, "*bt h"]:
        """softplus(dt + bias) in float32 or better."""
        dt = step_sizes(dt, self.dt_bias, dt_softplus=True)
        return dt.clamp(*self.dt_limit) if self.clamps_dt else dt

    def _rates(self) -> Float[Tensor, "h"]:
        """A: how fast each head forgets, negative."""
        rates = torch.exp(widened(self.A_log))
        return -rates if rates.requires_grad else rates.neg_()

    @classmethod
    @ordinary_tensors
    def empty_cache(cls, config: NemotronConfig, layer: int, options: CacheOptions) -> MambaCache:
        """Zeros: no inputs of the convolution, and an empty state."""
        o, heads = options, config.mamba_num_heads
        conv = torch.zeros(
            o.batch, config.conv_kernel - 1, config.conv_dim, dtype=o.dtype, device=o.device
        )
        ssm = torch.zeros(
            o.batch,
            heads,
            config.mamba_head_dim,
            config.ssm_state_size,
            dtype=o.ssm_dtype,
            device=o.device,
        )
        half = o.ssm_dtype == torch.float16
        return MambaCache(conv, ssm, ops.RoundingSeeds(o.ssm_seed, layer) if half else None)

    @classmethod
    def parameter_lines(cls, config: NemotronConfig) -> list[LedgerLine]:
        """Its parameters. The convolution has k taps and perhaps a bias for each channel."""
        conv = "(k + 1) * (h*p + 2*g*n)" if config.use_conv_bias else "k * (h*p + 2*g*n)"
        biases = LedgerLine("biases of the projections", "2*h*p + 2*g*n + h + d")
        return [
            LedgerLine("in_proj", "d * (2*h*p + 2*g*n + h)"),
            LedgerLine("conv1d", conv),
            LedgerLine("A_log, D, dt_bias", "3 * h"),
            LedgerLine("norm", "h*p"),
            LedgerLine("out_proj", "h*p * d"),
            *([biases] if config.use_bias else []),
        ]

    @classmethod
    def flop_lines(cls, config: NemotronConfig, mode: str) -> list[LedgerLine]:
        """Its FLOPs per token: a chunked scan, or one step of the recurrence in decode.

        In a chunked scan a token reads w positions of its chunk, and the prompt has c chunks.
        """
        if mode == "decode":
            # Decay, outer product and sum are three; the product with C is a multiply-add.
            scan = [LedgerLine("scan: one step", "3*h*p*n + 2*h*p*n")]
        else:
            scan = [
                LedgerLine("scan: within chunks", "2*(g*n + h*p) * w"),
                LedgerLine("scan: write and read states", "2*h*p*n + 2*h*p*n"),
                LedgerLine("scan: carry states", "2*h*p*n * c/t"),
            ]
        return [
            LedgerLine("in_proj", "2*d * (2*h*p + 2*g*n + h)"),
            LedgerLine("conv1d", "2*k * (h*p + 2*g*n)"),
            *scan,
            LedgerLine("out_proj", "2*h*p * d"),
        ]

    @classmethod
    def cache_lines(cls, config: NemotronConfig) -> list[LedgerLine]:
        """The same for every length: inputs of the convolution, and the state."""
        return [LedgerLine("conv", "(k - 1) * (h*p + 2*g*n)"), LedgerLine("ssm", "h*p*n")]

    @classmethod
    def matrices(cls, config: NemotronConfig) -> list[Matrix]:
        """The two projections. They have roles of their own: Super trains them in two formats."""
        d = config.hidden_size
        return [
            Matrix("in_proj", "mamba.in_proj", d * config.mamba_in_proj_size),
            Matrix("out_proj", "mamba.out_proj", config.mamba_inner_size * d),
        ]
