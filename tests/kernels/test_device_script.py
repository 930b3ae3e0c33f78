"""The device run: correct kernels pass, wrong ones fail, and those that passed are timed.

The tests use small cases on the CPU, with kernels in the interpreter, and a fake GPU. The test sets
its clock: it defines how long a call takes, and a graph takes as long as its capture. So every line
runs and the expected figures are known. Real times need a real GPU.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.kernels import device as device_script
from benchmarks.kernels import peers
from benchmarks.kernels.registry import Case, Draw
from nemotron_kernels import rms_norm, selective_state_update
from nemotron_lite import ops
from tests.kernels.fake_gpu import FakeGpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    script = device_script
    monkeypatch.setattr(script, "DEVICE", "cpu")
    # `main` unsets the variable, because a GPU run compiles; later tests interpret.
    monkeypatch.setenv("TRITON_INTERPRET", os.environ["TRITON_INTERPRET"])
    # conftest.py already fills new memory with NaN; torch's option for this would also warn.
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *args, **kwargs: None)
    return script


def _norm(backward: bool):
    return Case(
        op="rms_norm",
        name="backward" if backward else "forward",
        shape="small",
        inputs=lambda draw: {
            "x": draw.normal(5, 24, dtype=torch.float16),
            "weight": draw.normal(24, dtype=torch.float16),
        },
        run=rms_norm,
        exact=lambda x, weight: ops.rms_norm(x, weight, impl="naive"),
        tolerance=1e-3,
        bytes=1,
        leaves=("x", "weight") if backward else (),
        backward=backward,
    )


@pytest.mark.parametrize("backward", [False, True])
def test_a_correct_kernel_passes(device: ModuleType, backward: bool) -> None:
    result = device.check(_norm(backward))
    assert result["passed"]
    assert result["same_bits_twice"]
    assert len(result["errors"]) == (2 if backward else 1)
    assert 0 < max(result["errors"]) < 1e-3


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_kernel_fails(device: ModuleType, backward: bool) -> None:
    wrong = replace(_norm(backward), run=lambda x, weight: rms_norm(x, weight, 0.01))
    result = device.check(wrong)
    assert not result["passed"]
    assert max(result["errors"]) > 1e-3


def test_an_output_that_is_not_written_fails(device: ModuleType) -> None:
    lazy = replace(_norm(False), run=lambda x, weight: torch.empty_like(x))
    result = device.check(lazy)
    assert result["errors"] == [None]
    assert not result["passed"]


def test_different_bits_fail_even_within_the_tolerance(device: ModuleType) -> None:
    def noisy(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x.float(), weight) * (1 + 1e-5 * torch.rand(1))

    result = device.check(replace(_norm(False), run=noisy))
    assert not result["same_bits_twice"]
    assert not result["passed"]
    assert max(result["errors"]) < 1e-3


def test_a_state_updated_in_place_is_restored_for_the_second_run(device: ModuleType) -> None:
    def run(state, **given):
        return selective_state_update(state, dt_softplus=True, **given), state

    def exact(state, x, dt, A, B, C):
        return ops.ssd_step(state, x, F.softplus(dt), A, B, C, impl="naive")

    case = Case(
        op="selective_state_update",
        name="float32",
        shape="small",
        inputs=lambda draw: {
            "state": draw.normal(2, 4, 8, 16, dtype=torch.float32),
            "x": draw.normal(2, 4, 8, dtype=torch.float32),
            "dt": draw.normal(2, 4, dtype=torch.float32),
            "A": -draw.uniform(4),
            "B": draw.normal(2, 2, 16, dtype=torch.float32),
            "C": draw.normal(2, 2, 16, dtype=torch.float32),
        },
        run=run,
        exact=exact,
        tolerance=(2e-6, 2e-6),
        bytes=1,
        in_place=("state",),
    )
    assert device.check(case)["passed"]
    assert not device.check(replace(case, in_place=()))["passed"]


def test_the_shares_and_ratios_of_a_summary(device: ModuleType) -> None:
    assert device.summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {"n": 5, "median": 3, "q1": 1.5, "q3": 4.5}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    fake.install(monkeypatch)
    return fake


CEILINGS = {"bytes_per_s": 1e9, "flops_per_s": 1e12}


@pytest.mark.parametrize("backward", [False, True])
def test_times_lower_bounds_and_ratios(device: ModuleType, gpu: FakeGpu, backward: bool) -> None:
    def needs_the_host(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if gpu.capturing:
            raise RuntimeError("not in a graph")
        return ops.rms_norm(x, weight)

    def absent(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise ModuleNotFoundError("No module named 'absent'")

    class Slow(torch.autograd.Function):  # 3 ms forward, 5 ms backward
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            gpu.now += 3
            gpu.forward_on = gpu.stream
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            gpu.now += 5
            return grad

    case = _norm(backward)
    case = replace(
        case,
        bytes=50_000,
        run=lambda x, weight: Slow.apply(rms_norm(x, weight)),
        peers={
            "slower": lambda x, weight: Slow.apply(Slow.apply(ops.rms_norm(x, weight))),
            "absent": absent,
            "by hand": gpu.takes(4, needs_the_host),
        },
    )
    result = device.measure(case, 4, CEILINGS)
    took = 5_000 if backward else 3_000
    assert result["time_us"] == {"n": 4, "median": took, "q1": took, "q3": took}
    assert result["how"] == "CUDA graph"
    assert result["input_sets"] == 3
    assert result["floor_us"] == pytest.approx(50)
    assert result["share_of_floor"] == pytest.approx(50 / took)
    assert result["peers"]["slower"]["ratio"]["median"] == pytest.approx(2)
    assert result["peers_skipped"] == {"absent": "ModuleNotFoundError: No module named 'absent'"}
    by_hand = result["peers"]["by hand"]
    if not backward:  # its backward pass has no need of the host
        assert by_hand["how"] == "launched one by one: not in a graph"
        assert by_hand["ratio"]["median"] == pytest.approx(4 / 3)


@pytest.mark.parametrize("backward", [False, True])
def test_tensors_that_a_graph_reads_are_kept_with_the_graph(
    device: ModuleType, gpu: FakeGpu, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph stores addresses. If the tensors were freed, reading them would be illegal."""
    given: list[weakref.ref[torch.Tensor]] = []
    alike = torch.randn_like
    monkeypatch.setattr(
        torch, "randn_like", lambda y: given.append(weakref.ref(z := alike(y))) or z
    )
    case = replace(_norm(backward), run=gpu.takes(1, rms_norm))
    sets = [case.inputs(Draw("cpu")) for _ in range(2)]
    replay, how = device.graph_of(case, case.run, sets)
    gc.collect()
    assert how == "CUDA graph" and len(given) == 2 * backward
    assert all(reference() is not None for reference in given)
    del replay
    gc.collect()
    assert all(reference() is None for reference in given)


