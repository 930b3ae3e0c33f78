"""The divergence from the backbone against its formula; an MTP module that is trained with it."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite.data.batches import Batch
from nemotron_lite.train.distillation import distillation_loss, weighted_divergence
from nemotron_lite.train.loss import token_loss


def _numbers(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("slice_rows", [3, 100])
def test_divergence_and_gradient_are_the_formula(slice_rows: int) -> None:
    hidden, teacher, head = _numbers(0, 7, 5), _numbers(1, 7, 5), _numbers(2, 11, 5)
    weights = torch.rand(7, dtype=torch.float64)
    hidden.requires_grad_()
    teacher.requires_grad_()
    log_p, log_q = ((h @ head.T).log_softmax(-1) for h in (teacher.detach(), hidden))
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    total, found = weighted_divergence(hidden, teacher, head, weights, slice_rows=slice_rows)
    torch.testing.assert_close(found, each)
    torch.testing.assert_close(total, (each * weights).sum())
    (exact,) = torch.autograd.grad((each * weights).sum(), hidden)
    (got,) = torch.autograd.grad(3 * total, hidden)
    torch.testing.assert_close(got, 3 * exact)
    assert not any(part is not None for part in (teacher.grad, head.grad))


def test_positions_and_weights() -> None:
    """Depth k at position i learns from the backbone at i + k, within documents and masks."""
    hidden, head = _numbers(0, 2, 9, 5), _numbers(1, 11, 5)
    depths = [_numbers(2, 2, 8, 5), _numbers(3, 2, 7, 5)]
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    seq_idx = torch.tensor([[0] * 5 + [1] * 4, [0] * 9])
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    batch = Batch(tokens, seq_idx, mask)
    found = distillation_loss(hidden, depths, head, batch, mtp_weight=0.6)
    plain = token_loss(hidden, depths, head, batch, mtp_weight=0.6)
    assert found.by_depth[0] == pytest.approx(plain.by_depth[0])
    total = plain.by_depth[0]
    for k, states in enumerate(depths, start=1):
        parts = []
        for row in range(2):
            for i in range(9 - k - 1):
                target = i + k + 1
                if bool(mask[row, target]) and seq_idx[row, target] == seq_idx[row, i]:
                    p = (head @ hidden[row, i + k]).softmax(0)
                    q = (head @ states[row, i]).softmax(0)
                    parts.append(float((p * (p / q).log()).sum()))
        assert found.by_depth[k] == pytest.approx(sum(parts) / len(parts))
        total += 0.3 * found.by_depth[k]
    assert float(found.total) == pytest.approx(total)


def test_no_depths_is_the_plain_loss() -> None:
    hidden, head = _numbers(0, 1, 6, 5), _numbers(1, 11, 5)
    batch = Batch(torch.zeros(1, 6, dtype=torch.int64), None, None)
    found = distillation_loss(hidden, [], head, batch, mtp_weight=0.3)
    assert found.by_depth == token_loss(hidden, [], head, batch, mtp_weight=0.3).by_depth
