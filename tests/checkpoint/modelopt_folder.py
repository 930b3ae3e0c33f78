"""Folders in ModelOpt's layout, not written by the package, and functions to edit them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron_lite import CheckpointError, load
from nemotron_lite.quantization.fp8 import quantize_fp8
from nemotron_lite.quantization.nvfp4 import E2M1_VALUES, quantize

STEM = "backbone.layers.1.mixer.experts"
EXPERT = f"{STEM}.3.up_proj"
IN_PROJ = "backbone.layers.0.mixer.in_proj"
K_SCALE = "backbone.layers.3.mixer.k_proj.k_scale"
V_SCALE = "backbone.layers.3.mixer.v_proj.v_scale"


def as_modelopt(folder: Path) -> None:
    """Quantize the files of a plain folder: experts in NVFP4, Mamba in FP8, scales of the cache."""
    tensors = load_file(folder / "model.safetensors")
    layers: dict[str, Any] = {}
    for name in list(tensors):
        module = name.removesuffix(".weight")
        if ".experts." in name and name.startswith("backbone"):
            q = quantize(tensors[name])
            tensors |= {name: q.codes, f"{name}_scale": q.scales, f"{name}_scale_2": q.scale}
            layers[module] = {"quant_algo": "NVFP4", "group_size": 16}
        elif name.endswith(("in_proj.weight", "out_proj.weight")):
            f = quantize_fp8(tensors[name])
            tensors |= {name: f.codes, f"{name}_scale": f.scale}
            layers[module] = {"quant_algo": "FP8"}
        else:
            continue
        tensors[f"{module}.input_scale"] = torch.tensor(0.01 * (1 + len(layers)))
    tensors |= {K_SCALE: torch.tensor(0.125), V_SCALE: torch.tensor(0.3)}
    save_file(tensors, folder / "model.safetensors")
    declared = {
        "quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "quantized_layers": layers,
    }  # fmt: skip
    whole = {"producer": {"name": "modelopt", "version": "0.1"}, "quantization": declared}
    (folder / "hf_quant_config.json").write_text(json.dumps(whole))
    edit_config(folder, quantization_config={**declared, "quant_method": "modelopt", "ignore": []})


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def message(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        load(folder, **options)
    return str(error.value)


def by_hand(tensors: dict[str, Tensor], module: str, cols: int) -> Tensor:
    """The decoded weight of a module, by the definition."""
    packed, scales = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"].float()
    if packed.dtype != torch.uint8:
        return packed.float() * scales
    low, high = packed & 15, packed >> 4
    codes = torch.stack([low, high], -1).flatten(1).long()
    values = torch.tensor(E2M1_VALUES)[codes]
    factor = scales * tensors[f"{module}.weight_scale_2"]
    return (values * factor.repeat_interleave(16, 1))[:, :cols]


def edit_quant_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "hf_quant_config.json"
    whole = json.loads(file.read_text())
    change(whole["quantization"])
    file.write_text(json.dumps(whole))
