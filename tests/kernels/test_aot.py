"""Every kernel compiles for four generations of GPUs and uses no more resources than recorded.

Each architecture compiles in a subprocess, because this process interprets kernels. If a kernel
uses more, look at the change; `python -m benchmarks.kernels.aot --write` accepts it.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from benchmarks.kernels import dry_run, registry

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = json.loads((ROOT / "benchmarks" / "records" / "kernels_aot.json").read_text())
ARCHS = (80, 90, 100, 120)

known = pytest.mark.skipif(
    triton.__version__ not in SNAPSHOT,
    reason=f"no snapshot for triton {triton.__version__}, only {', '.join(SNAPSHOT)}",
)


def _python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )


@known
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles_and_nothing_has_grown(
    arch: int, compiling_environment: dict[str, str]
) -> None:
    run = _python(compiling_environment, "-m", "benchmarks.kernels.aot", "--arch", str(arch))
    assert run.returncode == 0, run.stderr[-4000:]
    assert f"sm_{arch} causal_conv1d" in run.stdout


@known
def test_wide_loads_and_no_spills_in_the_snapshot() -> None:
    """Kernels that read rows use 16-byte loads; kernels bound by memory spill no registers."""
    archs = SNAPSHOT[triton.__version__]
    assert set(archs) == {str(arch) for arch in ARCHS}
    bound_by_memory = ("causal_conv1d", "gated_rms_norm", "rms_norm", "selective_state", "verify")
    for report in archs.values():
        for case, kernels in report.items():
            for kernel in kernels:
                if case.startswith(bound_by_memory) or kernel["matrix"]:
                    assert kernel["wide"], (case, kernel)
                if case.startswith(bound_by_memory):
                    assert kernel["stack"] == 0, (case, kernel)


# The kernels made of matrix products, and the matrix instruction of each architecture.
PRODUCTS = (
    "fused_kernel", "scan_kernel", "states_kernel", "grad_bc_kernel", "grad_x_kernel", "_grouped_",
)  # fmt: skip
UNITS = {"80": "mma bf16", "90": "wgmma bf16", "100": "tcgen05 f16", "120": "mma bf16"}


@known
def test_16_bit_products_use_tensor_cores_and_float32_products_do_not() -> None:
    """Tensor cores would compute float32 products in tf32. (NVFP4: test_nvfp4_listing.py.)

    wgmma and tcgen05 need 64 rows, so small tiles use the older mma on every architecture.
    """
    seen = dict.fromkeys(PRODUCTS, 0)
    for arch, report in SNAPSHOT[triton.__version__].items():
        for case, kernels in report.items():
            small = "tiles of 16" in case or "tiles of 32" in case
            expected = [] if "float32" in case else ["mma bf16" if small else UNITS[arch]]
            for kernel in kernels:
                if kernel["kernel"].startswith(PRODUCTS):
                    assert kernel["matrix"] == expected, (arch, case, kernel)
                    seen[next(n for n in PRODUCTS if kernel["kernel"].startswith(n))] += 1
    assert all(seen.values()), seen


def test_only_the_scan_spills_and_within_its_budget() -> None:
    """The snapshot limits each kernel to its own bytes; this test limits the snapshot.

    Exact float32 products do not use tensor cores and keep whole rows of operands in registers.
    (Other versions of Triton spill in other kernels; kernels/README.md has the table.)
    """
    pinned = re.search(r"^triton==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    for arch, report in SNAPSHOT[pinned[1]].items():
        for case, kernels in report.items():
            if case.startswith("nvfp4"):  # test_nvfp4_listing.py
                continue
            budget = 0 if not case.startswith("ssd") else 352 if "float32" in case else 256
            for kernel in kernels:
                assert kernel["stack"] <= budget, (arch, case, kernel)


@known
def test_the_catalogue_shows_the_snapshot(compiling_environment: dict[str, str]) -> None:
    run = _python(compiling_environment, "-m", "benchmarks.kernels.catalogue", "--check")
    assert run.returncode == 0, run.stderr


COMPARE = """
import json, sys
from benchmarks.kernels import aot
found, kept = json.load(sys.stdin)
print(json.dumps([aot.worse(found, kept), aot.over_the_limit(found, 120)]))
"""


def test_growth_is_found(compiling_environment: dict[str, str]) -> None:
    kernel = {
        "kernel": "_k", "warps": 4, "registers": 64, "stack": 0, "shared": 1024,
        "matrix": ["wgmma bf16"], "wide": True,
    }  # fmt: skip
    kept = {"case": [kernel], "left": [kernel]}
    grown = copy.deepcopy(kept)
    grown["case"][0] |= {"registers": 65, "stack": 8, "shared": 2**17, "matrix": [], "wide": False}
    grown["case"].append({**kernel, "kernel": "_new"})
    grown["fresh"] = [{**kernel, "registers": 32}]
    del grown["left"]
    run = subprocess.run(
        [sys.executable, "-c", COMPARE],
        cwd=ROOT,
        env=compiling_environment,
        input=json.dumps([grown, kept]),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    faults, too_large = json.loads(run.stdout)
    assert faults == [
        "case: _k: registers grew from 64 to 65.",
        "case: _k: stack grew from 0 to 8.",
        "case: _k: shared grew from 1024 to 131072.",
        "case: _k: no wgmma bf16 any more.",
        "case: _k: no 16-byte loads any more.",
        "case: _k: _new is not in the snapshot.".replace(": _k:", ":"),
        "fresh: not in the snapshot.",
        "left: gone.",
    ]
    assert too_large == ["case: _k takes 131072 bytes of shared memory; sm_120 has 101376."]


WRITE = """
import json, sys
from pathlib import Path
from benchmarks.kernels import aot
path, whole, part, last = Path(sys.argv[1]), *json.loads(sys.argv[2])
path.write_text(json.dumps({"0.0": {"80": {"old version": []}}}))
read = lambda: aot.read_snapshot(path)[aot.triton.__version__]
aot.write_snapshot({80: whole, 90: whole}, path)
aot.write_snapshot({90: part}, path, merge=True)
merged = read()
aot.write_snapshot({90: last}, path)
print(json.dumps([merged, read(), aot.read_snapshot(path)["0.0"]]))
"""


def test_a_partial_report_is_merged_and_only_a_full_one_removes_cases(
    tmp_path: Path, compiling_environment: dict[str, str]
) -> None:
    whole = {"kept": [{"kernel": "_a"}], "changed": [{"kernel": "_b"}]}
    part = {"changed": [{"kernel": "_c"}], "added": [{"kernel": "_d"}]}
    last = {"kept": [{"kernel": "_e"}]}
    given = [str(tmp_path / "snapshot.json"), json.dumps([whole, part, last])]
    run = _python(compiling_environment, "-c", WRITE, *given)
    assert run.returncode == 0, run.stderr
    merged, replaced, other_version = json.loads(run.stdout)
    assert merged == {"80": whole, "90": {**whole, **part}}
    assert replaced == {"80": whole, "90": last}
    assert other_version == {"80": {"old version": []}}


NVFP4 = "kind::mxf4nvf4.block_scale.scale_vec::4X"


@pytest.mark.parametrize(
    ("ptx", "kind"),
    [
        (f"@%p1 tcgen05.mma.cta_group::1.{NVFP4} [%r1], %rd2;", "tcgen05 mxf4nvf4"),
        (f"mma.sync.aligned.m16n8k64.row.col.{NVFP4}.f32.e2m1.e2m1.f32.ue4m3 {{}}", "mma mxf4nvf4"),
        (f"mma.sync.aligned.{NVFP4}.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue4m3 {{}}", "mma mxf4nvf4"),
        ("tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd2;", "tcgen05 f16"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {}", "mma bf16"),
        ("wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32 {}", "wgmma tf32"),
    ],
)
def test_matrix_instructions_are_named_by_unit_and_format(ptx: str, kind: str) -> None:
    assert [dry_run._matrix_kind(found) for found in dry_run.MATRIX.finditer(ptx)] == [kind]


CPU_TENSORS = """
import torch, nemotron_kernels
try:
    nemotron_kernels.rms_norm(torch.zeros(2, 8), torch.ones(8))
