"""Figures of chapter 02: their numbers, outlines and words, and how fast the sliders answer."""

from __future__ import annotations

import json

import numpy as np
import plotly.graph_objects as go
import pytest

from nemotron_lite import ledger
from nemotron_lite.config import NemotronConfig
from nemotron_lite.course.chapters.ch02_mamba2 import figures
from nemotron_lite.course.plotting import alt_of, theme
from nemotron_lite.course.plotting.widgets import BUDGET

T = 32
RANDOM = np.random.default_rng(0)
SCORES = RANDOM.normal(size=(T, T))
STEPS = RANDOM.uniform(0.3, 2.0, T)
_FADE = -0.1 * np.cumsum(STEPS)
DECAY = np.tril(np.exp(np.minimum(_FADE[:, None] - _FADE[None, :], 0)))
HEAD = (
    RANDOM.normal(size=(T, 3)),  # x
    STEPS,
    -0.1,
    RANDOM.normal(size=(T, 4)),  # B
    RANDOM.normal(size=(T, 4)),  # C
)
LITE = NemotronConfig.from_preset("lite")


def picture(fig: go.Figure, index: int = 0) -> np.ndarray:
    """A heatmap's values, blanks as nan."""
    return np.array(fig.data[index].z, dtype=float)


def rectangles(fig: go.Figure, colour: str) -> list[tuple[float, ...]]:
    return [(s.x0, s.x1, s.y0, s.y1) for s in fig.layout.shapes if s.line.color == colour]


def every_figure() -> dict[str, go.Figure]:
    matrix = DECAY * SCORES
    lengths = [128, 256, 512]
    return {
        "factors": figures.factors(DECAY, SCORES),
        "chunk_map": figures.chunk_map(matrix, 8, p=32, n=64),
        "step_chunks": figures.step_chunks(*HEAD, chunk=8)[1],
        "chunk_times": figures.chunk_times([8, 16], [0.2, 0.1]),
        "mixer_layout": figures.mixer_layout(LITE),
        "crossing": figures.crossing(lengths, {"attention": [1, 4, 16], "scan": [2, 4, 8]}, 256.0),
        "fingerprints": figures.fingerprints({"A": np.ones(9), "B": np.zeros(9)}, {"split": 4}),
        "losses": figures.losses({"theirs": [3.0, 2.5], "yours": [3.0, 2.5]}, every=10),
    }


@pytest.mark.parametrize("name", every_figure())
def test_every_figure_has_a_text_and_the_theme_and_is_json(name: str) -> None:
    fig = every_figure()[name]
    assert len(alt_of(fig) or "") >= 40
    assert fig.layout.template.layout.paper_bgcolor == theme.CARD
    assert "NaN" not in json.dumps(json.loads(fig.to_json()))


def test_factors_multiply_and_the_future_is_blank() -> None:
    fig = figures.factors(DECAY, SCORES)
    decay, scores, product = (picture(fig, i) for i in range(3))
    lower = np.tri(T, dtype=bool)
    np.testing.assert_allclose(product[lower], decay[lower] * scores[lower], rtol=1e-5)
    for values in (decay, scores, product):
        assert np.isnan(values[~lower]).all()
        assert not np.isnan(values[lower]).any()


def test_the_mask_has_a_colour_scale_of_its_own() -> None:
    mask, scores, matrix = figures.factors(DECAY, SCORES).data
    assert [mask.showscale, scores.showscale, matrix.showscale] == [True, False, True]
    assert (mask.zmin, mask.zmax) == (0, 1)
    assert mask.colorbar.orientation == "h"


