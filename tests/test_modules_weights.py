"""Weights that are exchanged, shared, lazily negated or missing: results follow what is there now.

A model that was prepared for decoding has copies of its matrices. So each case runs on a prepared
model too: a copy of old weights must not be used.
"""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nemotron_lite import Cache, Nemotron, generate, load, save, score, stream
from nemotron_lite.data import ConcatenatedDocuments
from nemotron_lite.train import TrainConfig, train
from tests.modules import EVERY_KIND, every_kind, random_tokens

TOKENS = random_tokens(2, 9)


def in_every_way(model: Nemotron, call: Callable[..., Any] | None = None) -> list[Tensor]:
    """Logits of a whole text, of a prompt, a step and a draft after it, and of MTP."""
    call = model if call is None else call
    with torch.no_grad():
        cache = model.empty_cache(2)
        found = [call(TOKENS).logits, *call(TOKENS, mtp_depths=2).mtp_logits]
        for part, draft in ((TOKENS[:, :5], False), (TOKENS[:, 5:6], False), (TOKENS[:, 6:], True)):
            found.append(call(part, cache, draft=draft).logits)
    return found


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def tensors(model: Nemotron) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def on_meta(other: Nemotron) -> Nemotron:
    return Nemotron(EVERY_KIND, device="meta")


def plain(other: Nemotron) -> Nemotron:
    return every_kind()


def prepared(other: Nemotron) -> Nemotron:
    model = every_kind()
    model.prepare_for_decoding(smallest=0)
    assert model.lm_head._prepacked is not None
    return model


STARTS = [on_meta, plain, prepared]


@pytest.mark.parametrize("start", STARTS)
def test_to_empty_and_a_state_dict(start: Callable[..., Nemotron]) -> None:
    other = every_kind(seed=5)
    model = start(other).to_empty(device="cpu")
    model.load_state_dict(other.state_dict())
    assert same(in_every_way(model), in_every_way(other))


@pytest.mark.parametrize("start", STARTS)
def test_a_state_dict_that_is_assigned(start: Callable[..., Nemotron]) -> None:
    other = every_kind(seed=5)
    model = start(other)
    model.load_state_dict(other.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in tensors(model).values())
    assert model.lm_head.weight.data_ptr() == other.lm_head.weight.data_ptr()
    assert same(in_every_way(model), in_every_way(other))
    with torch.no_grad():  # the tensors are the same ones, in both directions
        other.lm_head.weight.mul_(2)
    assert same(in_every_way(model), in_every_way(other))


@pytest.mark.parametrize("start", STARTS)
def test_functional_call_in_every_way(start: Callable[..., Nemotron]) -> None:
    other = every_kind(seed=5)
    model, given = start(other), tensors(other)

    def call(*args: Any, **options: Any) -> Any:
        return torch.func.functional_call(model, given, args, options)

    if start is on_meta:  # without numbers of its own it cannot make a cache for them
        assert torch.equal(call(TOKENS).logits, other(TOKENS).logits)
        return
    own = in_every_way(model)
    assert same(in_every_way(model, call), in_every_way(other))
    assert same(in_every_way(model), own), "afterwards the model has its own weights again"


def halve(model: Nemotron) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5)


@pytest.mark.parametrize("start", [plain, prepared])
def test_shared_memory(start: Callable[..., Nemotron]) -> None:
    """Another process changes the weights, as in Hogwild training: no version counter tells."""
    model = start(every_kind()).share_memory()
    assert all(tensor.is_shared() for tensor in tensors(model).values())
    assert same(in_every_way(model), in_every_way(every_kind()))
    model.prepare_for_decoding(smallest=0)
    other = multiprocessing.get_context("fork").Process(target=halve, args=(model,))
    other.start()
    other.join()
    expected = every_kind()
    halve(expected)
    assert other.exitcode == 0
    assert same(in_every_way(model), in_every_way(expected))


def test_weights_that_are_shared_after_they_were_copied() -> None:
    model = prepared(every_kind())
    model.lm_head.weight.share_memory_()
    model.prepare_for_decoding(smallest=0)
    assert model.lm_head._prepacked is None


