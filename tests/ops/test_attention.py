"""Causal grouped-query attention: every form against the formula; caches; rows of their own."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite.backends import cpu_attention, private_torch
from nemotron_lite.ops import causal_attention
from tests.compare import errors

FORMS = ["naive", "torch", "cpu", "traced", "gpu"]  # "gpu" runs on a CPU too


def _qkv(b: int, t: int, h: int = 4, kv: int = 2, p: int = 8, s: int | None = None):
    torch.manual_seed(b * 10 + t)
    s = s or t
    return (
        torch.randn(b, h, t, p).double(),
        torch.randn(b, kv, s, p).double(),
        torch.randn(b, kv, s, p).double(),
    )


@pytest.mark.parametrize(("h", "kv"), [(4, 4), (4, 2), (6, 1)])
# Of a single token the gradients of q and k are zero; PyTorch's kernel returns rounding noise.
@pytest.mark.parametrize(
    ("impl", "t"),
    [
        ("torch", 2),
        ("torch", 33),
        ("cpu", 1),
        ("cpu", 2),
        ("cpu", 33),
        ("traced", 2),
        ("traced", 33),
    ],
)
def test_every_form_equals_naive(impl: str, h: int, kv: int, t: int) -> None:
    found = errors(
        lambda q, k, v: causal_attention(q, k, v, impl=impl),
        lambda q, k, v: causal_attention(q, k, v, impl="naive"),
        _qkv(2, t, h, kv),
    )
    assert max(found) < 2e-6, found


def test_naive_equals_the_formula() -> None:
    q, k, v = _qkv(1, 5)
    y = causal_attention(q, k, v, impl="naive")
    for head in range(4):
        for i in range(5):
            scores = torch.stack([q[0, head, i] @ k[0, head // 2, j] for j in range(i + 1)])
            weights = torch.softmax(scores / 8**0.5, 0)
            torch.testing.assert_close(y[0, head, i], weights @ v[0, head // 2, : i + 1])


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("new", [1, 3, 8])
def test_a_cache_continues(impl: str, new: int) -> None:
    q, k, v = _qkv(2, 11, s=20)  # the buffer is nine keys longer
    whole = causal_attention(q, k, v, impl="naive")
    part = causal_attention(q[:, :, 11 - new :], k, v, starts=11 - new, impl=impl)
    torch.testing.assert_close(part, whole[:, :, 11 - new :])


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("new", [1, 4])
def test_each_row_has_its_own_start(impl: str, new: int) -> None:
    q, k, v = _qkv(3, new, s=16)
    starts = torch.tensor([0, 5, 12])
    found = causal_attention(q, k, v, starts=starts, impl=impl)
    for row, start in enumerate(starts.tolist()):
        one = [x[row : row + 1] for x in (q, k, v)]
        torch.testing.assert_close(
            found[row : row + 1], causal_attention(*one, starts=start, impl="naive")
        )


@pytest.mark.parametrize("impl", FORMS)
def test_concatenated_documents_do_not_see_each_other(impl: str) -> None:
    q, k, v = _qkv(1, 9)
    whole = causal_attention(
        q, k, v, seq_idx=torch.tensor([[0, 0, 0, 1, 0, 0, 0, 0, 3]]), impl=impl
    )
    for a, b in [(0, 3), (3, 4), (4, 8), (8, 9)]:
        alone = causal_attention(*(x[:, :, a:b] for x in (q, k, v)), impl="naive")
        torch.testing.assert_close(whole[:, :, a:b], alone)


@pytest.mark.parametrize("t", [1, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["torch", "cpu", "traced", "gpu"])
def test_strided_inputs_in_other_dtypes(impl: str, dtype: torch.dtype, t: int) -> None:
    """The memory layout of a layer (tokens before heads), after a cache of 5 tokens."""
    q, k, v = (
        x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in _qkv(2, t, s=t + 5)
    )
    with torch.no_grad():
        found = causal_attention(q, k, v, starts=5, impl=impl)
    exact = causal_attention(q.double(), k.double(), v.double(), starts=5, impl="naive")
    assert found.dtype == dtype
    limit = 1e-6 if dtype == torch.float32 else 1e-2
    assert (found.double() - exact).norm() / exact.norm() < limit


def test_keys_beyond_the_cache_are_never_read() -> None:
    q, k, v = _qkv(1, 2, s=10)
    k[:, :, 7:] = float("nan")
    v[:, :, 7:] = float("nan")
    assert causal_attention(q, k, v, starts=5).isfinite().all()
    assert causal_attention(q[:, :, :1], k, v, starts=6).isfinite().all()


def test_too_few_keys_and_documents_after_a_cache_are_refused() -> None:
    q, k, v = _qkv(1, 4)
    with pytest.raises(ValueError, match="4 keys do not cover starts=2"):
        causal_attention(q, k, v, starts=2)
    with pytest.raises(ValueError, match="starts must be 0"):
        causal_attention(q[:, :, :1], k, v, starts=2, seq_idx=torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("start", [0, 37])
@pytest.mark.parametrize(("h", "kv", "spread"), [(6, 2, 1.0), (4, 4, 3.0)])
def test_bfloat16_in_blocks_rounds_no_more_than_its_inputs(
    monkeypatch: pytest.MonkeyPatch, start: int, h: int, kv: int, spread: float
) -> None:
    """Against float64 on the same rounded numbers, in several blocks of unequal size.

    `spread` makes scores large. A large score rounded to BF16 would be wrong by percents.
    """
    monkeypatch.setattr(cpu_attention, "SCORES", 16 * 300 * h // kv)
    monkeypatch.setattr(cpu_attention, "FEW_SCORES", 1)
    called = []
    blocks = cpu_attention._in_blocks
    monkeypatch.setattr(cpu_attention, "_in_blocks", lambda *a: called.append(1) or blocks(*a))
    q, k, v = _qkv(2, 263, h, kv, s=300)
    q, k, v = ((x * scale).bfloat16() for x, scale in ((q, spread), (k, spread), (v, 1)))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # as the layer hands it over
    k[:, :, start + 263 :] = float("nan")  # a longer buffer's rest
    with torch.inference_mode():
        found = causal_attention(q, k, v, starts=start)
    exact = causal_attention(q.double(), k.double(), v.double(), starts=start, impl="naive")
    assert called
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() / exact.norm() < 3e-3  # 2.2e-3 measured; 2^-9 is 2e-3


@pytest.mark.parametrize("start", [0, 37])
@pytest.mark.parametrize(("h", "kv"), [(6, 2), (4, 4)])
def test_float32_in_blocks(monkeypatch: pytest.MonkeyPatch, start: int, h: int, kv: int) -> None:
    """As on a CPU that is not from Intel, with wide heads: several blocks of unequal size."""
    monkeypatch.setattr(cpu_attention, "SCORES", 16 * 300 * h // kv)
    monkeypatch.setattr(cpu_attention, "FEW_SCORES", 1)
    monkeypatch.setattr(cpu_attention, "FEW_WIDE_SCORES", 1)
    monkeypatch.setattr(cpu_attention, "prefers_onednn", lambda *_: private_torch.HAS_ONEDNN)
    called = []
    blocks = cpu_attention._in_blocks
    monkeypatch.setattr(cpu_attention, "_in_blocks", lambda *a: called.append(1) or blocks(*a))
    q, k, v = (x.float() for x in _qkv(2, 263, h, kv, s=300, p=64))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # as the layer hands it over
    k[:, :, start + 263 :] = float("nan")  # a longer buffer's rest
    with torch.inference_mode():
        found = causal_attention(q, k, v, starts=start)
        assert called or not private_torch.HAS_ONEDNN
        called.clear()
        narrow = causal_attention(q[..., :16], k[..., :16], v[..., :16], starts=start)
        assert not called
    exact = causal_attention(q.double(), k.double(), v.double(), starts=start, impl="naive")
    assert narrow.shape == (2, h, 263, 16)
    assert (found.double() - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_blocks_get_matrices_without_gaps(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Without a cache, the keys of one head are not contiguous, and oneDNN would be slow."""
    for name in ("FEW_SCORES", "FEW_WIDE_SCORES"):
        monkeypatch.setattr(cpu_attention, name, 1)
    monkeypatch.setattr(cpu_attention, "prefers_onednn", lambda *_: private_torch.HAS_ONEDNN)
    gaps, product = [], cpu_attention.product

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        gaps.append(not (b.is_contiguous() or b.t().is_contiguous()))
        return product(a, b)

    monkeypatch.setattr(cpu_attention, "product", watched)
    q, k, v = (
        x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in _qkv(1, 70, 4, 2, p=32)
    )
    with torch.inference_mode():
        found = causal_attention(q, k, v)
    assert (gaps and not any(gaps)) or not private_torch.HAS_ONEDNN
    exact = causal_attention(q.double(), k.double(), v.double(), impl="naive")
    assert (found.double() - exact).norm() / exact.norm() < (
        1e-6 if dtype == torch.float32 else 3e-3
    )
