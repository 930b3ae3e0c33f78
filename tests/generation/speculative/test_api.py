"""`generate(..., draft="mtp")` as callers meet it: ends, streams, seeds, neighbours, mistakes."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite import generate, stream
from nemotron_lite.generation.speculative import Statistics
from nemotron_lite.model import Nemotron
from tests.generation.speculative.conftest import SMALL, Guided

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
MTP = dict(draft="mtp", draft_length=4, adaptive=False)


def test_a_stop_token_inside_a_draft_ends_its_row_only(small: Nemotron, guided: Guided) -> None:
    free = generate(small, PROMPTS, 16)
    for place in range(2, 8):  # wherever it falls in a round
        stop = [free[0][place]]
        plain = generate(small, PROMPTS, 16, stop=stop)
        with guided(small, PROMPTS, free, 0.1):
            found = generate(small, PROMPTS, 16, stop=stop, **MTP)
        assert found == plain
        assert found[0][-1] == stop[0]


@pytest.mark.parametrize("most", [0, 1, 2, 3, 5, 9])
def test_no_row_gets_longer_than_asked(small: Nemotron, guided: Guided, most: int) -> None:
    free = generate(small, PROMPTS, 12)
    with guided(small, PROMPTS, free, 0.0):
        found = generate(small, PROMPTS, most, **MTP)
    assert found == [row[:most] for row in free]


def test_a_stream_gives_one_token_per_row_and_step(small: Nemotron, guided: Guided) -> None:
    free = generate(small, PROMPTS, 12)
    stop = [free[1][4]]
    plain = list(stream(small, PROMPTS, 12, stop=stop))
    with guided(small, PROMPTS, free, 0.4):
        assert list(stream(small, PROMPTS, 12, stop=stop, **MTP)) == plain
        iterator = stream(small, PROMPTS, 12, **MTP)
        next(iterator)
        assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("adaptive", [False, True])
def test_sampling_repeats_with_a_seed_and_rows_do_not_see_their_neighbours(
    small: Nemotron, adaptive: bool
) -> None:
    kind = dict(temperature=1.2, top_p=0.9, draft="mtp", draft_length=3, adaptive=adaptive)
    found = generate(small, PROMPTS, 14, seed=5, **kind)
    assert found == generate(small, PROMPTS, 14, seed=5, **kind)
    assert found != generate(small, PROMPTS, 14, seed=6, **kind)
    for row, prompt in enumerate(PROMPTS):
        assert generate(small, [prompt], 14, seed=5 + row, **kind)[0] == found[row]
    before = torch.get_rng_state()
    generate(small, PROMPTS, 4, seed=5, **kind)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("chunk", [1, 2, 50])
def test_prompts_in_pieces(small: Nemotron, chunk: int) -> None:
    plain = generate(small, PROMPTS, 10)
    assert generate(small, PROMPTS, 10, prefill_chunk=chunk, **MTP) == plain


def test_a_long_plain_stretch_is_taken_in_when_drafting_goes_on(
    small: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More hidden states than may wait: the module's memory is filled on the way."""
    from nemotron_lite.generation.sampling import Filters
    from nemotron_lite.generation.speculative import Speculation, drafter

    monkeypatch.setattr(drafter, "MOST_WAITING", 100)

    class Late:
        count = 0

        def wants(self, confidences: list[float]) -> bool:
            return self.count > 2 * drafter.MOST_WAITING and not confidences

        def learn(self, confidences: list[float], accepted: int) -> None:
            self.count += 1

    run = Speculation(small, torch.tensor([[1, 2]]), [2], 300, Filters(), draft_length=1)
    run.controllers = [Late()]
    for _ in run.rounds():
        assert sum(h.shape[1] for h, _, _ in run.drafter._waiting) <= drafter.MOST_WAITING + 1
    assert run.statistics.verifications > 0
    assert run.texts == generate(small, [[1, 2]], 300)


def test_statistics_count_what_was_accepted(small: Nemotron, guided: Guided) -> None:
    free = generate(small, PROMPTS, 21)
    statistics = Statistics()
    with guided(small, PROMPTS, free, 0.0):
        generate(small, PROMPTS, 21, statistics=statistics, **MTP)
    # 20 tokens after the first, five a round: four rounds, all accepted.
    assert statistics.passes == 4
    assert statistics.acceptance_rates == [1.0] * 4
    assert statistics.acceptance_length == statistics.tokens_per_pass == 5
    assert statistics.verifications == 12
    assert 0 < statistics.draft_share < 1
    assert "acceptance length 5.00" in str(statistics)
    assert set(statistics.to_dict()["seconds"]) == {"prompt", "draft", "verify"}
    untouched = Statistics()
    generate(small, PROMPTS, 5, statistics=untouched)
    assert untouched.acceptance_length == 1 and "nothing drafted" in str(untouched)


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


def test_mistakes_are_named_at_once(small: Nemotron) -> None:
    bare = Nemotron(SMALL.replace(mtp_pattern="", mtp_depths=0), seed=0)
    with pytest.raises(ValueError, match="this model has no MTP module"):
        stream(bare, [[1]], 3, draft="mtp")
    with pytest.raises(ValueError, match="draft='eagle': expected one of"):
        stream(small, [[1]], 3, draft="eagle")
    with pytest.raises(ValueError, match="draft_length=0 must be at least 1"):
        stream(small, [[1]], 3, draft="mtp", draft_length=0)
