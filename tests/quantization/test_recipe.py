"""Precision recipes: which matrix of which model runs in which format, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from nemotron_lite.config import PRESETS
from nemotron_lite.layers import Experts, Router
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.recipe import (
    RECIPES,
    GemmRecipe,
    Operand,
    module_formats,
)

NVFP4 = RECIPES["nvfp4"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_matrix_has_one_format(preset: str) -> None:
    config = PRESETS[preset]
    with torch.device("meta"):
        model = Nemotron(config)
    found = module_formats(config, "nvfp4")
    expected = {
        name: sum(p.numel() for p in module.parameters(recurse=False))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | Experts | Router)
    }
    assert {entry.path: entry.parameters for entry in found} == expected
    assert len(found) == len(expected)


def test_super_has_the_formats_of_table_3() -> None:
    found = {entry.path: entry for entry in module_formats(PRESETS["super"], "nvfp4")}
    formats = {
        path: entry.format for path, entry in found.items() if not path.startswith("mtp.layers.1")
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
        chosen = module_formats(PRESETS["super"], name)
        assert {p.format for p in chosen if p.role != "router"} == {name}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(default="fp6"), "'mlp' in 'fp6'"),
        (dict(overrides=(("nose", "bf16"),)), "'nose' in 'bf16'"),
        (
            dict(overrides=(*NVFP4.overrides, ("router", "nvfp4"))),
            "router in nvfp4 is not implemented",
        ),
        (dict(overrides=()), "embedding in nvfp4 is not implemented"),
        (
            dict(overrides=(*NVFP4.overrides, ("experts", "mxfp8"))),
            "experts in mxfp8 is not implemented",
        ),
        (dict(tail=1.5), "tail=1.5"),
    ],
)
def test_recipes_that_cannot_be_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(NVFP4, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(gradient_along_tokens=Operand(stochastic=True)), "to both operands of dW"),
        (dict(gradient=Operand(hadamard=True)), "only the operands of dW may have it"),
        (dict(weight=Operand("16x16", stochastic=True)), "weights are rounded to nearest"),
        (dict(activation=Operand("16x16")), "blocks of 1x16"),
        (dict(weight=Operand("4x4")), "weight has block='4x4'"),
    ],
)
def test_gemm_recipes_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GemmRecipe(**changes)
