"""Released formats other than ModelOpt's first one: each decodes to the numbers of its definition.

The expected weights are computed here from the stored bytes, with ml_dtypes for the codes and by
the formula of the program that writes the format.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron_lite import load, save
from nemotron_lite.checkpoint import storage_summary
from nemotron_lite.quantization import quantizable_modules, quantize_model
from nemotron_lite.quantization.packed_layers import PackedExperts
from tests.checkpoint.modelopt_folder import (
    EXPERT,
    IN_PROJ,
    STEM,
    edit,
    edit_config,
    edit_quant_config,
    message,
)

TOKENS = torch.arange(24)[None] % 128


def codes_of(tensor: Tensor, kind: type) -> np.ndarray:
    """The numbers that bytes stand for, by ml_dtypes."""
    return tensor.contiguous().view(torch.uint8).numpy().view(kind).astype(np.float32)


def e2m1_of(packed: Tensor) -> np.ndarray:
    raw = packed.numpy()
    nibbles = np.stack([raw & 15, raw >> 4], -1).reshape(raw.shape[0], -1)
    return nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)


# --- compressed-tensors -------------------------------------------------------------------------


def compress_nvfp4(w: Tensor) -> dict[str, Tensor]:
    """A matrix as llm-compressor stores it: a divisor for the tensor, and E4M3 for each 16."""
    global_scale = torch.tensor([448.0 * 6.0]) / w.abs().max()
    blocks = w.reshape(w.shape[0], -1, 16)
    scale = (global_scale * blocks.abs().amax(-1) / 6.0).to(torch.float8_e4m3fn)
    scaled = blocks / (scale.float() / global_scale).unsqueeze(-1)
    values = scaled.reshape(w.shape).numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    packed = torch.from_numpy(values[:, ::2] | (values[:, 1::2] << 4))
    return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": global_scale}


def decompress_nvfp4(stored: dict[str, Tensor]) -> Tensor:
    """compressed-tensors: `scale = scale / global_scale`, then code * scale."""
    scale = codes_of(stored["weight_scale"], ml_dtypes.float8_e4m3fn)
    scale = scale / stored["weight_global_scale"].numpy()
    return torch.from_numpy(e2m1_of(stored["weight_packed"]) * np.repeat(scale, 16, axis=1))


def compress_fp8(w: Tensor, block: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """A matrix in E4M3 with one scale for each block; blocks at the edge are cut."""
    rows, cols = (math.ceil(n / b) for n, b in zip(w.shape, block, strict=True))
    scale, codes = torch.empty(rows, cols), torch.empty_like(w)
    for i in range(rows):
        for j in range(cols):
            part = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scale[i, j] = (w[part].abs().max() / 448).to(dtype)
            codes[part] = w[part] / scale[i, j]
    return {"weight": codes.to(torch.float8_e4m3fn), "weight_scale": scale.to(dtype)}


def decompress_fp8(stored: dict[str, Tensor], block: tuple[int, int]) -> Tensor:
    """code * scale, number by number."""
    codes = codes_of(stored["weight"], ml_dtypes.float8_e4m3fn)
    scale = next(v for k, v in stored.items() if k.startswith("weight_scale")).float().numpy()
    rows, cols = (np.arange(n) // b for n, b in zip(codes.shape, block, strict=True))
    return torch.from_numpy(codes * scale.reshape(rows[-1] + 1, -1)[rows][:, cols])


def group(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "float", "strategy": strategy, "symmetric": True, **more}
    return {"targets": ["Linear"], "weights": weights, "input_activations": None}


def declare(folder: Path, *groups: dict[str, Any], **more: Any) -> None:
    edit_config(
        folder,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "mixed-precision",
            "config_groups": {f"group_{i}": each for i, each in enumerate(groups)},
            "ignore": ["lm_head", "re:.*gate$"],
            "kv_cache_scheme": None,
            "sparsity_config": {},
            "transform_config": {},
            **more,
        },
    )


NVFP4 = group(4, "tensor_group", group_size=16)


def as_compressed_nvfp4(folder: Path) -> None:
    """Routed experts up_proj in NVFP4; the cache has scales at the mixer."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if ".experts." in name and name.endswith("up_proj.weight"):
                module = name.removesuffix(".weight")
                for part, value in compress_nvfp4(tensors.pop(name)).items():
                    tensors[f"{module}.{part}"] = value
                tensors[f"{module}.input_global_scale"] = torch.tensor([100.0])
        tensors["backbone.layers.3.mixer.k_scale"] = torch.tensor([0.5], dtype=torch.bfloat16)

    edit(folder, change)
    declare(folder, NVFP4)


