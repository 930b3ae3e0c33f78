"""Every tensor of an exported file, read by the `gguf` package, is ours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from nemotron_lite import Nemotron, NemotronConfig, load, save
from nemotron_lite.export import to_gguf
from nemotron_lite.export.gguf_tensors import NVFP4_BLOCK
from nemotron_lite.quantization.packed_layers import PackedWeight
from tests.export.llama import NO_MTP, packed_model, small_model

OUTSIDE = {
    "backbone.embeddings.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INSIDE = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
    "mixer.q_proj.weight": "attn_q.weight",
    "mixer.k_proj.weight": "attn_k.weight",
    "mixer.v_proj.weight": "attn_v.weight",
    "mixer.o_proj.weight": "attn_output.weight",
    "mixer.gate.weight": "ffn_gate_inp.weight",
    "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mixer.experts.up_proj": "ffn_up_exps.weight",
    "mixer.experts.down_proj": "ffn_down_exps.weight",
    "mixer.fc1_latent_proj.weight": "ffn_latent_down.weight",
    "mixer.fc2_latent_proj.weight": "ffn_latent_up.weight",
    "mixer.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mixer.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "mixer.up_proj.weight": "ffn_up.weight",
    "mixer.down_proj.weight": "ffn_down.weight",
}
OF_MTP = {
    "layers.0.enorm.weight": "nextn.enorm.weight",
    "layers.0.hnorm.weight": "nextn.hnorm.weight",
    "layers.0.eh_proj.weight": "nextn.eh_proj.weight",
    "layers.1.norm.weight": "post_attention_norm.weight",
    "layers.1.final_layernorm.weight": "nextn.shared_head_norm.weight",
}


def name_in_file(name: str, layers: int) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, rest = name.partition("layers.")
    index, _, leaf = rest.partition(".")
    if name.startswith("mtp."):
        known = OF_MTP.get(name.removeprefix("mtp."))
        return f"blk.{layers}.{known or INSIDE[leaf]}"
    return f"blk.{index}.{INSIDE[leaf]}"


def read(file: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """The format and the numbers of every tensor, in the shape of PyTorch."""
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        values = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        found[tensor.name] = (tensor.tensor_type.name, torch.tensor(values).reshape(shape))
    return found


def expected(name: str, value: torch.Tensor, groups: int) -> torch.Tensor:
    if name.endswith("A_log"):
        return -torch.exp(value.float()).unsqueeze(1)
    if name.endswith("mixer.D"):
        return value.float().unsqueeze(1)
    if name.endswith("conv1d.weight"):
        return value.float().squeeze(1)
    if name.endswith("mixer.norm.weight"):
        return value.float().view(groups, -1)
    return value.float()


@pytest.mark.parametrize(
    ("own", "asked", "format"),
    [
        (torch.float32, None, "F32"),
        (torch.bfloat16, None, "BF16"),
        (torch.float16, None, "F16"),
        (torch.float64, None, "F32"),
        (torch.float32, torch.bfloat16, "BF16"),
        (torch.bfloat16, torch.float16, "F16"),
        (torch.float16, torch.float32, "F32"),
    ],
)
@pytest.mark.parametrize("changes", [{}, {"pattern": "M-*M", **NO_MTP}, {"moe_latent_size": None}])
def test_every_tensor_is_ours(
    own: torch.dtype, asked: torch.dtype | None, format: str, changes: dict[str, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    model = small_model(dtype=own, **changes)
    to_gguf(model, tmp_path / "model.gguf", dtype=asked)
    found, state = read(tmp_path / "model.gguf"), model.state_dict()
    layers = model.config.num_layers
    assert {name_in_file(name, layers) for name in state} == set(found)
    narrow = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[format]
    for name, value in state.items():
        kind, values = found[name_in_file(name, layers)]
        wide = "gate" in name or "conv1d" in name or expected(name, value, 2).ndim == 1
        wide |= name.endswith(("A_log", "mixer.D", "mixer.norm.weight"))
        assert kind == ("F32" if wide else format), name
        wanted = expected(name, value, 2)
        if not wide:
            wanted = value.to(narrow).float()
        assert torch.equal(values, wanted), name


def test_every_matrix_of_lite_fits_nvfp4() -> None:
    """Rows of whole blocks, also in the MTP module, and in dense layers of lite's width."""
    config = NemotronConfig.from_preset("lite")
    for pattern in (config.pattern, "M-*-"):
        model = Nemotron(config.replace(pattern=pattern), device="meta")
        matrices = {
            name: tuple(value.shape)
            for name, value in model.named_parameters()
            if value.ndim > 1 and "conv1d" not in name
        }
        ragged = {name: s for name, s in matrices.items() if s[-1] % NVFP4_BLOCK}
        assert matrices
        assert ragged == {}


