"""Multimodal releases: the text model is loaded, and one warning names the rest."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_lite import NemotronConfig, load, save
from nemotron_lite.checkpoint import storage_summary
from nemotron_lite.hf_config import from_hf
from tests.checkpoint.modelopt_folder import EXPERT, as_modelopt, message

OTHERS = {
    "vision_model.radio_model.model.blocks.0.attn.qkv.weight": torch.ones(6, 2),
    "vision_model.radio_model.summary_idxs": torch.ones(2, dtype=torch.int64),
    "mlp1.0.weight": torch.ones(4),
    "sound_encoder.encoder.layers.0.k_proj.weight": torch.ones(2, 2),
}


def as_multimodal(folder: Path, prefix: str, key: str) -> None:
    """Turn a plain folder into one in the layout of Nemotron VL and Omni."""
    tensors = load_file(folder / "model.safetensors")
    inner = "model." if prefix.startswith("model.") else "backbone."
    renamed = {prefix + n.replace("backbone.", inner): tensor for n, tensor in tensors.items()}
    save_file(renamed | OTHERS, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config", None)
    dtype = config.pop("torch_dtype", None)
    whole: dict[str, Any] = {
        "model_type": "NemotronH_Nano_Omni_Reasoning_V3",
        "architectures": ["NemotronH_Nano_Omni_Reasoning_V3"],
        "torch_dtype": dtype,
        key: config,
        "vision_config": {"model_type": "radio", "hidden_size": 1280},
        "sound_config": {"model_type": "parakeet"},
        "downsample_ratio": 0.5,
    }
    if quantization:
        whole["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(whole))


LAYOUTS = [
    ("language_model.", "llm_config"),
    ("language_model.", "text_config"),
    ("model.language_model.", "text_config"),
    ("", "text_config"),
]


@pytest.mark.parametrize(("prefix", "key"), LAYOUTS)
def test_the_text_model_is_loaded_and_the_rest_is_named(
    saved: Path, tiny: NemotronConfig, prefix: str, key: str
) -> None:
    expected = load(saved)
    as_multimodal(saved, prefix, key)
    with pytest.warns(UserWarning, match="is a multimodal release") as warned:
        model = load(saved)
    assert len(warned) == 1
    text = str(warned[0].message)
    assert "sound_config, vision_config" in text
    assert "mlp1 (1), sound_encoder (1), vision_model (2)" in text
    assert model.config == expected.config == tiny
    assert model.dtype == expected.dtype
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_quantized_multimodal_release(saved: Path) -> None:
    as_modelopt(saved)
    expected = load(saved).state_dict()
    rows = storage_summary(saved)
    as_multimodal(saved, "language_model.", "llm_config")
    for file in (saved / "config.json", saved / "hf_quant_config.json"):
        whole = file.read_text().replace('"backbone.layers', '"language_model.backbone.layers')
        file.write_text(whole)
    with pytest.warns(UserWarning, match="multimodal"):
        found = load(saved).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert storage_summary(saved) == rows
    with pytest.warns(UserWarning, match="multimodal"):
        packed = load(saved, packed=True)
    save(packed, saved.parent / "text")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load(saved.parent / "text").state_dict()
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_missing_text_weights_are_still_an_error(saved: Path) -> None:
    as_multimodal(saved, "language_model.", "text_config")
    tensors = load_file(saved / "model.safetensors")
    del tensors[f"language_model.{EXPERT}.weight"]
    tensors["language_model.rotary.inv_freq"] = torch.ones(3)
    save_file(tensors, saved / "model.safetensors")
    text = message(saved)
    assert f"missing: 1 tensor, {EXPERT}.weight" in text
    assert "language_model.rotary.inv_freq" in text
    assert "vision_model" not in text


def test_another_language_model_inside_is_refused(saved: Path) -> None:
    as_multimodal(saved, "language_model.", "text_config")
    whole = json.loads((saved / "config.json").read_text())
    whole["text_config"]["model_type"] = "llama"
    (saved / "config.json").write_text(json.dumps(whole))
    assert "model_type is 'llama'" in message(saved)


def test_the_config_alone(tiny: NemotronConfig) -> None:
    inner = tiny.to_hf()
    assert from_hf({"model_type": "omni", "text_config": inner, "vision_config": {}}) == tiny
    inner.pop("eos_token_id")
    assert from_hf({"eos_token_id": [5, 6], "text_config": inner}).eos_token_id == (5, 6)
