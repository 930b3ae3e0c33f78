"""Cache: a copy continues the same; a file is whole or absent; sizes."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_lite.cache import Cache
from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers import KVCache
from nemotron_lite.model import Nemotron
from tests.test_model import TINY, _tokens


@pytest.fixture(scope="module")
def model() -> Nemotron:
    return Nemotron(TINY, dtype=torch.float64, seed=1)


def test_a_clone_continues_the_same_whatever_the_other_does(model: Nemotron) -> None:
    tokens = _tokens(2, 20)
    cache = model.empty_cache(2, capacity=4)
    model(tokens[:, :8], cache, lengths=torch.tensor([8, 5]))
    early = cache.clone()
    model(_tokens(2, 5), cache)  # overwrites states, grows keys and values
    late = cache.clone()
    assert early.lengths.tolist() == [8, 5] and late.lengths.tolist() == [13, 10]
    futures = [model(tokens[:, 8:], early.clone()).logits for _ in range(2)]
    assert torch.equal(*futures)
    for row, n in enumerate((8, 5)):
        text = torch.cat([tokens[row : row + 1, :n], tokens[row : row + 1, 8:]], 1)
        exact = model(text).logits[0, n:]
        torch.testing.assert_close(futures[0][row], exact, rtol=1e-9, atol=1e-9)
    assert torch.equal(model(tokens[:, 8:], late).logits, model(tokens[:, 8:], cache).logits)
    assert early.nbytes < late.nbytes == cache.nbytes


@pytest.mark.parametrize("ragged", [False, True])
def test_save_and_load(model: Nemotron, tmp_path: Path, ragged: bool) -> None:
    tokens = _tokens(2, 9)
    cache = model.empty_cache(2, capacity=64)
    model(tokens, cache, lengths=torch.tensor([9, 4]) if ragged else None)
    cache.save(tmp_path / "cache")
    again = Cache.load(tmp_path / "cache")
    assert (again.pattern, again.mtp_pattern) == (TINY.pattern, "")
    assert again.lengths.tolist() == cache.lengths.tolist()
    new = _tokens(2, 3)
    assert torch.equal(model(new, again).logits, model(new, cache).logits)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"], "no temporary file is left"
    kv = 2 * 2 * 2 * 9 * 8 * 8  # k and v, rows, heads, valid tokens, width, bytes
    mamba = 2 * 2 * (4 * 8 * 8 + 3 * TINY.conv_dim) * 8
    assert (tmp_path / "cache").stat().st_size < kv + mamba + 2000


def test_the_mtp_module_s_cache_is_saved_with_its_pattern(tmp_path: Path) -> None:
    config = TINY.replace(mtp_pattern="*E", mtp_depths=1)
    cache = Cache.empty(config, 1, mtp=True)
    cache.mtp[0].k.fill_(3)
    cache.advance_mtp(2)
    cache.save(tmp_path / "cache")
    again = Cache.load(tmp_path / "cache")
    assert (again.pattern, again.mtp_pattern) == (config.pattern, "*E")
    assert [type(layer) for layer in again.mtp] == [KVCache, type(None)]
    assert torch.equal(again.mtp[0].k, cache.mtp[0].k[:, :, :2])


def test_a_failed_save_keeps_the_old_file(
    model: Nemotron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache"
    cache = model.empty_cache(1)
    model(_tokens(1, 4), cache)
    cache.save(path)
    before = path.read_bytes()

    def broken(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("nemotron_lite.cache_file.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        cache.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


SAVE_OFTEN = """
import sys
from nemotron_lite import Cache, NemotronConfig

cache = Cache.empty(NemotronConfig(pattern="M", vocab_size=16, hidden_size=16), 64)
for _ in range(60):
    cache.save(sys.argv[1])
"""


def test_two_processes_save_into_one_folder(tmp_path: Path) -> None:
    both = [
        subprocess.Popen([sys.executable, "-c", SAVE_OFTEN, str(tmp_path / name)])
        for name in ("a", "b")
    ]
    assert [one.wait() for one in both] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


KILLED_WHILE_SAVING = """
import os, signal, sys
from nemotron_lite import Cache, NemotronConfig, cache_file

def write_half(tensors, path, metadata):
    (path.parent / ".tmp123").write_text("half")  # what safetensors writes before it renames
    os.kill(os.getpid(), signal.SIGKILL)

cache_file.save_file = write_half
Cache.empty(NemotronConfig(pattern="M", vocab_size=16, hidden_size=16), 1).save(sys.argv[1])
"""


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path / "a")]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    Cache.empty(TINY, 1).save(tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize(
    "counts",
    [1.0, True, [1, 1], "1", None, torch.tensor([1.0, 1.0]), torch.tensor([True, True])],
    ids=str,
)
def test_counts_that_are_no_integers_change_nothing(model: Nemotron, counts: Any) -> None:
    accept = getattr(Cache.accept, "__wrapped__", Cache.accept)  # without the check of types
    cache, tokens = model.empty_cache(2), _tokens(2, 3)
    model(tokens, cache, draft=True)
    with pytest.raises(TypeError, match=r"counts.*expected (an integer|integers)"):
        accept(cache, counts)
    cache.accept(3)
    new = _tokens(2, 1)
    expected = model(torch.cat([tokens, new], 1)).logits[:, 3:]
    torch.testing.assert_close(model(new, cache).logits, expected, rtol=1e-9, atol=1e-9)


def test_sizes_of_super() -> None:
    config = NemotronConfig.from_preset("super")
    cache = Cache.empty(config, 1, device="meta", dtype=torch.bfloat16, capacity=1)
    kv = [m for m in cache.layers if isinstance(m, KVCache)]
    assert sum(m.k.nbytes + m.v.nbytes for m in kv) == 8192
    rest = [m for m in cache.layers if m is not None and not isinstance(m, KVCache)]
    assert sum(m.ssm.nbytes for m in rest) == 167_772_160
    assert sum(m.conv.nbytes for m in rest) == 2_457_600


def test_a_cache_that_was_left_in_the_middle_of_a_pass_is_not_saved(tmp_path: Path) -> None:
    cache = Cache.empty(TINY, 1)
    cache.broken_by = "KeyboardInterrupt"
    with pytest.raises(ValueError, match=r"in the middle \(KeyboardInterrupt\)"):
        cache.save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_needs_rows() -> None:
    with pytest.raises(ValueError, match="batch=0"):
        Cache.empty(TINY, 0)


def test_a_shallow_copy_shares_no_buffer() -> None:
    config = NemotronConfig.from_preset("lite", pattern="M*", vocab_size=32)
    cache = Cache.empty(config, 1)
    buffers = {t.data_ptr() for each in cache.layers if each for t in each.buffers}
    twin = copy.copy(cache)
    assert not buffers & {t.data_ptr() for each in twin.layers if each for t in each.buffers}
