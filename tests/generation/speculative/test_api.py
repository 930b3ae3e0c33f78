"""`generate(..., speculation=...)` for its callers: ends, streams, seeds, neighbors, mistakes."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite import GenerationOptions, SpeculationOptions, generate, stream
from nemotron_lite.generation.speculative import Statistics
from nemotron_lite.model import Nemotron
from tests.generation.speculative.conftest import GREEDY, SMALL, Guided

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
MTP = dict(speculation=SpeculationOptions(draft_length=4, adaptive=False))


def test_a_stop_token_inside_a_draft_ends_its_row_only(small: Nemotron, guided: Guided) -> None:
    free = generate(small, PROMPTS, 16, **GREEDY)
    for place in range(2, 8):  # wherever it falls in a round
        stop = [free[0][place]]
        plain = generate(small, PROMPTS, 16, temperature=0, stop=stop)
        with guided(small, PROMPTS, free, 0.1):
            found = generate(small, PROMPTS, 16, temperature=0, stop=stop, **MTP)
        assert found == plain
        assert found[0][-1] == stop[0]


@pytest.mark.parametrize("most", [0, 1, 2, 3, 5, 9])
def test_no_row_gets_longer_than_asked(small: Nemotron, guided: Guided, most: int) -> None:
    free = generate(small, PROMPTS, 12, **GREEDY)
    with guided(small, PROMPTS, free, 0.0):
        found = generate(small, PROMPTS, most, **MTP, **GREEDY)
    assert found == [row[:most] for row in free]


def test_a_stream_gives_one_token_per_row_and_step(small: Nemotron, guided: Guided) -> None:
    free = generate(small, PROMPTS, 12, **GREEDY)
    stop = [free[1][4]]
    plain = list(stream(small, PROMPTS, 12, temperature=0, stop=stop))
    with guided(small, PROMPTS, free, 0.4):
        assert list(stream(small, PROMPTS, 12, temperature=0, stop=stop, **MTP)) == plain
        iterator = stream(small, PROMPTS, 12, **MTP, **GREEDY)
        next(iterator)
        assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("adaptive", [False, True])
def test_sampling_repeats_with_a_seed_and_rows_do_not_depend_on_their_neighbors(
    small: Nemotron, adaptive: bool
) -> None:
    kind = dict(
        temperature=1.2, top_p=0.9, stop=(),
        speculation=SpeculationOptions(draft_length=3, adaptive=adaptive),
    )  # fmt: skip
    found = generate(small, PROMPTS, 14, seed=5, **kind)
    assert found == generate(small, PROMPTS, 14, seed=5, **kind)
    assert found != generate(small, PROMPTS, 14, seed=6, **kind)
    for row, prompt in enumerate(PROMPTS):
        assert generate(small, [prompt], 14, seed=5 + row, **kind)[0] == found[row]
    before = torch.get_rng_state()
    generate(small, PROMPTS, 4, seed=5, **kind)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("segment", [1, 2, 50])
def test_prompts_in_segments(small: Nemotron, segment: int) -> None:
    plain = generate(small, PROMPTS, 10, **GREEDY)
    assert generate(small, PROMPTS, 10, prefill_segment=segment, **MTP, **GREEDY) == plain


def test_a_long_plain_stretch_is_read_when_drafting_goes_on(
    small: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More hidden states than may be pending: the module reads them on the way."""
    from nemotron_lite.generation.speculative import SpeculativeDecoding, drafter

    monkeypatch.setattr(drafter, "MAX_PENDING", 100)

    class Late:
        count = 0

        def wants_more(self, confidences: list[float]) -> bool:
            return self.count > 2 * drafter.MAX_PENDING and not confidences

        def update(self, confidences: list[float], accepted: int) -> None:
            self.count += 1

    options = GenerationOptions(
        max_new_tokens=300, speculation=SpeculationOptions(draft_length=1), **GREEDY
    )
    run = SpeculativeDecoding(small, torch.tensor([[1, 2]]), [2], options)
    run.draft_lengths = [Late()]
    for _ in run.passes():
        assert sum(h.shape[1] for h, _, _ in run.drafter._pending) <= drafter.MAX_PENDING + 1
    assert run.statistics.verifications > 0
    assert [row.tokens for row in run.rows] == generate(small, [[1, 2]], 300, **GREEDY)


def test_statistics_count_what_was_accepted(small: Nemotron, guided: Guided) -> None:
    free = generate(small, PROMPTS, 21, **GREEDY)
    with guided(small, PROMPTS, free, 0.0):
        _, statistics = generate(small, PROMPTS, 21, return_statistics=True, **MTP, **GREEDY)
    # 20 tokens after the first, five in a pass: four passes, all accepted.
    assert statistics.passes == 4
    assert statistics.acceptance_rates == [1.0] * 4
    assert statistics.acceptance_length == statistics.tokens_per_pass == 5
    assert statistics.verifications == 12
    assert 0 < statistics.draft_share < 1
    assert "acceptance length 5.00" in str(statistics)
    assert set(statistics.to_dict()["seconds"]) == {"prompt", "draft", "verify"}
    _, plain = generate(small, PROMPTS, 5, return_statistics=True, **GREEDY)
    assert plain.acceptance_length == 1 and "nothing drafted" in str(plain)
    assert (plain.passes, plain.plain, plain.tokens_per_pass) == (4, 12, 1)
    steps = stream(small, PROMPTS, 5, **GREEDY)
    assert steps.statistics.passes == 0
    assert len(list(steps)) == 5
    assert steps.statistics.passes == 4


def test_statistics_by_position() -> None:
    statistics = Statistics()
    statistics.count([3, 3, 0], [3, 1, 0])
    statistics.count([2], [0])
    assert statistics.tried == [3, 2, 1]
    assert statistics.accepted == [2, 1, 1]
    assert statistics.acceptance_length == pytest.approx((4 + 2 + 1) / 3)
    assert statistics.tokens_per_pass == pytest.approx((4 + 2 + 1 + 1) / 4)
    assert statistics.mean_draft == pytest.approx(8 / 4)
    assert (statistics.passes, statistics.plain) == (2, 1)


def test_statistics_of_several_runs_add_up() -> None:
    one, other = Statistics(), Statistics()
    one.count([3, 0], [3, 0])
    other.count([1], [0])
    one.seconds["draft"] = 2.0
    both = sum([one, other], Statistics())
    assert (both.tried, both.accepted) == ([2, 1, 1], [1, 1, 1])
    assert (both.passes, both.plain, both.verifications, both.drafted) == (2, 1, 2, 4)
    assert both.verified_tokens == 5
    assert both.seconds["draft"] == 2.0
    assert one.passes == 1


def test_mistakes_are_named_at_once(small: Nemotron) -> None:
    bare = Nemotron(SMALL.replace(mtp_pattern="", mtp_depths=0), seed=0)
    with pytest.raises(ValueError, match="needs an MTP module, and this model has none"):
        stream(bare, [[1]], 3, speculation=SpeculationOptions())
    with pytest.raises(ValueError, match=r"draft_length=0 \(int\): expected an integer from 1"):
        SpeculationOptions(draft_length=0)
