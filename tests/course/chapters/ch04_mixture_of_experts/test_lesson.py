"""What chapter 04 runs beside the learner's code: what it shows is what the model computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nemotron_lite import Nemotron, ledger, load
from nemotron_lite.course import exercises
from nemotron_lite.course.chapters.ch04_mixture_of_experts import lesson
from nemotron_lite.course.own_layers import with_own_layers
from nemotron_lite.layers.context import RouterStats
from nemotron_lite.train import balance, train
from nemotron_lite.train.balance import sequence_balance_loss

LINE = "def mean(values): return sum(values)"


def answer(name: str) -> Any:
    return exercises.exercise(f"04.{name}").build()


@pytest.fixture(scope="module")
def shipped() -> Nemotron:
    return load("lite")


def stats_of(model: Nemotron, tokens: torch.Tensor, layer: int) -> RouterStats:
    with torch.no_grad():
        found = model(tokens, router_stats=True).router
    return next(s for s in found if s.name == f"backbone.layers.{layer}.mixer")


def test_what_is_looked_at_is_what_the_model_decides(shipped: Nemotron) -> None:
    looked = lesson.look(shipped, LINE, layer=6)
    ids = shipped.tokenizer.encode(LINE).ids
    stats = stats_of(shipped, torch.tensor([ids]), 6)
    torch.testing.assert_close(looked.scores, stats.scores[0], rtol=1e-4, atol=1e-5)
    chosen = torch.zeros_like(looked.chosen).scatter(1, stats.indices[0], True)
    assert torch.equal(looked.chosen, chosen)
    scale = shipped.config.routed_scaling_factor
    torch.testing.assert_close(looked.weights.sum(1), torch.full((len(ids),), scale))
    assert len(looked.names) == len(ids)
    assert "".join(looked.names).replace("␣", " ") == LINE


def test_a_layer_without_experts_is_refused(shipped: Nemotron) -> None:
    with pytest.raises(ValueError, match="expected a layer E"):
        lesson.look(shipped, LINE, layer=0)
    with pytest.raises(ValueError, match="with a tokenizer"):
        lesson.look(lesson.mixture(), LINE, layer=lesson.WATCHED)


def test_zeros_are_counted_behind_the_activation(shipped: Nemotron) -> None:
    shares = lesson.zero_share(shipped, LINE)
    assert list(shares) == [f"layer {i}" for i, k in enumerate(shipped.config.pattern) if k == "E"]
    seen = []
    mixer: Any = shipped.backbone.layers[6]
    mixer = mixer.mixer

    def keep(module: Any, arguments: Any, result: Any) -> None:
        rows = arguments[0].reshape(-1, arguments[0].shape[-1])
        routing, z = mixer.gate(rows), mixer.fc1_latent_proj(rows)
        for token, experts in enumerate(routing.indices.tolist()):
            for e in experts:
                hidden = torch.relu(mixer.experts.up_proj[e].float() @ z[token].float())
                seen.append(float((hidden == 0).double().mean()))

    handle = mixer.register_forward_hook(keep)
    with torch.no_grad():
        shipped(torch.tensor([shipped.tokenizer.encode(LINE).ids]))
    handle.remove()
    assert shares["layer 6"] == pytest.approx(sum(seen) / len(seen), abs=1e-4)


def test_both_models_cost_nearly_the_same_for_a_token() -> None:
    mixture, dense = lesson.mixture(), lesson.dense()
    ratio = lesson.flops_per_token(mixture) / lesson.flops_per_token(dense)
    assert 1 <= ratio < 1.05  # the router is what the dense model has not
    assert ledger.parameters(mixture.config).total > 2 * ledger.parameters(dense.config).total
    assert lesson.CONFIG.pattern[lesson.WATCHED] == "E"


def test_own_balance_moves_every_router_as_the_package_does() -> None:
    model, twin = lesson.mixture(), lesson.mixture()
    loads = {
        f"backbone.layers.{i}.mixer": torch.randint(50, (16,))
        for i, kind in enumerate(lesson.CONFIG.pattern)
        if kind == "E"
    }
    record = {"routers": {name: {"load": load.tolist()} for name, load in loads.items()}}
    lesson.OwnBalance(model, answer("update_bias"), 0.02).on_step(record)
    balance.update_biases(twin, loads, 0.02)
    for name in loads:
        ours, theirs = (
            m.get_submodule(f"{name}.gate").get_buffer("e_score_correction_bias")
            for m in (model, twin)
        )
        assert bool(ours.any())
        torch.testing.assert_close(ours, theirs)


def test_a_learners_layer_is_taught_like_the_packages() -> None:
    """The same losses, loads and biases: the router of a learner's layer can be watched."""
    theirs = lesson.teach(lesson.mixture(), "package", update=answer("update_bias"), steps=4)
    mine = with_own_layers(lesson.mixture(), "E", answer("mixture_of_experts"))
    ours = lesson.teach(mine, "own", update=answer("update_bias"), steps=4)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-3)
    assert ours.history is not None
    assert theirs.history is not None
    assert ours.history.routers == theirs.history.routers
    assert (ours.history.load[lesson.ROUTER][0] == theirs.history.load[lesson.ROUTER][0]).all()
    assert ours.history.load[lesson.ROUTER].sum() == 4 * 8 * 64 * 2
    bias = mine.get_submodule(f"{lesson.ROUTER}.gate").get_buffer("e_score_correction_bias")
    assert bool(bias.any())


