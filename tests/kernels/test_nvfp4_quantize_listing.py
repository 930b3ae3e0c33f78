"""The compiled quantizer: the compiler changes no bit, and it uses few instructions per number.

Rounding by addition gives wrong bits if a product is fused into the addition, if small numbers are
flushed to zero, or if a quotient is not correctly rounded. The interpreter does none of these, so
only the compiled code can show them.

The time of quantizing depends on instructions as much as on memory. An H200 (132 multiprocessors,
128 lanes, 1.755 GHz) issues 31 instructions per number in the time in which 4.3 TB/s read the
number twice in 16 bits and write it in 4.5 bits. So the test counts instructions: the whole machine
code of a kernel, including its beginning and end, divided by the numbers per thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

COMPILE = r"""
import json, re, sys
import torch
from benchmarks.kernels.dry_run import compile_only
from nemotron_kernels import nvfp4_amax, nvfp4_fake_quantize, nvfp4_quantize
from nemotron_kernels.nvfp4_quantizer import ACROSS, ALONG

x, amax = torch.empty(1024, 4096, dtype=torch.bfloat16), torch.empty(())
runs = {
    "amax": lambda: nvfp4_amax(x),
    "rows": lambda: nvfp4_quantize(x, amax),
    "rows stochastic": lambda: nvfp4_quantize(x, amax, seed=1),
    "columns": lambda: nvfp4_quantize(x.mT, amax),
    "columns Hadamard": lambda: nvfp4_quantize(x.mT, amax, hadamard=True),
    "columns Hadamard stochastic": lambda: nvfp4_quantize(x.mT, amax, hadamard=True, seed=1),
    "square": lambda: nvfp4_fake_quantize(x, amax, block="16x16"),
}
listing = {}
for name, run in runs.items():
    with compile_only(int(sys.argv[1])) as compiled:
        run()
    (kernel,) = compiled
    config = (ACROSS[2] if name.startswith("columns") else ALONG)[80]
    threads = 32 * kernel.metadata.num_warps
    code = re.findall(r"^\S*:\S*\t(?:@!?U?P\w+ )?([A-Z][A-Z0-9]+)", kernel.asm["sass"], re.M)
    ptx = kernel.asm["ptx"]
    listing[name] = {
        "name": kernel.metadata.name,
        "fused": ptx.count("fma.rn"),
        "flushes": sorted(set(re.findall(r"\b\S+[.]ftz\S*", ptx))),
        "divisions": sorted(set(re.findall(r"\b(?:div|rcp)\.\w+\.f32", ptx))),
        "wide": bool(re.search(r"ld\.global\S*\.v4\.b32", ptx)),
        "native": len(re.findall(r"cvt.rn.satfinite.e2m1x2.f32", ptx)) * threads * 2,
        "machine": "F2FP.SATFINITE.E2M1" in kernel.asm["sass"],
        "fusion": kernel.metadata.enable_fp_fusion,
        "numbers": config["ROWS"] * config["COLUMNS"],
        "per number": len(code) * threads / (config["ROWS"] * config["COLUMNS"]),
        "code": len(code),
    }
print(json.dumps(listing))
"""

# Measured with Triton 3.7.1: on sm_90 7.2, 31.2, 43.7, 22.6, 29.4; on sm_100, which has an
# instruction for two codes, 7.2, 19.0, 38.5, 10.5, 17.7. (The disassembler stops after 4,096 lines,
# so the longest kernel is not listed here.)
MOST = {
    90: {"amax": 8, "rows": 33, "rows stochastic": 46, "columns": 24, "columns Hadamard": 31},
    100: {"amax": 8, "rows": 21, "rows stochastic": 41, "columns": 12, "columns Hadamard": 19},
}


@lru_cache
def _compiled(arch: int, environment: frozenset[tuple[str, str]]) -> dict[str, dict]:
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, str(arch)],
        cwd=ROOT,
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.fixture(params=MOST)
def arch(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def listing(arch: int, compiling_environment: dict[str, str]) -> dict[str, dict]:
    kept = {k: v for k, v in compiling_environment.items() if k != "PYTEST_CURRENT_TEST"}
    return _compiled(arch, frozenset(kept.items()))


def test_no_bit_is_changed_by_the_compiler(listing: dict[str, dict]) -> None:
    for name, kernel in listing.items():
        assert kernel["fused"] == 0 and not kernel["fusion"], name
        # floor() flushes small numbers; its input is a multiple of 2^-41, so none is lost.
        assert set(kernel["flushes"]) <= {"cvt.rmi.ftz.f32.f32"}, name
        assert kernel["divisions"] == ([] if name == "amax" else ["div.rn.f32"]), name


def test_blackwell_rounds_two_numbers_with_one_instruction(
    arch: int, listing: dict[str, dict]
) -> None:
    for name, kernel in listing.items():
        codes = arch >= 100 and kernel["name"].startswith("_nvfp4_quantize")
        assert kernel["native"] == (kernel["numbers"] if codes else 0), name
        if kernel["code"] < 4096:
            assert kernel["machine"] == codes, name


def test_memory_is_read_16_bytes_at_a_time(listing: dict[str, dict]) -> None:
    assert all(kernel["wide"] for kernel in listing.values())


def test_few_instructions_per_number(arch: int, listing: dict[str, dict]) -> None:
    for name, most in MOST[arch].items():
        assert listing[name]["code"] < 4096, name
        assert listing[name]["per number"] < most, (name, listing[name]["per number"])


def test_kernel_names_show_the_variant(listing: dict[str, dict]) -> None:
    assert [kernel["name"] for kernel in listing.values()] == [
        "_nvfp4_amax",
        "_nvfp4_quantize",
        "_nvfp4_quantize_stochastic",
        "_nvfp4_quantize_columns",
        "_nvfp4_quantize_columns_hadamard",
        "_nvfp4_quantize_columns_hadamard_stochastic",
        "_nvfp4_fake_quantize_square",
    ]
