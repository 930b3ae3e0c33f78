"""Filters, penalty, processors, log-probabilities, samples; defaults of the model."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import pytest
import torch

from nemotron_lite import GenerationOptions, Nemotron, SpeculationOptions, generate, stream
from nemotron_lite.generation.adjustments import Adjustments
from nemotron_lite.generation.defaults import default_options
from nemotron_lite.generation.options import SamplingOptions
from nemotron_lite.generation.sampling import distribution
from tests.chi_square import chi_square, critical_value
from tests.generation.speculative.conftest import GREEDY, SMALL

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
FIXED = SpeculationOptions(draft_length=3, adaptive=False)
SPECULATIONS = [None, FIXED]
FILTERS = [
    (None, None, 0.1), (7, 0.9, 0.05), (9, None, 0.4), (None, 0.6, 0.9), (None, None, 1.0),
    (3, 0.99, 0.0),
]  # fmt: skip


def test_filters_are_those_of_transformers() -> None:
    """Temperature, top_k, top_p and min_p together, on logits of several spreads."""
    hf = pytest.importorskip("transformers.generation.logits_process")
    torch.manual_seed(0)
    ids = torch.zeros(40, 1, dtype=torch.int64)
    for spread in (0.3, 2.0, 9.0):
        logits = torch.randn(40, 61, dtype=torch.float64) * spread
        for temperature in (0.3, 1.0, 2.5):
            for top_k, top_p, min_p in FILTERS:
                warped = hf.TemperatureLogitsWarper(temperature)(ids, logits)
                if top_k is not None:
                    warped = hf.TopKLogitsWarper(top_k)(ids, warped)
                if top_p is not None:
                    warped = hf.TopPLogitsWarper(top_p)(ids, warped)
                warped = hf.MinPLogitsWarper(min_p)(ids, warped)
                found = distribution(logits, temperature, top_k, top_p, min_p)
                torch.testing.assert_close(found, warped.softmax(-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("penalty", [0.3, 1.0, 1.3, 100.0])
def test_the_penalty_is_that_of_transformers(penalty: float) -> None:
    hf = pytest.importorskip("transformers.generation.logits_process")
    torch.manual_seed(0)
    rows = [[3, 3, 9], [1], []]
    options = SamplingOptions(repetition_penalty=penalty)
    adjust = Adjustments(options, rows, 17, torch.device("cpu"))
    for new in ([[4], [5], [6]], [[4, 7], [], [0]], [[], [], []]):
        logits = torch.randn(3, 17)
        found = adjust(logits, [True] * 3)
        for i, row in enumerate(rows):
            expected = logits[i : i + 1]
            if row and penalty != 1:
                processor = hf.RepetitionPenaltyLogitsProcessor(penalty)
                expected = processor(torch.tensor([row]), expected.clone())
            assert torch.equal(found[i], expected[0])
        adjust.add(new)
        rows = [old + more for old, more in zip(rows, new, strict=True)]


def test_a_penalty_changes_greedy_text_as_in_transformers(model: Nemotron) -> None:
    """Prompt and answer count; every step by hand."""
    found = generate(model, PROMPTS, 12, repetition_penalty=1.7, **GREEDY)
    assert found != generate(model, PROMPTS, 12, **GREEDY)
    for prompt, row in zip(PROMPTS, found, strict=True):
        text = list(prompt)
        for token in row:
            logits = model(torch.tensor([text])).logits[0, -1].detach()
            seen = torch.tensor(sorted(set(text)))
            chosen = logits[seen]
            logits[seen] = torch.where(chosen < 0, chosen * 1.7, chosen / 1.7)
            assert token == int(logits.argmax())
            text.append(token)


@pytest.fixture(scope="module")
def model() -> Nemotron:
    return Nemotron(SMALL, dtype=torch.float64, seed=3)


@pytest.mark.parametrize("top_p", [5e-324, 1e-45, 1e-20, 1e-3])
@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-19, 1e-7, 0.5, 1.0, 1e308])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_options_give_a_distribution(
    temperature: float, top_p: float, dtype: torch.dtype
) -> None:
    logits = torch.tensor(
        [
            [3e38, 1e38, -3e38, 0.0],
            [1e20, 1e19, 1e18, -1e20],
            [3.0, 2.0, 1.0, -9.0],
            [1.0, 0, 1, 0],
        ],
        dtype=dtype,
    )
    for kind in (dict(top_p=top_p), dict(min_p=1.0), dict(top_k=1), dict(min_p=5e-324), {}):
        p = distribution(logits, temperature, **kind)
        assert p.isfinite().all() and (p >= 0).all()
        torch.testing.assert_close(p.sum(-1), torch.ones(4, dtype=dtype))
        if temperature <= 1e-7 or (temperature <= 1 and "top_k" in kind):
            assert (p.argmax(-1) == 0).all()
            assert torch.equal(p[:3, 0], torch.ones(3, dtype=dtype))
    assert (distribution(logits, temperature, top_p=top_p)[:, 0] > 0).all()


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1, 2**63, 2**64 - 1])
def test_every_seed_in_range(model: Nemotron, seed: int) -> None:
    found = generate(model, [[1]] * 3, 4, seed=seed, stop=())
    assert found == generate(model, [[1]] * 3, 4, seed=seed, stop=())
    wrapped = (seed + 2) % 2**64
    assert found[2] == generate(model, [[1]], 4, seed=wrapped, stop=())[0]


def test_logprobs_that_nobody_would_see_are_refused(model: Nemotron) -> None:
    with pytest.raises(ValueError, match="logprobs=2 without return_details=True"):
        generate(model, [1, 2], 3, logprobs=2)
    assert len(generate(model, [1, 2], 3, logprobs=None, stop=())) == 3


@pytest.mark.parametrize("speculation", SPECULATIONS)
@pytest.mark.parametrize("penalty", [None, 1.3])
def test_logprobs_are_those_of_the_model(
    model: Nemotron, speculation: SpeculationOptions | None, penalty: float | None
) -> None:
    """Before penalty, temperature and filters; of a verification as of a plain step."""
    found = generate(
        model, PROMPTS, 11, temperature=0.7, top_k=9, seed=2, stop=(), logprobs=4,
        repetition_penalty=penalty, speculation=speculation, return_details=True,
    )  # fmt: skip
    for prompt, row in zip(PROMPTS, found, strict=True):
        logits = model(torch.tensor([prompt + row.tokens])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.detach().log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(row.tokens)[:, None])[:, 0]
        assert row.logprobs == pytest.approx(own.tolist())
        best = logprobs.topk(4)
        assert [
            [token for token, _ in pairs] for pairs in row.top_logprobs
        ] == best.indices.tolist()
        assert row.top_logprobs[0][0][1] == pytest.approx(float(best.values[0, 0]))
        assert len(row.top_logprobs) == len(row.tokens) == 11
    assert generate(model, [1], 2, logprobs=0, return_details=True).top_logprobs == [[], []]
    assert generate(model, [1], 2, return_details=True).logprobs is None
    everything = generate(model, [1], 1, logprobs=10**9, return_details=True).top_logprobs[0]
    assert len(everything) == model.config.vocab_size
    assert math.fsum(math.exp(value) for _, value in everything) == pytest.approx(1)


@pytest.mark.parametrize("speculation", SPECULATIONS)
def test_samples_are_those_of_repeated_prompts(
    model: Nemotron, speculation: SpeculationOptions | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: dict[str, Any] = dict(temperature=1.4, seed=5, speculation=speculation)
    free = generate(model, [row for row in PROMPTS for _ in range(3)], 9, stop=(), **kind)
    kind["stop"] = (free[1][4], free[5][2])
    each = generate(model, [row for row in PROMPTS for _ in range(3)], 9, **kind)
    read: list[int] = []
    forward = Nemotron.forward

    def count(self: Nemotron, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        read.append(tokens.shape[0])
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Nemotron, "forward", count)
    found = generate(model, PROMPTS, 9, num_samples=3, **kind)
    assert read[0] == 3 and set(read[1:]) == {9}, "each prompt is read once"
    assert found == [each[i : i + 3] for i in (0, 3, 6)]
    alone = generate(model, PROMPTS[0], 9, num_samples=2, **kind)
    assert alone == each[:2]
    assert generate(model, PROMPTS[0], 9, num_samples=1, **kind) == each[:1]
    details = generate(model, PROMPTS[:1], 9, num_samples=2, return_details=True, **kind)
    assert [row.tokens for row in details[0]] == each[:2]
    steps = list(stream(model, PROMPTS[:1], 9, num_samples=2, **kind))
    tokens = [[t for step in steps if (t := step[0][i]) is not None] for i in range(2)]
    assert tokens == each[:2]


@pytest.mark.parametrize("penalized", [False, True])
def test_speculation_keeps_the_adjusted_distribution(model: Nemotron, penalized: bool) -> None:
    """Chi-square of the second and third token of 700 rows; unadjusted, it would fail."""

    def tilt(tokens: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits + (torch.arange(len(logits)) % 3 == tokens[-1] % 3) * 2.0

    kind: dict[str, Any] = dict(temperature=1.1, top_k=4, top_p=None, stop=())
    kind |= dict(repetition_penalty=3.0) if penalized else dict(logits_processors=[tilt])
    rows = generate(model, [1, 2, 3], 3, num_samples=700, seed=0, speculation=FIXED, **kind)
    counts: dict[tuple[int, ...], int] = {}
    for row in rows:
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    options = SamplingOptions(**{k: v for k, v in kind.items() if k != "stop"})

    @cache
    def follow(text: tuple[int, ...], adjusted: bool) -> torch.Tensor:
        logits = model(torch.tensor([list(text)])).logits[:, -1].detach()
        if adjusted:
            logits = Adjustments(options, [text], logits.shape[1], logits.device)(logits, [True])
        return distribution(logits, options.temperature, options.top_k)[0]

    def chances(adjusted: bool) -> torch.Tensor:
        values = []
        for row in sorted(counts):
            p = 1.0
            for i, token in enumerate(row):
                p *= float(follow((1, 2, 3, *row[:i]), adjusted)[token])
            values.append(p)
        return torch.tensor([*values, max(0.0, 1 - sum(values))], dtype=torch.float64)

    seen = torch.tensor([*(counts[row] for row in sorted(counts)), 0])
    right, cells = chi_square(seen, chances(True)[None])
    wrong, _ = chi_square(seen, chances(False)[None] + 1e-9)
    assert right < critical_value(cells - 1) < wrong


@pytest.mark.parametrize(
    ("processor", "error", "message"),
    [
        (lambda t, x: None, TypeError, r"logits_processors\[0\] returned NoneType"),
        (lambda t, x: x[1:], ValueError, r"returned the shape \[28\]: expected \[29\]"),
        (lambda t, x: x - math.inf, ValueError, "banned every token"),
        (lambda t, x: x * math.nan, FloatingPointError, "returned NaN"),
        (lambda t, x: x + math.inf, FloatingPointError, r"returned \+inf"),
        (lambda t, x: x > 0, TypeError, r"returned torch.bool"),
    ],
)
@pytest.mark.parametrize("speculation", SPECULATIONS)
def test_processors_that_go_wrong_are_named(
    model: Nemotron, processor: Any, error: type[Exception], message: str,
    speculation: SpeculationOptions | None,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        generate(model, [1], 3, logits_processors=[processor], speculation=speculation)


def _with_config(model: Nemotron, **config: Any) -> Nemotron:
    other = Nemotron(SMALL, dtype=torch.float64, seed=3)
    other.companion_files["generation_config.json"] = json.dumps(config).encode()
    return other


def test_defaults_come_from_generation_config(model: Nemotron) -> None:
    """A keyword, then options, then the file, then the package."""
    fields = dict(
        temperature=0.6, top_k=7, top_p=0.8, min_p=0.03, repetition_penalty=1.2, max_new_tokens=6
    )
    other = _with_config(
        model, **fields, do_sample=True, eos_token_id=[2, 5], num_beams=4, unknown={"a": 1}
    )
    assert default_options(other) == GenerationOptions(**fields, stop=(2, 5))
    found = generate(other, [[1]] * 8, seed=1)
    assert found == generate(model, [[1]] * 8, seed=1, stop=(2, 5), **fields)
    assert found != generate(other, [[1]] * 8, seed=1, temperature=1.9)
    assert generate(other, [[1]] * 8, seed=1, temperature=1.9) == generate(
        model, [[1]] * 8, seed=1, stop=(2, 5), **{**fields, "temperature": 1.9}
    )
    options = GenerationOptions(max_new_tokens=9, seed=1)
    assert generate(other, [[1]] * 8, options=options) == generate(
        model, [[1]] * 8, options=options, stop=(2, 5)
    )
    assert default_options(model) == GenerationOptions(stop=model.config.eos_token_ids)
    greedy = _with_config(model, do_sample=False, temperature=0.6, top_k=0, top_p=None)
    assert default_options(greedy) == GenerationOptions(
        temperature=0, top_k=None, stop=model.config.eos_token_ids
    )
    assert generate(greedy, [1], 5, stop=()) == generate(model, [1], 5, **GREEDY)
    assert generate(greedy, [1], 5, seed=3, stop=(), temperature=1.0) == generate(
        model, [1], 5, seed=3, stop=(), temperature=1.0
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1), ("temperature", True), ("top_k", -1), ("top_p", 0), ("min_p", 2),
        ("repetition_penalty", 0), ("max_new_tokens", -1), ("do_sample", "yes"), ("do_sample", 1),
        ("eos_token_id", "x"), ("eos_token_id", [2, None]), ("eos_token_id", -1),
    ],
)  # fmt: skip
def test_wrong_values_in_the_file_are_named(model: Nemotron, field: str, value: Any) -> None:
    other = _with_config(model, **{field: value})
    with pytest.raises(ValueError, match=rf"generation_config.json: {field}=.*in the call"):
        generate(other, [1], temperature=1) if field == "eos_token_id" else generate(other, [1])
    given: dict[str, Any] = {
        "do_sample": dict(temperature=1), "eos_token_id": dict(stop=())
    }.get(field, {field: 1})  # fmt: skip
    assert len(generate(other, [1], **{"max_new_tokens": 1, **given})) == 1