def stored_of(folder: Path, module: str) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    start = f"{module}."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def test_compressed_nvfp4_is_decoded_as_that_program_does(saved: Path) -> None:
    as_compressed_nvfp4(saved)
    expected = decompress_nvfp4(stored_of(saved, EXPERT))
    found = load(saved, dtype=torch.float32).get_parameter(f"{STEM}.up_proj")
    assert torch.equal(found[3], expected)
    bf16 = load(saved, dtype=torch.bfloat16).get_parameter(f"{STEM}.up_proj")
    assert torch.equal(bf16[3], expected.bfloat16())


def test_compressed_nvfp4_stays_packed_and_is_saved_in_modelopt_s_layout(saved: Path) -> None:
    as_compressed_nvfp4(saved)
    plain, packed = load(saved, dtype=torch.float32), load(saved, packed=True)
    experts = packed.backbone.layers[1].mixer.experts
    assert isinstance(experts, PackedExperts)
    assert float(experts.up_proj.input_scale[0]) == pytest.approx(1 / 100)
    assert float(packed.backbone.layers[3].mixer.k_proj.k_scale) == 0.5
    with torch.no_grad():
        torch.testing.assert_close(
            packed(TOKENS).logits, plain(TOKENS).logits, atol=2e-4, rtol=2e-4
        )
    save(packed, saved.parent / "again")
    again = load(saved.parent / "again", dtype=torch.float32)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=0, rtol=3e-7)
    stored = stored_of(saved.parent / "again", EXPERT)
    assert set(stored) == {"weight", "weight_scale", "weight_scale_2", "input_scale"}


FP8_LAYOUTS: dict[str, tuple[str, tuple[int, int], dict[str, Any], torch.dtype]] = {
    "tensor": ("tensor", (10**6, 10**6), {}, torch.float32),
    "tensor in bfloat16": ("tensor", (10**6, 10**6), {}, torch.bfloat16),
    "channel": ("channel", (1, 10**6), {}, torch.float32),
    "channel in bfloat16": ("channel", (1, 10**6), {}, torch.bfloat16),
    "block": ("block", (128, 128), {"block_structure": [128, 128]}, torch.float32),
    "block in bfloat16": ("block", (128, 128), {}, torch.bfloat16),
    "small block": ("block", (50, 12), {"block_structure": "50x12"}, torch.float32),
}


@pytest.mark.parametrize("layout", FP8_LAYOUTS)
def test_compressed_fp8_is_code_times_scale(saved: Path, layout: str) -> None:
    strategy, block, more, dtype = FP8_LAYOUTS[layout]
    edit(
        saved,
        lambda t: t.update(
            {
                f"{IN_PROJ}.{part}": value.reshape(1) if value.numel() == 1 else value
                for part, value in compress_fp8(t[f"{IN_PROJ}.weight"], block, dtype).items()
            }
        ),
    )
    declare(saved, group(8, strategy, **more))
    model = load(saved, dtype=torch.float32)
    expected = decompress_fp8(stored_of(saved, IN_PROJ), block)
    assert torch.equal(model.get_parameter(f"{IN_PROJ}.weight"), expected)
    rows = [row for row in storage_summary(saved) if row.format == "FP8"]
    assert [row.role for row in rows] == ["mamba.in_proj"]
    if strategy == "tensor":
        assert f"{IN_PROJ}.weight_scale" in load(saved, packed=True).state_dict()
    else:
        assert "Load this checkpoint without packed=True" in message(saved, packed=True)


