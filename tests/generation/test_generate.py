"""Generation: greedy against full forwards, ragged batches, filters, seeds, stops, streams."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite.generation import options
from nemotron_lite.generation.generate import generate, stream
from nemotron_lite.generation.prefill import prefill
from nemotron_lite.generation.sampling import distribution
from nemotron_lite.model import Nemotron
from tests.chi_square import chi_square, critical_value
from tests.test_model import TINY, _tokens

GREEDY = dict(temperature=0, stop=())


@pytest.fixture(scope="module")
def model() -> Nemotron:
    return Nemotron(TINY, dtype=torch.float64, seed=1)


def _greedy_by_hand(model: Nemotron, prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


def test_greedy_equals_full_forwards_row_by_row(model: Nemotron) -> None:
    prompts = [_tokens(1, n)[0].tolist() for n in (7, 1, 12)]
    found = generate(model, prompts, 10, **GREEDY)
    assert found == [_greedy_by_hand(model, p, 10) for p in prompts]


@pytest.mark.parametrize("segment", [1, 3, 50])
def test_prefill_in_segments(model: Nemotron, segment: int) -> None:
    prompts = [_tokens(1, n)[0].tolist() for n in (9, 2)]
    whole = generate(model, prompts, 6, **GREEDY)
    assert generate(model, prompts, 6, prefill_segment=segment, **GREEDY) == whole
    padded = torch.zeros(2, 9, dtype=torch.int64)
    padded[0], padded[1, :2] = torch.tensor(prompts[0]), torch.tensor(prompts[1])
    with torch.no_grad():
        whole = prefill(model, padded, [9, 2], model.empty_cache(2))
        parts = prefill(model, padded, [9, 2], model.empty_cache(2), segment)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


def test_sampling_repeats_with_a_seed_and_each_row_has_its_stream(model: Nemotron) -> None:
    prompts = [_tokens(1, 5)[0].tolist()] * 3
    kind = dict(temperature=1.3, top_p=0.9, top_k=20, stop=())
    found = generate(model, prompts, 12, seed=5, **kind)
    assert found == generate(model, prompts, 12, seed=5, **kind)
    assert found[0] != found[1] != found[2]
    assert generate(model, prompts[:1], 12, seed=6, **kind)[0] == found[1]
    before = torch.get_rng_state()
    generate(model, prompts, 2, seed=5, temperature=1.0)
    assert torch.equal(before, torch.get_rng_state())


def test_sampling_follows_the_distribution(model: Nemotron) -> None:
    """Chi-square of 4,000 first tokens, 1 in 10,000 false alarms; and a wrong temperature fails."""
    prompt = _tokens(1, 4)[0].tolist()
    draws = generate(model, [prompt] * 4000, 1, temperature=0.8, top_k=6, top_p=None, seed=0)
    counts = torch.bincount(torch.tensor(draws)[:, 0], minlength=61)
    logits = model(torch.tensor([prompt])).logits[:, -1].detach()
    right, cells = chi_square(counts, distribution(logits, 0.8, 6))
    wrong, _ = chi_square(counts, distribution(logits, 1.2, 6))
    assert cells == 6
    assert right < critical_value(cells - 1) < wrong


def test_filters() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    p = torch.softmax(logits, -1)
    torch.testing.assert_close(distribution(logits, 1.0), p)
    torch.testing.assert_close(distribution(logits, 0.5), torch.softmax(logits * 2, -1))
    top2 = torch.tensor([[p[0, 0], p[0, 1], 0, 0]])
    torch.testing.assert_close(distribution(logits, 1.0, top_k=2), top2 / top2.sum())
    # 0.644 + 0.237 + 0.087: the third reaches 0.9, so three stay
    top3 = torch.tensor([[p[0, 0], p[0, 1], p[0, 2], 0]])
    torch.testing.assert_close(distribution(logits, 1.0, top_p=0.9), top3 / top3.sum())
    torch.testing.assert_close(
        distribution(logits, 1.0, top_p=1e-6), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    )
    torch.testing.assert_close(
        distribution(logits, 0.0, top_k=3), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-19, 1e-21, 1e-38, 1e-40, 5e-324])
def test_tiny_temperatures(temperature: float, dtype: torch.dtype) -> None:
    """The most likely tokens share all probability, though logits / temperature may overflow."""
    logits = torch.tensor([[30.0, 2.0, 30.0, -torch.inf], [-5.0, -4.0, -6.0, -4.5]], dtype=dtype)
    expected = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]], dtype=dtype)
    assert torch.equal(distribution(logits, temperature), expected)
    assert torch.equal(distribution(logits, temperature, top_k=1, top_p=0.95), expected)


def test_close_logits_at_a_tiny_temperature() -> None:
    """Logits as small as the temperature still give more than one token a probability."""
    found = distribution(torch.tensor([[3e-30, 1e-30]]), 2e-30)
    torch.testing.assert_close(found, torch.softmax(torch.tensor([[1.0, 0.0]]), -1))


def test_generation_at_a_tiny_temperature(model: Nemotron) -> None:
    found = generate(model, [5, 6], 8, temperature=1e-40, seed=0, stop=())
    assert found == generate(model, [5, 6], 8, **GREEDY)


def test_stop_tokens_end_their_row_only(model: Nemotron) -> None:
    prompts = [_tokens(1, n)[0].tolist() for n in (7, 3)]
    free = generate(model, prompts, 12, **GREEDY)
    stop = free[0][3]
    found = generate(model, prompts, 12, temperature=0, stop=[stop])
    for row, whole in zip(found, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else 12
        assert row == whole[:end]


def test_stream_gives_the_same_tokens_and_none_after_the_end(model: Nemotron) -> None:
    prompts = [_tokens(1, n)[0].tolist() for n in (7, 3)]
    free = generate(model, prompts, 8, **GREEDY)
    steps = list(stream(model, prompts, 8, temperature=0, stop=[free[1][1]]))
    assert [step[1] for step in steps[:3]] == [free[1][0], free[1][1], None] or (
        free[1][0] == free[1][1]
    )
    assert [[t for t in row if t is not None] for row in zip(*steps, strict=True)] == generate(
        model, prompts, 8, temperature=0, stop=[free[1][1]]
    )
    iterator = stream(model, prompts, 8)
    next(iterator)
    assert not torch.is_inference_mode_enabled()


def test_no_tokens_asked_for(model: Nemotron) -> None:
    assert generate(model, [[1], [2, 3]], 0) == [[], []]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_k=0), "top_k=0"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.5), "top_p=1.5"),
        (dict(prefill_segment=0), "prefill_segment=0"),
    ],
)
def test_bad_arguments_are_named_at_once(model: Nemotron, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream(model, [[1]], 3, **arguments)


def test_empty_prompts_are_refused(model: Nemotron) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[1], []], 3)
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [], 3)


@pytest.mark.parametrize("stop", [2, "x", ["a"]])
def test_stop_tokens_are_ids(stop: object) -> None:
    with pytest.raises(ValueError, match=r"expected token ids such as .*model\.config"):
        options._token_ids(
            "stop", stop, "None for model.config", 9
        )  # the tests' own check of types would refuse the option before
