"""Every call in every context of PyTorch: autocast, inference mode, default dtypes, transforms.

The expected values come from the same model in float32 (or its own dtype) outside of the context.
"""

from __future__ import annotations

import copy
import io
import itertools
import multiprocessing
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_lite import Cache, SpeculationOptions, generate, load, save
from nemotron_lite.layers import MambaCache
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization import quantizable_modules, quantize_model, single_format
from tests.test_model import TINY, _tokens

CONFIG = TINY.replace(pattern="M*E", mtp_pattern="*E", mtp_depths=2, initializer_range=0.15)
HALVES = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.015, torch.float32: 1e-4, torch.float64: 1e-6}
TEXT = _tokens(2, 24)


@pytest.fixture(scope="module")
def model() -> Nemotron:
    return Nemotron(CONFIG, seed=1).eval()


@pytest.fixture(scope="module")
def expected(model: Nemotron) -> torch.Tensor:
    return model(TEXT).logits.detach()


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def assert_near(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype | None) -> None:
    """Within what a dtype can express, measured against the largest logit."""
    limit = TOLERANCE[dtype or torch.float32] * float(wanted.abs().max())
    torch.testing.assert_close(found.detach().to(wanted.dtype), wanted, rtol=0, atol=limit)


def continued(
    model: Nemotron, contexts: Iterator[AbstractContextManager[Any]], **options: Any
) -> tuple[torch.Tensor, Cache]:
    """Prefill, a segment, steps, a draft, its acceptance, a rest: each in the next context."""
    cache = model.empty_cache(2, capacity=3, mtp=True, **options)
    parts = []
    for start, stop in ((0, 9), (9, 13), (13, 14), (14, 15)):
        with next(contexts):
            parts.append(model(TEXT[:, start:stop], cache).logits)
    with next(contexts):
        draft = model(TEXT[:, 15:20], cache, draft=True).logits
    with next(contexts):
        cache.accept(torch.tensor([3, 3]))
    with next(contexts):
        parts += [draft[:, :3], model(TEXT[:, 18:], cache).logits]
    return torch.cat(parts, 1).detach(), cache


