"""Functions that were made once decode as the modules do, and only where they may be used."""

from __future__ import annotations

import copy
import cProfile
import pickle
import pstats
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nemotron_lite import GenerationOptions, Nemotron, SpeculationOptions, generate
from nemotron_lite.cache import Cache
from nemotron_lite.layers import Linear, TokenSteps
from nemotron_lite.layers.mamba2 import GatedRMSNorm
from nemotron_lite.layers.norm import RMSNorm
from tests.modules import every_kind, random_tokens


@contextmanager
def ordinary() -> Iterator[None]:
    """Decode module by module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenSteps, "run", lambda *_: None)
        yield


@contextmanager
def counted() -> Iterator[list[bool]]:
    """Whether the functions were used, token by token."""
    used: list[bool] = []
    run = TokenSteps.run

    def look(self: TokenSteps, *args: Any) -> Any:
        found = run(self, *args)
        used.append(found is not None)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenSteps, "run", look)
        yield used


def filled(model: Nemotron, rows: int = 1, ragged: bool = False, **options: Any) -> Cache:
    """A cache that has read a prompt."""
    cache = model.empty_cache(rows, capacity=8, **options)
    lengths = torch.arange(rows) % 3 + 3 if ragged else None
    with torch.inference_mode():
        model(random_tokens(rows, 5), cache, lengths=lengths)
    return cache


def decode(model: Nemotron, cache: Cache, tokens: int = 4, **options: Any) -> list[Tensor]:
    """The logits of each token, and then the buffers of the cache, which is advanced."""
    given = random_tokens(cache.batch, tokens, seed=1)
    with torch.inference_mode():
        found = [model(given[:, i : i + 1], cache, **options).logits for i in range(tokens)]
    return [*found, *(buffer for layer in cache.layers if layer for buffer in layer.buffers)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def both(model: Nemotron, cache: Cache, **options: Any) -> tuple[list[Tensor], list[bool]]:
    """Decode with functions; it has to equal decoding without."""
    with ordinary():
        expected = decode(model, cache.clone(), **options)
    with counted() as used:
        found = decode(model, cache.clone(), **options)
    assert same(found, expected)
    return found, used


MIXES: dict[str, dict[str, Any]] = {
    "every kind": {},
    "mamba": dict(pattern="MM", n_groups=1),
    "mamba, conv without bias": dict(pattern="M", use_conv_bias=False),
    "mamba, clamped steps": dict(pattern="MM", time_step_limit=(0.01, 0.05)),
    "attention": dict(pattern="**", num_key_value_heads=4),
    "experts at full width": dict(pattern="E", moe_latent_size=None),
    "experts, none shared": dict(pattern="EE", n_shared_experts=0),
    "experts in groups": dict(pattern="E", n_group=4, topk_group=2),
    "experts, not normalized": dict(pattern="ME", norm_topk_prob=False),
    "mlp": dict(pattern="-M"),
    "biases": dict(pattern="M-*E", use_bias=True, mlp_bias=True, attention_bias=True),
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mix", MIXES)
def test_bits_of_every_mix(mix: str, dtype: torch.dtype, rows: int) -> None:
    model = every_kind(**MIXES[mix]).to(dtype)
    assert both(model, filled(model, rows))[1] == [True] * 4
    assert rows == 1 or both(model, filled(model, rows, ragged=True))[1] == [True] * 4


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("rows", [1, 8])
def test_bits_with_float16_states_and_prepared_copies(rows: int, prepared: bool) -> None:
    model = every_kind(use_bias=True)
    if prepared:
        model.prepare_for_decoding(smallest=0)
    assert all(both(model, filled(model, rows, ssm_dtype=torch.float16))[1])


def test_bits_with_another_number_of_threads() -> None:
    model, before = every_kind(), torch.get_num_threads()
    cache = filled(model)
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            assert all(both(model, cache)[1])
    finally:
        torch.set_num_threads(before)


def test_another_dtype_goes_the_ordinary_way() -> None:
    model = every_kind().double()
    assert not any(both(model, filled(model))[1])


PROMPTS = [[5, 6, 7, 8, 9], [1, 2], [3, 4, 5, 6, 7, 8, 9, 10]]
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": dict(temperature=0),
    "sampling": dict(temperature=0.8, top_p=0.9, seed=3),
    "samples": dict(temperature=1.0, seed=3, num_samples=2),
    "speculation": dict(speculation=SpeculationOptions(draft_length=2), temperature=0),
    "penalty": dict(repetition_penalty=1.3, seed=0),
    "stops": dict(stop=tuple(range(0, 64, 5)), seed=0),
}


@pytest.mark.parametrize("prompts", [PROMPTS[0], PROMPTS], ids=["one", "ragged"])
@pytest.mark.parametrize("name", OPTIONS)
def test_generate_writes_the_same_tokens(name: str, prompts: Any) -> None:
    model, options = every_kind(), {"max_new_tokens": 12, "stop": (), **OPTIONS[name]}
    with ordinary():
        expected = generate(model, prompts, **options)
    with counted() as used:
        assert generate(model, prompts, **options) == expected
    assert any(used)


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "ragged"])
def test_a_given_cache_is_continued_the_same(prompts: list[list[int]]) -> None:
    model, options = every_kind(), GenerationOptions(max_new_tokens=5, stop=(7, 11), seed=0)
    found: list[Any] = []
    for way in (ordinary, counted):
        with way():
            cache = model.empty_cache(len(prompts), capacity=4)
            texts = [generate(model, prompts, options=options, cache=cache) for _ in range(3)]
        buffers = [buffer for layer in cache.layers if layer for buffer in layer.buffers]
        found.append((texts, cache.lengths.tolist(), buffers))
    assert found[0][:2] == found[1][:2] and same(found[0][2], found[1][2])


class Adapter(nn.Module):
    """A layer, and something added to what it computes."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) * 1.5


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class OtherLinear(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def replace_weight(m: Nemotron) -> None:
    layer: Any = m.backbone.layers[0]
    layer.mixer.in_proj.weight = nn.Parameter(layer.mixer.in_proj.weight.detach() * 1.5)


def replace_data(m: Nemotron) -> None:
    layer: Any = m.backbone.layers[0]
    layer.mixer.A_log.data = layer.mixer.A_log.data + 1
    layer.mixer.conv1d.weight.data = layer.mixer.conv1d.weight.data * 2


def write_data(m: Nemotron) -> None:
    layers: Any = m.backbone.layers
    layers[0].mixer.A_log.data.add_(1)
    layers[0].mixer.conv1d.weight.data.mul_(1.5)
    layers[2].mixer.gate.weight.data.neg_()
    layers[2].mixer.experts.up_proj.data.mul_(2)


def replace_bias(m: Nemotron) -> None:
    gate: Any = m.get_submodule("backbone.layers.2.mixer.gate")
    gate.e_score_correction_bias = torch.arange(8.0)


def change_choice(m: Nemotron) -> None:
    gate: Any = m.get_submodule("backbone.layers.2.mixer.gate")
    gate.choice["scale"] = 7.0


def change_eps(m: Nemotron) -> None:
    for part in m.modules():
        if isinstance(part, (RMSNorm, GatedRMSNorm)):
            part.eps = 0.5


def own_forward(m: Nemotron) -> None:
    mlp: Any = m.get_submodule("backbone.layers.3.mixer")
    mlp.forward = lambda x, cache=None, context=None: x


def other_class(m: Nemotron) -> None:
    m.get_submodule("backbone.layers.0.mixer.out_proj").__class__ = OtherLinear


def wrap(m: Nemotron) -> None:
    layer: Any = m.backbone.layers[1]
    layer.mixer.v_proj = Adapter(layer.mixer.v_proj)


def parametrized(m: Nemotron) -> None:
    projection = m.get_submodule("backbone.layers.0.mixer.out_proj")
    parametrize.register_parametrization(projection, "weight", Doubled())


def state_dict(m: Nemotron) -> None:
    m.load_state_dict(every_kind(seed=5).state_dict())


def assigned(m: Nemotron) -> None:
    m.load_state_dict(every_kind(seed=5).state_dict(), assign=True)


def other_layers(m: Nemotron) -> None:
    m.backbone.layers = every_kind(seed=5).backbone.layers


def forward_hook(m: Nemotron) -> None:
    norm = m.get_submodule("backbone.layers.0.mixer.norm")
    norm.register_forward_hook(lambda module, args, out: out * 2)


def forward_pre_hook(m: Nemotron) -> None:
    experts = m.get_submodule("backbone.layers.2.mixer.experts")
    experts.register_forward_pre_hook(lambda module, args: (args[0] * 2, args[1]))


def keep_hooks(m: Nemotron) -> None:
    hooks: Any = {1: lambda module, args, out: out * 2}
    m.get_submodule("backbone.layers.3")._forward_hooks = hooks


STAYS_FAST = [
    replace_weight, replace_data, write_data, replace_bias, change_choice, change_eps,
    state_dict, assigned, other_layers,
]  # fmt: skip
LEAVES = [
    own_forward, other_class, wrap, parametrized, forward_hook, forward_pre_hook, keep_hooks,
]  # fmt: skip


@pytest.mark.parametrize("change", [*STAYS_FAST, *LEAVES], ids=lambda change: change.__name__)
def test_a_change_between_two_tokens_is_noticed(change: Callable[[Nemotron], None]) -> None:
    model = every_kind()
    cache = filled(model)
    before, used = both(model, cache)
    assert all(used)
    change(model)
    after, used = both(model, cache)
    assert not same(before, after), "the change has an effect"
    assert used == [change in STAYS_FAST] * 4


def test_hooks_on_all_modules_and_a_class_that_was_changed() -> None:
    model = every_kind()
    cache = filled(model)
    seen: list[type] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        assert not any(both(model, cache)[1])
    finally:
        handle.remove()
    assert set(map(type, model.backbone.layers.modules())) - set(seen) == {nn.ModuleList}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RMSNorm, "forward", lambda self, x: x)
        assert not any(both(model, cache)[1])
    assert not any(both(model, cache)[1]), "it looks again at the next prompt"
    assert all(both(model, filled(model))[1])


