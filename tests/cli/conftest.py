"""What all tests of commands share: a terminal of known width, and little text to prepare."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_lite import cli, data


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for console in (cli.out, cli.err):
        monkeypatch.setattr(console, "_width", 150)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared text goes into the test's folder, and few bytes of it are held out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepare = data.prepare
    monkeypatch.setattr(data, "prepare", lambda **kw: prepare(held_out_bytes=2_000, **kw))
