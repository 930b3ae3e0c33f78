"""What every mixer provides: a cache, ledger lines, matrices, statistics beside its output."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemotron_lite import ledger
from nemotron_lite.config import LAYER_KINDS
from nemotron_lite.layers import (
    MIXERS,
    Block,
    CacheOptions,
    Experts,
    ForwardContext,
    LayerCache,
    Linear,
    MambaCache,
    Router,
    RouterStats,
)
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.recipe import ROLES
from tests.test_model import TINY

WITH_CACHE = ["M", "*"]


def block(kind: str) -> Block:
    """A layer of TINY in float64."""
    model = Nemotron(TINY.replace(pattern=kind), dtype=torch.float64, seed=0)
    return model.backbone.layers[0]


def empty(kind: str, ssm_dtype: torch.dtype = torch.float64) -> LayerCache:
    options = CacheOptions(2, 4, torch.float64, ssm_dtype, 5, torch.device("cpu"))
    cache = MIXERS[kind].empty_cache(TINY, 3, options)
    assert cache is not None
    return cache


def inputs(tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(2, tokens, TINY.hidden_size, dtype=torch.float64, generator=generator)


def test_the_config_and_the_layers_know_the_same_kinds() -> None:
    assert list(MIXERS) == list(LAYER_KINDS)


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("reduced", [False, True], ids=["all parts", "without optional parts"])
def test_matrices_are_those_of_the_real_module(kind: str, reduced: bool) -> None:
    changes = dict(moe_latent_size=None, n_shared_experts=0) if reduced else {}
    config = TINY.replace(pattern=kind, mtp_pattern="", mtp_depths=0, **changes)
    with torch.device("meta"):
        mixer = MIXERS[kind].build(config, "")
    expected = {
        name: sum(p.numel() for p in module.parameters(recurse=False))
        for name, module in mixer.named_modules()
        if isinstance(module, Linear | Experts | Router)
    }
    assert {matrix.name: matrix.parameters for matrix in mixer.matrices(config)} == expected
    assert {matrix.role for matrix in mixer.matrices(config)} <= set(ROLES)


@pytest.mark.parametrize("kind", MIXERS)
def test_the_cache_is_of_the_class_that_the_mixer_names(kind: str) -> None:
    options = CacheOptions(1, 1, torch.float32, torch.float32, None, torch.device("cpu"))
    cache = MIXERS[kind].empty_cache(TINY, 0, options)
    assert type(cache) is (MIXERS[kind].CACHE or type(None))


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 2])])
def test_the_output_of_the_last_token_is_that_of_forward(
    kind: str, lengths: torch.Tensor | None
) -> None:
    layer, x = block(kind), inputs(4)
    caches = [empty(kind) if kind in WITH_CACHE else None for _ in range(2)]
    context = ForwardContext(lengths=lengths)
    with torch.no_grad():
        found = layer(x, caches[0], replace(context, last_only=True))
        expected = context.last_tokens(layer(x, caches[1], context))
        torch.testing.assert_close(found, expected)
        if kind in WITH_CACHE:
            after = ForwardContext(starts=4 if lengths is None else lengths)
            found, expected = (layer(inputs(1), cache, after) for cache in caches)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", MIXERS)
def test_lines_of_the_ledger_count_the_real_tensors(kind: str) -> None:
    config = TINY.replace(pattern=kind, mtp_pattern="", mtp_depths=0)
    (layer,) = ledger.parameters(config).layers
    module = block(kind)
    biases = [b for name, b in module.named_buffers() if "correction_bias" in name]
    assert layer.total == sum(t.numel() for t in [*module.parameters(), *biases])
    options = CacheOptions(2, 4, torch.float32, torch.float32, None, torch.device("cpu"))
    cache = MIXERS[kind].empty_cache(config, 0, options)
    formula = ledger.cache(config, 4, batch=2, kv_dtype="float32", conv_dtype="float32")
    assert formula.total == (0 if cache is None else cache.nbytes)


@pytest.mark.parametrize("kind", WITH_CACHE)
@pytest.mark.parametrize("way", ["clone", "save"])
def test_a_copied_or_saved_cache_continues_the_same(kind: str, way: str) -> None:
    layer, cache = block(kind), empty(kind)
    with torch.no_grad():
        layer(inputs(6), cache)
        if way == "clone":
            copy = cache.clone()
        else:
            copy = type(cache).from_saved(cache.saved_tensors(6), cache.saved_extra())
        after = ForwardContext(starts=6)
        found = layer(inputs(3), copy, after)
        assert torch.equal(layer(inputs(3), cache, after), found)


def test_a_copied_float16_state_is_rounded_with_the_same_bits() -> None:
    layer, cache = block("M").float(), empty("M", torch.float16)
    with torch.no_grad():
        cache.conv = cache.conv.float()
        layer(inputs(6).float(), cache)
        copies = [
            cache.clone(),
            MambaCache.from_saved(cache.saved_tensors(6), cache.saved_extra()),
        ]
        for one in (cache, *copies):
            layer(inputs(3).float(), one, ForwardContext(starts=6))
    assert all(torch.equal(cache.ssm, copy.ssm) for copy in copies)


@pytest.mark.parametrize("kind", WITH_CACHE)
@pytest.mark.parametrize("counts", [0, 2, 4, torch.tensor([3, 0])])
def test_an_accepted_draft_is_as_if_only_its_tokens_were_read(
    kind: str, counts: int | torch.Tensor
) -> None:
    layer, cache, plain = block(kind), empty(kind), empty(kind)
    draft, after = inputs(4), inputs(1)
    each = torch.tensor([counts, counts]) if isinstance(counts, int) else counts
    with torch.no_grad():
        for one in (cache, plain):
            layer(inputs(6), one)
        read = layer(draft, cache, ForwardContext(starts=6, draft=True))
        cache.accept(counts)
        assert cache.draft_nbytes == 0
        exact = layer(draft, plain, ForwardContext(starts=6, lengths=each))
        for row, n in enumerate(each.tolist()):
            torch.testing.assert_close(read[row, :n], exact[row, :n])
        found, expected = (layer(after, one, ForwardContext(6 + each)) for one in (cache, plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", MIXERS)
def test_statistics_do_not_change_the_output(kind: str) -> None:
    layer, x = block(kind), inputs(5)
    found: list[RouterStats] = []
    y = layer(x, None, ForwardContext(router_stats=found))
    assert torch.equal(y, layer(x))
    if kind == "E":
        (stats,) = found
        assert stats.name == "backbone.layers.0.mixer"
        assert stats.scores.shape == (2, 5, TINY.n_routed_experts)
    else:
        assert not found
