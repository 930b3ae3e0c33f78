"""The chunked scan at the shapes of Super and Nano: forward, backward, documents, float32.

Super has 128 heads of 64 with states of 128 and 8 groups, Nano 64 heads. x, B, C and dt are
slices of a wider tensor, as in the model. The kernels apply the bias of dt and softplus. The cases
"documents" have rows of concatenated documents.

The exact answer is the chunked PyTorch implementation in float64. The recurrence itself would store
a state per token for its gradient, 70 GB here; tests/ops/test_ladder.py shows that the two agree.

The lower bound of the time counts each input and output once, and the FLOPs of chunks of 64 tokens:
T [H (2 Q P + 4 N P) + 2 G Q N] forward, and 2.5 times as many backward.

Each alternative configuration of ssd_common.ALTERNATIVES is a case too, so that a run on a GPU
shows whether it is correct and faster. The dry run does not compile these cases: they have the key
of the default configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.registry import Case, Draw, Inputs
from nemotron_kernels import ssd_common
from nemotron_kernels._compat import Config
from nemotron_kernels.ssd import ssd
from nemotron_lite import ops

HEADS = {"Super": 128, "Nano": 64}
P, G, N, Q = 64, 8, 128, 64
LEAVES = ("x", "dt", "A", "B", "C", "D", "dt_bias")
DEFAULT = dict(ssd_common.CONFIGS)
BF16 = 8e-3, 1e-2  # outputs, gradients
FLOAT32 = (5e-6, 5e-6), (2e-6, 2e-5, 3e-4, 2e-6, 2e-6, 2e-6, 2e-5)
FUSED, THREE_PASSES = "fused", "three"


def _inputs(
    heads: int, tokens: int, dtype: torch.dtype, documents: bool
) -> Callable[[Draw], Inputs]:
    """A dry run uses all tokens too: the number of heads per program depends on them."""

    def inputs(draw: Draw) -> Inputs:
        xBC = draw.normal(1, tokens, heads * P + 2 * G * N, dtype=dtype)
        x, B, C = xBC.split([heads * P, G * N, G * N], dim=-1)
        wide = draw.normal(1, tokens, 2 * heads * P + 2 * G * N + heads, dtype=dtype)
        given = {
            "x": x.unflatten(-1, (heads, P)),
            "dt": wide[..., -heads:],
            "A": -draw.uniform(heads, low=1.0, high=16.0),
            "B": B.unflatten(-1, (G, N)),
            "C": C.unflatten(-1, (G, N)),
            "D": draw.normal(heads, dtype=torch.float32),
            "dt_bias": draw.normal(heads, dtype=torch.float32) - 4,
        }
        if documents:
            given["seq_idx"] = draw.integers(0, 2, 1, tokens).cumsum(1) // 256
        return given

    return inputs


def _run(kernel: str = "", config: Config | None = None, **options: Any) -> Callable[..., Any]:
    """`ssd` with `config` for one kernel; each call first restores the default configurations."""

    def run(**given: Tensor) -> tuple[Tensor, Tensor]:
        ssd_common.CONFIGS.update(DEFAULT)
        if config is not None:
            ssd_common.CONFIGS[kernel] = {2: {0: config, 80: config}, 4: DEFAULT[kernel][4]}
        return ssd(**given, dt_softplus=True, **options)

    return run


def _exact(x, dt, A, B, C, D, dt_bias, seq_idx=None):
    steps = F.softplus(dt + dt_bias, threshold=1e9)
    return ops.ssd(x, steps, A, B, C, D=D, seq_idx=seq_idx, impl="cpu")


def _mamba(chunk: int) -> Callable[..., Any]:
    def run(x, dt, A, B, C, D, dt_bias, seq_idx=None):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as peer

        seq_idx = None if seq_idx is None else seq_idx.int()
        return peer(
            x,
            dt,
            A,
            B,
            C,
            chunk,
            D=D,
            dt_bias=dt_bias,
            seq_idx=seq_idx,
            dt_softplus=True,
            return_final_states=True,
        )

    return run


def _fla(x, dt, A, B, C, D, dt_bias):
    """Mamba-2 as gated linear attention: one key and query per head, values multiplied by dt."""
    from fla.ops.simple_gla import chunk_simple_gla as peer

    steps = F.softplus(dt.float() + dt_bias)
    keys, queries = (v.repeat_interleave(x.shape[2] // G, dim=2) for v in (B, C))
    values = (x * steps[..., None]).to(x.dtype)
    y, last = peer(queries, keys, values, g=steps * A, scale=1.0, output_final_state=True)
    return y + (D[:, None] * x).to(x.dtype), last.transpose(-1, -2)


def _torch(x, dt, A, B, C, D, dt_bias, seq_idx=None):
    steps = F.softplus(dt.float() + dt_bias)
    return ops.ssd(x, steps, A, B, C, D=D, seq_idx=seq_idx, impl="cpu")


def _case(
    model: str,
    name: str,
    run: Callable[..., Any],
    *,
    key: str,
    tokens: int = 8192,
    dtype: torch.dtype = torch.bfloat16,
    documents: bool = False,
    backward: bool = False,
    peers: dict[str, Callable[..., Any]] | None = None,
) -> Case:
    heads, e = HEADS[model], dtype.itemsize
    per_token = heads * (3 * P + 2) + 4 * G * N if backward else heads * (2 * P + 1) + 2 * G * N
    flops = tokens * (heads * (2 * Q * P + 4 * N * P) + 2 * G * Q * N)
    tolerances = BF16 if dtype is torch.bfloat16 else FLOAT32
    return Case(
        op="ssd",
        name=name,
        shape=f"{model}, {tokens} tokens",
        inputs=_inputs(heads, tokens, dtype, documents),
        run=run,
        exact=_exact,
        tolerance=tolerances[backward],
        bytes=tokens * per_token * e + 4 * heads * P * N,
        flops=flops * 5 // 2 if backward else flops,
        leaves=LEAVES if backward else (),
        backward=backward,
        peers=peers or {},
        key=key,
    )


def _cases(model: str) -> list[Case]:
    mamba = {"mamba_ssm": _mamba(128), "mamba_ssm, chunks of 256": _mamba(256)}
    outside = {**mamba, "fla": _fla, "torch": _torch}
    fused = _run(variant=FUSED)
    cases = [
        _case(model, "forward", _run(), key="ssd forward", peers=outside),
        _case(model, "forward, fused", fused, key="ssd forward, fused"),
    ]
    for backward in (False, True):
        name = "backward" if backward else "forward"
        several = f"{name}, documents"
        peers = {**mamba, "torch": _torch}
        if backward:
            cases.append(_case(model, name, _run(), key=f"ssd {name}", backward=True, peers=peers))
        cases.append(
            _case(
                model,
                several,
                _run(),
                key=f"ssd {several}",
                documents=True,
                backward=backward,
                peers=peers,
            )
        )
    return cases


def _float32_cases() -> list[Case]:
    return [
        _case(
            "Nano",
            f"{name}, float32",
            _run(),
            key=f"ssd {name}, float32",
            tokens=2048,
            dtype=torch.float32,
            backward=backward,
        )
        for backward, name in enumerate(("forward", "backward"))
    ]


def _alternatives() -> list[Case]:
    cases = []
    for kernel, configs in ssd_common.ALTERNATIVES.items():
        backward = kernel.startswith("grad")
        variant = THREE_PASSES if kernel in ("states", "scan") else FUSED
        default = "ssd forward, fused" if variant == FUSED else "ssd forward"
        for config in configs:
            blocks = " ".join(f"{k} {v}" for k, v in config.blocks.items())
            how = f"{kernel} {blocks}, {config.num_warps} warps, {config.num_stages} stages"
            cases.append(
                _case(
                    "Super",
                    f"{'backward' if backward else 'forward'}: {how}",
                    _run(kernel, config, variant=variant),
                    key="ssd backward" if backward else default,
                    backward=backward,
                )
            )
    return cases


CASES = [case for model in HEADS for case in _cases(model)] + _float32_cases() + _alternatives()
