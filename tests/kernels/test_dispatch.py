"""How the package calls the kernels: through `impl` of each operation."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import triton

from nemotron_kernels import _compat
from nemotron_lite import ops
from nemotron_lite.backends import dispatch


def _both(function, *arguments, **options):
    """(by the definition, by the kernel), each as a tuple of tensors."""
    found = []
    for impl in ("naive", "triton"):
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        result = function(*copies, impl=impl, **options)
        found.append((result,) if isinstance(result, torch.Tensor) else tuple(result))
    return found


def _scan_inputs():
    return (
        torch.randn(2, 33, 4, 16), torch.rand(2, 33, 4), -torch.rand(4) - 0.1,
        torch.randn(2, 33, 2, 16), torch.randn(2, 33, 2, 16),
    )  # fmt: skip


def _cases():
    yield "causal_conv1d", (torch.randn(2, 9, 8), torch.randn(8, 4), torch.randn(8)), {}
    yield "rms_norm", (torch.randn(3, 32), torch.randn(32)), {}
    yield "gated_rms_norm", (torch.randn(3, 32), torch.randn(3, 32), torch.randn(32), 2), {}
    yield "ssd", _scan_inputs(), {"D": torch.rand(4)}
    raw = {"dt_bias": torch.randn(4), "dt_softplus": True}
    returning = torch.tensor([[0] * 9 + [1] + [0] * 23, [3] * 33])
    yield "ssd", _scan_inputs(), {"D": torch.rand(4), "seq_idx": returning, **raw}
    x, dt, A, B, C = _scan_inputs()
    step = (torch.randn(2, 4, 16, 16), x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])
    yield "ssd_step", step, {"D": torch.rand(4)}
    yield "ssd_step", step, {"D": torch.rand(4), **raw}
    indices = torch.stack([torch.randperm(6)[:2] for _ in range(7)])
    mlp = (torch.randn(7, 16), torch.randn(6, 24, 16), torch.randn(6, 16, 24), torch.rand(7, 2))
    yield "expert_mlp", (*mlp, indices), {}


@pytest.mark.parametrize("number", range(8), ids=lambda i: list(_cases())[i][0])
def test_a_forced_kernel_equals_the_definition(number: int) -> None:
    torch.manual_seed(number)
    name, arguments, options = list(_cases())[number]
    exact, found = _both(getattr(ops, name), *arguments, **options)
    for one, other in zip(exact, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_a_forced_kernel_of_the_router() -> None:
    x, weight, bias = torch.randn(9, 16), torch.randn(12, 16), torch.randn(12) * 0.1
    exact, found = _both(ops.route, x, weight, bias, top_k=3, scale=2.5)
    dense = [torch.zeros(9, 12).scatter(1, r[1], r[0]) for r in (exact, found)]
    torch.testing.assert_close(dense[1], dense[0])
    torch.testing.assert_close(found[2], exact[2])


def test_a_forced_kernel_of_the_acceptance_rule() -> None:
    p, q = torch.rand(2, 6, 4, 50).softmax(-1)
    drafts, uniforms = torch.randint(50, (6, 3)), torch.rand(6, 4, dtype=torch.float64)
    exact, found = _both(ops.verify, p, q[:, :3].contiguous(), drafts, uniforms)
    assert [x.tolist() for x in found] == [x.tolist() for x in exact]


def test_a_kernel_forced_on_cpu_tensors_is_refused() -> None:
    """Outside the interpreter, a kernel needs tensors on a GPU."""
    script = (
        "import torch; from nemotron_lite import ops\n"
        "x = torch.zeros(1, 4, 8)\n"
        "ops.causal_conv1d(x, torch.zeros(8, 4))\n"
        "ops.causal_conv1d(x, torch.zeros(8, 4), impl='triton')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert "runs on an NVIDIA GPU" in done.stderr and "impl='auto'" in done.stderr


def test_an_operation_without_a_kernel_names_its_implementations() -> None:
    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match=r"no implementation 'triton'; choose one of 'auto', 'na"):
        ops.causal_attention(q, q, q, impl="triton")
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        ops.rms_norm(q, torch.ones(8), impl="cuda")


def test_a_forced_kernel_refuses_float64_and_names_an_alternative() -> None:
    with pytest.raises(ValueError, match=r"not torch.float64. Use impl='auto'"):
        ops.rms_norm(torch.ones(2, 8).double(), torch.ones(8).double(), impl="triton")


class _Target:
    def __init__(self, backend: str, arch: object) -> None:
        self.backend, self.arch = backend, arch


@pytest.mark.parametrize(
    ("backend", "arch", "message"),
    [
        ("hip", "gfx942", "written for NVIDIA GPUs, and the current device is a hip gfx942"),
        ("cuda", 75, "This GPU is sm_75; the kernels need sm_80 or newer.*impl='auto'"),
    ],
)
def test_a_forced_kernel_on_an_unsupported_gpu_is_refused(
    backend: str, arch: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = SimpleNamespace(get_current_target=lambda: _Target(backend, arch))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(_compat, "INTERPRET", False)
    monkeypatch.setattr(_compat, "_dry_run", True)  # CPU tensors instead of GPU tensors
    with pytest.raises(RuntimeError, match=message):
        ops.rms_norm(torch.ones(2, 8), torch.ones(8), impl="triton")


@pytest.mark.parametrize(
    ("capability", "hip", "takes"),
    [((8, 0), None, True), ((12, 0), None, True), ((7, 5), None, False), ((9, 4), "6.4", False)],
)
def test_auto_uses_the_kernel_on_supported_gpus(
    capability: tuple[int, int], hip: str | None, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_on_gpu", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    dispatch._capable.cache_clear()

    def plain() -> None: ...
    def fast() -> None: ...
    def the_kernel() -> None: ...

    choices = {"torch": plain, "cpu": fast, "triton": the_kernel}
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            chosen = dispatch.choose("op", "auto", torch.zeros(1, dtype=dtype), **choices)
            assert chosen is (the_kernel if takes else fast)
        assert dispatch.choose("op", "auto", torch.zeros(1).double(), **choices) is fast
    finally:
        dispatch._capable.cache_clear()
    monkeypatch.setattr(dispatch, "_on_gpu", lambda _: False)
    assert dispatch.choose("op", "auto", torch.zeros(1), **choices) is fast
    untuned = {"torch": plain, "triton": the_kernel}
    assert dispatch.choose("op", "auto", torch.zeros(1), **untuned) is plain
