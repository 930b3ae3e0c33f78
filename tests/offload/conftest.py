"""One thread, and each random table only once: every model of a seed has the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache

import pytest
import torch

from nemotron_lite.offload import generated


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are so small that several threads are slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves without waiting for the disk, which only a power cut needs."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="package", autouse=True)
def _tables_once() -> Iterator[None]:
    """Drawing a table takes longer than most tests."""
    draw = generated.normal_table
    generated.normal_table = cache(draw)
    yield
    generated.normal_table = draw
