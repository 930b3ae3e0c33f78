"""The sizes and options of the two models that the first command shows, in one place.

    lite_config(), lite_training()      the shipped model "lite": `make lite` trains it
    live_config(), live_training()      the small one that `nemotron-lite run` trains while you wait

The shipped model reads the text of a manifest (`data/manifests/lite.json`): 2,000 updates of 4,096
tokens. Matrices are updated by Muon, everything else by AdamW. The rate is 4e-3 and falls over the
last third. Products are computed in bfloat16 where this was measured to be faster, and in
float32 elsewhere (`choose_precision`). `NVFP4_FROM` may switch the last part of the run to NVFP4,
in which the release was trained. The routers' biases move faster than in a run of a million
updates.

The live model has the same layers, fewer of them, and no MTP module, so that it reads as many
tokens as possible in its 75 seconds. It is encoded by the shipped model's tokenizer.
"""

from __future__ import annotations

from typing import Any

import torch

from nemotron_lite.backends.measured_products import prefers_bf16
from nemotron_lite.config import NemotronConfig
from nemotron_lite.quantization.recipe import get_recipe
from nemotron_lite.train.config import TrainConfig

LITE = "lite"  # the preset, and the name of the shipped model
LITE_STEPS = 2000
LITE_TRAINING: dict[str, Any] = dict(
    batch_size=8, seq_len=512, optimizer="muon", lr=4e-3, min_lr=4e-5,
    warmup_fraction=0.02, decay_fraction=0.35, bias_rate=0.02, save_every_seconds=300.0,
)  # fmt: skip
NVFP4_FROM: float | None = None  # the fraction of the run from which products are in NVFP4

LIVE_SECONDS = 75.0
LIVE_CONFIG: dict[str, Any] = dict(pattern="M*E", mtp_pattern="", mtp_depths=0)
LIVE_TRAINING: dict[str, Any] = dict(
    batch_size=4, seq_len=256, optimizer="muon", lr=5e-3, min_lr=5e-5,
    warmup_fraction=0.02, decay_fraction=0.4, bias_rate=0.02,
)  # fmt: skip


def choose_precision(name: str, device: torch.device | None = None) -> str:
    """The precision of matrix products; "auto" is bf16 where the device multiplies it faster.

    Raises:
        ValueError: an unknown name.
    """
    if name == "auto":
        return "bf16" if prefers_bf16(device or torch.device("cpu")) else "fp32"
    return get_recipe(name).name


def lite_config() -> NemotronConfig:
    """The sizes of the shipped model."""
    return NemotronConfig.from_preset(LITE)


def lite_training(precision: str, *, steps: int = LITE_STEPS, seed: int = 0) -> TrainConfig:
    """The options of the shipped model's training."""
    return TrainConfig(steps=steps, precision=precision, seed=seed, **LITE_TRAINING)


def live_config() -> NemotronConfig:
    """The sizes of the model that is trained while you wait."""
    return NemotronConfig.from_preset(LITE, **LIVE_CONFIG)


def live_training(
    precision: str, *, max_seconds: float | int = LIVE_SECONDS, seed: int = 0
) -> TrainConfig:
    """The options of that training."""
    return TrainConfig(max_seconds=max_seconds, precision=precision, seed=seed, **LIVE_TRAINING)
