"""Searched block scales: never worse than the rule, and as good as trying all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemotron_lite.quantization import search_block_scales
from nemotron_lite.quantization.nvfp4 import quantize


def errors(x: Tensor, decoded: Tensor) -> Tensor:
    """Squared error of each block of 16."""
    pad = -x.shape[-1] % 16
    return torch.nn.functional.pad(x - decoded, (0, pad)).unflatten(-1, (-1, 16)).square().sum(-1)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(8, 64), (5, 40), (3, 16), (3, 6, 24)])
def test_no_block_is_worse_than_with_the_rule(shape: tuple[int, ...]) -> None:
    x = draw(0, *shape)
    rule = quantize(x, batch_dims=len(shape) - 2)
    best = search_block_scales(x, batch_dims=len(shape) - 2)
    ours, theirs = errors(x, best.dequantize()), errors(x, rule.dequantize())
    assert bool((ours <= theirs * (1 + 1e-6)).all())
    assert float(ours.sum()) < 0.97 * float(theirs.sum())
    assert torch.equal(best.scale, rule.scale)


def test_as_good_as_every_scale_there_is() -> None:
    x = draw(1, 16, 64) * torch.tensor([[1.0], [0.01], [100.0], [3.0]]).repeat(4, 1)
    best = errors(x, search_block_scales(x).dequantize())
    everything = errors(x, search_block_scales(x, reach=126).dequantize())
    assert torch.equal(best, everything)


def test_the_codes_are_the_nearest_for_their_scale() -> None:
    x = draw(2, 4, 32)
    packed = search_block_scales(x)
    factor = (packed.scales.float() * packed.scale).repeat_interleave(16, 1)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = torch.cat([-grid, grid])
    nearest = (x.unsqueeze(-1) - grid * factor.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((x - packed.dequantize()).abs(), nearest, atol=1e-6, rtol=0)


def test_values_on_the_grid_stay() -> None:
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = torch.cat([grid, -grid]).repeat(4, 2) * 448
    packed = search_block_scales(x)
    assert torch.equal(packed.dequantize(), x)
    assert torch.equal(packed.scales.float(), torch.full((4, 2), 448.0)), "the rule wins ties"


def test_zeros_and_flushed_blocks_keep_a_scale_of_zero() -> None:
    x = torch.zeros(2, 48)
    assert torch.equal(search_block_scales(x).dequantize(), x)
    x[0, :16], x[1, 20] = 1.0, 1e-7
    packed = search_block_scales(x)
    assert packed.scales.float()[1, 1] == 0
    assert bool(packed.dequantize().isfinite().all())


def test_each_expert_is_a_tensor_of_its_own() -> None:
    x = draw(3, 4, 8, 32) * torch.tensor([1.0, 1e-3, 50.0, 1e4]).view(4, 1, 1)
    together = search_block_scales(x, batch_dims=1)
    for e in range(4):
        alone = search_block_scales(x[e])
        assert torch.equal(together.codes[e], alone.codes)
        assert torch.equal(together.scale[e], alone.scale)


def test_errors_name_the_tensor() -> None:
    with pytest.raises(ValueError, match="lm_head holds NaN"):
        search_block_scales(torch.full((2, 16), torch.nan), name="lm_head")
    with pytest.raises(ValueError, match="reach=-1"):
        search_block_scales(torch.ones(2, 16), reach=-1)
