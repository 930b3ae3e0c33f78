"""Quantized folders: tensors are read, written again with equal bits, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron_lite import CheckpointError, Nemotron, NemotronConfig, load, save
from nemotron_lite.quantization.fp8 import quantize_fp8
from nemotron_lite.quantization.nvfp4 import quantize
from nemotron_lite.quantization.packed_layers import PackedExperts, PackedLinear
from tests.checkpoint.modelopt_folder import (
    EXPERT,
    IN_PROJ,
    K_SCALE,
    STEM,
    bits,
    by_hand,
    edit,
    edit_config,
    edit_quant_config,
    message,
)

Make = Callable[..., Nemotron]


def test_weights_are_decoded_as_defined(quantized: Path) -> None:
    tensors = load_file(quantized / "model.safetensors")
    state = load(quantized, dtype=torch.float32).state_dict()
    assert torch.equal(state[f"{STEM}.up_proj"][3], by_hand(tensors, EXPERT, 16))
    down = f"{STEM}.5.down_proj"
    assert tensors[f"{down}.weight"].shape == (16, 16), "rows of 24 are padded to 32"
    assert torch.equal(state[f"{STEM}.down_proj"][5], by_hand(tensors, down, 24))
    assert torch.equal(state[f"{IN_PROJ}.weight"], by_hand(tensors, IN_PROJ, 32))
    assert state.keys() == load(quantized, mtp="require").state_dict().keys()
    assert not any("scale" in name for name in state)


@pytest.mark.parametrize("shard_bytes", [10**9, 5_000])
def test_packed_round_trip_changes_no_bit(quantized: Path, shard_bytes: int) -> None:
    before = load_file(quantized / "model.safetensors")
    model = load(quantized, packed=True)
    other = quantized.parent / "again"
    save(model, other, max_shard_bytes=shard_bytes)
    after = {n: t for file in other.glob("*.safetensors") for n, t in load_file(file).items()}
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(bits(after[name]), bits(tensor)), name
    written = [json.loads((f / "hf_quant_config.json").read_text()) for f in (quantized, other)]
    assert written[0]["quantization"] == written[1]["quantization"]
    again = load(other, packed=True)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_packed_and_decoded_compute_the_same(quantized: Path) -> None:
    tokens = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(0))
    plain, packed = load(quantized, dtype=torch.float32), load(quantized, packed=True)
    assert isinstance(packed.backbone.layers[1].mixer.experts, PackedExperts)
    assert isinstance(packed.backbone.layers[0].mixer.in_proj, PackedLinear)
    packed.float()
    with torch.no_grad():
        expected, found = plain(tokens).logits, packed(tokens).logits
        state = packed.empty_cache(2)
        packed(tokens[:, :30], state)
        steps = [packed(tokens[:, i : i + 1], state).logits for i in range(30, 40)]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(torch.cat(steps, 1), expected[:, 30:], atol=5e-4, rtol=5e-4)


def test_casting_a_packed_model_does_not_change_packed_weights(quantized: Path) -> None:
    model = load(quantized, packed=True)
    before = {
        n: t.clone() for n, t in model.state_dict().items() if "experts." in n or "_scale" in n
    }
    model.to(torch.float64).to(torch.bfloat16)
    after = model.state_dict()
    assert len(before) > 20
    for name, tensor in before.items():
        if name.startswith("mtp") or "shared" in name:
            continue
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(bits(after[name]), bits(tensor)), name


def test_rounded_inputs_change_the_logits_a_little(quantized: Path) -> None:
    model = load(quantized, packed=True, dtype=torch.float32)
    layer = model.backbone.layers[0].mixer.in_proj
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    exact = layer(x)
    layer.quantize_inputs = True
    layer.input_scale.fill_(float(x.abs().max()) / 448)
    rounded = layer(x)
    assert not torch.equal(exact, rounded)
    assert float((exact - rounded).norm() / exact.norm()) < 0.05
    layer.input_scale = None
    with pytest.raises(ValueError, match="no input_scale"):
        layer(x)


def test_packed_takes_less_memory(quantized: Path) -> None:
    experts = load(quantized, packed=True).backbone.layers[1].mixer.experts
    assert experts.up_proj.nbytes * 8 == 6 * (24 * 16 * 4.5 + 64), (
        "4.5 bits per weight and two scales"
    )


def test_scales_in_another_shard(quantized: Path) -> None:
    expected = load(quantized).state_dict()
    tensors = load_file(quantized / "model.safetensors")
    scales = {name: tensors.pop(name) for name in list(tensors) if "scale" in name}
    (quantized / "model.safetensors").unlink()
    save_file(tensors, quantized / "a.safetensors")
    save_file(scales, quantized / "b.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | dict.fromkeys(scales, "b.safetensors")
    index = quantized / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    found = load(quantized).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_without_input_scales_and_with_a_dropped_module(quantized: Path) -> None:
    edit(quantized, lambda t: [t.pop(n) for n in list(t) if n.endswith("input_scale")])
    model = load(quantized, packed=True, mtp="drop")
    assert model.backbone.layers[1].mixer.experts.up_proj.input_scale is None
    save(model, quantized.parent / "again")
    names = load_file(quantized.parent / "again" / "model.safetensors")
    assert f"{EXPERT}.weight_scale_2" in names
    assert not any(name.endswith("input_scale") for name in names)


def test_one_format_for_all(saved: Path, tiny: NemotronConfig) -> None:
    tensors = load_file(saved / "model.safetensors")
    q = quantize(tensors[f"{IN_PROJ}.weight"])
    edit(
        saved,
        lambda t: t.update(
            {
                f"{IN_PROJ}.weight": q.codes,
                f"{IN_PROJ}.weight_scale": q.scales,
                f"{IN_PROJ}.weight_scale_2": q.scale,
            }
        ),
    )
    declared = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "*.q_proj"]}
    whole = {"producer": {"name": "modelopt"}, "quantization": declared}
    (saved / "hf_quant_config.json").write_text(json.dumps(whole))
    model = load(saved, packed=True)
    save(model, saved.parent / "again")
    own = json.loads((saved.parent / "again" / "hf_quant_config.json").read_text())["quantization"]
    assert own["quant_algo"] == "NVFP4"
    assert "lm_head" in own["exclude_modules"]
    assert IN_PROJ not in own["exclude_modules"]
    config = json.loads((saved.parent / "again" / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    assert group["weights"] == {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}


def test_saving_decoded_weights_removes_the_quantization_config(quantized: Path) -> None:
    save(load(quantized), quantized)
    assert not (quantized / "hf_quant_config.json").exists()
    assert "quantization_config" not in json.loads((quantized / "config.json").read_text())
    assert load(quantized).dtype == torch.float32


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], Any], list[str]]] = {
    "no scale": (lambda t: t.pop(f"{EXPERT}.weight_scale"), [EXPERT, "without weight_scale"]),
    "no second scale": (
        lambda t: t.pop(f"{EXPERT}.weight_scale_2"), [EXPERT, "without weight_scale_2"],
    ),
    "no weight": (lambda t: t.pop(f"{EXPERT}.weight"), [EXPERT, "without a weight"]),
    "short scales": (
        lambda t: t.update({f"{EXPERT}.weight_scale": t[f"{EXPERT}.weight_scale"][:7].clone()}),
        [EXPERT, "F8_E4M3 [7, 1]", "expected F8_E4M3 [24, 1]"],
    ),
    "scales in float32": (
        lambda t: t.update({f"{EXPERT}.weight_scale": t[f"{EXPERT}.weight_scale"].float()}),
        [EXPERT, "F32 [24, 1]"],
    ),
    "two tensor scales": (
        lambda t: t.update({f"{EXPERT}.weight_scale_2": torch.ones(2)}), [EXPERT, "F32 [2]"],
    ),
    "input scale of three numbers": (
        lambda t: t.update({f"{EXPERT}.input_scale": torch.ones(3)}), ["input_scale is F32 [3]"],
    ),
    "per channel": (
        lambda t: t.update({f"{IN_PROJ}.weight_scale": torch.ones(216)}),
        [IN_PROJ, "one F32 number for the tensor"],
    ),
    "mxfp8": (
        lambda t: t.update({f"{IN_PROJ}.weight_scale": torch.ones(216, 1, dtype=torch.uint8)}),
        [IN_PROJ, "MXFP8"],
    ),
    "two scales for fp8": (
        lambda t: t.update({f"{IN_PROJ}.weight_scale_2": torch.tensor(1.0)}), ["only NVFP4"],
    ),
    "scale of a weight that is not quantized": (
        lambda t: t.update({"lm_head.weight_scale": torch.tensor(1.0)}),
        ["lm_head", "needs no scale"],
    ),
    "integers": (
        lambda t: t.update({f"{EXPERT}.weight": torch.ones(24, 16, dtype=torch.int8)}),
        [EXPERT, "a weight in I8"],
    ),
    "rows of a wrong size": (
        lambda t: t.update({f"{EXPERT}.weight": t[f"{EXPERT}.weight"][:, :5].clone()}),
        [EXPERT, "packed rows of 5 bytes"],
    ),
    "another width": (
        lambda t: t.update({
            f"{EXPERT}.weight": torch.zeros(24, 16, dtype=torch.uint8),
            f"{EXPERT}.weight_scale": torch.ones(24, 2).to(torch.float8_e4m3fn),
        }),
        [f"{EXPERT}.weight [24, 32] for [24, 16]"],
    ),
    "cache scale without a projection": (
        lambda t: t.update({K_SCALE.replace("layers.3", "layers.4"): torch.tensor(1.0)}),
        ["without a projection", "layers.4"],
    ),
    "cache scales": (lambda t: t.update({K_SCALE: torch.ones(4)}), [K_SCALE, "one F32 number"]),
    "negative": (
        lambda t: t[f"{EXPERT}.weight_scale_2"].neg_(), [f"{EXPERT}.weight_scale_2 holds -"],
    ),
    "nan in block scales": (
        lambda t: t[f"{EXPERT}.weight_scale"].view(torch.uint8)[3].fill_(0x7F),
        [f"{EXPERT}.weight_scale holds nan"],
    ),
    "nan in fp8": (
        lambda t: t[f"{IN_PROJ}.weight"].view(torch.uint8)[3].fill_(0xFF),
        [f"{IN_PROJ}.weight holds nan"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fault", BROKEN)
def test_malformed_modules_are_named(quantized: Path, fault: str, packed: bool) -> None:
    change, words = BROKEN[fault]
    edit(quantized, change)
    text = message(quantized, packed=packed)
    assert all(word in text for word in words), text


def test_several_faults_in_one_error(quantized: Path) -> None:
    def change(t: dict[str, Tensor]) -> None:
        BROKEN["no scale"][0](t)
        BROKEN["mxfp8"][0](t)
        del t["lm_head.weight"]

    edit(quantized, change)
    (quantized / "tokenizer.json").write_text("{}")
    text = message(quantized)
    assert "without weight_scale" in text
    assert "MXFP8" in text
    assert "tokenizer.json" in text


def test_experts_of_one_stack_in_two_formats(quantized: Path) -> None:
    tensors = load_file(quantized / "model.safetensors")
    value = by_hand(tensors, EXPERT, 16)
    f = quantize_fp8(value)
    edit(
        quantized,
        lambda t: (
            t.update({f"{EXPERT}.weight": f.codes, f"{EXPERT}.weight_scale": f.scale}),
            t.pop(f"{EXPERT}.weight_scale_2"),
        ),
    )
    edit_quant_config(
        quantized, lambda q: q["quantized_layers"].update({EXPERT: {"quant_algo": "FP8"}})
    )
    edit_config(quantized, quantization_config=None)
    assert load(quantized).dtype == torch.float32
    assert "stored in different formats" in message(quantized, packed=True)


def test_bytes_that_are_not_a_packed_weight_are_not_saved(
    tmp_path: Path, tiny: NemotronConfig, make: Make
) -> None:
    model = make(tiny)
    model.backbone.register_buffer("extra", torch.ones(3, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="a dtype that cannot be saved"):
        save(model, tmp_path / "m")
