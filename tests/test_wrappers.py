"""DistributedDataParallel, FSDP and averages around a model: the same numbers, or words that help.

Saving them is tested in checkpoint/test_save_foreign.py. One process is enough: what differs from
the plain model is what the wrapper does before and after each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from nemotron_lite import Chat, Nemotron, SpeculationOptions, generate, score, stream
from nemotron_lite.data import ConcatenatedDocuments, HeldOut
from nemotron_lite.train import TrainConfig, train
from nemotron_lite.train.evaluate import evaluate
from nemotron_lite.wrappers import plain_model, unwrap
from tests.modules import every_kind, random_tokens

pytestmark = pytest.mark.usefixtures("one_process")
Wrap = Callable[[Nemotron], Any]


def parallel(model: Nemotron) -> Any:
    return DistributedDataParallel(model)


def static(model: Nemotron) -> Any:
    return DistributedDataParallel(model, static_graph=True)


def searching(model: Nemotron) -> Any:
    return DistributedDataParallel(model, find_unused_parameters=True)


def sharded(model: Nemotron) -> Any:
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.backbone.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def weights(model: Any) -> list[Tensor]:
    found = unwrap(model).state_dict().values()
    return [w.full_tensor() if hasattr(w, "full_tensor") else w for w in found]


def same(found: Any, expected: Any) -> None:
    for a, b in zip(weights(found), weights(expected), strict=True):
        assert torch.equal(a, b)


def data() -> ConcatenatedDocuments:
    tokens = np.random.default_rng(0).integers(0, 64, 4000)
    return ConcatenatedDocuments(tokens, np.array([0, 1000]))


def steps_by_hand(model: Any) -> list[float]:
    """Two updates as a user writes them: logits, cross entropy, AdamW."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    model.train()
    for seed in range(2):
        tokens = random_tokens(2, 12, seed)
        out = model(tokens, mtp_depths=2)
        loss = sum(
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, k + 1 :].flatten())
            for k, logits in enumerate([out.logits, *out.mtp_logits])
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("wrap", [parallel, static, searching, sharded])
def test_a_step_by_hand_equals_that_of_the_plain_model(wrap: Wrap) -> None:
    plain, wrapped = every_kind(), wrap(every_kind())
    assert steps_by_hand(wrapped) == steps_by_hand(plain)
    same(wrapped, plain)


# PyTorch warns that a view must not be changed in place; the losses do not.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.parametrize("wrap", [parallel, static, sharded])
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}],
    ids=["plain", "recomputed"],
)
def test_train_equals_that_of_the_plain_model(wrap: Wrap, options: dict[str, Any]) -> None:
    config = TrainConfig(steps=2, seq_len=32, batch_size=2, **options)
    plain, wrapped = every_kind(), wrap(every_kind())
    losses = [
        [record["loss"] for record in train(m, data(), config, progress=False).history]
        for m in (plain, wrapped)
    ]
    assert losses[0] == losses[1]
    same(wrapped, plain)


@pytest.mark.parametrize("around", [lambda model: model, compiled], ids=["alone", "compiled"])
@pytest.mark.parametrize(
    ("wrap", "weight", "why"),
    [
        (searching, 0.3, "find_unused_parameters=True"),
        (searching, 0.0, "find_unused_parameters=True"),
        (parallel, 0.0, "mtp_weight=0"),
    ],
)
def test_what_would_fail_at_an_update_is_refused_before(
    wrap: Wrap, weight: float, why: str, around: Wrap
) -> None:
    model = every_kind()
    config = TrainConfig(steps=2, seq_len=32, batch_size=2, mtp_weight=weight)
    with pytest.raises(ValueError, match=rf"{why}.*static_graph=True"):
        train(around(wrap(model)), data(), config, progress=False)
    same(model, every_kind())


