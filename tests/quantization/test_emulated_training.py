"""Recipes as data and at work: what runs in what, and runs in NVFP4 that learn and resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nemotron_lite.config import PRESETS
from nemotron_lite.data import ConcatenatedDocuments
from nemotron_lite.layers import Experts, Router
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.emulated_layers import MXFP8Linear, NVFP4Experts, NVFP4Linear
from nemotron_lite.quantization.emulated_training import Arithmetic
from nemotron_lite.quantization.recipe import (
    INGREDIENTS,
    RECIPES,
    GemmRecipe,
    Operand,
    Recipe,
    placements,
)
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


@pytest.mark.parametrize("preset", PRESETS)
def test_the_map_has_every_matrix_once(preset: str) -> None:
    config = PRESETS[preset]
    with torch.device("meta"):
        model = Nemotron(config)
    found = placements(config, "nvfp4")
    expected = {
        name: sum(p.numel() for p in module.parameters(recurse=False))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | Experts | Router)
    }
    assert {place.path: place.parameters for place in found} == expected
    assert len(found) == len(expected)


def test_super_is_placed_as_table_3_says() -> None:
    found = {place.path: place for place in placements(PRESETS["super"], "nvfp4")}
    formats = {
        path: place.format for path, place in found.items() if not path.startswith("mtp.layers.1")
    }
    expected = {
        "backbone.embeddings": "bf16",
        "backbone.layers.0.mixer.in_proj": "nvfp4",
        "backbone.layers.0.mixer.out_proj": "mxfp8",
        "backbone.layers.1.mixer.gate": "fp32",
        "backbone.layers.1.mixer.fc1_latent_proj": "bf16",
        "backbone.layers.1.mixer.fc2_latent_proj": "bf16",
        "backbone.layers.1.mixer.experts": "nvfp4",
        "backbone.layers.1.mixer.shared_experts.up_proj": "nvfp4",
        "backbone.layers.7.mixer.q_proj": "bf16",
        "backbone.layers.7.mixer.o_proj": "bf16",
        "backbone.layers.74.mixer.experts": "nvfp4",  # 13 of 88 layers are the tail
        "backbone.layers.75.mixer.in_proj": "bf16",
        "backbone.layers.87.mixer.experts": "bf16",
        "backbone.layers.87.mixer.gate": "fp32",
        "lm_head": "bf16",
        "mtp.layers.0.eh_proj": "bf16",
    }
    assert {path: formats[path] for path in expected} == expected
    assert {p.format for p in found.values() if p.path.startswith("mtp")} == {"bf16", "fp32"}
    assert NVFP4.tail_layers(PRESETS["ultra"].num_layers) == 16  # as its report says
    for name in ("bf16", "fp32"):
        chosen = placements(PRESETS["super"], name)
        assert {p.format for p in chosen if p.role != "router"} == {name}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(default="fp6"), "'mlp' in 'fp6'"),
        (dict(others=(("nose", "bf16"),)), "'nose' in 'bf16'"),
        (dict(others=(*NVFP4.others, ("router", "nvfp4"))), "router in nvfp4 is not built"),
        (dict(others=()), "embedding in nvfp4 is not built"),
        (dict(others=(*NVFP4.others, ("experts", "mxfp8"))), "experts in mxfp8 is not built"),
        (dict(tail=1.5), "tail=1.5"),
    ],
)
def test_recipes_that_cannot_be_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(NVFP4, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(gradient_along_tokens=Operand(stochastic=True)), "both inputs of dW"),
        (dict(gradient=Operand(hadamard=True)), "only the inputs of dW are turned"),
        (dict(weight=Operand("16x16", stochastic=True)), "weights are rounded to nearest"),
        (dict(activation=Operand("16x16")), "blocks of 1x16"),
        (dict(weight=Operand("4x4")), "weight blocks of '4x4'"),
    ],
)
def test_gemm_recipes_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GemmRecipe(**changes)


def test_modules_are_swapped_and_put_back(model: Nemotron) -> None:
    before = dict(model.named_modules())
    names, parameters = list(model.state_dict()), list(model.parameters())
    with Arithmetic(model, "nvfp4") as arithmetic:
        found = {
            path: type(module).__name__
            for path, module in model.named_modules()
            if isinstance(module, NVFP4Linear | NVFP4Experts | MXFP8Linear)
        }
        assert found == {
            "backbone.layers.0.mixer.in_proj": "NVFP4Linear",
            "backbone.layers.0.mixer.out_proj": "MXFP8Linear",
            "backbone.layers.1.mixer.experts": "NVFP4Experts",
            "backbone.layers.1.mixer.shared_experts.up_proj": "NVFP4Linear",
            "backbone.layers.1.mixer.shared_experts.down_proj": "NVFP4Linear",
        }  # attention (2) and the last layer (3, the tail) stay
        assert list(model.state_dict()) == names
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        with pytest.raises(RuntimeError, match="inside an `Arithmetic` already"):
            Arithmetic(model, "bf16").__enter__()
        assert arithmetic.products().fast_dtype == torch.bfloat16
    with pytest.raises(KeyError), Arithmetic(model, "nvfp4"):
        raise KeyError
    assert dict(model.named_modules()) == before


def losses(model: Nemotron, text: ConcatenatedDocuments, **changes: Any) -> list[float]:
    fresh = Nemotron(model.config, seed=0)
    config = TrainConfig(**{**RUN, **changes})
    return [record["loss"] for record in train(fresh, text, config, progress=False).history]


def test_nvfp4_learns_as_bf16_does(model: Nemotron, text: ConcatenatedDocuments) -> None:
    fresh = Nemotron(model.config, seed=0)
    config = TrainConfig(**{**RUN, "steps": 40, "precision": "nvfp4"})
    history = train(fresh, text, config, progress=False).history
    assert {p.dtype for p in fresh.parameters()} == {torch.float32}
    assert not any(isinstance(m, NVFP4Linear) for m in fresh.modules())
    exact = losses(model, text, steps=40, precision="bf16")
    found = [record["loss"] for record in history]
    assert found[0] != exact[0]
    # From 5.95 to 1.00 and 0.96 (the mean of the last five): 4.8 % on a model 32 wide, four layers.
    assert abs(sum(found[-5:]) / sum(exact[-5:]) - 1) < 0.1
    assert sum(found[-5:]) / 5 < 0.2 * found[0]


def test_every_ingredient_makes_a_difference(model: Nemotron, text: ConcatenatedDocuments) -> None:
    recipes = {name: NVFP4.without(name) for name in INGREDIENTS} | {"all": NVFP4}
    runs = {name: losses(model, text, precision=r, steps=3) for name, r in recipes.items()}
    assert runs["all"] == losses(model, text, precision="nvfp4", steps=3)
    assert len({tuple(run) for run in runs.values()}) == len(runs)
    # What acts on gradients only cannot change the first loss.
    first = {name: run[0] for name, run in runs.items()}
    assert first["stochastic"] == first["hadamard"] == first["all"]
    assert first["square"] != first["all"] != first["tail"]
    with pytest.raises(ValueError, match="'salt': expected one of stochastic"):
        NVFP4.without("salt")


def test_the_seed_throws_other_dice(model: Nemotron, text: ConcatenatedDocuments) -> None:
    """The same batch under other dice: the first loss agrees, the gradients do not."""
    batch = text.batch(0, batch_size=2, seq_len=24, seed=0)
    found = []
    for seed, micro_batch in ((0, 0), (0, 0), (1, 0), (0, 1)):
        model.zero_grad()
        with Arithmetic(model, "nvfp4", seed) as arithmetic, arithmetic.products():
            arithmetic.at(micro_batch)
            loss = model(batch.tokens, seq_idx=batch.seq_idx).logits.square().mean()
            loss.backward()
        found.append((loss.item(), model.backbone.layers[0].mixer.in_proj.weight.grad.clone()))
    assert len({loss for loss, _ in found}) == 1
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], found[2][1])
    assert not torch.equal(found[0][1], found[3][1])


class PulledPlugError(Exception):
    """Stands for a process that dies between two updates."""


@pytest.mark.parametrize("which", ["nvfp4", NVFP4.without("tail")], ids=lambda w: str(w)[:5])
def test_a_killed_run_goes_on_bit_for_bit(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path, which: str | Recipe
) -> None:
    whole = losses(model, text, precision=which)

    def pull_the_plug(record: dict[str, Any]) -> None:
        if record["step"] == 5:
            raise PulledPlugError

    config = TrainConfig(**RUN, precision=which)
    first = Nemotron(model.config, seed=0)
    with pytest.raises(PulledPlugError):
        train(first, text, config, out_dir=tmp_path, progress=False, on_step=pull_the_plug)
    assert not any(isinstance(m, NVFP4Linear) for m in first.modules())
    other = Nemotron(model.config, seed=5)
    torch.manual_seed(99)
    changed = replace(config, precision="bf16")
    with pytest.raises(ResumeError, match=r"precision was .* and is 'bf16' now"):
        train(other, text, changed, out_dir=tmp_path, resume=True, progress=False)
    result = train(other, text, config, out_dir=tmp_path, resume=True, progress=False)
    assert [record["loss"] for record in result.history] == whole[3:]
