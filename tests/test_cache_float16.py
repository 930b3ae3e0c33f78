"""A `Cache` with SSM states in float16: half the bytes, repeatable, and close to float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemotron_lite import SpeculationOptions, generate
from nemotron_lite.cache import Cache
from nemotron_lite.layers import MambaCache
from nemotron_lite.model import Nemotron
from tests.cache_oracles import WAYS, rollback, snapshot
from tests.generation.speculative.conftest import SMALL
from tests.test_model import TINY, _tokens

HALF = torch.float16


@pytest.fixture(scope="module")
def model() -> Nemotron:
    return Nemotron(TINY, seed=1).eval()


def ssm(cache: Cache) -> list[torch.Tensor]:
    return [m.ssm for m in cache.layers if isinstance(m, MambaCache)]


def write(model: Nemotron, cache: Cache, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of a prompt in one pass and the rest token by token."""
    parts = [model(tokens[:, :prompt], cache).logits]
    parts += [model(tokens[:, i : i + 1], cache).logits for i in range(prompt, tokens.shape[1])]
    return torch.cat(parts, 1).detach()


def test_half_the_bytes(model: Nemotron) -> None:
    wide, half = model.empty_cache(2), model.empty_cache(2, ssm_dtype=HALF)
    saved = sum(part.nbytes for part in ssm(half))
    assert sum(part.nbytes for part in ssm(wide)) == 2 * saved > 0
    assert wide.nbytes - half.nbytes == saved
    assert snapshot(wide).nbytes - snapshot(half).nbytes == saved


def test_prefill_and_steps_round_the_state_and_give_nearly_the_same(model: Nemotron) -> None:
    tokens = _tokens(2, 40)
    cache, wide = model.empty_cache(2, ssm_dtype=HALF), model.empty_cache(2)
    found, exact = write(model, cache, tokens, 20), write(model, wide, tokens, 20)
    assert torch.equal(found[:, :20], exact[:, :20]), "read before it is rounded"
    assert 0 < float((found - exact)[:, 20:].abs().max()) < 0.02 * float(exact.abs().max())
    for rounded, full in zip(ssm(cache), ssm(wide), strict=True):
        assert rounded.dtype == HALF
        assert 0 < float((rounded.float() - full).norm() / full.norm()) < 5e-3


def test_the_seed_decides(model: Nemotron) -> None:
    tokens = _tokens(2, 16)
    runs = {
        seed: write(model, model.empty_cache(2, ssm_dtype=HALF, ssm_seed=seed), tokens, 8)
        for seed in (0, 1, None)
    }
    again = write(model, model.empty_cache(2, ssm_dtype=HALF, ssm_seed=1), tokens, 8)
    assert torch.equal(runs[1], again)
    assert not torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[None])


def test_snapshots_clones_and_files_continue_the_same(model: Nemotron, tmp_path: Path) -> None:
    tokens = _tokens(2, 24)
    cache = model.empty_cache(2, ssm_dtype=HALF, ssm_seed=7)
    write(model, cache, tokens[:, :12], 8)
    taken, copy = snapshot(cache), cache.clone()
    cache.save(tmp_path / "cache")
    expected = write(model, cache, tokens[:, 12:], 4)
    rollback(cache, taken)
    assert torch.equal(write(model, cache, tokens[:, 12:], 4), expected)
    rollback(cache, taken)
    assert torch.equal(write(model, cache, tokens[:, 12:], 4), expected), "a second time as well"
    assert torch.equal(write(model, copy, tokens[:, 12:], 4), expected)
    loaded = Cache.load(tmp_path / "cache")
    assert all(part.dtype == HALF for part in ssm(loaded))
    assert torch.equal(write(model, loaded, tokens[:, 12:], 4), expected)


@pytest.mark.parametrize("way", WAYS)
def test_an_accepted_draft_leaves_a_rounded_state(model: Nemotron, way: str) -> None:
    tokens = _tokens(2, 20)
    futures = []
    for _ in range(2):
        cache = model.empty_cache(2, ssm_dtype=HALF)
        model(tokens[:, :10], cache)
        with WAYS[way]():
            model(tokens[:, 10:15], cache, draft=True)
        cache.accept(torch.tensor([3, 0]))
        assert all(part.dtype == HALF for part in ssm(cache))
        futures.append(model(tokens[:, 15:], cache).logits)
    assert torch.equal(*futures)
    wide = model.empty_cache(2)
    model(tokens[:, :10], wide)
    with WAYS[way]():
        model(tokens[:, 10:15], wide, draft=True)
    wide.accept(torch.tensor([3, 0]))
    exact = model(tokens[:, 15:], wide).logits.detach()
    torch.testing.assert_close(futures[0], exact, atol=0.02 * float(exact.abs().max()), rtol=0)


def test_nothing_taken_in_changes_nothing(model: Nemotron) -> None:
    cache = model.empty_cache(2, ssm_dtype=HALF)
    model(_tokens(2, 10), cache)
    before = [part.clone() for part in ssm(cache)]
    model(_tokens(2, 4), cache, draft=True)
    cache.accept(0)
    assert all(torch.equal(a, b) for a, b in zip(ssm(cache), before, strict=True))


@pytest.mark.parametrize("counts", [0, torch.tensor([0, 0])])
def test_a_rejected_draft_does_not_change_later_roundings(
    model: Nemotron, counts: int | torch.Tensor
) -> None:
    tokens = _tokens(2, 20)
    drafted, plain = (model.empty_cache(2, ssm_dtype=HALF) for _ in range(2))
    for cache in (drafted, plain):
        model(tokens[:, :10], cache)
    model(_tokens(2, 4), drafted, draft=True)
    drafted.accept(counts)
    found, expected = (write(model, cache, tokens[:, 10:], 4) for cache in (drafted, plain))
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(ssm(drafted), ssm(plain), strict=True))


@pytest.mark.parametrize("speculation", [None, SpeculationOptions()])
def test_generation_with_it_can_be_repeated(speculation: SpeculationOptions | None) -> None:
    model = Nemotron(SMALL, seed=0).eval()
    prompts = [[1, 2, 3, 4], [5, 6]]
    for seed in (None, 3, -3):
        runs = [
            generate(
                model,
                prompts,
                12,
                temperature=0,
                stop=(),
                seed=seed,
                speculation=speculation,
                ssm_dtype=HALF,
            )
            for _ in range(2)
        ]
        assert runs[0] == runs[1]
    with pytest.raises(ValueError, match=r"ssm_dtype=torch\.int8"):
        generate(model, prompts, 12, speculation=speculation, ssm_dtype=torch.int8)


def test_other_formats_are_refused() -> None:
    for dtype in (torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=r"expected torch\.float16 or torch\.float32"):
            Cache.empty(TINY, 1, ssm_dtype=dtype)
    assert ssm(Cache.empty(TINY, 1, ssm_dtype=torch.float32))[0].dtype == torch.float32
    with pytest.raises(ValueError, match="ssm_seed=-1"):
        Cache.empty(TINY, 1, ssm_dtype=HALF, ssm_seed=-1)
