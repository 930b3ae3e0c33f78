"""A load beside a save gives the old model or the new one, and never parts of both."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_lite import CheckpointError, Nemotron, folder_replacement, load, save
from nemotron_lite.checkpoint import contents, loading, weight_reading
from tests.checkpoint.tiny import TINY

pytestmark = pytest.mark.usefixtures("no_fsync")
Make = Callable[..., Nemotron]


def constant(value: float) -> Nemotron:
    model = Nemotron(TINY, device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)
    return model


def values(model: Nemotron) -> set[float]:
    return {float(v) for tensor in model.state_dict().values() for v in tensor.unique()}


@pytest.fixture(params=["exchange", "file by file"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "file by file":
        monkeypatch.setattr(folder_replacement, "exchange_is_safe", lambda new, path: False)


@pytest.mark.parametrize("moment", range(5))
def test_a_save_in_the_middle_of_a_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """At each moment in which the load goes on to the next files."""
    monkeypatch.setattr(weight_reading, "REOPEN_AFTER", 20_000)
    save(constant(1), tmp_path / "m", max_shard_bytes=40_000)
    real, calls = weight_reading._read, iter(range(1000))

    def read(*arguments: Any) -> Any:
        if next(calls) == moment:
            save(constant(2), tmp_path / "m", max_shard_bytes=40_000)
        return real(*arguments)

    monkeypatch.setattr(weight_reading, "_read", read)
    assert values(load(tmp_path / "m")) == {2.0}


def test_an_error_in_between_is_no_error_of_the_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(constant(1), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"damaged")
    real, calls = contents.read_headers, iter(range(1000))

    def headers(folder: Path) -> Any:
        found = real(folder)
        if next(calls) == 0:
            save(constant(2), tmp_path / "m")
        return found

    monkeypatch.setattr(contents, "read_headers", headers)
    assert values(load(tmp_path / "m")) == {2.0}


def test_a_folder_that_changes_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(constant(1), tmp_path / "m")
    real = loading._read_folder

    def read(*arguments: Any) -> Any:
        found = real(*arguments)
        save(constant(2), tmp_path / "m")
        return found

    monkeypatch.setattr(loading, "_read_folder", read)
    with pytest.raises(CheckpointError, match="another process replaced it 5 times"):
        load(tmp_path / "m")


def test_two_that_save_and_one_that_loads(tmp_path: Path) -> None:
    save(constant(0), tmp_path / "m")

    def work(value: float) -> None:
        model = constant(value)
        for _ in range(4):
            save(model, tmp_path / "m", max_shard_bytes=40_000 if value > 1 else 10**9)

    threads = [threading.Thread(target=work, args=(float(value),)) for value in (1, 2)]
    for thread in threads:
        thread.start()
    found = []
    while any(thread.is_alive() for thread in threads):
        with suppress(CheckpointError):  # replaced more often than a load tries
            found.append(values(load(tmp_path / "m")))
    found.append(values(load(tmp_path / "m")))
    assert all(len(each) == 1 for each in found), found
    assert found[-1] in ({1.0}, {2.0})
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("phase", ["clearing", "filling"])
def test_load_completes_an_interrupted_save(tmp_path: Path, phase: str) -> None:
    """Only files are moved in such a save, so the state is made by hand here."""
    save(constant(1), tmp_path / "m")
    save(constant(2), tmp_path / "n")
    staging = tmp_path / "m" / f".nemotron-lite.{phase}-0123456789abcdef"
    for folder in ("old", "new", "last"):
        (staging / folder).mkdir(parents=True)
    for name in sorted(os.listdir(tmp_path / "n")):
        (tmp_path / "n" / name).rename(
            staging / ("last" if name == "config.json" else "new") / name
        )
    for name in ("config.json", "model.safetensors") if phase == "filling" else ("config.json",):
        (tmp_path / "m" / name).rename(staging / "old" / name)
    shutil.rmtree(tmp_path / "n")
    assert values(load(tmp_path / "m")) == ({1.0} if phase == "clearing" else {2.0})
    assert not staging.exists()
