"""Fixtures of the checkpoint tests: a model with each kind of layer, and folders to damage."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nemotron_lite import Nemotron, NemotronConfig, save
from tests.checkpoint.modelopt_folder import as_modelopt
from tests.checkpoint.tiny import TINY, randomize


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are so small that several threads are slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves without waiting for the disk, which only a power cut needs."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="session")
def tiny() -> NemotronConfig:
    """One layer of each kind, a second MoE layer, and MTP."""
    return TINY


@pytest.fixture(scope="session")
def make() -> Callable[..., Nemotron]:
    """A model with no parameter at its initial value: `make(config, seed=0, dtype=None)`."""

    def build(config: NemotronConfig, seed: int = 0, dtype: torch.dtype | None = None) -> Nemotron:
        model = Nemotron(config)
        randomize(model.state_dict().items(), seed)
        return model.to(dtype) if dtype else model

    return build


@pytest.fixture
def saved(tmp_path: Path, tiny: NemotronConfig, make: Callable[..., Nemotron]) -> Path:
    """A folder with a complete checkpoint of `tiny`, which tests may damage."""
    save(make(tiny), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def quantized(saved: Path) -> Path:
    """The same in ModelOpt's layout: experts in NVFP4, Mamba in FP8, scales of the cache."""
    as_modelopt(saved)
    return saved
