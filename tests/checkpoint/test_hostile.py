"""Folders that are damaged or made to harm: one short CheckpointError, at once.

A config of a few bytes must not describe a model that takes hours to list, and no file may hang,
fill the memory or end in an error of a library.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from nemotron_lite import CheckpointError, Nemotron, load, save
from nemotron_lite.checkpoint import storage_summary
from tests.checkpoint.modelopt_folder import as_modelopt, edit_config, message
from tests.checkpoint.tiny import TINY

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
LONGEST_MESSAGE = 4000
HUGE = 10**9


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """The processor time of the body is less than this.

    A size that is not bounded takes minutes. The limits leave room for a busy machine: its caches
    are shared, so that processor time grows too.
    """
    started = time.process_time()
    yield
    assert time.process_time() - started < seconds


def refused(folder: Path, seconds: float = 5.0) -> str:
    with within(seconds):
        text = message(folder)
    assert len(text) < LONGEST_MESSAGE, len(text)
    assert text.isprintable() or all(c.isprintable() or c == "\n" for c in text)
    return text


# --- sizes --------------------------------------------------------------------------------------

BOMBS: dict[str, dict[str, Any]] = {
    "a million experts": {"n_routed_experts": 10**6},
    "a billion experts": {"n_routed_experts": HUGE},
    "a billion experts of each token": {"n_routed_experts": HUGE, "num_experts_per_tok": HUGE},
    "a billion groups": {"n_routed_experts": HUGE, "n_group": HUGE // 2, "topk_group": 5},
    "a million layers": {"hybrid_override_pattern": "M" * 10**6, "num_hidden_layers": 10**6},
    "a million small layers": {
        "hybrid_override_pattern": "-" * 10**6, "num_hidden_layers": 10**6, "intermediate_size": 1,
    },
    "many names of layers": {
        "hybrid_override_pattern": None, "layers_block_type": ["moe"] * 10**5,
        "num_hidden_layers": 10**5,
    },
    "many wrong names": {"layers_block_type": ["x" * 50] * 10**5},
    "a million layers of MTP": {"mtp_hybrid_override_pattern": "*" * 10**6},
    "a billion depths": {"mtp_depths": HUGE},
    "a large vocabulary": {"vocab_size": 2**31 - 1},
    "a large width": {"hidden_size": 2**31 - 1},
    "a large width of heads": {"head_dim": HUGE},
    "many heads": {"num_attention_heads": HUGE, "num_key_value_heads": 1},
    "many heads of keys": {"num_attention_heads": HUGE, "num_key_value_heads": HUGE},
    "many heads of Mamba": {"mamba_num_heads": HUGE, "n_groups": HUGE},
    "a large state": {"ssm_state_size": HUGE},
    "a large convolution": {"conv_kernel": HUGE},
    "a large latent": {"moe_latent_size": HUGE},
    "large experts": {"moe_intermediate_size": HUGE},
    "a large shared expert": {"moe_shared_expert_intermediate_size": HUGE},
    "a large MLP": {"intermediate_size": HUGE},
    "all of them": {
        "hidden_size": HUGE, "vocab_size": HUGE, "n_routed_experts": HUGE,
        "moe_intermediate_size": HUGE, "head_dim": HUGE, "ssm_state_size": HUGE,
    },
    "400 digits": {"n_routed_experts": 10**399},
    "400 digits for a float": {"routed_scaling_factor": 10**399},
    "many ends": {"eos_token_id": list(range(10**5))},
    "a limit of 400 digits": {"time_step_limit": [0, 10**399]},
    "nested": {"eos_token_id": [[[[[]]]]], "hidden_size": {"a": [1] * 1000}},
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_sizes_are_bounded_by_what_the_files_hold(saved: Path, bomb: str) -> None:
    edit_config(saved, **BOMBS[bomb])
    (saved / "generation_config.json").unlink()  # its eos_token_id is preferred
    text = refused(saved)
    assert "1 problem" in text, text
    with within(5.0), pytest.raises(CheckpointError):
        storage_summary(saved)


def test_a_bomb_beside_large_files(tmp_path: Path) -> None:
    """What the files hold does not make room for a config of many small layers or experts."""
    config = TINY.replace(pattern="E-", vocab_size=400_000, hidden_size=16, mtp_pattern="",
                          mtp_depths=0)  # fmt: skip
    save(Nemotron(config, seed=0, dtype=torch.bfloat16), tmp_path / "m")
    edit_config(tmp_path / "m", hybrid_override_pattern="-" * 10**5, num_hidden_layers=10**5)
    assert "100,000 layers" in refused(tmp_path / "m")
    edit_config(
        tmp_path / "m", hybrid_override_pattern="E-", num_hidden_layers=2, n_routed_experts=300_000
    )
    text = refused(tmp_path / "m")
    assert "missing: 599,9" in text, "the experts are counted, not listed"


def test_the_size_is_only_checked_where_the_files_are_complete(saved: Path) -> None:
    """A shard that is missing is the problem, and not the size of the model."""
    save(load(saved), saved.parent / "shards", max_shard_bytes=20_000)
    for shard in sorted((saved.parent / "shards").glob("model-*"))[1:]:
        shard.unlink()
    text = refused(saved.parent / "shards")
    assert "files that are not in the folder" in text
    assert "describes a model of" not in text


# --- names --------------------------------------------------------------------------------------


def with_index(folder: Path, weight_map: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "a.safetensors")
    if weight_map is not None:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


NAMES = [
    "../../etc/passwd", "/etc/passwd", "..", ".", "", "a/../b", "b\\..\\c", "\0", "a\0b", "\ud800",
    "x" * 300, "\u00fc" * 200, "\x1b[2J\x1b[31mred", "a\nb", "model.safetensors/", "~", "%2e%2e",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_of_files_in_an_index(saved: Path, name: str) -> None:
    weight_map = dict.fromkeys(load_file(saved / "model.safetensors"), "a.safetensors")
    with_index(saved, {**weight_map, "lm_head.weight": name})
    text = refused(saved)
    assert INDEX in text
    text.encode()  # it can be printed


def test_hostile_names_of_tensors(saved: Path) -> None:
    names = ["\x1b[2J", "x" * 100_000, "a\nb", "backbone." * 5000, "experts.9.up_proj.weight",
             f"backbone.layers.1.mixer.experts.{'9' * 5000}.up_proj.weight",
             "backbone.layers.1.mixer.experts.-1.up_proj.weight",
             "backbone.layers.1.mixer.experts.\u0663.up_proj.weight"]  # fmt: skip
    save_file(
        load_file(saved / "model.safetensors") | {name: torch.ones(1) for name in names},
        saved / "model.safetensors",
    )
    text = refused(saved)
    assert "8 tensors" in text


def test_many_hostile_names(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    one = torch.ones(1)
    tensors |= {f"mtp.\u202e{i}\t{'y' * 200}": one.clone() for i in range(10_000)}
    tensors |= {f"backbone.{i}{'z' * 200}.weight_scale": one.clone() for i in range(10_000)}
    save_file(tensors, saved / "model.safetensors")
    text = refused(saved, seconds=5)
    assert "10,000 modules" in text


def test_an_index_of_many_entries(saved: Path) -> None:
    with_index(saved, {f"t{i}": "a.safetensors" for i in range(200_000)})
    assert "200,000 tensors" in refused(saved, seconds=5)


def test_an_index_of_many_files(saved: Path) -> None:
    with_index(saved, {f"t{i}": f"../{i}" if i % 2 else f"{i}" for i in range(100_000)})
    text = refused(saved, seconds=5)
    assert "50,000 names" in text
    assert "50,000 of 100,000 files" in text


# --- files --------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def sparse_with_a_header(path: Path) -> None:
    with path.open("wb") as file:
        file.write((1 << 38).to_bytes(8, "little"))
        file.truncate(1 << 40)


REPLACEMENTS: dict[str, Callable[[Path], Any]] = {
    "pipe": pipe,
    "folder": Path.mkdir,
    "device": lambda p: p.symlink_to("/dev/zero"),
    "dangling": lambda p: p.symlink_to("/nowhere/at/all"),
    "loop": lambda p: p.symlink_to(p),
    "sparse": sparse,
    "sparse with a header": sparse_with_a_header,
    "empty": lambda p: p.write_bytes(b""),
    "zeros": lambda p: p.write_bytes(bytes(1000)),
    "bytes": lambda p: p.write_bytes(bytes(range(256)) * 10),
    "brackets": lambda p: p.write_text("[" * 200_000),
    "braces": lambda p: p.write_text('{"a":' * 200_000),
    "digits": lambda p: p.write_text('{"vocab_size": ' + "9" * 10**6 + "}"),
    "NaN": lambda p: p.write_text('{"routed_scaling_factor": NaN}'),
    "null": lambda p: p.write_text("null"),
    "text": lambda p: p.write_text('"model"'),
    "surrogates": lambda p: p.write_text('{"model_type": "\\ud800"}'),
}
FILES = [CONFIG, "model.safetensors", INDEX, "generation_config.json", "hf_quant_config.json",
         "tokenizer.json"]  # fmt: skip


@pytest.mark.parametrize("kind", REPLACEMENTS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_something_else(quantized: Path, name: str, kind: str) -> None:
    if name == INDEX:
        with_index(quantized, None)
    (quantized / name).unlink(missing_ok=True)
    REPLACEMENTS[kind](quantized / name)
    if (name, kind) == ("generation_config.json", "NaN"):
        return  # covered by its own part: an unknown key does not matter, NaN is no JSON
    text = None
    with within(10.0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load(quantized)
        except CheckpointError as error:
            text = str(error)
    if text is None:
        assert kind in {"dangling", "surrogates", "loop"}, "a file that is read"
        assert name not in (CONFIG, "model.safetensors", INDEX)
    else:
        assert len(text) < LONGEST_MESSAGE
        assert name.removesuffix(".index.json") in text or kind == "surrogates"


HEADERS: dict[str, bytes] = {
    "overlap": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
    "hole": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
    "overflow": b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],'
    b'"data_offsets":[0,16]}}',
    "negative": b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}',
    "shape of text": b'{"a":{"dtype":"F32","shape":"2","data_offsets":[0,8]}}',
    "dtype": b'{"a":{"dtype":"F128","shape":[2],"data_offsets":[0,8]}}',
    "no offsets": b'{"a":{"dtype":"F32","shape":[2]}}',
    "one offset": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0]}}',
    "list": b"[1,2,3]",
    "nested": b'{"a":' * 100_000,
    "many dimensions": b'{"a":{"dtype":"F32","shape":['
    + b",".join([b"1"] * 100_000)
    + b'],"data_offsets":[0,4]}}',
    "metadata": b'{"__metadata__":{"a":1}}',
    "nothing": b"{}",
    "latin": b'{"\xff":{}}',
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_the_library_refuses(saved: Path, kind: str) -> None:
    header = HEADERS[kind]
    data = len(header).to_bytes(8, "little") + header + bytes(16)
    (saved / "model.safetensors").write_bytes(data)
    refused(saved)


def test_dimensions_that_no_tensor_has(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].reshape([1] * 60 + [128, 32])
    tensors["backbone.norm_f.weight"] = torch.tensor(1.0)
    tensors["backbone.layers.1.mixer.experts.3.up_proj.weight"] = torch.empty(0, 5)
    save_file(tensors, saved / "model.safetensors")
    assert "3 tensors" in refused(saved)


# --- tokenizer ----------------------------------------------------------------------------------


def test_a_tokenizer_of_another_model(saved: Path) -> None:
    Tokenizer(models.WordLevel({f"t{i}": i for i in range(129)}, "t0")).save(
        str(saved / "tokenizer.json")
    )
    assert "ids up to 128, but the vocabulary of config.json has only 128" in refused(saved)
    Tokenizer(models.WordLevel({f"t{i}": i for i in range(128)}, "t0")).save(
        str(saved / "tokenizer.json")
    )
    assert load(saved).tokenizer.get_vocab_size() == 128
    whole = json.loads((saved / "tokenizer.json").read_text())
    whole["model"]["vocab"]["t0"] = 2**40
    (saved / "tokenizer.json").write_text(json.dumps(whole))
    assert "tokenizer.json" in refused(saved)


# --- many damaged folders -----------------------------------------------------------------------

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, 10**300, 10**399, 0.5, -0.0,
    1e308, 5e-324, 4096.0, "", "x", "NaN", "M", "*E", "\ud800", "\0", "128", [], [None], [1, 2],
    [[]], ["M"], {}, {"a": 1}, {"__float__": "Infinity"}, {"__float__": []}, "y" * 10_000,
    [0] * 5_000, {"quant_algo": "NVFP4"}, {"text_config": {}}, {str(i): i for i in range(2_000)},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside, those of containers included."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in inner:
        if isinstance(each, (dict, list)):
            yield from places(each, (*path, key))
        else:
            yield (*path, key)


def mutated(content: Any, draw: random.Random) -> Any:
    """A copy in which one to three places are removed, replaced, renamed or moved."""
    content = json.loads(json.dumps(content))
    for _ in range(draw.randint(1, 3)):
        found = list(places(content))
        if not found:
            break
        *above, last = draw.choice(found)
        holder = content
        for key in above:
            holder = holder[key]
        action = draw.choice(["replace", "replace", "replace", "remove", "rename", "copy"])
        if action == "replace":
            holder[last] = draw.choice(VALUES)
        elif action == "remove":
            del holder[last]
        elif action == "rename" and isinstance(holder, dict):
            holder[str(draw.choice(VALUES))[:50]] = holder.pop(last)
        else:
            source = content
            for key in draw.choice(found):
                source = source[key]
            holder[last] = json.loads(json.dumps(source))
    return content


def damaged_text(text: str, draw: random.Random) -> bytes:
    """The text with a few bytes cut, changed or doubled."""
    data = bytearray(text.encode())
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data))
        action = draw.choice(["cut", "change", "double", "end"])
        if action == "cut":
            del data[at : at + draw.randint(1, 40)]
        elif action == "change":
            data[at] = draw.randrange(256)
        elif action == "double":
            data[at:at] = data[at : at + draw.randint(1, 200)]
        else:
            del data[at:]
        if not data:
            break
    return bytes(data)


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized folder with a tokenizer and an index, to be damaged again and again."""
    folder = tmp_path_factory.mktemp("undamaged") / "m"
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(100)}, "t0"))
    save(Nemotron(TINY, seed=0), folder, tokenizer)
    as_modelopt(folder)
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "a.safetensors")
    with_index(folder, weight_map)
    return folder


MUTATED = [CONFIG, INDEX, "hf_quant_config.json", "generation_config.json", "tokenizer.json"]


@pytest.mark.parametrize("name", MUTATED)
def test_mutated_files_load_or_end_in_one_kind_of_error(
    undamaged: Path, tmp_path: Path, name: str
) -> None:
    """40 values and 15 texts of each file; the generator is seeded, so a failure repeats."""
    folder = tmp_path / "m"
    shutil.copytree(undamaged, folder)
    original = (folder / name).read_text()
    messages: list[str] = []
    for seed in range(55):
        draw = random.Random(f"{name} {seed}")
        if seed < 40:
            content = json.dumps(mutated(json.loads(original), draw)).encode()
        else:
            content = damaged_text(original, draw)
        (folder / name).write_bytes(content)
        try:
            with within(10.0):
                load(folder, packed=bool(seed % 2))
        except CheckpointError as error:
            messages.append(str(error))
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {content[:300]!r}") from error
    assert len(messages) >= (20 if name != "generation_config.json" else 5)
    assert max(len(text.encode()) for text in messages) < 2 * LONGEST_MESSAGE
    (folder / name).write_text(original)
    load(folder)
