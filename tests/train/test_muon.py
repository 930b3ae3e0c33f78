"""Muon: the orthogonal part, one step beside PyTorch's own, and which tensors it moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nemotron_lite.layers.moe import Experts
from nemotron_lite.model import Nemotron
from nemotron_lite.train import muon
from nemotron_lite.train.muon import Muon, orthogonal
from nemotron_lite.train.optimizer import make_optimizer, parameter_groups

RECIPE = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


@pytest.fixture(params=[False, True], ids=["float32", "bf16"])
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(muon, "prefers_bf16", lambda device: request.param)
    return bool(request.param)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (3, 12, 20), (2, 4, 20, 12)])
def test_singular_values_end_near_one(shape: tuple[int, ...], narrow: bool) -> None:
    x = torch.randn(shape) * torch.logspace(0, -1, shape[-1])
    y = orthogonal(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    aligned = torch.einsum("...rk,...rc,...kc->...k", u, y, v)
    torch.testing.assert_close(aligned, values.flip(-1).sort(-1)[0], atol=0.7, rtol=0)
    assert (aligned > 0.5).all()


def test_zeros_stay_zero(narrow: bool) -> None:
    stack = torch.randn(3, 8, 12)
    stack[1] = 0
    assert not orthogonal(stack)[1].any()
    torch.testing.assert_close(orthogonal(stack)[2], orthogonal(stack[2]))


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_three_steps_beside_torchs_own(shape: tuple[int, int]) -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim has no Muon before 2.9")
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    groups = [{"params": [ours], "weight_decay": 0.1, "orthogonal": True}]
    mine = Muon(groups, lr=0.02)
    reference = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    # Theirs averages the gradients with weight 0.05; the scale is divided out. It runs in BF16.
    moved = (ours - start).norm()
    assert moved > 0.01
    assert (ours - theirs).norm() < 0.03 * moved


def test_a_stack_moves_like_its_matrices(narrow: bool) -> None:
    stack = torch.randn(4, 6, 10)
    grads = [torch.randn(4, 6, 10) for _ in range(2)]
    together = nn.Parameter(stack.clone())
    alone = [nn.Parameter(matrix.clone()) for matrix in stack]
    first = Muon([{"params": [together], "orthogonal": True}], lr=0.1)
    second = Muon([{"params": alone, "orthogonal": True}], lr=0.1)
    for grad in grads:
        together.grad = grad.clone()
        for parameter, part in zip(alone, grad, strict=True):
            parameter.grad = part.clone()
        first.step()
        second.step()
    torch.testing.assert_close(together.detach(), torch.stack([p.detach() for p in alone]))


def test_which_tensors_are_moved(model: Nemotron) -> None:
    groups = parameter_groups(model, 0.1, orthogonal=True)
    names = {id(p): name for name, p in model.named_parameters()}
    *_, chosen = ({names[id(p)] for p in group["params"]} for group in groups)
    expected = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    }
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            expected |= {f"{path}.up_proj", f"{path}.down_proj"}
    assert chosen == expected
    everything = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(everything) == sorted(names.values())


def test_the_others_are_moved_by_adamw(model: Nemotron) -> None:
    moved = {id(p) for p in parameter_groups(model, 0.1, orthogonal=True)[-1]["params"]}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    ends = []
    for kind in ("adamw", "muon"):
        model.load_state_dict(start, strict=False)
        optimizer = make_optimizer(model, name=kind, **RECIPE)
        for _ in range(2):
            for name, p in model.named_parameters():
                p.grad = grads[name].clone()
            optimizer.step()
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, p in model.named_parameters():
        assert torch.equal(ends[0][name], ends[1][name]) == (id(p) not in moved), name
