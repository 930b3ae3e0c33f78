"""The models of chapter 01: what selective means, which rows count as right, another scan."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite import Nemotron, NemotronConfig, ops
from nemotron_lite.course.chapters.ch01_selective_scan import lesson
from nemotron_lite.course.chapters.ch01_selective_scan.lesson import (
    ScanLayer,
    ScanModel,
    exact_rows,
    train_scan,
)
from nemotron_lite.course.exercises import exercise
from nemotron_lite.data.batches import Batch
from nemotron_lite.data.tasks.selective_copy import SelectiveCopy

TASK = SelectiveCopy(items=2, letters=3)
TOKENS = TASK.test_set(rows=6, seq_len=12).tokens


def test_both_kinds_have_the_same_parameters() -> None:
    one, other = (ScanModel(5, selective=kind, seed=3) for kind in (True, False))
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_time_invariant_layer_is_linear_in_time_and_a_selective_one_is_not() -> None:
    torch.manual_seed(0)
    u = torch.randn(1, 10, 32)
    for selective in (True, False):
        layer = ScanLayer(32, 2, 8, 8, selective)
        assert torch.allclose(layer(2 * u)[0], 2 * layer(u)[0], atol=1e-5) is not selective


def test_a_time_invariant_layer_only_knows_distances() -> None:
    torch.manual_seed(0)
    layer, u = ScanLayer(32, 2, 8, 8, selective=False), torch.randn(2, 9, 32)
    later = torch.cat([torch.zeros(2, 4, 32), u], 1)
    assert torch.allclose(layer(later)[0][:, 4:], layer(u)[0], atol=1e-6)


def test_the_exercise_and_the_package_have_the_same_layer() -> None:
    torch.manual_seed(0)
    answer = exercise("01.scan_layer").build()
    for selective in (True, False):
        package, built = ScanLayer(12, 3, 4, 5, selective), answer(12, 3, 4, 5, selective)
        built.load_state_dict(package.state_dict(), strict=True)
        u = torch.randn(2, 7, 12)
        for one, other in zip(built(u), package(u), strict=True):
            assert torch.allclose(one, other, atol=1e-6)


def test_a_model_of_the_learners_layers_learns_as_the_packages_does() -> None:
    answer = exercise("01.scan_layer").build()
    package, built = ScanModel(TASK.vocab_size), ScanModel(TASK.vocab_size, answer)
    built.load_state_dict(package.state_dict(), strict=True)
    assert torch.allclose(built(TOKENS), package(TOKENS), atol=1e-5)


def test_step_sizes_are_those_of_the_forward_pass() -> None:
    for selective in (True, False):
        sizes = ScanModel(TASK.vocab_size, selective=selective).step_sizes(TOKENS)
        assert tuple(sizes.shape) == (6, 12, 4)
        assert (sizes > 0).all()
        assert (float(sizes.std(dim=(0, 1)).max()) > 1e-4) is selective


def test_letters_and_silence_are_told_apart_by_the_tokens() -> None:
    model, exam = ScanModel(TASK.vocab_size), TASK.test_set(rows=6, seq_len=12)
    steps = torch.ones(6, 12, 2)
    steps[exam.tokens >= TASK.FIRST_LETTER] = torch.tensor([3.0, 2.0])
    steps[exam.mask] = 100.0  # answers do not count
    model.step_sizes = lambda tokens: steps
    assert lesson.letters_to_silence(model, TASK, exam) == pytest.approx(3.0)


def test_causal() -> None:
    model = ScanModel(TASK.vocab_size)
    changed = TOKENS.clone()
    changed[:, 7:] = 1
    assert torch.allclose(model(changed)[:, :7], model(TOKENS)[:, :7], atol=1e-6)


def test_a_row_with_one_wrong_answer_does_not_count() -> None:
    batch = TASK.test_set(rows=4, seq_len=12)
    logits = torch.zeros(4, 12, TASK.vocab_size)
    logits[:, :-1] = torch.nn.functional.one_hot(batch.tokens[:, 1:], TASK.vocab_size).float()
    assert exact_rows(logits, batch) == 100
    logits[0, -2] = -logits[0, -2]  # the last answer of a row
    logits[1, 0] = -logits[1, 0]  # silence: nobody asks for it
    logits[2, -1] = 1.0  # behind the row
    assert exact_rows(logits, batch) == 75
    with pytest.raises(ValueError, match="no mask"):
        exact_rows(logits, Batch(batch.tokens))


def test_the_same_seed_learns_the_same_and_the_curve_has_its_points() -> None:
    exam = TASK.test_set(rows=16, seq_len=12)
    curves, weights = [], []
    for _ in range(2):
        model = ScanModel(TASK.vocab_size)
        curves.append(train_scan(model, TASK, exam, "", steps=20, batch_size=16, every=10))
        weights.append(model.head.weight.detach().clone())
    assert len(curves[0]) == 3
    assert curves[0] == curves[1]
    assert torch.equal(*weights)


def test_it_learns_to_copy_two_letters() -> None:
    exam = TASK.test_set(rows=64, seq_len=12)
    curve = train_scan(ScanModel(TASK.vocab_size), TASK, exam, "", steps=100, every=100)
    assert curve[0] < 40
    assert curve[-1] > 80


def test_a_model_with_another_scan_has_the_same_logits_and_gradients() -> None:
    torch.manual_seed(0)
    package = Nemotron(lesson.SMALL, seed=0)
    tokens = torch.randint(256, (2, 11))
    for name in ("selective_recurrence", "parallel_selective_scan"):
        other = lesson.with_scan(package, exercise(f"01.{name}").build())
        assert {k: v.shape for k, v in other.state_dict().items()} == {
            k: v.shape for k, v in package.state_dict().items()
        }
        slopes = []
        for model in (package, other):
            logits = model(tokens).logits
            slopes.append(torch.autograd.grad(logits.square().mean(), [*model.parameters()]))
        assert torch.allclose(other(tokens).logits, package(tokens).logits, atol=1e-4)
        for one, expected in zip(*slopes, strict=True):
            assert torch.allclose(one, expected, rtol=1e-3, atol=1e-5)


def test_a_model_with_another_scan_decodes_with_its_cache() -> None:
    torch.manual_seed(0)
    package = Nemotron(lesson.SMALL, seed=0)
    calls: list[int] = []

    def scan(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(inputs[0].shape[1])
        return lesson.package_scan(*inputs)

    other, tokens = lesson.with_scan(package, scan), torch.randint(256, (1, 9))
    cache = other.empty_cache(1)
    with torch.no_grad():
        pieces = [other(piece, cache).logits for piece in tokens.split([6, 1, 2], dim=1)]
        assert torch.allclose(torch.cat(pieces, 1), package(tokens).logits, atol=1e-4)
    assert calls == [6, 6, 1, 1, 2, 2]  # two Mamba-2 layers, three pieces
    with pytest.raises(ValueError, match="whole rows of one document"):
        other(tokens, lengths=torch.tensor([3]))


def test_the_model_that_is_copied_stays_as_it_was() -> None:
    package = Nemotron(lesson.SMALL, seed=0)
    other = lesson.with_scan(package, lesson.package_scan)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    kinds = {type(layer.mixer).__name__ for layer in package.backbone.layers}
    assert "Mamba2WithScan" not in kinds
    assert not torch.equal(next(other.parameters()), next(package.parameters()))
    without = NemotronConfig("*E", vocab_size=16, hidden_size=16)
    with pytest.raises(ValueError, match="no Mamba-2 layer"):
        lesson.with_scan(Nemotron(without, device="meta"), lesson.package_scan)


def test_training_of_both_models_starts_with_the_same_losses() -> None:
    text = lesson.byte_text()
    package = Nemotron(lesson.SMALL, seed=0)
    other = lesson.with_scan(package, lesson.package_scan)
    losses = [lesson.train_small(model, text, "", steps=3) for model in (package, other)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert 5 < losses[0][0] < 7  # about ln 256, before it has learned anything


def test_the_text_is_the_bytes_of_files() -> None:
    text = lesson.byte_text()
    batch = text.batch(0, batch_size=2, seq_len=40, seed=0)
    assert batch.seq_idx is None
    assert batch.tokens.max() < 256
    assert len(text) > 100_000


def test_inputs_fit_the_scan_and_times_are_positive() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = lesson.random_inputs(5, generator, h=2, p=3, g=1, n=4)
    x, dt, A, B, C, D, state = inputs
    y, last = ops.selective_scan(x, dt, A, B, C, D=D, initial_state=state)
    found = lesson.package_scan(*inputs)
    assert torch.allclose(found[0], y)
    assert torch.allclose(found[1], last)
    took = lesson.time_scans({"package": lesson.package_scan}, [4, 8], generator)
    assert [len(times) for times in took.values()] == [2]
    assert all(t > 0 for t in took["package"])


def test_half_lives_of_heads() -> None:
    model = Nemotron(lesson.SMALL, seed=0)
    mixer = model.backbone.layers[0].mixer
    with torch.no_grad():
        mixer.A_log.zero_()  # A = -1
        mixer.dt_bias.fill_(torch.log(torch.expm1(torch.tensor(0.1))))
    first, second = lesson.half_lives(model)
    assert torch.allclose(first, torch.tensor(6.9315))
    assert second.shape == (4,)