except RuntimeError as error:
    print(error)
"""


def test_cpu_tensors_outside_the_interpreter_are_refused_with_a_remedy(
    compiling_environment: dict[str, str],
) -> None:
    run = _python(compiling_environment, "-c", CPU_TENSORS)
    assert run.stdout.startswith("rms_norm: the tensors are on cpu, and the Triton kernel runs on")
    assert "TRITON_INTERPRET=1" in run.stdout


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import nemotron_kernels
try:
    nemotron_kernels.rms_norm
except ImportError as error:
    print(error)
"""


def test_without_triton_the_error_says_how_to_get_it(compiling_environment: dict[str, str]) -> None:
    run = _python(compiling_environment, "-c", WITHOUT_TRITON)
    assert "nemotron_kernels needs triton" in run.stdout
    assert "impl='auto'" in run.stdout


def test_every_public_name_exists_and_has_a_row_in_the_catalogue() -> None:
    import nemotron_kernels

    shown = {case.op for case in registry.all_cases()}
    # These call the same kernels under another name or with other inputs.
    shown |= {"mamba_chunk_scan_combined", "rmsnorm_fn", "route_logits"}
    for name in nemotron_kernels.__all__:
        assert callable(getattr(nemotron_kernels, name)), name
        assert name in shown, f"{name} has no case in benchmarks/kernels/cases_*.py"
