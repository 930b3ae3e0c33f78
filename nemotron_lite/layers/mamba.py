"""The Mamba-2 mixer: a token mixer whose memory does not grow.

    z | xBC | dt  =  W_in u                    one matrix, three readings
    xBC           =  silu(causal_conv(xBC))    each channel sees its last k inputs
    x | B | C     =  xBC
    dt            =  softplus(dt + dt_bias)    one step size per head
    S_t           =  exp(dt_t A) S_{t-1} + dt_t x_t (x) B_t,     A = -exp(A_log) < 0
    y_t           =  S_t C_t + D x_t
    out           =  W_out  norm(y * silu(z))  gate first, one norm per group

dt is not clamped (`time_step_limit` is (0, inf) in every Nemotron 3 model); transformers clamps it
in prefill and not in decode, so that its two paths disagree for small steps.

What a sequence leaves behind is the last k-1 inputs of the convolution and one matrix S of p x n
per head, however long it was. Padding to the right of a row must touch neither: dt = 0 there leaves
S as it is, and the convolution's state is read off at the row's last real token.

Source: Mamba-2 (arXiv 2405.21060); reference sheet section 2. Left out: biases on the projections.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron_lite import ops
from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers.context import ForwardContext
from nemotron_lite.layers.linear import Linear
from nemotron_lite.ops.scan import step_sizes


class Held:
    """A draft of t tokens that a Mamba layer has read and not yet taken in.

    `window` holds the k-1 inputs of the convolution before the draft and the t of the draft: the
    inputs after c tokens are a slice of it. For the state there is either what a replay needs, or
    `slots`: the state before the draft and after each of its tokens.
    """

    def __init__(
        self,
        window: Float[Tensor, "b s c"],
        inputs: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
        decays: tuple[Tensor, Tensor] | None = None,
        slots: Float[Tensor, "t1 b h p n"] | None = None,
    ) -> None:
        self.window, self.inputs, self.decays, self.slots = window, inputs, decays, slots

    @property
    def nbytes(self) -> int:
        """Bytes kept beside the memory itself."""
        slots = () if self.slots is None else (self.slots,)
        parts = (self.window, *(self.inputs or ()), *(self.decays or ()), *slots)
        return sum(part.nbytes for part in parts)


class MambaCache:
    """What one Mamba layer remembers: `conv` b k-1 c in the model's dtype, `ssm` b h p n.

    `held` is a draft that waits for `keep`. `dither` holds the random bits of a state in float16.
    """

    def __init__(
        self,
        conv: Float[Tensor, "b km1 c"],
        ssm: Float[Tensor, "b h p n"],
        dither: ops.RoundingSeeds | None = None,
    ) -> None:
        self.conv, self.ssm, self.dither = conv, ssm, dither
        self.held: Held | None = None

    def clone(self) -> MambaCache:
        """A copy without the draft, which will round as this one would."""
        dither = None if self.dither is None else replace(self.dither)
        return MambaCache(self.conv.clone(), self.ssm.clone(), dither)

    def read(self) -> Float[Tensor, "b h p n"]:
        """The state for arithmetic: itself, or a copy in float32 of one in float16."""
        return self.ssm if self.dither is None else self.ssm.float()

    def write(self, ssm: Float[Tensor, "b h p n"]) -> None:
        """Keep a new state, rounded where this one is in float16."""
        if self.dither is None:
            self.ssm = ssm.to(self.ssm.dtype)
        else:
            self.ssm = ops.round_to_float16(ssm.float(), self.dither.next())

    def seed(self) -> int | None:
        """The bits for a step that writes the state itself."""
        return None if self.dither is None else self.dither.next()

    def keep(self, counts: int | Int[Tensor, "b"]) -> None:
        """Take in the first `counts` tokens of the draft, and forget the others."""
        held, self.held = self.held, None
        assert held is not None
        before = self.conv.shape[1]
        if isinstance(counts, int):
            self.conv = held.window[:, counts : counts + before]
        else:
            counts = counts.to(self.conv.device)
            places = counts[:, None] + torch.arange(before, device=counts.device)
            width = held.window.shape[2]
            self.conv = held.window.gather(1, places.unsqueeze(-1).expand(-1, -1, width))
        if held.slots is None:
            assert held.inputs is not None
            self.write(ops.ssd_accept_draft(self.read(), *held.inputs, counts, decays=held.decays))
        elif isinstance(counts, int):
            self.ssm.copy_(held.slots[counts])
        else:
            self.ssm.copy_(held.slots[counts, torch.arange(len(counts), device=counts.device)])


class GatedRMSNorm(nn.Module):
    """`ops.gated_rms_norm` with a learned scale per channel."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(
        self, y: Float[Tensor, "*rows c"], z: Float[Tensor, "*rows c"]
    ) -> Float[Tensor, "*rows c"]:
        """Gate y with silu(z), then normalise."""
        return ops.gated_rms_norm(y, z, self.weight, self.groups, self.eps)


