"""Hooks run on every module, in every way through the model, and what they return is used.

Containers (`nn.ModuleList`) are called in no PyTorch model. A full backward hook on the model
itself does not run, because PyTorch looks for tensors in a result that is a tensor or a tuple, and
the model returns a dataclass; a hook on `model.backbone` or `model.lm_head` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nemotron_lite import SpeculationOptions, generate
from nemotron_lite.data import ConcatenatedDocuments
from nemotron_lite.model import Nemotron
from nemotron_lite.train import TrainConfig, train
from tests.modules import every_kind, random_tokens

CONTAINERS = {"backbone.layers", "mtp.layers"}


def forward(model: Nemotron) -> None:
    model(random_tokens(2, 8), mtp_depths=2)


def decode(model: Nemotron) -> None:
    cache, tokens = model.empty_cache(2), random_tokens(2, 8)
    with torch.no_grad():
        model(tokens, cache)
        model(tokens[:, :1], cache)


def read_draft(model: Nemotron) -> None:
    cache, tokens = model.empty_cache(2), random_tokens(2, 8)
    with torch.no_grad():
        model(tokens, cache, draft=True)


def speculate(model: Nemotron) -> None:
    generate(model, [1, 2, 3], max_new_tokens=6, speculation=SpeculationOptions())


def training(model: Nemotron) -> None:
    tokens = np.random.default_rng(0).integers(0, 64, 4000)
    data = ConcatenatedDocuments(tokens, np.array([0, 1000]))
    train(model, data, TrainConfig(steps=1, seq_len=32, batch_size=1), progress=False)


def distilling(model: Nemotron) -> None:
    tokens = np.random.default_rng(0).integers(0, 64, 4000)
    data = ConcatenatedDocuments(tokens, np.array([0, 1000]))
    config = TrainConfig(steps=1, seq_len=32, batch_size=1, mtp_target="backbone")
    train(model, data, config, progress=False)


def backward(model: Nemotron) -> None:
    out = model(random_tokens(2, 8), mtp_depths=2)
    (out.logits.sum() + sum(logits.sum() for logits in out.mtp_logits)).backward()


def not_called(
    model: Nemotron, run: Callable[[Nemotron], None], register: str, *, root: bool = True
) -> set[str]:
    """Modules whose hook did not run; without `root` the model itself gets none."""
    called: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    modules = [(name, m) for name, m in model.named_modules() if root or name]
    handles = [getattr(m, register)(note(name)) for name, m in modules]
    run(model)
    for handle in handles:
        handle.remove()
    return {name for name, _ in model.named_modules()} - called


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize(
    ("run", "whole"),
    [
        (forward, True), (decode, False), (read_draft, False), (speculate, True),
        (training, True), (distilling, True),
    ],
)  # fmt: skip
def test_forward_hooks_run_on_every_module(
    run: Callable[[Nemotron], None], whole: bool, register: str
) -> None:
    """Decoding and reading a draft do not use the MTP module."""
    missing = not_called(every_kind(), run, register)
    if not whole:
        missing = {name for name in missing if not name.startswith("mtp")} | {"mtp.layers"}
    assert missing == CONTAINERS


# Tokens need no gradient, so the first layers' hooks run with the gradient of their outputs.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed")
@pytest.mark.parametrize("run", [backward, training])
def test_full_backward_hooks_run_on_every_module_inside(run: Callable[[Nemotron], None]) -> None:
    missing = not_called(every_kind(), run, "register_full_backward_hook", root=False)
    assert missing == CONTAINERS | {""}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed")
def test_torch_says_that_a_backward_hook_on_the_model_itself_does_not_run() -> None:
    model = every_kind()
    model.register_full_backward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="module output should be a Tensor or a tuple"):
        backward(model)


def test_hooks_on_all_modules_at_once_see_the_head_in_training() -> None:
    seen: list[type] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    model = every_kind()
    try:
        training(model)
    finally:
        handle.remove()
    assert set(map(type, model.modules())) - set(seen) == {nn.ModuleList}


def changes(result: Any) -> Any:
    """The same result with another first tensor."""
    if isinstance(result, Tensor):
        return result * 1.5 + 0.25
    first, *others = result
    kind = type(result)
    parts = (first * 1.5 + 0.25, *others)
    return kind(*parts) if hasattr(result, "_fields") else kind(parts)


MODULES = [name for name, _ in every_kind().named_modules() if name not in {"", "mtp", *CONTAINERS}]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("mtp")])
def test_what_a_hook_returns_is_used(name: str) -> None:
    """In a whole forward pass, a decoding step and a draft."""
    model, tokens = every_kind(), random_tokens(2, 8)
    cache = model.empty_cache(2)
    with torch.no_grad():
        model(tokens[:, :4], cache)

        def results() -> list[Tensor]:
            step, draft = cache.clone(), cache.clone()
            return [
                model(tokens).logits,
                model(tokens[:, 4:5], step).logits,
                model(tokens[:, 4:], draft, draft=True).logits,
            ]

        before = results()
        handle = model.get_submodule(name).register_forward_hook(lambda m, a, out: changes(out))
        after = results()
        handle.remove()
    for old, new in zip(before, after, strict=True):
        assert (old - new).abs().max() > 1e-4


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("mtp")])
def test_what_a_hook_on_the_mtp_module_returns_is_used(name: str) -> None:
    model, tokens = every_kind(), random_tokens(2, 8)
    with torch.no_grad():
        before = model(tokens, mtp_depths=1).mtp_logits[0]
        handle = model.get_submodule(name).register_forward_hook(lambda m, a, out: changes(out))
        after = model(tokens, mtp_depths=1).mtp_logits[0]
        handle.remove()
    assert (before - after).abs().max() > 1e-4


def test_a_hook_on_the_head_changes_the_training_loss() -> None:
    losses = []
    for factor in (1.0, 0.5):
        model = every_kind()
        model.lm_head.register_forward_hook(lambda m, a, out, f=factor: out * f)
        tokens = np.random.default_rng(0).integers(0, 64, 4000)
        data = ConcatenatedDocuments(tokens, np.array([0, 1000]))
        config = TrainConfig(steps=1, seq_len=32, batch_size=1)
        losses.append(train(model, data, config, progress=False).history[0]["ce"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)
