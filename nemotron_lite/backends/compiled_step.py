"""The C code of decode_step.c: compiled on the machine that runs it, and called.

A decoding step of a small model is a thousand small operations, and calling an operation of PyTorch
takes longer than many of them. decode_step.c runs a token through all layers in one call. It has
no dependency but a C compiler, and is compiled in about two seconds, for exactly this CPU:

    compiler    `$CC`, or the first of cc, gcc and clang that is found
    flags       for the CPU's own instructions, and with OpenMP where the compiler has it
    file        in the cache folder, under a name made from the source, the flags and everything
                that the compiler says about itself and the CPU; later processes load it

It runs in the threads of PyTorch's own OpenMP library, which a process has loaded already. Two
libraries would both keep their threads waiting on the same cores.

The classes below are the structs of that file, field by field. They hold addresses of tensors, so
whoever fills them keeps the tensors alive and unchanged in size; layers/compiled_tokens.py does.

Source: measured. Left out: GPUs, gradients, dtypes other than float32 and BF16.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from nemotron_lite.files import atomic_file, cache_folder

SOURCE = Path(__file__).with_name("decode_step.c")
DTYPES = {torch.float32: (), torch.bfloat16: ("-DBF16",)}
# What -ffast-math allows, without its change of how the whole process rounds tiny numbers.
FLAGS = (
    "-O3", "-std=gnu11", "-shared", "-fPIC", "-fno-math-errno", "-fassociative-math",
    "-fno-signed-zeros", "-fno-trapping-math", "-freciprocal-math",
)  # fmt: skip
OPTIONAL = ("-march=native", "-fopenmp")  # left out where the compiler refuses them
SECONDS = 120  # for one call of the compiler

_lock = threading.Lock()


class NotCompiledError(RuntimeError):
    """The compiled code cannot run some layers or caches; the message says why."""


class CompilerError(NotCompiledError):
    """There is no compiled code here; the message says why."""


class LinearStruct(Structure):
    """A linear layer; without a matrix, a layer that does not exist."""

    _fields_ = [("matrix", c_void_p), ("bias", c_void_p), ("out", c_int64), ("in_", c_int64)]

    @classmethod
    def of(cls, layer: Any) -> LinearStruct:
        """The struct of a module with a `weight` `out in`, and perhaps a `bias` `out`."""
        bias = getattr(layer, "bias", None)
        return cls(
            address(layer.weight), bias if bias is None else address(bias), *layer.weight.shape
        )


class MixerStruct(Structure):
    """A mixer. `KIND` is its number in the C code."""

    KIND: ClassVar[int]

    def wide(self) -> int:
        """The largest number of float32 values that one row of activations needs at a time."""
        raise NotImplementedError

    def spare(self) -> int:
        """Values of a state that a thread copies."""
        return 0


class MambaStruct(MixerStruct):
    """A Mamba-2 mixer."""

    KIND = 0
    _fields_ = [
        ("in_proj", LinearStruct), ("out_proj", LinearStruct),
        *((name, c_void_p) for name in ("taps", "tap_bias", "A_log", "D", "dt_bias", "scales")),
        *((name, c_int64) for name in ("heads", "width", "groups", "state", "kernel")),
        *((name, c_double) for name in ("eps", "dt_low", "dt_high")),
    ]  # fmt: skip

    def wide(self) -> int:
        """The output of its first matrix."""
        return int(self.in_proj.out)

    def spare(self) -> int:
        """The state of a head."""
        return int(self.width * self.state)


class AttentionStruct(MixerStruct):
    """An attention mixer."""

    KIND = 1
    _fields_ = [
        *((name, LinearStruct) for name in ("q", "k", "v", "o")),
        *((name, c_int64) for name in ("heads", "kv_heads", "width")),
    ]

    def wide(self) -> int:
        """Queries, or keys and values."""
        return int(max(self.heads, 2 * self.kv_heads) * self.width)


class MoeStruct(MixerStruct):
    """Routed experts with their router, latent projections and shared expert."""

    KIND = 2
    _fields_ = [
        *((n, LinearStruct) for n in ("router", "fc1", "fc2", "shared_up", "shared_down")),
        *((name, c_void_p) for name in ("bias", "up", "down")),
        *((name, c_int64) for name in ("experts", "chosen", "hidden", "latent", "normalize")),
        ("scale", c_double),
    ]

    def wide(self) -> int:
        """All that has the same input; or the chosen experts; or scores and places of these."""
        same_input = self.experts + self.latent + self.shared_up.out
        chosen = self.chosen * max(self.hidden, self.latent)
        return int(max(same_input, chosen, 5 * self.chosen + self.experts))


class MlpStruct(MixerStruct):
    """A feed-forward mixer."""

    KIND = 3
    _fields_ = [("up", LinearStruct), ("down", LinearStruct)]

    def wide(self) -> int:
        """The hidden units."""
        return int(self.up.out)


class LayerStruct(Structure):
    """The norm before a mixer, and the mixer."""

    _fields_ = [("kind", c_int64), ("norm", c_void_p), ("eps", c_double), ("mixer", c_void_p)]


class StateStruct(Structure):
    """The cache of a layer, and where a draft leaves what `accept` needs."""

    _fields_ = [
        ("first", c_void_p), ("second", c_void_p), ("capacity", c_int64),
        *((name, c_void_p) for name in ("window", "x", "B", "dt")),
    ]  # fmt: skip


class CallStruct(Structure):
    """One call."""

    _fields_ = [
        ("layers", POINTER(LayerStruct)), ("states", POINTER(StateStruct)),
        *((name, c_void_p) for name in ("starts", "stream", "scratch")),
        *((n, c_int64) for n in ("count", "rows", "tokens", "d", "wide", "keys", "threads")),
    ]  # fmt: skip


def address(tensor: Tensor) -> int:
    """Where the numbers of a tensor are.

    Raises:
        NotCompiledError: they are not one after the other, or not in this computer's main memory.
    """
    if not tensor.is_cpu or not tensor.is_contiguous():
        shape = tuple(tensor.shape)
        raise NotCompiledError(f"a tensor {shape} on {tensor.device} is not contiguous there")
    return tensor.data_ptr()


def library(dtype: torch.dtype) -> Any:
    """The compiled code for weights of this dtype; its function is `decode_step`.

    Raises:
        CompilerError: there is no compiler, it refuses the source, or the file cannot be loaded.
    """
    with _lock:
        found = _load(dtype)
    if isinstance(found, CompilerError):
        raise found
    return found


@cache
def _load(dtype: torch.dtype) -> Any:
    """The library, or the reason why there is none: a compiler is asked once per process."""
    try:
        compiler = _compiler()
        flags = [*_accepted(compiler), *DTYPES[dtype]]
        file = _compiled(compiler, flags)
        loaded = ctypes.CDLL(str(file))
    except CompilerError as error:
        return error
    except OSError as error:
        return CompilerError(f"the compiled step cannot be kept or loaded here: {error}")
    loaded.decode_step.argtypes = [POINTER(CallStruct), c_int64]
    loaded.decode_step.restype = None
    return loaded


def _compiler() -> list[str]:
    """The command of a C compiler.

    Raises:
        CompilerError: none is found.
    """
    named = os.environ.get("CC", "")
    if named:
        command = shlex.split(named)
        if command and shutil.which(command[0]):
            return command
        raise CompilerError(f"CC={named!r} names no program that can be found")
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    raise CompilerError("there is no C compiler (cc, gcc or clang); install one, or set CC")


@cache
def _macros(command: tuple[str, ...]) -> str:
    """What the compiler defines: its version, and the instructions of the CPU it compiles for.

    Raises:
        CompilerError: it does not accept the flags.
    """
    return _run([*command, "-dM", "-E", "-x", "c", os.devnull])


def _accepted(compiler: list[str]) -> list[str]:
    """All flags that this compiler accepts."""
    flags = list(FLAGS)
    for flag in OPTIONAL:
        try:
            _macros((*compiler, *flags, flag))
        except CompilerError:
            continue
        flags.append(flag)
    return flags


def _compiled(compiler: list[str], flags: Sequence[str]) -> Path:
    """The file of the compiled code, made if it is not there.

    Raises:
        CompilerError: the source cannot be compiled.
        OSError: the file cannot be written.
    """
    known = [SOURCE.read_text(), *flags, _macros((*compiler, *flags))]
    key = hashlib.sha256("\0".join(known).encode()).hexdigest()[:16]
    folder = cache_folder()
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="nemotron-lite-"))
    file = folder / f"decode-step-{key}.so"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as temporary:
            _run([*compiler, *flags, str(SOURCE), "-o", str(temporary), "-lm"])
    return file


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SECONDS,
            env={**os.environ, "LC_ALL": "C"}, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"the compiler {command[0]} does not run: {error}") from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        why = said.strip()[:300] or f"exit status {done.returncode}"
        raise CompilerError(f"the compiler {command[0]} fails: {why}")
    return done.stdout
