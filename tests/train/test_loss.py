"""The loss: fused against plain cross-entropy, and its labels against brute force."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_lite.data import Batch, ConcatenatedDocuments
from nemotron_lite.model import Nemotron
from nemotron_lite.train.loss import count_targets, targets, token_loss, weighted_cross_entropy


@pytest.mark.parametrize("slice_rows", [1, 7, 16, 50, 1000])
def test_fused_equals_plain_in_value_and_gradient(slice_rows: int) -> None:
    hidden = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    head = torch.randn(31, 12, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(31, (50,))
    weights = torch.rand(50, dtype=torch.float64)
    weights[::3] = 0

    rows = F.cross_entropy(hidden @ head.T, labels, reduction="none")
    expected = (rows * weights).sum() * 1.7
    wanted = torch.autograd.grad(expected, (hidden, head))
    total, nll = weighted_cross_entropy(hidden, head, labels, weights, slice_rows=slice_rows)
    found = torch.autograd.grad(total * 1.7, (hidden, head))

    torch.testing.assert_close(total * 1.7, expected)
    torch.testing.assert_close(nll, rows.detach())
    assert not nll.requires_grad
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_fused_gradcheck() -> None:
    hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    head = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(5, (6,)), torch.rand(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: weighted_cross_entropy(h, w, labels, weights, slice_rows=4)[0], (hidden, head)
    )


def test_fused_with_large_logits_and_one_frozen_input() -> None:
    hidden = torch.tensor([[200.0], [-200.0]])
    head = torch.tensor([[1.0], [-1.0]])
    total, nll = weighted_cross_entropy(hidden, head, torch.tensor([1, 1]), torch.ones(2))
    assert total.item() == pytest.approx(400.0)
    assert nll.tolist() == [400.0, 0.0]
    head.requires_grad_()
    total, _ = weighted_cross_entropy(hidden, head, torch.tensor([1, 1]), torch.ones(2))
    total.backward()
    assert head.grad.flatten().tolist() == [200.0, -200.0]


def test_bf16_autocast_is_close_and_gives_float32_gradients() -> None:
    hidden = torch.randn(300, 32, requires_grad=True)
    head = (torch.randn(200, 32) * 0.1).requires_grad_()
    labels, weights = torch.randint(200, (300,)), torch.full((300,), 1 / 300)
    exact, _ = weighted_cross_entropy(hidden, head, labels, weights)
    wanted = torch.autograd.grad(exact, (hidden, head))
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = weighted_cross_entropy(hidden, head, labels, weights)
    found = torch.autograd.grad(rough, (hidden, head))
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=2e-3)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.02 * b.norm()


def test_memory_of_the_logits_is_one_slice() -> None:
    """No intermediate tensor is larger than a slice of logits, or than the inputs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] == 500:
                self.rows = max(self.rows, out.shape[0])
            return out

    hidden = torch.randn(640, 8, requires_grad=True)
    head = torch.randn(500, 8, requires_grad=True)
    with Largest() as seen:
        total, _ = weighted_cross_entropy(
            hidden, head, torch.zeros(640, dtype=torch.int64), torch.ones(640), slice_rows=64
        )
        total.backward()
    assert seen.rows == 64


