"""What chapter 03 runs beside the learner's code: what it watches is what the model computes."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite.config import NemotronConfig
from nemotron_lite.course import removal
from nemotron_lite.course.chapters.ch03_attention_anchors import lesson
from nemotron_lite.data.tasks.recall import recall_score

LITE = NemotronConfig.from_preset("lite")


@pytest.fixture(scope="module")
def model() -> removal.Nemotron:
    """Weights large enough that attention is not even over all tokens."""
    made = removal.small_model("recall").eval()
    with torch.no_grad():
        for parameter in made.backbone.layers[1].mixer.parameters():
            parameter.mul_(3)
    return made


def test_a_row_is_spelled_as_numbers_and_letters() -> None:
    assert lesson.spelled(torch.tensor([[3, 16, 15, 31]])) == ["3", "A", "15", "P"]
    assert lesson.book(pairs=5, questions=2).shape == (1, 14)


def test_what_is_watched_is_what_the_model_holds(model: removal.Nemotron) -> None:
    tokens = lesson.book(pairs=4, questions=2)
    found = lesson.watch(model, tokens, head=2)
    cache = model.empty_cache(1)
    model(tokens[:, :7], cache)
    mamba, attention = cache.layers
    torch.testing.assert_close(found.states[6], mamba.ssm[0, 2].T)
    torch.testing.assert_close(found.keys[:7, :16], attention.k[0, 0, :7])
    torch.testing.assert_close(found.keys[:7, 16:], attention.k[0, 1, :7])
    assert found.names == lesson.spelled(tokens)


def test_the_weights_give_the_layers_output(model: removal.Nemotron) -> None:
    """With one value for all heads, weights times values is what the layer writes."""
    tokens = lesson.book(pairs=4, questions=2)
    weights = lesson.attention_weights(model, tokens)
    torch.testing.assert_close(weights.sum(1), torch.ones(12))
    assert bool((weights.triu(1) == 0).all())
    layer = model.backbone.layers[1]
    with torch.no_grad():
        x = layer.norm(model.backbone.layers[0](model.backbone.embed(tokens)))
        heads = [layer.mixer.v_proj(x)[..., :16], layer.mixer.v_proj(x)[..., 16:]]
        layer.mixer.o_proj.weight.copy_(torch.eye(64).view(4, 16, 64).mean(0).repeat(4, 1))
        mean = layer.mixer(x)[0, :, :16]
        q, k = (p(x).unflatten(-1, (-1, 16)).transpose(1, 2)
                for p in (layer.mixer.q_proj, layer.mixer.k_proj))  # fmt: skip
        scores = q @ k.repeat_interleave(2, 1).mT / 4
        hidden = torch.ones(12, 12, dtype=torch.bool).triu(1)
        each = scores.masked_fill(hidden, -torch.inf).softmax(-1)[0]
    torch.testing.assert_close(weights, each.mean(0))
    expected = sum(each[i] @ heads[i // 2][0] for i in range(4)) / 4
    torch.testing.assert_close(mean, expected)


def test_another_model_is_refused() -> None:
    other = removal.small_model("recall", without="attention")
    with pytest.raises(ValueError, match="expected 'M\\*' and one row"):
        lesson.watch(other, lesson.book())


def test_one_attention_layer_does_not_notice_a_shuffle() -> None:
    generator = torch.Generator().manual_seed(0)
    moved = {name: lesson.shuffled(name, LITE, generator) for name in ("*", "**", "M")}
    assert moved["*"] < 1e-5 < 0.02 < moved["**"] < moved["M"]


def test_the_order_of_who_notices_a_shuffle_is_made_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    assert list(lesson.who_notices(LITE, generator)) == ["*", "**", "M", "M*"]
    monkeypatch.setattr(lesson, "shuffled", lambda stack, config, generator: 0.5)
    with pytest.raises(AssertionError, match="expected \\* near 0"):
        lesson.who_notices(LITE, generator)


def test_tiled_is_the_model_with_its_key_heads_in_the_order_of_repeat(
    model: removal.Nemotron,
) -> None:
    tokens = lesson.book()
    wrong = lesson.tiled(model)
    ours = lesson.attention_weights(wrong, tokens)
    layer = model.backbone.layers[1]
    with torch.no_grad():
        x = layer.norm(model.backbone.layers[0](model.backbone.embed(tokens)))
        q, k = (p(x).unflatten(-1, (-1, 16)).transpose(1, 2)
                for p in (layer.mixer.q_proj, layer.mixer.k_proj))  # fmt: skip
        hidden = torch.ones(24, 24, dtype=torch.bool).triu(1)
        scores = (q @ k.repeat(1, 2, 1, 1).mT / 4).masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(ours, scores.softmax(-1)[0].mean(0))
    twice = lesson.tiled(wrong)
    with torch.no_grad():
        torch.testing.assert_close(twice(tokens).logits, model(tokens).logits)
        assert not torch.allclose(wrong(tokens).logits, model(tokens).logits, atol=1e-3)


def test_a_model_of_the_deeper_notebook_is_the_one_of_the_course() -> None:
    ours, course = lesson.recall_model("M*", 4), removal.small_model("recall")
    for name, value in course.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    assert lesson.recall_model("M", 32).config.ssm_state_size == 32


def test_recall_is_scored_at_any_number_of_pairs(model: removal.Nemotron) -> None:
    exam = removal.RECALL.test_set(3, rows=64)
    with torch.no_grad():
        assert lesson.recall_of(model, 3) == recall_score(model(exam.tokens).logits, exam)


def test_training_counts_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lesson, "STEPS", 3)
    trained = removal.small_model("recall")
    losses = lesson.teach(trained, "a short training")
    assert len(losses) == 3
    assert losses == removal.train_small(removal.small_model("recall"), "recall", steps=3)


def test_super_is_described_with_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    lesson.at_full_scale()
    shown = capsys.readouterr().out
    assert "8 attention layers among 88 layers" in shown
    assert "20,480 tokens" in shown
