"""Saved weights are loaded bit for bit, in every layout, dtype and number of files."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from nemotron_lite import Nemotron, NemotronConfig, generate, load, save
from nemotron_lite.checkpoint.names import Destination, destination_of, hub_names
from nemotron_lite.config import PRESETS

Make = Callable[..., Nemotron]


def assert_same(one: Nemotron, other: Nemotron) -> None:
    assert one.config == other.config
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert theirs[name].dtype == tensor.dtype, name
        assert torch.equal(theirs[name], tensor), name


def on_disk(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, read by the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not set(part) & set(tensors)
        tensors |= part
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("limit", [10**9, 40_000, 1], ids=["one file", "shards", "a file each"])
def test_round_trip(
    tmp_path: Path, tiny: NemotronConfig, make: Make, dtype: torch.dtype, limit: int
) -> None:
    model = make(tiny, dtype=dtype)
    save(model, tmp_path / "m", max_shard_bytes=limit)
    assert_same(model, load(tmp_path / "m"))
    files = list((tmp_path / "m").glob("*.safetensors"))
    assert (len(files) == 1) == (limit == 10**9)
    if limit == 40_000:
        for file in files:
            tensors = load_file(file)
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            assert size <= limit or len(tensors) == 1


@pytest.mark.parametrize("name", PRESETS)
def test_file_names_of_tensors_map_back_in_every_preset(name: str) -> None:
    with torch.device("meta"):
        model = Nemotron(PRESETS[name])
    seen = set()
    for key, tensor in model.state_dict().items():
        for disk_name, expert in hub_names(key, tensor.shape[0]):
            assert destination_of(disk_name) == Destination(key, expert)
            for prefix in ("model.", "model.backbone."):
                other = disk_name.replace("backbone.", prefix, 1)
                assert destination_of(other) == Destination(key, expert)
            seen.add(disk_name)
    if name == "super":
        assert "backbone.layers.1.mixer.experts.511.down_proj.weight" in seen
        assert "mtp.layers.1.mixer.experts.0.up_proj.weight" in seen
        assert "mtp.layers.1.final_layernorm.weight" in seen


def test_the_hub_layout_is_written(saved: Path, tiny: NemotronConfig) -> None:
    tensors = on_disk(saved)
    e, f, latent = tiny.n_routed_experts, tiny.moe_intermediate_size, tiny.moe_latent_size
    assert tensors["backbone.layers.0.mixer.A_log"].shape == (tiny.mamba_num_heads,)
    assert tensors["backbone.layers.0.mixer.conv1d.weight"].shape == (tiny.conv_dim, 1, 4)
    for expert in range(e):
        stem = f"backbone.layers.1.mixer.experts.{expert}"
        assert tensors[f"{stem}.up_proj.weight"].shape == (f, latent)
        assert tensors[f"{stem}.down_proj.weight"].shape == (latent, f)
    assert tensors["mtp.layers.0.eh_proj.weight"].shape == (32, 64)
    assert not [name for name in tensors if name.endswith(("experts.up_proj", "experts.down_proj"))]
    with safe_open(saved / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}  # transformers refuses a file without


def test_every_tensor_starts_at_a_multiple_of_its_width(
    tmp_path: Path, tiny: NemotronConfig, make: Make
) -> None:
    """Three heads in bfloat16 take 6 bytes. A float32 bias after them must be aligned to 4."""
    model = make(tiny.replace(mamba_num_heads=3, n_groups=1), dtype=torch.bfloat16)
    save(model, tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0
    width = {"F32": 4, "BF16": 2}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % width[entry["dtype"]] == 0, name


def test_index_is_complete(tmp_path: Path, tiny: NemotronConfig, make: Make) -> None:
    save(make(tiny), tmp_path / "m", max_shard_bytes=40_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    tensors = on_disk(tmp_path / "m")
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for t in tensors.values()
    )
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "m" / file)


@pytest.mark.parametrize("prefix", ["model.", "model.backbone.", "backbone."])
@pytest.mark.parametrize("stacked", [False, True])
def test_other_tensor_names_are_read(
    saved: Path, tiny: NemotronConfig, make: Make, prefix: str, stacked: bool
) -> None:
    model = make(tiny)
    tensors = dict(model.state_dict()) if stacked else on_disk(saved)
    renamed = {k.replace("backbone.", prefix, 1): v.contiguous() for k, v in tensors.items()}
    save_file(renamed, saved / "model.safetensors")
    assert_same(model, load(saved))


def test_dtype_is_that_of_the_config_by_default(
    tmp_path: Path, tiny: NemotronConfig, make: Make
) -> None:
    model = make(tiny)
    save(model, tmp_path)
    half = load(tmp_path, dtype=torch.bfloat16)
    assert_same(model.to(torch.bfloat16), half)
    bias = half.state_dict()["backbone.layers.1.mixer.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    for key in ("dtype", "torch_dtype"):
        edited = {k: v for k, v in config.items() if k != "torch_dtype"} | {key: "bfloat16"}
        (tmp_path / "config.json").write_text(json.dumps(edited))
        assert_same(half, load(tmp_path))


def test_what_mamba_keeps_in_float32_comes_back_in_float32(
    tmp_path: Path, tiny: NemotronConfig, make: Make
) -> None:
    model = make(tiny, dtype=torch.bfloat16)
    for layer in model.backbone.layers:
        if layer.kind == "M":
            layer.mixer.A_log.data = layer.mixer.A_log.data.float() + 1e-6
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16", "the dtype of most weights"
    assert_same(model, load(tmp_path))


def test_bfloat16_bias_on_disk_is_widened(saved: Path) -> None:
    tensors = on_disk(saved)
    name = "backbone.layers.1.mixer.gate.e_score_correction_bias"
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, saved / "model.safetensors")
    bias = load(saved, dtype=torch.bfloat16).state_dict()[name]
    assert bias.dtype == torch.float32
    assert torch.equal(bias, tensors[name].float())


def test_a_loaded_model_trains_writes_and_saves_again(
    tmp_path: Path, tiny: NemotronConfig, make: Make
) -> None:
    model = make(tiny)
    save(model, tmp_path / "one")
    again = load(tmp_path / "one")
    tokens = torch.randint(128, (2, 20))
    assert not again.training
    assert torch.equal(model.eval()(tokens).logits, again(tokens).logits)
    assert generate(model, tokens, 8, temperature=0) == generate(again, tokens, 8, temperature=0)
    assert all(p.requires_grad for p in again.parameters())
    again(tokens).logits.square().mean().backward()
    assert again.backbone.layers[0].mixer.A_log.grad is not None
    save(again, tmp_path / "two")
    assert_same(model, load(tmp_path / "two"))


def test_load_and_save_under_the_names_of_transformers(saved: Path, tmp_path: Path) -> None:
    model = Nemotron.from_pretrained(saved, mtp="drop", dtype=torch.bfloat16)
    assert model.mtp is None
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "copy", max_shard_bytes=40_000)
    assert_same(model, load(tmp_path / "copy"))
    assert len(list((tmp_path / "copy").glob("model-*"))) > 1


def test_a_subclass_loads_as_itself(saved: Path) -> None:
    class Mine(Nemotron):
        pass

    model = Mine.from_pretrained(saved)
    assert type(model) is Mine and type(Nemotron.from_pretrained(saved)) is Nemotron
    assert_same(model, load(saved))


def test_from_pretrained_has_the_arguments_of_load() -> None:
    load_arguments, ours = (
        inspect.signature(function).parameters for function in (load, Nemotron.from_pretrained)
    )
    assert dict(load_arguments) == dict(ours)


def test_loading_does_not_change_the_random_state(saved: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load(saved)
    assert torch.equal(torch.rand(4), expected)


def test_mtp_can_be_left_out(saved: Path, tiny: NemotronConfig, make: Make) -> None:
    model = load(saved, mtp="drop")
    assert model.mtp is None
    assert model.config == tiny.replace(mtp_pattern="", mtp_depths=0)
    tokens = torch.randint(128, (1, 9))
    assert torch.equal(model(tokens).logits, make(tiny).eval()(tokens).logits)


def test_generation_config_decides_where_generation_ends(saved: Path) -> None:
    generation = json.loads((saved / "generation_config.json").read_text())
    (saved / "generation_config.json").write_text(
        json.dumps(generation | {"eos_token_id": [2, 11]})
    )
    model = load(saved)
    assert model.config.eos_token_ids == (2, 11)
    save(model, saved)
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == [2, 11]
    assert load(saved).config == model.config


def tokenizer(size: int) -> Tokenizer:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return words


def test_tokenizer_is_saved_and_loaded_with_the_model(
    tmp_path: Path, tiny: NemotronConfig, make: Make
) -> None:
    model = make(tiny)
    save(model, tmp_path / "without")
    assert load(tmp_path / "without").tokenizer is None
    save(model, tmp_path / "with", tokenizer(128))
    loaded = load(tmp_path / "with")
    assert loaded.tokenizer.encode("w5 w7").ids == [5, 7]
    save(loaded, tmp_path / "again")
    assert load(tmp_path / "again").tokenizer.to_str() == tokenizer(128).to_str()
    save(model, tmp_path / "again")
    assert load(tmp_path / "again").tokenizer is None, (
        "the tokenizer of the previous model must not stay"
    )


def test_truncation_and_padding_of_the_file_are_ignored(
    tmp_path: Path, tiny: NemotronConfig, make: Make
) -> None:
    words = tokenizer(128)
    words.enable_truncation(2)
    words.enable_padding(length=9)
    save(make(tiny), tmp_path, words)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    assert stored["truncation"] and stored["padding"]
    model = load(tmp_path)
    assert model.tokenizer.encode("w5 w7 w6").ids == [5, 7, 6]
    options = dict(temperature=0, stop=())
    ids = generate(model, [5, 7, 6], 4, **options)
    assert generate(model, "w5 w7 w6", 4, **options) == " " + model.tokenizer.decode(ids)


def test_tokenizer_opens_in_transformers(tmp_path: Path, tiny: NemotronConfig, make: Make) -> None:
    transformers = pytest.importorskip("transformers")
    save(make(tiny), tmp_path, tokenizer(128))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("w5 w7")["input_ids"] == [5, 7]


def test_files_are_strict_json(tmp_path: Path, tiny: NemotronConfig, make: Make) -> None:
    """JSON parsers of other languages do not accept Infinity."""
    config = tiny.replace(time_step_limit=(0.01, float("inf")))
    save(make(config), tmp_path, max_shard_bytes=40_000)

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    for file in tmp_path.glob("*.json"):
        json.loads(file.read_text(), parse_constant=refuse)
    assert load(tmp_path).config == config
