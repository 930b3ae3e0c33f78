"""Figures of chapter 08: their numbers, marks and words, and how fast the sliders answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nemotron_lite.config import NemotronConfig
from nemotron_lite.course.chapters.ch08_nvfp4 import figures, lesson
from nemotron_lite.course.plotting import alt_of, theme
from nemotron_lite.course.plotting.widgets import BUDGET
from nemotron_lite.course.records import record
from nemotron_lite.quantization import nvfp4
from nemotron_lite.quantization.recipe import RECIPES

# The scale of the block is 2: its largest number, 12, becomes 6.
BLOCK = torch.tensor([12.0, -5.0, 2.6, 0.4, *[0.0] * 12])
LITE = NemotronConfig.from_preset("lite")


def by_hand(block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """NVFP4 with a tensor scale of 1, so that the scale is that of the text."""
    scale = torch.tensor([2.0]).to(torch.float8_e4m3fn)
    return nvfp4.decode_e2m1(nvfp4.encode_e2m1(block / 2)), scale, torch.tensor(1.0)


def read(x: Tensor) -> Tensor:
    return nvfp4.fake_quantize(x)


def heights(fig: Any, trace: int = 0) -> list[float]:
    return np.asarray(fig.data[trace].y, dtype=float).tolist()


def test_the_map_has_every_matrix_of_a_layer_in_its_format() -> None:
    fig = figures.precision_map(LITE, RECIPES["nvfp4"])
    drawn = {trace.name: len(trace.x) for trace in fig.data}
    # Six M layers and six E layers, the last E in the tail; two attention layers of four matrices.
    assert drawn == {"NVFP4": 6 + 5 + 5, "MXFP8": 6, "BF16": 2 + 6 + 2, "FP32": 6}
    bf16 = next(trace for trace in fig.data if trace.name == "BF16")
    assert 13 in bf16.x
    assert set(bf16.text) == {"16"}
    assert "from FP32, BF16, MXFP8, NVFP4" in str(alt_of(fig))


def test_a_recipe_without_a_tail_has_no_experts_in_bf16() -> None:
    fig = figures.precision_map(LITE, RECIPES["nvfp4"].without("tail"))
    assert {trace.name: len(trace.x) for trace in fig.data}["NVFP4"] == 6 + 6 + 6


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        (0, [12, -5, 2.6, 0.4]), (1, [6, -2.5, 1.3, 0.2]),
        (2, [6, -2, 1.5, 0]), (3, [12, -4, 3, 0]),
    ],
)  # fmt: skip
def test_the_steps_are_those_of_the_example_by_hand(step: int, wanted: list[float]) -> None:
    fig = figures.block_steps(BLOCK, by_hand, step)
    np.testing.assert_allclose(heights(fig)[:4], wanted, rtol=1e-6)
    lines = np.asarray(fig.layout.yaxis.tickvals)
    np.testing.assert_allclose(lines, np.asarray(figures.GRID) * (1 if step in (1, 2) else 2))
    assert len(lines) == len(fig.layout.yaxis.ticktext) == 15


@pytest.mark.timing
def test_the_stepper_goes_through_the_four_steps() -> None:
    view = figures.block_stepper(BLOCK, by_hand)
    assert "The largest of the sixteen numbers is 12" in view.words.value
    view.go(1)
    assert view.seconds < BUDGET
    assert "The scale of the block is 2." in view.words.value
    view.go(1)
    assert "1 went to zero" in view.words.value
    np.testing.assert_allclose(heights(view.figure)[:4], [6, -2, 1.5, 0])
    view.go(1)
    assert "Their largest error is 1." in view.words.value
    assert view.figure.layout.title.text == "Step 3: multiplied by the scale again"


def test_zeros_are_grouped_by_layer() -> None:
    shares = {"layer 0 in_proj": 0.07, "layer 0 out_proj": 0.4, "layer 2 out_proj": 0.5}
    fig = figures.flushed(shares, "title")
    assert [trace.name for trace in fig.data] == ["input of in_proj", "input of out_proj"]
    assert list(fig.data[1].x) == ["layer 0", "layer 2"]
    np.testing.assert_allclose(heights(fig, 1), [40, 50])
    assert list(fig.data[0].text) == ["7"]
    assert "the bar of out_proj is the highest" in str(alt_of(fig))


def test_sums_are_in_percent_and_say_how_many_lines_there_are() -> None:
    errors = {"to nearest": {1: 0.12, 2: 0.1}, "stochastic": {1: 0.17, 2: 0.12}}
    fig = figures.sums(errors, "title")
    np.testing.assert_allclose(heights(fig, 1), [17, 12])
    assert list(fig.data[0].x) == [1, 2]
    assert "it begins higher and keeps falling" in str(alt_of(fig))
    alone = figures.sums({"to nearest": errors["to nearest"]}, "title")
    assert "tochastic" not in str(alt_of(alone))  # the answer of the next exercise


def test_an_outlier_is_read_in_both_ways() -> None:
    block = torch.linspace(-1.5, 1.5, 16)
    fig = figures.outlier(block, read, nvfp4.hadamard_transform, size=40.0, place=5)
    x = block.clone()
    x[5] = 40
    np.testing.assert_allclose(heights(fig, 0), read(x), rtol=1e-6)
    behind = nvfp4.inverse_hadamard_transform(read(nvfp4.hadamard_transform(x)))
    np.testing.assert_allclose(heights(fig, 2), behind, rtol=1e-6)
    np.testing.assert_allclose(heights(fig, 1), x)
    directly, transformed = (sum(abs(v) < 1e-6 for v in heights(fig, i)) for i in (0, 2))
    assert directly == 15
    assert transformed < 8


@pytest.mark.timing
def test_the_slider_of_the_outlier_redraws_in_time() -> None:
    block = torch.randn(16, generator=torch.Generator().manual_seed(0))
    widget = figures.outlier_widget(block, read, nvfp4.hadamard_transform)
    assert "0 with the transform" in widget.words.value
    assert "Their error is" in widget.words.value
    widget.controls["size"].value = figures.LARGEST
    assert widget.seconds < BUDGET
    assert "15 are read as zero directly, 15 with the transform" in widget.words.value
    assert heights(widget.figure, 1)[5] == pytest.approx(figures.LARGEST)
    assert widget.figure.layout.title.text.startswith("Number 5 is 200")
    widget.controls["size"].value = 1.0
    assert "0 are read as zero directly" in widget.words.value


def test_errors_beside_an_outlier_are_those_of_the_small_numbers_and_of_all() -> None:
    block = torch.linspace(-1.5, 1.5, 16)
    zeros, x, found, errors = figures._with_outlier(block, read, nvfp4.hadamard_transform, 40.0, 5)
    assert zeros[0] == 15
    assert errors[0] == pytest.approx(100)  # each of them is read as 0
    off = np.asarray(found[1]) - np.asarray(x)
    small = np.arange(16) != 5
    small_error = np.linalg.norm(off[small]) / np.linalg.norm(np.asarray(x)[small])
    assert errors[1] == pytest.approx(100 * small_error, rel=1e-4)
    whole = 100 * np.linalg.norm(off) / np.linalg.norm(x)
    assert errors[3] == pytest.approx(whole, rel=1e-4)


def test_each_way_to_compute_dw_has_two_bars() -> None:
    fig = figures.weight_gradients({"nearest": (0.12, 0.12), "stochastic": (0.16, 0.1)}, 16)
    np.testing.assert_allclose(heights(fig, 0), [12, 16])
    np.testing.assert_allclose(heights(fig, 1), [12, 10])
    assert [trace.name for trace in fig.data] == ["one dW", "mean of 16"]


def test_losses_are_means_of_neighbouring_updates() -> None:
    fig = figures.losses({"a": [float(i) for i in range(25)], "b": [1.0] * 25}, "title")
    assert heights(fig, 0) == [4.5, 14.5]
    assert list(fig.data[1].x) == [10, 20]


def test_the_ablations_are_those_of_the_record() -> None:
    fig = figures.ablations()
    variants = record("nvfp4_training_small")["variants"]
    names = list(fig.layout.yaxis.ticktext)
    assert len(names) == len(variants) - 1  # all but BF16 itself
    place = names.index("without the Hadamard transform")
    each = variants["nvfp4 without hadamard"]["held_out_nats_gap_percent"]["each"]
    assert list(fig.data[2 * place].x) == each
    assert fig.data[2 * place + 1].x[0] == pytest.approx(sorted(each)[1])
    words = str(alt_of(fig))
    for name, key in {"FP32": "fp32", "NVFP4, the recipe": "nvfp4"}.items():
        gaps = variants[key]["held_out_nats_gap_percent"]
        assert f"{name}, {gaps['min']:.2f} to {gaps['max']:.2f}" in words
    better = "without stochastic rounding, without last layers in BF16"
    assert f"Below the recipe with each seed: {better}." in words


def test_the_words_of_ablations_are_those_of_what_is_drawn() -> None:
    def gaps(*each: float) -> dict[str, Any]:
        return {"held_out_nats_gap_percent": {"each": list(each)}}

    variants = {
        "fp32": gaps(-9.0, -9.0), "nvfp4": gaps(1.0, 2.0),
        "nvfp4 without hadamard": gaps(0.5, 1.5),
        "nvfp4 without stochastic": gaps(1.5, 1.6),
    }  # fmt: skip
    words = str(alt_of(figures.ablations({"variants": variants})))
    assert "without stochastic rounding, 1.50 to 1.60" in words
    assert "Below the recipe with each seed: without the Hadamard transform." in words
    del variants["nvfp4 without hadamard"]
    words = str(alt_of(figures.ablations({"variants": variants})))
    assert "Below the recipe with each seed: no row." in words


def test_the_record_says_what_the_text_says_of_it() -> None:
    """The sign of the gap in training, what is better without a part, and what overlaps."""
    variants = record("nvfp4_training_small")["variants"]
    assert {tuple(variant["seeds"]) for variant in variants.values()} == {(0, 1, 2)}
    four_bits = [variant for name, variant in variants.items() if name.startswith("nvfp4")]
    gaps = [gap for v in four_bits for gap in v["train_nats_gap_percent"]["each"]]
    assert len(gaps) == 15
    assert (f"{min(gaps):.2f}", f"{max(gaps):.1f}") == ("0.03", "0.8")
    held_out = {name: v.get("held_out_nats_gap_percent") for name, v in variants.items()}
    recipe, square = held_out["nvfp4"], held_out["nvfp4 without square"]
    for name in ("nvfp4 without stochastic", "nvfp4 without tail"):
        pairs = zip(held_out[name]["each"], recipe["each"], strict=True)
        assert all(without < with_it for without, with_it in pairs), name
    assert max(recipe["min"], square["min"]) < min(recipe["max"], square["max"])


def test_quantizing_afterwards_is_that_of_the_record() -> None:
    fig = figures.after_training()
    found = {entry["as"]: entry for entry in record("nvfp4_checkpoints_loss")["results"]}
    names = list(fig.layout.yaxis.ticktext)
    assert "NVFP4, searched scales<br>4.50 bits" in names
    assert "NVFP4, your rule's scales<br>4.50 bits" in names
    assert "the package's packed model<br>4.90 bits" in names
    place = names.index("NVFP4 and FP8, chosen<br>4.75 bits")
    change = found["mixed, 4.75 bits"]["weights and inputs"]["change_percent"]
    assert list(fig.data[2 * place].x) == change["each"]
    medians = {name: fig.data[2 * i + 1].x[0] for i, name in enumerate(names)}
    assert min(medians, key=medians.__getitem__).startswith("FP8")
    assert medians["NVFP4, searched scales<br>4.50 bits"] > medians[names[place]]
    assert medians["NVFP4, your rule's scales<br>4.50 bits"] == max(medians.values())
    assert f"from the lowest: FP8, {min(medians.values()):.2f} %;" in str(alt_of(fig))
    assert str(alt_of(fig)).index("the package's packed model") < str(alt_of(fig)).index("searched")


def test_sizes_of_blocks_carry_their_bits() -> None:
    errors = {"E4M3": {8: 0.1, 16: 0.2}, "powers of two": {8: 0.3, 16: 0.3}}
    fig = figures.block_sizes(errors)
    assert list(fig.layout.xaxis.ticktext) == ["8<br>(5)", "16<br>(4.5)"]
    np.testing.assert_allclose(heights(fig, 0), [10, 20])


def test_states_are_drawn_every_fifty_tokens() -> None:
    ways = {name: [float(t) for t in range(200)] for name in ("float32", "nearest", "stochastic")}
    fig = figures.states(ways)
    assert list(fig.data[0].x) == [1, 51, 101, 151]
    assert heights(fig, 2) == [0, 50, 100, 150]
    assert fig.data[2].name == "float16, to nearest"


def test_formats_differ_from_each_other_and_from_the_background() -> None:
    for colour in figures.COLOURS.values():
        text = theme.text_on(colour)
        assert theme.contrast(text, colour) > 4.5
        assert theme.contrast(theme.in_the_dark(text), theme.in_the_dark(colour)) > 4.5
        assert theme.contrast(colour, theme.PLOT) > 3


def test_every_figure_says_in_words_what_it_shows() -> None:
    block = torch.randn(16)
    drawn = [
        figures.precision_map(LITE, RECIPES["nvfp4"]),
        figures.block_steps(block, lesson.by_package),
        figures.flushed({"layer 0 in_proj": 0.1}, "t"), figures.sums({"a": {1: 0.1}}, "t"),
        figures.outlier(block, read, nvfp4.hadamard_transform),
        figures.weight_gradients({"a": (0.1, 0.1)}, 4), figures.losses({"a": [1.0] * 20}, "t"),
        figures.ablations(), figures.after_training(),
        figures.block_sizes({"a": {16: 0.1}}),
        figures.states({"float32": [1.0], "nearest": [1.0], "stochastic": [1.0]}),
    ]  # fmt: skip
    assert all(len(str(alt_of(fig))) >= 40 for fig in drawn)
