"""Each removal takes out the part that it names and nothing else, and training keeps it out."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite import ops
from nemotron_lite.course import removal
from nemotron_lite.layers import Mamba2
from nemotron_lite.model import Nemotron

TOKENS = torch.randint(32, (2, 40), generator=torch.Generator().manual_seed(1))
INNER = tuple(part for part in removal.PARTS if part not in removal.PATTERN_CHANGES)


def mixers(model: Nemotron) -> list[Mamba2]:
    return [layer.mixer for layer in model.backbone.layers if isinstance(layer.mixer, Mamba2)]


def logits(model: Nemotron, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("part", INNER)
def test_the_other_weights_are_those_of_the_whole_model(part: str) -> None:
    whole = removal.small_model("recall").state_dict()
    less = removal.small_model("recall", part).state_dict()
    same = [k for k in whole if k in less and torch.equal(whole[k], less[k])]
    expected = {"conv": 2, "D": 1, "selection": 2}.get(part, 0)
    renamed = {"gate": 1}.get(part, 0)  # the norm moves one level down
    assert len(same) == len(whole) - expected - renamed


@pytest.mark.parametrize("part", removal.PARTS)
def test_a_removal_changes_the_output(part: str) -> None:
    whole, less = removal.small_model("text"), removal.small_model("text", part)
    assert (logits(whole) - logits(less)).abs().max() > 1e-3


def test_without_the_convolution_a_first_layer_sees_single_tokens() -> None:
    """Its x, B, C and dt are then a function of one token, which nothing else could give."""
    mixer = mixers(removal.small_model("recall", "conv"))[0]
    u = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    raw = mixer.in_proj(u).split_with_sizes(mixer.splits, dim=-1)[1]
    seen, _ = ops.causal_conv1d(raw, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias)
    torch.testing.assert_close(seen, torch.nn.functional.silu(raw))


def test_without_the_gate_z_has_no_effect() -> None:
    whole, less = (mixers(removal.small_model("recall", p))[0] for p in (None, "gate"))
    y, z = torch.randn(2, 3, 128), torch.randn(3, 128)
    for mixer, same in ((less, True), (whole, False)):
        assert torch.equal(mixer.norm(y[0], z), mixer.norm(y[0], -z)) == same
    norm = less.norm(y[0], z)
    expected = y[0] / (y[0].square().mean(-1, keepdim=True)).sqrt()
    torch.testing.assert_close(norm, expected, rtol=1e-3, atol=1e-3)


def test_without_the_norm_the_scale_of_y_goes_through() -> None:
    whole, less = (mixers(removal.small_model("recall", p))[0] for p in (None, "norm"))
    y, z = torch.randn(3, 128), torch.randn(3, 128)
    torch.testing.assert_close(less.norm(10 * y, z), 10 * less.norm(y, z))
    torch.testing.assert_close(whole.norm(10 * y, z), whole.norm(y, z), rtol=1e-3, atol=1e-3)


def test_without_selection_b_c_and_dt_are_the_same_for_all_tokens() -> None:
    mixer = mixers(removal.small_model("recall", "selection"))[0]
    inner, conv, _ = mixer.splits
    u = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    _, raw, dt = mixer.in_proj(u).split_with_sizes(mixer.splits, dim=-1)
    assert raw[..., :inner].std(dim=1).min() > 0
    assert torch.count_nonzero(raw[..., inner:]) == torch.count_nonzero(dt) == 0
    assert mixer.conv1d.bias[inner:conv].std() > 0.3, "B and C differ from zero"


def test_what_was_removed_stays_removed_while_the_rest_is_trained() -> None:
    for part in ("conv", "D", "selection"):
        model = removal.small_model("recall", part)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        losses = removal.train_small(model, "recall", steps=4)
        assert len(losses) == 4
        mixer = mixers(model)[0]
        after = model.state_dict()
        changed = {k for k in before if not torch.equal(before[k], after[k])}
        assert any("in_proj" in k for k in changed)
        if part == "conv":
            assert not any("conv1d" in k for k in changed)
        elif part == "D":
            assert torch.count_nonzero(mixer.D) == 0
        else:
            inner = mixer.splits[0]
            assert torch.count_nonzero(mixer.in_proj.weight[2 * inner :]) == 0
            assert any("conv1d.bias" in k for k in changed), "B and C are still learned"


def test_layers_are_exchanged_in_the_pattern() -> None:
    assert removal.config_without("text", "attention").pattern == "MEMMEME"
    assert removal.config_without("text", "mamba").pattern == "*E**E*E"
    assert removal.config_without("text", "experts").pattern == "M-M*-M-"


@pytest.mark.parametrize(
    ("task", "part", "named"),
    [("words", None, "'words'"), ("text", "head", "'head'"), ("recall", "experts", "no 'E'")],
)
def test_what_does_not_exist_is_named(task: str, part: str | None, named: str) -> None:
    with pytest.raises(removal.RemovalError, match=named):
        removal.small_model(task, part)


def test_recall_is_scored_between_guessing_and_one() -> None:
    assert 0 <= removal.score(removal.small_model("recall"), "recall") < 0.3
