"""What chapter 02 runs beside the learner's code: comparisons, times, wrong ports, training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nemotron_lite import Nemotron, NemotronConfig, ops
from nemotron_lite.course.chapters.ch02_mamba2 import exercises, lesson

CONFIG = NemotronConfig.from_preset("lite", pattern="M")


@pytest.fixture(scope="module")
def layer() -> Any:
    package: Any = Nemotron(CONFIG, seed=0).backbone.layers[0]
    return lesson.loaded(exercises.DECODING.build(), package.mixer, CONFIG)


@pytest.fixture(scope="module")
def probe() -> torch.Tensor:
    return torch.randn(1, 96, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))


def test_same_refuses_a_difference(capsys: pytest.CaptureFixture[str]) -> None:
    lesson.same(torch.ones(2), torch.ones(2) + 1e-4, "ones")
    assert capsys.readouterr().out.startswith("ones: equal")
    with pytest.raises(AssertionError, match=r"twos differ by 1; expected less than 0.001"):
        lesson.same(torch.ones(2), 2 * torch.ones(2), "twos")


def test_a_text_may_be_read_in_any_pieces(layer: Any, probe: torch.Tensor) -> None:
    assert sum(lesson.PIECES) == 96
    whole = lesson.read(layer, probe, [96])
    torch.testing.assert_close(lesson.read(layer, probe), whole, rtol=1e-3, atol=1e-4)
    assert not whole.requires_grad


def test_every_port_errs_where_its_bug_is(layer: Any, probe: torch.Tensor) -> None:
    right = lesson.read(layer, probe)
    errors = {
        name: lesson.error_by_token(port, right, probe)
        for name, port in lesson.ports(layer).items()
    }
    second, single = lesson.MARKS.values()
    clean = 1e-5
    assert errors["one norm"][0] > 1e-2
    assert errors["one norm"].median() > 1e-2
    for name in ("from nothing", "keeps outputs"):
        assert errors[name][:second].max() < clean
        assert errors[name][second] > 1e-2
    jump = errors["keeps outputs"]
    assert jump[second] > 5 * jump[second + 4 : single].max()  # the state is wrong a little too
    assert jump[single] > 5 * jump[single + 4 :].max()
    assert errors["from nothing"][single] < 3 * errors["from nothing"][single - 1]
    assert clean < errors["clamps dt"][:second].median() < 1e-2
    assert lesson.error_by_token(layer, right, probe).max() == 0


def test_ports_have_the_weights_of_the_layer_and_leave_it_alone(layer: Any) -> None:
    for port in lesson.ports(layer).values():
        for name, value in port.state_dict().items():
            assert torch.equal(value, layer.state_dict()[name])
            assert value.data_ptr() != layer.state_dict()[name].data_ptr()


def test_the_inputs_of_the_timing_are_a_scan() -> None:
    random = torch.Generator().manual_seed(0)
    x, dt, A, B, C, state = lesson.scan_inputs(CONFIG, 40, random)
    y, _ = ops.selective_scan(x, dt, A, B, C, initial_state=state)
    assert y.shape == (1, 40, CONFIG.mamba_num_heads, CONFIG.mamba_head_dim)
    assert dt.min() > 0
    assert A.max() < 0
    assert state.shape[-1] == CONFIG.ssm_state_size
    assert not state.any()


def test_seconds_run_in_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    times = lesson.seconds(
        lambda: calls.append("a"), lambda: calls.append("b"), label="timing", repeats=2
    )
    assert calls == ["a", "b"] * 3
    assert len(times) == 2
    assert all(0 <= each < 1 for each in times)


def test_the_least_time_is_named_by_its_place() -> None:
    assert lesson.where_least([1.0, 2.0, 3.0]) == "the shortest"
    assert lesson.where_least([3.0, 1.0, 2.0, 3.0]) == "a length between"
    assert lesson.where_least([3.0, 2.0, 1.0]) == "the longest"


def test_losses_are_means_of_several_steps() -> None:
    model = Nemotron(lesson.SMALL, seed=0)
    found = lesson.train_briefly(model, lesson.python_source(), "the layer", steps=20)
    assert found.shape == (20 // lesson.EVERY,)
    assert found[1] < found[0] < 1.2 * np.log(256)


def test_two_models_have_to_write_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    model = Nemotron(lesson.SMALL, seed=0)
    lesson.write_with(model, model, "def", new=3)
    assert capsys.readouterr().out == "both models wrote the same 3 bytes\n"
    with pytest.raises(AssertionError, match="the same text"):
        lesson.write_with(model, Nemotron(lesson.SMALL, seed=1), "def", new=8)


def test_scores_are_named_without_their_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    lesson.show_scores({"whole": 0.98, "without": 0.1})
    assert capsys.readouterr().out == "share of right answers: whole, without\n"


def test_a_kernel_can_take_the_place_of_the_recurrence(layer: Any, probe: torch.Tensor) -> None:
    calls = []

    def step(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(tensors))
        assert all(tensor.is_contiguous() for tensor in tensors)
        state, x, dt, A, B, C, D = tensors
        return ops.ssd_step(state, x, dt, A, B, C, D=D, impl="torch")

    text = probe[:, :5]
    found = lesson.read(lesson.with_step_kernel(layer, step), text, [2, 1, 1, 1])
    torch.testing.assert_close(found, lesson.read(layer, text, [5]), rtol=1e-3, atol=1e-4)
    assert calls == [7, 7, 7]


@pytest.mark.parametrize("chunk", [5, 8, 24])
def test_gradients_chunk_by_chunk_are_those_of_the_text(
    chunk: int, capsys: pytest.CaptureFixture[str]
) -> None:
    random = torch.Generator().manual_seed(1)
    x, B, C = (torch.randn(24, size, generator=random) for size in (3, 4, 4))
    dt, A = torch.rand(24, generator=random), torch.tensor([-0.4])
    answer = exercises.CHUNK_GRADIENTS.build()
    lesson.compare_chunk_gradients(answer, x, dt, A, B, C, chunk=chunk)
    assert capsys.readouterr().out.count("equal") == 4

    def wrong(*tensors: torch.Tensor) -> list[torch.Tensor]:
        grad_w, grad_s, *rest = answer(*tensors)
        return [grad_w, 0 * grad_s, *rest]

    with pytest.raises(AssertionError, match="gradient of dt"):
        lesson.compare_chunk_gradients(wrong, x, dt, A, B, C, chunk=chunk)