@pytest.mark.parametrize("chunk", [1, 3, 8, 32])
def test_outlines_cover_the_lower_triangle_of_blocks_once(chunk: int) -> None:
    fig = figures.chunk_map(DECAY * SCORES, chunk, p=32, n=64)
    covered = np.zeros((T, T), dtype=int)
    for colour in (figures.INSIDE, figures.THROUGH):
        for x0, x1, y0, y1 in rectangles(fig, colour):
            covered[int(y0 + 0.5) : int(y1 + 0.5), int(x0 + 0.5) : int(x1 + 0.5)] += 1
    where = np.arange(T) // chunk
    np.testing.assert_array_equal(covered, where[:, None] >= where[None, :])
    assert len(rectangles(fig, figures.INSIDE)) == -(-T // chunk)


@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_multiply_adds_are_those_of_the_ledger(chunk: int) -> None:
    p, n, context = 32, 64, 4096
    config = LITE.replace(
        pattern="M",
        mamba_num_heads=1,
        n_groups=1,
        mamba_head_dim=p,
        ssm_state_size=n,
        mtp_pattern="",
        mtp_depths=0,
    )
    rows = ledger.flops(config, context=context, chunk=chunk, mode="prefill").rows
    scan = [row.each / 2 for row in rows if row.name.startswith("scan")]
    mine = [float(each[0]) for each in figures.multiply_adds([chunk], p, n).values()]
    np.testing.assert_allclose(mine, scan)


@pytest.mark.parametrize("t", [24, 29])
def test_multiply_adds_of_a_text_are_counted_token_by_token(t: int) -> None:
    p, n = 3, 5
    for q in (1, 4, 8, 24, 64):
        chunks = [range(first, min(first + q, t)) for first in range(0, t, q)]
        pairs = sum(len(chunk) * (len(chunk) + 1) // 2 for chunk in chunks)
        expected = [
            pairs * (n + p),
            (sum(map(len, chunks[:-1])) + sum(map(len, chunks[1:]))) * n * p,
            (len(chunks) - 1) * n * p,
        ]
        found = [float(each[0]) * t for each in figures.multiply_adds([q], p, n, t).values()]
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_one_chunk_for_the_whole_text_uses_no_state() -> None:
    view, still = figures.explore_chunks(STEPS, SCORES, p=32, n=64, chunk=T)
    bars = {bar.name: bar.y[-1] for bar in still.data if bar.type == "bar"}
    assert [bar > 0 for bar in bars.values()] == [True, False, False]
    assert f"1 block of {T} × {T}" in view.words.value
    assert "0 strips through the state" in view.words.value
    assert f"{bars['step 1, inside']:,.0f} multiply-adds" in view.words.value


@pytest.mark.timing
def test_the_stepper_shows_the_chunked_scan() -> None:
    x, dt, A, B, C = HEAD
    s = np.cumsum(dt * A)
    exact, states, state = [], [], np.zeros((3, 4))
    for token in range(T):
        state = np.exp(dt[token] * A) * state + dt[token] * np.outer(x[token], B[token])
        exact.append((state @ C[token])[0])
        states.append(state)
    view, _ = figures.step_chunks(*HEAD, chunk=12)  # chunks of 12, 12 and 8
    assert view.controls["step"].max == 8
    assert "nan" not in json.dumps(view.figure.to_plotly_json()["data"][0]["z"]).lower()
    for step, words in enumerate(
        ["Step 1, inside the chunk: ", "Step 4, from the state: it is still zero",
         "Steps 2 and 3, into the state: ", "Chunk 1, tokens 12 to 23",
         "dashed strip, 144 numbers", "0 to 23",
         "Chunk 2, tokens 24 to 31", "dashed strip, 192 numbers", "0 to 31"]
    ):  # fmt: skip
        view.controls["step"].value = step
        assert words in view.words.value
        assert view.seconds < BUDGET
        chunk, phase = divmod(step, 3)
        end = min(12 * (chunk + 1), T)
        read = 12 * chunk + (end - 12 * chunk) * (phase > 0)
        y = np.add(view.figure.data[2].y, view.figure.data[3].y)
        np.testing.assert_allclose(y[:read], exact[:read], rtol=1e-6, atol=1e-9)
        assert not y[end:].any()
        held = 12 * chunk if phase < 2 else end
        shown = np.array(view.figure.data[1].z, dtype=float)
        np.testing.assert_allclose(shown, states[held - 1] if held else 0 * state, atol=1e-4)
        dashed = [s for s in view.figure.layout.shapes if s.line.dash == "dash"]
        assert len(dashed) == (chunk > 0 and phase > 0)
    assert f"keeps {np.exp(s[-1] - s[23]):.2f} of itself" in view.words.value


@pytest.mark.timing
def test_sliders_move_blocks_colours_and_words_in_time() -> None:
    view, still = figures.explore_chunks(STEPS, SCORES, p=32, n=64, chunk=8)
    assert rectangles(view.figure, figures.INSIDE) == rectangles(still, figures.INSIDE)
    assert "4 blocks of 8 × 8" in view.words.value
    before = picture(view.figure)
    view.controls["chunk"].value = 16
    assert len(rectangles(view.figure, figures.INSIDE)) == 2
    assert "2 blocks of 16 × 16" in view.words.value
    assert view.seconds < BUDGET
    np.testing.assert_array_equal(picture(view.figure), before)
    view.controls["half_life"].value = 0.6
    assert np.nanmax(np.abs(picture(view.figure)[20:, :10])) < 1e-2
    assert view.seconds < BUDGET
    arrows = [a for a in view.figure.layout.annotations if a.name == "here"]
    assert [a.text for a in arrows] == ["q = 16"]
    assert "nan" not in json.dumps(view.figure.to_plotly_json()["data"][0]["z"]).lower()


def test_the_half_life_is_counted_in_mean_steps() -> None:
    _, still = figures.explore_chunks(np.ones(T), np.ones((T, T)), p=4, n=4, half_life=6.0)
    np.testing.assert_allclose(picture(still)[12, [12, 6, 0]], [1, 0.5, 0.25], rtol=1e-6)


@pytest.mark.parametrize("preset", ["lite", "super"])
def test_the_layout_is_to_scale_without_gaps(preset: str) -> None:
    config = NemotronConfig.from_preset(preset)
    fig = figures.mixer_layout(config)
    rows: dict[str, list[tuple[float, float]]] = {}
    for bar in fig.data:
        rows[bar.y[0]] = [(at, at + wide) for at, wide in zip(bar.base, bar.x, strict=True)]
    for parts in rows.values():
        assert all(a[1] == b[0] for a, b in zip(parts, parts[1:], strict=False))
    spans = {name: parts[-1][1] - parts[0][0] for name, parts in rows.items()}
    assert spans["in_proj"] == config.mamba_in_proj_size
    assert sum(w for name, w in spans.items() if name.startswith("conv")) == config.conv_dim
    assert spans["scan"] == config.mamba_inner_size
    assert spans["gate, then norm"] == 2 * config.mamba_inner_size
    assert len(rows["gate, then norm"]) == 1 + config.n_groups


def test_the_crossing_is_marked_where_it_is() -> None:
    fig = figures.crossing([128, 256], {"attention": [1, 4], "scan": [2, 2]}, 181.0)
    assert fig.layout.shapes[0].x0 == 181.0
    np.testing.assert_allclose(fig.data[0].y, [1000, 4000])
    assert not figures.crossing([128, 256], {"attention": [1, 4], "scan": [2, 2]}).layout.shapes


def test_fingerprints_draw_each_implementation_and_no_error_below_the_floor() -> None:
    errors = {name: np.linspace(0, 1, 10) for name in "ABC"}
    fig = figures.fingerprints(errors, {"split": 4}, floor=1e-6)
    assert [trace.name for trace in fig.data] == list("ABC")
    assert all(min(trace.y) == np.float32(1e-6) for trace in fig.data)
    assert len(fig.layout.shapes) == 3
    assert len(figures.fingerprints({"A": errors["A"]}, {}).data) == 1
    two = figures.fingerprints(errors, {"split": 4, "single": 6})
    heights = [a.y for a in two.layout.annotations if a.text in ("split", "single")]
    assert heights[1] - heights[0] >= 0.1, "the labels of narrow plots would overlap"


def test_losses_stand_at_the_middle_of_their_steps() -> None:
    fig = figures.losses({"theirs": [3.0, 2.5], "yours": [3.0, 2.5]}, every=10)
    np.testing.assert_allclose(fig.data[0].x, [5.5, 15.5])


def test_what_cannot_be_drawn_is_refused() -> None:
    for call, words in (
        (lambda: figures.factors(DECAY, SCORES[:5, :5]), "must agree"),
        (lambda: figures.chunk_map(np.ones((2, 3)), 1, p=4, n=4), "square"),
        (lambda: figures.chunk_map(DECAY, 0, p=4, n=4), "at least 1 token"),
        (lambda: figures.step_chunks(*HEAD, chunk=T), "two or more"),
        (lambda: figures.explore_chunks(STEPS, SCORES, p=4, n=4, chunk=7), "expected one of"),
        (lambda: figures.fingerprints({}, {}), "at least one implementation"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
