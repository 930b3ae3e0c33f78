"""How chapters are tested: every cell runs, and its output is compared with the stored output.

nbval makes a test of each code cell. This file adds two things:

- Some outputs are not compared: stderr, pictures, plotly's JSON, and HTML, which has the measured
  values. Plain text and stdout are compared; sanitize.cfg only removes addresses. So the cell that
  draws a figure also asserts its numbers.
- A cell that was never run fails. nbval itself would compare nothing in it and pass.

All cells of a chapter share one kernel; the conftest.py of the project keeps them in one process.
`pytest notebooks` runs the chapters alone; `make test` runs them among the other tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

NOT_COMPARED = (
    "stderr",
    "application/vnd.plotly.v1+json",
    "image/svg+xml",
    "text/html",
)


def pytest_collectstart(collector: Any) -> None:
    """Do not compare what differs between machines."""
    if type(collector).__name__ == "IPyNbFile":
        collector.skip_compare += NOT_COMPARED
        collector.config.option.nbval_sanitize_with = str(Path(__file__).with_name("sanitize.cfg"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: Any) -> None:
    """Fail a cell that was committed without being run."""
    if type(item).__name__ == "IPyNbCell":
        cell = item.cell
        if cell.source.strip() and cell.get("execution_count") is None:
            pytest.fail("this cell was never run; run `make notebooks`.", pytrace=False)
