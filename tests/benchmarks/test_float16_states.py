"""The benchmark of SSM states in float16: what it compares, and that it would see an error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import figures, record
from benchmarks.model import float16_states as bench
from nemotron_lite import Nemotron
from tests.checkpoint.tiny import TINY, randomize


@pytest.fixture(scope="module")
def found() -> dict[str, list[bench.Readings]]:
    model = Nemotron(TINY, seed=0)
    randomize(model.state_dict().items(), 3)
    tokens = torch.randint(128, (3, 41), generator=torch.Generator().manual_seed(0))
    return bench.read_text(model.eval(), tokens, 2)


def test_every_way_reads_the_same_tokens(found: dict[str, list[bench.Readings]]) -> None:
    assert {name: len(each) for name, each in found.items()} == {
        "float32": 1, "read at once": 1, "nearest": 1, "stochastic": 2
    }  # fmt: skip
    for each in found.values():
        for readings in each:
            for values in (readings.nll, readings.kl, readings.same):
                assert torch.stack(values).shape == (40, 3)
    exact = torch.stack(found["float32"][0].nll)
    at_once = torch.stack(found["read at once"][0].nll)
    torch.testing.assert_close(at_once, exact, atol=1e-4, rtol=1e-4)
    for name in ("nearest", "stochastic"):
        gap = (torch.stack(found[name][0].nll) - exact).abs()
        assert 1e-5 < gap.max() < 0.2, "float16 changes something, and not much"
    one, other = (torch.stack(readings.nll) for readings in found["stochastic"])
    assert not torch.equal(one, other)


def test_readings_are_losses_and_divergences() -> None:
    readings = bench.Readings()
    reference = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    other = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    readings.add(other, reference, torch.tensor([0, 1]))
    assert readings.nll[0].tolist() == pytest.approx([math.log(4), math.log(2)])
    # 3/4 log 3 - 1/4 log 3
    assert readings.kl[0].tolist() == pytest.approx([0.5 * math.log(3), 0.0], abs=1e-6)
    assert readings.same[0].tolist() == [False, True]


def test_stretches_rows_and_seeds(
    found: dict[str, list[bench.Readings]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    entries = bench.compare(found, (0, 16, 40))
    assert [(e["first"], e["as"]) for e in entries] == [
        (first, name)
        for first in (0, 16)
        for name in ("float32", "read at once", "nearest", "stochastic")
    ]
    counts = {e["as"]: e["change_percent"]["n"] for e in entries if "change_percent" in e}
    assert counts == {"read at once": 3, "nearest": 3, "stochastic": 6}
    nearest: dict[str, Any] = entries[6]
    exact, rounded = (torch.stack(found[n][0].nll)[16:40].mean(0) for n in ("float32", "nearest"))
    assert nearest["change_percent"]["each"] == pytest.approx(
        (100 * (rounded / exact - 1)).tolist()
    )
    content = {
        "path": "model(token, cache)", "model": "lite", "parameters": 14_130_400, "files": 3,
        "tokens": 40, "seeds": 2, "cache_bytes_of_a_row": {"float32": 2000, "float16": 1100},
        "results": entries,
    }  # fmt: skip
    record.write_record("float16_states", content)
    text = figures.float16_states(tmp_path)
    assert f"| 16 to 40 | {entries[4]['nats_per_token']['median']:.3f} | " in text
    assert f"| {nearest['change_percent']['median']:+.3f} (" in text
    assert "1,100 bytes instead of 2,000" in " ".join(text.split())
    assert json.loads((tmp_path / "float16_states.json").read_text())["results"] == entries


def test_rows_are_the_longest_files() -> None:
    documents = [np.full(n, n) for n in (5, 9, 7, 8)]
    assert bench.long_rows(documents, 2, 6).tolist() == [[9] * 6, [8] * 6]
    with pytest.raises(ValueError, match=r"have \[9, 8, 7\] tokens: expected 3 files of 8"):
        bench.long_rows(documents, 3, 8)
