"""`generate` and `stream` for their callers: kinds of prompts and results, options and defaults."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
import weakref
from contextlib import closing
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from nemotron_lite import GenerationOptions, SpeculationOptions, generate, stream
from nemotron_lite.cli import app
from nemotron_lite.cli.generate import generate as generate_command
from nemotron_lite.generation import prepared_weights
from nemotron_lite.generation.options import GenerationSettings, SamplingOptions
from nemotron_lite.generation.prompts import encode_prompts
from nemotron_lite.model import Nemotron
from tests.generation.speculative.conftest import GREEDY, SMALL
from tests.generation.text_models import text_model


@pytest.fixture(scope="module")
def model() -> Nemotron:
    """A random model that reads and writes text, some of it in characters of several bytes."""
    return text_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def bare() -> Nemotron:
    return Nemotron(SMALL, seed=1)


def test_what_comes_out_is_of_the_kind_that_went_in(model: Nemotron) -> None:
    texts = ["for value", "total"]
    ids = [model.tokenizer.encode(text).ids for text in texts]
    rows = generate(model, ids, 9, **GREEDY)
    assert [len(row) for row in rows] == [9, 9]
    assert generate(model, ids[0], 9, **GREEDY) == rows[0]
    assert generate(model, torch.tensor(ids[0]), 9, **GREEDY) == rows[0]
    assert generate(model, torch.tensor([ids[0]] * 2), 9, **GREEDY) == [rows[0]] * 2
    assert generate(model, tuple(map(tuple, ids)), 9, **GREEDY) == rows
    written = [model.tokenizer.decode(row) for row in rows]
    assert generate(model, texts, 9, **GREEDY) == written
    assert generate(model, texts[1], 9, **GREEDY) == written[1]
    assert generate(model, texts[:1], 9, **GREEDY) == written[:1]


@pytest.mark.parametrize("speculation", [None, SpeculationOptions(draft_length=3)])
def test_a_stream_gives_the_same_in_pieces(
    model: Nemotron, speculation: SpeculationOptions | None
) -> None:
    kind: dict[str, Any] = dict(temperature=1.5, top_p=None, seed=4, speculation=speculation)
    texts = ["for value", "total", "é"]
    steps = list(stream(model, texts, 25, **kind))
    joined = ["".join(pieces) for pieces in zip(*steps, strict=True)]
    assert joined == generate(model, texts, 25, **kind)
    assert "".join(stream(model, "for", 25, **kind)) == generate(model, "for", 25, **kind)
    assert list(stream(model, [3, 4], 9, **kind)) == generate(model, [3, 4], 9, **kind)


def test_rows_end_at_the_end_of_text_of_the_config(model: Nemotron) -> None:
    prompts = [[9], [10], [11]]
    free = generate(model, prompts, 12, seed=0, stop=())
    ends = (free[0][3], free[1][5])
    other = Nemotron(model.config.replace(eos_token_id=ends), seed=1)
    for row, whole in zip(generate(other, prompts, 12, seed=0), free, strict=True):
        first = min((whole.index(token) for token in ends if token in whole), default=11)
        assert row == whole[: first + 1]


def test_the_stop_token_is_an_id_but_no_text(model: Nemotron) -> None:
    ids = model.tokenizer.encode("for value").ids
    free = generate(model, ids, 20, **GREEDY)
    stop = [free[5]]
    row = generate(model, ids, 20, temperature=0, stop=stop)
    assert row[-1] == stop[0] and len(row) <= 6
    shown = generate(model, "for value", 20, temperature=0, stop=stop)
    assert shown == model.tokenizer.decode(row[:-1])
    assert "".join(stream(model, "for value", 20, temperature=0, stop=stop)) == shown


def test_an_empty_text_starts_with_bos(model: Nemotron) -> None:
    bos = [model.config.bos_token_id]
    assert generate(model, "", 5, **GREEDY) == model.tokenizer.decode(
        generate(model, bos, 5, **GREEDY)
    )


@pytest.mark.parametrize("prompts", ["text", ["text"]])
def test_text_needs_a_tokenizer(bare: Nemotron, prompts: Any) -> None:
    with pytest.raises(ValueError, match=r"'text' is text, but this model has no tokenizer.*give"):
        generate(bare, prompts, 3)


@pytest.mark.parametrize("prompts", [["a", [1]], [[1], "a"], [[1], 2], [[1.5]], [["a"]]])
def test_a_mixture_is_refused(model: Nemotron, prompts: Any) -> None:
    plain = getattr(encode_prompts, "__wrapped__", encode_prompts)  # without the check of types
    with pytest.raises(ValueError, match="and not a mixture"):
        plain(model, prompts)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (b"text", r"b'text' is of type bytes, which may be text or token ids: give text \(bytes"),
        ([b"text"], "b'text' is of type bytes"),
        (bytearray(b"text"), "is of type bytearray"),
        (torch.tensor([1.0, 2.0]), "the prompt 1.0 is not a list of token ids"),
        (np.array([[1.0, 2.0]]), r"the prompt \[1.0, 2.0\] is not a list of token ids"),
        (torch.tensor([True, False]), "the prompt True is not.*Token ids are integers"),
        (torch.tensor(3), "the prompt 3 is not a list of token ids"),
        (torch.zeros(1, 1, 1, dtype=torch.int64), r"the prompt \[\[0\]\] is not a list"),
        (3, "the prompt 3 is not a list of token ids"),
        (None, "the prompt None is not a list of token ids"),
        ({0: 1}, r"the prompt \{0: 1\} is not a list of token ids"),
        ([None], "the prompt None is not a list of token ids"),
        ([[1] * 500, "a"], "the prompt 'a' is not"),
        ([], "every prompt needs at least one token"),
        (torch.zeros(2, 0, dtype=torch.int64), "every prompt needs at least one token"),
    ],
)
def test_prompts_that_are_not_token_ids(model: Nemotron, prompts: Any, message: str) -> None:
    plain = getattr(encode_prompts, "__wrapped__", encode_prompts)  # without the check of types
    with pytest.raises(ValueError, match=message):
        plain(model, prompts)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64"])
def test_ids_of_any_integer_dtype(bare: Nemotron, dtype: str) -> None:
    rows = [[5, 6], [7, 8]]
    expected = generate(bare, rows, 5, **GREEDY)
    array, tensor = np.array(rows, dtype=dtype), torch.tensor(rows, dtype=getattr(torch, dtype))
    for prompts in (array, tensor, list(array), list(tensor)):
        assert generate(bare, prompts, 5, **GREEDY) == expected
    assert generate(bare, array[0], 5, **GREEDY) == expected[0]
    assert generate(bare, tensor[0], 5, **GREEDY) == expected[0]
    plain = getattr(encode_prompts, "__wrapped__", encode_prompts)  # without the check of types
    assert plain(bare, list(array[0])).rows == rows[:1]


@pytest.mark.parametrize("speculation", [None, SpeculationOptions(draft_length=3)])
def test_a_stream_can_be_closed(
    bare: Nemotron, speculation: SpeculationOptions | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[weakref.ref[Any]] = []
    empty_cache = Nemotron.empty_cache

    def remember(*args: Any, **kwargs: Any) -> Any:
        cache = empty_cache(*args, **kwargs)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(Nemotron, "empty_cache", remember)
    with closing(stream(bare, [3, 4], 9, speculation=speculation, **GREEDY)) as steps:
        first = next(steps)
        assert caches[0]() is not None
    assert first == generate(bare, [3, 4], 1, **GREEDY)[0]
    assert list(steps) == []
    assert caches[0]() is None, "the cache is freed"
    assert steps.statistics.seconds["prompt"] > 0
    steps.close()
    unread = stream(bare, [3, 4], 9, **GREEDY)
    unread.close()
    assert list(unread) == []


def test_options_as_keywords_and_together(model: Nemotron) -> None:
    options = GenerationOptions(max_new_tokens=6, temperature=0.7, seed=3, stop=())
    found = generate(model, [5], options=options)
    assert len(found) == 6
    assert found == generate(model, [5], max_new_tokens=6, temperature=0.7, seed=3, stop=())
    assert found[:4] == generate(model, [5], 4, options=options)
    assert found == generate(
        model,
        [5],
        options=GenerationOptions(stop=()).replace(max_new_tokens=6, temperature=0.7, seed=3),
    )
    with pytest.raises(TypeError, match="no option 'temprature'; its options are temperature"):
        generate(model, [5], temprature=0.7)
    assert GenerationOptions(stop=[3, 4]) == GenerationOptions(stop=(3, 4))
    assert hash(options) == hash(dataclasses.replace(options))


def test_the_keywords_of_generate_are_the_options() -> None:
    options = get_type_hints(GenerationOptions)
    del options["max_new_tokens"]  # an argument of its own
    assert get_type_hints(GenerationSettings) == options


def test_the_defaults_are_those_of_the_release_everywhere(model: Nemotron) -> None:
    """Temperature 1.0 and top_p 0.95, in the API and on the command line."""
    assert (SamplingOptions().temperature, SamplingOptions().top_p) == (1.0, 0.95)
    command = inspect.signature(generate_command).parameters
    for name in ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        assert command[name].default is None, "generation_config.json comes first (defaults.py)"
    assert command["prepare_weights"].default == GenerationOptions().prepare_weights
    for name in ("draft_length", "adaptive"):
        assert command[name].default == getattr(SpeculationOptions(), name)
    assert generate(model, [5], 9, seed=1) == generate(
        model, [5], 9, seed=1, temperature=1.0, top_p=0.95
    )


def test_the_command_passes_every_option_on(
    model: Nemotron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All options that `nemotron-lite generate` takes, each with another value than its default."""
    passed: list[GenerationOptions] = []

    def write(model: Nemotron, prompt: str, options: GenerationOptions) -> tuple[float, Any]:
        passed.append(options)
        return 1.0, None

    read: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "nemotron_lite.cli.generate.read_model",
        lambda path, dtype, packed: (
            read.append(dict(path=path, dtype=dtype, packed=packed)) or model
        ),
    )
    monkeypatch.setattr("nemotron_lite.cli.generate.write", write)
    fixed = ["generate", "--model", str(tmp_path), "--prompt", "x"]
    values: dict[str, tuple[list[str], Any]] = {
        "max_new_tokens": (["--max-new-tokens", "7"], 7),
        "temperature": (["--temperature", "0.3"], 0.3),
        "top_p": (["--top-p", "0.5"], 0.5),
        "top_k": (["--top-k", "11"], 11),
        "min_p": (["--min-p", "0.25"], 0.25),
        "repetition_penalty": (["--repetition-penalty", "1.5"], 1.5),
        "stop_strings": (["--stop", "a", "--stop", "b"], ("a", "b")),
        "compiled": (["--compiled"], True),
        "check_layers": (["--check-layers"], True),
        "seed": (["--seed", "5"], 5),
        "ssm_dtype": (["--ssm-dtype", "float16"], torch.float16),
        "prepare_weights": (["--no-prepare-weights"], False),
        "speculation": (
            ["--draft", "mtp", "--draft-length", "3", "--fixed"],
            SpeculationOptions(draft_length=3, adaptive=False),
        ),
    }
    flags = [flag for some, _ in values.values() for flag in some]
    others = ["--dtype", "bfloat16", "--packed"]
    result = CliRunner().invoke(app, [*fixed, *flags, *others])
    assert result.exit_code == 0, result.output
    stop = tuple(model.config.eos_token_ids)
    expected = GenerationOptions(**{name: value for name, (_, value) in values.items()})
    assert passed.pop() == expected.replace(stop=stop)
    assert read.pop() == dict(path=tmp_path, dtype="bfloat16", packed=True)
    known = {parameter.opts[0] for parameter in get_command(app).commands["generate"].params}
    known -= {"--prompt-file", "--json", "--samples", "--quiet", "--traceback"}  # tests/cli
    used = {argument for argument in [*fixed, *flags, *others] if argument.startswith("--")}
    spelled = {"--no-prepare-weights": "--prepare-weights", "--fixed": "--adaptive"}
    assert {spelled.get(flag, flag) for flag in used} == known
    # Only these cannot be chosen on the command line.
    assert {field.name for field in dataclasses.fields(GenerationOptions)} - values.keys() == {
        "stop",
        "logits_processors",
        "logprobs",
        "prefill_segment",
    }
    CliRunner().invoke(app, fixed)
    assert passed.pop() == GenerationOptions(seed=0, stop=stop)
    # What is not given comes from the model's generation_config.json.
    settings = {"top_k": 20, "temperature": 0.5, "max_new_tokens": 9}
    files = {"generation_config.json": json.dumps(settings).encode()}
    monkeypatch.setattr(model, "companion_files", files)
    CliRunner().invoke(app, [*fixed, "--temperature", "0.25", "--top-k", "0"])
    assert passed.pop() == GenerationOptions(
        seed=0, stop=stop, top_k=None, temperature=0.25, max_new_tokens=9
    )


