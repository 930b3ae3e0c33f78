"""A state in float16 gets the same bits from the kernel and from PyTorch, step by step."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite import ops


@pytest.mark.parametrize("n", [16, 20])
@pytest.mark.parametrize("seed", [None, 0, 2**62 + 5])
def test_kernel_and_torch_round_alike(seed: int | None, n: int) -> None:
    """The sums are exact in float32, so only the random bits could differ."""
    b, h, p, g = 2, 4, 5, 2
    start = (1 + torch.randint(0, 2**10, (b, h, p, n)) / 2**10).half()
    start[0, 0] *= 2.0**-16  # where float16 has a fixed step
    x = torch.randint(-3, 4, (b, h, p)).float()
    B = torch.randint(-255, 256, (b, g, n)) / 2.0**20
    dt, A, C = torch.ones(b, h), torch.zeros(h), torch.randn(b, g, n)
    found = {}
    for impl in ("naive", "torch", "cpu", "triton"):
        state = start.clone()
        _, state = ops.ssd_step(state, x, dt, A, B, C, seed=seed, impl=impl)
        for i in range(3):
            again = None if seed is None else seed + i
            _, state = ops.ssd_step(state, x, dt, A, B, C, seed=again, impl=impl)
        found[impl] = state.view(torch.int16)
    assert torch.equal(found["naive"], found["cpu"])
    assert torch.equal(found["torch"], found["cpu"])
    assert torch.equal(found["triton"], found["cpu"])
    assert not torch.equal(found["cpu"], start.view(torch.int16))
