"""`generate(..., cache=cache)`: a continued conversation equals one that is read again."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_lite import Cache, Nemotron, SpeculationOptions, generate, stream
from nemotron_lite.layers import KVCache
from tests.generation.text_models import text_model

TURNS = [[[5, 6, 7], [8]], [[9], [10, 11, 12, 13]], [[3], [4, 3]]]
FIXED = SpeculationOptions(draft_length=3, adaptive=False)
KINDS: dict[str, dict[str, Any]] = {
    "greedy": dict(temperature=0),
    "sampled": dict(temperature=1.3, top_p=None, seed=3),
    "filters": dict(temperature=0.9, top_k=9, top_p=0.9, min_p=0.02, seed=4),
    "penalty": dict(temperature=0.8, repetition_penalty=1.4, seed=5),
}
SPECULATIONS = {"plain": None, "mtp": FIXED, "adaptive": SpeculationOptions()}
MTP = dict(speculation=FIXED)


@pytest.fixture(scope="module")
def model() -> Nemotron:
    return text_model()


def assert_caches_close(
    found: Cache, row: int, expected: Cache, other: int, atol: float = 1e-9
) -> None:
    """Both rows have read the same, whatever space their buffers have."""
    length = int(expected.lengths[other])
    assert int(found.lengths[row]) == length
    for a, b in zip(found.layers, expected.layers, strict=True):
        for name in () if a is None else a.TENSORS:
            one, two = (getattr(layer, name) for layer in (a, b))
            if isinstance(a, KVCache):
                one, two = one[:, :, :length], two[:, :, :length]
            torch.testing.assert_close(one[row].to(two), two[other], rtol=atol, atol=atol)


def _read_at_once(model: Nemotron, rows: list[list[int]], mtp: bool) -> list[Cache]:
    caches = []
    for row in rows:
        cache = model.empty_cache(1, mtp=mtp)
        with torch.no_grad():
            model(torch.tensor([row]), cache)
        caches.append(cache)
    return caches


@pytest.mark.parametrize("speculation", SPECULATIONS.values(), ids=SPECULATIONS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_conversation_equals_one_that_is_read_again(
    model: Nemotron, kind: dict[str, Any], speculation: SpeculationOptions | None
) -> None:
    """Ids, and the cache itself, after three turns of two rows that end at different times."""
    cache = model.empty_cache(2, capacity=2, mtp=speculation is not None)
    whole: list[list[int]] = [[], []]
    for turn in TURNS:
        whole = [row + new for row, new in zip(whole, turn, strict=True)]
        free = generate(model, whole, 9, stop=(), speculation=speculation, **kind)
        stop = (free[0][2],)  # row 0 ends early
        expected = generate(model, whole, 9, stop=stop, speculation=speculation, **kind)
        found = generate(model, turn, 9, stop=stop, speculation=speculation, cache=cache, **kind)
        assert found == expected
        assert len(found[0]) <= 3
        whole = [row + new for row, new in zip(whole, found, strict=True)]
        assert cache.lengths.tolist() == [len(row) for row in whole]
        assert cache.transcript is not None and cache.transcript.tokens == whole
    for i, fresh in enumerate(_read_at_once(model, whole, mtp=False)):
        assert_caches_close(cache, i, fresh, 0)
    if speculation is not None:  # each token but the last has its entry in the MTP module
        assert cache.mtp_lengths.tolist() == [len(row) - 1 for row in whole]
    # Without a new token the rows go on where they stand.
    expected = generate(model, whole, 5, stop=(), speculation=speculation, **kind)
    more = generate(model, [[], []], 5, stop=(), speculation=speculation, cache=cache, **kind)
    assert more == expected
    whole = [row + new for row, new in zip(whole, more, strict=True)]
    mixed = [[], [7, 7]]
    whole[1] += mixed[1]
    expected = generate(model, whole, 5, stop=(), speculation=speculation, **kind)
    assert (
        generate(model, mixed, 5, stop=(), speculation=speculation, cache=cache, **kind) == expected
    )


@pytest.mark.parametrize("speculation", [None, FIXED])
def test_text_and_stop_strings(model: Nemotron, speculation: SpeculationOptions | None) -> None:
    """The cache reads the tokens of the stop string too; the text does not show them."""
    kind: dict[str, Any] = dict(temperature=0, speculation=speculation)
    cache = model.empty_cache(1, mtp=True)
    free = generate(model, "for value", 24, **kind)
    stop = free[6:8]
    found = generate(
        model, "for value", 24, cache=cache, stop_strings=stop, return_details=True, **kind
    )
    assert (found.stop_reason, found.stop) == ("stop_string", stop)
    assert found.text == free[: free.index(stop)]
    read = model.tokenizer.encode("for value").ids + found.tokens
    assert cache.transcript is not None and cache.transcript.tokens == [read]
    new = model.tokenizer.encode(" in", add_special_tokens=False).ids
    again = generate(model, " in", 9, cache=cache, return_details=True, **kind)
    assert again.tokens == generate(model, read + new, 9, **kind)
    assert again.prompt_tokens == len(new)


@pytest.mark.parametrize("speculation", [None, FIXED])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_stream_that_is_closed_says_what_the_cache_has_read(
    model: Nemotron, speculation: SpeculationOptions | None, steps: int
) -> None:
    kind: dict[str, Any] = dict(temperature=0, stop=(), speculation=speculation)
    prompts, cache = [[5, 6, 7], [8]], model.empty_cache(2, mtp=True)
    with closing(stream(model, prompts, 20, cache=cache, **kind)) as pieces:
        given = [next(pieces) for _ in range(steps)]
        assert cache.transcript is None, "a run is going on"
    found = [result.tokens for result in pieces.results]
    assert [row[:steps] for row in found] == [list(row) for row in zip(*given, strict=True)]
    assert all(result.stop_reason == "unfinished" for result in pieces.results)
    whole = [old + new for old, new in zip(prompts, found, strict=True)]
    assert cache.transcript is not None and cache.transcript.tokens == whole
    for i, fresh in enumerate(_read_at_once(model, whole, mtp=False)):
        assert_caches_close(cache, i, fresh, 0)
    expected = generate(model, [[*row, 9] for row in whole], 6, **kind)
    assert generate(model, [[9], [9]], 6, cache=cache, **kind) == expected


def test_a_stream_that_never_began_has_read_nothing(model: Nemotron) -> None:
    cache = model.empty_cache(1)
    steps = stream(model, [[5, 6]], 4, cache=cache)
    steps.close()
    assert cache.lengths.tolist() == [0] and cache.broken_by == ""
    assert list(steps) == []


@pytest.mark.parametrize("speculation", [None, FIXED])
def test_only_reading(model: Nemotron, speculation: SpeculationOptions | None) -> None:
    kind: dict[str, Any] = dict(temperature=0, stop=(), speculation=speculation)
    cache = model.empty_cache(1, mtp=True)
    assert generate(model, [5, 6, 7], 0, cache=cache, **kind) == []
    assert cache.lengths.tolist() == [3]
    copy = cache.clone()
    expected = generate(model, [5, 6, 7], 8, **kind)
    assert generate(model, [], 8, cache=cache, **kind) == expected
    assert generate(model, [[]], 8, cache=copy, **kind) == [expected]


def test_a_cache_that_read_without_speculation(model: Nemotron) -> None:
    """Its MTP part has gaps. Greedy text stays the same."""
    cache = model.empty_cache(1, mtp=True)
    first = generate(model, [5, 6, 7], 4, temperature=0, stop=(), cache=cache)
    found = generate(model, [8], 12, temperature=0, stop=(), cache=cache, **MTP)
    expected = generate(model, [5, 6, 7, *first, 8], 12, temperature=0, stop=())
    assert found == expected
    model(torch.tensor([[3, 4]]), cache)  # not known to `generate`
    assert cache.transcript is None
    expected = generate(model, [5, 6, 7, *first, 8, *found, 3, 4, 9], 12, temperature=0, stop=())
    assert generate(model, [9], 12, temperature=0, stop=(), cache=cache, **MTP) == expected


@pytest.mark.parametrize("speculation", [None, FIXED])
def test_float16_states_continue_and_repeat(
    model: Nemotron, speculation: SpeculationOptions | None
) -> None:
    kind: dict[str, Any] = dict(temperature=0, stop=(), speculation=speculation)

    def talk(ssm_dtype: torch.dtype | None) -> tuple[list[list[int]], Cache]:
        cache = model.empty_cache(1, mtp=True, ssm_dtype=ssm_dtype, ssm_seed=4)
        return [generate(model, turn[1:], 3, cache=cache, **kind)[0] for turn in TURNS], cache

    found, cache = talk(torch.float16)
    again, _ = talk(torch.float16)
    assert found == again
    assert cache.transcript is not None
    (whole,) = cache.transcript.tokens
    assert whole is not None and cache.lengths.tolist() == [len(whole)]
    (exact,) = _read_at_once(model, [whole], mtp=False)
    assert_caches_close(cache, 0, exact, 0, atol=0.02)


def test_a_cache_is_saved_in_the_middle_of_a_run(model: Nemotron) -> None:
    """Copies continue as the original does, and it does not change with them."""
    cache = model.empty_cache(1)
    generate(model, [5, 6, 7], 4, temperature=0, cache=cache)
    copies = cache.repeat(3)
    rows = generate(model, [[9]] * 3, 6, seed=1, cache=copies, stop=())
    alone = [
        generate(model, [[9]], 6, seed=1 + i, cache=cache.clone(), stop=())[0] for i in range(3)
    ]
    assert rows == alone
    assert cache.lengths.tolist() == [7]


@pytest.mark.parametrize("speculation", [None, FIXED])
@pytest.mark.parametrize("kind", [KINDS["greedy"], KINDS["penalty"]])
def test_a_loaded_cache_continues_as_the_saved_one(
    model: Nemotron, tmp_path: Path, kind: dict[str, Any], speculation: SpeculationOptions | None
) -> None:
    """With and without new tokens, in rows of different lengths, and under any options."""
    kind = kind | dict(stop=(), speculation=speculation)
    cache = model.empty_cache(2, mtp=True)
    generate(model, [[5, 6, 7], [8]], 4, cache=cache, **kind)
    cache.save(tmp_path / "cache")
    for prompts in ([[], []], [[], [9, 3]], [[4], [4]]):
        loaded = Cache.load(tmp_path / "cache")
        copy = cache.clone()
        expected = generate(model, prompts, 6, cache=copy, **kind)
        assert generate(model, prompts, 6, cache=loaded, **kind) == expected
        assert loaded.transcript is not None and copy.transcript is not None
        assert loaded.transcript.tokens == copy.transcript.tokens
        assert torch.equal(loaded.transcript.hidden, copy.transcript.hidden)


def test_a_row_that_is_not_known_stays_so(model: Nemotron, tmp_path: Path) -> None:
    cache = model.empty_cache(2)
    with torch.no_grad():
        model(torch.tensor([[1, 2], [0, 0]]), cache, lengths=torch.tensor([2, 0]))
    generate(model, [[3], [4]], 2, cache=cache, stop=())
    cache.save(tmp_path / "cache")
    loaded = Cache.load(tmp_path / "cache")
    assert loaded.transcript is not None and cache.transcript is not None
    assert loaded.transcript.tokens == cache.transcript.tokens
    assert loaded.transcript.tokens[0] is None and loaded.transcript.tokens[1] is not None
    with pytest.raises(ValueError, match="in row 0 are not known"):
        generate(model, [[3], [4]], 2, cache=loaded, repetition_penalty=1.2)
    with torch.no_grad():
        model(torch.tensor([[1], [2]]), loaded)
    loaded.save(tmp_path / "cache")
    assert Cache.load(tmp_path / "cache").transcript is None, "generate did not read all of it"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(vocab_size=8), "token ids from 5 to 9 in row 0, but the vocabulary has 8 entries"),
        (dict(hidden_size=64), "vectors of 16 numbers, but the model has 64"),
        (dict(head_dim=32), "belongs to another model"),
    ],
)
def test_the_transcript_of_another_model_is_refused(
    model: Nemotron, tmp_path: Path, sizes: dict[str, int], message: str
) -> None:
    """Also where the layers' caches would fit; and the cache is as it was."""
    cache = model.empty_cache(1)
    generate(model, [5, 6, 9], 0, cache=cache)
    cache.save(tmp_path / "cache")
    other = Nemotron(model.config.replace(**sizes), dtype=torch.float64, seed=2)
    loaded = Cache.load(tmp_path / "cache")
    for prompts in ([[]], [[3]]):
        with pytest.raises(ValueError, match=message):
            generate(other, prompts, 3, cache=loaded, repetition_penalty=1.1)
    assert not loaded.broken_by
    found = generate(model, [[]], 3, cache=loaded, temperature=0)
    assert found == generate(model, [[]], 3, cache=cache, temperature=0)


