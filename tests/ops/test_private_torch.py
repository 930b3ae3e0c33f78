"""Private operators of PyTorch, and the public fallback of each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nemotron_lite import ops
from nemotron_lite.backends import cpu_attention, cpu_linear, measured_products, private_torch
from nemotron_lite.layers import Linear
from tests.compare import relative_rms

OPERATORS = {
    "HAS_FLASH": (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"),
    "HAS_ONEDNN_LINEAR": (torch.ops.mkldnn, "_linear_pointwise"),
    "HAS_ONEDNN_REORDER": (torch.ops.mkldnn, "_reorder_linear_weight"),
}


@pytest.fixture(params=[True, False], ids=["private", "fallback"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of each private operator, by flag: with those that exist, and as if there were none."""
    found: Counter[str] = Counter()

    def counting(flag: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            found[flag] += 1
            return operator(*args, **kwargs)

        return count

    for flag, (namespace, name) in OPERATORS.items():
        if getattr(private_torch, flag):
            monkeypatch.setattr(namespace, name, counting(flag, getattr(namespace, name)))
    if not request.param:
        for flag in ("HAS_ONEDNN", *OPERATORS):
            monkeypatch.setattr(private_torch, flag, False)
    return found


def expected_calls(**counts: int) -> Counter[str]:
    """These numbers of calls, without those of operators that do not exist."""
    return Counter({flag: n for flag, n in counts.items() if getattr(private_torch, flag)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_with_its_log_denominator(
    calls: Counter[str], dtype: torch.dtype, is_causal: bool
) -> None:
    q, k, v = (torch.randn(2, 3, 9, 16).to(dtype) for _ in range(3))
    with torch.no_grad():
        found, log = private_torch.attention_with_log(q, k, v, is_causal=is_causal)
    assert calls == expected_calls(HAS_FLASH=1)
    scores = q.double() @ k.double().mT / 4
    if is_causal:
        scores.masked_fill_(torch.ones(9, 9, dtype=torch.bool).triu_(1), -torch.inf)
    assert found.dtype == dtype
    limit = 8e-3 if dtype == torch.bfloat16 else 1e-6
    assert relative_rms(found, scores.softmax(-1) @ v.double()) < limit
    assert relative_rms(log, scores.logsumexp(-1)) < 1e-5


def test_a_segment_after_a_cache(calls: Counter[str]) -> None:
    """The function that uses the log-denominators: it joins two partial results."""
    q = torch.randn(2, 6, 5, 8)
    k, v = torch.randn(2, 2, 2, 12, 8)
    with torch.no_grad():
        found = cpu_attention._cached_then_new(q, k, v, 7)
    assert calls == expected_calls(HAS_FLASH=2)
    exact = ops.causal_attention(q, k, v, starts=7, impl="naive")
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("rows", [(1,), (2, 5)])
def test_products(calls: Counter[str], rows: tuple[int, ...]) -> None:
    x, weight = torch.randn(*rows, 24), torch.randn(40, 24)
    exact = F.linear(x.double(), weight.double())
    assert relative_rms(cpu_linear.product(x, weight), exact) < 1e-6
    transposed = weight.t().contiguous().t()
    assert relative_rms(cpu_linear.product(x, transposed), exact) < 1e-6
    assert relative_rms(cpu_linear.product(x, cpu_linear.prepack(weight)), exact) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):  # float32 stays float32
        assert relative_rms(cpu_linear.product(x, weight), exact) < 1e-6
    assert calls == expected_calls(HAS_ONEDNN_LINEAR=4, HAS_ONEDNN_REORDER=1)


def test_a_layer_prepared_for_decoding(
    calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured_products, "prefers_prepacked", lambda rows, numel: True)
    layer, x = Linear(32, 24), torch.randn(3, 32)
    with torch.no_grad():
        exact = F.linear(x, layer.weight)
        layer.prepare_for_decoding()
        torch.testing.assert_close(layer(x), exact)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), 2 * exact)
    assert calls == expected_calls(HAS_ONEDNN_LINEAR=1, HAS_ONEDNN_REORDER=1)


def test_without_onednn_auto_uses_pytorch_and_cpu_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a processor where "auto" would take oneDNN if it were there."""
    monkeypatch.setattr(measured_products, "prefers_onednn", lambda rows, numel: True)
    monkeypatch.setattr(private_torch, "HAS_ONEDNN_LINEAR", True)
    x, weight = torch.randn(8, 1000), torch.randn(1000, 1000)
    assert cpu_linear.prefers_onednn(x, weight)
    monkeypatch.setattr(private_torch, "HAS_ONEDNN_LINEAR", False)
    assert not cpu_linear.prefers_onednn(x, weight)
    assert torch.equal(ops.linear(x, weight), F.linear(x, weight))
    with pytest.raises(ValueError, match="with a PyTorch that has oneDNN"):
        ops.linear(x, weight, impl="cpu")


def test_the_name_of_the_cpu_on_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = "vendor_id\t: AuthenticAMD\nmodel name\t: EPYC\nflags\t: fpu avx2\ncpu MHz\t: {}\n"
    (tmp_path / "cpuinfo").write_text(one.format(1000.1) + "\n" + one.format(2000.2))
    monkeypatch.setattr(private_torch, "CPUINFO", tmp_path / "cpuinfo")
    assert private_torch.cpu_name() == "AuthenticAMD | EPYC | fpu avx2", "without what varies"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert private_torch.cpu_name() == ""


def test_the_name_of_the_cpu_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_torch, "CPUINFO", tmp_path / "missing")
    monkeypatch.setattr(private_torch.platform, "processor", lambda: "arm")
    assert private_torch.cpu_name() == "arm"
