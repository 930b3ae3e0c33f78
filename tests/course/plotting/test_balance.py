"""The heat map of the experts' load shows what the log has, and follows a run while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nemotron_lite.course import display
from nemotron_lite.course.plotting import LiveBalance, alt_of, balance, balance_map
from nemotron_lite.data import ConcatenatedDocuments, concatenate_documents
from nemotron_lite.model import Nemotron
from nemotron_lite.train import TrainConfig, train
from nemotron_lite.train.balance_history import BalanceHistory
from tests.course.conftest import Shown
from tests.train.conftest import TINY

CONFIG = TINY.replace(mtp_pattern="", mtp_depths=0)
ROUTER = "backbone.layers.1.mixer"
RECIPE = TrainConfig(steps=6, batch_size=2, seq_len=16)


@pytest.fixture(scope="module")
def text() -> ConcatenatedDocuments:
    random = np.random.default_rng(0)
    return ConcatenatedDocuments(*concatenate_documents([random.integers(1, 96, 2000)]))


def history(loads: list[list[int]]) -> BalanceHistory:
    fields = {"max_vio": 0.0, "entropy": 1.0, "unused": 0}
    records = [{"step": i, "routers": {"a": {"load": x, **fields}}} for i, x in enumerate(loads, 1)]
    return BalanceHistory.from_records(records)


def test_each_cell_is_the_load_over_the_mean() -> None:
    fig = balance_map(history([[4, 0], [1, 3], [2, 2]]), "a", last_step=10)
    (cells,) = fig.data
    assert cells.z.tolist() == [[2.0, 0.5, 1.0], [0.0, 1.5, 1.0]]
    assert list(cells.x) == [0.5, 1.5, 2.5, 3.5]  # the edges of the columns
    assert tuple(fig.layout.xaxis.range) == (0.5, 10.5)
    assert fig.layout.yaxis.range[0] > fig.layout.yaxis.range[1]  # expert 0 on top
    assert "each of the 2 experts of a" in str(alt_of(fig))
    with pytest.raises(ValueError, match="router='b'"):
        balance_map(history([[1, 1]]), "b")


def test_a_long_run_is_thinned() -> None:
    loads = [[i % 3, 1] for i in range(1, 1001)]
    (cells,) = balance_map(history(loads), "a").data
    assert cells.z.shape == (2, balance.MOST_COLUMNS)
    assert len(cells.x) == balance.MOST_COLUMNS + 1
    assert (cells.x[0], cells.x[-1]) == (0.5, 1000.5)
    assert cells.x[1] - cells.x[0] == cells.x[-1] - cells.x[-2] == 7
    np.testing.assert_allclose(cells.z.sum(0), 2, atol=2e-3)  # two experts, their mean is 1


def test_the_figure_follows_the_run(
    text: ConcatenatedDocuments, shown: Callable[..., Shown], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "INTERVAL", 0.0)
    figures: list[Any] = []
    real = display.show_updating

    def show_updating(figure: Any) -> Callable[[Any], None]:
        replace = real(figure)
        return lambda new: (figures.append(new), replace(new))[1]

    monkeypatch.setattr(balance, "show_updating", show_updating)
    watch = LiveBalance(CONFIG, layer=1, steps=6)
    run = lambda: train(Nemotron(CONFIG, seed=0), text, RECIPE, callbacks=[watch], progress=False)  # noqa: E731
    seen = shown(run)
    first, words = seen.bundles[:2]
    assert first["text/plain"] == display.alt_text(figures[-1])
    assert first["text/plain"] in words["text/html"]
    assert first[display.PLOTLY]["layout"]["xaxis"]["range"] == [0.5, 6.5]
    assert [figure.data[0].z.shape[1] for figure in figures] == [1, 2, 3, 4, 5, 6, 6]
    loads = [record["routers"][ROUTER]["load"] for record in seen.result.history]
    expected = np.array(loads).T / np.mean(loads[0])
    np.testing.assert_allclose(figures[-1].data[0].z, expected, atol=1e-3)


def test_the_figure_is_replaced_at_most_once_a_second(text: ConcatenatedDocuments) -> None:
    watch = LiveBalance(CONFIG, layer=1, steps=6)
    drawn: list[int] = []
    real = watch.draw

    def draw() -> None:
        drawn.append(len(watch.records))
        real()

    watch.draw = draw  # type: ignore[method-assign]
    train(Nemotron(CONFIG, seed=0), text, RECIPE, callbacks=[watch], progress=False)
    assert drawn[-1] == 6
    assert len(drawn) < 6


def test_a_model_without_the_router_is_refused(text: ConcatenatedDocuments) -> None:
    model = Nemotron(CONFIG.replace(pattern="M-*E"), seed=0)
    watch = LiveBalance(CONFIG, layer=1, steps=6)
    with pytest.raises(ValueError, match=r"no router 'backbone.layers.1.*of backbone.layers.3"):
        train(model, text, RECIPE, callbacks=[watch], progress=False)
    dense = Nemotron(CONFIG.replace(pattern="M-"), seed=0)
    with pytest.raises(ValueError, match="it has no mixture of experts"):
        train(dense, text, RECIPE, callbacks=[watch], progress=False)


def test_a_layer_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer=0 has no experts in the pattern ME.E: .* 1, 3"):
        LiveBalance(CONFIG, layer=0, steps=6)
    with pytest.raises(ValueError, match="layer=4"):
        LiveBalance(CONFIG, layer=4, steps=6)
    with pytest.raises(ValueError, match="no mixture of experts"):
        LiveBalance(CONFIG.replace(pattern="M-"), layer=1, steps=6)
