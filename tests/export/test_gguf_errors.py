"""What a GGUF file cannot hold is refused before anything is written, with the way out."""

from __future__ import annotations

import builtins
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from nemotron_lite import Nemotron
from nemotron_lite.export import ExportError, to_gguf
from tests.export.llama import NO_MTP, packed_model, small_model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pattern": "MM", **NO_MTP}, "has no '*'"),
        ({"pattern": "M-E"}, "has no '*'"),
        ({"pattern": "*E"}, "has no 'M'"),
        ({"pattern": "M*-E"}, "both 'E' and '-'"),
        ({"pattern": "M*-"}, "mtp=False"),
        ({"mtp_pattern": "E*"}, "mtp_pattern='E*'"),
        ({"mtp_pattern": "*"}, "mtp=False"),
        ({"n_shared_experts": 0}, "n_shared_experts=0"),
        ({"n_group": 3, "topk_group": 1}, "n_group=3 with topk_group=1"),
        ({"time_step_limit": (0.01, 0.5)}, "time_step_limit=(0.01, 0.5)"),
        ({"use_bias": True}, "use_bias=True: llama.cpp's Mamba layers"),
        ({"mlp_bias": True}, "mlp_bias=True with 'E' layers"),
        ({"pattern": "M*", "mlp_bias": True}, "mtp=False"),
        ({"eos_token_id": (0, 1, 2, 3)}, "4 tokens end a text"),
        ({"eos_token_id": 200}, "eos_token_id=200 is outside"),
        ({"routed_scaling_factor": 1e300}, "routed_scaling_factor=1e+300"),
        ({"norm_eps": 1e-60}, "norm_eps=1e-60"),
        ({"bos_token_id": 200}, "bos_token_id=200 is outside"),
    ],
    ids=str,
)
def test_configs_without_a_place(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as raised:
        to_gguf(small_model(**changes), tmp_path / "new" / "model.gguf")
    assert words in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_all_reasons_are_listed_together(tmp_path: Path) -> None:
    model = small_model(pattern="*-E", n_shared_experts=0)
    model.tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(ExportError) as raised:
        to_gguf(model, tmp_path / "model.gguf")
    assert len(raised.value.problems) == 4


def test_the_mtp_module_can_be_left_out(tmp_path: Path) -> None:
    to_gguf(small_model(pattern="M*-"), tmp_path / "model.gguf", mtp=False)
    to_gguf(small_model(mtp_pattern="E*"), tmp_path / "model.gguf", mtp=False)


def digits_and_spaces(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def prefix_space(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def two_in_front(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> @ $A", special_tokens=[("<|endoftext|>", 0), ("@", 34)]
    )


def left_strip(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken("A", lstrip=True)])


def another_model(tokenizer: Tokenizer) -> None:
    tokenizer.model = models.WordLevel({"<|endoftext|>": 0, "a": 1}, "a")


def whole_words(tokenizer: Tokenizer) -> None:
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    tokenizer.model = models.BPE(vocab=vocab, merges=[], ignore_merges=True)


def no_merges(tokenizer: Tokenizer) -> None:
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    tokenizer.model = models.BPE(vocab=vocab, merges=[])


def too_many(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens(["something new"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (digits_and_spaces, "Whitespace"),
        (prefix_space, "has no name"),
        (two_in_front, "[0, 34] in front"),
        (left_strip, "lstrip"),
        (another_model, "WordLevel"),
        (whole_words, "ignore_merges=True"),
        (no_merges, "has no merges"),
        (too_many, "ids up to 128"),
    ],
)
def test_tokenizers_without_a_place(
    change: Callable[[Tokenizer], None], words: str, tmp_path: Path
) -> None:
    model = small_model()
    change(model.tokenizer)
    with pytest.raises(ExportError) as raised:
        to_gguf(model, tmp_path / "model.gguf")
    assert words in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_rule_can_be_named(tmp_path: Path) -> None:
    model = small_model()
    digits_and_spaces(model.tokenizer)
    to_gguf(model, tmp_path / "model.gguf", pre_tokenizer="gpt-2")
    assert (tmp_path / "model.gguf").exists()


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    model = small_model()
    tokenizer, model.tokenizer = model.tokenizer, None
    with pytest.raises(ValueError, match=r"give tokenizer=\.\.\."):
        to_gguf(model, tmp_path / "model.gguf")
    to_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("changes", "format", "count"), [({}, "fp8", 9), ({"hidden_size": 80}, "nvfp4", 4)]
)
def test_packed_weights_that_stay_out(
    changes: dict[str, Any], format: str, count: int, tmp_path: Path
) -> None:
    model = packed_model(format=format, **changes)
    with pytest.raises(ExportError) as raised:
        to_gguf(model, tmp_path / "model.gguf")
    assert f"{count} packed weights" in str(raised.value)
    assert "unpack=True" in str(raised.value)
    to_gguf(model, tmp_path / "model.gguf", unpack=True)


def test_numbers_that_float16_cannot_hold(tmp_path: Path) -> None:
    """Nothing is lost: the old file stays."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"old")
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight[5, 5] = 70_000.0
    with pytest.raises(ExportError, match=r"lm_head\.weight has the number 70000.*bfloat16"):
        to_gguf(model, file, dtype=torch.float16)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named(
    dtype: torch.dtype | None, value: float, tmp_path: Path
) -> None:
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight[5, 5] = value
    with pytest.warns(UserWarning, match=r"1 tensors hold NaN or infinity.*lm_head\.weight"):
        to_gguf(model, tmp_path / "model.gguf", dtype=dtype)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(OSError, match="free some space"):
        to_gguf(small_model(), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        ("", ValueError, "name of a file"),
        ("a\0b", ValueError, "name of a file"),
        ("a\udc80.gguf", ValueError, "not UTF-8"),
        (".", IsADirectoryError, "is a folder"),
        ("file/model.gguf", NotADirectoryError, "is a file"),
    ],
)
def test_paths(
    path: str, kind: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(kind, match=words):
        to_gguf(small_model(), path)


def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype=torch\.float64: expected None or one of float32"):
        to_gguf(small_model(), tmp_path / "model.gguf", dtype=torch.float64)
    with pytest.raises(TypeError, match="tokenizer is a int"):
        to_gguf(small_model(), tmp_path / "model.gguf", tokenizer=3)
    with pytest.raises(TypeError, match="model is a Linear"):
        to_gguf(torch.nn.Linear(2, 2), tmp_path / "model.gguf")
    empty = Nemotron(small_model().config, device="meta")
    with pytest.raises(ExportError, match="meta"):
        to_gguf(empty, tmp_path / "model.gguf")


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fails(name: str, *more: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", fails)
    with pytest.raises(ValueError, match='the extra "export"'):
        to_gguf(small_model(), tmp_path / "model.gguf")


class _Doubled(Nemotron):
    """Computes something else with the same weights."""

    def forward(self, *given: Any, **options: Any) -> Any:
        return super().forward(*given, **options)


def test_a_forward_of_its_own_is_named(tmp_path: Path) -> None:
    plain = small_model()
    model = _Doubled(plain.config)
    model.tokenizer = plain.tokenizer
    with pytest.warns(UserWarning, match="_Doubled has a forward of its own"):
        to_gguf(model, tmp_path / "model.gguf")
