"""The figures of README.md and docs/benchmarks.md are those of the records, to the last digit."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import figures, record
from nemotron_lite import NemotronConfig, ledger


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


@pytest.fixture
def block(records: Path) -> Callable[[], str]:
    """All figures of the document, from the records as they are when it is called."""
    return lambda: "\n".join(figures.for_document(records).values())


@pytest.mark.parametrize(
    ("file", "blocks"),
    [(figures.README, figures.for_readme), (figures.DOCUMENT, figures.for_document)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_text_says_what_the_records_say(file: Path, blocks: Callable) -> None:
    text = file.read_text()
    new = figures.rewrite(text, blocks(record.RECORDS))
    assert new == text, "run python -m benchmarks figures"


def test_the_readme_has_three_figures_each_with_its_record(records: Path) -> None:
    (text,) = figures.for_readme(records).values()
    items = text.split("\n- ")
    assert len(items) == 3
    assert all("[record](benchmarks/records/" in item for item in items)
    assert all("(docs/benchmarks.md#" in item for item in items)
    sections = re.findall(r"^## (.*)$", figures.DOCUMENT.read_text(), re.M)
    anchors = {title.lower().replace(" ", "-") for title in sections}
    assert set(re.findall(r"benchmarks\.md#([\w-]+)", text)) <= anchors
    measured = figures.peers_by_processor(records, "M")
    assert all(file.name in text for file in measured.values())
    for file, ratio in zip(measured.values(), ("4.32", "5.43", "6.54"), strict=False):
        found = json.loads(file.read_text())
        for entry in found["measurements"]:
            entry["times_faster"]["transformers"]["median"] = float(ratio)
        file.write_text(json.dumps(found))
        (new,) = figures.for_readme(records).values()
        assert ratio in new and ratio not in text


def test_links_of_the_document_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", figures.DOCUMENT.read_text())
    assert len(links) > 10
    assert [link for link in links if not (figures.DOCUMENT.parent / link).exists()] == []


def test_a_changed_record_changes_its_figure_and_nothing_around(records: Path) -> None:
    text = figures.DOCUMENT.read_text()
    change(records / "model_speed_S_amd_epyc.json", "train", 7.654)
    new = figures.rewrite(text, figures.for_document(records))
    before, after = set(text.splitlines()), set(new.splitlines())
    assert len(before - after) == len(after - before) == 1
    assert "| 7.65, with " in (after - before).pop()


def test_of_two_records_the_newer_one_counts_part_by_part(
    records: Path, block: Callable[[], str]
) -> None:
    for file in records.glob("model_speed_S_amd_epyc-*decode*.json"):
        file.unlink()
    whole = records / "model_speed_S_amd_epyc.json"
    part = records / "model_speed_S_amd_epyc-decode.json"
    found = json.loads(whole.read_text())
    kept = [entry for entry in found["measurements"] if entry["what"] == "decode"]
    part.write_text(json.dumps(found | {"measurements": copy.deepcopy(kept)}))
    change(part, "decode", 8.5, date="2100-01-01T00:00:00+00:00")
    text = block()
    assert "after 512 / 4K tokens | 8.50 / 8.50 |" in text
    assert "[decode](../benchmarks/records/model_speed_S_amd_epyc-decode.json)" in text
    change(part, "decode", 8.5, date="1900-01-01T00:00:00+00:00")
    text = block()
    assert "8.50" not in text
    assert "model_speed_S_amd_epyc-decode.json" not in text


def test_ratios_and_errors_are_those_measured(records: Path) -> None:
    file = records / "ssd_operator.json"
    found = json.loads(file.read_text())
    for result in found["results"]:
        if result["what"] == "forward":
            for i, ratio in enumerate(result["times_faster"].values()):
                ratio["median"] = 5.0 + i
        if result.get("decay") == "strong" and "errors" in result:
            result["errors"]["ours"]["dA"] = 3.2e-5
    file.write_text(json.dumps(found))
    text = figures.operator(records).replace("\n", " ")
    assert "5.00 times as fast as the best of 4 peers forward" in text
    assert "error is at most 3e-5 in the result" in text
    for result in found["results"]:
        if "times_faster" in result:
            result["times_faster"] = {"transformers": result["times_faster"]["transformers"]}
    file.write_text(json.dumps(found))
    text = figures.operator(records).replace("\n", " ")
    assert "5.00 times as fast as transformers' implementation forward" in text


def test_a_missing_block_or_measurement_is_an_error(records: Path) -> None:
    with pytest.raises(ValueError, match=r"named \[\], expected \[''\]"):
        figures.rewrite("no comments here", {"": "figures"})
    for file in records.glob("model_speed_M_*.json"):
        found = json.loads(file.read_text())
        found["measurements"] = [e for e in found["measurements"] if e["what"] != "train"]
        file.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"no record has 'train'.*run model_speed first"):
        figures.model(records)


def test_all_benchmarks_end_with_the_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = []
    module = type("Module", (), {"main": staticmethod(called.append)})
    monkeypatch.setattr(command, "import_module", lambda name: called.append(name) or module)
    command.main([])
    assert called[-2] == "benchmarks.figures"
    assert "benchmarks.model.removal" in called
    for name in ("cpu_peers", "busy_machine", "gpu_model"):
        assert f"benchmarks.model.{name}" not in called, "needs more than this package"
    called.clear()
    command.main(["--quick"])
    assert "benchmarks.figures" not in called


def test_every_kind_of_figure_follows_its_record(records: Path) -> None:
    """One changed number of each record shows in the text."""

    def set_everywhere(value: object, key: str, number: float) -> object:
        if isinstance(value, dict):
            return {
                k: number if k == key else set_everywhere(v, key, number) for k, v in value.items()
            }
        return [set_everywhere(v, key, number) for v in value] if isinstance(value, list) else value

    for name, key, number, function, shown in (
        ("growth", "median", 77.4, figures.growth, "| 77 | 77 |"),
        ("bf16_quality", "float32", 1.23456, figures.bfloat16, "1.2346 in float32"),
        ("gpu_model_nvidia_h200", "share_of_floor", 0.123, figures.gpu, "| 12% |"),
        ("nvfp4_checkpoints_size", "bits_a_weight", 4.321, figures.checkpoints, "4.32 bits"),
        ("nvfp4_checkpoints_loss", "median", 0.654, figures.loss_of_checkpoints, "| +0.65 ("),
        ("nvfp4_training_times", "median", 3.219, figures.training, "3.22 times a BF16 step"),
        ("nvfp4_training_lite", "median", 0.777, figures.training, "| +0.78 ("),
    ):
        file = records / f"{name}.json"
        assert shown not in function(records), name
        file.write_text(json.dumps(set_everywhere(json.loads(file.read_text()), key, number)))
        assert shown in function(records), name


def test_a_figure_of_an_earlier_lite_says_so(records: Path) -> None:
    """Until its record is that of the preset's present size; other models never say it."""
    now = ledger.parameters(NemotronConfig.from_preset("lite")).total
    note = f"(of an earlier preset; now {now / 1e6:.1f})"
    of_lite = {
        "bf16_quality": figures.bfloat16,
        "nvfp4_training_lite": figures.training,
        "nvfp4_training_times": figures.training,
    }
    for name in of_lite:
        file = records / f"{name}.json"
        found = json.loads(file.read_text())
        found.get("scale", found)["parameters"] = now
        file.write_text(json.dumps(found))
    whole = "\n".join(figures.for_document(records).values())
    assert f"{now / 1e6:.1f} million parameters" in whole
    assert "earlier preset" not in whole
    for name, function in of_lite.items():
        file = records / f"{name}.json"
        new = file.read_text()
        found = json.loads(new)
        found.get("scale", found)["parameters"] = 2_000_000
        file.write_text(json.dumps(found))
        text = " ".join(function(records).split())
        assert text.count(f"2.0 million parameters {note}") == 1, name
        file.write_text(new)


def test_other_models_have_no_earlier_preset(records: Path) -> None:
    file = records / "bf16_quality.json"
    found = json.loads(file.read_text()) | {"model": "mine", "parameters": 2_000_000}
    file.write_text(json.dumps(found))
    text = " ".join(figures.bfloat16(records).split())
    assert "the model mine, with 2.0 million parameters, needs" in text
    assert "earlier preset" not in text