# Autocast


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("grad", [True, False])
def test_autocast_around_a_whole_text(
    model: Nemotron, expected: torch.Tensor, dtype: torch.dtype, grad: bool
) -> None:
    with torch.set_grad_enabled(grad), autocast(dtype):
        out = model(TEXT, mtp_depths=1)
    assert out.logits.dtype == torch.float32
    assert_near(out.logits, expected, dtype)
    assert not torch.equal(out.logits, expected), "autocast had no effect"
    assert_near(out.mtp_logits[0], model(TEXT, mtp_depths=1).mtp_logits[0].detach(), dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("which", ["all", "none", "first", "later", "odd", "even"])
@pytest.mark.parametrize("ssm", [None, torch.float16])
def test_autocast_around_each_call_of_a_cache(
    model: Nemotron, expected: torch.Tensor, dtype: torch.dtype, which: str, ssm: Any
) -> None:
    on = {
        "all": lambda i: True,
        "none": lambda i: False,
        "first": lambda i: i == 0,
        "later": lambda i: i > 0,
        "odd": lambda i: i % 2 == 1,
        "even": lambda i: i % 2 == 0,
    }[which]
    contexts = (autocast(dtype) if on(i) else nullcontext() for i in itertools.count())
    found, cache = continued(model, contexts, ssm_dtype=ssm)
    # A state in float16 changes the logits more than autocast to float16 does.
    widest = torch.bfloat16 if ssm else dtype if which != "none" else torch.float32
    assert_near(found, expected, widest)
    for layer in cache.layers:
        assert layer is None or layer.dtype == torch.float32, "the dtype of the weights"
        if isinstance(layer, MambaCache):
            assert layer.ssm.dtype == (ssm or torch.float32)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_cache_saved_under_autocast_continues_outside_and_the_reverse(
    model: Nemotron, expected: torch.Tensor, dtype: torch.dtype, tmp_path: Any
) -> None:
    for first, second in ((dtype, None), (None, dtype)):
        with autocast(first), torch.no_grad():
            cache = model.empty_cache(2)
            model(TEXT[:, :10], cache)
            cache.save(tmp_path / "cache")
        with autocast(second), torch.no_grad():
            found = model(TEXT[:, 10:], Cache.load(tmp_path / "cache")).logits
        assert_near(found, expected[:, 10:], dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_training_under_autocast(model: Nemotron, dtype: torch.dtype, inside: bool) -> None:
    def gradients(context: AbstractContextManager[Any]) -> torch.Tensor:
        trained = copy.deepcopy(model)
        with context:
            out = trained(TEXT, mtp_depths=1)
            loss = out.logits.logsumexp(-1).mean() + out.mtp_logits[0].square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found = [p.grad for p in trained.parameters() if p.grad is not None]
        assert all(grad.dtype == torch.float32 for grad in found)
        return torch.cat([grad.flatten() for grad in found])

    exact, found = gradients(nullcontext()), gradients(autocast(dtype))
    assert 0 < float((found - exact).norm() / exact.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0},
        {"speculation": SpeculationOptions(), "temperature": 0},
        {"speculation": SpeculationOptions(shortlist=(1, 2, 3, 4), adaptive=False)},
        {"speculation": SpeculationOptions(), "ssm_dtype": torch.float16},
    ],
    ids=["sampled", "greedy", "speculation", "shortlist", "float16 states"],
)
def test_generation_under_autocast(
    model: Nemotron, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """The same tokens as without, up to the first choice that is too close to call."""
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    with autocast(dtype):
        found = generate(model, prompts, 12, stop=(), seed=3, **options)
    assert [len(row) for row in found] == [12, 12]
    for prompt, row in zip(prompts, found, strict=True):
        if options.get("temperature") == 0:
            logits = model(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1].detach()
            chosen = logits.gather(1, torch.tensor(row)[:, None])[:, 0]
            limit = 2 * TOLERANCE[dtype] * float(logits.abs().max())
            assert float((logits.max(-1).values - chosen).max()) < limit


def test_two_halves_at_once_are_refused() -> None:
    for dtype, other in (HALVES, HALVES[::-1]):
        narrow = Nemotron(CONFIG, seed=1, dtype=dtype)
        with autocast(other), pytest.raises(ValueError, match="under autocast to"):
            narrow(TEXT)
        with autocast(dtype):
            narrow(TEXT)


# Dtypes of the model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("narrow", [None, torch.bfloat16])
def test_models_of_every_dtype(
    model: Nemotron, expected: torch.Tensor, dtype: torch.dtype, narrow: Any
) -> None:
    if narrow is not None and dtype == torch.float16:
        pytest.skip("refused: see above")
    cast = copy.deepcopy(model).to(dtype)
    with autocast(narrow):
        assert_near(cast(TEXT).logits, expected, dtype if dtype in HALVES else None)
        found, cache = continued(cast, itertools.repeat(nullcontext()))
        assert_near(found, expected, dtype if dtype in HALVES else None)
        assert {layer.dtype for layer in cache.layers if layer is not None} == {dtype}
        for speculation in (None, SpeculationOptions()):
            text = generate(cast, [[1, 2], [3]], 5, stop=(), seed=0, speculation=speculation)
            assert [len(row) for row in text] == [5, 5]
        cast(TEXT, mtp_depths=1).logits.mean().backward()


def test_a_router_in_float32_within_a_bfloat16_model(model: Nemotron) -> None:
    narrow = copy.deepcopy(model).bfloat16()
    mixed = copy.deepcopy(narrow)
    for i, kind in enumerate(CONFIG.pattern):
        if kind == "E":  # digits that bfloat16 does not have
            mixed.backbone.layers[i].mixer.gate.weight.data = model.backbone.layers[
                i
            ].mixer.gate.weight.data.clone()
    found, _ = continued(mixed, itertools.repeat(nullcontext()))
    assert_near(found, mixed(TEXT).logits.detach(), torch.bfloat16)
    scores, rounded = (one(TEXT, router_stats=True).router[0].scores for one in (mixed, narrow))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, rounded), "the digits of the router are used"
    generate(mixed, [[1, 2]], 6, speculation=SpeculationOptions(), seed=0)
    mixed(TEXT).logits.mean().backward()
    gate = mixed.backbone.layers[CONFIG.pattern.index("E")].mixer.gate
    assert gate.weight.grad is not None and gate.weight.grad.dtype == torch.float32


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_decides_about_new_models_only(
    model: Nemotron, expected: torch.Tensor, dtype: torch.dtype
) -> None:
    texts = {
        speculation: generate(model, [[1, 2], [3]], 5, stop=(), seed=0, speculation=speculation)
        for speculation in (None, SpeculationOptions())
    }
    with default_dtype(dtype):
        new = Nemotron(CONFIG, seed=1)
        assert new.dtype == dtype
        cast = copy.deepcopy(model).to(dtype)
        pairs = zip(new.state_dict().values(), cast.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), "the same weights, cast"
        assert Nemotron(CONFIG, seed=1, dtype=torch.float32).dtype == torch.float32
        assert torch.equal(model(TEXT).logits, expected)
        found, _ = continued(model, itertools.repeat(nullcontext()))
        assert_near(found, expected, None)
        for speculation, text in texts.items():
            options = dict(stop=(), seed=0, speculation=speculation)
            assert generate(model, [[1, 2], [3]], 5, **options) == text
            generate(new, [[1, 2], [3]], 5, **options)
        out = copy.deepcopy(model)(TEXT, mtp_depths=1)
        assert out.logits.dtype == torch.float32
        out.logits.mean().backward()
        assert Cache.empty(CONFIG, 1).layers[0].dtype == torch.float32


