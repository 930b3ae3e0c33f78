"""Whatever is wrong with a checkpoint, it is refused before the model or the optimizer changes.

The damage is generated: every entry of a real checkpoint, at every depth, is removed, renamed and
retyped, and every tensor is replaced by ones that do not fit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron_lite.config import NemotronConfig
from nemotron_lite.data import ConcatenatedDocuments
from nemotron_lite.model import Nemotron
from nemotron_lite.train import ResumeError, TrainConfig, train
from nemotron_lite.train.checkpoint_checks import check_contents, check_outline
from nemotron_lite.train.checkpointing import read_checkpoint, save_checkpoint
from nemotron_lite.train.fingerprint import ADDED, compare_runs
from nemotron_lite.train.optimizer import make_optimizer

RECIPE = TrainConfig(steps=2, batch_size=2, seq_len=24)
SMALL = NemotronConfig(
    pattern="E*", vocab_size=96, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=2, chunk_size=8,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, moe_latent_size=16,
    moe_shared_expert_intermediate_size=8, mtp_pattern="", mtp_depths=0,
)  # fmt: skip
Path_ = tuple[Any, ...]


@pytest.fixture(scope="module")
def run(
    text: ConcatenatedDocuments, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a short run, and what is in it."""
    folder = tmp_path_factory.mktemp("run")
    result = train(Nemotron(SMALL, seed=0), text, RECIPE, out_dir=folder, progress=False)
    assert result.checkpoint is not None
    return result.checkpoint, read_checkpoint(result.checkpoint)