@pytest.mark.parametrize("pattern", ["M*E", "M*-"])
def test_packed_weights_keep_their_codes(pattern: str, tmp_path: Path) -> None:
    model = packed_model(pattern)
    to_gguf(model, tmp_path / "model.gguf", unpack=True)
    found = read(tmp_path / "model.gguf")
    kept = 0
    for name, module in model.named_modules():
        if not isinstance(module, PackedWeight):
            continue
        whole = name if len(module.shape) == 3 else f"{name}.weight"
        target = name_in_file(whole, model.config.num_layers)
        kind, values = found[target]
        stack = range(module.shape[0]) if len(module.shape) == 3 else [None]
        ours = torch.stack([module.decode(torch.float32, e) for e in stack]).view(module.shape)
        if "latent" in name:
            assert kind == "F32"
            assert torch.equal(values, ours)
            continue
        scale = found[target.removesuffix("weight") + "scale"][1]
        assert kind == "NVFP4"
        assert scale.tolist() == module.weight_scale_2.reshape(-1).tolist()
        scale = scale.view(-1, *[1] * (len(module.shape) - 1)) if len(scale) > 1 else scale
        torch.testing.assert_close(values * scale, ours, rtol=3e-7, atol=0)
        kept += 1
    assert kept == (7 if pattern == "M*E" else 5)


def test_a_packed_folder_gives_the_same_file(tmp_path: Path) -> None:
    """Saved in ModelOpt's layout, loaded packed, exported: no code changes on the way."""
    model = packed_model()
    save(model, tmp_path / "model")
    to_gguf(model, tmp_path / "one.gguf", unpack=True)
    loaded = load(tmp_path / "model", packed=True)
    to_gguf(loaded, tmp_path / "two.gguf", unpack=True)
    one, two = read(tmp_path / "one.gguf"), read(tmp_path / "two.gguf")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name][1], two[name][1]) for name in one)
    to_gguf(load(tmp_path / "model"), tmp_path / "three.gguf")
    assert {kind for kind, _ in read(tmp_path / "three.gguf").values()} == {"F32"}


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def test_keys_describe_the_model(tmp_path: Path) -> None:
    model = small_model()
    model.companion_files["chat_template.jinja"] = b"{{ messages[0].content }}"
    model.companion_files["generation_config.json"] = b'{"eos_token_id": [3, 0, 7]}'
    to_gguf(model, tmp_path / "model.gguf", dtype=torch.bfloat16)
    found, c = fields(tmp_path / "model.gguf"), model.config
    assert found["general.architecture"] == "nemotron_h_moe"
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    own = {name.removeprefix("nemotron_h_moe."): value for name, value in found.items()}
    assert own["block_count"] == 6
    assert own["nextn_predict_layers"] == 1
    assert own["attention.head_count_kv"] == [0, 0, 0, 2, 0, 2]
    assert own["feed_forward_length"] == [0, 24, 0, 0, 24, 24]
    assert own["expert_gating_func"] == gguf.ExpertGatingFuncType.SIGMOID
    assert own["moe_latent_size"] == c.moe_latent_size
    assert math.isclose(own["attention.layer_norm_rms_epsilon"], c.norm_eps, rel_tol=1e-6)
    assert (own["ssm.inner_size"], own["ssm.time_step_rank"], own["ssm.group_count"]) == (64, 8, 2)
    tokens = found["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in (0, 1, 35)] == ["<|endoftext|>", "Ċ", "A"]
    types = found["tokenizer.ggml.token_type"]
    assert types[:2] == [gguf.TokenType.CONTROL, gguf.TokenType.NORMAL]
    stops = ("eos_token_id", "eot_token_id", "eom_token_id")
    assert [found[f"tokenizer.ggml.{name}"] for name in stops] == [3, 0, 7]
    assert found["tokenizer.chat_template"] == "{{ messages[0].content }}"


def test_a_model_without_experts_has_its_own_architecture(tmp_path: Path) -> None:
    to_gguf(small_model(pattern="M*-", **NO_MTP), tmp_path / "model.gguf")
    found = fields(tmp_path / "model.gguf")
    assert found["general.architecture"] == "nemotron_h"
    assert not any("expert" in name or "nextn" in name for name in found)


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer of the library gets each array when it is to be written, and keeps none."""
    made: list[int] = []
    write = gguf.GGUFWriter.write_tensor_data

    def record(self: gguf.GGUFWriter, tensor: np.ndarray, *more: Any) -> None:
        assert all(info.tensor is None for info in self.tensors[0].values())
        made.append(tensor.nbytes)
        write(self, tensor, *more)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", record)
    model = small_model()
    to_gguf(model, tmp_path / "model.gguf", dtype=torch.bfloat16)
    assert len(made) == len(model.state_dict())
    assert sum(made) < (tmp_path / "model.gguf").stat().st_size


def test_wrappers_and_other_memory_layouts_change_nothing(tmp_path: Path) -> None:
    model = small_model()
    to_gguf(model, tmp_path / "plain.gguf")
    with torch.no_grad():
        weight = model.lm_head.weight
        model.lm_head.weight = torch.nn.Parameter(weight.t().contiguous().t())
    wrapped: torch.nn.Module = torch.optim.swa_utils.AveragedModel(model)
    to_gguf(wrapped, tmp_path / "wrapped.gguf")
    assert isinstance(model, Nemotron)
    one, two = read(tmp_path / "plain.gguf"), read(tmp_path / "wrapped.gguf")
    assert all(torch.equal(one[name][1], two[name][1]) for name in one)
