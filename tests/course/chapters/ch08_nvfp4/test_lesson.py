"""What chapter 08 runs beside the learner's code: real tensors, sums, small trainings, bytes."""

from __future__ import annotations

import inspect
import math
import textwrap
from typing import Any

import pytest
import torch
from torch import nn

from nemotron_lite import Nemotron, NemotronConfig, load
from nemotron_lite.checkpoint import storage_summary
from nemotron_lite.course import exercises
from nemotron_lite.course.chapters.ch08_nvfp4 import lesson
from nemotron_lite.quantization import nvfp4

LITE = NemotronConfig.from_preset("lite")


def answer(name: str) -> Any:
    return exercises.exercise(f"08.{name}").build()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def read(x: torch.Tensor, uniform: torch.Tensor | None = None) -> torch.Tensor:
    found: torch.Tensor = answer("dequantize")(*answer("quantize")(x, uniform=uniform))
    return found


@pytest.fixture(scope="module")
def shipped() -> Nemotron:
    return load("lite")


@pytest.fixture(scope="module")
def seen(shipped: Nemotron) -> dict[str, lesson.Watched]:
    return lesson.watch(shipped)


def test_what_a_layer_saw_gives_its_weight_gradient(
    shipped: Nemotron, seen: dict[str, lesson.Watched]
) -> None:
    """dW = dyᵀ x is the gradient that autograd finds of the same loss."""
    ids = torch.tensor([shipped.tokenizer.encode(inspect.getsource(textwrap)).ids])
    ids = ids[:, : lesson.TOKENS + 1]
    logits = shipped(ids[:, :-1]).logits[0]
    loss = nn.functional.cross_entropy(logits, ids[0, 1:])
    for name in ("layer 0 in_proj", "layer 3 fc1_latent_proj", "layer 5 o_proj"):
        _, number, part = name.split()
        weight = shipped.get_parameter(f"backbone.layers.{number}.mixer.{part}.weight")
        (exact,) = torch.autograd.grad(loss, weight, retain_graph=True)
        found = seen[name].dy.T @ seen[name].x
        assert float((found - exact).norm() / exact.norm()) < 1e-4, name
    assert all(parameter.grad is None for parameter in shipped.parameters())
    assert not any(module._forward_hooks for module in shipped.modules())


def test_a_short_text_is_refused(shipped: Nemotron) -> None:
    with pytest.raises(AssertionError, match=r"tokens; expected 257 or more"):
        lesson.watch(shipped, "x = 1")


def test_out_proj_loses_more_than_in_proj(seen: dict[str, lesson.Watched]) -> None:
    """What the text says about the precision map."""
    shares = {
        name: lesson.zero_share(watched.x, read(watched.x))
        for name, watched in seen.items()
        if name.endswith(("in_proj", "out_proj"))
    }
    lost = [share for name, share in shares.items() if "out_proj" in name]
    kept = [share for name, share in shares.items() if "in_proj" in name]
    assert min(lost) > 3 * max(kept)
    assert max(kept) < 0.1


def test_the_share_of_zeros_leaves_out_numbers_that_are_zero() -> None:
    x, found = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 0.0, 2.0, 3.0, 0.0])
    assert lesson.zero_share(x, found) == pytest.approx(1 / 3)


def test_lost_blocks_keep_one_number_at_most() -> None:
    found = torch.zeros(2, 32)
    found[0, 3] = found[1, 20] = found[1, 21] = 1.0  # one number in a block, two, and none
    assert lesson.lost_blocks(found) == pytest.approx(3 / 4)


def test_out_proj_has_more_zeros_and_a_smaller_error(seen: dict[str, lesson.Watched]) -> None:
    """What the text says of the table: the error is below in_proj's, and lost blocks are rare."""
    found = lesson.mamba_errors(seen, read)
    errors = [found[f"{kind}: relative error of its input"] for kind in ("in_proj", "out_proj")]
    assert 7 < errors[1] < 0.95 * errors[0] < 10
    name = "{}: blocks of dyᵀ with 15 or 16 zeros"
    assert 0 < found[name.format("in_proj")] < 0.5
    assert found[name.format("out_proj")] < found[name.format("in_proj")]
    assert set(lesson.mamba_errors(seen, lambda x, _: x).values()) == {0.0}


def test_gradients_have_the_scales_of_the_format() -> None:
    gradient = torch.randn(8, 32) * torch.exp(3 * torch.randn(8, 1))
    gradient[0, :16] = 0
    found, scale = lesson.in_steps(gradient)
    torch.testing.assert_close(found * scale, gradient)
    read_ = nvfp4.decode_e2m1(nvfp4.encode_e2m1(found)) * scale
    torch.testing.assert_close(read_, nvfp4.fake_quantize(gradient), rtol=1e-6, atol=0)
    assert float(found[0, :16].abs().max()) == 0
    assert float(scale[0, 0]) == 1
    assert float(found.abs().max()) <= 6 * 17 / 16, "E4M3 rounds a scale by at most 1/16"