# Inference mode, gradients, transforms

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": torch.enable_grad,
}


@pytest.mark.parametrize("modes", list(itertools.permutations(MODES, 2)), ids="-".join)
@pytest.mark.parametrize("ssm", [None, torch.float16])
def test_a_cache_is_continued_in_another_mode(
    model: Nemotron, expected: torch.Tensor, modes: tuple[str, str], ssm: Any
) -> None:
    contexts = (MODES[name]() for name in itertools.cycle(modes))
    found, cache = continued(model, contexts, ssm_dtype=ssm)
    assert_near(found, expected, torch.bfloat16 if ssm else None)
    with MODES[modes[0]]():
        copies = [cache.clone(), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    with MODES[modes[0]]():
        twice = cache.repeat(2)
        cache.mtp[0].reserve(40)
    new = _tokens(2, 3)
    with MODES[modes[1]]():
        wanted = model(new, cache).logits
        for one in copies:
            assert torch.equal(model(new, one).logits, wanted)
            model(new[:, :1], one)
            model(new, one, draft=True)
            one.accept(2)
        model(_tokens(4, 3), twice)
        model(_tokens(4, 1), twice)


def test_what_is_made_in_inference_mode_can_be_trained(model: Nemotron) -> None:
    with torch.inference_mode():
        built = Nemotron(CONFIG, seed=1)
        stored = io.BytesIO()
        torch.save(built, stored)
        stored.seek(0)
        made = [
            built,
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(stored, weights_only=False),
        ]
    for one in made:
        one(TEXT).logits.mean().backward()
        assert not any(p.is_inference() or p.grad is None for p in one.backbone.parameters())
        assert torch.equal(one(TEXT).logits, model(TEXT).logits)


@pytest.mark.parametrize("draft", [False, True])
def test_a_gradient_through_a_cache_is_refused_in_words(model: Nemotron, draft: bool) -> None:
    cache = model.empty_cache(2)
    model(TEXT[:, :5], cache)
    with pytest.raises(RuntimeError, match=r"after a cache.*call the model on the whole text"):
        model(TEXT[:, 5:], cache, draft=draft).logits.sum().backward()


def test_functional_call_uses_the_given_weights(model: Nemotron) -> None:
    halved = copy.deepcopy(model)
    with torch.no_grad():
        for weight in halved.parameters():
            weight.mul_(0.5)
    prepared = copy.deepcopy(model)
    prepared.prepare_for_decoding(smallest=1)
    given = {name: weight * 0.5 for name, weight in model.named_parameters()}
    with torch.no_grad():  # a step for which copies of the weights are kept
        one = torch.func.functional_call(prepared, given, (TEXT[:, :1],)).logits
        assert torch.equal(one, halved(TEXT[:, :1]).logits)
    whole = torch.func.functional_call(model, given, (TEXT,)).logits
    assert torch.equal(whole, halved(TEXT).logits)
    whole.mean().backward()
    assert model.lm_head.weight.grad is not None
    model.zero_grad()


@pytest.mark.parametrize(
    "transform",
    [
        lambda model: torch.vmap(lambda row: model(row[None]).logits)(TEXT),
        lambda model: torch.func.grad(
            lambda weights: torch.func.functional_call(model, weights, (TEXT,)).logits.mean()
        )(dict(model.named_parameters())),
    ],
    ids=["vmap", "grad"],
)
def test_transforms_are_refused_in_words(model: Nemotron, transform: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"torch\.func transforms"):
        transform(model)


def test_deterministic_mode_and_memory_that_is_not_initialized(
    model: Nemotron, expected: torch.Tensor
) -> None:
    """In this mode PyTorch writes NaN into memory that nobody has written yet."""
    trained = copy.deepcopy(model)
    documents = torch.arange(24).expand(2, -1) // 7
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(model(TEXT).logits, expected)
        assert_near(continued(model, itertools.repeat(nullcontext()))[0], expected, None)
        for half in (torch.bfloat16, torch.float16):
            assert copy.deepcopy(model).to(half)(TEXT).logits.isfinite().all()
        trained(TEXT, mtp_depths=2, seq_idx=documents).logits.mean().backward()
        generate(model, [[1, 2], [3]], 5, stop=(), speculation=SpeculationOptions(), seed=0)
    finally:
        torch.use_deterministic_algorithms(False)
    grads = [p.grad for p in trained.parameters() if p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)


# Devices


def test_the_default_device_decides_about_new_models_only(
    model: Nemotron, expected: torch.Tensor, tmp_path: Any
) -> None:
    lengths = torch.tensor([9, 6])
    with torch.device("meta"):
        assert Nemotron(CONFIG, seed=1).device.type == "meta"
        assert Nemotron(CONFIG, seed=1, device="cpu").device.type == "cpu"
        assert torch.equal(model(TEXT).logits, expected)
        cache = model.empty_cache(2, mtp=True)
        model(TEXT[:, :9], cache, lengths=lengths)
        model(TEXT[:, 9:12], cache, draft=True)
        cache.accept(torch.ones(2, dtype=torch.int32, device="cpu"))
        assert cache.lengths.tolist() == [10, 7]
        model(TEXT[:, 10:11], cache)
        cache.save(tmp_path / "cache")
        assert Cache.load(tmp_path / "cache").lengths.tolist() == [11, 8]
        for options in ({}, {"top_k": 5}, {"speculation": SpeculationOptions()}):
            found = generate(model, [[1, 2], [3]], 5, stop=(), seed=0, **options)
            assert [len(row) for row in found] == [5, 5]


@pytest.mark.parametrize("meta", ["tokens", "weights", "both"])
def test_tensors_without_numbers_are_refused(model: Nemotron, meta: str) -> None:
    called = model if meta == "tokens" else Nemotron(CONFIG, device="meta")
    tokens = TEXT if meta == "weights" else TEXT.to("meta")
    with pytest.raises(ValueError, match="no numbers to compute with"):
        called(tokens)


def test_a_cache_on_another_device_is_refused(model: Nemotron) -> None:
    with pytest.raises(ValueError, match="the cache is on meta, but tokens are on cpu"):
        model(TEXT, Cache.empty(CONFIG, 2, device="meta"))
    for make in (
        lambda: Cache.empty(CONFIG, 1, device="gpu"),
        lambda: Nemotron(CONFIG, device="gpu"),
        lambda: Cache.load("nothing", device="gpu"),
    ):
        with pytest.raises(ValueError, match="device='gpu': expected a device of PyTorch"):
            make()


# Integers of any kind


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64],
    ids=str,
)
def test_integers_of_any_dtype(model: Nemotron, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tokens, count = TEXT.to(dtype), np.dtype(str(dtype).removeprefix("torch.")).type
    cache = model.empty_cache(count(2), count(3))
    lengths = torch.tensor([9, 9]).to(dtype)
    parts = [model(tokens[:, :9], cache, lengths=lengths).logits]
    model(tokens[:, 9:12], cache, draft=True)
    cache.accept(torch.tensor([2, 1]).to(dtype))
    model(tokens[:, 10:11], cache, lengths=torch.tensor([0, 1]).to(dtype))
    assert cache.lengths.tolist() == [11, 11]
    cache.reserve(count(30))
    model(tokens[:, 11:13], cache, draft=True)
    cache.accept(count(1))
    parts.append(model(tokens[:, 12:], cache, logits_to_keep=count(5)).logits)
    assert_near(torch.cat(parts, 1), torch.cat([expected[:, :9], expected[:, -5:]], 1), None)
    documents = torch.zeros_like(tokens)
    out = model(tokens, seq_idx=documents, mtp_depths=count(1), logits_to_keep=count(2))
    assert_near(out.logits, expected[:, -2:], None)


def unchecked(method: Any) -> Any:
    """A method without the checks of types that tests add to the package."""
    while hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    return method


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"tokens": [[1, 2]]}, TypeError, "tokens is a list"),
        ({"tokens": np.array([[1, 2]])}, TypeError, "tokens is a ndarray"),
        ({"tokens": None}, TypeError, "tokens is a NoneType"),
        ({"tokens": torch.ones(1, 2)}, ValueError, "tokens has dtype torch.float32"),
        ({"tokens": torch.ones(1, 2).bool()}, ValueError, "tokens has dtype torch.bool"),
        ({"tokens": torch.zeros(0, 3).long()}, ValueError, r"not empty; got \[0, 3\]"),
        ({"tokens": torch.zeros(3, 0).long()}, ValueError, r"not empty; got \[3, 0\]"),
        ({"tokens": torch.zeros(3).long()}, ValueError, r"rows x time.*got \[3\]"),
        ({"tokens": torch.tensor([[61]])}, ValueError, "range from 61 to 61.* has 61 entries"),
        ({"tokens": torch.tensor([[3, -1]])}, ValueError, "range from -1 to 3"),
        ({"tokens": torch.tensor([[2**40]])}, ValueError, "tokens range from"),
        ({"lengths": [3, 4]}, TypeError, "lengths is a list"),
        ({"lengths": torch.tensor([True, True])}, ValueError, "lengths has dtype torch.bool"),
        ({"seq_idx": torch.zeros(2, 24)}, ValueError, "seq_idx has dtype torch.float32"),
        ({"mtp_depths": 1.0}, TypeError, r"mtp_depths=1\.0"),
        ({"mtp_depths": True}, TypeError, "mtp_depths=True"),
        ({"logits_to_keep": "2"}, TypeError, "logits_to_keep='2'"),
        ({"logits_to_keep": np.float32(2)}, TypeError, "logits_to_keep="),
    ],
)
def test_what_is_no_integer_is_named(
    model: Nemotron, wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = {"tokens": TEXT, **wrong}
    with pytest.raises(error, match=message):
        unchecked(Nemotron.forward)(model, **given)


def test_a_foreign_token_in_a_long_prompt_leaves_the_cache_alone(
    model: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemotron_lite.model.SEGMENT", 4)
    cache, tokens = model.empty_cache(2), TEXT.clone()
    tokens[1, 20] = 61
    with pytest.raises(ValueError, match="tokens range from 0 to 61"):
        model(tokens, cache)
    assert cache.lengths.tolist() == [0, 0]
    with torch.no_grad():
        assert_near(model(TEXT, cache).logits, model(TEXT).logits, None)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None, np.float64(2), [2]], ids=repr)
