"""RMSNorm and the gated grouped norm: values, gradients, and the two classic porting errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from nemotron_lite.ops import gated_rms_norm, rms_norm
from tests.compare import errors


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 3, 16), (5, 33), (7,)])
@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_rms_norm(impl: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape).double() * 3, torch.randn(shape[-1]).double()]
    found = errors(
        lambda x, w: rms_norm(x, w, impl=impl),
        lambda x, w: rms_norm(x, w, impl="naive"),
        inputs,
    )
    assert max(found) < 1e-6, found


def test_rms_norm_equals_torch() -> None:
    x, weight = torch.randn(4, 6, 32), torch.randn(32)
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), F.rms_norm(x, (32,), weight, 1e-3))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rows", [(1,), (2, 5)])
@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_gated_norm(impl: str, groups: int, rows: tuple[int, ...]) -> None:
    torch.manual_seed(groups)
    inputs = [
        torch.randn(*rows, 24).double(),
        torch.randn(*rows, 24).double(),
        torch.randn(24).double(),
    ]
    found = errors(
        lambda y, z, w: gated_rms_norm(y, z, w, groups, impl=impl),
        lambda y, z, w: gated_rms_norm(y, z, w, groups, impl="naive"),
        inputs,
    )
    assert max(found) < 1e-6, found


def test_gate_comes_before_the_norm_and_groups_are_separate() -> None:
    y, z, weight = torch.randn(3, 8), torch.randn(3, 8), torch.ones(8)
    found = gated_rms_norm(y, z, weight, 2, 0.0)
    gated = (y * F.silu(z)).view(3, 2, 4)
    expected = gated / gated.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(found, expected.view(3, 8))
    # Two usual errors of ports: the gate after the norm, and one norm over all channels.
    grouped = y.view(3, 2, 4)
    late = (grouped / grouped.square().mean(-1, keepdim=True).sqrt()).view(3, 8) * F.silu(z)
    assert not torch.allclose(found, late, atol=1e-2)
    assert not torch.allclose(found, gated_rms_norm(y, z, weight, 1, 0.0), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_low_precision_inputs_are_normalized_in_float32(impl: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, z, weight = (torch.randn(4, 64).to(dtype) for _ in range(3))
    weight = weight[0]
    found = gated_rms_norm(x, z, weight, 2, impl=impl)
    exact = gated_rms_norm(x.double(), z.double(), weight.double(), 2)
    assert found.dtype == dtype
    # One rounding at the end: half a unit in the last place, relative.
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-7)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_strided_input(impl: str) -> None:
    wide = torch.randn(3, 4, 40)
    y, z, weight = wide[..., :16], wide[..., 20:36], torch.randn(16)
    torch.testing.assert_close(
        gated_rms_norm(y, z, weight, 2, impl=impl), gated_rms_norm(y, z, weight, 2, impl="naive")
    )
    before = wide.clone()
    with torch.no_grad():
        gated_rms_norm(y, z, weight, 2, impl=impl)
        rms_norm(y, weight, impl=impl)
    assert torch.equal(wide, before), "inputs must not be written to"


def test_channels_must_split_into_groups() -> None:
    with pytest.raises(ValueError, match="10 channels do not split into 4 groups"):
        gated_rms_norm(torch.zeros(1, 10), torch.zeros(1, 10), torch.ones(10), 4)


def test_the_default_device_of_a_call_is_not_kept() -> None:
    """The cached constant of the CPU form is on the CPU, whatever the default device is."""
    x, weight = torch.randn(2, 8), torch.randn(8)
    with torch.device("meta"):
        inside = rms_norm(x, weight, 0.0371)
    torch.testing.assert_close(rms_norm(x, weight, 0.0371), inside)


@pytest.mark.parametrize("fake_first", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_tensors_without_numbers_leave_no_constant_behind(rows: int, fake_first: bool) -> None:
    """Shapes can be computed in FakeTensorMode and on the meta device, before and after numbers."""
    eps = 1e-3 * (1 + rows + 4 * fake_first)  # no other test has made this constant

    def norms() -> list[torch.Tensor]:
        x, weight = torch.ones(rows, 8), torch.ones(8)
        with torch.no_grad():
            return [
                rms_norm(x, weight, eps, impl="cpu"),
                gated_rms_norm(x, x, weight, 2, eps, impl="cpu"),
            ]

    if not fake_first:
        norms()
    for mode in (FakeTensorMode(), torch.device("meta")):
        with mode:
            assert [y.shape for y in norms()] == [(rows, 8)] * 2
    for found in norms():
        torch.testing.assert_close(found, torch.ones(rows, 8), rtol=0.02, atol=0)