def test_plain_fp8_in_tiles_as_transformers_decodes_it(saved: Path) -> None:
    """`quant_method` fp8: DeepSeek's names, where the scale called inverse is multiplied with."""
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")

    def change(tensors: dict[str, Tensor]) -> None:
        stored = compress_fp8(tensors[f"{IN_PROJ}.weight"], (128, 128), torch.float32)
        tensors[f"{IN_PROJ}.weight"] = stored["weight"]
        tensors[f"{IN_PROJ}.weight_scale_inv"] = stored["weight_scale"]

    edit(saved, change)
    edit_config(
        saved,
        quantization_config={
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"],
        },
    )  # fmt: skip
    stored = stored_of(saved, IN_PROJ)
    found = load(saved, dtype=torch.float32).get_parameter(f"{IN_PROJ}.weight")
    assert torch.equal(found, decompress_fp8(stored, (128, 128)))
    theirs = finegrained._dequantize_fp8_weight(
        stored["weight"], stored["weight_scale_inv"], [128, 128], torch.float32
    )
    assert torch.equal(found, theirs)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "integers": (
        lambda f: declare(f, {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}),
        "weights of 4 bits of type 'int' are not supported",
    ),
    "MXFP4": (lambda f: declare(f, group(4, "group", group_size=32)), "group_size 32"),
    "asymmetric": (lambda f: declare(f, group(8, "tensor", symmetric=False)), "asymmetric"),
    "strategy": (lambda f: declare(f, group(8, "token")), "strategy 'token'"),
    "strategy that is no text": (lambda f: declare(f, group(8, [1])), "strategy [1]"),
    "tiles": (lambda f: declare(f, group(8, "block", block_structure=[0, 128])), "tiles of [0, 1"),
    "tiles of text": (lambda f: declare(f, group(8, "block", block_structure="1x")), "tiles of"),
    "different tiles": (
        lambda f: declare(f, *(group(8, "block", block_structure=[n, n]) for n in (64, 128))),
        "tiles of different sizes",
    ),
    "no groups": (lambda f: declare(f), "config_groups is {}"),
    "sparse": (
        lambda f: declare(f, NVFP4, sparsity_config={"format": "sparse-24-bitmask"}),
        "sparsity_config is",
    ),
    "rotated": (lambda f: declare(f, NVFP4, transform_config={"u": 1}), "transform_config is"),
    "ignore": (lambda f: declare(f, NVFP4, ignore="lm_head"), "ignore is not a list"),
    "excluded": (
        lambda f: declare(f, NVFP4, ignore=[EXPERT]),
        f"{EXPERT} is stored as NVFP4, declared as not quantized",
    ),
    "another format": (
        lambda f: declare(f, group(8, "tensor")),
        "stored as NVFP4, declared as FP8",
    ),
    "no scale": (
        lambda f: edit(f, lambda t: t.pop(f"{EXPERT}.weight_global_scale")),
        "without weight_scale_2",
    ),
    "two names": (
        lambda f: edit(f, lambda t: t.update({f"{EXPERT}.weight_scale_2": torch.tensor(1.0)})),
        "both weight_scale_2 and weight_global_scale",
    ),
    "packed integers": (
        lambda f: edit(
            f, lambda t: t.update({f"{EXPERT}.weight_packed": torch.ones(24, 2, dtype=torch.int32)})
        ),
        "integer format (AWQ, GPTQ)",
    ),
    "zero point": (
        lambda f: edit(f, lambda t: t.update({f"{EXPERT}.weight_zero_point": torch.ones(1)})),
        "integer format (AWQ, GPTQ)",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_not_supported_is_named(saved: Path, fault: str) -> None:
    as_compressed_nvfp4(saved)
    change, words = REFUSED[fault]
    change(saved)
    assert words in message(saved)


# --- ModelOpt -----------------------------------------------------------------------------------


def rename_algo(folder: Path, old: str, new: str) -> None:
    for name in ("config.json", "hf_quant_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace(f'"quant_algo": "{old}"', f'"quant_algo": "{new}"'))


def test_weight_only_nvfp4_has_the_same_weights(quantized: Path) -> None:
    """unslothai/unsloth#8555: NVIDIA's newest releases say W4A16_NVFP4."""
    expected = load(quantized).state_dict()
    rename_algo(quantized, "NVFP4", "W4A16_NVFP4")
    found = load(quantized).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert isinstance(load(quantized, packed=True).backbone.layers[1].mixer.experts, PackedExperts)


def test_an_unknown_algorithm_is_one_problem_with_a_count(quantized: Path) -> None:
    rename_algo(quantized, "NVFP4", "W3A3_NVFP3")
    text = message(quantized)
    assert "2 problems" in text, "one for each file"
    assert "24 modules, " in text
    assert "quant_algo 'W3A3_NVFP3'; expected one of NVFP4" in text
    assert len(text) < 2500


@pytest.mark.parametrize("key", ["ignore", "exclude_modules"])
def test_a_flat_file_of_modelopt(quantized: Path, key: str) -> None:
    """Newer ModelOpt writes hf_quant_config.json without the object "quantization"."""
    file = quantized / "hf_quant_config.json"
    nested = json.loads(file.read_text())
    file.write_text(json.dumps({**nested["quantization"], "producer": {}, key: ["lm_head"]}))
    model = load(quantized)
    edit_config(quantized, quantization_config=None)
    again = load(quantized)
    assert all(torch.equal(a, b) for a, b in zip(
        model.state_dict().values(), again.state_dict().values(), strict=True
    ))  # fmt: skip
    file.write_text(json.dumps({**nested["quantization"], key: [f"{IN_PROJ}*"]}))
    edit(quantized, lambda t: None)
    assert load(quantized).dtype == torch.float32, "a listed module is not excluded by a pattern"


@pytest.mark.parametrize(
    ("algo", "block", "shape"),
    [
        ("FP8_PER_CHANNEL_PER_TOKEN", (1, 10**6), (200,)),
        ("FP8_PB_WO", (128, 128), (2, 1)),
        ("FP8_PB_WO", (128, 128), (2, 1, 1, 1)),
    ],
)
def test_modelopt_s_fp8_with_more_scales(
    quantized: Path, algo: str, block: tuple[int, int], shape: tuple[int, ...]
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        plain = codes_of(tensors[f"{IN_PROJ}.weight"], ml_dtypes.float8_e4m3fn)
        stored = compress_fp8(torch.from_numpy(plain) * 0.003, block, torch.float32)
        tensors[f"{IN_PROJ}.weight"] = stored["weight"]
        tensors[f"{IN_PROJ}.weight_scale"] = stored["weight_scale"].reshape(shape)

    edit(quantized, change)
    edit_config(quantized, quantization_config=None)
    assert f"{IN_PROJ} is stored as {algo}, declared as FP8" in message(quantized)
    edit_quant_config(
        quantized, lambda q: q["quantized_layers"].update({IN_PROJ: {"quant_algo": algo}})
    )
    found = load(quantized, dtype=torch.float32).get_parameter(f"{IN_PROJ}.weight")
    assert torch.equal(found, decompress_fp8(stored_of(quantized, IN_PROJ), block))


# --- invalid values -----------------------------------------------------------------------------

SCALES = {
    "weight": f"{IN_PROJ}.weight_scale",
    "tensor": f"{EXPERT}.weight_scale_2",
    "input": f"{EXPERT}.input_scale",
    "input of fp8": f"{IN_PROJ}.input_scale",
    "keys": "backbone.layers.3.mixer.k_proj.k_scale",
    "values": "backbone.layers.3.mixer.v_proj.v_scale",
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -0.25])
@pytest.mark.parametrize("scale", SCALES)
def test_scales_are_finite_and_above_zero(
    quantized: Path, scale: str, value: float, packed: bool
) -> None:
    name = SCALES[scale]
    edit(quantized, lambda t: t[name].fill_(value))
    text = message(quantized, packed=packed)
    assert f"invalid values: {name} holds {value:g}; expected finite numbers" in text


@pytest.mark.parametrize("value", [math.nan, 0.0, -1.0])
@pytest.mark.parametrize("block", [(1, 10**6), (128, 128)])
def test_one_of_many_scales_is_invalid(saved: Path, block: tuple[int, int], value: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        stored = compress_fp8(tensors[f"{IN_PROJ}.weight"], block, torch.float32)
        stored["weight_scale"][-1, 0] = value
        tensors |= {f"{IN_PROJ}.{part}": each for part, each in stored.items()}
        tensors[f"{IN_PROJ}.weight_scale"] = stored["weight_scale"]

    edit(saved, change)
    declare(saved, group(8, "channel"), group(8, "block"))
    assert f"{IN_PROJ}.weight_scale holds {value:g}" in message(saved)


def test_a_fault_of_all_experts_is_one_problem_with_a_count(quantized: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("weight_scale_2"):
                tensors[name].neg_()

    edit(quantized, change)
    text = message(quantized)
    assert "1 problem" in text
    assert "24 tensors, " in text
    assert "and 16 more" in text


def test_a_matrix_of_zeros_is_saved_and_loaded(saved: Path) -> None:
    """Its scale is 1, because a scale of 0 is refused; the same for keys that are always zero."""
    model = load(saved)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    quantize_model(model, {m.path: "nvfp4" for m in quantizable_modules(model)})
    shutil.rmtree(saved)
    save(model, saved)
    assert not any(bool(p.any()) for p in load(saved).parameters())


def test_files_are_not_needed_in_one_piece(saved: Path) -> None:
    """Codes and their divisors may be in different shards."""
    as_compressed_nvfp4(saved)
    expected = load(saved).state_dict()
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    second = {n: tensors.pop(n) for n in list(tensors) if "scale" in n}
    save_file(tensors, saved / "a.safetensors")
    save_file(second, saved / "b.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = load(saved).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