def test_rows_and_capacity_are_positive_integers(value: Any) -> None:
    empty = unchecked(Cache.empty.__func__)
    error = ValueError if type(value) is int else TypeError
    for name in ("batch", "capacity"):
        with pytest.raises(error, match=f"{name}=.*expected an integer of at least 1"):
            empty(Cache, CONFIG, **{"batch": 1, "capacity": 1, name: value})


def test_tokens_of_any_strides(model: Nemotron, expected: torch.Tensor) -> None:
    spread = torch.stack([TEXT, TEXT + 1], -1)[..., 0]
    turned = TEXT.t().contiguous().t()
    for tokens in (spread, turned):
        assert not tokens.is_contiguous()
        assert torch.equal(model(tokens).logits, expected)
        cache = model.empty_cache(2)
        model(tokens[:, :20], cache)
        assert_near(model(tokens[:, 20:], cache).logits, expected[:, 20:], None)
    cache = model.empty_cache(3)
    model(TEXT[:1, :20].expand(3, -1), cache)
    found = model(TEXT[:1, 20:].expand(3, -1), cache).logits
    assert_near(found, expected[:1, 20:].expand(3, -1, -1), None)


# Seeds and threads


@pytest.mark.parametrize("seed", [0, 2**64 - 1, -(2**63), np.uint64(2**64 - 1), np.int8(3)])
def test_any_seed_in_range(seed: Any) -> None:
    first, second = (Nemotron(CONFIG, seed=seed).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = Nemotron(CONFIG, seed=1).state_dict()
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**30, 1.0, True, "1", np.float32(1)])
def test_other_seeds_are_named(seed: Any) -> None:
    build = unchecked(Nemotron.__init__)
    error = ValueError if type(seed) is int else TypeError
    with pytest.raises(error, match=r"seed=.*expected an integer from"):
        build(Nemotron.__new__(Nemotron), CONFIG, seed=seed)


