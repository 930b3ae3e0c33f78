"""Figures of chapter 00: their numbers are the ledger's, and the sliders answer in time."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pytest

from nemotron_lite import Cache, ledger
from nemotron_lite.config import PRESETS, SUPER_PATTERN, NemotronConfig
from nemotron_lite.course.chapters.ch00_the_blueprint import figures, lesson
from nemotron_lite.course.plotting import alt_of, theme
from nemotron_lite.course.plotting.widgets import BUDGET

SUPER = PRESETS["super"]
DENSE = NemotronConfig(pattern="M-M*-", vocab_size=64, hidden_size=32, n_groups=2)


@pytest.mark.parametrize("config", [SUPER, PRESETS["nano"], PRESETS["lite"], DENSE])
def test_shares_add_up_to_the_ledgers_totals(config: NemotronConfig) -> None:
    asked = figures.shares(config, 5000)
    assert tuple(asked) == figures.QUANTITIES
    count = ledger.parameters(config)
    expected = {
        "stored": count.backbone,
        "read": count.active_without_embedding,
        "arithmetic": ledger.flops(config, 5000, "decode").per_token,
        "cached": ledger.cache(config, 5000).total,
    }
    assert {q: sum(parts.values()) for q, parts in asked.items()} == pytest.approx(expected)
    absent = set(figures.LETTERS) - set(config.pattern)
    assert all(parts[letter] == 0 for parts in asked.values() for letter in absent)


def test_each_kind_is_charged_for_its_own() -> None:
    asked = figures.shares(SUPER, 1_048_576)
    kept = ledger.cache(SUPER, 1_048_576)
    assert asked["cached"]["*"] == kept.kv
    assert asked["cached"]["M"] == kept.conv + kept.ssm
    assert asked["cached"]["E"] == asked["cached"][figures.REST] == 0
    experts = sum(layer.total for layer in ledger.parameters(SUPER).layers if layer.kind == "moe")
    assert asked["stored"]["E"] == experts


def test_stanzas_are_the_pattern_with_breaks_after_attention() -> None:
    lines = figures.pattern_lines(SUPER_PATTERN)
    assert "".join(lines) == SUPER_PATTERN
    assert all(line.endswith("*") and line.count("*") == 1 for line in lines[:-1])
    assert "*" not in lines[-1]
    assert figures.pattern_lines("M*") == ["M*"]
    assert figures.pattern_lines("ME") == ["ME"]


def test_resized_at_supers_width_is_super_with_its_anchors_spread_evenly() -> None:
    found = figures.resized(4096, 8)
    assert found.replace(pattern=SUPER_PATTERN) == SUPER
    assert found.pattern.replace("*", "M") == SUPER_PATTERN.replace("*", "M")
    places = [i for i, letter in enumerate(found.pattern.replace("E", "")) if letter == "*"]
    assert set(np.diff(places)) == {figures.MIXING_PLACES // 8}


@pytest.mark.parametrize("anchors", range(figures.MIXING_PLACES + 1))
def test_resized_has_as_many_anchors_as_asked_for(anchors: int) -> None:
    pattern = figures.resized(2048, anchors).pattern
    assert (pattern.count("*"), pattern.count("E")) == (anchors, SUPER.pattern.count("E"))


@pytest.mark.parametrize("width", figures.WIDTHS)
def test_resized_keeps_supers_proportions(width: int) -> None:
    config = figures.resized(width, 8)
    for name in (
        "num_attention_heads", "mamba_num_heads", "moe_latent_size", "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ):  # fmt: skip
        assert getattr(config, name) * SUPER.hidden_size == getattr(SUPER, name) * width, name


@pytest.mark.parametrize(
    ("width", "anchors", "match"),
    [(1000, 8, "width=1000"), (0, 8, "width=0"), (4096, 49, "anchors=49"), (4096, -1, "-1")],
)
def test_resized_refuses_what_cannot_be(width: int, anchors: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        figures.resized(width, anchors)


def test_atlas_shows_every_layer_once_and_bars_of_a_hundred_percent() -> None:
    fig = figures.atlas(SUPER)
    tiles = fig.data[: len(figures.LETTERS)]
    placed = {
        (y, x): letter
        for trace in tiles
        for x, y, letter in zip(trace.x, trace.y, trace.text, strict=True)
    }
    lines = figures.pattern_lines(SUPER.pattern)
    assert placed == {(r, c): own for r, line in enumerate(lines) for c, own in enumerate(line)}
    bars = np.array([trace.x for trace in fig.data[len(figures.LETTERS) :]])
    np.testing.assert_allclose(bars.sum(0), 100)
    hover = fig.data[0].hovertext[0]
    assert f"stores {int(ledger.parameters(SUPER).layers[0].total):,}" in hover
    assert "MEMEMEM*, EMEMEMEM*" in (alt_of(fig) or "")


def test_atlas_keeps_one_kind_strong() -> None:
    fig = figures.atlas(SUPER, kind="*")
    colours = {trace.name[0]: trace.marker.color for trace in fig.data[: len(figures.LETTERS)]}
    assert colours["*"] == theme.KINDS["*"].strong
    assert colours["M"] == theme.KINDS["M"].pale
    for trace in fig.data:
        assert theme.contrast(trace.textfont.color, trace.marker.color) >= 4.5, trace.name
    with pytest.raises(ValueError, match="kind='X'"):
        figures.atlas(SUPER, kind="X")


@pytest.mark.timing
def test_atlas_widget_changes_with_each_control_and_in_time() -> None:
    view = figures.atlas_widget()
    fig = view.figure
    attention = [trace for trace in fig.data if trace.name == "*"][-1]
    before = attention.x[3]
    view.controls["context"].value = 65_536
    assert attention.x[3] > 70 > 50 > before
    assert "76% of it in attention" in view.words.value
    view.controls["kind"].value = "M"
    assert fig.data[0].marker.color == theme.KINDS["M"].strong
    assert attention.marker.color == theme.KINDS["*"].pale
    view.controls["model"].value = "Ultra"
    assert len(fig.data[0].x) == PRESETS["ultra"].pattern.count("M")
    view.controls["model"].value = "lite (yours)"
    assert len(fig.layout.yaxis.ticktext) == len(figures.pattern_lines(PRESETS["lite"].pattern))
    fastest = min(_again(view) for _ in range(3))
    assert fastest < BUDGET


def test_atlas_widget_ends_before_the_context_that_the_reader_predicts() -> None:
    slider = figures.atlas_widget().controls["context"]
    assert max(tokens for _, tokens in slider.options) == figures.ATLAS_CONTEXT < 1_048_576


@pytest.mark.timing
def test_ledger_widget_follows_the_ledger_and_in_time() -> None:
    view = figures.ledger_widget()
    for control, value in (("context", 65_536), ("width", 2048), ("anchors", 20)):
        view.controls[control].value = value
        assert "failed" not in view.words.value
    config = figures.resized(2048, 20)
    memory, work = view.figure.data[3], view.figure.data[7]
    assert memory.y == (ledger.cache(config, 65_536).total,)
    assert work.y == (ledger.flops(config, 65_536, "decode").per_token,)
    assert memory.x == work.x == (65_536,)
    assert figures.format_bytes(ledger.cache(config, 65_536).total) in view.words.value
    assert min(_again(view) for _ in range(3)) < BUDGET


def _again(view: figures.Explorer) -> float:
    view.refresh()
    return view.seconds


def test_curves_lie_between_no_attention_and_attention_everywhere_at_the_end() -> None:
    fig = figures.ledger_curves(anchors=8)
    for every, own, none in (fig.data[0:3], fig.data[4:7]):
        assert every.y[-1] > own.y[-1] > none.y[-1]
        assert every.y[0] < none.y[0]  # a short text is cheaper with attention, as the text says
        assert none.y[0] == none.y[-1]


TOY = lesson.TOY
STRONG = {look.strong for look in theme.KINDS.values()} | {theme.MUTED}
STEPS = len(figures.WALKED) * len(figures.STAGES)


def bytes_shown(fig: go.Figure) -> dict[str, float]:
    """Bytes in the right plot of the stepper: of M's block, and of all blocks of *."""
    state, *blocks = fig.data[1:]
    return {"M": 1024 * state.x[0], "*": 1024 * sum(block.x[0] for block in blocks)}


