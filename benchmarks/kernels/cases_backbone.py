"""Convolution, norms and the decoding step at the shapes of Super and Nano.

Super: 10,240 convolution channels, 8,192 gated channels in 8 groups, 128 heads of 64 with states
of 128, model width 4,096. Nano: 6,144 channels, 4,096 gated in 8 groups, 64 heads. Reference sheet
sections 1.1 and 1.3.

Inputs have the strides that they have in the model: xBC and z are slices of one input projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.registry import Case, Draw, Inputs
from nemotron_kernels import (
    causal_conv1d,
    causal_conv1d_step,
    gated_rms_norm,
    rms_norm,
    selective_state_update,
)
from nemotron_lite import ops

# model width, heads, head width, groups, state size
MODELS = {"Super": (4096, 128, 64, 8, 128), "Nano": (2688, 64, 64, 8, 128)}
TOKENS = 8192
BATCH = 256  # sequences that decode together


def _widths(model: str) -> tuple[int, int, int]:
    """Gated channels, convolution channels, rows of the input projection."""
    _, heads, p, groups, n = MODELS[model]
    inner = heads * p
    conv = inner + 2 * groups * n
    return inner, conv, inner + conv + heads


def _conv_inputs(model: str, documents: bool) -> Callable[..., Any]:
    inner, conv, projection = _widths(model)

    def inputs(draw: Draw) -> Inputs:
        t = draw.tokens(TOKENS)
        wide = draw.normal(1, t, projection)
        document = draw.integers(0, 2, 1, t).cumsum(1) // 256 if documents else None
        return {
            "x": wide[..., inner : inner + conv],
            "weight": draw.normal(conv, 4, scale=0.5),
            "bias": draw.normal(conv),
            **({"seq_idx": document} if documents else {}),
        }

    return inputs


def _conv_exact(x: Tensor, weight: Tensor, bias: Tensor, **options: Tensor) -> Tensor:
    return ops.causal_conv1d(x, weight, bias, impl="naive", **options)[0]


def _conv(x: Tensor, weight: Tensor, bias: Tensor, **options: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias, **options)[0]


def _conv_fla(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from fla.modules.causal_conv1d import causal_conv1d as peer  # fla-core 0.6

    return peer(x.contiguous(), weight, bias, activation="silu")[0]


def _conv_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    u = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=weight.shape[0])
    return F.silu(u[..., : x.shape[1]]).transpose(1, 2)


_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile, once for all cases."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if function not in _compiled:
            _compiled[function] = torch.compile(function)
        return _compiled[function](*args, **kwargs)

    return call


def _gated_inputs(model: str) -> Callable[..., Any]:
    inner, _, projection = _widths(model)

    def inputs(draw: Draw) -> Inputs:
        t = draw.tokens(TOKENS)
        return {
            "y": draw.normal(t, inner),
            "z": draw.normal(t, projection)[:, :inner],
            "weight": draw.normal(inner),
        }

    return inputs


def _gated_exact(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return ops.gated_rms_norm(y, z, weight, 8, impl="naive")


def _gated_mamba(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    size = y.shape[-1] // 8
    return rmsnorm_fn(y, weight, None, z=z, eps=1e-5, group_size=size, norm_before_gate=False)


def _plain_inputs(model: str) -> Callable[..., Any]:
    width = MODELS[model][0]
    return lambda draw: {
        "x": draw.normal(draw.tokens(TOKENS), width),
        "weight": draw.normal(width),
    }


def _step_inputs(model: str) -> Callable[..., Any]:
    inner, conv, projection = _widths(model)
    return lambda draw: {
        "state": draw.normal(draw.tokens(BATCH), 3, conv),
        "x": draw.normal(draw.tokens(BATCH), projection)[:, inner : inner + conv],
        "weight": draw.normal(conv, 4, scale=0.5),
        "bias": draw.normal(conv),
    }


def _step_torch(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return ops.causal_conv1d_step(state, x, weight, bias, impl="torch")


def _state_inputs(model: str, batch: int, dtype: torch.dtype) -> Callable[..., Any]:
    _, heads, p, groups, n = MODELS[model]

    def inputs(draw: Draw) -> Inputs:
        b = min(batch, 2) if draw.dry else batch
        return {
            "state": draw.normal(b, heads, p, n, dtype=dtype),
            "x": draw.normal(b, heads, p),
            "dt": draw.normal(b, heads),
            "A": -draw.uniform(heads, low=1.0, high=16.0),
            "B": draw.normal(b, groups, n),
            "C": draw.normal(b, groups, n),
            "D": draw.normal(heads, dtype=torch.float32),
            "dt_bias": draw.normal(heads, dtype=torch.float32) - 4,
        }

    return inputs


def _update(state: Tensor, seed: int | None = None, **given: Tensor) -> tuple[Tensor, Tensor]:
    return selective_state_update(state, dt_softplus=True, seed=seed, **given), state


def _update_exact(state, x, dt, A, B, C, D, dt_bias):
    steps = F.softplus(dt + dt_bias, threshold=1e9)
    return ops.ssd_step(state, x, steps, A, B, C, D=D, impl="naive")


def _update_mamba(state, x, dt, A, B, C, D, dt_bias):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update as peer

    _, h, p, n = state.shape
    y = peer(
        state,
        x,
        dt[..., None].expand(-1, -1, p),
        A[:, None, None].expand(h, p, n),
        B,
        C,
        D[:, None].expand(h, p),
        dt_bias=dt_bias[:, None].expand(h, p),
        dt_softplus=True,
    )
    return y, state


def _update_torch(state, x, dt, A, B, C, D, dt_bias):
    given = {"D": D, "dt_bias": dt_bias, "dt_softplus": True}
    return ops.ssd_step(state, x, dt, A, B, C, impl="cpu", **given)


def _update_cases(model: str) -> list[Case]:
    _, heads, p, groups, n = MODELS[model]
    cases = []
    for batch in (1, BATCH):
        small = batch * 2 * (2 * heads * p + heads + 2 * groups * n)
        for dtype, seed in ((torch.float32, None), (torch.float16, 1)):
            word = torch.finfo(dtype).bits // 8
            kind = "float32" if seed is None else "float16 rounded stochastically"

            def run(seed: int | None = seed, **given: Tensor) -> tuple[Tensor, Tensor]:
                return _update(seed=seed, **given)

            cases.append(
                Case(
                    op="selective_state_update",
                    name=kind,
                    shape=f"{model}, batch {batch}",
                    inputs=_state_inputs(model, batch, dtype),
                    run=run,
                    exact=_update_exact,
                    tolerance=(4e-3, 2e-6 if seed is None else 1e-3),
                    bytes=2 * word * batch * heads * p * n + small,
                    in_place=("state",),
                    peers={}
                    if seed is not None
                    else {
                        "mamba_ssm": _update_mamba,
                        "torch": _update_torch,
                    },
                    key=f"selective_state_update {kind}",
                )
            )
    return cases


def _cases(model: str) -> list[Case]:
    width = MODELS[model][0]
    inner, conv, _ = _widths(model)
    shape, element = f"{model}, {TOKENS} tokens", TOKENS * 2
    cases = []
    for backward in (False, True):
        name = "backward" if backward else "forward"
        for documents in (False, True):
            variant = name + (", documents" if documents else "")
            cases.append(
                Case(
                    op="causal_conv1d",
                    name=variant,
                    shape=shape,
                    inputs=_conv_inputs(model, documents),
                    run=_conv,
                    exact=_conv_exact,
                    tolerance=4e-3,
                    bytes=element * conv * (3 if backward else 2),
                    leaves=("x", "weight", "bias") if backward else (),
                    backward=backward,
                    peers={}
                    if documents
                    else {
                        "fla": _conv_fla,
                        "torch": _conv_torch,
                        "compiled": _compile(_conv_torch),
                    },
                    key=f"causal_conv1d {variant}",
                )
            )
        cases.append(
            Case(
                op="gated_rms_norm",
                name=name,
                shape=shape,
                inputs=_gated_inputs(model),
                run=lambda y, z, weight: gated_rms_norm(y, z, weight, 8),
                exact=_gated_exact,
                tolerance=4e-3,
                bytes=element * inner * (5 if backward else 3),
                leaves=("y", "z", "weight") if backward else (),
                backward=backward,
                peers={"mamba_ssm": _gated_mamba, "compiled": _compile(_gated_exact)},
                key=f"gated_rms_norm {name}, {model}",
            )
        )
        cases.append(
            Case(
                op="rms_norm",
                name=name,
                shape=shape,
                inputs=_plain_inputs(model),
                run=rms_norm,
                exact=lambda x, weight: ops.rms_norm(x, weight, impl="naive"),
                tolerance=4e-3,
                bytes=element * width * (3 if backward else 2),
                leaves=("x", "weight") if backward else (),
                backward=backward,
                peers={"torch": lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 1e-5)},
                key=f"rms_norm {name}, {model}",
            )
        )
    cases.append(
        Case(
            op="causal_conv1d_step",
            name="forward",
            shape=f"{model}, batch {BATCH}",
            inputs=_step_inputs(model),
            run=causal_conv1d_step,
            exact=ops.causal_conv1d_step,
            tolerance=4e-3,
            bytes=2 * 8 * BATCH * conv,
            peers={"torch": _step_torch},
            key="causal_conv1d_step",
        )
    )
    return cases + _update_cases(model)


CASES = [case for model in MODELS for case in _cases(model)]