def test_only_stochastic_rounding_is_right_on_average(seen: dict[str, lesson.Watched]) -> None:
    gradient = seen["layer 0 in_proj"].dy[:32, :32]
    random, stochastic = generator(1), answer("stochastic")  # not that of the gradients
    nearest = lesson.summed_errors(answer("to_e2m1"), gradient, generator())
    errors = lesson.summed_errors(
        lambda x: stochastic(x, torch.rand(x.shape, generator=random)), gradient, generator()
    )
    assert list(nearest) == [1, 2, 4, 8, 16, 32, 64, 128, lesson.MANY]
    assert nearest[lesson.MANY] > nearest[1] / 3
    # Not / 16: where a scale is rounded down, the largest number of the block is clipped.
    assert errors[lesson.MANY] < errors[1] / 8
    assert errors[lesson.MANY] < nearest[lesson.MANY] / 3
    assert errors[1] > nearest[1]
    exact = lesson.summed_errors(lambda x: x, gradient, generator())
    assert exact[lesson.MANY] < 1e-6


def test_dw_is_noisier_and_right_on_average_with_the_recipe(
    seen: dict[str, lesson.Watched],
) -> None:
    watched = seen["layer 0 in_proj"]
    cut = lesson.Watched(watched.x[:, :64], watched.dy[:, :64])
    found = lesson.weight_errors(cut, read, nvfp4.hadamard_transform, generator(), draws=8)
    assert list(found) == ["nearest", "stochastic", "nearest, Hadamard", "stochastic, Hadamard"]
    assert found["nearest"][0] == found["nearest"][1]
    for name in ("stochastic", "stochastic, Hadamard"):
        assert found[name][0] > found["nearest"][0]
        assert found[name][1] < found["nearest"][1]
    exact = lesson.weight_errors(cut, lambda x, _: x, nvfp4.hadamard_transform, generator())
    assert max(max(pair) for pair in exact.values()) < 1e-5
    assert lesson.error_of_x(cut, lambda x, _: x) < 1e-5


def test_most_of_what_remains_of_the_error_of_dw_is_that_of_x(
    seen: dict[str, lesson.Watched],
) -> None:
    watched = seen["layer 0 in_proj"]
    cut = lesson.Watched(watched.x, watched.dy[:, :256])
    found = lesson.weight_errors(cut, read, nvfp4.hadamard_transform, generator())
    alone = lesson.error_of_x(cut, read)
    assert 0.85 * found["stochastic"][1] < alone < found["stochastic"][1]


def test_the_learners_layer_replaces_what_the_recipe_computes_in_four_bits() -> None:
    make = answer("quantized_linear")
    plain, mine = lesson.small(), lesson.with_own_linear(lesson.small(), make)
    paths = lesson.quantized_paths(lesson.CONFIG)
    assert len(paths) == 5
    assert {path.rpartition(".")[2] for path in paths} == {"in_proj", "up_proj", "down_proj"}
    for path in paths:
        assert type(mine.get_submodule(path)).__name__ == "QuantizedLinear"
        weights = [model.get_parameter(f"{path}.weight") for model in (plain, mine)]
        assert torch.equal(weights[0], weights[1])
    names = [[name for name, _ in model.named_parameters()] for model in (plain, mine)]
    assert sorted(names[0]) == sorted(names[1])
    tokens = torch.randint(1024, (1, 32), generator=generator())
    with torch.no_grad():
        logits = [model(tokens).logits for model in (plain, mine)]
    off = float((logits[0] - logits[1]).norm() / logits[0].norm())
    assert 0.001 < off < 0.5, "rounded, and still the same model"