def test_the_advice_works_and_frozen_parameters_need_none() -> None:
    config = TrainConfig(steps=3, seq_len=32, batch_size=2, mtp_weight=0.0)
    plain, wrapped = every_kind(), static(every_kind())
    for model in (plain, wrapped):
        train(model, data(), config, progress=False)
    same(wrapped, plain)
    frozen = every_kind()
    frozen.mtp.requires_grad_(False)
    train(parallel(frozen), data(), config, progress=False)
    same(frozen, plain)


# `torch.compile(model)` itself is called as it is: see compile_cases.py.
WRAPPERS = [
    parallel, nn.DataParallel, AveragedModel, checkpoint_wrapper,
    lambda model: compiled(parallel(model)), lambda model: parallel(compiled(model)),
]  # fmt: skip


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_writes_and_scores(wrap: Wrap) -> None:
    plain = every_kind()
    wrapped = wrap(every_kind())
    options: dict[str, Any] = dict(temperature=0.0, stop=())
    expected = generate(plain, [1, 2, 3], 5, **options)
    assert generate(wrapped, [1, 2, 3], 5, **options) == expected
    assert list(stream(wrapped, [1, 2, 3], 5, **options)) == expected
    guess = SpeculationOptions()
    assert generate(wrapped, [1, 2, 3], 5, speculation=guess, **options) == expected
    assert score(wrapped, [1, 2, 3]).logprob == pytest.approx(score(plain, [1, 2, 3]).logprob)
    held_out = HeldOut((np.arange(60) % 64,), 60)
    found, known = (evaluate(m, held_out).bits_per_byte for m in (wrapped, plain))
    assert found == pytest.approx(known)


def test_an_average_writes_and_not_the_last_weights() -> None:
    model = every_kind()
    average = AveragedModel(model)
    average.update_parameters(model)
    with torch.no_grad():
        model.lm_head.weight.copy_(every_kind(seed=1).lm_head.weight)
    found = generate(average, [1, 2, 3], 8, temperature=0.0, stop=())
    assert found == generate(every_kind(), [1, 2, 3], 8, temperature=0.0, stop=())
    assert found != generate(model, [1, 2, 3], 8, temperature=0.0, stop=())


def test_wrappers_around_wrappers_are_unwrapped() -> None:
    model = every_kind()
    call = compiled(model)
    assert plain_model(model) is model and unwrap(call) is model
    assert plain_model(parallel(call)) is plain_model(compiled(parallel(model))) is model


def test_a_sharded_model_is_called_and_refused_where_it_cannot_run() -> None:
    model, plain = sharded(every_kind()), every_kind()
    tokens = random_tokens(2, 7)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
    for use in (
        lambda: generate(model, [1, 2, 3], 5),
        lambda: stream(model, [1, 2, 3], 5),
        lambda: score(model, [1, 2, 3]),
        lambda: Chat(model),
    ):
        with pytest.raises(ValueError, match=r"spread by FSDP.*get_model_state_dict"):
            use()
    cache, known = model.empty_cache(2), plain.empty_cache(2)
    for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:]):
        with torch.no_grad():
            assert torch.equal(model(part, cache).logits, plain(part, known).logits)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda model: None, lambda model: "runs/lite", lambda model: Nemotron,
        lambda model: model.backbone, lambda model: model.state_dict(), lambda model: model.config,
        nn.Sequential, lambda model: parallel(nn.Sequential(model)),
    ],
)  # fmt: skip
def test_what_is_no_model_is_named(wrong: Wrap) -> None:
    found = wrong(every_kind())
    with pytest.raises(TypeError, match=r"model=.*: expected a Nemotron"):
        plain_model(found)
    if isinstance(found, nn.Module):
        for use in (
            lambda: generate(found, [1, 2], 3),
            lambda: stream(found, [1, 2], 3),
            lambda: score(found, [1, 2]),
            lambda: evaluate(found, HeldOut((np.arange(60) % 64,), 60)),
            lambda: train(found, data(), TrainConfig(steps=1, seq_len=32, batch_size=1)),
        ):
            with pytest.raises(TypeError, match="expected a Nemotron"):
                use()