def test_the_command_line_reads_the_defaults_without_torch() -> None:
    program = "import sys, nemotron_lite.generation.options; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0


def test_sampling_without_a_seed_leaves_the_random_state_alone(model: Nemotron) -> None:
    before = torch.get_rng_state()
    generate(model, [5], 3)
    assert torch.equal(before, torch.get_rng_state())


def test_weights_are_prepared_where_it_pays(
    bare: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[Nemotron] = []
    monkeypatch.setattr(Nemotron, "prepare_for_decoding", lambda self: prepared.append(self))
    most = prepared_weights.MIN_TOKENS
    faster = False
    monkeypatch.setattr(prepared_weights, "prefers_prepacked", lambda rows, numel: faster)
    generate(bare, [1], most, **GREEDY)
    assert not prepared, "the copy is no faster here"
    faster = True
    generate(bare, [1], most - 1, **GREEDY)
    generate(bare, [1], most, prepare_weights=False, **GREEDY)
    assert not prepared
    steps = stream(bare, [1], most, **GREEDY)
    assert not prepared, "the first step has not been asked for"
    next(steps)
    assert prepared == [bare]
    generate(bare, [1], most, **GREEDY)
    assert prepared == [bare, bare]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_a_prepared_model_writes_the_same_and_follows_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Text of weights that change between two calls is that of a model that was never prepared."""
    for module in (prepared_weights, sys.modules["nemotron_lite.layers.linear"]):
        monkeypatch.setattr(module, "prefers_prepacked", lambda rows, numel: True)
    whole = Nemotron.prepare_for_decoding
    monkeypatch.setattr(Nemotron, "prepare_for_decoding", lambda self: whole(self, smallest=1))
    one, other = Nemotron(SMALL, seed=1), Nemotron(SMALL, seed=1)
    for _ in range(2):
        assert generate(one, [3, 4], 40, **GREEDY) == generate(
            other, [3, 4], 40, prepare_weights=False, **GREEDY
        )
        assert one.lm_head._prepacked is not None and other.lm_head._prepacked is None
        for model in (one, other):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.3)


OPEN_STREAMS = """
import gc
from nemotron_lite import SpeculationOptions, stream
from tests.modules import every_kind

model = every_kind()
kinds = [{}, {"speculation": SpeculationOptions()}, {"check_layers": True}]
streams = [stream(model, [1, 2, 3], 20, stop=(), **kind) for kind in kinds for _ in range(3)]
caches = [model.empty_cache(2, mtp=True) for _ in kinds]
streams += [
    stream(model, [[1, 2], [3]], 20, stop=(), cache=cache, **kind)
    for kind, cache in zip(kinds, caches)
]
streams += [stream(model, [1, 2, 3], 20)]  # the last one is not begun
for each in streams[:-1]:
    print(next(each), flush=True)
gc.disable()
cycle = stream(model, [1, 2, 3], 20, stop=())
next(cycle)
cycle.itself = cycle
"""


def test_streams_that_are_open_when_the_program_ends_say_nothing() -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", OPEN_STREAMS]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    assert len(run.stdout.splitlines()) == 12
