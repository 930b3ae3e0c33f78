"""`import nemotron_lite` is fast, and so is the import of every public name.

Each figure is the median of several fresh interpreters. torch is imported first and not counted,
because every user needs it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("IPython", "jupyter_core", "ipywidgets", "plotly", "transformers", "triton")

ONLY_THE_PACKAGE = "import nemotron_lite"
EVERY_PUBLIC_NAME = "import nemotron_lite as m; [getattr(m, name) for name in m.__all__]"
# Only what chapters use may import plotly and Jupyter.
EVERY_MODULE = """
import importlib, pkgutil, nemotron_lite
for child in pkgutil.iter_modules(nemotron_lite.__path__):
    if child.name == "course":
        continue
    found = importlib.import_module(f"nemotron_lite.{child.name}")
    for module in pkgutil.walk_packages(getattr(found, "__path__", []), f"{found.__name__}."):
        importlib.import_module(module.name)
"""


def import_cost(statement: str) -> tuple[float, list[str]]:
    """Seconds that `statement` takes beyond torch, and the heavy packages it brought along."""
    program = (
        "import json, sys, time, torch\n"
        "start = time.perf_counter()\n"
        f"{statement}\n"
        "seconds = time.perf_counter() - start\n"
        f"print(json.dumps([seconds, [m for m in {HEAVY!r} if m in sys.modules]]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    seconds, heavy = json.loads(run.stdout)
    return seconds, heavy


@pytest.mark.timing
@pytest.mark.parametrize("statement", [ONLY_THE_PACKAGE, EVERY_PUBLIC_NAME])
def test_import_takes_less_than_two_seconds_beyond_torch(statement: str) -> None:
    assert statistics.median(import_cost(statement)[0] for _ in range(3)) < 2.0


@pytest.mark.parametrize("statement", [EVERY_PUBLIC_NAME, EVERY_MODULE])
def test_import_brings_nothing_heavy(statement: str) -> None:
    assert import_cost(statement)[1] == []


def test_importing_the_package_does_not_import_torch() -> None:
    program = "import sys, nemotron_lite; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_a_slow_and_heavy_import_is_noticed() -> None:
    seconds, heavy = import_cost("time.sleep(0.3); import plotly")
    assert seconds > 0.3
    assert heavy == ["plotly"]


def test_unknown_public_name_is_an_error_that_lists_the_names() -> None:
    import nemotron_lite

    with pytest.raises(AttributeError, match=r"no 'Nemotorn'.*'Nemotron'"):
        _ = nemotron_lite.Nemotorn
    assert set(nemotron_lite.__all__) <= set(dir(nemotron_lite))
