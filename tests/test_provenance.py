"""Machine and versions of a record: what is there, and nothing that is not."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from nemotron_lite import provenance


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(provenance, "CPUINFO", file)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "some_architecture")
    return file


def test_versions_of_what_is_installed() -> None:
    found = provenance.versions(("torch", "no-such-package"))
    assert found == {"python": platform.python_version(), "torch": torch.__version__}


def test_the_processor_is_the_first_one_that_is_named(cpuinfo: Path) -> None:
    cpuinfo.write_text("flags\t: fpu\nmodel name\t: One: 2 GHz\nmodel name\t: Other\n")
    found = provenance.describe_machine()
    assert found["cpu"] == "One: 2 GHz"
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1


def test_a_processor_without_a_name(cpuinfo: Path) -> None:
    assert provenance.describe_machine()["cpu"] == "some_architecture", "no such file"
    cpuinfo.write_text("model name\t: \nflags\t: fpu\n")
    assert provenance.describe_machine()["cpu"] == "some_architecture", "an empty name"
