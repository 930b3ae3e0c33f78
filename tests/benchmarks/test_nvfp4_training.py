"""The benchmark of training in NVFP4: what it keeps, what it counts, and what its record says."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import record
from benchmarks.model import nvfp4_training as bench
from nemotron_lite import Nemotron
from nemotron_lite.quantization.recipe import RECIPES
from tests.train.conftest import TINY

TRIAL = replace(
    bench.SCALES["quick"],
    config=TINY.replace(mtp_pattern="", mtp_depths=0),
    variants={name: RECIPES[name] for name in ("bf16", "nvfp4")},
)


class Text:
    """Stands for a prepared corpus: the runs below are not made."""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Runs that were made; each is an invention of its variant and seed."""
    made: list[tuple[str, int]] = []

    def one_run(scale: bench.Scale, variant: str, seed: int, data: Any) -> dict[str, Any]:
        made.append((variant, seed))
        nats = 2.0 + seed + (0.1 * (seed + 1) if variant == "nvfp4" else 0.0)
        fields = ("train_nats", "held_out_nats", "held_out_nats_bf16_products")
        zeros = {"backbone.layers.0.mixer.in_proj.weight": {"zero": 0.25}}
        return {
            "variant": variant, "seed": seed, **dict.fromkeys(fields, nats),
            "curve": [nats], "zeros": zeros, "seconds": 1.0,
        }  # fmt: skip

    monkeypatch.setattr(bench, "one_run", one_run)
    monkeypatch.setattr(bench, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(bench, "prepare", lambda **_: Text())
    monkeypatch.setattr(record, "RECORDS", tmp_path / "benchmarks" / "records")
    monkeypatch.setitem(bench.SCALES, "trial", TRIAL)
    return made


def test_what_is_finished_is_kept_and_not_repeated(made, monkeypatch):
    bench.measure_runs("trial", minutes=0.0)
    assert made == []  # no time, no run
    assert not list(record.RECORDS.glob("*"))
    bench.measure_runs("trial", minutes=1.0)
    assert made == [("bf16", 0), ("nvfp4", 0), ("bf16", 1), ("nvfp4", 1)]
    written = json.loads((record.RECORDS / "nvfp4_training_trial.json").read_text())
    gap = written["variants"]["nvfp4"]["held_out_nats_gap_percent"]
    # Each seed against its own BF16 run: 0.1 of 2 and 0.2 of 3.
    assert gap["each"] == pytest.approx([5.0, 20 / 3])
    assert (gap["n"], gap["median"]) == (2, pytest.approx(35 / 6))
    assert written["variants"]["bf16"]["seeds"] == [0, 1]
    assert "held_out_nats_gap_percent" not in written["variants"]["bf16"]
    assert written["scale"]["tokens"] == TRIAL.steps * TRIAL.batch_size * TRIAL.length
    bench.measure_runs("trial", minutes=1.0)
    assert len(made) == 4
    # Another recipe under the same name, or more updates, is another run.
    monkeypatch.setitem(bench.SCALES, "trial", replace(TRIAL, steps=TRIAL.steps + 1))
    bench.measure_runs("trial", minutes=1.0)
    assert len(made) == 8


def test_a_trial_leaves_nothing_behind(made, tmp_path):
    found = bench.measure_runs("trial", minutes=1.0, record=False)
    assert len(made) == 4
    assert found["variants"]["nvfp4"]["seeds"] == [0, 1]
    assert list(tmp_path.iterdir()) == []


def test_zeros_are_counted_where_tokens_came():
    model = Nemotron(TRIAL.config, seed=0)
    zeros = bench.Zeros(model)
    experts = model.backbone.layers[1].mixer.experts
    shape = experts.up_proj.shape

    def pull() -> None:
        model.zero_grad()
        slope = torch.ones(shape)
        slope[3] = 0  # an expert without tokens
        slope[0, 0] = 0  # a hidden unit without gradient
        (experts.up_proj * slope).sum().backward()

    pull()
    assert zeros.shares() == {}  # not counting yet
    zeros.counting = True
    pull()
    name = "backbone.layers.1.mixer.experts.up_proj"
    units = (shape[0] - 1) * shape[1]
    assert zeros.shares() == {name: {"zero": 1 / units, "unreached_experts": 1 / shape[0]}}


def test_variants_are_what_they_are_called():
    small = bench.SCALES["small"].variants
    assert list(small)[:3] == ["bf16", "nvfp4", "fp32"]
    recipes = {name: bench.SCALES["small"].recipe(name, 1) for name in small}
    assert len({repr(recipe.precision) for recipe in recipes.values()}) == 7
    assert {repr(replace(recipe, precision="bf16")) for recipe in recipes.values()} == {
        repr(replace(recipes["bf16"], precision="bf16"))
    }
    assert small["nvfp4 without tail"].tail == 0
    assert small["nvfp4 without square"].gemm.weight.block == "1x16"


def test_a_run_is_measured_and_steps_are_timed(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for source in Path(sysconfig.get_path("stdlib"), "asyncio").glob("*.py"):
        (text / source.name).write_bytes(source.read_bytes())
    scale = replace(TRIAL, config=TRIAL.config.replace(vocab_size=300), steps=3)
    data = bench.prepare(vocab_size=300, held_out_bytes=2_000, root=text, cache=tmp_path)
    run = bench.one_run(scale, "nvfp4", 0, data)
    assert run["held_out_nats"] != run["held_out_nats_bf16_products"]
    assert abs(run["held_out_nats"] / run["held_out_nats_bf16_products"] - 1) < 0.05
    assert len(run["curve"]) == 3
    assert len(run["zeros"]) > 5
    assert all(0 <= share["zero"] <= 1 for share in run["zeros"].values())
    again = bench.one_run(scale, "nvfp4", 0, data)
    assert {**again, "seconds": 0} == {**run, "seconds": 0}
    (entry,) = bench.step_times(scale.config, data, [(1, 32)], rounds=2)
    assert entry["times_bf16"]["n"] == 2
    assert set(entry["seconds"]) == {"bf16", "nvfp4", "fp32"}
