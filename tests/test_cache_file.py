"""Damaged files of saved caches: each is refused in words, or gives the cache that was saved."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nemotron_lite import cache_file
from nemotron_lite.cache import Cache, Transcript
from nemotron_lite.model import Nemotron
from tests.test_model import TINY, _tokens

CONFIG = TINY.replace(mtp_pattern="*E", mtp_depths=1)
DAMAGED = 400  # random files
SECONDS = 30  # the most that one of them may take: none of them hangs


@pytest.fixture(scope="module")
def model() -> Nemotron:
    return Nemotron(CONFIG, seed=1).eval()


@pytest.fixture(scope="module")
def cache(model: Nemotron) -> Cache:
    """Two rows of different lengths, float16 states, entries of the MTP module, a transcript."""
    cache = model.empty_cache(2, mtp=True, ssm_dtype=torch.float16, ssm_seed=7)
    with torch.no_grad():
        model(_tokens(2, 9), cache, lengths=torch.tensor([9, 4]))
    cache.mtp[0].k.normal_()
    cache.advance_mtp(torch.tensor([3, 0]))
    tokens: list[list[int] | None] = [None, [5, 0, 7, CONFIG.vocab_size - 1]]
    cache.transcript = Transcript(tokens, torch.randn(2, CONFIG.hidden_size), [9, 4])
    return cache


@pytest.fixture(scope="module")
def saved(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "cache"
    cache.save(path)
    return path


def content(cache: Cache) -> list[Any]:
    """Everything that decides how a cache continues."""
    layers = [layer for layer in [*cache.layers, *cache.mtp] if layer is not None]
    extras = [layer.saved_extra() for layer in layers]
    tensors = [
        (name, tensor.dtype, tensor.tolist())
        for part, length in ((cache.layers, 9), (cache.mtp, 3))
        for layer in part
        if layer is not None
        for name, tensor in layer.saved_tensors(length).items()
    ]
    numbers = (cache.pattern, cache.mtp_pattern, cache.lengths.tolist())
    left = cache.transcript
    transcript = None if left is None else (left.tokens, left.hidden.dtype, left.hidden.tolist())
    return [numbers, cache.mtp_lengths.tolist(), extras, tensors, transcript]


def refused_or_equal(path: Path, original: list[Any]) -> bool:
    """Whether a file is refused in words; False if it gives the original cache."""
    started = time.monotonic()
    found, words = None, ""
    try:
        found = Cache.load(path)
    except (ValueError, FileNotFoundError) as error:
        words = str(error)
    assert time.monotonic() - started < SECONDS
    if found is None:
        assert str(path) in words and len(words) < 1000
    else:
        assert content(found) == original
    return found is None


def damaged(whole: bytes, seed: int) -> Iterator[bytes]:
    """Files with bits flipped, bytes lost, added, repeated and overwritten."""
    draw = random.Random(seed)
    header = 8 + int.from_bytes(whole[:8], "little")
    while True:
        end = header if draw.random() < 0.6 else len(whole)
        place, length = draw.randrange(end), draw.choice([1, 2, 8, 100, 4096])
        before, after = whole[:place], whole[place + length :]
        yield draw.choice(
            [
                whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :],
                before,
                before + after,
                before + draw.randbytes(length) + whole[place:],
                before + draw.randbytes(length) + after,
                before + bytes(length) + after,
                whole + draw.randbytes(length),
                before + whole[place : place + length] * 2 + after,
                before + str(draw.choice([-1, 0, 10**6, 10**400])).encode() + after,
            ]
        )


def test_what_is_saved_is_loaded(cache: Cache, saved: Path) -> None:
    assert not refused_or_equal(saved, content(cache))


def test_files_damaged_at_random(cache: Cache, saved: Path, tmp_path: Path) -> None:
    whole, original, path = saved.read_bytes(), content(cache), tmp_path / "cache"
    refused = 0
    for piece, _ in zip(damaged(whole, seed=15), range(DAMAGED), strict=False):
        path.write_bytes(piece)
        refused += refused_or_equal(path, original)
    assert refused > 0.9 * DAMAGED, "hardly any damage is harmless"


def test_every_bit_counts(cache: Cache, saved: Path, tmp_path: Path) -> None:
    """One bit of each byte of the header, and of some in each tensor."""
    whole, original, path = saved.read_bytes(), content(cache), tmp_path / "cache"
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(header), *range(header, len(whole), 97), len(whole) - 1]
    draw, harmless = random.Random(0), 0
    for place in places:
        flipped = bytes([whole[place] ^ 1 << draw.randrange(8)])
        path.write_bytes(whole[:place] + flipped + whole[place + 1 :])
        harmless += not refused_or_equal(path, original)
    # Only the blanks behind the header may change without being noticed.
    assert harmless <= 16


def rewritten(saved: Path, path: Path, change: Callable[[dict, dict], None]) -> None:
    """A file whose checksum fits, after `change(description, tensors)`."""
    with safe_open(saved, framework="pt") as file:
        description = json.loads(file.metadata()["cache"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(description, tensors)
    text = json.dumps(description)
    digest = cache_file._checksum(cache_file.FORMAT, text, tensors)
    metadata = {"format": cache_file.FORMAT, "cache": text, "sha256": digest}
    save_file(tensors, path, metadata=metadata)


def put(*keys: Any, value: Any) -> Callable[[dict, dict], None]:
    def change(description: dict, tensors: dict) -> None:
        place: Any = description
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


def tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict, dict], None]:
    def change(description: dict, tensors: dict) -> None:
        tensors[name] = make(tensors[name]).contiguous()

    return change


def drop(name: str) -> Callable[[dict, dict], None]:
    return lambda description, tensors: tensors.pop(name)


def add(name: str) -> Callable[[dict, dict], None]:
    return lambda description, tensors: tensors.update({name: torch.zeros(1)})


def unknown(description: dict, tensors: dict) -> None:
    """No row's ids are known any more, and none are stored."""
    description["known"] = [False, False]
    tensors[TOKENS] = tensors[TOKENS][:0]


