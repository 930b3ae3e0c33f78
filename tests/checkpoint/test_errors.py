"""A damaged folder: one error that lists everything that is wrong and how to repair it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron_lite import CheckpointError, Nemotron, NemotronConfig, load, save
from tests.checkpoint.test_round_trip import tokenizer

Make = Callable[..., Nemotron]
GATE = "backbone.layers.1.mixer.gate.weight"
EXPERT = "backbone.layers.1.mixer.experts.3.up_proj.weight"


def message(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        load(folder, **options)
    assert str(folder) in str(error.value)
    assert all(problem.splitlines()[-1] in str(error.value) for problem in error.value.problems)
    return str(error.value)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def sharded(tmp_path: Path, tiny: NemotronConfig, make: Make) -> Path:
    save(make(tiny), tmp_path / "shards", max_shard_bytes=40_000)
    return tmp_path / "shards"


def test_missing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "hf download" in message(tmp_path / "nothing")
    assert "`hf download nvidia/nothing --local-dir DIR`" in message(Path("nvidia/nothing"))
    monkeypatch.chdir(tmp_path)
    assert "trains a small model and saves it as runs/small" in message(Path("runs/lite"))


def test_a_file_instead_of_the_folder(saved: Path) -> None:
    assert f"give the folder that holds it, {saved}" in message(saved / "model.safetensors")


def test_folder_renamed_by_an_interrupted_save(saved: Path) -> None:
    old = saved.parent / f".{saved.name}.old-1234"
    saved.rename(old)
    assert str(old) in message(saved)


def test_the_folder_of_a_run_names_its_model(saved: Path) -> None:
    run = saved.parent / "run"
    run.mkdir()
    saved.rename(run / "model")
    assert f"this is the folder of a run; its model is in {run / 'model'}" in message(run)


def test_empty_folder_lists_both_files(tmp_path: Path) -> None:
    text = message(tmp_path)
    assert "2 problems" in text
    assert "config.json is missing; copy it" in text
    assert "neither model.safetensors nor model.safetensors.index.json" in text


def test_config_that_is_not_json(saved: Path) -> None:
    (saved / "config.json").write_text('{"model_type": ')
    text = message(saved)
    assert "config.json is no readable JSON" in text
    assert "download or copy it again" in text
    (saved / "config.json").write_text("[]")
    assert "config.json holds an array, expected an object" in message(saved)


def test_unsupported_config_and_truncated_weights_in_one_error(saved: Path) -> None:
    edit_config(saved, sliding_window=4096, tie_word_embeddings=True)
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[:-100])
    text = message(saved)
    assert "sliding_window is 4096" in text
    assert "tie_word_embeddings" in text
    assert f"truncated: it has {len(data) - 100:,} of {len(data):,} bytes" in text


def test_a_folder_with_pickles_only(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    assert "safe_serialization=True" in message(saved)


@pytest.mark.parametrize("name", ["chat.safetensors", "chat.bin", "chat.pt"])
def test_a_folder_with_a_saved_cache_only(
    name: str, saved: Path, tiny: NemotronConfig, make: Make
) -> None:
    """It is no pickle and no shard."""
    (saved / "model.safetensors").rename(saved / "elsewhere")
    make(tiny).empty_cache(1).save(saved / name)
    text = message(saved)
    assert f"there is {name}: a cache that `Cache.save` wrote" in text
    assert "pickle" not in text
    assert "index is missing" not in text
    assert "`Cache.load` opens it" in message(saved / name)
    (saved / "old.bin").write_bytes(b"no safetensors")
    assert "there is old.bin: pickle files" in message(saved)


def test_shards_without_their_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    text = message(sharded)
    assert "model-00001-of-" in text
    assert "the index is missing" in text


def test_missing_shards_are_all_named(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*"))
    shards[0].unlink()
    shards[2].unlink()
    text = message(sharded)
    assert f"2 of {len(shards)} files" in text
    assert shards[0].name in text
    assert shards[2].name in text


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_index_without_a_map(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "no weight_map" in message(sharded)


def test_index_with_a_file_outside_the_folder(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../secret.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside the folder: 1 name, ../secret.safetensors" in message(sharded)


def test_index_of_another_checkpoint(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["backbone.layers.9.norm.weight"] = index["weight_map"]["lm_head.weight"]
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    text = message(sharded)
    assert "lists tensors that are not in the files it names: 1 tensor, " in text
    assert "backbone.layers.9.norm.weight" in text


@pytest.mark.parametrize("keep", [0, 5, 8, 200])
def test_truncated_header(saved: Path, keep: int) -> None:
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[:keep])
    text = message(saved)
    assert "no readable safetensors file" in text
    assert "download or copy it again" in text


def test_every_truncated_shard_is_named(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*"))
    for shard in shards[:2]:
        shard.write_bytes(shard.read_bytes()[:-1])
    text = message(sharded)
    assert all(f"{shard.name} is truncated" in text for shard in shards[:2])


def test_lfs_pointer(saved: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n"
    (saved / "model.safetensors").write_text(pointer)
    assert "git lfs pull" in message(saved)


def test_missing_unexpected_and_wrong_shapes_in_one_error(saved: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"], tensors[EXPERT]
        tensors["backbone.layers.0.mixer.rotary.inv_freq"] = torch.ones(3)
        tensors[EXPERT.replace(".3.", ".6.")] = torch.ones(24, 16)
        tensors[GATE] = torch.ones(5, 32)

    edit_weights(saved, change)
    text = message(saved)
    assert "3 problems" in text
    assert "lm_head.weight" in text
    assert EXPERT in text, "a single expert is named"
    assert "inv_freq" in text
    assert "experts.6.up_proj" in text, "an extra expert is named"
    assert f"{GATE} [5, 32] for [6, 32]" in text
    assert text.count(GATE) == 1, "a tensor with a wrong shape is not listed as missing too"


def test_a_wrong_name_is_both_missing_and_unexpected(saved: Path) -> None:
    edit_weights(saved, lambda t: t.update({"head.weight": t.pop("lm_head.weight")}))
    text = message(saved)
    assert "missing: 1 tensor, lm_head.weight" in text
    assert "not in the model that config.json describes: 1 tensor, head.weight" in text


def test_long_lists_are_shortened_with_a_count(saved: Path) -> None:
    edit_config(saved, n_routed_experts=60)
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        load(saved)


def test_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*"))[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file(load_file(second) | {name: tensors[name]}, second)
    text = message(sharded)
    assert f"{name} (in {first.name} and {second.name})" in text


def test_tensor_under_two_prefixes(saved: Path) -> None:
    other = "model.norm_f.weight"
    edit_weights(saved, lambda t: t.update({other: t["backbone.norm_f.weight"].clone()}))
    text = message(saved)
    assert "stored twice" in text
    assert other in text


@pytest.mark.parametrize("first", ["stack", "expert"])
def test_experts_stacked_and_one_by_one(sharded: Path, first: str) -> None:
    stem = "backbone.layers.1.mixer.experts"
    stack = {f"{stem}.up_proj": torch.ones(6, 24, 16)}
    shards = sorted(sharded.glob("model-*"))
    target = shards[0] if first == "stack" else shards[-1]
    save_file(load_file(target) | stack, target)
    text = message(sharded)
    assert "stored twice" in text
    assert f"{stem}.up_proj" in text


def test_mtp_lost_by_transformers(saved: Path) -> None:
    edit_weights(saved, lambda t: [t.pop(name) for name in list(t) if name.startswith("mtp.")])
    text = message(saved, mtp="require")
    assert 'load(path, mtp="drop")' in text
    assert "transformers drops it" in text
    with pytest.warns(UserWarning, match="hold none of its weights") as warned:
        assert load(saved).mtp is None
    assert len(warned) == 1
    assert load(saved, mtp="drop").mtp is None
    edit_weights(saved, lambda t: t.pop("lm_head.weight"))
    text = message(saved, mtp="require")
    assert 'load(path, mtp="drop")' in text, "also if other tensors are missing"
    assert "lm_head.weight" in message(saved), "the warning does not hide other missing tensors"


@pytest.mark.parametrize("call", ["load", "Nemotron.from_pretrained"])
def test_the_warning_names_the_line_of_the_caller(saved: Path, tmp_path: Path, call: str) -> None:
    """In a process of its own: the checks of types add calls between the two."""
    edit_weights(saved, lambda t: [t.pop(name) for name in list(t) if name.startswith("mtp.")])
    script = tmp_path / "caller.py"
    script.write_text(f"from nemotron_lite import Nemotron, load\n\n{call}({str(saved)!r})\n")
    root = Path(__file__).resolve().parents[2]
    code = f"import runpy, sys; sys.path.insert(0, {str(root)!r}); runpy.run_path({str(script)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"{script}:3: UserWarning" in run.stderr


def test_a_part_of_the_mtp_module_is_an_error(saved: Path) -> None:
    edit_weights(saved, lambda t: t.pop("mtp.layers.0.eh_proj.weight"))
    assert "mtp.layers.0.eh_proj.weight" in message(saved)


def test_mtp_that_the_config_does_not_mention(saved: Path) -> None:
    edit_config(saved, num_nextn_predict_layers=0)
    text = message(saved)
    assert "set num_nextn_predict_layers to 1" in text
    assert 'mtp="drop"' in text
    assert load(saved, mtp="drop").mtp is None


def test_shared_expert_in_the_weights_but_not_in_the_config(saved: Path) -> None:
    edit_config(saved, n_shared_experts=0)
    assert "n_shared_experts is 0, which transformers ignores" in message(saved)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["0.mixer.in_proj"], "set use_bias to true"),
        (["3.mixer.q_proj", "3.mixer.o_proj"], "set attention_bias to true"),
        (["4.mixer.up_proj", "1.mixer.shared_experts.up_proj"], "set mlp_bias to true"),
        (["1.mixer.fc1_latent_proj", "0.mixer.out_proj"], "set mlp_bias and use_bias to true"),
        (["1.mixer.experts.0.up_proj"], "Routed experts have no biases here"),
    ],
)
def test_biases_that_the_config_does_not_mention(saved: Path, names: list[str], words: str) -> None:
    biases = {f"backbone.layers.{name}.bias": torch.zeros(32) for name in names}
    edit_weights(saved, lambda tensors: tensors.update(biases))
    text = message(saved)
    assert words in text
    assert all(name in text for name in names)


def test_biases_that_the_config_promises(saved: Path) -> None:
    edit_config(saved, attention_bias=True, mtp_depths=2)
    text = message(saved)
    assert "missing: 4 tensors" in text
    assert "backbone.layers.3.mixer.q_proj.bias" in text


@pytest.mark.parametrize("sign", ["packed", "scale"])
def test_a_part_of_a_quantized_weight(saved: Path, sign: str) -> None:
    if sign == "packed":
        edit_weights(saved, lambda t: t.update({EXPERT: torch.ones(24, 8, dtype=torch.uint8)}))
        expected = "without weight_scale, weight_scale_2"
    else:
        scale = torch.ones(24, 1).to(torch.float8_e4m3fn)
        edit_weights(saved, lambda t: t.update({f"{EXPERT}_scale": scale}))
        expected = "weight_scale for a weight in F32"
    text = message(saved)
    assert expected in text
    assert EXPERT.removesuffix(".weight") in text


def test_integer_weights_are_refused(saved: Path) -> None:
    edit_weights(saved, lambda t: t.update({GATE: torch.ones(6, 32, dtype=torch.int64)}))
    text = message(saved)
    assert "of a dtype that is not supported" in text
    assert f"{GATE} (I64)" in text


def test_unknown_dtype_in_the_config(saved: Path) -> None:
    edit_config(saved, torch_dtype="float8_e4m3fn")
    text = message(saved)
    assert "expected one of float64, float32, float16, bfloat16" in text
    assert "load(path, dtype=...)" in text


def test_wrong_arguments(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype=torch\.int8.*torch\.bfloat16"):
        load(saved, dtype=torch.int8)


def test_broken_tokenizer(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is unreadable" in message(saved)


def test_saving_a_model_without_weights(tmp_path: Path, tiny: NemotronConfig) -> None:
    with torch.device("meta"):
        model = Nemotron(tiny)
    with pytest.raises(CheckpointError, match="the model has no weights"):
        save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_saving_another_model_s_tokenizer(tmp_path: Path, tiny: NemotronConfig, make: Make) -> None:
    with pytest.raises(
        CheckpointError, match="ids up to 128, but the model's vocabulary has only 128"
    ):
        save(make(tiny), tmp_path / "m", tokenizer(129))


def test_shard_size_limits(tmp_path: Path, tiny: NemotronConfig, make: Make) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        save(make(tiny), tmp_path / "m", max_shard_bytes=0)
