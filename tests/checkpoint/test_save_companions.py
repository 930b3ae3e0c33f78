"""What belongs to the model travels with it; what belongs to the folder stays there."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from nemotron_lite import CheckpointError, Nemotron, load, save
from tests.checkpoint.test_round_trip import tokenizer
from tests.checkpoint.test_save_atomic import contents
from tests.checkpoint.tiny import TINY

pytestmark = pytest.mark.usefixtures("no_fsync")
Make = Callable[..., Nemotron]
SMALL = TINY.replace(pattern="M", mtp_pattern="", mtp_depths=0)
SETTINGS = {
    "bos_token_id": 1, "eos_token_id": [2, 11], "pad_token_id": 0, "do_sample": True,
    "temperature": 1.0, "top_p": 0.95, "transformers_version": "5.23.0", "nested": {"a": [1, None]},
}  # fmt: skip
COMPANIONS = {
    "chat_template.jinja": "{% for m in messages %}{{ m }}{% endfor %}\n",
    "special_tokens_map.json": '{"eos_token": "</s>"}',
    "tokenizer_config.json": '{"chat_template": "{{ x }}", "extra": 1}',
    "added_tokens.json": "{}",
    "preprocessor_config.json": '{"do_resize": true}',
    "video_preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "chat_template.json": "{}",
    "generation_config.json": json.dumps(SETTINGS),
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
}
OF_THE_FOLDER = {
    "README.md": "a card",
    "LICENSE": "yours",
    "optimizer/state.pt": "moments",
    "super_v3_reasoning_parser.py": "import os",
    "additional_chat_templates/notes.txt": "mine",
}


def put(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def texts(folder: Path, names: Any) -> dict[str, str]:
    found = contents(folder)
    return {name: found[name].decode() for name in names if name in found}


@pytest.fixture
def released(tmp_path: Path, make: Make) -> Path:
    """A folder as a release has it."""
    save(make(SMALL), tmp_path / "a", tokenizer(128))
    put(tmp_path / "a", COMPANIONS | OF_THE_FOLDER)
    return tmp_path / "a"


def test_companions_travel_to_a_new_folder(released: Path, tmp_path: Path) -> None:
    save(load(released), tmp_path / "b")
    assert texts(tmp_path / "b", COMPANIONS) == COMPANIONS
    assert texts(tmp_path / "b", OF_THE_FOLDER) == {}
    save(load(tmp_path / "b"), tmp_path / "c")
    assert contents(tmp_path / "c") == contents(tmp_path / "b")


def test_everything_stays_in_the_same_folder(released: Path) -> None:
    model = load(released)
    save(model, released)  # config.json gets the end ids of generation_config.json
    before = contents(released)
    assert texts(released, COMPANIONS | OF_THE_FOLDER) == COMPANIONS | OF_THE_FOLDER
    save(load(released), released)
    assert contents(released) == before, "the model is the same, so every file is"


@pytest.mark.parametrize("name", sorted(COMPANIONS))
def test_a_file_that_was_edited_in_the_folder_stays(released: Path, name: str) -> None:
    model = load(released)
    edited = '{"temperature": 0.3}' if name.endswith(".json") else "edited"
    put(released, {name: edited})
    save(model, released)
    assert (released / name).read_text() == edited


@pytest.mark.parametrize("name", sorted(COMPANIONS))
def test_an_entry_that_was_changed_in_the_model_is_written(released: Path, name: str) -> None:
    model = load(released)
    model.companion_files[name] = b'{"top_k": 7}'
    save(model, released)
    assert (released / name).read_text() == '{"top_k": 7}'
    model.companion_files = dict(model.companion_files) | {name: b'{"top_k": 8}'}
    save(model, released)
    assert (released / name).read_text() == '{"top_k": 8}'


def test_a_copy_of_a_model_has_its_companions(released: Path, tmp_path: Path) -> None:
    model = load(released)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.companion_files == model.companion_files
        assert other.companion_files.as_loaded == model.companion_files.as_loaded
    assert Nemotron(SMALL).companion_files == {}
    assert Nemotron(SMALL).generation_config == {}
    assert model.generation_config == SETTINGS


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6},
        {"eos_token_id": 2, "top_p": 0.9},
        {"eos_token_id": [2], "top_k": 5},
        {"eos_token_id": [11, 2], "pad_token_id": 7, "bos_token_id": None},
        {"pad_token_id": 11, "do_sample": True, "eos_token_id": None},
        {},
    ],
)
def test_settings_of_generation_survive_load_and_save(
    released: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    put(released, {"generation_config.json": json.dumps(settings, indent=1)})
    model = load(released)
    eos = model.config.eos_token_id
    for folder in (released, tmp_path / "b"):
        save(model, folder)
        found = (folder / "generation_config.json").read_text()
        assert found == json.dumps(settings, indent=1), "not even its spelling changes"
        assert load(folder).config.eos_token_id == eos


def test_ids_that_were_changed_in_the_config_are_corrected(released: Path, tmp_path: Path) -> None:
    model = load(released)
    model.config = model.config.replace(eos_token_id=5, pad_token_id=9)
    for folder in (released, tmp_path / "b"):
        save(model, folder)
        found = json.loads((folder / "generation_config.json").read_text())
        assert found == SETTINGS | {"eos_token_id": 5, "pad_token_id": 9}
        assert load(folder).config == model.config


def test_ids_of_another_model_in_the_folder_are_corrected(released: Path, make: Make) -> None:
    model = make(SMALL.replace(eos_token_id=(3, 4)))
    save(model, released, tokenizer(128))
    found = json.loads((released / "generation_config.json").read_text())
    assert found == SETTINGS | {"eos_token_id": [3, 4]}


def test_a_new_model_writes_its_ids(tmp_path: Path, make: Make) -> None:
    save(make(SMALL.replace(eos_token_id=(3, 4))), tmp_path / "m")
    found = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert found == {"bos_token_id": 1, "eos_token_id": [3, 4], "pad_token_id": 0}


@pytest.mark.parametrize("content", ["{", "[]", "3", "\x00", "{" * 100_000, '{"a": NaN}'])
def test_damaged_settings_are_replaced_with_a_warning(
    tmp_path: Path, make: Make, content: str
) -> None:
    save(make(SMALL), tmp_path / "m")
    put(tmp_path / "m", {"generation_config.json": content})
    with pytest.warns(UserWarning, match=r"generation_config\.json .* replaced by a new one"):
        save(make(SMALL), tmp_path / "m")
    assert load(tmp_path / "m").generation_config["eos_token_id"] == 2


def test_a_companion_that_is_no_file_is_left_out_with_a_warning(released: Path) -> None:
    (released / "chat_template.jinja").unlink()
    os.mkfifo(released / "chat_template.jinja")
    (released / "added_tokens.json").unlink()
    (released / "added_tokens.json").symlink_to("nowhere")
    with pytest.warns(UserWarning, match=r"chat_template\.jinja is a named pipe"):
        model = load(released)
    assert {"chat_template.jinja", "added_tokens.json"}.isdisjoint(model.companion_files)
    save(model, released)


def test_files_of_another_tokenizer_go_with_it(released: Path, tmp_path: Path, make: Make) -> None:
    model = load(released)
    other = tokenizer(100)
    save(model, released, other)
    save(model, tmp_path / "b", other)
    for folder in (released, tmp_path / "b"):
        assert load(folder).tokenizer.get_vocab_size() == other.get_vocab_size()
        assert "extra" not in json.loads((folder / "tokenizer_config.json").read_text())
        assert not (folder / "special_tokens_map.json").exists()
        assert (folder / "chat_template.jinja").exists()
    save(model, tmp_path / "b")
    assert texts(tmp_path / "b", COMPANIONS) == COMPANIONS, "and come back with it"


def test_a_fast_tokenizer_of_transformers_is_one(tmp_path: Path, make: Make) -> None:
    class Fast:
        backend_tokenizer = tokenizer(128)

    from nemotron_lite.checkpoint.tokenizer import plain_tokenizer

    assert isinstance(plain_tokenizer(Fast()), Tokenizer)
    with pytest.raises(TypeError, match=r"tokenizer is a str: expected a tokenizers\.Tokenizer"):
        plain_tokenizer("gpt2")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"chat_template.jinja": "text"}, "is str: expected bytes"),
        ({3: b"x"}, "expected bytes under the name"),
        ({"../escape": b"x"}, "beside the weights"),
        ({"/etc/passwd": b"x"}, "beside the weights"),
        ({"": b"x"}, "beside the weights"),
        ({"a/b/c": b"x"}, "beside the weights"),
        ({"config.json": b"{}"}, "does not write itself"),
        ({"model.safetensors": b"x"}, "does not write itself"),
        ({"tokenizer.json": b"x"}, "does not write itself"),
        (None, "expected a dict"),
        ({"generation_config.json": b"[]"}, "expected an object"),
    ],
)
def test_wrong_entries_are_refused_before_anything_is_written(
    saved: Path, make: Make, files: Any, message: str
) -> None:
    before = contents(saved)
    model = make(TINY)
    model.companion_files = files
    with pytest.raises((TypeError, ValueError), match=message):
        save(model, saved)
    assert contents(saved) == before


def test_what_contradicts_the_new_weights_goes(quantized: Path, make: Make) -> None:
    """The declaration of formats, old shards and their index."""
    assert (quantized / "hf_quant_config.json").exists()
    save(make(TINY), quantized, max_shard_bytes=30_000)
    assert not (quantized / "hf_quant_config.json").exists()
    assert not (quantized / "model.safetensors").exists()
    first = set(contents(quantized))
    save(make(TINY), quantized, max_shard_bytes=60_000)
    assert not set(contents(quantized)) & {n for n in first if n.startswith("model-")}
    save(make(TINY), quantized)
    assert [n for n in contents(quantized) if "safetensors" in n] == ["model.safetensors"]
    assert load(quantized).config == TINY


@pytest.mark.parametrize("limit", [0, -1, 2.5, "5GB", True, None])
def test_a_wrong_size_of_shards_is_refused(saved: Path, make: Make, limit: Any) -> None:
    from nemotron_lite.arguments import integer

    with pytest.raises((TypeError, ValueError), match="max_shard_bytes"):
        integer("max_shard_bytes", limit, low=1)
    with pytest.raises(Exception, match="max_shard_bytes"):
        save(make(TINY), saved, max_shard_bytes=limit)


WIDE = [
    "gate.weight", "lm_head.weight", "A_log", "norm.weight", "experts.up_proj", "conv1d.weight",
]  # fmt: skip


@pytest.mark.parametrize("part", WIDE)
@pytest.mark.parametrize("main", [torch.bfloat16, torch.float16, torch.float32])
def test_mixed_dtypes_are_written_as_they_are(
    tmp_path: Path, make: Make, part: str, main: torch.dtype
) -> None:
    other = torch.float64 if main == torch.float32 else torch.float32
    model = make(TINY, dtype=main)
    for name, tensor in model.named_parameters():
        if part in name:
            tensor.data = tensor.data.to(other)
    save(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["torch_dtype"] == str(main).removeprefix("torch.")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    for name, tensor in stored.items():
        wide = part in name or (part.startswith("experts.") and "experts." in name and
                                "up_proj" in name and "shared" not in name)  # fmt: skip
        if "e_score_correction_bias" in name:
            continue
        assert tensor.dtype == (other if wide else main), name


def test_a_tokenizer_that_does_not_fit_is_refused(saved: Path, make: Make) -> None:
    before = contents(saved)
    with pytest.raises(CheckpointError, match="ids up to 199"):
        save(make(TINY), saved, tokenizer(200))
    assert contents(saved) == before
