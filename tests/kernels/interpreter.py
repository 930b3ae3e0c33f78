"""Test-only patches of Triton's interpreter: for speed, for new numpy, and to find overflow.

All of them change private parts of Triton. They are optional, and test_interpreter.py checks that
the results are the same with and without them.

- `patch_once_per_launch`: at every nested `@triton.jit` call (such as `tl.sum` and `tl.sigmoid`),
  the interpreter replaces the functions of `triton.language` by its own again. This takes longer
  than the call. Once per launch and module is enough.
- `indices_from_arrays`: Triton 3.6 turns a runtime loop bound into an int with `int(array)`, which
  numpy 2.4 refuses for arrays of one element.
- `ends_of_loops`: a loop over a million tokens runs its first and its last iteration only, and
  counts in 32 bits as on a GPU. The interpreter counts in Python's integers, which never overflow.
- `overflow_is_an_error`: 32-bit integer arithmetic that overflows raises. On a GPU it wraps, and a
  kernel that multiplies an index by a stride in 32 bits reads and writes the wrong memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patched: set[int] | None = None


def patch_once_per_launch() -> None:
    """Patch each language module at most once per launch."""
    if getattr(interpreter.GridExecutor.__call__, "once", False):
        return
    whole_launch = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        global _patched
        _patched = set()
        try:
            # exp(100) is inf on a GPU too, without a warning.
            with np.errstate(over="ignore"):
                whole_launch(self, *args, **kwargs)
        finally:
            _patched = None

    def nested(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if _patched is None or module not in _patched:
            interpreter._patch_lang(self.fn)
            if _patched is not None:
                _patched.add(module)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    launch.once = True  # type: ignore[attr-defined]
    interpreter.GridExecutor.__call__ = launch
    interpreter.InterpretedFunction.__call__ = nested


def indices_from_arrays() -> None:
    """Let a tensor of one element be a loop bound, although numpy refuses `int(array)` for it."""
    patch = interpreter._patch_lang_tensor
    if getattr(patch, "from_arrays", False):
        return

    def index(self: Any) -> int:
        return int(np.asarray(self.handle.data).reshape(-1)[0])

    def patched(tensor: Any, *scope: Any) -> Any:
        result = patch(tensor, *scope)
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index
        return result

    patched.from_arrays = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched


@contextlib.contextmanager
def ends_of_loops(*modules: ModuleType) -> Iterator[None]:
    """Inside, `range` in the kernels of these modules yields first and last, as 32-bit tensors."""

    def ends(*bounds: Any) -> Iterator[tl.tensor]:
        numbers = range(*(int(bound) for bound in bounds))
        for number in dict.fromkeys((*numbers[:1], *numbers[-1:])):
            handle = interpreter.TensorHandle(np.array([number], dtype=np.int32), tl.int32)
            yield tl.tensor(handle, tl.int32)

    for module in modules:
        module.range = ends  # type: ignore[attr-defined]  # found before the built-in one
    try:
        yield
    finally:
        for module in modules:
            del module.range


@contextlib.contextmanager
def overflow_is_an_error() -> Iterator[None]:
    """Inside, 32-bit integers that overflow in a kernel raise instead of wrapping."""
    builder = interpreter.interpreter_builder
    before = builder.options
    builder.options = interpreter.InterpreterOptions(debug=True)
    try:
        yield
    finally:
        builder.options = before
