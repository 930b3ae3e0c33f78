"""Training runs in emulated NVFP4: they learn, and a resumed run continues bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_lite.data import ConcatenatedDocuments
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.emulated_layers import NVFP4Linear
from nemotron_lite.quantization.recipe import INGREDIENTS, RECIPES, Recipe
from nemotron_lite.train import ResumeError, TrainConfig, train

RUN = dict(
    steps=8,
    batch_size=2,
    seq_len=24,
    gradient_accumulation_steps=2,
    lr=1e-2,
    min_lr=1e-4,
    save_every=3,
)
NVFP4 = RECIPES["nvfp4"]


def losses(model: Nemotron, text: ConcatenatedDocuments, **changes: Any) -> list[float]:
    fresh = Nemotron(model.config, seed=0)
    config = TrainConfig(**{**RUN, **changes})
    return [record["loss"] for record in train(fresh, text, config, progress=False).history]


def test_nvfp4_learns_as_well_as_bf16(model: Nemotron, text: ConcatenatedDocuments) -> None:
    fresh = Nemotron(model.config, seed=0)
    config = TrainConfig(**{**RUN, "steps": 40, "precision": "nvfp4"})
    history = train(fresh, text, config, progress=False).history
    assert {p.dtype for p in fresh.parameters()} == {torch.float32}
    assert not any(isinstance(m, NVFP4Linear) for m in fresh.modules())
    exact = losses(model, text, steps=40, precision="bf16")
    found = [record["loss"] for record in history]
    assert found[0] != exact[0]
    # From 5.95 to 1.00 and 0.96 (means of the last five): a gap of 4.8 % for width 32 and 4 layers.
    assert abs(sum(found[-5:]) / sum(exact[-5:]) - 1) < 0.1
    assert sum(found[-5:]) / 5 < 0.2 * found[0]


def test_every_option_of_the_recipe_has_an_effect(
    model: Nemotron, text: ConcatenatedDocuments
) -> None:
    recipes = {name: NVFP4.without(name) for name in INGREDIENTS} | {"all": NVFP4}
    runs = {name: losses(model, text, precision=r, steps=3) for name, r in recipes.items()}
    assert runs["all"] == losses(model, text, precision="nvfp4", steps=3)
    assert len({tuple(run) for run in runs.values()}) == len(runs)
    # An option that changes only gradients cannot change the first loss.
    first = {name: run[0] for name, run in runs.items()}
    assert first["stochastic"] == first["hadamard"] == first["all"]
    assert first["square"] != first["all"] != first["tail"]
    with pytest.raises(ValueError, match="'salt': expected one of stochastic"):
        NVFP4.without("salt")


class KilledError(Exception):
    """Simulates a process that is killed between two updates."""


@pytest.mark.parametrize("which", ["nvfp4", NVFP4.without("tail")], ids=lambda w: str(w)[:5])
def test_a_killed_run_resumes_bit_for_bit(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path, which: str | Recipe
) -> None:
    whole = losses(model, text, precision=which)

    def kill(record: dict[str, Any]) -> None:
        if record["step"] == 5:
            raise KilledError

    config = TrainConfig(**RUN, precision=which)
    first = Nemotron(model.config, seed=0)
    with pytest.raises(KilledError):
        train(first, text, config, out_dir=tmp_path, progress=False, on_step=kill)
    assert not any(isinstance(m, NVFP4Linear) for m in first.modules())
    other = Nemotron(model.config, seed=5)
    torch.manual_seed(99)
    changed = replace(config, precision="bf16")
    with pytest.raises(ResumeError, match=r"precision .* bf16"):
        train(other, text, changed, out_dir=tmp_path, resume=True, progress=False)
    result = train(other, text, config, out_dir=tmp_path, resume=True, progress=False)
    done = result.history[0]["step"] - 1  # the error in `on_step` was raised after a save
    assert done == 5
    assert [record["loss"] for record in result.history] == whole[done:]
