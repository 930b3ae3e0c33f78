"""A record says where its figures come from, and is either complete or not written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import record


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RECORDS", tmp_path / "project" / "benchmarks" / "records")
    return record.RECORDS


def test_a_record_carries_its_provenance(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = folder.parents[1]
    command = ["/usr/bin/python3.11", "-m", "benchmarks", f"{home}/notes.txt", "/elsewhere/peers"]
    monkeypatch.setattr(sys, "orig_argv", command)
    path = record.write_record(
        "speed", {"path": "ours", "result": {"n": 3, "median": 2.0, "min": 1.0, "max": 4.0}}
    )
    assert path == folder / "speed.json"
    found = json.loads(path.read_text())
    assert found["command"] == "python -m benchmarks notes.txt .../peers"
    assert found["result"]["median"] == 2.0
    assert found["machine"]["cores"] >= 1
    assert {"cpu", "threads", "ram_gib", "system"} <= set(found["machine"])
    assert {"python", "torch"} <= set(found["versions"])
    assert str(home) not in path.read_text()


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({"a": [{"median": 1.0}]}, r"speed\.a\[0\] has a median but not both of n and a spread"),
        ({"a": {"median": 1.0, "n": 3, "min": 0.5}}, r"speed\.a has a median"),
        ({"a": {"b": float("nan")}}, r"speed\.a\.b is nan"),
    ],
)
def test_a_figure_without_its_spread_is_an_error(folder: Path, payload: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record.write_record("speed", {"path": "ours", **payload})
    assert not folder.exists()


@pytest.mark.parametrize("name", ["", "../speed", "a/b"])
def test_a_name_is_a_file_name(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="plain file name"):
        record.write_record(name, {})


def test_a_record_says_which_calls_were_measured(folder: Path) -> None:
    with pytest.raises(ValueError, match="speed has no 'path': say in words which calls"):
        record.write_record("speed", {"value": 1})
    assert not folder.exists()


def test_a_failed_write_leaves_the_old_record(folder: Path) -> None:
    path = record.write_record("speed", {"path": "ours", "value": 1})
    before = path.read_text()
    with pytest.raises(TypeError):
        record.write_record("speed", {"path": "ours", "value": object()})
    assert path.read_text() == before
    assert [p.name for p in folder.iterdir()] == ["speed.json"]


@pytest.mark.parametrize(
    ("cpu", "name"),
    [
        ("AMD EPYC", "amd_epyc"),
        ("Intel(R) Xeon(R) Processor", "intel_xeon"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel_xeon_platinum_8481c"),
        ("AMD EPYC 9B14 96-Core Processor", "amd_epyc_9b14_96_core"),
    ],
)
def test_a_processor_in_a_file_name(cpu: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "machine", lambda: {"cpu": cpu})
    assert record.processor() == name
