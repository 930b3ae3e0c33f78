"""Products by oneDNN against `F.linear`: values, gradients, and who answers when."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from nemotron_lite import ops
from tests.compare import relative_rms

MODULE = sys.modules["nemotron_lite.ops.linear"]
ONEDNN = pytest.mark.skipif(not MODULE._onednn(), reason="this PyTorch has no oneDNN")


def _inputs(*rows: int, i: int = 24, o: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(sum(rows))
    return torch.randn(*rows, i, generator=dice), torch.randn(o, i, generator=dice)


@ONEDNN
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (2, 1, 7), (0,)])
@pytest.mark.parametrize("strided", [False, True])
def test_onednn_is_the_product(rows: tuple[int, ...], strided: bool) -> None:
    x, weight = _inputs(*rows)
    if strided:
        x, weight = torch.cat([x, x], -1)[..., ::2], weight.t().contiguous().t()
    exact = F.linear(x.double(), weight.double())
    assert ops.linear(x, weight, impl="onednn").shape == exact.shape
    if exact.numel():
        assert relative_rms(ops.linear(x, weight, impl="onednn"), exact) < 1e-6


@ONEDNN
@pytest.mark.parametrize("which", ["both", "x", "weight"])
def test_gradients(which: str) -> None:
    x, weight = _inputs(2, 5)
    leaves = {"x": x, "weight": weight}
    wanted = [leaves[name] for name in ("x", "weight") if which in (name, "both")]
    for leaf in wanted:
        leaf.requires_grad_()
    slope = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((ops.linear(x, weight, impl="onednn") * slope).sum(), wanted)
    wide = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in (x, weight)]
    exact = torch.autograd.grad(
        (F.linear(*wide) * slope.double()).sum(), [leaf for leaf in wide if leaf.requires_grad]
    )
    for one, other in zip(found, exact, strict=True):
        assert relative_rms(one, other) < 1e-6


@ONEDNN
def test_who_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large float32 products where MKL is not at home, and nothing else."""
    monkeypatch.setattr(MODULE, "_faster_here", lambda: True)
    large = torch.empty(1000, 1000)
    cases = {
        (3, torch.float32): True, (1, torch.float32): False, (8, torch.float64): False,
        (8, torch.bfloat16): False,
    }  # fmt: skip
    for (rows, dtype), expected in cases.items():
        x = torch.empty(rows, 1000, dtype=dtype)
        assert MODULE.prefers_onednn(x, large.to(dtype)) is expected, (rows, dtype)
    assert not MODULE.prefers_onednn(torch.empty(8, 100), torch.empty(100, 100))
    with torch.autocast("cpu", torch.bfloat16):
        assert not MODULE.prefers_onednn(torch.empty(8, 1000), large)
        assert ops.linear(torch.zeros(8, 1000), torch.zeros(1000, 1000)).dtype == torch.bfloat16
    monkeypatch.setattr(MODULE, "_faster_here", lambda: False)
    assert not MODULE.prefers_onednn(torch.empty(8, 1000), large)


@pytest.mark.parametrize(
    ("maker", "faster"), [("AuthenticAMD", True), ("GenuineIntel", False), ("", False)]
)
def test_the_maker_decides(monkeypatch: pytest.MonkeyPatch, maker: str, faster: bool) -> None:
    monkeypatch.setattr(MODULE, "_onednn", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(MODULE, "_maker", lambda: maker)
    assert MODULE._faster_here.__wrapped__() is faster


def test_what_is_refused() -> None:
    x, weight = _inputs(3)
    with pytest.raises(ValueError, match="no implementation 'mkl'"):
        ops.linear(x, weight, impl="mkl")
    with pytest.raises(ValueError, match="multiplies float32 on the CPU"):
        ops.linear(x.double(), weight.double(), impl="onednn")
