"""Callbacks see every event in order, may end a run, and never lose it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemotron_lite.data import ConcatenatedDocuments
from nemotron_lite.model import Nemotron
from nemotron_lite.train import Callback, TrainConfig, train

RECIPE: dict[str, Any] = dict(steps=4, batch_size=2, seq_len=24, save_every=2)


class Journal(Callback):
    """Writes down every call; may answer or raise at one of them."""

    def __init__(self, at: tuple[str, Any] = ("", 0), answer: Any = None) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.at, self.answer = at, answer

    def _call(self, name: str, value: Any) -> Any:
        self.calls.append((name, value))
        if (name, value) != self.at:
            return None
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def on_start(self, step: int) -> Any:
        return self._call("start", step)

    def on_step(self, record: dict[str, Any]) -> Any:
        return self._call("step", record["step"])

    def on_evaluation(self, record: dict[str, Any]) -> Any:
        return self._call("evaluation", record["step"])

    def on_save(self, path: Path) -> Any:
        return self._call("save", int(path.stem[-4:]))

    def on_end(self, step: int) -> Any:
        return self._call("end", step)


def go(model: Nemotron, text: ConcatenatedDocuments, *callbacks: Callback, **options: Any) -> Any:
    config = TrainConfig(**{**RECIPE, "eval_every": 3, "eval_batches": 1})
    return train(model, text, config, validation=text, callbacks=callbacks, progress=False,
                 **options)  # fmt: skip


def test_every_event_in_order(model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path) -> None:
    journal = Journal()
    result = go(model, text, journal, out_dir=tmp_path)
    assert journal.calls == [
        ("start", 0), ("step", 1), ("step", 2), ("save", 2), ("step", 3), ("evaluation", 3),
        ("step", 4), ("save", 4), ("end", 4),
    ]  # fmt: skip
    assert not result.stopped
    again = Journal()
    go(model, text, again, out_dir=tmp_path, resume=True)
    assert again.calls == [("start", 4), ("end", 4)]


EVENTS = [("start", 0), ("step", 1), ("step", 3), ("evaluation", 3), ("save", 2), ("step", 4)]


@pytest.mark.parametrize("at", EVENTS, ids=str)
def test_false_ends_the_run_and_other_answers_do_not(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path, at: tuple[str, int]
) -> None:
    for answer in (None, 0, True, "stop"):
        assert not go(model, text, Journal(at, answer)).stopped
    journal = Journal(at, False)
    result = go(model, text, journal, out_dir=tmp_path)
    assert result.step == at[1]
    assert result.stopped is (at[1] < 4)
    assert not result.interrupted
    assert journal.calls[-1] == ("end", at[1])
    if at[1]:
        assert result.checkpoint.name == f"step-{at[1]:08d}.pt"
    rest = go(model, text, out_dir=tmp_path, resume=bool(at[1]))
    assert rest.step == 4


def test_the_plain_function_may_end_the_run_too(
    model: Nemotron, text: ConcatenatedDocuments
) -> None:
    config = TrainConfig(**RECIPE)
    result = train(model, text, config, progress=False, on_step=lambda record: record["step"] < 2)
    assert result.step == 2
    assert result.stopped


@pytest.mark.parametrize("at", EVENTS, ids=str)
def test_an_error_is_raised_after_the_run_was_saved(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path, at: tuple[str, int]
) -> None:
    whole = train(
        Nemotron(model.config, seed=0), text, TrainConfig(**RECIPE), progress=False
    ).history
    with pytest.raises(KeyError, match="mine") as error:
        go(model, text, Journal(at, KeyError("mine")), out_dir=tmp_path)
    if not at[1]:
        return
    assert f"step-{at[1]:08d}.pt" in error.value.__notes__[0]
    rest = go(model, text, out_dir=tmp_path, resume=True)
    assert [r["loss"] for r in rest.history] == [r["loss"] for r in whole[at[1] :]]
