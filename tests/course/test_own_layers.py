"""Layers of a learner inside a model: the same logits, caches, documents and losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemotron_lite import Nemotron, NemotronConfig, generate, layers
from nemotron_lite.cache import Cache
from nemotron_lite.course.own_layers import OwnCache, with_own_layers
from nemotron_lite.layers import CacheOptions
from nemotron_lite.train.balance import expert_loads, update_biases

CONFIG = NemotronConfig.from_preset(
    "lite", pattern="MEM*", vocab_size=64, hidden_size=32, mamba_num_heads=4, ssm_state_size=8
)
RANDOM = torch.Generator().manual_seed(0)
TOKENS = torch.randint(64, (3, 24), generator=RANDOM)


class Wrapped(nn.Module):
    """What a learner would write, by means of the package: a module and a cache in a dict."""

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__()
        self.config = config
        for name, part in layers.Mamba2(config).named_children():
            self.add_module(name, part)
        for name in ("A_log", "D", "dt_bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(config.mamba_num_heads)))
        self.calls: list[list[int]] = []

    def empty_cache(self, batch: int) -> dict[str, Any]:
        options = CacheOptions(batch, 1, torch.float32, torch.float32, None, torch.device("cpu"))
        cache = layers.Mamba2.empty_cache(self.config, 0, options)
        return {"conv": cache.conv, "ssm": cache.ssm, "read": 0}

    def forward(self, x: Tensor, cache: dict[str, Any] | None = None) -> Tensor:
        self.calls.append(list(x.shape[:2]))
        twin: Any = layers.Mamba2(self.config)
        for name, part in self.named_children():
            setattr(twin, name, part)
        twin.A_log, twin.D, twin.dt_bias = self.A_log, self.D, self.dt_bias
        if cache is None:
            return twin(x)
        held = layers.mamba2.MambaCache(cache["conv"], cache["ssm"])
        y: Tensor = twin(x, held)
        cache.update(conv=held.conv, ssm=held.ssm, read=cache["read"] + x.shape[1])
        return y


class Functional(Wrapped):
    """The same with a cache that is returned and not changed in place."""

    def forward(self, x: Tensor, cache: Any = None) -> Any:
        after = self.empty_cache(len(x)) if cache is None else dict(cache)
        return super().forward(x, after), after


@pytest.fixture(scope="module")
def model() -> Nemotron:
    return Nemotron(CONFIG, seed=0)


@pytest.fixture(params=[Wrapped, Functional])
def mine(model: Nemotron, request: pytest.FixtureRequest) -> Nemotron:
    return with_own_layers(model, "M", request.param)


def mixer_of(model: Nemotron, layer: int) -> Any:
    found: Any = model.backbone.layers[layer]
    return found.mixer


def own_of(model: Nemotron, layer: int) -> Any:
    return mixer_of(model, layer).own


def first_layer(cache: Cache) -> Any:
    return cache.layers[0]


def test_the_copy_computes_with_the_own_layers_and_the_model_stays_as_it_is(
    model: Nemotron, mine: Nemotron
) -> None:
    torch.testing.assert_close(mine(TOKENS).logits, model(TOKENS).logits)
    assert own_of(mine, 0).calls == [[3, 24]]
    assert isinstance(mixer_of(model, 0), layers.Mamba2)
    with torch.no_grad():
        own_of(mine, 2).D.add_(1)
    assert (mine(TOKENS).logits - model(TOKENS).logits).abs().max() > 1e-3
    assert not torch.equal(own_of(mine, 2).D, mixer_of(model, 2).D)


def test_weights_are_loaded_strictly(model: Nemotron) -> None:
    with pytest.raises(RuntimeError, match="in_proj"):
        with_own_layers(model, "M", lambda config: nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["-", "x", ""])
def test_a_kind_that_the_model_lacks_is_refused(model: Nemotron, kind: str) -> None:
    with pytest.raises(ValueError, match="expected one of the letters"):
        with_own_layers(model, kind, Wrapped)


def test_documents_in_a_row_do_not_see_each_other(model: Nemotron, mine: Nemotron) -> None:
    seq_idx = torch.tensor([[0] * 24, [0] * 5 + [1] * 19, [3] * 10 + [4] + [7] * 13])
    expected = model(TOKENS, seq_idx=seq_idx).logits
    torch.testing.assert_close(mine(TOKENS, seq_idx=seq_idx).logits, expected)
    assert own_of(mine, 0).calls == [[1, n] for n in (24, 5, 19, 10, 1, 13)]


def test_gradients_flow_through_own_layers(model: Nemotron, mine: Nemotron) -> None:
    for net in (model, mine):
        net.zero_grad()
        net(TOKENS, seq_idx=TOKENS // 64).logits.square().mean().backward()
    theirs = dict(mixer_of(model, 0).named_parameters())
    for name, parameter in own_of(mine, 0).named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad)


def test_a_cache_continues_row_by_row_with_padding(model: Nemotron, mine: Nemotron) -> None:
    logits = []
    for net in (model, mine):
        cache = net.empty_cache(3)
        lengths = torch.tensor([10, 1, 0])
        net(TOKENS[:, :10], cache, lengths=lengths)
        out = net(TOKENS[:, 10:16], cache).logits
        logits.append(torch.cat([out, net(TOKENS[:, 16:17], cache).logits], dim=1))
    torch.testing.assert_close(logits[1], logits[0])
    assert [row["read"] for row in first_layer(cache).rows] == [17, 8, 7]


def test_generation_writes_the_same_tokens(model: Nemotron, mine: Nemotron) -> None:
    prompts = [[5, 17, 3, 4], [9]]
    assert generate(mine, prompts, 12, temperature=0, stop=()) == generate(
        model, prompts, 12, temperature=0, stop=()
    )


def test_a_long_text_is_read_in_segments(
    model: Nemotron, mine: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemotron_lite.model.SEGMENT", 10)
    with torch.no_grad():
        torch.testing.assert_close(mine(TOKENS).logits, model(TOKENS).logits)
    assert own_of(mine, 0).calls == [[1, n] for n in (10, 10, 10, 10, 10, 10, 4, 4, 4)]


def test_caches_are_copied_deeply_and_their_bytes_counted(model: Nemotron, mine: Nemotron) -> None:
    cache = mine.empty_cache(2)
    assert cache.nbytes == model.empty_cache(2).nbytes
    twin = cache.clone()
    mine(TOKENS[:2], cache)
    assert isinstance(twin.layers[0], OwnCache)
    assert not any(row["ssm"].any() or row["read"] for row in first_layer(twin).rows)
    torch.testing.assert_close(mine(TOKENS[:2], twin).logits, model(TOKENS[:2]).logits)


class OwnExperts(nn.Module):
    """The package's mixture, which keeps what its router decided as a learner's has to."""

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__()
        like = layers.MoE(config)
        for name, part in like.named_children():
            self.add_module(name, part)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        twin: Any = layers.MoE(self.config)
        for name, part in self.named_children():
            setattr(twin, name, part)
        found = twin.gate(x.flatten(0, 1))
        self.routing = found.scores, found.indices
        y: Tensor = twin(x)
        return y


@pytest.fixture(scope="module")
def experts() -> tuple[Nemotron, Nemotron]:
    config = CONFIG.replace(pattern="MEE", n_routed_experts=8, num_experts_per_tok=2)
    model = Nemotron(config, seed=0)
    return model, with_own_layers(model, "E", OwnExperts)


def test_experts_read_whole_rows_and_generate(experts: tuple[Nemotron, Nemotron]) -> None:
    model, mine = experts
    seq_idx = torch.tensor([[0] * 24, [0] * 5 + [1] * 19, [3] * 10 + [4] + [7] * 13])
    expected = model(TOKENS, seq_idx=seq_idx).logits
    torch.testing.assert_close(mine(TOKENS, seq_idx=seq_idx).logits, expected)
    prompts = [[5, 17, 3, 4], [9]]
    assert generate(mine, prompts, 8, temperature=0, stop=()) == generate(
        model, prompts, 8, temperature=0, stop=()
    )


def test_routers_of_own_layers_are_watched_and_balanced(
    experts: tuple[Nemotron, Nemotron],
) -> None:
    both = [net(TOKENS, router_stats=True).router for net in experts]
    assert [s.name for s in both[1]] == [s.name for s in both[0]]
    for ours, theirs in zip(both[1], both[0], strict=True):
        torch.testing.assert_close(ours.scores, theirs.scores)
        assert torch.equal(ours.indices, theirs.indices)
    mine = with_own_layers(experts[0], "E", OwnExperts)
    update_biases(mine, expert_loads(both[1]), 0.5)
    for layer in (1, 2):
        bias = own_of(mine, layer).gate.e_score_correction_bias
        assert bool((bias.abs() <= 0.5).all())
        assert bool(bias.any())


def test_an_own_layer_without_a_router_has_no_statistics(
    experts: tuple[Nemotron, Nemotron],
) -> None:
    model = Nemotron(CONFIG.replace(pattern="M-"), seed=0)
    mine = with_own_layers(model, "-", lambda c: layers.MLP(c.hidden_size, c.intermediate_size))
    out = mine(TOKENS, router_stats=True)
    torch.testing.assert_close(out.logits, model(TOKENS).logits)
    assert not out.router


def test_what_own_layers_cannot_do_is_refused(mine: Nemotron, tmp_path: Any) -> None:
    cache = mine.empty_cache(3)
    with pytest.raises(ValueError, match="cannot read a draft"):
        mine(TOKENS, cache, draft=True)
    with pytest.raises(ValueError, match="cannot be saved"):
        mine.empty_cache(1).save(tmp_path / "cache")
    with pytest.raises(ValueError, match="cannot be loaded"):
        OwnCache.from_saved({}, None)
    with pytest.raises(ValueError, match="none can be accepted"):
        first_layer(cache).accept(0)
    with pytest.raises(ValueError, match="leave out ssm_dtype"):
        mine.empty_cache(1, ssm_dtype=torch.float16)