def test_a_training_repeats_and_the_layers_rounding_has_its_seed() -> None:
    make = answer("quantized_linear")

    def losses(seed: int) -> list[float]:
        model = lesson.with_own_linear(lesson.small(), make)
        state = torch.random.get_rng_state()
        found = lesson.teach(model, "own", steps=3, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        return found

    first = losses(0)
    assert losses(0) == first
    assert losses(1) != first
    plain = lesson.teach(lesson.small(), "plain", steps=3)
    assert first == pytest.approx(plain, rel=0.05)
    assert first != plain


def test_the_gap_is_that_of_the_last_losses() -> None:
    exact = [9.0] * 10 + [2.0] * lesson.LAST
    found = [5.0] * 10 + [2.1] * lesson.LAST
    assert lesson.gap(found, exact) == pytest.approx(5)


def test_tensors_are_all_weights_of_the_model() -> None:
    found = lesson.tensors(LITE)
    numbers = sum(parameter.numel() for parameter in Nemotron(LITE).parameters())
    assert sum(math.prod(shape) for _, shape in found) == numbers
    kinds = {kind for kind, _ in found}
    assert {"experts", "mamba.in_proj", "router", "embedding", "head", "mtp", "other"} <= kinds
    experts = [shape for kind, shape in found if kind == "experts"]
    assert len(experts) == 2 * LITE.pattern.count("E")
    assert {len(shape) for shape in experts} == {3}


def test_what_is_counted_is_what_the_file_holds() -> None:
    """Each matrix in the file has one more scale, that of its inputs."""
    weighs = answer("weighs")
    for kind in ("experts", "mamba.in_proj"):
        shapes = [shape for role, shape in lesson.tensors(LITE) if role == kind]
        matrices = sum(math.prod(shape[:-2]) for shape in shapes)
        counted = weighs(lesson.tensors(LITE), {kind: "nvfp4"})[kind]
        assert lesson.stored(kind) == counted + 4 * matrices
    rows = [row for row in storage_summary("lite") if row.role == "mamba.in_proj"]
    assert [row.format for row in rows] == ["NVFP4"]


def test_super_weighs_what_the_text_says() -> None:
    giant, weighs = NemotronConfig.from_preset("super"), answer("weighs")
    eight = dict.fromkeys(("shared", "mamba.in_proj", "mamba.out_proj"), "fp8")
    plain = weighs(lesson.tensors(giant), {})
    mixed = weighs(lesson.tensors(giant), {"experts": "nvfp4", "router": "fp32", **eight})
    assert lesson.bits(giant, plain) == 16
    assert lesson.bits(giant, plain, lesson.MATRICES) == 16
    assert lesson.bits(giant, mixed, lesson.MATRICES) == pytest.approx(4.74, abs=0.005)
    assert lesson.bits(giant, mixed) == pytest.approx(5.12, abs=0.005)
    assert lesson.giga(plain) == "247.2 GB"


def test_the_transform_makes_one_dw_less_exact(seen: dict[str, lesson.Watched]) -> None:
    """What the text says of the matrices that the notebook uses."""
    watched = seen["layer 0 in_proj"]
    cut = lesson.Watched(watched.x, watched.dy[:, :256])
    found = lesson.weight_errors(cut, read, nvfp4.hadamard_transform, generator(), draws=8)
    assert found["nearest, Hadamard"][0] > found["nearest"][0]
    assert found["stochastic, Hadamard"][0] > found["stochastic"][0]
    assert found["stochastic, Hadamard"][1] > 0.99 * found["stochastic"][1]


def test_a_state_in_float16_stops_growing_when_it_is_rounded_to_nearest() -> None:
    found = lesson.long_decode()
    assert {len(values) for values in found.values()} == {lesson.DECODED}
    limit = lesson.WRITE / (1 - lesson.FADE)
    wanted = limit * (1 - lesson.FADE**lesson.DECODED)
    assert found["float32"][-1] == pytest.approx(wanted, rel=1e-3)
    assert found["stochastic"][-1] == pytest.approx(wanted, rel=0.02)
    assert found["nearest"][-1] == found["nearest"][-1000] == 64
    assert found["nearest"][-1] < 0.8 * wanted
    above = [n > e for n, e in zip(found["nearest"], found["float32"], strict=True)]
    assert sum(above[1400:2000]) > 300, "the text says that the line first runs too high"


def test_errors_of_blocks_rise_with_their_size() -> None:
    x = torch.randn(64, 128, generator=generator())
    found = lesson.block_errors(answer("to_e2m1"), x)
    rising = list(found["E4M3"].values())
    assert rising == sorted(rising)
    assert all(found["E4M3"][n] < found["powers of two"][n] for n in found["E4M3"])
    packaged = nvfp4.fake_quantize(x)
    assert found["E4M3"][16] == pytest.approx(float((packaged - x).norm() / x.norm()), rel=1e-4)


def test_the_package_returns_what_the_exercise_returns() -> None:
    x = torch.randn(4, 32)
    for mine, theirs in zip(answer("quantize")(x), lesson.by_package(x), strict=True):
        assert torch.equal(mine.float(), theirs.float())


def test_what_differs_between_machines_is_not_in_the_plain_text(
    capsys: pytest.CaptureFixture[str], shipped: Nemotron
) -> None:
    lesson.compared({"a": 0.5}, "error")
    assert capsys.readouterr().out == "error: a\n"
    lesson.continued(shipped, "import ", 2)
    assert capsys.readouterr().out == "The packed model continues a line of code.\n"


def test_super_is_described_with_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    lesson.at_full_scale()
    lesson.mxfp4()
    shown = capsys.readouterr().out
    assert "within 4.75 bits a weight" in shown
    assert "HMMT with tools, NVFP4" in shown
    assert "after 3.43 trillion tokens" in shown
    assert "In a model of 1.2 billion parameters" in shown
    assert "which needed 36 % more tokens" in shown