def test_a_seed_of_64_bits_for_float16_states(model: Nemotron, tmp_path: Any) -> None:
    logits = []
    for seed in (2**64 - 1, np.uint64(2**64 - 1), 2**63 - 1):
        cache = model.empty_cache(1, ssm_dtype=torch.float16, ssm_seed=seed)
        model(TEXT[:1, :9], cache)
        cache.save(tmp_path / "cache")
        logits.append(model(TEXT[:1, 9:], Cache.load(tmp_path / "cache")).logits)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"ssm_seed={seed}"):
            model.empty_cache(1, ssm_dtype=torch.float16, ssm_seed=seed)


def test_a_seed_gives_the_same_weights_whatever_threads_run_beside_it(model: Nemotron) -> None:
    wanted, done = model.state_dict(), threading.Event()
    torch.manual_seed(7)
    generator_state = torch.get_rng_state()
    built: list[dict[str, torch.Tensor]] = []

    def build() -> None:
        built.append(Nemotron(CONFIG, seed=1).state_dict())

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.get_rng_state(), generator_state), "the global generator is untouched"

    def draw() -> None:
        while not done.is_set():
            torch.rand(100)

    noise = threading.Thread(target=draw)
    noise.start()
    build()
    done.set()
    noise.join()
    assert len(built) == 5
    for weights in built:
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


