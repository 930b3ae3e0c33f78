"""Whatever part of a draft was accepted, the cache is that of a prefill of the text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_lite.cache import Cache
from nemotron_lite.generation.options import (
    GenerationOptions,
    SamplingOptions,
    SpeculationOptions,
)
from nemotron_lite.generation.speculative import Drafter, SpeculativeDecoding
from nemotron_lite.layers import KVCache, MambaCache
from nemotron_lite.model import Nemotron
from tests.cache_oracles import WAYS, rollback, snapshot
from tests.test_model import TINY, _tokens

EXACT = dict(rtol=1e-8, atol=1e-8)
MODEL = Nemotron(TINY, dtype=torch.float64, seed=1)


def assert_equals_fresh(cache: Cache, texts: list[list[int]]) -> None:
    """Every cache of every row against a prefill of that row's text alone."""
    assert cache.lengths.tolist() == [len(text) for text in texts]
    for row, text in enumerate(texts):
        fresh = MODEL.empty_cache(1)
        if text:
            MODEL(torch.tensor([text]), fresh)
        for kept, new in zip(cache.layers, fresh.layers, strict=True):
            if isinstance(kept, MambaCache):
                torch.testing.assert_close(kept.ssm[row], new.ssm[0], **EXACT)
                torch.testing.assert_close(kept.conv[row], new.conv[0], **EXACT)
            elif isinstance(kept, KVCache):
                for a, b in ((kept.k, new.k), (kept.v, new.v)):
                    torch.testing.assert_close(
                        a[row, :, : len(text)], b[0, :, : len(text)], **EXACT
                    )


@settings(max_examples=25)
@given(data=st.data(), rows=st.integers(1, 3), way=st.sampled_from(sorted(WAYS)))
def test_any_part_of_any_draft(data: st.DataObject, rows: int, way: str) -> None:
    """A ragged prompt, then several drafts; each row accepts a different number of tokens."""
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=rows, max_size=rows))
    prompt = _tokens(rows, 9)
    cache = MODEL.empty_cache(rows, capacity=2)
    MODEL(prompt, cache, lengths=torch.tensor(lengths))
    texts = [prompt[row, :n].tolist() for row, n in enumerate(lengths)]
    for _ in range(data.draw(st.integers(1, 3))):
        size = data.draw(st.integers(1, 6))
        draft = torch.randint(61, (rows, size))
        with WAYS[way]():
            found = MODEL(draft, cache, draft=True).logits
        for row, text in enumerate(texts):
            exact = MODEL(torch.tensor([text + draft[row].tolist()])).logits[0, len(text) :]
            torch.testing.assert_close(found[row], exact, **EXACT)
        counts = data.draw(st.lists(st.integers(0, size), min_size=rows, max_size=rows))
        cache.accept(torch.tensor(counts))
        for row, count in enumerate(counts):
            texts[row] += draft[row, :count].tolist()
        assert_equals_fresh(cache, texts)
    last = torch.randint(61, (rows, 1))
    MODEL(last, cache)  # and plain decoding goes on from there
    assert_equals_fresh(cache, [t + last[row].tolist() for row, t in enumerate(texts)])


@pytest.mark.parametrize("way", WAYS)
def test_float32_and_one_count_for_all_rows(way: str) -> None:
    model = Nemotron(TINY, seed=1)
    tokens = _tokens(2, 20)
    cache, fresh = model.empty_cache(2), model.empty_cache(2)
    model(tokens[:, :12], cache)
    with WAYS[way]():
        model(tokens[:, 12:18], cache, draft=True)
    cache.accept(4)
    model(tokens[:, :16], fresh)
    for kept, new in zip(cache.layers, fresh.layers, strict=True):
        if isinstance(kept, MambaCache):
            torch.testing.assert_close(kept.ssm, new.ssm, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(kept.conv, new.conv, rtol=1e-4, atol=1e-4)


@settings(max_examples=8)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=3), k=st.integers(1, 5),
    most=st.integers(2, 14), segment=st.sampled_from([None, 1, 3]), adaptive=st.booleans(),
)  # fmt: skip
def test_the_mtp_module_s_cache_after_a_whole_run(
    lengths: list[int], k: int, most: int, segment: int | None, adaptive: bool
) -> None:
    """As if it had read the final text at once, whatever was drafted and thrown away."""
    prompt = _tokens(len(lengths), 8)
    options = GenerationOptions(
        max_new_tokens=most,
        temperature=1.5,
        top_p=None,
        stop=(),
        seed=0,
        prefill_segment=segment,
        speculation=SpeculationOptions(draft_length=k, adaptive=adaptive),
    )
    run = SpeculativeDecoding(MODEL, prompt, lengths, options)
    for _ in run.passes():
        pass
    with torch.inference_mode():
        run.drafter._read_pending()
    texts = [row.tokens for row in run.rows]
    for row, (n, text) in enumerate(zip(lengths, texts, strict=True)):
        have = int(run.cache.lengths[row])
        whole = (prompt[row, :n].tolist() + text + [0] * k)[: have + 1]
        if have + 1 > n + len(text):  # accepted behind the end and thrown away: not in the text
            continue
        fresh = MODEL.empty_cache(1, mtp=True)
        drafter = Drafter(MODEL, fresh, SamplingOptions(0))
        hidden = MODEL(torch.tensor([whole]), fresh).hidden
        drafter.add_prompt(hidden, torch.tensor([whole]), [len(whole)], 0)
        entries = int(fresh.mtp_lengths[0])
        assert int(run.cache.mtp_lengths[row]) == entries == have
        kept, new = run.cache.mtp[0], fresh.mtp[0]
        assert isinstance(kept, KVCache)
        for a, b in ((kept.k, new.k), (kept.v, new.v)):
            torch.testing.assert_close(a[row, :, :entries], b[0, :, :entries], **EXACT)


