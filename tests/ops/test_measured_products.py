"""Which library multiplies: what is measured, how it is kept, and who decides without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_lite.backends import measured_products as products
from nemotron_lite.backends import private_torch

ONEDNN = pytest.mark.skipif(
    not private_torch.HAS_ONEDNN_LINEAR, reason="this PyTorch has no oneDNN"
)


@pytest.fixture
def _measuring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(products.VARIABLE, "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(products, "_known", {})
    monkeypatch.setattr(products, "ROUND_SECONDS", 1e-6)


def table(**special: float) -> dict[str, Any]:
    """Times of one second everywhere, except for a library in one cell."""
    times: dict[str, Any] = {
        library: [[1.0] * len(products.SIZES) for _ in products.ROWS]
        for library in products.LIBRARIES
    }
    for library, seconds in special.items():
        times[library][3][5] = seconds
    return {**times, "bf16": 2.0}


def file_of(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "nemotron_lite").glob("products-*.json")
    return found


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (64, 6), (65, 7), (256, 7), (9999, 7)],
)
def test_classes_of_rows(rows: int, expected: int) -> None:
    assert products.row_class(rows) == expected
    assert rows <= products.ROWS[expected] or expected == 7


def test_classes_of_sizes() -> None:
    for number, size in enumerate(products.SIZES):
        assert products.size_class(size) == number
        assert products.size_class(size + 1) == min(number + 1, len(products.SIZES) - 1)
    assert products.size_class(1) == 0


def test_the_fastest_is_taken_if_it_gains_enough() -> None:
    rows, size = products.ROWS[3], products.SIZES[5]
    for times, onednn, prepacked in (
        (table(onednn=0.95), False, False),
        (table(onednn=0.8), True, False),
        (table(onednn=0.8, prepacked=0.75), True, False),
        (table(onednn=0.8, prepacked=0.7), True, True),
        (table(prepacked=0.7), False, True),
        (table(mkl=0.1), False, False),
    ):
        found = products._decide(times)
        cell = products.row_class(rows), products.size_class(size)
        assert found.onednn[cell[0]][cell[1]] is onednn
        assert found.prepacked[cell[0]][cell[1]] is prepacked
        assert sum(map(sum, found.onednn)) == onednn


@ONEDNN
@pytest.mark.usefixtures("_measuring")
def test_times_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = products.choices()
    times = json.loads(file_of(tmp_path).read_text())
    assert products._is_complete(times) and products._decide(times) == first
    monkeypatch.setattr(products, "_known", {})
    monkeypatch.setattr(products, "measure", lambda: pytest.fail("measured again"))
    assert products.choices() == first


@ONEDNN
@pytest.mark.usefixtures("_measuring")
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", json.dumps({**table(), "mkl": [[1.0]]}).encode(),
                json.dumps({**table(), "bf16": None}).encode(), b"\xff"],
)  # fmt: skip
def test_a_damaged_file_is_measured_again(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "measure", lambda: table(onednn=0.5))
    products.choices()
    file_of(tmp_path).write_bytes(content)
    monkeypatch.setattr(products, "_known", {})
    assert products.prefers_onednn(products.ROWS[3], products.SIZES[5])
    assert json.loads(file_of(tmp_path).read_text()) == table(onednn=0.5)


@ONEDNN
@pytest.mark.usefixtures("_measuring")
def test_the_times_of_a_faster_process_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure() -> dict[str, Any]:
        file = products._file(torch.get_num_threads())
        assert file is not None
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(table(prepacked=0.5)))
        return table(onednn=0.5)

    monkeypatch.setattr(products, "measure", measure)
    assert products.prefers_prepacked(products.ROWS[3], products.SIZES[5])
    assert not products.prefers_onednn(products.ROWS[3], products.SIZES[5])


@ONEDNN
@pytest.mark.usefixtures("_measuring")
def test_without_a_folder_it_measures_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "nemotron_lite").write_text("in the way")
    monkeypatch.setattr(products, "measure", lambda: table(onednn=0.5))
    assert products.prefers_onednn(products.ROWS[3], products.SIZES[5])
    assert "NEMOTRON_LITE_MEASURE=0 turns this off" in caplog.text


@ONEDNN
@pytest.mark.usefixtures("_measuring")
def test_what_the_calling_thread_has_set_is_not_seen() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        found = products.choices()
    assert found.bf16 > 0


@pytest.mark.usefixtures("_measuring")
def test_turned_off_pytorch_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.VARIABLE, "0")
    monkeypatch.setattr(products, "measure", lambda: pytest.fail("measured"))
    for rows in (1, 8, 1000):
        assert not products.prefers_onednn(rows, 10**6)
        assert not products.prefers_prepacked(rows, 10**6)
    assert not list(tmp_path.iterdir())
    for has in (False, True):
        monkeypatch.setattr(private_torch, "has_bf16_instructions", lambda has=has: has)
        assert products.prefers_bf16(torch.device("cpu")) is has
    assert products.prefers_bf16(torch.device("cuda"))
    monkeypatch.setenv(products.VARIABLE, "yes")
    monkeypatch.setattr(products, "_known", {})
    with pytest.raises(ValueError, match="NEMOTRON_LITE_MEASURE='yes': expected 1"):
        products.prefers_onednn(1, 10)


@pytest.mark.usefixtures("_measuring")
def test_bf16_must_be_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for ratio in (1.2, 3.0):
        monkeypatch.setattr(
            products,
            "_known",
            {torch.get_num_threads(): products._decide(table() | {"bf16": ratio})},
        )
        assert products.prefers_bf16(torch.device("cpu")) is (ratio > 2)


@ONEDNN
def test_two_processes_give_the_same_bits(tmp_path: Path) -> None:
    program = (
        "import torch, hashlib\n"
        "from nemotron_lite import Nemotron, NemotronConfig\n"
        "model = Nemotron(NemotronConfig.from_preset('lite', pattern='M*'), seed=0).eval()\n"
        "out = model(torch.arange(64)[None]).logits\n"
        "print(hashlib.sha256(out.detach().numpy().tobytes()).hexdigest())\n"
    )
    environment = {
        **os.environ, products.VARIABLE: "1", "XDG_CACHE_HOME": str(tmp_path),
    }  # fmt: skip
    outs = [
        subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert outs[0] == outs[1] != b""
    file_of(tmp_path)