def brute_force(
    logits: list[Tensor], batch: Batch, mtp_weight: float
) -> tuple[Tensor, list[Tensor]]:
    """With loops over depths, rows and positions: depth k at position i predicts i + k + 1."""
    b, t = batch.tokens.shape
    means = []
    for k, depth_logits in enumerate(logits):
        terms = []
        for row in range(b):
            for i in range(t):
                j = i + k + 1
                if j >= t:
                    continue
                if batch.seq_idx is not None and batch.seq_idx[row, i] != batch.seq_idx[row, j]:
                    continue
                if batch.mask is not None and not batch.mask[row, j]:
                    continue
                log_p = depth_logits[row, i].log_softmax(-1)
                terms.append(-log_p[batch.tokens[row, j]])
        means.append(torch.stack(terms).mean())
    depths = len(logits) - 1
    return means[0] + mtp_weight / max(1, depths) * sum(means[1:]), means


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("depths", [0, 1, 2])
def test_labels_of_every_depth_against_brute_force(
    model: Nemotron, text: ConcatenatedDocuments, packed: bool, masked: bool, depths: int
) -> None:
    model = model.double()
    batch = text.batch(0, batch_size=3, seq_len=40, seed=0)
    mask = None
    if masked:
        mask = torch.rand(3, 40) > 0.3
        mask[1, 25:] = False  # padding at the end
    batch = Batch(batch.tokens, batch.seq_idx if packed else None, mask)
    if packed:
        assert int(batch.seq_idx.max()) > 0

    out = model(batch.tokens, seq_idx=batch.seq_idx, mtp_depths=depths)
    expected, means = brute_force([out.logits, *out.mtp_logits], batch, 0.3)
    found = token_loss(out.hidden, out.mtp_hidden, model.lm_head, batch, mtp_weight=0.3)
    torch.testing.assert_close(found.total, expected)
    assert found.by_depth == pytest.approx([float(m.detach()) for m in means])

    wanted = torch.autograd.grad(expected, list(model.lm_head.parameters()), retain_graph=True)
    gradient = torch.autograd.grad(found.total, list(model.lm_head.parameters()))
    torch.testing.assert_close(gradient, wanted)


def test_targets_never_cross_a_document() -> None:
    tokens = torch.tensor([[10, 11, 12, 20, 21, 30]])
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2]])
    labels, valid = targets(Batch(tokens, seq_idx), 0)
    assert labels[valid].tolist() == [11, 12, 21]
    labels, valid = targets(Batch(tokens, seq_idx), 1)
    assert labels[valid].tolist() == [12]
    assert not targets(Batch(tokens, seq_idx), 2)[1].any()
    # A repeated number starts a new document, so the token after the next is in another one.
    returning = Batch(tokens, torch.tensor([[0, 1, 0, 1, 1, 0]]))
    assert targets(returning, 0)[1].tolist() == [[False, False, False, True, False]]
    assert not targets(returning, 1)[1].any()
    assert targets(Batch(tokens), 2)[0].tolist() == [[20, 21, 30]]
    with pytest.raises(ValueError, match="rows of 6 tokens have no target at depth 5"):
        targets(Batch(tokens), 5)


def test_accumulated_shares_add_up_to_the_whole(
    model: Nemotron, text: ConcatenatedDocuments
) -> None:
    """Two halves of a batch with very different numbers of targets give its loss and gradient."""
    model = model.double()
    whole = text.batch(0, batch_size=4, seq_len=30, seed=0)
    mask = torch.ones(4, 30, dtype=torch.bool)
    mask[:2, 5:] = False
    whole = whole._replace(mask=mask)
    halves = [Batch(*(x[:2] for x in whole)), Batch(*(x[2:] for x in whole))]
    counts = count_targets(halves, 2)
    assert counts == count_targets([whole], 2)

    def gradient(batches: list[Batch]) -> tuple[list[float], Tensor]:
        model.zero_grad()
        parts = [0.0, 0.0, 0.0]
        for batch in batches:
            out = model.forward_hidden(batch.tokens, seq_idx=batch.seq_idx, mtp_depths=2)
            loss = token_loss(
                out.hidden,
                out.mtp_hidden,
                model.lm_head,
                batch,
                mtp_weight=0.3,
                counts=counts,
            )
            loss.total.backward()
            parts = [a + b for a, b in zip(parts, loss.by_depth, strict=True)]
        return parts, torch.cat([p.grad.flatten() for p in model.parameters()])

    together, apart = gradient([whole]), gradient(halves)
    assert apart[0] == pytest.approx(together[0])
    torch.testing.assert_close(apart[1], together[1])


def test_a_batch_without_targets_is_zero_and_not_nan(model: Nemotron) -> None:
    batch = Batch(torch.zeros(1, 8, dtype=torch.int64), None, torch.zeros(1, 8, dtype=torch.bool))
    out = model.forward_hidden(batch.tokens, mtp_depths=2)
    loss = token_loss(out.hidden, out.mtp_hidden, model.lm_head, batch, mtp_weight=0.3)
    loss.total.backward()
    assert loss.by_depth == [0.0, 0.0, 0.0]
    assert loss.total.item() == 0.0
    assert not any(p.grad.any() for p in model.lm_head.parameters())
