"""The benchmark beside a busy program: what is started where, and how shares are computed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import figures, record
from benchmarks.model import busy_machine as busy
from nemotron_lite import NemotronConfig
from tests.benchmarks.test_figures import records  # noqa: F401  (a fixture)

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two cores",
)


def test_a_neighbour_counts_on_its_core_and_ends() -> None:
    core = busy.two_cores()[1]
    with busy.neighbour(core) as pid:
        process = psutil.Process(pid)
        assert process.cpu_affinity() == [core]
        before = sum(process.cpu_times()[:2])
        end = time.monotonic() + 20
        while sum(process.cpu_times()[:2]) < before + 0.05:
            assert time.monotonic() < end, "it uses its core"
            time.sleep(0.02)
    assert not psutil.pid_exists(pid)


def test_a_measured_process_has_the_two_cores_and_we_keep_ours() -> None:
    mine, (core, _) = os.sched_getaffinity(0), busy.two_cores()
    code = "import os; print(sorted(os.sched_getaffinity(0)))"
    assert busy.run([sys.executable, "-c", code], [core]).strip() == f"[{core}]"
    assert os.sched_getaffinity(0) == mine
    with pytest.raises(RuntimeError, match="no such thing"):
        busy.run([sys.executable, "-c", "raise ValueError('no such thing')"], [core])


def test_one_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    with pytest.raises(RuntimeError, match="may use 1 core; expected 2"):
        busy.two_cores()


def test_shares_are_those_of_neighbours_in_time() -> None:
    order: list[str] = []
    quiet, beside = iter([100.0, 200.0, 100.0]), iter([50.0, 60.0, 20.0])
    entry = busy.compare(
        lambda: order.append("q") or next(quiet), lambda: order.append("b") or next(beside), 3
    )
    assert "".join(order) == "qbbqqb"
    assert entry["share_of_quiet"] == {"n": 3, "median": 0.3, "min": 0.2, "max": 0.5}
    assert entry["reached"] is False


def test_first_updates_are_not_counted() -> None:
    log = [{"tokens_per_second": speed} for speed in (1.0, 1.0, 1.0, 8.0, 6.0, 7.0)]
    assert busy._median_speed(log) == 7.0
    with pytest.raises(RuntimeError, match="3 updates: expected more than 3"):
        busy._median_speed(log[:3])


def test_ways_of_starting_and_the_table(
    records: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "still to be made" in figures.busy(records)
    config = NemotronConfig.from_preset("lite", pattern="M*E", vocab_size=512)
    text = tmp_path / "text.txt"
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text.write_text("\n".join(f.read_text(encoding="utf-8") for f in files)[:700_000])
    commands: list[list[str]] = []
    popen = subprocess.Popen

    def noted(command: list[str], **given: object) -> object:
        commands.append(command)
        return popen(command, **given)

    monkeypatch.setattr(subprocess, "Popen", noted)
    given = {"size": (4, 3), "rounds": 1, "text": text}
    entries = busy.measure_all(config, ["command line"], ["decoding"], **given)
    spins = ["sched_setaffinity" in command[-1] for command in commands]
    assert spins == [False, True, False], "the busy one has a neighbour"
    assert [command[3] for command in commands if not spins[commands.index(command)]] == [
        "generate"
    ] * 2
    busy.make_files(tmp_path, config, text)
    for start, work in (("command line", "training"), ("thread", "decoding")):
        assert busy.speed(start, work, tmp_path, (4, 3), text, busy.two_cores()) > 0
    assert commands[-2][3] == "train" and "'thread', 'decoding'" in commands[-1][-1]
    monkeypatch.setattr(record, "RECORDS", records)
    entries[0]["share_of_quiet"] |= {"median": 0.456}
    record.write_record(
        "busy_machine_amd_epyc",
        {"path": "p", "model": "other", "parameters": 9, "results": entries},
    )
    table = figures.busy(records)
    assert "| command line | decoding |" in table and "| 46% (" in table
