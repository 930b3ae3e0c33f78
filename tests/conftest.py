"""The setup of every test: shapes checked on each call, few threads, fixed seeds, no network.

The import hook rewrites `nemotron_lite` as it is imported, so that jaxtyping and beartype compare
each argument and result with its annotation. Users never pay for it. The hook has to be installed
before anything imports the package, which is why it comes first in this file.

With a tiny model the comparison takes four fifths of the time. Slow tests call their functions
thousands of times, so they run without it. CHECK_SHAPES=all compares in every test; use it after a
change of annotations.
"""

from __future__ import annotations

import inspect
import os
import random
import signal
from collections.abc import Generator, Iterator
from typing import Any

# Before torch is imported: it reads these once. Two workers on two cores get one thread each.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_THREADS = max(1, (os.cpu_count() or 1) // _WORKERS)
os.environ.setdefault("OMP_NUM_THREADS", str(_THREADS))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton decides at its import whether kernels are interpreted, and transformers imports it.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("NEMOTRON_LITE_MEASURE", "0")  # which library multiplies: PyTorch's choice
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download something fails at once

# Programs that a shell starts in the background, or nohup, ignore these, and so would every process
# that a test starts and then ends by a signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import jaxtyping
from jaxtyping import install_import_hook

install_import_hook("nemotron_lite", "beartype.beartype")

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A shared two-core machine is too uneven for deadlines. In CI the examples are the same each time.
hypothesis.settings.register_profile(
    "project", deadline=None, derandomize="CI" in os.environ, print_blob=True
)
hypothesis.settings.load_profile("project")

TIMING_TRIES = 3

# How much of a failure is written at once: what was compared, not the whole traceback.
REASON_LINES = 4
REASON_WIDTH = 300

CHECK_ALL = os.environ.get("CHECK_SHAPES") == "all"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Compare shapes with annotations in the tests, and their fixtures, that are not slow."""
    skips = not CHECK_ALL and item.get_closest_marker("slow") is not None
    jaxtyping.config.update("jaxtyping_disable", skips)
    try:
        return (yield)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random numbers, alone or among others, in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one process, which DDP and FSDP need."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def playwright_driver() -> Iterator[Any]:
    """Playwright, started once: a process cannot have a second one beside the first."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        yield driver


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test marked `timing` up to three times, until it passes.

    Such a test depends on the machine's clock or memory allocator, and another process may have
    been in the way. A real fault fails every time. The last try is pytest's own.
    """
    if pyfuncitem.get_closest_marker("timing") is None:
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    for _ in range(TIMING_TRIES - 1):
        try:
            pyfuncitem.obj(**arguments)
        except AssertionError:
            continue
        return True
    return None


class _NameFailures:
    """Writes the name of a failing test as soon as it fails.

    pytest names them in its summary, which a run that is ended by a time limit does not reach.
    """

    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self._reporter = reporter

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed:
            return
        lines = report.longreprtext.splitlines()
        reasons = [line[1:].strip() for line in lines if line.startswith("E ")]
        self._reporter.ensure_newline()
        self._reporter.write_line(f"FAILED {report.nodeid} ({report.when})", red=True)
        for reason in reasons[:REASON_LINES]:
            self._reporter.write_line(f"    {reason[:REASON_WIDTH]}")


@pytest.hookimpl(trylast=True)  # the reporter registers itself in the same hook
def pytest_configure(config: pytest.Config) -> None:
    """Name failures early, where there is a terminal: not in the workers of a parallel run."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        config.pluginmanager.register(_NameFailures(reporter))
