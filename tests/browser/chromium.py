"""The path of the browser, and the message if there is none.

Debian's chromium is used, not one that playwright downloads. Without it the tests that need it are
skipped with a reason; CI sets NEEDS_BROWSER, under which they fail instead.
"""

from __future__ import annotations

import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = "no chromium on the PATH; on Debian and Ubuntu: apt-get install chromium"


def path() -> str | None:
    """The browser: CHROMIUM if set, else the first name found on the PATH."""
    chosen = os.environ.get("CHROMIUM")
    return chosen or next((found for name in NAMES if (found := shutil.which(name))), None)


def required() -> str:
    """The browser's path; skips the test where there is none, and fails it in CI."""
    found = path()
    if found is None:
        if os.environ.get("NEEDS_BROWSER"):
            pytest.fail(MISSING, pytrace=False)
        pytest.skip(MISSING)
    return found
