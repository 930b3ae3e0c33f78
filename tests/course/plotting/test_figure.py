"""A figure has its words and can be read, and the shared plots draw what they were given."""

from __future__ import annotations

import json

import numpy as np
import plotly.graph_objects as go
import pytest

from nemotron_lite.course.plotting import alt_of, described, lines, matrix, theme

WORDS = "Two lines over time that start together and part after the first change of direction."


def test_the_text_is_stored_in_the_figure() -> None:
    fig = described(go.Figure(go.Scatter(y=[1, 2])), f"  {WORDS}\n   ")
    assert alt_of(fig) == WORDS
    assert alt_of(json.loads(fig.to_json())) == WORDS
    assert alt_of(go.Figure(fig)) == WORDS
    assert fig.layout.template.layout.paper_bgcolor == theme.CARD


def test_other_notes_of_the_figure_stay() -> None:
    fig = go.Figure(layout=dict(meta={"source": "a run"}))
    assert described(fig, WORDS).layout.meta == {"source": "a run", "alt": WORDS}


@pytest.mark.parametrize("figure", [go.Figure(), {"data": []}, {"layout": {"meta": ["x"]}}])
def test_a_figure_without_text_has_none(figure: go.Figure | dict) -> None:
    assert alt_of(figure) is None


@pytest.mark.parametrize(
    ("fig", "alt", "message"),
    [
        (go.Figure(), "A plot of the loss.", "has 19 characters"),
        (go.Figure(layout=dict(title_text=WORDS)), WORDS, "equals the title"),
        (go.Figure(layout=dict(xaxis_tickfont_size=9)), WORDS, "xaxis.tickfont.size=9"),
        (go.Figure(go.Bar(y=[1], textfont_size=[14, 8])), WORDS, "textfont.size=8"),
        (
            go.Figure(layout=dict(annotations=[dict(text="a", font_size=10)])),
            WORDS,
            "annotations.0.font.size=10",
        ),
    ],
)
def test_a_figure_that_cannot_be_read_is_refused(fig: go.Figure, alt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        described(fig, alt)


def test_lines_draws_each_series_over_x() -> None:
    series = {"naive": [1.0, 2.0, 4.0], "fast": [1.0, float("nan"), 1.5]}
    fig = lines(
        [16, 32, 64], series, title="Time", x_title="tokens", y_title="ms", alt=WORDS, log_x=True
    )
    assert [trace.name for trace in fig.data] == ["naive", "fast"]
    np.testing.assert_array_equal(fig.data[0].x, [16, 32, 64])
    np.testing.assert_array_equal(fig.data[1].y, series["fast"])
    assert fig.layout.xaxis.type == "log"
    assert fig.layout.yaxis.title.text == "ms"
    assert all(trace.mode == "lines+markers" for trace in fig.data)


def test_lines_refuses_what_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match=r"line 'b' has shape \(1,\), x has \(2,\)"):
        lines([1, 2], {"a": [1, 2], "b": [1]}, title="t", x_title="x", y_title="y", alt=WORDS)
    many = {str(i): [1, 2] for i in range(7)}
    with pytest.raises(ValueError, match="7 lines; at most 6"):
        lines([1, 2], many, title="t", x_title="x", y_title="y", alt=WORDS)


def test_matrix_shows_rows_from_the_top_and_zero_in_the_middle() -> None:
    values = np.array([[0.0, -4.0], [np.nan, 1.0]])
    fig = matrix(values, title="L", alt=WORDS, diverging=True, numbers=True)
    (trace,) = fig.data
    np.testing.assert_array_equal(trace.z, values)
    assert (trace.zmin, trace.zmax) == (-4.0, 4.0)
    assert fig.layout.yaxis.autorange == "reversed"
    assert trace.texttemplate == "%{z:.2f}"
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        matrix([1, 2, 3], title="L", alt=WORDS)