# Copies


def with_draft(model: Nemotron) -> Cache:
    cache = model.empty_cache(2, mtp=True, ssm_dtype=torch.float16, ssm_seed=5)
    model(TEXT[:, :9], cache, lengths=torch.tensor([9, 6]))
    model(TEXT[:, 9:14], cache, draft=True)
    return cache


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    **{
        f"protocol {n}": lambda value, n=n: pickle.loads(pickle.dumps(value, protocol=n))
        for n in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_model_and_cache_continue_the_same(model: Nemotron, how: str) -> None:
    original = copy.deepcopy(model)
    original.prepare_for_decoding(smallest=1)
    cache = with_draft(original)
    twin, other = COPIES[how](original), COPIES[how](cache)
    both = COPIES[how]({"model": original, "cache": cache})
    assert other.checked_for is None
    counts = torch.tensor([4, 1])
    logits = []
    for one, its in ((original, cache), (twin, other), (both["model"], both["cache"])):
        its.accept(counts)
        with torch.no_grad():
            logits.append(one(TEXT[:, 14:18], its).logits)
            logits.append(one(TEXT[:, 18:19], its).logits)
    for found in (logits[2:4], logits[4:6]):
        for a, b in zip(found, logits[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5)  # copies for decoding round
    assert twin.config == original.config
    twin(TEXT).logits.mean().backward()
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert original.lm_head.weight.any(), "nothing is shared"


def test_the_weights_alone_are_saved_and_loaded(model: Nemotron) -> None:
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    other = Nemotron(CONFIG, seed=2)
    other.load_state_dict(torch.load(stored, weights_only=True))
    assert torch.equal(other(TEXT).logits, model(TEXT).logits)


def test_a_packed_model_is_copied_and_runs_under_autocast(model: Nemotron) -> None:
    packed = copy.deepcopy(model)
    quantize_model(packed, single_format(quantizable_modules(packed), "nvfp4"))
    with torch.no_grad():
        wanted = packed(TEXT).logits
        for make in COPIES.values():
            assert torch.equal(make(packed)(TEXT).logits, wanted)
        for dtype in HALVES:
            with autocast(dtype):
                assert_near(packed(TEXT).logits, wanted, dtype)
                assert_near(continued(packed, itertools.repeat(nullcontext()))[0], wanted, dtype)


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.device("meta")])
def test_a_model_is_loaded_in_any_context(model: Nemotron, tmp_path: Any, context: Any) -> None:
    save(model, tmp_path / "model")
    with context():
        loaded = load(tmp_path / "model")
    with default_dtype(torch.float64):
        assert load(tmp_path / "model").dtype == torch.float32
    assert torch.equal(loaded(TEXT).logits, model(TEXT).logits)
    loaded(TEXT).logits.mean().backward()


def continue_elsewhere(model: Nemotron, cache: Cache, results: Any) -> None:
    """In another process: accept the draft and read on."""
    cache.accept(torch.tensor([4, 1]))
    with torch.no_grad():
        results.put(model(_tokens(2, 24)[:, 14:18], cache).logits.tolist())


def test_a_cache_and_its_model_go_to_a_spawned_process(model: Nemotron) -> None:
    context = multiprocessing.get_context("spawn")
    cache, results = with_draft(model), context.SimpleQueue()
    process = context.Process(target=continue_elsewhere, args=(model, cache, results))
    process.start()
    found = torch.tensor(results.get())
    process.join()
    cache.accept(torch.tensor([4, 1]))
    with torch.no_grad():
        assert torch.equal(found, model(TEXT[:, 14:18], cache).logits)