def test_inputs_rotate_through_more_than_the_cache(device: ModuleType, gpu: FakeGpu) -> None:
    for size, sets in ((1, 64), (50, 11), (10_000, 3)):
        case = replace(_norm(False), bytes=size)
        drawn = device.rotating_inputs(case)
        assert len(drawn) == sets
        assert not torch.equal(drawn[0]["x"], drawn[1]["x"])


@pytest.fixture
def whole_run(
    device: ModuleType, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[str | None, dict[str, Any] | None]]:
    """Run `main` with a command line on three small cases: (exit message, record)."""
    case = replace(_norm(False), run=gpu.takes(2, rms_norm), bytes=100)
    cases = [
        replace(case, name="forward: other blocks"),
        case,
        replace(case, name="wrong", run=lambda x, weight: rms_norm(x, 2 * weight)),
    ]
    monkeypatch.setattr(device, "all_cases", lambda: cases)
    monkeypatch.setattr(device, "COPIED", 64)
    monkeypatch.setattr(device, "SQUARE", 8)
    monkeypatch.setattr(device.record, "RECORDS", tmp_path)
    warmed: list[tuple[int, str]] = []
    monkeypatch.setattr(device, "warm", lambda *given: warmed.append(given) or "compiled")
    matmul, copy = torch.Tensor.__matmul__, torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "__matmul__", gpu.takes(1, matmul))
    monkeypatch.setattr(torch.Tensor, "copy_", gpu.takes(4, copy))

    def run(*arguments: str) -> tuple[str | None, dict[str, Any] | None]:
        monkeypatch.setattr(sys, "argv", ["device.py", *arguments])
        monkeypatch.setattr(sys, "orig_argv", ["python", "device.py", *arguments])
        message = None
        try:
            device.main()
        except SystemExit as stopped:
            message = str(stopped)
        finally:
            seen, warmed[:] = list(warmed), []
        only = arguments[1] if "--only" in arguments else ""
        assert seen == ([] if "--cold" in arguments else [(90, only)])
        written = tmp_path / "kernels_fake_gpu_100.json"
        return message, json.loads(written.read_text()) if written.exists() else None

    return run


def test_a_whole_run_and_its_record(whole_run: Callable[..., Any], capsys: Any) -> None:
    message, record = whole_run("--rounds", "4")
    assert message == "1 of 3 cases failed: rms_norm wrong, small"
    assert record["gpu"] == {"name": "Fake GPU 100", "capability": "9.0"}
    # 64 floats read and written in 4 ms; 2 * 8^3 operations in 1 ms.
    assert record["ceilings"]["bytes_per_s"] == pytest.approx(2 * 64 * 4 / 4e-3)
    assert record["ceilings"]["flops_per_s"] == pytest.approx(2 * 8**3 / 1e-3)
    names = ["rms_norm forward, small", "rms_norm wrong, small"]
    assert list(record["cases"]) == [*names, "rms_norm forward: other blocks, small"]
    right, wrong = (record["cases"][name] for name in names)
    assert right["passed"] and right["time_us"]["median"] == 2000
    assert not wrong["passed"] and "time_us" not in wrong
    assert record["not_reached"] == []
    assert set(record["peers"]) == {"mamba_ssm", "fla"}
    printed = capsys.readouterr().out
    assert "FAIL rms_norm wrong, small: not timed; errors [" in printed
    assert "ok   rms_norm forward, small: 2000.0 us, " in printed


