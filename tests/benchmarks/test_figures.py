"""The README's figures are those of the records, to the last digit."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest

from benchmarks import __main__ as door
from benchmarks import figures, record


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """A copy of the committed records that may be changed."""
    return Path(shutil.copytree(record.RECORDS, tmp_path / "records"))


def change(file: Path, what: str, ratio: float, **more: object) -> None:
    """Another ratio for every entry of one kind."""
    found = json.loads(file.read_text()) | more
    for entry in found["measurements"]:
        if entry["what"] == what:
            entry["times_faster"]["median"] = ratio
    file.write_text(json.dumps(found))


def test_the_readme_says_what_the_records_say() -> None:
    text = figures.README.read_text()
    assert figures.rewrite(text, record.RECORDS) == text, "run python -m benchmarks figures"


def test_a_changed_record_changes_the_readme_and_nothing_around(records: Path) -> None:
    text = figures.README.read_text()
    change(records / "model_speed_S.json", "train", 7.654)
    new = figures.rewrite(text, records)
    before, after = set(text.splitlines()), set(new.splitlines())
    assert len(before - after) == len(after - before) == 1
    assert "| 7.65, with " in (after - before).pop()


def test_of_two_records_the_newer_one_counts_part_by_part(records: Path) -> None:
    for file in records.glob("model_speed_S-*decode*.json"):
        file.unlink()
    whole, part = records / "model_speed_S.json", records / "model_speed_S-decode.json"
    found = json.loads(whole.read_text())
    kept = [entry for entry in found["measurements"] if entry["what"] == "decode"]
    part.write_text(json.dumps(found | {"measurements": copy.deepcopy(kept)}))
    change(part, "decode", 8.5, date="2100-01-01T00:00:00+00:00")
    block = figures.block(records)
    assert "behind 512 / 4K tokens | 8.50 / 8.50 |" in block
    assert "[decode](benchmarks/records/model_speed_S-decode.json)" in block
    change(part, "decode", 8.5, date="1900-01-01T00:00:00+00:00")
    block = figures.block(records)
    assert "8.50" not in block
    assert "model_speed_S-decode.json" not in block


def test_ratios_and_errors_stand_as_measured(records: Path) -> None:
    file = records / "ssd_operator.json"
    found = json.loads(file.read_text())
    for result in found["results"]:
        if result["what"] == "forward":
            for i, ratio in enumerate(result["times_faster"].values()):
                ratio["median"] = 5.0 + i
        if result.get("decay") == "strong" and "errors" in result:
            result["errors"]["ours"]["dA"] = 3.2e-5
    file.write_text(json.dumps(found))
    block = figures.block(records).replace("\n", " ")
    assert "5.00 times as fast as the best of 4 peers forward" in block
    assert "error of at most 3e-5 in every value" in block
    for result in found["results"]:
        if "times_faster" in result:
            result["times_faster"] = {"transformers": result["times_faster"]["transformers"]}
    file.write_text(json.dumps(found))
    block = figures.block(records).replace("\n", " ")
    assert "5.00 times as fast as transformers' form of it forward" in block


def test_what_cannot_be_written_is_said(records: Path) -> None:
    with pytest.raises(ValueError, match="one stretch of text between"):
        figures.rewrite("no comments here", records)
    for file in records.glob("model_speed_M*.json"):
        found = json.loads(file.read_text())
        found["measurements"] = [e for e in found["measurements"] if e["what"] != "train"]
        file.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"no record has 'train'.*run model_speed first"):
        figures.block(records)


def test_all_benchmarks_end_with_the_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = []
    module = type("Module", (), {"main": staticmethod(called.append)})
    monkeypatch.setattr(door, "import_module", lambda name: called.append(name) or module)
    door.main([])
    assert called[-2] == "benchmarks.figures"
    called.clear()
    door.main(["--quick"])
    assert "benchmarks.figures" not in called
