"""A model in 4 and 8 bits: the stored values, the files, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nemotron_lite import Nemotron, generate, load, save
from nemotron_lite.generation.options import SpeculationOptions
from nemotron_lite.ops import squared_relu
from nemotron_lite.quantization import (
    bits_per_weight,
    calibrate,
    quantizable_modules,
    quantize_model,
    single_format,
)
from nemotron_lite.quantization.pack_model import packed_copy
from nemotron_lite.quantization.packed_layers import (
    LinearWithKVScale,
    PackedExperts,
    PackedLinear,
    PackedWeight,
)
from tests.checkpoint.tiny import TINY, randomize
from tests.quantization.learnable_text import loss_of, text

Fresh = Callable[[], Nemotron]
EXPERTS = "backbone.layers.1.mixer.experts"


def test_quantizable_modules_of_a_model(random_model: Nemotron) -> None:
    modules = quantizable_modules(random_model)
    by_path = {module.path: module for module in modules}
    assert len(modules) == 2 + 2 + 2 * 5 + 1 + 2
    assert by_path[EXPERTS].num_weights == 2 * 6 * 24 * 16
    assert by_path[EXPERTS].bits("nvfp4") == 6 * 24 * 16 * 4.5 + 6 * 16 * 32 * 4.5, (
        "24 padded to 32"
    )
    assert not any(name.endswith(("q_proj", "k_proj", "v_proj", "gate")) for name in by_path)
    assert not any(name.startswith(("mtp", "lm_head")) for name in by_path)
    report = {m.path: m.formats for m in quantizable_modules(random_model, "report")}
    assert report[EXPERTS] == ("nvfp4",)
    assert report["backbone.layers.3.mixer.o_proj"] == ("fp8", "bf16")
    assert bits_per_weight(modules, single_format(modules, "fp8")) == 8
    everything = {m.path: m.formats for m in quantizable_modules(random_model, "everything")}
    assert everything["lm_head"] == ("fp8", "bf16")
    added = set(everything) - set(by_path) - {"lm_head"}
    assert added and all(name.startswith("mtp.") for name in added)
    assert not any(name.endswith(("q_proj", "k_proj", "v_proj", "gate")) for name in added)
    with pytest.raises(ValueError, match="choices='all'"):
        quantizable_modules(random_model, "all")


@torch.no_grad()
def test_calibration_finds_what_modules_read(random_model: Nemotron) -> None:
    batch = torch.arange(128).view(4, 32)
    found = calibrate(random_model, [batch[:2], batch[2:]])
    assert found.tokens == batch.numel()
    block = random_model.backbone.layers[0]
    normed = block.norm(random_model.backbone.embeddings(batch))
    name = "backbone.layers.0.mixer.in_proj.weight"
    torch.testing.assert_close(found.input_amax[name], normed.abs().max())
    x = random_model.backbone.embeddings(batch)
    x = block(x)
    moe = random_model.backbone.layers[1]
    flat = moe.norm(x).flatten(0, 1)
    z, routing = moe.mixer.fc1_latent_proj(flat), moe.mixer.gate(flat)
    for e in range(6):
        rows = z[(routing.indices == e).any(1)]
        assert len(rows), "each expert has tokens here"
        torch.testing.assert_close(found.input_amax[f"{EXPERTS}.up_proj"][e], rows.abs().max())
        hidden = squared_relu(rows @ moe.mixer.experts.up_proj[e].mT)
        torch.testing.assert_close(found.input_amax[f"{EXPERTS}.down_proj"][e], hidden.max())
    assert set(found.kv_amax) == {f"backbone.layers.3.mixer.{n}_proj" for n in "kv"}


@pytest.fixture
def biased_model() -> Nemotron:
    """A model whose projections all have biases."""
    biases = dict(attention_bias=True, mlp_bias=True, use_bias=True)
    model = Nemotron(TINY.replace(**biases), seed=0)
    randomize(model.state_dict().items(), 3)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
def test_packed_layers_keep_their_biases(
    format: str, biased_model: Nemotron, tmp_path: Path
) -> None:
    model, tokens = biased_model, torch.arange(64).view(2, 32)
    plain = {name: value.clone() for name, value in model.named_parameters()}
    modules = quantizable_modules(model, "everything")
    without = quantizable_modules(Nemotron(TINY, seed=0), "everything")
    assert [m.shapes for m in modules] == [m.shapes for m in without], "matrices only"
    calibration = calibrate(model, [tokens], choices="everything")
    copied = packed_copy(model, "backbone.layers.4.mixer.up_proj", format, calibration)
    quantize_model(model, single_format(modules, format), calibration=calibration, cache=True)
    biases = [name for name in plain if name.endswith("_proj.bias")]
    assert len(biases) == 26
    assert all(torch.equal(model.get_parameter(name), plain[name]) for name in biases)
    assert isinstance(model.backbone.layers[3].mixer.k_proj, LinearWithKVScale)
    decoded = Nemotron(model.config)
    state = {n: t for n, t in model.state_dict().items() if "scale" not in n}
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            stack = len(module.shape) == 3
            state.pop(f"{name}.weight")
            state[name if stack else f"{name}.weight"] = (
                torch.stack([module.decode(torch.float32, e) for e in range(module.shape[0])])
                if stack
                else module.decode(torch.float32)
            )
    decoded.load_state_dict(state)
    expected = decoded(tokens, mtp_depths=1)
    found = model(tokens, mtp_depths=1)
    torch.testing.assert_close(found.logits, expected.logits, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(found.mtp_logits[0], expected.mtp_logits[0], atol=2e-4, rtol=2e-4)
    save(model, tmp_path / "packed")
    again = load(tmp_path / "packed", packed=True)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    torch.testing.assert_close(load(tmp_path / "packed")(tokens).logits, found.logits)
    x = torch.randn(3, 32)
    layer = model.backbone.layers[4].mixer.up_proj
    assert torch.equal(copied(x), layer(x))
    assert not torch.equal(layer(x), PackedLinear.forward(layer, x))
    for name in biases:
        model.get_parameter(name).zero_()
    assert (model(tokens).logits - found.logits).abs().max() > 0.1, "they all matter"


def test_experts_without_tokens_take_the_largest_of_their_layer(random_model: Nemotron) -> None:
    random_model.backbone.layers[1].mixer.gate.e_score_correction_bias[2] = -100.0
    found = calibrate(random_model, [torch.arange(128).view(4, 32)]).input_amax[
        f"{EXPERTS}.up_proj"
    ]
    assert found[2] == found.max()
    assert found.min() < found.max()


@pytest.mark.parametrize("form", ["nvfp4", "fp8"])
def test_head_and_mtp_module_are_quantized_on_request(
    fresh: Fresh, tmp_path: Path, form: str
) -> None:
    model = fresh()
    modules = quantizable_modules(model, "everything")
    formats = single_format(modules, form)
    assert formats["lm_head"] == "fp8"
    with pytest.raises(ValueError, match=r"lm_head.* in 'nvfp4': expected one of fp8, bf16"):
        quantize_model(model, {"lm_head": "nvfp4"})
    with pytest.raises(ValueError, match='choices="everything"'):
        quantize_model(model, formats, calibrate(model, [text(6)]))
    quantize_model(model, formats, calibrate(model, [text(6)], choices="everything"), cache=True)
    save(model, tmp_path / "m")
    packed, plain = load(tmp_path / "m", packed=True), load(tmp_path / "m", dtype=torch.float32)
    assert isinstance(packed.lm_head, PackedLinear) and not isinstance(plain.lm_head, PackedLinear)
    assert isinstance(packed.mtp.layers[1].mixer.experts, PackedExperts)
    tokens = text(5)
    found = [m(tokens, mtp_depths=2) for m in (model, packed, plain)]
    assert torch.equal(found[0].logits, found[1].logits)
    torch.testing.assert_close(found[0].logits, found[2].logits, atol=1e-4, rtol=1e-4)
    for a, b, c in zip(*(out.mtp_logits for out in found), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=1e-4, rtol=1e-4)
    prompt = tokens[0, :8].tolist()
    options = dict(max_new_tokens=12, temperature=0.0)
    written = [
        generate(each, prompt, speculation=speculation, **options)
        for each in (packed, plain)
        for speculation in (None, SpeculationOptions(draft_length=2, adaptive=False))
    ]
    assert written == written[:1] * 4


@pytest.mark.parametrize("form", ["nvfp4", "fp8"])
def test_saved_loaded_and_loaded_packed_are_one_model(
    fresh: Fresh, tmp_path: Path, form: str
) -> None:
    model = fresh()
    batch = text(5)
    found = calibrate(model, [text(6)])
    quantize_model(model, single_format(quantizable_modules(model), form), found, cache=True)
    assert isinstance(model.backbone.layers[1].mixer.experts, PackedExperts)
    save(model, tmp_path / "m")
    packed, plain = load(tmp_path / "m", packed=True), load(tmp_path / "m", dtype=torch.float32)
    expected = loss_of(model, batch)
    assert loss_of(packed, batch) == expected, "the same bits"
    assert loss_of(plain, batch) == pytest.approx(expected, abs=1e-4)
    names = load_file(tmp_path / "m" / "model.safetensors")
    scale = names[f"{EXPERTS}.2.down_proj.input_scale"]
    largest = 448 if form == "fp8" else 6 * 448
    assert scale == found.input_amax[f"{EXPERTS}.down_proj"][2] / largest
    key = "backbone.layers.3.mixer.k_proj"
    assert names[f"{key}.k_scale"] == found.kv_amax[key] / 448


def test_quantized_loss_is_close_and_eight_bits_are_closer(fresh: Fresh) -> None:
    batch = text(7, rows=16)
    plain = loss_of(fresh(), batch)
    gap = {}
    for form in ("nvfp4", "fp8"):
        model = fresh()
        gap[form] = (
            loss_of(quantize_model(model, single_format(quantizable_modules(model), form)), batch)
            - plain
        )
    assert abs(gap["fp8"]) < 0.03
    assert abs(gap["fp8"]) < abs(gap["nvfp4"]) < 0.6


def test_searched_scales_leave_less_error_than_the_rule(fresh: Fresh) -> None:
    errors = {}
    for search in (False, True):
        model = fresh()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        quantize_model(model, single_format(quantizable_modules(model), "nvfp4"), search=search)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedWeight)}
        errors[search] = sum(
            float((layer.decode(torch.float32) - weights[f"{name}.weight"]).square().sum())
            for name, layer in layers.items()
            if len(layer.shape) == 2
        )
    assert errors[True] < 0.97 * errors[False]


def test_a_mix_and_what_stays_plain(fresh: Fresh) -> None:
    model = fresh()
    before = model.state_dict()
    chosen = {EXPERTS: "nvfp4", "backbone.layers.0.mixer.in_proj": "fp8"}
    chosen["backbone.layers.0.mixer.out_proj"] = "bf16"
    model = quantize_model(model, chosen).to(torch.bfloat16)
    packed = {name for name, m in model.named_modules() if isinstance(m, PackedWeight)}
    assert packed == {
        f"{EXPERTS}.up_proj",
        f"{EXPERTS}.down_proj",
        "backbone.layers.0.mixer.in_proj",
    }
    assert model.backbone.layers[0].mixer.out_proj.weight.dtype == torch.bfloat16
    assert torch.equal(
        model.backbone.layers[0].mixer.out_proj.weight,
        before["backbone.layers.0.mixer.out_proj.weight"].bfloat16(),
    )
    assert torch.isfinite(model(text(0)).logits).all()


def test_what_cannot_be_quantized(fresh: Fresh) -> None:
    model = fresh()
    with pytest.raises(ValueError, match="gate: not to be quantized"):
        quantize_model(model, {"backbone.layers.1.mixer.gate": "fp8"})
    with pytest.raises(ValueError, match="format 'int4'"):
        quantize_model(model, {EXPERTS: "int4"})
    with pytest.raises(ValueError, match="needs a calibration"):
        quantize_model(model, {}, cache=True)
    with pytest.raises(ValueError, match="no text"):
        calibrate(model, [])
    with torch.no_grad():
        model.backbone.layers[0].mixer.in_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"in_proj\.weight holds NaN or infinity"):
        quantize_model(model, {"backbone.layers.0.mixer.in_proj": "nvfp4"})
    assert isinstance(model.backbone.layers[0].mixer.in_proj, nn.Linear), "the model is unchanged"
    with pytest.raises(ValueError, match="not finite"):
        calibrate(model, [text(0)])
    packed = quantize_model(fresh(), {EXPERTS: "fp8"})
    with pytest.raises(ValueError, match="quantized already"):
        quantizable_modules(packed)
