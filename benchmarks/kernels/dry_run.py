"""Compile what an ordinary call would launch, for any NVIDIA GPU, on a machine without a GPU.

Triton asks its driver which GPU there is. A fake driver that answers "sm_90" is enough: Triton then
specializes each kernel exactly as for a real launch (alignment, arguments equal to 1, block sizes)
and compiles it to machine code. With `warmup=True` the launch stops there.

    with compile_only(90) as compiled:
        causal_conv1d(torch.empty(...), ...)          # CPU tensors
    for kernel in compiled: print(resources(kernel))

TRITON_INTERPRET must be unset in the process. Tried with Triton 3.6.0, 3.7.1 and 3.9.0. Left out:
kernels that are chosen by reading the values of a tensor; the tensors of a dry run have none.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from nemotron_kernels import _compat

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes per block
# Matrix instructions, by the beginning of the PTX instruction.
MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\S*?\.(m\d+n\d+k\d+|kind::\w+)\S*")
TYPES = re.compile(r"\.(tf32|bf16|f16|e4m3|e5m2|e2m1|s8)\b")
# Operands with one scale per block: mxf4nvf4 is NVFP4, the others are the MX formats.
SCALED = re.compile(r"\bkind::(mx\w+)")


class _Driver:
    """The part of a driver that compiling needs."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        properties = {
            "max_shared_mem": SHARED_LIMIT.get(arch, 99 * 1024),
            "multiprocessor_count": 132,
        }
        self.utils = SimpleNamespace(get_device_properties=lambda _: properties)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # Triton caches compiled kernels per device, so each architecture is a device.
        return self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Any:
        """An autotuned kernel is compiled in every configuration, and the first one wins."""
        return lambda run, quantiles=None, **_: (run(), [1.0, 1.0, 1.0])[1]


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses of a GPU."""

    kernel: str
    warps: int
    registers: int  # per thread
    stack: int  # bytes per thread: spilled registers and local arrays
    shared: int  # bytes per block
    matrix: tuple[str, ...]  # kinds of matrix instructions
    wide: bool  # whether global memory is read 16 bytes at a time somewhere

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "matrix": list(self.matrix)}


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[list[Any]]:
    """In this context a Triton launch only compiles for `arch`; the list collects the kernels.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, so this process interprets kernels.
    """
    if _compat.INTERPRET:
        raise RuntimeError("TRITON_INTERPRET is set: this process cannot compile. Unset it first.")
    compiled: list[Any] = []
    run, before = JITFunction.run, driver._active

    def compile_kernel(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        kernel.asked = kwargs  # constants and options of the launch
        compiled.append(kernel)
        return kernel

    driver.set_active(_Driver(arch))
    JITFunction.run = compile_kernel
    _compat.set_dry_run(True)
    try:
        yield compiled
    finally:
        _compat.set_dry_run(False)
        JITFunction.run = run
        driver._active = before


def resources(kernel: Any) -> Resources:
    """Registers, stack and shared memory from the machine code, instructions from the PTX."""
    ptx = kernel.asm["ptx"]
    usage = _cuobjdump(kernel.asm["cubin"])
    return Resources(
        kernel=kernel.metadata.name,
        warps=kernel.metadata.num_warps,
        registers=_field(usage, "REG"),
        stack=_field(usage, "STACK"),
        shared=kernel.metadata.shared,
        matrix=tuple(sorted({_matrix_kind(m) for m in MATRIX.finditer(ptx)})),
        wide="ld.global.v4.b32" in ptx or bool(re.search(r"cp\.async\.\S+.*, 0x10[;,]", ptx)),
    )


def _matrix_kind(found: re.Match[str]) -> str:
    """For example "wgmma bf16", "mma tf32" or "tcgen05 mxf4nvf4"."""
    unit = found[1].split(".")[0]
    scaled = SCALED.search(found[0])
    if scaled:
        return f"{unit} {scaled[1]}"
    types = TYPES.findall(found[0])
    return f"{unit} {types[0] if types else found[2].removeprefix('kind::')}"


def _cuobjdump(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _field(usage: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no {name}:\n{usage}")
    return int(found[1])
