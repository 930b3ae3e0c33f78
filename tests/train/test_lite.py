"""The shipped model's training: stages that resume, packing, the record; on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nemotron_lite
from nemotron_lite import shipped_models
from nemotron_lite.data import (
    CHAT_TOKENS,
    Batch,
    ConcatenatedDocuments,
    HeldOut,
    train_tokenizer,
)
from nemotron_lite.model import Nemotron
from nemotron_lite.train import ResumeError, TrainConfig, lite_recipe, lite_record, lite_training
from nemotron_lite.train.lite_training import train_in_stages
from nemotron_lite.train.run_log import read_log
from tests.cli.commands import TINY


def text() -> ConcatenatedDocuments:
    tokens = np.random.default_rng(0).integers(1, 200, 4000).astype(np.uint16)
    return ConcatenatedDocuments(tokens, np.array([0, 1500]))


def options(**changed: Any) -> TrainConfig:
    return TrainConfig(**{**dict(steps=6, batch_size=1, seq_len=16, save_every=2), **changed})


def losses(folder: Path) -> list[float]:
    return [record["ce"] for record in read_log(folder)]


def model() -> Nemotron:
    return Nemotron(TINY, seed=3)


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
@pytest.mark.parametrize("nvfp4_from", [None, 0.6])
def test_a_run_goes_on_in_either_stage(tmp_path: Path, stop: int, nvfp4_from: float | None) -> None:
    whole = train_in_stages(
        model(), text(), options(), tmp_path / "a", nvfp4_from=nvfp4_from, progress=False
    )
    assert whole.step == 6

    class StopError(Exception):
        pass

    def interrupt(record: dict[str, Any]) -> None:
        if record["step"] == stop:
            raise StopError

    def run(**more: Any) -> Any:
        return train_in_stages(
            model(),
            text(),
            options(),
            tmp_path / "b",
            nvfp4_from=nvfp4_from,
            progress=False,
            **more,
        )

    with pytest.raises(StopError):
        run(on_step=interrupt)
    assert run().step == 6
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert run().step == 6  # a finished run is left as it is
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    if nvfp4_from is None:
        return
    plain = tmp_path / "plain"
    train_in_stages(model(), text(), options(), plain, progress=False)
    assert losses(plain)[:4] == losses(tmp_path / "a")[:4]
    assert losses(plain)[4:] != losses(tmp_path / "a")[4:]


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    train_in_stages(model(), text(), options(), tmp_path, nvfp4_from=0.5, progress=False)
    with pytest.raises(ResumeError, match="lr"):
        train_in_stages(model(), text(), options(lr=1e-3), tmp_path, nvfp4_from=0.5, progress=False)
    for wrong in (0.0, 1.0, 7.0):
        with pytest.raises(ValueError, match="nvfp4_from"):
            train_in_stages(
                model(), text(), options(), tmp_path / "c", nvfp4_from=wrong, progress=False
            )


class _Text:
    """What `pack_lite` needs of a mixture."""

    def __init__(self) -> None:
        sample = ["def mean(values):\n    return sum(values) / len(values)\n"]
        self.tokenizer = train_tokenizer(sample, vocab_size=300, special_tokens=CHAT_TOKENS)

    def batch(self, index: int, *, batch_size: int, seq_len: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(index)
        return Batch(torch.randint(1, 270, (batch_size, seq_len), generator=generator))


@pytest.fixture
def small_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    few = dict(batches=1, batch_size=2, seq_len=32)
    monkeypatch.setattr(lite_training, "CALIBRATION", few)


@pytest.mark.usefixtures("small_calibration")
def test_what_is_packed_opens_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = model()
    plain.tokenizer = _Text().tokenizer
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    lite_training.pack_lite(plain, _Text(), tmp_path / "lite")
    monkeypatch.setattr(shipped_models, "FOLDER", tmp_path)
    opened = nemotron_lite.load("lite")
    assert {p.dtype for p in opened.parameters()} == {torch.float32}
    name = next(name for name in before if name.endswith("0.mixer.in_proj.weight"))
    rounded = opened.state_dict()[name]
    assert not torch.equal(rounded, before[name])
    torch.testing.assert_close(rounded, before[name], atol=0.2 * before[name].abs().max(), rtol=0)
    packed = nemotron_lite.load("lite", packed=True)
    tokens = torch.tensor([[5, 17, 3]])
    torch.testing.assert_close(packed(tokens).logits, opened(tokens).logits, atol=1e-4, rtol=1e-4)
    assert opened.tokenizer.get_vocab_size() == _Text().tokenizer.get_vocab_size()


@pytest.mark.parametrize("count", [1, 2, 299, 300, 301, 1999, 2000])
def test_a_thin_curve_keeps_the_shape(count: int) -> None:
    log = [
        {
            "tokens": 64 * (i + 1), "ce": 8 - i / count, "mtp": [9 - i / count, 1.0], "lr": 1e-3,
            **({"validation_loss": 5.0} if i % 500 == 499 else {}),
        }
        for i in range(count)
    ]  # fmt: skip
    curve = lite_record.thin_curve(log)
    sizes = {len(curve["tokens"]), len(curve["ce"]), len(curve["lr"]), *map(len, curve["mtp"])}
    assert sizes == {min(300, count)}
    assert len(curve["mtp"]) == 2
    assert curve["tokens"][-1] == 64 * count
    assert curve["ce"] == sorted(curve["ce"], reverse=True)
    assert np.mean(curve["ce"]) == pytest.approx(np.mean([r["ce"] for r in log]), abs=2e-3)
    assert curve["validation"]["tokens"] == [64 * n for n in range(500, count + 1, 500)]


def test_acceptance_is_counted_on_held_out_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lite_record, "NEW_TOKENS", 8)
    documents = tuple(np.arange(n) % 200 for n in (10, 65, 80, 200))
    found = lite_record.measure_acceptance(model().eval(), HeldOut(documents, 500))
    assert found["prompts"] == 3  # one is too short
    assert set(found["temperature"]) == {"0.0", "0.7"}
    for line in found["temperature"].values():
        assert 1 <= line["acceptance_length"] <= 5
        assert all(0 <= rate <= 1 for rate in line["rates"])
    without = Nemotron(TINY.replace(mtp_pattern="", mtp_depths=0)).eval()
    assert lite_record.measure_acceptance(without, HeldOut(documents, 500))["temperature"] == {}


def test_the_recipe_of_the_shipped_model() -> None:
    how = lite_recipe.lite_training("fp32")
    assert how.tokens_per_step == 4096
    assert how.steps == lite_recipe.LITE_STEPS
    assert lite_recipe.lite_config().mtp_depths == 2
    assert json.dumps(how.to_dict())
