"""What the theme promises is computed: contrast, signs beside colours, colours for every eye."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from nemotron_lite.course import session
from nemotron_lite.course.plotting import theme
from nemotron_lite.course.plotting.figure import _font_sizes

TEXT, GRAPHIC = 4.5, 3.0  # WCAG 2.2, criteria 1.4.3 and 1.4.11

# What the three kinds of colour-blind eyes see, in linear RGB (Machado, Oliveira, Fernandes 2009,
# table for severity 1.0).
EYES = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}  # fmt: skip


def linear(colour: str) -> np.ndarray:
    """Linear RGB, 0 to 1."""
    c = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB under D65: equal distances look about equally different."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.clip(np.array(to_xyz) @ rgb, 0, None) / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def nearest(colours: list[str], eye: list[list[float]]) -> float:
    """The smallest difference between two of the colours, as that eye sees them."""
    seen = [lab(np.clip(np.array(eye) @ linear(c), 0, 1)) for c in colours]
    return min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2))


def test_contrast_is_that_of_wcag() -> None:
    assert theme.contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert theme.contrast("#FFFFFF", "#767676") == pytest.approx(4.54, abs=0.01)
    assert theme.contrast("#777777", "#FFFFFF") < TEXT < theme.contrast("#767676", "#FFFFFF")


@pytest.mark.parametrize("ground", [theme.CARD, theme.PLOT])
def test_text_and_lines_stand_out_from_the_card(ground: str) -> None:
    for ink in (theme.INK, theme.MUTED):
        assert theme.contrast(ink, ground) >= TEXT
    for series in theme.SERIES:
        assert theme.contrast(series.colour, ground) >= GRAPHIC, series.name
    for kind in theme.KINDS.values():
        assert theme.contrast(kind.strong, ground) >= GRAPHIC, kind.name


def test_in_the_dark_theme_too() -> None:
    css = session.STYLE.read_text()
    assert "filter: invert(0.93) hue-rotate(180deg) saturate(1.4);" in css, "what is computed here"
    page, dark = "#111111", theme.in_the_dark  # the page of JupyterLab's dark theme
    assert theme.contrast(dark(theme.PLOT), page) < 1.2, "no slab on the page"
    for ground in (theme.CARD, theme.PLOT):
        for ink in (theme.INK, theme.MUTED):
            assert theme.contrast(dark(ink), dark(ground)) >= TEXT
        for mark in (*theme.SERIES, *theme.KINDS.values()):
            colour = mark.colour if isinstance(mark, theme.Series) else mark.strong
            assert theme.contrast(dark(colour), dark(ground)) >= GRAPHIC, mark.name
    for kind in theme.KINDS.values():
        for fill in (kind.pale, kind.strong):
            assert theme.contrast(dark(theme.text_on(fill)), dark(fill)) >= TEXT, (kind.name, fill)
    lights = [theme.luminance(dark(colour)) for _, colour in theme.SEQUENTIAL]
    assert lights == sorted(lights)
    sides = [theme.luminance(dark(colour)) for _, colour in theme.DIVERGING]
    assert sides[2] == min(sides)


@pytest.mark.parametrize(
    ("light", "dark"),
    [("#FFFFFF", "#121212"), ("#000000", "#EDEDED"), ("#0072B2", "#2AB4FF")],
)
def test_what_the_dark_theme_makes_of_a_colour(light: str, dark: str) -> None:
    assert theme.in_the_dark(light) == dark


@pytest.mark.parametrize("eye", EYES)
def test_in_the_dark_theme_the_colours_differ_too(eye: str) -> None:
    assert nearest([theme.in_the_dark(s.colour) for s in theme.SERIES[:4]], EYES[eye]) > 10


def test_the_pale_colours_would_not() -> None:
    """Why lines do not simply take the palette."""
    for name in ("orange", "sky", "yellow"):
        assert theme.contrast(theme.PALETTE[name], theme.CARD) < GRAPHIC


def test_letters_can_be_read_on_every_block() -> None:
    for kind in theme.KINDS.values():
        for fill in (kind.pale, kind.strong):
            assert theme.contrast(theme.text_on(fill), fill) >= TEXT, (kind.name, fill)
        assert theme.contrast(kind.strong, kind.pale) >= GRAPHIC, "the outline on the pale block"


def test_no_two_series_share_a_sign() -> None:
    for field in ("name", "colour", "dash", "marker"):
        signs = [getattr(series, field) for series in theme.SERIES]
        assert len(set(signs)) == len(signs), field


@pytest.mark.parametrize("eye", EYES)
def test_the_first_four_colours_differ_for_every_eye(eye: str) -> None:
    """A difference of 10 in CIELAB is seen at a glance; 2.3 is just noticeable."""
    assert nearest([s.colour for s in theme.SERIES[:4]], EYES[eye]) > 10
    assert nearest(["#D62728", "#2CA02C"], EYES["deuteranopia"]) < 25  # plotly's red and green


def test_scales_go_from_light_to_dark_and_from_side_to_side() -> None:
    lights = [theme.luminance(colour) for _, colour in theme.SEQUENTIAL]
    assert lights == sorted(lights, reverse=True)
    sides = [theme.luminance(colour) for _, colour in theme.DIVERGING]
    assert sides[2] == max(sides) == 1.0


def test_no_type_of_the_theme_is_small() -> None:
    empty = go.Figure(layout=theme.template.layout)
    sizes = [size for _, size in _font_sizes(empty)]
    assert len(sizes) >= 5
    assert min(sizes) >= theme.SMALLEST


def test_the_template_hands_out_signs_in_order() -> None:
    given = [(t.line.color, t.line.dash, t.marker.symbol) for t in theme.template.data.scatter]
    assert given == [(s.colour, s.dash, s.marker) for s in theme.SERIES]
    assert list(theme.template.layout.colorway) == [s.colour for s in theme.SERIES]


def test_use_makes_it_the_look_of_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pio.templates, "default", "plotly")
    theme.use()
    assert go.Figure().layout.template.layout.paper_bgcolor == theme.CARD
    assert len(go.Figure().to_json()) < 4000, "the theme travels with every figure: keep it small"
