"""Products with packed weights against the decoded matrix: equal bits if sums are exact.

Otherwise tolerances are relative rms errors, as for every grouped product: 1e-6 for a float32
result, 1e-3 for a float16 one. The interpreter decodes packed x as sm_90 does; `tl.dot_scaled` is
tested in test_nvfp4_listing.py.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

from nemotron_kernels import nvfp4_gemm, nvfp4_matvec
from nemotron_kernels.nvfp4_decode import UNIT, decode_tile
from nemotron_kernels.nvfp4_gemm import nvfp4_matmul
from nemotron_lite.quantization import nvfp4
from tests.compare import relative_rms
from tests.kernels.test_overflow import PROJECTION, TOKENS, _program

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
# Rows of x: the single row, then tiles of 16, 32, 64 and, for 16 bits and packed x, 128; then many.
ROWS = (1, 2, 16, 17, 33, 70, 130, 512)


def _packed(*shape: int, batch_dims: int = 0) -> nvfp4.QuantizedTensor:
    return nvfp4.quantize(torch.randn(*shape), batch_dims=batch_dims)


def _whole(*shape: int, fill: bool = False) -> nvfp4.QuantizedTensor:
    """Every code, with block scales and a tensor scale for which sums of products are exact.

    With `fill` the padding columns have codes too, which must not be used.
    """
    *rows, cols = shape
    blocks = -(-cols // 16)
    codes = torch.randint(0, 16, (*rows, blocks * 16), dtype=torch.uint8)
    if not fill:
        codes[..., cols:] = 0
    scales = torch.tensor([0.5, 1.0, 2.0, 3.0])[torch.randint(0, 4, (*rows, blocks))]
    scale = torch.full(shape[:-2] if len(shape) == 3 else (), 0.25)
    return nvfp4.QuantizedTensor(
        nvfp4.pack_codes(codes), scales.to(torch.float8_e4m3fn), scale, shape
    )


def _integers(*shape: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape).float()


def _exact(x: torch.Tensor | nvfp4.QuantizedTensor, w: nvfp4.QuantizedTensor) -> torch.Tensor:
    wide = x.double() if isinstance(x, torch.Tensor) else x.dequantize(torch.float64)
    return wide @ w.dequantize(torch.float64).T


# Decoding


@triton.jit
def _decode_kernel(codes_ptr, scales_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    codes = tl.load(codes_ptr + row * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :])
    scales = tl.load(scales_ptr + row * (COLUMNS // 16) + tl.arange(0, COLUMNS // 16)[None, :])
    tile = decode_tile(codes, scales, ROWS, COLUMNS)
    at = out_ptr + row * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(at, tile.to(tl.bfloat16).to(tl.float32) * UNIT)


def test_every_byte_with_every_scale_is_decoded_exactly() -> None:
    """All 65,536 pairs of codes and a scale, NaN and negative scales included, through bfloat16."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    codes = torch.stack([codes[:, i::32].contiguous() for i in range(32)], 1).flatten(0, 1)
    scales = torch.arange(256, dtype=torch.uint8).repeat_interleave(32)[:, None]
    out = torch.empty(256 * 32, 16)
    _decode_kernel[(1,)](codes, scales, out, ROWS=256 * 32, COLUMNS=16)
    w = nvfp4.QuantizedTensor(codes, scales.view(torch.float8_e4m3fn), torch.ones(()), out.shape)
    torch.testing.assert_close(out, w.dequantize(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit() | out.isnan(), w.dequantize().signbit() | out.isnan())


# Values


@pytest.mark.parametrize("cols", [16, 37, 129, 256])
@pytest.mark.parametrize("rows", ROWS)
def test_exact_sums_are_bit_equal_to_pytorch(rows: int, cols: int) -> None:
    w = _whole(45, cols, fill=True)
    x = _integers(rows, cols)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        exact = nvfp4.matmul(x.to(dtype), w, dtype=torch.float32, impl="cpu")
        found = nvfp4.matmul(x.to(dtype), w, dtype=torch.float32, impl="triton")
        assert torch.equal(found, exact), dtype
    packed = _whole(rows, cols, fill=True)
    exact = nvfp4.matmul(packed, w, impl="cpu")
    assert exact.abs().max() > 10
    assert torch.equal(nvfp4.matmul(packed, w, impl="triton"), exact)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block", ["1x16", "16x16"])
@pytest.mark.parametrize("rows", ROWS)
def test_random_values(rows: int, block: str, dtype: torch.dtype) -> None:
    w = nvfp4.quantize(torch.randn(131, 300) * 0.02, block=block)
    x = torch.randn(rows, 300).to(dtype)
    found = nvfp4_matmul(x, w)
    assert found.dtype == dtype and relative_rms(found, _exact(x, w)) < TOLERANCE[dtype]
    assert relative_rms(nvfp4_matmul(x, w, torch.float32), _exact(x, w)) < 1e-6
    packed = nvfp4.quantize(x)
    found = nvfp4_matmul(packed, w)
    assert found.dtype == torch.float32 and relative_rms(found, _exact(packed, w)) < 1e-6
    found = nvfp4_matmul(packed, w, torch.float16)
    assert found.dtype == torch.float16 and relative_rms(found, _exact(packed, w)) < 1e-3


@pytest.mark.parametrize("largest", [1e-30, 1e30])
def test_scales_of_any_size(largest: float) -> None:
    w = nvfp4.quantize(torch.randn(20, 64) * largest)
    x = torch.randn(5, 64)
    for rows in (1, 5):
        assert relative_rms(nvfp4_matmul(x[:rows], w), _exact(x[:rows], w)) < 1e-6


@pytest.mark.parametrize("rows", [1, 23])
def test_strided_inputs(rows: int) -> None:
    """Slices and transposes of x; every second row of W. Memory between them is not read."""
    wide, w = torch.full((rows + 5, 100), float("nan")), _packed(60, 80)
    x = torch.randn(rows, 80)
    wide[3 : rows + 3, 7:87] = x
    views = [wide[3 : rows + 3, 7:87], x.T.contiguous().T, x.repeat_interleave(2, 0)[::2]]
    half = dataclasses.replace(w, codes=w.codes[::2], scales=w.scales[::2], shape=(30, 80))
    packed = nvfp4.quantize(torch.cat([x, x]))
    for part in (w, half):
        for view in views:
            assert torch.equal(nvfp4_matmul(view, part), nvfp4_matmul(x.clone(), part))
        apart = dataclasses.replace(
            packed, codes=packed.codes[:rows], scales=packed.scales[:rows], shape=(rows, 80)
        )
        assert relative_rms(nvfp4_matmul(apart, part), _exact(apart, part)) < 1e-6


def test_leading_dimensions_and_no_rows() -> None:
    w = _packed(18, 40)
    x = torch.randn(2, 3, 40)
    assert torch.equal(nvfp4_matmul(x, w), nvfp4_matmul(x.flatten(0, 1), w).view(2, 3, 18))
    assert torch.equal(nvfp4_matmul(x[0, 0], w), nvfp4_matmul(x[0, :1], w)[0])
    packed = nvfp4.quantize(x)
    assert relative_rms(nvfp4_matmul(packed, w), _exact(packed, w)) < 1e-6
    assert nvfp4_matmul(x[:0], w, torch.float16).shape == (0, 3, 18)


@pytest.mark.parametrize("rows", [1, 20])
def test_a_nan_stays_in_its_row(rows: int) -> None:
    x, w = torch.randn(rows, 48), _packed(20, 48)
    scales = w.scales.view(torch.uint8).clone()
    scales[7, 1] = 0x7F
    sick = dataclasses.replace(w, scales=scales.view(torch.float8_e4m3fn))
    for given in (x, nvfp4.quantize(x)):
        bad = nvfp4_matmul(given, sick).isnan()
        assert bad[:, 7].all() and bad.sum() == rows
    x[-1, 5] = float("nan")
    bad = nvfp4_matmul(x, w).isnan()
    assert bad[-1].all() and bad.sum() == 20


def test_the_gradient_of_x() -> None:
    w = _packed(24, 37)
    grads = []
    for impl in ("cpu", "triton"):
        x = torch.linspace(-1, 1, 6 * 37).view(6, 37).requires_grad_()
        nvfp4.matmul(x, w, impl=impl).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_which_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, int]] = []
    for name in ("matvec", "_rows", "_packed", "_decoded_once"):
        whole = getattr(nvfp4_gemm, name)

        def spy(x, *arguments, name=name, whole=whole):
            ran.append((name, x.shape[0]))
            return whole(x, *arguments)

        monkeypatch.setattr(nvfp4_gemm, name, spy)
    w = _packed(8, 16)
    for rows in (1, 2):
        nvfp4_matmul(torch.randn(rows, 16), w)
        nvfp4_matmul(_packed(rows, 16), w)
    assert ran == [("matvec", 1), ("_packed", 1), ("_rows", 2), ("_packed", 2)]
    ran.clear()
    nvfp4_matmul(torch.randn(512, 16), w)
    nvfp4_matmul(torch.randn(511, 16).half(), w)
    nvfp4_matmul(torch.randn(512, 16).half(), w)
    assert ran == [("_rows", 512), ("_rows", 511), ("_decoded_once", 512)]