@pytest.fixture(scope="module")
def use(run: Any) -> Callable[[Any], None]:
    """Checks that a resume does, in its order."""
    path, whole = run
    model = Nemotron(SMALL, seed=1)
    optimizer = make_optimizer(model, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    def check(content: Any) -> None:
        check_outline(path, content)
        compare_runs(content["fingerprint"], whole["fingerprint"], allow_changes=(), folder="run")
        check_contents(path, content, model, optimizer)

    return check


def paths(value: Any, at: Path_ = ()) -> Iterator[Path_]:
    """The place of every entry, at any depth; of the moments, those of three parameters."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        if at == ("optimizer", "state") and key % 6:
            continue
        yield (*at, key)
        yield from paths(item, (*at, key))


def look(content: Any, at: Path_) -> Any:
    for key in at:
        content = content[key]
    return content


def changed(content: Any, at: Path_, value: Any) -> Any:
    """The same content with one entry replaced; containers on the way are copied."""
    if not at:
        return value
    if isinstance(content, tuple):
        content = list(content)
    other = copy.copy(content)
    other[at[0]] = changed(content[at[0]], at[1:], value)
    return other


def without(content: Any, at: Path_, *, rename: str | None = None) -> Any:
    parent = copy.copy(look(content, at[:-1]))
    if isinstance(parent, tuple):
        parent = list(parent)
    value = parent[at[-1]]
    del parent[at[-1]]
    if rename is not None:
        parent[rename] = value
    return changed(content, at[:-1], parent)


def is_free(at: Path_) -> bool:
    """Entries whose value may differ: versions are only reported, some options always accepted."""
    free = ("max_seconds", "save_every", "save_every_seconds", "keep_checkpoints", "eval_every",
            "eval_batches", "gradient_checkpointing")  # fmt: skip
    return at[:2] == ("fingerprint", "versions") or (at[:2] == ("fingerprint", "options") and
        at[2:3] and at[2] in free) or at == ("fingerprint", "inputs", "tokenizer") or (
        at == ("fingerprint", "inputs", "text"))  # fmt: skip


def accepted(use: Callable[[Any], None], content: Any) -> bool:
    """Whether a resume would take it; any other error than ResumeError fails the test."""
    try:
        use(content)
    except ResumeError as error:
        return len(str(error)) > 4000  # a message that nobody can read counts as none
    return True


def test_the_checkpoint_itself_is_accepted(run: Any, use: Callable[[Any], None]) -> None:
    use(run[1])


def test_a_removed_entry_is_refused(run: Any, use: Callable[[Any], None]) -> None:
    tried = 0
    for at in paths(run[1]):
        # An option of the optimizer is not read from the file. Other versions may have others.
        if is_free(at) or (at[:2] == ("optimizer", "param_groups") and at[-1] != "params"
                           and isinstance(at[-1], str)):  # fmt: skip
            continue
        if at[:2] == ("fingerprint", "options") and at[-1] in ADDED:
            assert accepted(use, without(run[1], at)), "as older versions wrote it"
            continue
        tried += 1
        assert not accepted(use, without(run[1], at)), f"without {at}"
    assert tried > 100


def test_a_renamed_entry_is_refused(run: Any, use: Callable[[Any], None]) -> None:
    for at in paths(run[1]):
        if is_free(at) or isinstance(at[-1], int):
            continue
        if at[:2] == ("optimizer", "param_groups") and at[-1] != "params":
            continue
        assert not accepted(use, without(run[1], at, rename="x" + at[-1])), f"renamed {at}"


@pytest.mark.parametrize("key", ["more", 5, 10**5000, ("a",), None, 1.5], ids=lambda key: "key")
def test_an_added_entry_is_refused(run: Any, use: Callable[[Any], None], key: Any) -> None:
    places = {at[:-1] for at in paths(run[1]) if isinstance(look(run[1], at[:-1]), dict)}
    for at in places:
        if is_free(at) or at[:2] in (("optimizer", "param_groups"), ("fingerprint", "versions")):
            continue
        assert not accepted(use, changed(run[1], at, {**look(run[1], at), key: torch.zeros(1)})), (
            f"added {key!r} to {at}"
        )


WRONG = [
    None, True, -1, 10**5000, 0.5, float("nan"), "text", b"bytes", [], {}, (1, 2),
    [torch.zeros(2)], torch.tensor(float("nan")), torch.eye(3).to_sparse(),
    torch.zeros(2, device="meta"),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: type(wrong).__name__)
def test_a_value_of_another_kind_is_refused(
    run: Any, use: Callable[[Any], None], wrong: Any
) -> None:
    for at in [(), *paths(run[1])]:
        own = look(run[1], at)
        if isinstance(wrong, Tensor):
            equal = is_free(at)
        else:
            same = own is wrong or (not isinstance(own, Tensor | dict) and own == wrong)
            same = same and (type(own) is type(wrong) or at[0] == "fingerprint")
            option = at[:2] == ("optimizer", "param_groups") and "params" not in at
            fits = (isinstance(wrong, bool) == isinstance(own, bool)) and (
                isinstance(wrong, int | float) and 0 <= wrong < 2 and isinstance(own, int | float)
            )
            pair = isinstance(own, tuple) and isinstance(wrong, tuple)
            possible = {("best",): None, ("seconds",): 0.5}
            equal = (
                same
                or is_free(at)
                or (at in possible and possible[at] == wrong)
                or (option and (fits or pair))
            )
        if equal:
            continue
        assert not accepted(use, changed(run[1], at, wrong)), f"{wrong!r:.30} at {at}"


def unfit(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are not what is expected, but hold numbers."""
    yield "one more element", torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    yield "one more axis", tensor.unsqueeze(0)
    yield "another dtype", tensor.to(torch.float64 if tensor.dtype != torch.float64 else torch.int8)
    yield "half", tensor.half() if tensor.dtype != torch.float16 else tensor.float()
    if tensor.numel() > 1:
        yield "one less", tensor.flatten()[:-1].clone()
        yield "nothing", tensor.flatten()[:0].clone()
    if tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1]:
        yield "transposed", tensor.t().contiguous()
    if tensor.is_floating_point() and tensor.numel():
        for name, value in (("nan", float("nan")), ("infinity", float("inf"))):
            bad = tensor.clone()
            bad.view(-1)[-1] = value
            yield name, bad


