"""An IPython shell: the outputs of the course as a notebook would store them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nemotron_lite.course import progress_store


class Shown:
    """Outputs in order, each a mapping of MIME types, and what was printed."""

    def __init__(self, call: Callable[[], Any]) -> None:
        from IPython.utils.capture import capture_output

        self.result, self.error = None, None
        with capture_output() as captured:
            try:
                self.result = call()
            except Exception as error:
                self.error = error
        self.bundles = [dict(output.data) for output in captured.outputs]
        self.printed = captured.stdout

    @property
    def plain(self) -> str:
        """The text of the only output."""
        (bundle,) = self.bundles
        return bundle["text/plain"]

    @property
    def html(self) -> str:
        """The HTML of the only output."""
        (bundle,) = self.bundles
        return bundle["text/html"]


@pytest.fixture(autouse=True)
def no_notebook() -> Iterator[None]:
    """`setup` remembers the notebook's folder; the next test has another one."""
    yield
    progress_store._NOTEBOOK.clear()


@pytest.fixture
def shown() -> Iterator[Callable[..., Shown]]:
    """Call a function in an IPython shell and keep what it displays; its error is raised again."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()

    def run(function: Callable[..., Any], *args: Any, fails: bool = False, **kwargs: Any) -> Shown:
        seen = Shown(lambda: function(*args, **kwargs))
        if seen.error is not None and not fails:
            raise seen.error
        return seen

    yield run
    shell.history_manager.end_session() if shell.history_manager else None
    InteractiveShell.clear_instance()