class InterruptedPassError(Exception):
    pass


def test_a_cache_is_refused_after_an_error_in_a_pass(
    model: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = model.empty_cache(1)
    steps = stream(model, [[5, 6, 7]], 4, cache=cache)
    next(steps)

    def fail(*_: Any, **__: Any) -> Any:
        raise InterruptedPassError

    with monkeypatch.context() as patch:
        patch.setattr(model.backbone.layers[1], "forward", fail)
        with pytest.raises(InterruptedPassError):
            next(steps)
    with pytest.raises(ValueError, match=r"InterruptedPassError while this cache.*continue a copy"):
        generate(model, [[9]], 3, cache=cache)


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([[1], [2]], {}, r"2 prompts for a cache of 1 rows: give one prompt .*empty_cache\(2\)"),
        ([[]], {}, "prompt 0 is empty, and the cache does not know.*give at least one new token"),
        ([[1]], dict(num_samples=2), r"num_samples=2 with a cache.*cache.repeat\(num_samples\)"),
        ([[1]], dict(ssm_dtype=torch.float16), "the cache has SSM states in torch.float64"),
        ([[1]], MTP, r"needs a cache with a part for the MTP module.*mtp=True"),
        ([[1]], dict(repetition_penalty=1.2), "repetition_penalty needs all tokens of a row"),
        ([[1]], dict(logits_processors=[lambda t, x: x]), "logits_processors needs all tokens"),
    ],
)
def test_what_a_cache_cannot_do_is_said(
    model: Nemotron, prompts: Any, arguments: dict[str, Any], message: str
) -> None:
    cache = model.empty_cache(1)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]), cache)  # not read by `generate`
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, 3, cache=cache, **arguments)
    assert cache.lengths.tolist() == [2] and not cache.broken_by


def test_a_waiting_draft_is_refused(model: Nemotron) -> None:
    cache = model.empty_cache(1)
    model(torch.tensor([[1, 2]]), cache, draft=True)
    with pytest.raises(ValueError, match="a draft of 2 tokens is waiting"):
        generate(model, [[1]], 3, cache=cache)