def test_a_tensor_that_does_not_fit_is_refused(run: Any, use: Callable[[Any], None]) -> None:
    tried = set()
    for at in paths(run[1]):
        own = look(run[1], at)
        for name, tensor in unfit(own) if isinstance(own, Tensor) else ():
            tried.add(at)
            assert not accepted(use, changed(run[1], at, tensor)), f"{name} at {at}"
    assert {at[1] for at in tried if at[0] == "model"} == set(run[1]["model"])
    moments = {at[2:] for at in tried if at[0] == "optimizer"}
    state = run[1]["optimizer"]["state"]
    assert moments == {(n, key) for n in state if n % 6 == 0 for key in state[n]}
    assert len({n for n, _ in moments}) >= 3


def test_moments_that_end_early_in_memory_are_refused(run: Any, use: Callable[[Any], None]) -> None:
    """The fused update reads `numel` numbers from the address: these tensors have fewer there."""
    for index, entry in run[1]["optimizer"]["state"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            own = entry[key]
            if own.numel() < 2:
                continue
            at = ("optimizer", "state", index, key)
            with pytest.raises(ResumeError, match="not laid out in memory"):
                use(changed(run[1], at, torch.zeros(1).expand(own.shape)))
    one, second, *_ = (
        i for i, e in run[1]["optimizer"]["state"].items() if e["exp_avg"].shape == (32,)
    )
    shared = run[1]["optimizer"]["state"][one]["exp_avg"]
    with pytest.raises(ResumeError, match="shares its memory"):
        use(changed(run[1], ("optimizer", "state", second, "exp_avg"), shared))


@pytest.mark.parametrize("step", [-1.0, 0.0, 0.5, 3.0, 2.0**30, float("nan")])
def test_the_steps_of_the_optimizer_are_those_of_the_run(
    run: Any, use: Callable[[Any], None], step: float
) -> None:
    with pytest.raises(ResumeError, match="step of backbone"):
        use(changed(run[1], ("optimizer", "state", 0, "step"), torch.tensor(step)))


def test_negative_second_moments_and_a_broken_generator_are_refused(
    run: Any, use: Callable[[Any], None]
) -> None:
    negative = -torch.ones_like(run[1]["optimizer"]["state"][0]["exp_avg_sq"])
    with pytest.raises(ResumeError, match="has negative numbers"):
        use(changed(run[1], ("optimizer", "state", 0, "exp_avg_sq"), negative))
    noise = torch.full_like(run[1]["rng"], 255)
    with pytest.raises(ResumeError, match="rng is no state of torch's random generator"):
        use(changed(run[1], ("rng",), noise))


def test_a_refused_checkpoint_changes_nothing(
    run: Any, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    """Through `train`: one of each kind of damage, and the model is as it was."""
    _, whole = run
    moment = ("optimizer", "state", 3, "exp_avg")
    damage: dict[str, Any] = {
        r"exp_avg of .* has shape \[5\]": changed(whole, moment, torch.zeros(5)),
        r"exp_avg of .* is torch.float64": changed(whole, moment, look(whole, moment).double()),
        r"the name says|file's name says": changed(whole, ("step",), 1),
        r"lm_head.weight has NaN": changed(
            whole, ("model", "lm_head.weight"), torch.full((96, 32), float("nan"))
        ),
        r"model has no lm_head.weight": without(whole, ("model", "lm_head.weight")),
        r"not written by this version": changed(whole, ("format",), 1),
        r"param_groups\[0\].lr is nan": changed(
            whole, ("optimizer", "param_groups", 0, "lr"), float("nan")
        ),
    }
    model = Nemotron(SMALL, seed=3)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(11)
    random_state = torch.get_rng_state()
    for number, (message, content) in enumerate(damage.items()):
        folder = tmp_path / str(number)
        save_checkpoint(folder / "checkpoints", 2, content, keep=1)
        with pytest.raises(ResumeError, match=message):
            train(model, text, RECIPE, out_dir=folder, resume=True, progress=False)
        assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random_state)