@pytest.mark.parametrize("tokens", range(1, 1 + len(figures.WALKED)))
def test_the_walk_keeps_what_a_cache_holds(tokens: int) -> None:
    last = len(figures.STAGES) * tokens - 1  # the head of that token
    shown = bytes_shown(figures.walk(TOY, last))
    cache = Cache.empty(TOY, 1, capacity=tokens)
    mamba, _, attention = cache.layers
    assert shown == {"M": mamba.nbytes, "*": attention.nbytes}


def test_the_walk_marks_one_box_and_adds_keys_and_values_in_attention_only() -> None:
    fig = figures.walk(TOY)
    before = 0.0
    for step in range(STEPS):
        words = figures.draw_walk(fig, TOY, step)
        stage = figures.STAGES[step % len(figures.STAGES)]
        boxes = zip(fig.data[0].text, fig.data[0].marker.color, strict=True)
        strong = [name for name, fill in boxes if fill in STRONG]
        assert len(strong) == 1
        assert strong[0].startswith({"head": "norm"}.get(stage, stage))
        now = bytes_shown(fig)["*"]
        assert (now > before) == (stage == "*")
        assert f"Token {1 + step // len(figures.STAGES)}, " in words
        before = now


@pytest.mark.timing
def test_the_stepper_walks_in_time() -> None:
    view = figures.walk_stepper(TOY)
    view.forward.click()
    assert "experts. Nothing is kept." in view.words.value
    view.controls["step"].value = STEPS - 1
    assert "Kept after 6 tokens" in view.words.value
    assert min(_again(view) for _ in range(3)) < BUDGET