def negated(values: Tensor) -> Tensor:
    """A view with the same values, whose memory holds the opposite ones."""
    found = torch.complex(torch.zeros_like(values), -values).conj().imag
    assert found.is_neg() and torch.equal(found, values)
    return found


def negate(model: Nemotron) -> Nemotron:
    for module in model.modules():
        for name, weight in [*module._parameters.items()]:
            if weight is not None:
                module._parameters[name] = nn.Parameter(negated(weight.detach()))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = negated(buffer)
    assert all(tensor.is_neg() for tensor in tensors(model).values())
    return model


def test_negated_views_as_weights(tmp_path: Path) -> None:
    plain, model = every_kind(), negate(every_kind())
    assert same(in_every_way(model), in_every_way(plain))
    for m in (plain, model):
        m(TOKENS, mtp_depths=2).logits.square().mean().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        # Not bit for bit: on an AMD EPYC one gradient of a router differs in its last bit.
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-6, atol=1e-9)
    copies = copy.deepcopy(model)
    for m in (plain, model):
        m.prepare_for_decoding(smallest=0)
    assert same(in_every_way(model), in_every_way(plain))
    for m, folder in ((plain, "plain"), (model, "model"), (copies, "copies")):
        save(m, tmp_path / folder)
        assert same(in_every_way(load(tmp_path / folder).eval()), in_every_way(every_kind()))
    written = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("plain", "model")]
    assert written[0] == written[1]


def test_negated_views_in_a_cache(tmp_path: Path) -> None:
    model = every_kind()
    caches = [model.empty_cache(2), model.empty_cache(2)]
    with torch.no_grad():
        for cache in caches:
            model(TOKENS[:, :5], cache)
        for layer in caches[1].layers:
            for name in () if layer is None else layer.TENSORS:
                setattr(layer, name, negated(getattr(layer, name)))
        caches[1].save(tmp_path / "cache")
        caches += [Cache.load(tmp_path / "cache"), caches[1].clone(), copy.deepcopy(caches[1])]
        for part in (TOKENS[:, 5:6], TOKENS[:, 6:]):
            expected, *others = [model(part, cache).logits for cache in caches]
            assert all(torch.equal(found, expected) for found in others)


META_CALLS: dict[str, Callable[[Nemotron], Any]] = {
    "generate": lambda model: generate(model, [1, 2], 3),
    "several rows": lambda model: generate(model, [[1, 2], [3]], 3),
    "stream": lambda model: next(stream(model, [1, 2], 3)),
    "score": lambda model: score(model, [1, 2]),
    "scores": lambda model: score(model, [[1, 2], [3]], segment_length=1),
    "forward": lambda model: model(TOKENS),
    "all on meta": lambda model: model(TOKENS.to("meta")),
    "lengths": lambda model: model(TOKENS, lengths=torch.tensor([9, 3], device="meta")),
    "lengths, all on meta": lambda model: model(
        TOKENS.to("meta"), lengths=torch.tensor([9, 3], device="meta")
    ),
    "documents": lambda model: model(TOKENS, seq_idx=torch.zeros_like(TOKENS, device="meta")),
    "cache": lambda model: model(TOKENS, model.empty_cache(2)),
    "prepare": lambda model: model.prepare_for_decoding(smallest=0),
    "train": lambda model: train(
        model,
        ConcatenatedDocuments(np.arange(4000) % 64, np.array([0])),
        TrainConfig(steps=1, seq_len=32, batch_size=1),
        progress=False,
    ),
}


@pytest.mark.parametrize("name", META_CALLS)
def test_a_model_without_numbers_is_refused_in_words(name: str) -> None:
    with pytest.raises(ValueError, match=r"on meta|device meta|device='cpu'"):
        META_CALLS[name](Nemotron(EVERY_KIND, device="meta"))


def test_tensors_without_numbers_are_refused_by_a_model_with_numbers() -> None:
    for name in ("all on meta", "lengths", "lengths, all on meta", "documents"):
        with pytest.raises(ValueError, match="on meta"):
            META_CALLS[name](every_kind())
