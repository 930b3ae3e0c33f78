"""Merging: weights against a decay with fixed gradients, sums against a naive mean, refusals."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torch import Tensor

import nemotron_lite
from nemotron_lite.model import Nemotron
from nemotron_lite.train import (
    ResumeError,
    TrainConfig,
    merge_checkpoints,
    merge_weights,
    merge_windows,
)
from nemotron_lite.train.checkpoint_checks import FORMAT
from nemotron_lite.train.checkpointing import save_checkpoint
from nemotron_lite.train.fingerprint import run_fingerprint
from nemotron_lite.train.merging import linear, merged_state
from nemotron_lite.train.schedule import learning_rate, minus_sqrt
from tests.train.conftest import TINY

INCREASING = st.lists(st.integers(0, 300), min_size=1, max_size=12, unique=True).map(sorted)


@given(steps=INCREASING, floor=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_merge_is_the_decay_if_gradients_stay_the_same(
    steps: list[int], floor: float, seed: int
) -> None:
    """Updates that do not depend on the weights: at the peak rate, and with the real schedule."""
    generator = np.random.default_rng(seed)
    updates = generator.standard_normal((301, 3))
    if len(steps) > 1:
        # between two checkpoints, the merge knows only the sum: make the updates there equal
        for before, after in zip(steps, steps[1:], strict=False):
            updates[before + 1 : after + 1] = updates[after]
    at = np.cumsum(updates, axis=0)
    first, last = steps[0], steps[-1]
    decayed = at[first].copy()
    for s in range(first + 1, last + 1):
        rate = learning_rate(
            (s - first) / (last - first),
            peak=1.0,
            floor=floor,
            warmup_fraction=0.0,
            decay_fraction=1.0,
        )
        decayed += rate * updates[s]
    weights = merge_weights(steps, floor=floor)
    assert np.allclose(np.array(weights) @ at[steps], decayed, atol=1e-9)


def test_between_checkpoints_the_mean_factor_counts() -> None:
    """Written out by hand: three checkpoints, two updates each."""
    f = [1.0, (0.5 + (1 - math.sqrt(0.5))) / 2, (1 - math.sqrt(0.75)) / 2, 0.0]
    assert merge_weights([10, 12, 14], floor=0) == pytest.approx(
        [f[0] - f[1], f[1] - f[2], f[2] - f[3]]
    )


def test_steps_may_be_huge() -> None:
    """Tokens instead of updates: one spacing of Super is 25 billion."""
    calls = 0

    def counting(x: float) -> float:
        nonlocal calls
        calls += 1
        return minus_sqrt(x)

    found = merge_weights([0, 25_000_000_000], curve=counting, floor=0)
    assert calls <= 10_000
    assert found == pytest.approx([2 / 3, 1 / 3], abs=1e-6)  # the mean of 1 - sqrt(x) is 1/3
    assert sum(merge_weights([1, 2**52, 2**53])) == pytest.approx(1)
    # where not every update is counted, the sum over all of them is met
    mean = math.fsum(minus_sqrt(s / 100_003) for s in range(1, 100_004)) / 100_003
    assert merge_weights([0, 100_003], floor=0) == pytest.approx([1 - mean, mean], abs=1e-5)


@given(steps=INCREASING, floor=st.floats(0, 1))
def test_weights_are_shares(steps: list[int], floor: float) -> None:
    weights = merge_weights(steps, floor=floor)
    assert len(weights) == len(steps)
    assert math.fsum(weights) == pytest.approx(1)
    assert min(weights) >= -1e-12
    assert merge_weights([s + 1000 for s in steps], floor=floor) == weights


def test_the_curves_that_theory_knows() -> None:
    at = range(0, 1001, 100)
    assert merge_weights(at, curve=lambda x: 1.0) == (0.0,) * 10 + (1.0,)  # no decay
    assert merge_weights(at, floor=1.0) == (0.0,) * 10 + (1.0,)
    assert merge_weights(at, curve=lambda x: 0.0, floor=0) == (1.0,) + (0.0,) * 10
    mean = merge_weights(range(11), curve=linear, floor=0)  # a checkpoint after every update
    assert mean == pytest.approx([0.1] * 10 + [0.0])
    trapezoid = merge_weights(at, curve=linear, floor=0)
    assert trapezoid[1:-1] == pytest.approx([0.1] * 9)
    assert trapezoid[0] == pytest.approx(0.05, abs=1e-3)
    assert trapezoid[-1] == pytest.approx(0.05, abs=1e-3)
    # minus-sqrt: c_j falls like 1/sqrt(j), in the limit of many updates
    weights = merge_weights(range(0, 100_001, 1000), floor=0)
    for j in (5, 20, 60):
        assert weights[j] == pytest.approx(1 / (2 * math.sqrt(j * 100)), rel=1e-2)
    assert merge_weights([7]) == (1.0,)


def test_arguments_of_the_weights() -> None:
    for steps in ([], [3, 3], [5, 4]):
        with pytest.raises(ValueError, match="expected increasing numbers"):
            merge_weights(steps)
    with pytest.raises(TypeError, match=r"steps=2.5"):
        merge_weights([1, 2.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="floor"):
        merge_weights([1, 2], floor=1.5)
    with pytest.raises(ValueError, match="factors from 0 to 1"):
        merge_weights([0, 9], curve=lambda x: 1 + x)


def state(seed: int, config: nemotron_lite.NemotronConfig = TINY) -> dict[str, Tensor]:
    """Weights, with selection biases that are not zero."""
    model = Nemotron(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for buffer in model.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model.state_dict()


class NoText:
    def batch(self, *args: object, **options: object) -> None:
        raise AssertionError


def write_run(
    run: Path,
    steps: list[int],
    config: nemotron_lite.NemotronConfig = TINY,
    kind: str = "snapshots",
) -> list[Path]:
    found = []
    for step in steps:
        content = {
            "format": FORMAT,
            "model": state(step, config),
            "fingerprint": run_fingerprint(Nemotron(config), NoText(), TrainConfig(steps=1)),  # type: ignore[arg-type]
            "step": step,
        }
        found.append(save_checkpoint(run / kind, step, content, keep=99))
    return found


def naive(steps: list[int]) -> dict[str, Tensor]:
    """The definition, in float64."""
    total = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in state(0).items()}
    factors = [1.0]
    for a, b in zip(steps, steps[1:], strict=False):
        span = steps[-1] - steps[0]
        factors.append(
            sum(0.01 + 0.99 * (1 - ((s - steps[0]) / span) ** 0.5) for s in range(a + 1, b + 1))
            / (b - a)
        )
    for step, f, after in zip(steps, factors, [*factors[1:], 0.0], strict=True):
        for name, tensor in state(step).items():
            total[name] += (f - after) * tensor.double()
    return total


def test_every_window_of_a_run_against_the_definition(tmp_path: Path) -> None:
    write_run(tmp_path, [0, 10, 20, 40, 45])
    merges = merge_windows(tmp_path, [5, 25, 45])
    for window, steps in {5: [40, 45], 25: [20, 40, 45], 45: [0, 10, 20, 40, 45]}.items():
        model = merges[window]
        assert model.config == TINY
        assert not model.training
        for name, expected in naive(steps).items():
            found = model.state_dict()[name]
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6, msg=name)
        alone = merge_checkpoints(tmp_path, window=window).state_dict()
        assert all(torch.equal(alone[name], t) for name, t in model.state_dict().items())
    earlier = merge_checkpoints(tmp_path, window=20, until=20).state_dict()
    for name, expected in naive([0, 10, 20]).items():
        torch.testing.assert_close(earlier[name].double(), expected, rtol=1e-5, atol=1e-6)
    everything = merge_checkpoints(tmp_path).state_dict()
    assert torch.equal(everything["lm_head.weight"], merges[45].state_dict()["lm_head.weight"])
    itself = merge_checkpoints(tmp_path, window=0).state_dict()
    assert all(torch.equal(itself[name], t) for name, t in state(45).items())
    merges[5](torch.tensor([[5, 17, 3]])).logits.sum().backward()  # it can be trained


def test_folders_in_half_precision_are_summed_in_float32(tmp_path: Path) -> None:
    folders = []
    for seed in range(3):
        model = Nemotron(TINY)
        model.load_state_dict(state(seed))
        nemotron_lite.save(model.to(torch.bfloat16), tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    rounded = [nemotron_lite.load(f, dtype=torch.float32).state_dict() for f in folders]
    weights = merge_weights([0, 50, 100])
    model = merge_checkpoints(folders, steps=[0, 50, 100])
    for name, found in model.state_dict().items():
        expected = sum(w * t[name].double() for w, t in zip(weights, rounded, strict=True))
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"0 does not say after how many updates.*give steps="):
        merge_checkpoints(folders)  # one update apart they would weigh 0.99 and 0.01
    nemotron_lite.save(model, tmp_path / "merged")
    assert torch.equal(nemotron_lite.load(tmp_path / "merged").lm_head.weight, model.lm_head.weight)


def test_what_is_no_float_comes_from_the_newest(tmp_path: Path) -> None:
    files = []
    for step in (1, 2):
        content = {"model": {"w": torch.ones(2) * step, "count": torch.tensor([step, 7])}}
        files.append(save_checkpoint(tmp_path, step, content, keep=9))
    merged = merged_state(files, [0.25, 0.75])
    assert merged["count"].tolist() == [2, 7]
    assert merged["count"].dtype == torch.int64
    assert merged["w"].tolist() == [1.75, 1.75]


def test_different_models_are_refused_by_name(tmp_path: Path) -> None:
    files = write_run(tmp_path / "a", [10])
    wider = TINY.replace(moe_intermediate_size=16, routed_scaling_factor=2.0)
    files += write_run(tmp_path / "b", [20], wider)
    with pytest.raises(ValueError, match="different models") as error:
        merge_checkpoints(files)
    assert "moe_intermediate_size is 24 and 16" in str(error.value)
    assert "routed_scaling_factor is 1.0 and 2.0" in str(error.value)
    assert str(files[1]) in str(error.value)
    # the same sizes, other tokens
    other = write_run(tmp_path / "c", [20])
    for run, word in (("a", "x"), ("c", "y")):
        tokenizer = Tokenizer(models.WordLevel({word: 0, "?": 1}, unk_token="?"))
        (tmp_path / run / "tokenizer.json").write_text(tokenizer.to_str())
    with pytest.raises(ValueError, match="different tokens"):
        merge_checkpoints([files[0], *other])
    assert merge_checkpoints(tmp_path / "a").tokenizer.token_to_id("x") == 0


def test_a_window_needs_its_checkpoints(tmp_path: Path) -> None:
    write_run(tmp_path, [100, 200, 300], kind="checkpoints")
    for window, missing in ((150, "150"), (300, "0")):
        with pytest.raises(ValueError, match=f"needs a checkpoint after {missing} updates.*100, 2"):
            merge_checkpoints(tmp_path, window=window)
    with pytest.raises(ValueError, match="after 250 updates"):
        merge_checkpoints(tmp_path, window=100, until=250)
    with pytest.raises(ValueError, match="windows is empty"):
        merge_windows(tmp_path, [])
    with pytest.raises(FileNotFoundError, match="neither snapshots nor checkpoints"):
        merge_checkpoints(tmp_path / "checkpoints")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        merge_checkpoints([tmp_path / "step-00000100.pt"])


def test_files_without_a_step_or_out_of_order(tmp_path: Path) -> None:
    first, second = write_run(tmp_path, [10, 20])
    with pytest.raises(ValueError, match="increasing order"):
        merge_checkpoints([second, first])
    renamed = second.rename(tmp_path / "best.pt")
    with pytest.raises(ValueError, match=r"best.pt does not say.*steps="):
        merge_checkpoints([first, renamed])
    found = merge_checkpoints([first, renamed], steps=[10, 20]).state_dict()
    assert torch.isfinite(found["lm_head.weight"]).all()
    with pytest.raises(ValueError, match="1 steps for 2"):
        merge_checkpoints([first, renamed], steps=[10])
    with pytest.raises(ValueError, match="steps are for a list"):
        merge_checkpoints(tmp_path, steps=[10])


def test_a_relative_name_keeps_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = write_run(tmp_path, [10])
    tokenizer = Tokenizer(models.WordLevel({"x": 0, "?": 1}, unk_token="?"))
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    monkeypatch.chdir(path.parent)
    merged = merge_checkpoints([path.name])
    assert merged.tokenizer is not None
    assert merged.tokenizer.token_to_id("x") == 0


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    (path,) = write_run(tmp_path, [10])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ResumeError, match="damaged"):
        merge_checkpoints(tmp_path)
    bad = {"model": {"w": torch.ones(2)}, "fingerprint": {"sizes": {"depth": 3}}}
    save_checkpoint(tmp_path / "other" / "snapshots", 10, bad, keep=9)
    with pytest.raises(ValueError, match="does not hold a model of this version"):
        merge_checkpoints(tmp_path / "other")
    broken = {
        "model": {**state(1), "lm_head.weight": torch.full((96, 32), math.nan)},
        "fingerprint": run_fingerprint(Nemotron(TINY), NoText(), TrainConfig(steps=1)),  # type: ignore[arg-type]
    }
    save_checkpoint(tmp_path / "nan" / "snapshots", 10, broken, keep=9)
    with pytest.raises(ResumeError, match=r"lm_head.weight has NaN"):
        merge_checkpoints(tmp_path / "nan")


def test_the_curve_is_that_of_the_schedule() -> None:
    for x in (0.0, 0.04, 0.5, 1.0):
        assert minus_sqrt(x) == learning_rate(
            x, peak=1.0, floor=0.0, warmup_fraction=0.0, decay_fraction=1.0
        )