class Mamba2(nn.Module):
    """Projections, convolution, scan and gated norm of one Mamba-2 layer."""

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__()
        heads, inner = config.mamba_num_heads, config.mamba_inner_size
        self.head_dim = config.mamba_head_dim
        self.groups, self.state_size = config.n_groups, config.ssm_state_size
        self.dt_limit = config.time_step_limit
        self.clamps_dt = config.time_step_limit != (0.0, math.inf)
        self.splits = (inner, config.conv_dim, heads)
        self.in_proj = Linear(config.hidden_size, config.mamba_in_proj_size)
        # Holds the taps under their published name and shape; `ops.causal_conv1d` does the work.
        self.conv1d = nn.Conv1d(
            config.conv_dim, config.conv_dim, config.conv_kernel,
            groups=config.conv_dim, bias=config.use_conv_bias,
        )  # fmt: skip
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.norm = GatedRMSNorm(inner, config.n_groups, config.norm_eps)
        self.out_proj = Linear(inner, config.hidden_size)

    def forward(
        self,
        u: Float[Tensor, "b t d"],
        cache: MambaCache | None = None,
        context: ForwardContext = ForwardContext(),
    ) -> Float[Tensor, "b t d"]:
        """Mix along time; with `cache`, continue from it and leave the new memory there."""
        if (
            cache is not None
            and context.hold is None
            and context.lengths is None
            and u.shape[1] == 1
        ):
            return self._step(u, cache)
        if cache is not None and context.hold is not None:
            return self._hold(u, cache, context.hold)
        z, xBC, dt = self.in_proj(u).split_with_sizes(self.splits, dim=-1)
        xBC, conv = ops.causal_conv1d(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_state=None if cache is None else cache.conv,
            seq_idx=context.seq_idx,
            lengths=context.lengths,
        )
        x, B, C = self._split_heads(xBC)
        dt, to_steps = self._raw_steps(dt)
        real = context.real(u)
        if real is not None:  # what becomes a step of zero
            dt = dt.masked_fill(~real.unsqueeze(-1), -math.inf if to_steps else 0.0)
        y, ssm = ops.ssd(
            x, dt, self._rates(), B, C,
            D=self.D,
            initial_state=None if cache is None else cache.read(),
            seq_idx=context.seq_idx,
            **to_steps,
        )  # fmt: skip
        if cache is not None:
            cache.conv = conv
            cache.write(ssm)
        return self.out_proj(self.norm(y.flatten(2), z))

    def _step(self, u: Float[Tensor, "b 1 d"], cache: MambaCache) -> Float[Tensor, "b 1 d"]:
        """One token: no scan, and no time axis until the end."""
        z, xBC, dt = self.in_proj(u[:, 0]).split_with_sizes(self.splits, dim=-1)
        xBC, cache.conv = ops.causal_conv1d_step(
            cache.conv, xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias
        )
        x, B, C = self._split_heads(xBC)
        dt, to_steps = self._raw_steps(dt)
        y, cache.ssm = ops.ssd_step(
            cache.ssm, x, dt, self._rates(), B, C, D=self.D, seed=cache.seed(), **to_steps
        )
        return self.out_proj(self.norm(y.flatten(1), z)).unsqueeze(1)

    def _hold(
        self, u: Float[Tensor, "b t d"], cache: MambaCache, how: str
    ) -> Float[Tensor, "b t d"]:
        """Read a draft; `cache` stays as it is, with what `keep` needs beside it."""
        z, raw, dt = self.in_proj(u).split_with_sizes(self.splits, dim=-1)
        taps = self.conv1d.weight.squeeze(1)
        window = torch.cat([cache.conv, raw], dim=1)
        xBC = ops.causal_conv1d_window(window, taps, self.conv1d.bias)
        x, B, C = self._split_heads(xBC)
        dt, A = self._step_sizes(dt), self._rates()
        if how == "replay":
            state = cache.read()
            decays = ops.draft_decays(dt, A, state.dtype)
            y = ops.ssd_read_draft(state, x, dt, A, B, C, D=self.D, decays=decays)
            cache.held = Held(window, (x, dt, A, B), decays)
        else:
            slots = cache.ssm.new_empty(u.shape[1] + 1, *cache.ssm.shape)
            slots[0] = cache.ssm
            steps = []
            for i in range(u.shape[1]):
                slots[i + 1].copy_(slots[i])
                y, _ = ops.ssd_step(
                    slots[i + 1],
                    x[:, i],
                    dt[:, i],
                    A,
                    B[:, i],
                    C[:, i],
                    D=self.D,
                    seed=cache.seed(),
                )
                steps.append(y)
            y = torch.stack(steps, dim=1)
            cache.held = Held(window, slots=slots)
        return self.out_proj(self.norm(y.flatten(2), z))

    def _split_heads(self, xBC: Float[Tensor, "*bt c"]) -> tuple[Tensor, Tensor, Tensor]:
        """x `*bt h p`, B and C `*bt g n`."""
        shared = self.groups * self.state_size
        x, B, C = xBC.split_with_sizes((self.splits[0], shared, shared), dim=-1)
        return (
            x.unflatten(-1, (-1, self.head_dim)),
            B.unflatten(-1, (self.groups, -1)),
            C.unflatten(-1, (self.groups, -1)),
        )

    def _raw_steps(self, dt: Float[Tensor, "*bt h"]) -> tuple[Tensor, dict[str, Any]]:
        """dt, and what makes steps of it: left to the scan, which may do it inside its kernel."""
        if self.clamps_dt:
            return self._step_sizes(dt), {}
        return dt, {"dt_bias": self.dt_bias, "dt_softplus": True}

    def _step_sizes(self, dt: Float[Tensor, "*bt h"]) -> Float[Tensor, "*bt h"]:
        """softplus(dt + bias) in float32 or better."""
        dt = step_sizes(dt, self.dt_bias, dt_softplus=True)
        return dt.clamp(*self.dt_limit) if self.clamps_dt else dt

    def _rates(self) -> Float[Tensor, "h"]:
        """A: how fast each head forgets, negative."""
        return -torch.exp(_wide(self.A_log))


def _wide(x: Tensor) -> Tensor:
    """float32, or float64 where x already is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
