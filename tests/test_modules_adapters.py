"""Adapters, parametrizations and frozen parts: what is put around a layer is part of the layer.

The cases are generated from the modules of a model with every kind of layer. The routed experts are
left out: their matrices are stacks of parameters and no linear layers, so an adapter library that
looks for `nn.Linear` does not find them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from nemotron_lite import SpeculationOptions, generate
from nemotron_lite.data import Batch, ConcatenatedDocuments
from nemotron_lite.layers import plain_weight
from nemotron_lite.model import Nemotron
from nemotron_lite.train import TrainConfig, train
from nemotron_lite.train.distillation import distillation_loss
from nemotron_lite.train.evaluate import evaluate
from nemotron_lite.train.loss import token_loss, weighted_cross_entropy
from tests.modules import every_kind, random_tokens

EXACT = dict(rtol=1e-5, atol=1e-6)


class LoRA(nn.Module):
    """As peft wraps a linear layer: the frozen layer, and a product of two small ones beside it."""

    def __init__(self, base: nn.Linear, rank: int = 4, spread: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.lora_B.weight, std=spread) if spread else nn.init.zeros_(
            self.lora_B.weight
        )

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    def merged(self) -> Tensor:
        return self.base_layer.weight + self.lora_B.weight @ self.lora_A.weight


LINEAR = [name for name, m in every_kind().named_modules() if isinstance(m, nn.Linear)]
WEIGHTS = [  # every parameter, with its module
    (name.rpartition(".")[0], name.rpartition(".")[2])
    for name, _ in every_kind().named_parameters()
]


def data() -> ConcatenatedDocuments:
    tokens = np.random.default_rng(0).integers(0, 64, 4000)
    return ConcatenatedDocuments(tokens, np.array([0, 1000]))


def adapted(name: str, spread: float = 0.3) -> tuple[Nemotron, Nemotron]:
    """A model with an adapter around one layer, and one with the adapter merged into the weight."""
    model, merged = every_kind(), every_kind()
    torch.manual_seed(3)
    adapter = LoRA(model.get_submodule(name), spread=spread)
    model.set_submodule(name, adapter)
    with torch.no_grad():
        merged.get_submodule(name).weight.copy_(adapter.merged())
    return model, merged


def test_every_kind_of_linear_layer_is_tested() -> None:
    ends = {name.rpartition(".")[2] for name in LINEAR}
    assert ends == {
        "in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "fc1_latent_proj",
        "fc2_latent_proj", "up_proj", "down_proj", "eh_proj", "lm_head",
    }  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_an_adapter_changes_every_way_to_the_output(name: str) -> None:
    model, merged = adapted(name)
    plain, tokens = every_kind(), random_tokens(2, 8)
    with torch.no_grad():
        outs = [m(tokens, mtp_depths=2) for m in (model, merged, plain)]
        for found, expected in zip(
            (outs[0].logits, *outs[0].mtp_logits),
            (outs[1].logits, *outs[1].mtp_logits),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        last = (outs[0].mtp_logits[-1] - outs[2].mtp_logits[-1]).abs().max()
        assert last > 1e-3, "the adapter changes what the model predicts"

        caches = [m.empty_cache(2) for m in (model, merged)]
        for part, draft in (
            (tokens[:, :4], False),
            (tokens[:, 4:5], False),
            (tokens[:, 5:8], True),
        ):
            found, expected = (
                m(part, cache, draft=draft).logits
                for m, cache in zip((model, merged), caches, strict=True)
            )
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shortlist", [None, tuple(range(0, 64, 3))])
def test_adapters_around_every_layer_speculate_like_the_merged_model(
    shortlist: tuple[int, ...] | None,
) -> None:
    model, merged = every_kind(), every_kind()
    torch.manual_seed(3)
    for name in LINEAR:
        adapter = LoRA(model.get_submodule(name), spread=0.1)
        model.set_submodule(name, adapter)
        with torch.no_grad():
            merged.get_submodule(name).weight.copy_(adapter.merged())
    options = SpeculationOptions(shortlist=shortlist)
    found, expected, plain = (
        generate(m, [1, 2, 3], max_new_tokens=12, temperature=0.0, speculation=s)
        for m, s in ((model, options), (merged, options), (model, None))
    )
    assert found == expected == plain


def test_training_moves_the_adapter_of_every_linear_layer_and_nothing_else() -> None:
    model = every_kind().requires_grad_(False)
    for name in LINEAR:
        model.set_submodule(name, LoRA(model.get_submodule(name)))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, data(), TrainConfig(steps=2, seq_len=32, batch_size=2), progress=False)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if ".lora_" in n}


def test_frozen_weights_cost_no_gradient() -> None:
    model = every_kind().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    config = TrainConfig(steps=1, seq_len=32, batch_size=2)
    before = model.lm_head.weight.detach().clone()
    train(model, data(), config, progress=False)
    assert not torch.equal(before, model.lm_head.weight)
    tokens = random_tokens(2, 8)
    model(tokens).logits.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["lm_head.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_losses_of_a_called_head_equal_those_of_a_merged_one(dtype: torch.dtype) -> None:
    """Values and gradients, over several slices, for both losses and the evaluation."""
    torch.manual_seed(0)
    head = LoRA(nn.Linear(8, 20, bias=False, dtype=dtype), spread=0.5).to(dtype)
    hidden = torch.randn(30, 8, dtype=dtype, requires_grad=True)
    labels, weights = torch.randint(20, (30,)), torch.rand(30, dtype=dtype)
    trained = [hidden, head.lora_A.weight, head.lora_B.weight]
    found, nll = weighted_cross_entropy(hidden, head, labels, weights, slice_rows=7)
    rows = nn.functional.cross_entropy(hidden @ head.merged().T, labels, reduction="none")
    expected = (rows * weights).sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(nll, rows)
    for ours, theirs in zip(
        torch.autograd.grad(found * 1.7, trained),
        torch.autograd.grad(expected * 1.7, trained),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)

    batch = Batch(torch.randint(20, (2, 9)))
    states = torch.randn(3, 2, 9, 8, dtype=dtype, requires_grad=True)
    for loss in (token_loss, distillation_loss):
        totals = []
        for given in (head, head.merged().detach()):
            mtp = [states[1][:, :8], states[2][:, :7]]
            total = loss(states[0], mtp, given, batch, mtp_weight=0.6).total
            totals.append((total, torch.autograd.grad(total, states)[0]))
        torch.testing.assert_close(totals[0], totals[1])
    before = head.lora_A.weight.grad
    distillation_loss(states[0], [states[1][:, :8]], head, batch, mtp_weight=0.6).total.backward()
    assert before is None and head.lora_A.weight.grad is not None, "CE_0 trains the adapter"


def test_evaluation_reads_the_adapter() -> None:
    from nemotron_lite.data import HeldOut

    model, merged = adapted("lm_head")
    held_out = HeldOut((np.arange(60) % 64,), 60)
    found, expected = (evaluate(m, held_out).bits_per_byte for m in (model, merged))
    assert found == pytest.approx(expected, rel=1e-5)


class Doubled(nn.Module):
    """A parametrization: the weight is twice what is stored."""

    def forward(self, stored: Tensor) -> Tensor:
        return stored * 2


def double(module: nn.Module, name: str) -> None:
    parametrize.register_parametrization(module, name, Doubled())


def logits_in_every_way(model: Nemotron) -> list[Tensor]:
    tokens = random_tokens(2, 8)
    with torch.no_grad():
        out = model(tokens, mtp_depths=2)
        cache = model.empty_cache(2)
        read = model(tokens[:, :4], cache).logits
        step = model(tokens[:, 4:5], cache).logits
        draft = model(tokens[:, 5:8], cache, draft=True).logits
    return [out.logits, *out.mtp_logits, read, step, draft]


@pytest.mark.parametrize(("path", "name"), WEIGHTS)
def test_a_parametrized_weight_is_computed_everywhere_and_trains(path: str, name: str) -> None:
    model, doubled = every_kind(), every_kind()
    double(model.get_submodule(path), name)
    with torch.no_grad():
        getattr(doubled.get_submodule(path), name).mul_(2)
    for found, expected in zip(
        logits_in_every_way(model), logits_in_every_way(doubled), strict=True
    ):
        torch.testing.assert_close(found, expected, **EXACT)
    stored = model.get_submodule(path).parametrizations[name].original
    batch = Batch(random_tokens(2, 16))
    out = model.forward_hidden(batch.tokens, mtp_depths=2)
    token_loss(out.hidden, out.mtp_hidden, model.lm_head, batch, mtp_weight=0.3).total.backward()
    assert stored.grad is not None and bool(stored.grad.any())


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm]
)
def test_norms_of_weights_of_torch_train(wrap: Callable[..., nn.Module]) -> None:
    """The last one sets the weight in a hook before each call of the layer."""
    model = every_kind().requires_grad_(False)
    paths = [*LINEAR, "backbone.layers.0.mixer.conv1d"]
    for path in paths:
        wrap(model.get_submodule(path).requires_grad_(True))
    names = [n for n, p in model.named_parameters() if p.requires_grad and "bias" not in n]
    before = {n: model.get_parameter(n).detach().clone() for n in names}
    train(model, data(), TrainConfig(steps=1, seq_len=32, batch_size=2), progress=False)
    assert len(names) >= len(paths)
    for name in names:
        assert not torch.equal(before[name], model.get_parameter(name)), name
    assert len(generate(model.eval(), [1, 2], max_new_tokens=40, stop=())) == 40


def test_which_layers_are_a_matrix_and_nothing_else() -> None:
    head = every_kind().lm_head
    assert plain_weight(head) is head.weight
    assert plain_weight(nn.Linear(2, 3)) is None, "a bias"
    assert plain_weight(LoRA(head)) is None
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(head, register)(lambda *_: None)
        assert plain_weight(head) is None
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert plain_weight(head) is None
    handle.remove()
    assert plain_weight(head) is head.weight
    head.forward = lambda x: x
    assert plain_weight(head) is None
