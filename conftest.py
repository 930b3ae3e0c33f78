"""Which tests stay together when several processes share the work (`make test` uses two).

The cells of a chapter run in one kernel, one after the other, so they are one piece of work. The
browser tests share one JupyterLab. Everything else is dealt out test by test, so that no process
waits for a long file of another.

pytest-xdist has `--dist loadgroup` for this, but under pytest 9.2 it forgets the groups (it writes
an attribute that pytest no longer reads), and the cells of a chapter land in different kernels. Its
schedulers can be extended, so the pieces are named here instead, from the ids of the tests. The
largest pieces are dealt out first.
"""

from __future__ import annotations

from typing import Any

import pytest

BY_FILE = (".ipynb",)  # endings of files whose tests depend on each other
BY_FOLDER = ("tests/browser/",)
SHARED_FIXTURES = (
    "tests/authoring/",
    "tests/coursework/",
    "tests/course/chapters/",
    "tests/notebooks/",
)  # costly ones, made once a file


def piece(test: str) -> str:
    """What has to run in the same process as the test with this id."""
    file = test.partition("::")[0]
    for folder in BY_FOLDER:
        if file.startswith(folder):
            return folder
    return file if file.endswith(BY_FILE) or file.startswith(SHARED_FIXTURES) else test


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the cells of a chapter in their order when pytest-random-order shuffles the tests.

    The plugin shuffles the files, and the tests inside each file. Conftest hooks run before it.
    """
    for item in items:
        if item.path.name.endswith(BY_FILE):
            item.add_marker(pytest.mark.random_order(disabled=True))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out the pieces, unless another way was asked for on the command line."""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Pieces(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return piece(nodeid)

    return Pieces(config, log)