def test_a_learners_balance_loss_trains_as_the_packages_does() -> None:
    losses = []
    for loss in (answer("balance_loss"), sequence_balance_loss, None):
        model = lesson.mixture()
        taught = lesson.teach(model, "loss", loss=loss, steps=10)
        losses.append(taught.losses)
        assert not model._forward_hooks
    model = lesson.mixture()
    recipe = replace(lesson.RECIPE, steps=10, balance_weight=lesson.LOSS_WEIGHT)
    history = train(model, lesson.text(), recipe, progress=False).history
    assert losses[0] == pytest.approx([record["ce"] for record in history], rel=1e-4)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] != pytest.approx(losses[0], rel=1e-4)


def test_max_vio_of_sequences_is_between_even_and_collapsed() -> None:
    model = lesson.mixture()
    some = lesson.max_vio_of_sequences(model, 4)
    assert 0 < some < 7
    gate = model.get_submodule(f"{lesson.ROUTER}.gate")
    gate.get_buffer("e_score_correction_bias")[:2] = 9.0  # always the same two of 16
    assert lesson.max_vio_of_sequences(model, 4) == pytest.approx(7)


def test_a_dense_model_has_no_history() -> None:
    taught = lesson.teach(lesson.dense(), "dense", steps=2)
    assert taught.history is None
    assert len(taught.losses) == 2
    with pytest.raises(AssertionError, match="no router"):
        lesson.starved(taught)


def test_the_exam_is_a_part_of_the_held_out_text(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = lesson.text().held_out
    part = lesson.exam()
    assert lesson.EXAM_BYTES <= part.num_bytes < held_out.num_bytes
    assert len(part.documents) < len(held_out.documents)
    monkeypatch.setattr(lesson, "EXAM_BYTES", held_out.num_bytes)
    whole = lesson.exam.__wrapped__()
    assert whole.num_bytes == held_out.num_bytes
    assert len(whole.documents) == len(held_out.documents)


def test_devices_drift_apart_and_one_device_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    likes = torch.linspace(-1, 1, 8)
    opposite = torch.stack([likes, -likes]).softmax(-1)
    biases = lesson.drift(answer("update_bias"), opposite, 60, generator)
    assert (biases[0] - biases[1]).abs().max() > 0.5
    assert (biases[0, 0] > 0) and (biases[0, -1] < 0)
    summed = lesson.drift(answer("update_bias"), opposite.mean(0, keepdim=True), 60, generator)
    assert summed.abs().max() < (biases[0] - biases[1]).abs().max() / 2


def test_weights_of_chosen_experts_are_those_of_the_ledger() -> None:
    config = lesson.CONFIG
    found = ledger.parameters(config)
    wanted = sum(int(row.active) for row in found.rows if row.name == "experts")
    assert lesson.expert_weights(config) == wanted


def test_scores_are_shown_without_numbers_in_the_plain_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lesson.compared({"dense": 2.5, "experts": 2.4}, "bits per byte")
    assert capsys.readouterr().out == "bits per byte: dense, experts\n"


def test_super_is_described_with_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    lesson.at_full_scale()
    shown = capsys.readouterr().out
    assert "40 layers of 512 experts, of which a token reads" in shown
    assert "MaxVio is about 2 in training" in shown
