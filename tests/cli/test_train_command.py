"""`train` and `run`: own text, a checkpoint to start from, and nothing lost at the end."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import nemotron_lite
from nemotron_lite import checkpoint, data
from tests.cli import commands
from tests.cli.commands import call, copy_into, python_files

# No MTP module and no attention: these tests train often.
TINY = commands.TINY.replace(pattern="ME", mtp_pattern="", mtp_depths=0)


@pytest.fixture
def texts(tmp_path: Path, own_cache: None) -> tuple[Path, Path]:
    """A folder of Python files, and a file of JSON Lines with other text."""
    file, sources = tmp_path / "other.jsonl", python_files()
    lines = [json.dumps({"body": s.read_text(), "text": 5}) for s in sources[8:24]]
    file.write_text("\n".join([*lines, '{"body": "cut off']) + "\n")
    return copy_into(tmp_path / "text", sources[:8]), file


@pytest.fixture
def options(texts: tuple[Path, Path], tmp_path: Path) -> list[object]:
    """Options of a short run."""
    sizes = tmp_path / "config.json"
    sizes.write_text(json.dumps(TINY.to_hf()))
    return ["--model", sizes, "--text", texts[0], "--batch-size", 2, "--seq-len", 32]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_another_text_or_option_is_refused_unless_allowed(
    options: list[object], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    call("train", *options, "--out", run, "--steps", 2)
    before = (run / "model" / "tokenizer.json").read_bytes()
    other = [*options, "--text", texts[1], "--jsonl-field", "body", "--out", run, "--resume"]
    refused = call("train", *other, "--steps", 4, code=1).stderr
    assert re.search(r"\n  text +[0-9a-f]{30,}… +[0-9a-f]{30,}…\n  steps +2 +4\n", refused)
    assert "--allow-changed text --allow-changed steps" in refused
    allowed = ["--allow-changed", "text", "--allow-changed", "steps"]
    call("train", *other, "--steps", 4, *allowed)
    assert [r["step"] for r in records(run)] == [1, 2, 3, 4]
    assert (run / "model" / "tokenizer.json").read_bytes() == before  # still that of the run


def test_a_run_starts_from_a_checkpoint_in_bfloat16_with_its_tokenizer(
    options: list[object], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    call("train", *options, "--out", first, "--steps", 3)
    start = nemotron_lite.load(first / "model", dtype=torch.bfloat16)
    nemotron_lite.save(start, tmp_path / "start")
    more = ["--text", texts[1], "--jsonl-field", "body", "--batch-size", 2, "--seq-len", 32]
    tune = ["train", "--init-from", tmp_path / "start", *more, "--steps", 1, "--lr", 1e-30]
    shown = call(*tune, "--out", second)
    assert re.search(r"are bfloat16\. They are trained in\s+float32", shown.stderr)
    tuned = nemotron_lite.load(second / "model")
    assert tuned.dtype == torch.float32
    assert tuned.tokenizer.to_str() == start.tokenizer.to_str()
    for name, weight in start.named_parameters():  # with such a learning rate nothing moves
        torch.testing.assert_close(tuned.get_parameter(name), weight.float(), rtol=0, atol=1e-20)
    wrong = call(*tune, "--out", tmp_path / "x", "--model", "nano", code=1).stderr
    assert "the sizes are those of the checkpoint" in " ".join(wrong.split())
    wrong = call(*tune, "--out", tmp_path / "x", "--vocab-size", 400, code=1).stderr
    assert "the checkpoint has 300 tokens" in " ".join(wrong.split())
    assert not (tmp_path / "x").exists()


def test_validation_logs_and_recomputation(options: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shown = call(
        "train", *options, "--out", run, "--steps", 4, "--eval-every", 2, "--eval-batches", 1,
        "--log", "csv", "--gradient-checkpointing", "--gradient-accumulation-steps", 2,
    ).stdout  # fmt: skip
    losses = [r.get("validation_loss") for r in records(run)]
    assert [loss is not None for loss in losses] == [False, True, False, True]
    best = min(loss for loss in losses if loss is not None)
    assert f"Lowest validation loss: {best:.4f} after update" in shown
    with (run / "log.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [float(row["loss"]) for row in rows] == [r["loss"] for r in records(run)]
    assert "expected some of csv" in call(
        "train", *options, "--out", tmp_path / "x", "--steps", 1, "--log", "xml", code=1
    ).stderr  # fmt: skip
    assert "need the package tensorboard" in call(
        "train", *options, "--out", tmp_path / "x", "--steps", 1, "--log", "tensorboard", code=1
    ).stderr or _has_tensorboard()  # fmt: skip


def _has_tensorboard() -> bool:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return False
    return True


def test_a_failed_final_save_of_train_names_the_checkpoint_and_resume_saves_again(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", fail)
        shown = call("train", *options, "--out", run, "--steps", 2, code=1).stderr
    shown = " ".join(shown.split())
    assert "the disk is full. The training is not lost" in shown
    assert "step-00000002.pt" in shown
    assert "run the same command with --resume" in shown
    assert not (run / "model").exists()
    call("train", *options, "--out", run, "--steps", 2, "--resume")
    assert nemotron_lite.load(run / "model").config.pattern == "ME"
    assert [r["step"] for r in records(run)] == [1, 2]


def test_a_failed_save_of_run_goes_to_a_temporary_folder(
    tiny_lite: Path, options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.save

    def fail(model: Any, path: Path, *rest: object) -> None:
        if Path(path) == tmp_path / "out":
            raise OSError("the disk is full.")
        real(model, path, *rest)

    monkeypatch.setattr(checkpoint, "save", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    arguments = [*options[:4], "--max-seconds", 0.5, "--out", tmp_path / "out"]
    shown = " ".join(call("run", *arguments, code=1).stderr.split())
    folder = re.search(r"It is in (\S+/model) instead", shown)
    assert folder
    assert nemotron_lite.load(Path(folder[1])).tokenizer.get_vocab_size() == 300


@pytest.mark.parametrize("command", ["train", "run"])
def test_the_output_folder_is_tried_before_the_text_is_read(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(data, "prepare", lambda **_: pytest.fail("the text was read"))
    (tmp_path / "file").write_text("x")
    limit = ["--steps", 1] if command == "train" else ["--max-seconds", 1]
    model = options[:2]
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        shown = call(command, *model, *limit, "--out", out, code=1).stderr
        assert "file" in shown
        assert "Traceback" not in shown
    assert (tmp_path / "file").read_text() == "x"


def test_snapshots_of_a_run_are_merged(options: list[object], tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "merged"
    scored = ["--eval-every", 4, "--eval-batches", 1, "--merge-window", 2, "--merge-window", 4]
    call("train", *options, "--out", run, "--steps", 4, "--merge-every", 2, *scored)
    last = records(run)[-1]
    assert set(last["merged_validation_loss"]) == {"2", "4"}
    # update 1 of 4 is behind the warm-up already, and the decay begins after update 2
    shown = call("merge", "--run", run, "--out", out).stdout
    assert f"The merged model is in {out}." in " ".join(shown.split())
    shares = nemotron_lite.train.merge_weights([0, 2])
    assert re.search(rf"^ +0 +{shares[0]:.4f} +-$", shown, re.MULTILINE)
    assert re.search(rf"^ +2 +{shares[1]:.4f} +2.50e-03$", shown, re.MULTILINE)
    assert "Warning" not in shown
    merged, end = nemotron_lite.load(out), nemotron_lite.load(run / "model")
    assert merged.tokenizer.to_str() == end.tokenizer.to_str()
    expected = nemotron_lite.train.merge_checkpoints(run, window=2, until=2)
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name])
    assert not torch.equal(merged.lm_head.weight, end.lm_head.weight)
    late = ["merge", "--run", run, "--until", 4, "--out", tmp_path / "late"]
    shown = " ".join(call(*late, "--window", 2).stdout.split())
    assert "Warning: the learning rate was not constant in the updates 3 to 4" in shown
    wrong = call(*late, "--window", 3, code=1).stderr
    assert "needs a checkpoint after 1 updates; there are those after 0, 2, 4" in " ".join(
        wrong.split()
    )
    assert "is the run itself" in call("merge", "--run", run, "--out", run, code=1).stderr
    for name in ("model", "snapshots"):
        refused = call("merge", "--run", run, "--out", run / name, code=1).stderr
        assert "belongs to the run" in " ".join(refused.split())
    unchanged = nemotron_lite.load(run / "model").lm_head.weight
    assert torch.equal(unchanged, end.lm_head.weight)
