"""Imports run one way: the contracts of import-linter in pyproject.toml are kept, and can fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]


def run(config: Path | None = None, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """import-linter on the packages below `path`."""
    command = LINT + ([f"--config={config}"] if config else [])
    env = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{path / 'kernels'}"}
    return subprocess.run(
        [*command, "--no-cache"], cwd=path, env=env, capture_output=True, text=True, timeout=120
    )


def test_the_contracts_are_kept() -> None:
    found = run()
    assert found.returncode == 0, found.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The packages and the contracts, to be broken."""
    for folder in ("nemotron_lite", "kernels/nemotron_kernels"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        ("ops/scan.py", "from nemotron_lite.layers.mamba2 import Mamba2", "one way"),
        ("ops/scan.py", "def f():\n    import nemotron_lite.model", "one way"),
        ("layers/mamba2.py", "import nemotron_kernels.ssd", "Triton kernels"),
        ("model.py", "def f():\n    import triton", "Triton kernels"),
        ("ops/conv.py", "import nemotron_lite.ops.norm", None),
        ("attic.py", "X = 1", "one way"),
    ],
)
def test_a_wrong_import_is_found(copy: Path, module: str, line: str, said: str | None) -> None:
    path = copy / "nemotron_lite" / module
    path.write_text((path.read_text() if path.exists() else '"""Old things."""\n') + f"\n{line}\n")
    found = run(path=copy)
    assert (found.returncode == 0) is (said is None), found.stdout
    broken = [text for text in found.stdout.splitlines() if "BROKEN" in text]
    assert any(said in text for text in broken) if said else not broken


def test_a_circle_is_found(copy: Path) -> None:
    for one, other in (("conv", "norm"), ("norm", "conv")):
        path = copy / "nemotron_lite" / "ops" / f"{one}.py"
        path.write_text(path.read_text() + f"\nimport nemotron_lite.ops.{other}\n")
    assert "No two modules import each other in a circle BROKEN" in run(path=copy).stdout