def test_loss_curves_are_means_of_ten() -> None:
    assert figures.smoothed([4.0, 2.0, 0.0], width=2) == [4.0, 3.0, 1.0]
    losses = [float(n) for n in range(30)]
    fig = figures.loss_curves({"yours": losses, "theirs": losses}, **figures.EQUAL_CURVES)
    assert fig.data[0].y[-1] == pytest.approx(24.5)
    assert list(fig.data[0].y) == list(fig.data[1].y)
    assert list(fig.data[0].x) == list(range(1, 31))
    assert alt_of(fig) == figures.EQUAL_CURVES["alt"]


def test_score_bars_put_the_best_first_and_ours_strong() -> None:
    fig = figures.score_bars({"gzip": 2.2, "us": 1.9, "coin": 8.0}, ours=["us"])
    assert fig.data[0].y == ("us", "gzip", "coin")
    assert fig.data[0].marker.color[0] == theme.KINDS["M"].strong
    assert fig.data[0].marker.color[1] != fig.data[0].marker.color[0]
    assert "2.2" not in (alt_of(fig) or "")  # measured values stay out of what is compared


def test_memory_lines_keep_the_bytes_and_mark_the_axes_in_binary_units() -> None:
    contexts = [2**i for i in range(8, 21)]
    kept = [ledger.cache(SUPER, t).total for t in contexts]
    fig = figures.planner(contexts, [2 * n for n in kept], kept)
    assert list(fig.data[0].y) == [2 * n for n in kept]
    assert list(fig.data[1].y) == kept
    assert list(fig.layout.yaxis.ticktext) == [
        figures.format_bytes(n) for n in fig.layout.yaxis.tickvals
    ]
    assert len(fig.layout.yaxis.tickvals) >= 3
    assert list(fig.layout.xaxis.ticktext) == ["256", "1K", "4K", "16K", "64K", "256K", "1M"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (figures.format_count(120_668_707_840), "120.7 B"),
        (figures.format_count(1.2e13), "12 T"),
        (figures.format_count(999), "999"),
        (figures.format_bytes(8 * 2**30), "8 GiB"),
        (figures.format_bytes(170_229_760), "162.3 MiB"),
        (figures.format_bytes(12), "12 B"),
        (figures.format_tokens(1_048_576), "1M"),
        (figures.format_tokens(8192), "8K"),
        (figures.format_tokens(7), "7"),
    ],
)
def test_numbers_are_written_short(written: str, expected: str) -> None:
    assert written == expected
