"""The types that a user's type checker reads: every result of the public interface has one.

mypy checks a small program in strict mode, as a user's project would, and says which types it sees.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """\
import torch
from nemotron_lite import Cache, Nemotron, NemotronConfig, generate, load, save, stream
from nemotron_lite.data import ConcatenatedDocuments
from nemotron_lite.train import TrainConfig, train


def use(path: str, tokens: torch.Tensor, data: ConcatenatedDocuments) -> None:
    config = NemotronConfig.from_preset("lite")
    reveal_type(config)
    reveal_type(config.hidden_size)
    reveal_type(Nemotron(config, seed=0))
    model = load(path)
    reveal_type(model)
    reveal_type(Nemotron.from_pretrained(path))
    reveal_type(model.device)
    cache = model.empty_cache(1)
    reveal_type(cache)
    reveal_type(cache.clone())
    reveal_type(Cache.load(path))
    out = model(tokens, cache, logits_to_keep=1)
    reveal_type(out)
    reveal_type(out.logits)
    reveal_type(model.forward_hidden(tokens).hidden)
    reveal_type(generate(model, "a", 5, temperature=0, cache=cache))
    reveal_type(generate(model, ["a"]))
    reveal_type(generate(model, [1]))
    reveal_type(generate(model, [[1], [2, 3]]))
    reveal_type(generate(model, tokens))
    reveal_type(generate(model, "a", num_samples=2))
    reveal_type(generate(model, "a", return_details=True))
    reveal_type(generate(model, [[1]], return_details=True))
    reveal_type(generate(model, ["a"], return_statistics=True))
    reveal_type(stream(model, "a", cache=cache))
    reveal_type(stream(model, ["a"]))
    reveal_type(next(stream(model, [1])))
    reveal_type(next(stream(model, [[1]])))
    result = train(model, data, TrainConfig(steps=1))
    reveal_type(result)
    reveal_type(result.step)
    save(model, path)
    model(tokens, chache=cache)
    load(3.5)
    generate(model, "a", temperatur=1)
    generate(model, "a", return_details=True, seed="x")
    stream(model, "a", return_details=True)
"""

_GENERATION = "nemotron_lite.generation"
_RESULT = f"{_GENERATION}.results.GenerationResult"

EXPECTED = [
    "nemotron_lite.config.NemotronConfig", "int", "nemotron_lite.model.Nemotron",
    "nemotron_lite.model.Nemotron", "nemotron_lite.model.Nemotron", "torch._C.device",
    "nemotron_lite.cache.Cache", "nemotron_lite.cache.Cache", "nemotron_lite.cache.Cache",
    "nemotron_lite.outputs.Output", "torch._tensor.Tensor", "torch._tensor.Tensor",
    "str", "list[str]", "list[int]", "list[list[int]]", "Any", "Any",
    _RESULT, f"list[{_RESULT}]", f"tuple[list[str], {_GENERATION}.statistics.Statistics]",
    f"{_GENERATION}.generate.TokenStream[str]", f"{_GENERATION}.generate.TokenStream[list[str]]",
    "int", "list[int | None]",
    "nemotron_lite.train.loop.TrainResult", "int",
]  # fmt: skip


def check(folder: Path, program: str) -> str:
    """What mypy says in strict mode, in a folder without the settings of this project."""
    (folder / "program.py").write_text(program)
    found = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=",
            f"--cache-dir={folder / 'cache'}", "program.py",
        ],
        cwd=folder,
        env=os.environ | {"MYPYPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert found.returncode in (0, 1), found.stdout + found.stderr
    return found.stdout


def test_a_users_program_sees_types_and_mistakes(tmp_path: Path) -> None:
    said = check(tmp_path, PROGRAM)
    seen = re.findall(r'Revealed type is "([^"]*)"', said)
    assert [re.sub(r"^builtins\.", "", kind) for kind in seen] == EXPECTED
    errors = re.findall(r"error: (.*?)  \[", said)
    for expected in (
        'Unexpected keyword argument "chache"',
        'incompatible type "float"',
        'Unexpected keyword argument "temperatur"',
        'No overload variant of "generate" matches argument types "Nemotron", "str", "bool", "str"',
        'Unexpected keyword argument "return_details"',
    ):
        assert any(expected in error for error in errors), said
    assert len(errors) == 7, said  # after an unexpected keyword: also that no overload matches


def test_the_package_says_that_it_has_types() -> None:
    """PEP 561: without the marker, mypy ignores the annotations of an installed package."""
    assert (ROOT / "nemotron_lite" / "py.typed").read_bytes() == b""
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in files["package-data"]["nemotron_lite"]