def test_a_new_process_continues_after_a_kernel_that_broke_the_gpu(
    whole_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`execv` would replace this process; the test runs the command that it gets instead."""
    commands: list[list[str]] = []

    class Replaced(BaseException): ...

    def execv(program: str, command: list[str]) -> None:
        commands.append(command[3:])
        raise Replaced

    answers = iter([False, RuntimeError("an illegal memory access was encountered")])

    def synchronize() -> None:
        if sys._getframe(1).f_code.co_name == "broken" and (answer := next(answers, False)):
            raise answer

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(Replaced):
        whole_run("--only", "rms_norm", "--rounds", "4")
    names = ["rms_norm forward, small", "rms_norm wrong, small"]
    assert commands == [
        ["--cold", "--only", "rms_norm", "--rounds", "4", "--begin", "2", "--failed", names[1]]
    ]
    message, record = whole_run(*commands[0])
    assert message == "1 of 3 cases failed: rms_norm wrong, small"
    assert set(record["cases"]) == {*names, "rms_norm forward: other blocks, small"}
    assert record["not_reached"] == []


def test_a_run_out_of_time_writes_its_results_and_names_the_cases_left(
    whole_run: Callable[..., Any], device: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    minutes = iter([0, 1, 3])  # the start, before the first case, before the second
    monkeypatch.setattr(device, "time", SimpleNamespace(monotonic=lambda: 60 * next(minutes)))
    message, record = whole_run("--rounds", "4", "--minutes", "2")
    assert message is None
    assert list(record["cases"]) == ["rms_norm forward, small"]
    assert record["not_reached"] == [
        "rms_norm wrong, small",
        "rms_norm forward: other blocks, small",
    ]
    assert "2 cases not reached: rms_norm wrong" in capsys.readouterr().out
    monkeypatch.setattr(device, "time", SimpleNamespace(monotonic=lambda: 0.0))
    message, record = whole_run("--only", "other blocks", "--rounds", "4")
    assert message is None
    assert set(record["cases"]) == {
        "rms_norm forward, small",
        "rms_norm forward: other blocks, small",
    }
    monkeypatch.setattr(device.record, "versions", lambda packages: {"triton": "0.0"})
    message, record = whole_run("--only", "other blocks", "--rounds", "4")
    assert set(record["cases"]) == {"rms_norm forward: other blocks, small"}


def test_check_without_timing_writes_nothing(whole_run: Callable[..., Any]) -> None:
    message, record = whole_run("--check")
    assert message == "1 of 3 cases failed: rms_norm wrong, small"
    assert record is None


def test_invalid_command_lines(device: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "all_cases", lambda: [_norm(False)])
    for arguments, message in (
        (["--rounds", "3"], "--rounds 3: expected at least 4"),
        (["--only", "nothing"], "--only nothing --begin 0: no case"),
        ([], "There is no CUDA GPU here"),
    ):
        monkeypatch.setattr(sys, "argv", ["device.py", *arguments])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit, match=message):
            device.main()


def test_peers_in_an_empty_package_and_peers_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    before = [name for name in sys.modules if name.partition(".")[0] in ("mamba_ssm", "fla")]
    for name in before:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = peers.use_peers()
    assert found["mamba_ssm"].startswith("left out: ModuleNotFoundError: No module named 'mamba")
    assert found["fla"].startswith("left out: ModuleNotFoundError: No module named 'fla'")
    package = tmp_path / "mamba_ssm" / "ops" / "triton"
    package.mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text(
        "__version__ = '1.2.3'\nraise ImportError('wants a compiled extension')\n"
    )
    (package / "ssd_combined.py").write_text("answer = 42\n")
    try:
        assert peers.use_peers()["mamba_ssm"] == "1.2.3"
        assert importlib.import_module("mamba_ssm.ops.triton.ssd_combined").answer == 42
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == "mamba_ssm"]:
            del sys.modules[name]


def test_everything_is_compiled_beforehand_in_several_processes(
    compiling_environment: dict[str, str],
) -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.kernels.warm",
            "--arch",
            "90",
            "--only",
            "conv1d_step",
            "--workers",
            "2",
        ],
        cwd=ROOT,
        env=compiling_environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("compiled for sm_90 in ")