def test_drafting_leaves_no_entries_behind(small: Nemotron) -> None:
    """A draft that nobody verified leaves the module's cache as it was."""
    cache = small.empty_cache(1, mtp=True)
    drafter = Drafter(small, cache, SamplingOptions(0))
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        hidden = small(tokens, cache).hidden
        drafter.add_prompt(hidden, tokens, [4], 0)
        drafter.add_first_token(torch.tensor([5]))
        before = cache.mtp_lengths.tolist()
        draft = drafter.draft(None, [_Always()], [6])
    assert draft is not None
    assert draft.tokens.shape == (1, 6)
    assert before == [3]
    assert cache.mtp_lengths.tolist() == [4], "the chosen token stays, the six drafted ones do not"


class _Always:
    def wants_more(self, confidences: list[float]) -> bool:
        return True

    def update(self, confidences: list[float], accepted: int) -> None:
        raise AssertionError("nothing was verified")


def test_the_last_token_alone_equals_the_whole_module(small: Nemotron) -> None:
    """`last_only` computes less, but the same numbers: for all patterns, ragged rows too."""
    for pattern in ("*E", "E", "*E*E", "EE*", "*"):
        model = Nemotron(small.config.replace(mtp_pattern=pattern), dtype=torch.float64, seed=2)
        hidden, embedded = torch.randn(2, 3, 5, 16, dtype=torch.float64).unbind()
        assert model.mtp is not None
        exact = model.mtp(hidden, embedded)
        cache = model.empty_cache(3, mtp=True)
        from nemotron_lite.layers import ForwardContext

        context = ForwardContext(0, last_only=True)
        first = model.mtp(hidden[:, :2], embedded[:, :2], cache.mtp, context)
        torch.testing.assert_close(first[:, 0], exact[:, 1], **EXACT)
        counts = torch.tensor([3, 1, 2])
        context = ForwardContext(2, counts, last_only=True)
        second = model.mtp(hidden[:, 2:], embedded[:, 2:], cache.mtp, context)
        rows = torch.arange(3)
        torch.testing.assert_close(second[:, 0], exact[rows, 1 + counts], **EXACT)


def test_mistakes_are_named(small: Nemotron) -> None:
    cache = small.empty_cache(2)
    tokens = torch.tensor([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match="no draft is waiting"):
        cache.accept(1)
    with pytest.raises(ValueError, match="give a cache"):
        small(tokens, draft=True)
    with pytest.raises(ValueError, match="leave out lengths"):
        small(tokens, cache, lengths=torch.tensor([1, 2]), draft=True)
    small(tokens, cache, draft=True)
    for attempt in (lambda: small(tokens, cache), cache.clone, lambda: cache.save("x")):
        with pytest.raises(ValueError, match=r"call (cache\.)?accept\(counts\) first"):
            attempt()
    with pytest.raises(ValueError, match=r"counts \[0, 3\]: expected 0 to 2"):
        cache.accept(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"shape \[3\], but the cache has 2 rows"):
        cache.accept(torch.tensor([0, 1, 2]))
    cache.accept(0)
    with pytest.raises(ValueError, match="make it with mtp=True"):
        Drafter(small, cache, SamplingOptions(0))
    with pytest.raises(ValueError, match="cannot be cut back"):
        cache.truncate_mtp(torch.tensor([1, 0]))


def test_clones_and_files_hold_the_mtp_module_s_cache_too(small: Nemotron, tmp_path) -> None:
    cache = small.empty_cache(1, mtp=True)
    drafter = Drafter(small, cache, SamplingOptions(0))
    tokens = torch.tensor([[1, 2, 3, 4]])
    drafter.add_prompt(small(tokens, cache).hidden, tokens, [4], 0)
    taken, copy = snapshot(cache), cache.clone()
    small(tokens, cache, draft=True)
    cache.advance_mtp(2)
    rollback(cache, taken)
    assert (cache.draft_length, cache.mtp_lengths.tolist()) == (0, [3])
    assert copy.mtp_lengths.tolist() == [3]
    torch.testing.assert_close(copy.mtp[0].k[:, :, :3], cache.mtp[0].k[:, :, :3])
    assert copy.mtp[0].k is not cache.mtp[0].k
    cache.save(tmp_path / "cache")
    again = Cache.load(tmp_path / "cache")
    assert again.mtp_lengths.tolist() == [3]
    torch.testing.assert_close(again.mtp[0].k[:, :, :3], cache.mtp[0].k[:, :, :3])
    assert again.mtp[1] is None


def test_a_draft_keeps_far_fewer_bytes_than_copies_of_the_state() -> None:
    kept = {}
    for way, reading in WAYS.items():
        cache = MODEL.empty_cache(1)
        with reading():
            MODEL(_tokens(1, 4), cache, draft=True)
        kept[way] = cache.draft_nbytes
        cache.accept(4)
        assert cache.draft_nbytes == 0
    inner, heads, n = TINY.mamba_inner_size, TINY.mamba_num_heads, TINY.ssm_state_size
    window = (3 + 4) * TINY.conv_dim * 8
    token = (inner + heads + TINY.n_groups * n) * 8
    decays = heads * (4 + 4 * 5) * 8
    assert kept["replay"] == 2 * (window + 4 * token + heads * 8 + decays)
    assert kept["snapshots"] == 2 * (window + 5 * inner * n * 8)
