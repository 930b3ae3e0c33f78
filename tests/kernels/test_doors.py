"""The kernels as the package reaches them: through the one door of each operation."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from nemotron_lite import ops


def _both(function, *arguments, **options):
    """(by the definition, by the kernel), each as a tuple of tensors."""
    found = []
    for impl in ("naive", "triton"):
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        result = function(*copies, impl=impl, **options)
        found.append((result,) if isinstance(result, torch.Tensor) else tuple(result))
    return found


def _scan_inputs():
    return (
        torch.randn(2, 33, 4, 16), torch.rand(2, 33, 4), -torch.rand(4) - 0.1,
        torch.randn(2, 33, 2, 16), torch.randn(2, 33, 2, 16),
    )  # fmt: skip


def _cases():
    yield "causal_conv1d", (torch.randn(2, 9, 8), torch.randn(8, 4), torch.randn(8)), {}
    yield "rms_norm", (torch.randn(3, 32), torch.randn(32)), {}
    yield "gated_rms_norm", (torch.randn(3, 32), torch.randn(3, 32), torch.randn(32), 2), {}
    yield "ssd", _scan_inputs(), {"D": torch.rand(4)}
    x, dt, A, B, C = _scan_inputs()
    step = (torch.randn(2, 4, 16, 16), x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])
    yield "ssd_step", step, {"D": torch.rand(4)}
    indices = torch.stack([torch.randperm(6)[:2] for _ in range(7)])
    mlp = (torch.randn(7, 16), torch.randn(6, 24, 16), torch.randn(6, 16, 24), torch.rand(7, 2))
    yield "expert_mlp", (*mlp, indices), {}


@pytest.mark.parametrize("number", range(6), ids=lambda i: list(_cases())[i][0])
def test_a_forced_kernel_gives_what_the_definition_gives(number: int) -> None:
    torch.manual_seed(number)
    name, arguments, options = list(_cases())[number]
    exact, found = _both(getattr(ops, name), *arguments, **options)
    for one, other in zip(exact, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_the_router_through_its_door() -> None:
    x, weight, bias = torch.randn(9, 16), torch.randn(12, 16), torch.randn(12) * 0.1
    exact, found = _both(ops.route, x, weight, bias, top_k=3, scale=2.5)
    dense = [torch.zeros(9, 12).scatter(1, r[1], r[0]) for r in (exact, found)]
    torch.testing.assert_close(dense[1], dense[0])
    torch.testing.assert_close(found[2], exact[2])


def test_the_acceptance_rule_through_its_door() -> None:
    p, q = torch.rand(2, 6, 4, 50).softmax(-1)
    drafts, uniforms = torch.randint(50, (6, 3)), torch.rand(6, 4, dtype=torch.float64)
    exact, found = _both(ops.verify, p, q[:, :3].contiguous(), drafts, uniforms)
    assert [x.tolist() for x in found] == [x.tolist() for x in exact]


def test_a_choice_that_cannot_be_met_says_why() -> None:
    """Outside the interpreter, CPU tensors and a forced kernel do not go together."""
    script = (
        "import torch; from nemotron_lite import ops\n"
        "x = torch.zeros(1, 4, 8)\n"
        "ops.causal_conv1d(x, torch.zeros(8, 4))\n"
        "ops.causal_conv1d(x, torch.zeros(8, 4), impl='triton')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert "runs on an NVIDIA GPU" in done.stderr and "impl='torch'" in done.stderr
