"""A product of packed operands uses the block-scaled FP4 instruction on GPUs that have it.

The test compiles through the public function and reads PTX and machine code. It shows that the
instruction exists. Only a run on a Blackwell GPU can show that it applies each scale to its own
block.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

COMPILE = """
import json, re, sys
import torch
from benchmarks.kernels.dry_run import compile_only
from nemotron_kernels import nvfp4_matmul
from nemotron_lite.quantization.nvfp4 import QuantizedTensor

def packed(rows, cols):
    codes = torch.empty(rows, (cols + 15) // 16 * 8, dtype=torch.uint8)
    scales = torch.empty(rows, (cols + 15) // 16, dtype=torch.float8_e4m3fn)
    return QuantizedTensor(codes, scales, torch.empty(()), (rows, cols))

listing = {}
for rows, cols in ((512, 1024), (512, 1000), (16, 1024)):
    with compile_only(int(sys.argv[1])) as compiled:
        nvfp4_matmul(packed(rows, cols), packed(256, cols), torch.bfloat16)
    (kernel,) = compiled
    listing[f"{rows} {cols}"] = {
        "name": kernel.metadata.name,
        "ptx": re.findall(r"(?:tcgen05[.]mma|wgmma[.]mma_async|mma[.]sync)\\S*", kernel.asm["ptx"]),
        "sass": re.findall(r"\\b(?:UTC\\w*MMA|OMMA|[HQ]G?MMA)[\\w.]*", kernel.asm["sass"]),
        "flushes": ".ftz" in kernel.asm["ptx"],
    }
print(json.dumps(listing))
"""

SCALED = "_nvfp4_packed_scaled"
DECODED = "_nvfp4_packed_decoded"
# Architecture -> kernel, PTX and machine code of its matrix instructions, for many rows of x.
EXPECTED = {
    90: (DECODED, r"wgmma\.mma_async.*\.f32\.f16\.f16", r"HGMMA\."),
    100: (SCALED, r"tcgen05\.mma.*kind::mxf4nvf4\.block_scale\.(scale_vec::4X|block16)", "UTCOMMA"),
    120: (
        SCALED,
        r"mma\.sync.*m16n8k64.*kind::mxf4nvf4\.block_scale\.scale_vec::4X\.f32\.e2m1\.e2m1"
        r"\.f32\.ue4m3",
        r"OMMA\.SF.*E2M1\.E2M1\.UE4M3",
    ),
}


@pytest.mark.parametrize("arch", EXPECTED)
def test_the_instruction_is_issued(arch: int, compiling_environment: dict[str, str]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, str(arch)],
        cwd=ROOT,
        env=compiling_environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    listing = json.loads(run.stdout)
    name, ptx, sass = EXPECTED[arch]
    for shape in ("512 1024", "512 1000"):
        found = listing[shape]
        assert found["name"] == name
        assert found["ptx"] and all(re.match(ptx, one) for one in found["ptx"]), found
        assert found["sass"] and all(re.match(sass, one) for one in found["sass"]), found
    few = listing["16 1024"]  # tiles of 16 rows are decoded on every architecture
    assert few["name"] == DECODED and all("f16.f16" in one for one in few["ptx"])
    assert not any(found["flushes"] for found in listing.values())
