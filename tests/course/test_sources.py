"""The source shown is the code that runs, also behind decorators and properties."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import pytest

from nemotron_lite import NemotronConfig, ops
from nemotron_lite.course import show_source
from nemotron_lite.course.sources import source_of
from nemotron_lite.layers.mamba2 import Mamba2
from tests.course.conftest import Shown


def test_a_function_is_shown_without_its_docstring(shown: Callable[..., Shown]) -> None:
    seen = shown(show_source, ops.selective_scan)
    assert seen.plain.startswith("def selective_scan(")
    assert '"""' not in seen.plain
    assert "state = keep[..., None, None] * state" in seen.plain
    assert seen.bundles[0]["text/markdown"].startswith("`nemotron_lite/ops/scan.py`")
    compile(seen.plain, "shown", "exec")


def test_the_docstring_on_request() -> None:
    assert '"""' in source_of(ops.selective_scan, docstring=True)[0]


def test_methods_classes_and_properties() -> None:
    assert source_of(Mamba2.forward)[0].startswith("def forward(")
    assert source_of(Mamba2)[0].startswith("class Mamba2(")
    assert "def num_layers" in source_of(NemotronConfig.num_layers)[0]
    assert source_of(functools.partial(ops.selective_scan, D=None))[0].startswith("def selective")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_triton_kernel() -> None:
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    from nemotron_kernels import conv

    kinds = (JITFunction, InterpretedFunction)
    kernel = next(v for v in vars(conv).values() if isinstance(v, kinds))
    source, where = source_of(kernel)
    assert "@triton.jit" in source
    assert where == "nemotron_kernels/conv.py"


def test_the_code_stands_in_a_block_of_python(shown: Callable[..., Shown]) -> None:
    seen = shown(show_source, ops.selective_scan)
    _, _, block = seen.bundles[0]["text/markdown"].partition("\n\n")
    assert block == f"```python\n{seen.plain}\n```"


def test_the_answer_to_an_exercise_is_folded(shown: Callable[..., Shown]) -> None:
    seen = shown(show_source, ops.selective_scan, folded="Compare with *yours*")
    line, source = seen.plain.split("\n", 1)
    assert line == "Compare with *yours* · nemotron_lite/ops/scan.py"
    assert seen.bundles[0]["text/markdown"] == (
        "<details><summary>Compare with <i>yours</i> · <code>nemotron_lite/ops/scan.py</code>"
        f"</summary>\n\n```python\n{source}\n```\n\n</details>"
    )


def fenced() -> str:
    return "```"


def test_a_fence_in_the_code_does_not_end_the_block(shown: Callable[..., Shown]) -> None:
    assert "\n````python\ndef fenced()" in shown(show_source, fenced).bundles[0]["text/markdown"]


def only_a_docstring() -> None:
    """Nothing else."""


def test_a_body_that_is_only_a_docstring_keeps_it() -> None:
    assert '"""Nothing else."""' in source_of(only_a_docstring)[0]


@pytest.mark.parametrize("thing", [3, len, "ops.selective_scan"])
def test_what_has_no_source_is_reported(thing: object) -> None:
    with pytest.raises(TypeError, match="has no Python source to show"):
        show_source(thing)