# Refusals


def test_wrong_inputs_are_refused() -> None:
    x, w = torch.randn(4, 32), _packed(8, 32)
    with pytest.raises(ValueError, match=r"x has shape \(4, 31\) and w \(8, 32\)"):
        nvfp4_matmul(x[:, 1:], w)
    with pytest.raises(ValueError, match=r"w \(2, 8, 32\), expected"):
        nvfp4_matmul(x, _packed(2, 8, 32, batch_dims=1))
    with pytest.raises(ValueError, match="each with one scale"):
        nvfp4_matmul(_packed(4, 32, batch_dims=1), w)
    with pytest.raises(ValueError, match=r"not torch.float64"):
        nvfp4_matmul(x.double(), w)
    with pytest.raises(ValueError, match=r"writes torch.float32.*not torch.int8"):
        nvfp4_matmul(x, w, torch.int8)
    with pytest.raises(ValueError, match="input_precision='fp8' is none of 'ieee'"):
        nvfp4_matmul(x, w, input_precision="fp8")


def test_a_kernel_forced_on_cpu_tensors_is_refused() -> None:
    script = (
        "import torch; from nemotron_lite.quantization import nvfp4\n"
        "x, w = torch.ones(2, 16), nvfp4.quantize(torch.ones(4, 16))\n"
        "experts, one = nvfp4.quantize(torch.ones(3, 16, 16), batch_dims=1), torch.ones(2, 1)\n"
        "nvfp4.matmul(x, w)\n"
        "for call in (lambda: nvfp4.matmul(x, w, impl='triton'),\n"
        "             lambda: nvfp4.matmul(nvfp4.quantize(x), w, impl='triton'),\n"
        "             lambda: nvfp4.expert_mlp(x, experts, experts, one, one.long(),\n"
        "                                      impl='triton')):\n"
        "    try: call()\n"
        "    except RuntimeError as error: print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["nvfp4_matmul"] * 2 + ["nvfp4_expert_mlp"]
    assert all("runs on an NVIDIA GPU" in line and "impl='auto'" in line for line in lines)


# Addresses


def _indices_are(value: int) -> None:
    """Inside `_program`: loads of 32-bit and 64-bit integers give this value."""
    builder = triton_interpreter.interpreter_builder
    zeros = builder.create_load

    def load(pointers, *_):
        found = zeros(pointers)
        if found.dtype in (tl.int32, tl.int64):
            return triton_interpreter.TensorHandle(np.full_like(found.data, value), found.dtype)
        return found

    builder.create_load = builder.create_masked_load = load


def test_a_million_tokens_and_stacks_beyond_32_bits() -> None:
    x, byte, i = (
        torch.zeros(1),
        torch.zeros(1, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.int32),
    )
    n, k = 4096, 64  # few columns are summed, but the strides are those of a wide matrix
    strides = 2**31 - 64, 2**20, 2**31 - 64, 2**17
    shared = {"N": n, "K": k, "TOKENS": 16, "ROWS": 16, "DEPTH": 64}
    last = TOKENS // 16 * (n // 16) - 1
    # If sorted, every row is one of the last pairs of one of the last experts.
    for grouped in (False, True):
        with _program(last):
            if grouped:
                _indices_are(2**24)
            nvfp4_gemm._rows_kernel[(1,)](
                x,
                byte,
                byte,
                x,
                x,
                i,
                i,
                i,
                i,
                TOKENS,
                PROJECTION,
                *strides,
                TOP_K=2,
                SORTED=grouped,
                GATHER=grouped,
                ACTIVATE=grouped,
                PRECISION="ieee",
                **shared,
            )
    with _program(last):
        nvfp4_gemm._packed_kernel[(1,)](
            byte,
            byte,
            x,
            byte,
            byte,
            x,
            x,
            TOKENS,
            PROJECTION // 2,
            PROJECTION // 16,
            strides[1],
            strides[3],
            SCALED=False,
            **shared,
        )
    with _program(TOKENS * (n // 16) - 1):
        _indices_are(2**20)
        nvfp4_matvec._matvec_kernel[(1,)](
            x,
            byte,
            byte,
            x,
            i,
            x,
            PROJECTION,
            *strides,
            E=2**21,
            N=n,
            K=k,
            PAIRS_PER_ROW=1,
            CHOSEN=True,
            ACTIVATE=True,
            ROWS=16,
            DEPTH=64,
        )