TOKENS, HIDDEN = cache_file.TOKENS, cache_file.HIDDEN
SEEDS = ("extras", "0", "rounding_seeds")
WRONG = {
    "no patterns": lambda description, tensors: description.pop("patterns"),
    "another field": put("more", value=1),
    "patterns are a text": put("patterns", value="ME*M-E"),
    "an empty pattern": put("patterns", 0, value=""),
    "an unknown layer": put("patterns", 0, value="ME*M-X"),
    "a pattern of numbers": put("patterns", 0, value=[1]),
    "a shorter pattern": put("patterns", 0, value="ME*"),
    "another kind of layer": put("patterns", 0, value="ME*M-M"),
    "layers in another order": put("patterns", 0, value="*EMM-E"),
    "no layers of the MTP module": put("patterns", 1, value=""),
    "lengths beyond the keys": put("lengths", 0, value=[10, 4]),
    "lengths below the keys": put("lengths", 0, value=[8, 4]),
    "a negative length": put("lengths", 0, value=[9, -1]),
    "a huge length": put("lengths", 0, value=[9, 2**63]),
    "a length of 1e9": put("lengths", 0, value=[10**9, 4]),
    "a fractional length": put("lengths", 0, value=[9, 4.0]),
    "a boolean length": put("lengths", 0, value=[9, True]),
    "a row more": put("lengths", 0, value=[9, 4, 1]),
    "three rows": put("lengths", value=[[9, 4, 1], [3, 0, 0]]),
    "no rows": put("lengths", value=[[], []]),
    "lengths are a number": put("lengths", value=9),
    "MTP lengths beyond the keys": put("lengths", 1, value=[4, 0]),
    "no extras": put("extras", value={}),
    "extras are a list": put("extras", value=[]),
    "an extra of no layer": put("extras", "9", value={"rounding_seeds": {}}),
    "an extra of attention": put("extras", "2", value={"rounding_seeds": {}}),
    "an empty extra": put("extras", "0", value={}),
    "a negative seed": put(*SEEDS, "seed", value=-1),
    "a seed of 65 bits": put(*SEEDS, "seed", value=2**64),
    "a fractional seed": put(*SEEDS, "seed", value=7.0),
    "another seed than the other layers": put(*SEEDS, "seed", value=8),
    "a seed of another layer": put(*SEEDS, "layer", value=3),
    "writes below 0": put(*SEEDS, "writes", value=-1),
    "writes beyond 64 bits": put(*SEEDS, "writes", value=2**70),
    "a field more in seeds": put(*SEEDS, "more", value=1),
    "keys of another dtype than values": tensor("2.k", lambda x: x.bfloat16()),
    "keys of integers": tensor("2.k", lambda x: x.int()),
    "keys of fewer tokens": tensor("2.k", lambda x: x[:, :, :5]),
    "keys of one row": tensor("2.k", lambda x: x[:1]),
    "keys without heads": tensor("2.k", lambda x: x[:, :0]),
    "keys with three axes": tensor("2.k", lambda x: x[0]),
    "a state in float32 with seeds": tensor("0.ssm", lambda x: x.float()),
    "a state in bfloat16": tensor("0.ssm", lambda x: x.bfloat16()),
    "a state with fewer heads": tensor("0.ssm", lambda x: x[:, :2]),
    "a state with three axes": tensor("0.ssm", lambda x: x[0]),
    "inputs of another dtype": tensor("0.conv", lambda x: x.double()),
    "inputs of another kernel": tensor("3.conv", lambda x: x[:, :2]),
    "all inputs of another dtype": lambda description, tensors: tensors.update(
        {name: x.bfloat16() for name, x in tensors.items() if name.endswith("conv")}
    ),
    "no word about the transcript": lambda description, tensors: description.pop("known"),
    "no transcript, but its tensors": put("known", value=None),
    "known is a number": put("known", value=1),
    "known of one row": put("known", value=[True]),
    "known of three rows": put("known", value=[False, True, True]),
    "known in numbers": put("known", value=[0, 1]),
    "known is None for a row": put("known", value=[None, True]),
    "another row is known": put("known", value=[True, False]),
    "all rows are known": put("known", value=[True, True]),
    "no row is known": put("known", value=[False, False]),
    "a token id more": tensor(TOKENS, lambda x: torch.cat([x, x[:1]])),
    "a token id less": tensor(TOKENS, lambda x: x[1:]),
    "no token ids": tensor(TOKENS, lambda x: x[:0]),
    "token ids with two axes": tensor(TOKENS, lambda x: x[None]),
    "token ids in 32 bits": tensor(TOKENS, lambda x: x.int()),
    "fractional token ids": tensor(TOKENS, lambda x: x.double()),
    "a negative token id": tensor(TOKENS, lambda x: x - 1),
    "vectors of one row": tensor(HIDDEN, lambda x: x[:1]),
    "vectors of three rows": tensor(HIDDEN, lambda x: torch.cat([x, x[:1]])),
    "vectors with three axes": tensor(HIDDEN, lambda x: x[None]),
    "vectors of integers": tensor(HIDDEN, lambda x: x.int()),
    "vectors in eight bits": tensor(HIDDEN, lambda x: x.to(torch.float8_e4m3fn)),
    "missing token ids": drop(TOKENS),
    "missing vectors": drop(HIDDEN),
    "another tensor of a transcript": add("transcript.more"),
    "a missing tensor": drop("3.ssm"),
    "a tensor too many": add("1.k"),
    "a tensor of no layer": add("x"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_contradicts_itself(saved: Path, tmp_path: Path, wrong: str) -> None:
    """Its checksum fits: somebody wrote it so."""
    rewritten(saved, tmp_path / "cache", WRONG[wrong])
    with pytest.raises(ValueError, match="is a damaged cache"):
        Cache.load(tmp_path / "cache")


def test_rewriting_alone_changes_nothing(cache: Cache, saved: Path, tmp_path: Path) -> None:
    rewritten(saved, tmp_path / "cache", lambda description, tensors: None)
    assert not refused_or_equal(tmp_path / "cache", content(cache))


def without(description: dict, tensors: dict) -> None:
    description["known"] = None
    del tensors[TOKENS], tensors[HIDDEN]


@pytest.mark.parametrize(("change", "tokens"), [(without, None), (unknown, [None, None])])
def test_less_may_be_known(saved: Path, tmp_path: Path, change: Any, tokens: Any) -> None:
    rewritten(saved, tmp_path / "cache", change)
    left = Cache.load(tmp_path / "cache").transcript
    assert (None if left is None else left.tokens) == tokens


@pytest.mark.parametrize(
    ("tokens", "shape", "lengths", "message"),
    [
        ([[1, 2]], (1, 4), [3], r"rows with \[2\] tokens does not fit the lengths \[3\]"),
        ([[1], None], (1, 4), [1], "transcript of 2 rows has lengths of 1"),
        ([[1], None], (1, 4), [1, 3], r"hidden has shape \[1, 4\]: expected one vector for each"),
        ([[1]], (4,), [1], r"hidden has shape \[4\]"),
    ],
)
def test_a_transcript_that_contradicts_itself(
    tokens: Any, shape: tuple[int, ...], lengths: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Transcript(tokens, torch.zeros(shape), lengths)


@pytest.mark.parametrize(
    "text", ["", "[", "[" * 100_000, "NaN", '{"patterns": ' + "9" * 5000 + "}", "null", '"x"', "[]"]
)
def test_a_description_that_is_no_json(saved: Path, tmp_path: Path, text: str) -> None:
    with safe_open(saved, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    digest = cache_file._checksum(cache_file.FORMAT, text, tensors)
    metadata = {"format": cache_file.FORMAT, "cache": text, "sha256": digest}
    save_file(tensors, tmp_path / "cache", metadata=metadata)
    with pytest.raises(ValueError, match="is a damaged cache") as caught:
        Cache.load(tmp_path / "cache")
    assert len(str(caught.value)) < 600


def test_the_checksum_covers_names_shapes_and_text() -> None:
    one = {"a": torch.zeros(2, 3)}
    digests = {
        cache_file._checksum("f", "text", one),
        cache_file._checksum("f", "texts", one),
        cache_file._checksum("ft", "ext", one),
        cache_file._checksum("f", "text", {"b": torch.zeros(2, 3)}),
        cache_file._checksum("f", "text", {"a": torch.zeros(3, 2)}),
        cache_file._checksum("f", "text", {"a": torch.zeros(2, 3, dtype=torch.int32)}),
        cache_file._checksum("f", "text", {}),
        hashlib.sha256().hexdigest(),
    }
    assert len(digests) == 8


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device", "dangling", "nothing"])
def test_paths_that_are_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(tmp_path)  # the name of a socket is short
        try:
            with socket.socket(socket.AF_UNIX) as end:
                end.bind("c")
        finally:
            os.chdir(here)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "dangling":
        path.symlink_to(tmp_path / "gone")
    missing = kind in ("dangling", "nothing")
    with pytest.raises(FileNotFoundError if missing else ValueError) as caught:
        Cache.load(path)
    expected = "no cache file at" if missing else "expected a regular file"
    assert expected in str(caught.value) and str(path) in str(caught.value)


def test_links_are_followed_and_sparse_files_are_refused(
    cache: Cache, saved: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(saved)
    assert not refused_or_equal(tmp_path / "link", content(cache))
    for size, start in ((1 << 40, b""), (1 << 40, saved.read_bytes()), (0, b"")):
        path = tmp_path / "sparse"
        path.write_bytes(start)
        os.truncate(path, size)
        assert refused_or_equal(path, [])
    whole = saved.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # the rest becomes a hole
    os.truncate(path, len(whole))
    assert refused_or_equal(path, [])


def test_other_files_and_older_formats(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        Cache.load(tmp_path / "text")
    save_file({"x": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(
        ValueError, match=r"is not a saved cache; expected 'nemotron_lite\.cache\.v6'"
    ):
        Cache.load(tmp_path / "weights")
    for version in ("v4", "v5", "v7"):
        other = {"format": f"nemotron_lite.cache.{version}", "cache": "{}"}
        save_file({"x": torch.zeros(1)}, tmp_path / "other", metadata=other)
        with pytest.raises(ValueError, match=rf"another format, '.*{version}', which.*Read the"):
            Cache.load(tmp_path / "other")
    with pytest.raises(ValueError, match="cannot be opened"):
        Cache.load("a\0b")


def test_a_loaded_cache_does_not_depend_on_its_file(cache: Cache, tmp_path: Path) -> None:
    cache.save(tmp_path / "cache")
    loaded = Cache.load(tmp_path / "cache")
    size = (tmp_path / "cache").stat().st_size
    (tmp_path / "cache").write_bytes(bytes(size))  # in place: the same inode
    assert content(loaded) == content(cache)


def test_a_file_of_another_model_is_refused_at_its_first_call(model: Nemotron, saved: Path) -> None:
    others = (
        CONFIG.replace(pattern="ME*M-M"),
        CONFIG.replace(pattern="ME*M--"),  # the same caches, other layers
        CONFIG.replace(head_dim=4),
        CONFIG.replace(mtp_pattern="E*"),
    )
    for config in others:
        with pytest.raises(ValueError, match="belongs to another model"):
            Nemotron(config, seed=0)(_tokens(2, 1), Cache.load(saved))
    with pytest.raises(ValueError, match="was the model cast"):
        Nemotron(CONFIG, seed=0, dtype=torch.float64)(_tokens(2, 1), Cache.load(saved))
    with torch.no_grad():
        model(_tokens(2, 1), Cache.load(saved))


def test_a_cache_without_numbers_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="meta device has no numbers"):
        Cache.empty(CONFIG, 1, device="meta").save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_safetensors_cannot_open(cache: Cache, tmp_path: Path) -> None:
    bad = tmp_path / os.fsdecode(b"not-\xff-utf8")
    for path in (bad, bad / "cache", str(bad)):
        with pytest.raises(ValueError, match="is not UTF-8; choose another name"):
            cache.save(path)
    assert list(tmp_path.iterdir()) == []
    cache.save(tmp_path / "cache")
    (tmp_path / "cache").rename(bad)
    with pytest.raises(ValueError, match=r"a path that is not UTF-8.*rename it"):
        Cache.load(bad)
    bad.rename(tmp_path / "cache")
    assert content(Cache.load(tmp_path / "cache")) == content(cache)
