"""Quantizing to NVFP4 and back at the shapes of Super, beside torchao's compiled quantizer.

The five operands of a layer in training (reference sheet 6.3), in bfloat16: x and dy along the
rows; x and dy along the columns after a Hadamard transform; the weight in square tiles. dy uses
stochastic rounding. The activations have 8,192 tokens of width 4,096; the weight is the shared
expert's matrix of 5,376 by 4,096.

Tolerances are zero: codes, scales and values must have exactly the bits of the definition, which
runs on the device in PyTorch. The lower bound of the time counts x twice, because the largest
magnitude must be known before the first block is scaled, and 67 MB of x do not stay in the L2
cache. The instructions take about as long as the bytes (tests/kernels/
test_nvfp4_quantize_listing.py counts them).

torchao's `nvfp4_quantize` takes rows, rounds to nearest, and computes its scales in another order
of operations: the same work, slightly different bits. For columns it gets a transposed copy. Like
the other peers it is looked for in `.peers`: `pip install --no-deps --target .peers torchao`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.registry import Case, Draw, Inputs
from nemotron_kernels import (
    nvfp4_amax,
    nvfp4_dequantize,
    nvfp4_fake_quantize,
    nvfp4_quantize,
)
from nemotron_lite.quantization import nvfp4

TOKENS, WIDTH, HIDDEN = 8192, 4096, 5376
SEED = 2**40 + 1

Outputs = tuple[Tensor, ...]
_compiled: list[Callable[..., Any]] = []


def _torchao(x: Tensor) -> Outputs:
    from torchao.prototype.mx_formats import nvfp4_tensor as peer  # torchao 0.18

    def quantize(x: Tensor) -> Outputs:
        scale = peer.per_tensor_amax_to_scale(x.abs().amax())
        return (*peer.nvfp4_quantize(x, per_tensor_scale=scale), scale)

    if not _compiled:
        _compiled.append(torch.compile(quantize))
    return _compiled[0](x)


def _case(
    operand: str,
    *,
    columns: bool = False,
    hadamard: bool = False,
    stochastic: bool = False,
    square: bool = False,
    fake: bool = False,
) -> Case:
    rows = HIDDEN if square else TOKENS
    block = "16x16" if square else "1x16"
    seed = SEED if stochastic else None
    how = {"block": block, "hadamard": hadamard}

    def inputs(draw: Draw) -> Inputs:
        return {"x": draw.normal(HIDDEN if square else draw.tokens(TOKENS), WIDTH)}

    def run(x: Tensor) -> Outputs:
        x = x.mT if columns else x
        amax = nvfp4_amax(x, hadamard=hadamard)
        if fake:
            return (nvfp4_fake_quantize(x, amax, **how, seed=seed),)
        return nvfp4_quantize(x, amax, **how, seed=seed)

    def exact(x: Tensor) -> Outputs:
        x = (x.mT if columns else x).bfloat16()  # `device.wide` made them float64
        q = nvfp4.quantize(x, **how, stochastic=stochastic, seed=seed, impl="naive")
        if fake:
            return (q.dequantize(torch.bfloat16, impl="torch"),)
        return q.codes, q.scales.view(torch.uint8), q.scale

    words = ["columns" if columns else "square tiles" if square else "rows"]
    words += ["Hadamard"] * hadamard + ["stochastic"] * stochastic
    op, name = f"nvfp4_{'fake_' * fake}quantize", ", ".join(words)
    peers = {}
    if not fake and not (hadamard or stochastic or square):
        peers = {"torchao, compiled": lambda x: _torchao(x.mT.contiguous() if columns else x)}
    return Case(
        op=op,
        name=name,
        shape=f"{operand} of Super",
        inputs=inputs,
        run=run,
        exact=exact,
        tolerance=0.0,
        bytes=round(rows * WIDTH * (2 + 2 + (2 if fake else 4.5 / 8))),
        peers=peers,
        key=f"{op} {name}",
    )


def _packed(draw: Draw) -> Inputs:
    if draw.dry:
        codes = torch.empty(HIDDEN, WIDTH // 2, dtype=torch.uint8)
        scales = torch.empty(HIDDEN, WIDTH // 16, dtype=torch.float8_e4m3fn)
        return {"w": nvfp4.QuantizedTensor(codes, scales, torch.empty(()), (HIDDEN, WIDTH))}
    return {"w": nvfp4.quantize(draw.normal(HIDDEN, WIDTH))}


def _x(draw: Draw) -> Inputs:
    return {"x": draw.normal(draw.tokens(TOKENS), WIDTH)}


CASES = [
    Case(
        op="nvfp4_amax", name="rows", shape="x of Super", inputs=_x, run=nvfp4_amax,
        exact=lambda x: x.abs().amax().float(), tolerance=0.0, bytes=2 * TOKENS * WIDTH,
        peers={"torch": lambda x: torch.linalg.vector_norm(x, torch.inf)}, key="nvfp4_amax rows",
    ),
    _case("x"),
    _case("x", columns=True),
    _case("x", columns=True, hadamard=True),
    _case("dy", stochastic=True),
    _case("dy", columns=True, hadamard=True, stochastic=True),
    _case("shared up", square=True),
    _case("x", fake=True),
    _case("x", columns=True, hadamard=True, fake=True),
    _case("dy", stochastic=True, fake=True),
    _case("dy", columns=True, hadamard=True, stochastic=True, fake=True),
    _case("shared up", square=True, fake=True),
    Case(
        op="nvfp4_dequantize", name="to bfloat16", shape="shared up of Super", inputs=_packed,
        run=lambda w: nvfp4_dequantize(w, torch.bfloat16),
        exact=lambda w: w.dequantize(torch.bfloat16, impl="torch"),
        tolerance=0.0, bytes=round(HIDDEN * WIDTH * (2 + 4.5 / 8)), key="nvfp4_dequantize",
    ),
]  # fmt: skip
