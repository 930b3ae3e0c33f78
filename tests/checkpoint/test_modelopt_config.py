"""The formats that a quantized folder declares must agree with its tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_lite import load
from tests.checkpoint.modelopt_folder import (
    EXPERT,
    IN_PROJ,
    STEM,
    edit_config,
    edit_quant_config,
    message,
)

DECLARED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another format": (
        lambda q: q["quantized_layers"].update({EXPERT: {"quant_algo": "FP8"}}),
        f"{EXPERT} is stored as NVFP4, declared as FP8",
    ),
    "a format for a plain weight": (
        lambda q: q["quantized_layers"].update({"lm_head": {"quant_algo": "FP8"}}),
        "lm_head is not quantized, declared as FP8",
    ),
    "excluded": (
        lambda q: (q["quantized_layers"].pop(IN_PROJ), q.update(exclude_modules=["*.in_proj"])),
        f"{IN_PROJ} is stored as FP8, declared as not quantized",
    ),
    "one format for all": (
        lambda q: (q.pop("quantized_layers"), q.update(quant_algo="NVFP4")),
        f"4 modules, {IN_PROJ}, ",
    ),
    "unknown": (lambda q: q.update(quant_algo="W4A8_AWQ"), "quant_algo is 'W4A8_AWQ'; expected"),
    "group": (
        lambda q: q["quantized_layers"][EXPERT].update(group_size=32), "group_size 32; expected 16"
    ),
    "exclude": (lambda q: q.update(exclude_modules="lm_head"), "exclude_modules is not a list"),
    "quantized_layers": (lambda q: q.update(quantized_layers=[1]), "quantized_layers is a list"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DECLARED)
def test_a_declaration_must_agree_with_the_stored_tensors(quantized: Path, fault: str) -> None:
    change, words = DECLARED[fault]
    edit_quant_config(quantized, change)
    assert words in message(quantized)


def test_a_listed_module_covers_what_is_inside_it(quantized: Path) -> None:
    def fused(q: dict[str, Any]) -> None:
        layers = q["quantized_layers"]
        for name in [n for n in layers if n.startswith(STEM)]:
            del layers[name]
        layers[STEM] = {"quant_algo": "NVFP4"}

    edit_quant_config(quantized, fused)
    assert load(quantized).dtype == torch.float32


def test_quantized_weights_without_a_declaration(quantized: Path) -> None:
    (quantized / "hf_quant_config.json").unlink()
    edit_config(quantized, quantization_config=None)
    assert "nor quantization_config in config.json declares it" in message(quantized)


def test_a_declaration_without_quantized_weights(saved: Path) -> None:
    declared = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    edit_config(saved, quantization_config=declared)
    assert "but no stored weight is" in message(saved)


def test_other_methods_are_refused_by_name(saved: Path) -> None:
    edit_config(saved, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantized with 'gptq'" in message(saved)
    (saved / "hf_quant_config.json").write_text("{}")
    assert "hf_quant_config.json has no quant_algo" in message(saved)
