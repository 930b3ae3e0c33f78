"""NaN and infinity in logits: an error with step, row and layer, whatever the way of choosing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemotron_lite import Nemotron, SpeculationOptions, generate, score, stream
from tests.generation.speculative.conftest import SMALL

FIXED = SpeculationOptions(draft_length=3, adaptive=False)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": dict(temperature=0),
    "sampled": dict(seed=0, top_p=None),
    "top_p": dict(seed=0, top_p=0.9),
    "top_k, min_p": dict(seed=0, top_k=3, top_p=None, min_p=0.1),
    "penalty": dict(seed=0, repetition_penalty=1.2),
    "samples": dict(seed=0, num_samples=2),
    "speculation": dict(seed=0, speculation=FIXED),
    "greedy speculation": dict(temperature=0, speculation=FIXED),
}


def broken(token: int, value: float) -> Nemotron:
    """A model that works until it reads `token`."""
    model = Nemotron(SMALL, seed=1)
    with torch.no_grad():
        model.backbone.embeddings.weight[token] = value
    return model


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_head(way: dict[str, Any], value: float) -> None:
    model = Nemotron(SMALL, seed=1)
    with torch.no_grad():
        model.lm_head.weight[5] = value
    message = r"logits of row 0 at step 0, so no token can be chosen\. It began here: .*lm_head"
    with pytest.raises(FloatingPointError, match=message):
        generate(model, [[1, 2, 3]], 4, **way)


@pytest.mark.parametrize("speculation", [None, FIXED])
def test_the_step_and_the_row_are_named(speculation: SpeculationOptions | None) -> None:
    """Row 1 writes the bad token at one step and reads it at the next.

    With speculation a draft may hold the token before. It is read as one chunk, where NaN reaches
    the tokens before it too, so only the origin is certain.
    """
    fine = Nemotron(SMALL, seed=1)
    prompts = [[1, 2, 3], [4], [7, 8]]
    kind: dict[str, Any] = dict(temperature=0, stop=(), speculation=speculation)
    rows = generate(fine, prompts, 12, **kind)
    known = [token for row in [*prompts, rows[0], rows[2]] for token in row]
    step, bad = next(
        (i, token)
        for i, token in enumerate(rows[1])
        if i > 1 and token not in [0, *rows[1][:i], *known]
    )
    model = broken(bad, torch.nan)
    message = rf"NaN in the logits of row 1 at step {step + 1},.*began here: NaN in the .*embed"
    if speculation is not None:
        message = r"NaN in the logits of row \d at step \d+,.*began here: NaN in the .*embed"
    cache = model.empty_cache(3, mtp=True)
    steps = stream(model, prompts, 12, cache=cache, **kind)
    with pytest.raises(FloatingPointError, match=message):
        list(steps)
    assert cache.broken_by == "FloatingPointError"
    # A row that has ended reads the bad token, and does not disturb the others.
    kind |= dict(stop=[bad], speculation=None)
    assert generate(model, prompts, 12, **kind) == generate(fine, prompts, 12, **kind)


def test_check_layers_stops_in_the_pass() -> None:
    model = broken(9, torch.inf)
    with pytest.raises(FloatingPointError, match=r"at step 0: \+inf in the output of .*embeddings"):
        generate(model, [[1, 9]], 3, check_layers=True)
    model = Nemotron(SMALL, seed=1)
    with torch.no_grad():
        model.backbone.layers[2].mixer.o_proj.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"layer 2 \(attention\).*o_proj"):
        generate(model, [[1, 9]], 3, check_layers=True)
    with pytest.raises(FloatingPointError, match=r"It began here: .*layer 2 \(attention\).*o_proj"):
        generate(model, [[1, 9]], 3)
    fine = Nemotron(SMALL, seed=1)
    assert generate(fine, [[1, 9]], 6, check_layers=True, seed=0) == generate(
        fine, [[1, 9]], 6, seed=0
    )
    assert not any(module._forward_hooks for module in fine.modules())


@pytest.mark.parametrize("kind", [dict(temperature=0), dict(seed=0)])
def test_a_bad_mtp_module(kind: dict[str, Any]) -> None:
    """The backbone works, so the error says that speculation is the way out."""
    model = Nemotron(SMALL, seed=1)
    assert model.mtp is not None
    with torch.no_grad():
        next(model.mtp.parameters()).fill_(torch.nan)
    assert len(generate(model, [[1, 2]], 4, stop=(), **kind)[0]) == 4
    with pytest.raises(FloatingPointError, match=r"of the MTP module are not finite.*without"):
        generate(model, [[1, 2]], 4, stop=(), speculation=FIXED, **kind)


def test_scores_name_the_place() -> None:
    model = broken(9, torch.nan)
    with pytest.raises(FloatingPointError, match=r"NaN in the logits of row 1 at.*embedd.*token 2"):
        score(model, [[1, 2, 3], [4, 9, 5, 6], [7]], batch_size=2)
    assert [row.num_tokens for row in score(model, [[1, 9], [3]])] == [2, 1], "9 is only predicted"
