"""Which tests stay together, which keep their order, and which are slow.

`make test` shares the tests between two processes. The cells of a chapter run in one kernel, one
after the other, so they stay together. The browser tests share one JupyterLab. All other tests are
handed out one by one, so that no process waits while another one works through a long file.

pytest-xdist has `--dist loadgroup` for this, but under pytest 9.2 it forgets the groups (it writes
an attribute that pytest no longer reads), and the cells of a chapter land in different kernels. Its
schedulers can be extended, so the pieces are named here instead, from the ids of the tests. The
largest pieces are handed out first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SLOW = Path(__file__).with_name("tests") / "slow.txt"

BY_FILE = (".ipynb",)  # endings of files whose tests depend on each other
BY_FOLDER = ("tests/browser/",)
SHARED_FIXTURES = (
    "tests/authoring/",
    "tests/coursework/",
    "tests/course/chapters/",
    "tests/course/lab/",
    "tests/notebooks/",
    "tests/test_modules_compile.py",
)  # costly ones, made once a file


def piece(test: str) -> str:
    """What has to run in the same process as the test with this id."""
    file = test.partition("::")[0]
    for folder in BY_FOLDER:
        if file.startswith(folder):
            return folder
    return file if file.endswith(BY_FILE) or file.startswith(SHARED_FIXTURES) else test


def slow_tests(text: str) -> tuple[str, ...]:
    """Beginnings of the ids of slow tests: the lines of tests/slow.txt that are no comments."""
    lines = (line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def is_slow(test: str, listed: tuple[str, ...]) -> bool:
    """Whether a line of the list is this test, its file, or a folder above it."""
    file, name = test.partition("::")[0], test.partition("[")[0]
    folders = tuple(line for line in listed if line.endswith("/"))
    return file in listed or name in listed or file.startswith(folders)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests, and keep the cells of a chapter in order when the tests are shuffled.

    pytest-random-order shuffles the files, and the tests inside each file, after this hook.
    """
    listed = slow_tests(SLOW.read_text()) if SLOW.exists() else ()
    for item in items:
        if item.path.name.endswith(BY_FILE):
            item.add_marker(pytest.mark.random_order(disabled=True))
        if is_slow(item.nodeid, listed):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out the pieces, unless another way was asked for on the command line."""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Pieces(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return piece(nodeid)

    return Pieces(config, log)
