"""The functions with mamba_ssm's names take its arguments in its order, so they can replace it.

The decoding step has mamba_ssm's own signature and is tested in test_state_update.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nemotron_kernels import mamba_chunk_scan_combined, rmsnorm_fn, selective_state_update
from nemotron_lite.ops import selective_scan
from tests.compare import relative_rms
from tests.kernels.test_ssd_kernels import make

# As mamba_ssm 2.3.2 declares them.
SIGNATURES = {
    mamba_chunk_scan_combined: (
        "x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, "
        "seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, inf), "
        "return_final_states=False, return_varlen_states=False"
    ),
    rmsnorm_fn: "x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True",
    selective_state_update: (
        "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, "
        "state_batch_indices=None"
    ),
}


@pytest.mark.parametrize("function", SIGNATURES)
def test_arguments_and_their_order(function: Callable[..., Any]) -> None:
    """Our functions may have more arguments, but only keyword arguments."""
    places = [
        p.replace(annotation=p.empty)
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert ", ".join(map(str, places)) == SIGNATURES[function]


def test_the_scan() -> None:
    v = make(2, 70)
    z = torch.randn(2, 70, 4, 16)
    bias, state = v.pop("dt_bias"), v.pop("initial_state")
    x, dt, A, B, C, D = v.values()
    seq_idx = (torch.arange(70) // 30).expand(2, 70).int()
    found, last = mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        256,
        D=D,
        z=z,
        dt_bias=bias,
        initial_states=state,
        seq_idx=seq_idx,
        dt_softplus=True,
        return_final_states=True,
    )
    y, expected = selective_scan(
        x, F.softplus(dt + bias), A, B, C, D=D, initial_state=state, seq_idx=seq_idx
    )
    torch.testing.assert_close(found, y * F.silu(z), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, expected, rtol=1e-5, atol=1e-5)
    y = mamba_chunk_scan_combined(x, F.softplus(dt), A, B, C, chunk_size=16)
    torch.testing.assert_close(
        y, selective_scan(x, F.softplus(dt), A, B, C)[0], rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match="once per document"):
        mamba_chunk_scan_combined(x, dt, A, B, C, 64, return_varlen_states=True)


def test_options_of_mamba_ssm_that_nemotron_does_not_use() -> None:
    """A D per channel and clamped steps, with all arguments given by position."""
    v = make(2, 35)
    x, dt, A, B, C, _, bias, state = v.values()
    wide, limits = torch.randn(4, 16), (0.2, 0.9)
    found, last = mamba_chunk_scan_combined(
        x, dt, A, B, C, 256, wide, None, bias, state, None, None, True, limits, True
    )
    steps = F.softplus(dt + bias)
    assert (steps < 0.2).any() and (steps > 0.9).any()
    y, expected = selective_scan(x, steps.clamp(*limits), A, B, C, initial_state=state)
    torch.testing.assert_close(found, y + wide * x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_size", [None, 8])
def test_the_gated_norm(group_size: int | None) -> None:
    x, z, w = torch.randn(5, 24), torch.randn(5, 24), torch.randn(24)
    groups = 24 // (group_size or 24)
    for gate in (z, None):
        found = rmsnorm_fn(x, w, None, gate, 1e-3, group_size, False)
        a = x.double() if gate is None else x.double() * F.silu(z.double())
        a = a.unflatten(-1, (groups, -1))
        exact = a / (a.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        assert relative_rms(found, exact.flatten(-2) * w) < 2e-6
    # Without a gate the order makes no difference, so mamba_ssm's default is accepted.
    assert torch.equal(rmsnorm_fn(x, w, None, eps=1e-3, group_size=group_size), found)
    with pytest.raises(ValueError, match="norm_before_gate=False"):
        rmsnorm_fn(x, w, None, z)
    with pytest.raises(ValueError, match="bias=None"):
        rmsnorm_fn(x, w, w)
    with pytest.raises(ValueError, match="24 channels do not split into groups of 7"):
        rmsnorm_fn(x, w, None, group_size=7)