def test_calls_that_want_more_than_logits() -> None:
    model = every_kind()
    cache = filled(model, 2)
    assert not any(both(model, cache, router_stats=True)[1])
    assert not any(both(model, cache, lengths=torch.tensor([1, 0]))[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not any(both(model, cache)[1])
    assert all(both(model, cache)[1])


def test_weights_that_a_call_is_given() -> None:
    model, other = every_kind(), every_kind(seed=5)
    cache, token = filled(model), torch.tensor([[3]])
    given = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    with torch.inference_mode():
        own = model(token, cache.clone()).logits
        found = torch.func.functional_call(model, given, (token, cache.clone())).logits
        assert torch.equal(found, other(token, cache.clone()).logits)
        assert torch.equal(model(token, cache.clone()).logits, own)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_decodes_with_its_own_weights(way: Callable[[Any], Any]) -> None:
    model = every_kind()
    cache = filled(model)
    before = decode(model, cache.clone())
    other = way(model)
    assert other.backbone._token_steps is None
    state_dict(other)
    assert not same(both(other, cache)[0], before)
    assert same(both(model, cache)[0], before)


def test_calls_of_one_token() -> None:
    """The tests check every call's annotations; what does that is not counted."""
    model = every_kind(pattern="MEMEM*EMEMEM*E")
    cache, token = filled(model), torch.tensor([[3]])
    counts = []
    with torch.inference_mode():
        for way in (ordinary, counted):
            with way():
                model(token, cache)
                with cProfile.Profile() as profile:
                    model(token, cache)
            found = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
            ours = ("/nemotron_lite/", "/torch/nn/modules/module.py")
            counts.append(sum(v[1] for k, v in found if any(part in k[0] for part in ours)))
    modules, functions = counts
    assert functions < 650 and functions < modules / 2
