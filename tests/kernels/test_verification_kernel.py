"""The acceptance kernel against the definition in float64, for given uniforms: the same tokens.

If the target is within 1e-6 of a boundary of the cumulative sum, float32 sums may give another
token. The test checks that no case here is so close. Everything that the kernel must not read is
NaN: positions after the first rejection, rows from which it does not draw, and memory after the
end of a row's vocabulary.
"""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from nemotron_kernels import verification
from nemotron_kernels.verification import verify
from nemotron_lite import ops

SHAPES = [  # b, k, v
    (1, 1, 2),
    (3, 0, 7),
    (40, 4, 61),
    (24, 2, 1000),
    (6, 7, 129),
    (4, 3, 40_000),  # several blocks
]


def _case(b: int, k: int, v: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Rows of a larger tensor; half of the vocabulary has probability zero, as after top-p."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(2, b, k + 2, v + 3, generator=generator)[:, :, :-1, :v] * 1.5
    weights = raw.softmax(-1)
    weights = weights * (weights >= weights.median(-1, keepdim=True).values)
    room = torch.full((2, b, k + 2, v + 3), float("nan"))  # strided rows, NaN between them
    p, q = room[:, :, : k + 1, :v]
    p.copy_(weights[0] / weights[0].sum(-1, keepdim=True))
    q = q[:, :k]
    q.copy_((weights[1] / weights[1].sum(-1, keepdim=True))[:, :k])
    if k:  # some rows of p and q agree, so that many drafts are accepted
        agree = torch.rand(b, generator=generator) < 0.5
        q[agree] = p[agree, :k]
    uniforms = torch.rand(b, k + 1, generator=generator, dtype=torch.float64)
    flat = torch.rand(b * k, generator=generator, dtype=torch.float64)
    drafts = ops.draw(q.reshape(b * k, v), flat).view(b, k)
    return p, q, drafts, uniforms


def _distance(p, q, uniforms, lengths, accepted) -> torch.Tensor:
    """The distance of each target to the nearest boundary of the cumulative sum, relative to it."""
    near = []
    for row, kept in enumerate(accepted.tolist()):
        weights = p[row, kept].double()
        if kept < int(lengths[row]):
            rest = (weights - q[row, kept].double()).clamp(min=0)
            weights = rest if rest.sum() > 0 else weights
        sums = weights.cumsum(0) / weights.sum()
        near.append((sums - uniforms[row, -1]).abs().min())
    return torch.stack(near)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("b", "k", "v"), SHAPES)
def test_the_same_tokens_as_the_definition(b: int, k: int, v: int, ragged: bool) -> None:
    p, q, drafts, uniforms = _case(b, k, v)
    lengths = torch.arange(b) % (k + 1) if ragged else None
    exact = ops.verify(p, q, drafts, uniforms, lengths, impl="naive")
    found = verify(p, q, drafts, uniforms, lengths)
    assert torch.equal(found.accepted, exact.accepted)
    every = torch.full((b,), k) if lengths is None else lengths
    clear = _distance(p, q, uniforms, every, exact.accepted) > 1e-6
    assert bool(clear.all()), "a target is too close to a boundary: choose another seed"
    assert torch.equal(found.token, exact.token)
    if k > 1 and b > 3:
        assert len(set(exact.accepted.tolist())) > 1, "rows must differ"


def test_it_reads_only_the_rows_it_needs() -> None:
    p, q, drafts, uniforms = _case(12, 3, 200, seed=4)
    expected = ops.verify(p, q, drafts, uniforms, impl="naive")
    poor_p, poor_q = torch.full_like(p, float("nan")), torch.full_like(q, float("nan"))
    for row, kept in enumerate(expected.accepted.tolist()):
        for j in range(min(kept + 1, 3)):
            token = drafts[row, j]
            poor_p[row, j, token], poor_q[row, j, token] = p[row, j, token], q[row, j, token]
        poor_p[row, kept] = p[row, kept]
        if kept < 3:
            poor_q[row, kept] = q[row, kept]
    found = verify(poor_p, poor_q, drafts, uniforms)
    assert torch.equal(found.accepted, expected.accepted)
    assert torch.equal(found.token, expected.token)


def test_it_stops_reading_once_the_token_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass for the sum; the second pass stops at the block with the token."""
    builder = interpreter.interpreter_builder
    load, read = builder.create_masked_load, []

    def counting(pointers, mask, *rest):
        if pointers.get_element_ty() == tl.float32:
            read.append(int(mask.data.sum()))
        return load(pointers, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counting, raising=False)
    p = torch.zeros(1, 1, 40_000)
    p[0, 0, 3] = 1.0
    none, uniform = torch.zeros(1, 0, dtype=torch.int64), torch.tensor([[0.5]]).double()
    found = verify(p, p[:, :0], none, uniform)
    assert found.token.tolist() == [3]
    assert sum(read) == 40_000 + verification.BLOCKS[0]["BLOCK"]


def test_nothing_left_of_p_minus_q_and_targets_at_the_very_end() -> None:
    """q is larger than p everywhere, which rounding can cause: the draw is from p."""
    p = torch.tensor([[[0.0, 0.4, 0.6, 0.0], [0.25] * 4]]).expand(3, -1, -1)
    q = torch.tensor([[[0.0, 0.5, 0.7, 0.0]]]).expand(3, -1, -1)
    uniforms = torch.tensor([[0.99, 0.1], [0.99, 0.5], [0.99, 1 - 2.0**-53]]).double()
    drafts = torch.ones(3, 1, dtype=torch.int64)
    found = verify(p, q, drafts, uniforms)
    assert found.accepted.tolist() == [0, 0, 0]
    assert found.token.tolist() == [1, 2, 2], "and never a token of weight zero"


def test_wrong_inputs_are_refused() -> None:
    p, q, drafts, uniforms = _case(2, 2, 9)
    with pytest.raises(ValueError, match="the kernel takes float32"):
        verify(p.double(), q.double(), drafts, uniforms)
    with pytest.raises(ValueError, match=r"needs q \(2, 2, 9\)"):
        verify(p, q[:, :1], drafts, uniforms)
