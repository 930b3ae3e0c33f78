"""The map shows the pattern that the config has, in order, and fills what it was asked to fill."""

from __future__ import annotations

import plotly.graph_objects as go
import pytest

from nemotron_lite import NemotronConfig
from nemotron_lite.config import PRESETS
from nemotron_lite.course.plotting import alt_of, model_map, theme


def blocks(fig: go.Figure) -> list[tuple[float, float, str, str]]:
    """Row, column, letter and fill of every block, in reading order."""
    found = []
    for trace in fig.data:
        for x, base, letter, fill in zip(
            trace.x, trace.base, trace.text, trace.marker.color, strict=True
        ):
            found.append((round(base + 0.38), x, letter, fill))
    return sorted(found)


def letters(fig: go.Figure) -> str:
    return "".join(letter for _, _, letter, _ in blocks(fig))


@pytest.mark.parametrize("preset", PRESETS)
def test_read_in_order_the_blocks_are_the_pattern(preset: str) -> None:
    config = NemotronConfig.from_preset(preset)
    fig = model_map(config)
    assert letters(fig) == config.pattern + config.mtp_pattern
    assert len({(row, column) for row, column, _, _ in blocks(fig)}) == len(blocks(fig))
    assert max(column for _, column, _, _ in blocks(fig)) < 24
    assert config.pattern in alt_of(fig)


def test_only_what_was_asked_for_is_filled() -> None:
    config = NemotronConfig.from_preset("super")
    strong = {kind.strong for kind in theme.KINDS.values()}

    def filled(**how: object) -> str:
        fig = model_map(config, **how)
        return "".join(letter for _, _, letter, fill in blocks(fig) if fill in strong)

    assert filled() == ""
    assert filled(highlight="*") == "*" * 8
    assert sorted(filled(highlight="M*")) == ["*"] * 8 + ["M"] * 40
    assert filled(highlight="MTP") == "*E"
    assert filled(highlight=[0, 7]) == "M*"


def test_the_words_say_what_is_filled() -> None:
    config = NemotronConfig.from_preset("super")
    assert "40 Mamba-2, 40 experts, 8 attention" in alt_of(model_map(config))
    assert alt_of(model_map(config, "*")).endswith("Filled strongly: the attention layers.")
    assert alt_of(model_map(config, "MTP")).endswith("Filled strongly: the MTP module.")
    assert alt_of(model_map(config, [7, 0])).endswith("Filled strongly: layers 0, 7.")


def test_a_block_tells_on_hover_what_the_ledger_counts() -> None:
    config = NemotronConfig.from_preset("super")
    (attention,) = [t for t in model_map(config).data if t.name.startswith("*  attention")]
    assert attention.hovertext[0] == (
        "layer 7 of 88: attention<br>35,655,680 parameters, 35,655,680 read per token"
    )


@pytest.mark.parametrize(
    ("preset", "highlight", "message"),
    [
        ("super", "X", r"names \['X'\]"),
        ("super", "-", r"names \['-'\]"),
        ("super", "", "highlight=''"),
        ("super", [3, 88], "has layer 88; this model has 0 to 87"),
        ("nano", "MTP", "no MTP module"),
    ],
)
def test_what_the_model_does_not_have_is_refused(
    preset: str, highlight: str | list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model_map(NemotronConfig.from_preset(preset), highlight)
