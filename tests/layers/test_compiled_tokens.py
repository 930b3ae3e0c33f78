"""Compiled code decodes what the layers decode, up to rounding, and says where it does not."""

from __future__ import annotations

import math
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemotron_lite import Nemotron, SpeculationOptions, generate
from nemotron_lite.backends import compiled_step
from nemotron_lite.cache import Cache
from nemotron_lite.layers import Linear, compiled_decoding
from nemotron_lite.layers.compiled_tokens import MOST_ROWS
from tests.layers.test_one_token import (
    LEAVES,
    MIXES,
    PROMPTS,
    STAYS_FAST,
    decode,
    filled,
)
from tests.modules import every_kind, random_tokens

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"
)

SIZES: dict[str, dict[str, Any]] = {
    "odd widths": dict(
        hidden_size=37, head_dim=9, mamba_head_dim=7, ssm_state_size=11, moe_intermediate_size=13,
        moe_latent_size=10, moe_shared_expert_intermediate_size=29, intermediate_size=31,
    ),
    "many experts": dict(n_routed_experts=33, num_experts_per_tok=9, moe_intermediate_size=18),
    "long convolution": dict(conv_kernel=6),
    "convolution of one": dict(conv_kernel=1),
    "large eps": dict(norm_eps=0.1),
}  # fmt: skip
RUNS = {name: mix for name, mix in MIXES.items() if "n_group" not in mix} | SIZES


def compiled(model: Nemotron, cache: Cache, tokens: int = 4) -> list[Tensor]:
    """`decode` by compiled code, without any refusal."""
    with compiled_decoding() as refusals:
        found = decode(model, cache, tokens)
    assert refusals == []
    return found


def agree(found: list[Tensor], expected: list[Tensor], within: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a.double(), b.double(), rtol=within, atol=within)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("mix", RUNS)
def test_every_mix_in_float32(mix: str, rows: int) -> None:
    model = every_kind(**RUNS[mix])
    for ragged in (False, True):
        cache = filled(model, rows, ragged=ragged)
        agree(compiled(model, cache.clone()), decode(model, cache), 2e-5)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("mix", RUNS)
def test_every_mix_in_bfloat16(mix: str, rows: int) -> None:
    """As close to the same weights in float32 as the ordinary way, or closer.

    With experts only about as close: both choose others where two scores are almost equal.
    """
    model = every_kind(**RUNS[mix])
    narrow = every_kind(**RUNS[mix]).bfloat16()
    model.load_state_dict(narrow.state_dict())
    cache = filled(narrow, rows)
    wide = model.empty_cache(rows, capacity=8)
    for there, here in zip(wide.layers, cache.layers, strict=True):
        for a, b in zip(there.buffers if there else (), here.buffers if here else (), strict=True):
            a.copy_(b)
    wide.advance(5)
    exact = decode(model, wide)[:4]
    ordinary = decode(narrow, cache.clone())[:4]
    found = compiled(narrow, cache.clone())[:4]

    def error(logits: list[Tensor]) -> float:
        return float(torch.stack(logits).sub(torch.stack(exact)).square().mean().sqrt())

    allowed = 1.6 if "E" in model.config.pattern else 1.1
    assert error(found) <= allowed * error(ordinary) < 0.2


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_give_the_same_bits(threads: int) -> None:
    model, before = every_kind(), torch.get_num_threads()
    cache = filled(model, 3)
    try:
        torch.set_num_threads(1)
        expected = compiled(model, cache.clone())
        torch.set_num_threads(threads)
        assert all(map(torch.equal, compiled(model, cache.clone()), expected))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draft_is_read_and_accepted(dtype: torch.dtype, length: int, rows: int) -> None:
    # In BF16 rounding decides which experts are chosen, so there are none.
    model = every_kind(pattern="M*E-" if dtype == torch.float32 else "M*-M").to(dtype)
    cache = filled(model, rows, ragged=True)
    draft = random_tokens(rows, length, seed=2)
    counts = torch.arange(rows) % (length + 1)
    found = []
    for way in (decode, compiled):
        own = cache.clone()
        with torch.inference_mode(), compiled_decoding() as refusals:
            if way is decode:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("nemotron_lite.layers.TokenSteps.run", lambda *_: None)
                    read = model(draft, own, draft=True).logits
            else:
                read = model(draft, own, draft=True).logits
            own.accept(counts)
        assert refusals == []
        found.append([read, *way(model, own)])
    within = 5e-5 if dtype == torch.float32 else 0.15
    agree(found[1], found[0], within)


def test_buffers_of_keys_grow() -> None:
    model = every_kind()
    cache = filled(model, 2)
    assert len(compiled(model, cache, 12)) and cache.lengths.tolist() == [17, 17]
    expected = decode(model, filled(model, 2), 12)
    agree(compiled(model, filled(model, 2), 12)[:12], expected[:12], 1e-4)


@pytest.mark.parametrize("change", [*STAYS_FAST, *LEAVES], ids=lambda change: change.__name__)
def test_a_change_between_two_tokens_is_noticed(change: Callable[[Nemotron], None]) -> None:
    model = every_kind()
    cache = filled(model)
    before = compiled(model, cache.clone())
    change(model)
    with compiled_decoding() as refusals:
        after = decode(model, cache.clone())
    assert bool(refusals) == (change in LEAVES)
    assert not torch.allclose(before[0], after[0])
    agree(after, decode(model, cache.clone()), 5e-5)


class Other(Linear):
    pass


def other_layer(model: Nemotron) -> None:
    model.get_submodule("backbone.layers.0.mixer.in_proj").__class__ = Other


@pytest.mark.parametrize(
    ("prepare", "options", "says"),
    [
        (lambda m: m.double(), {}, "float64"),
        (lambda m: None, dict(ssm_dtype=torch.float16), "float16"),
        (other_layer, {}, "layer 0.mixer.in_proj is of the class Other"),
        (lambda m: m.get_submodule("backbone.layers.2.mixer.gate").choice.update(n_group=2), {},
         "n_group=2"),
    ],
    ids=["double", "float16 states", "subclass", "groups"],
)  # fmt: skip
def test_what_cannot_run_says_why(
    prepare: Callable[[Nemotron], None], options: dict[str, Any], says: str
) -> None:
    model = every_kind()
    prepare(model)
    options = {"temperature": 0, "max_new_tokens": 6, "stop": (), **options}
    expected = generate(model, PROMPTS, **options)
    with pytest.warns(RuntimeWarning, match=says) as caught:
        assert generate(model, PROMPTS, compiled=True, **options) == expected
    assert len(caught) == 1


@pytest.mark.parametrize(
    "name",
    ["0.mixer.dt_bias", "0.mixer.in_proj.weight", "1.mixer.v_proj.weight", "2.mixer.gate.weight",
     "2.mixer.experts.up_proj", "3.mixer.up_proj.weight"],
)  # fmt: skip
def test_nan_reaches_the_logits(name: str) -> None:
    model = every_kind()
    cache = filled(model)
    with torch.no_grad():
        model.backbone.layers.get_parameter(name).fill_(math.nan)
    assert not compiled(model, cache, 1)[0].isfinite().any()


def test_two_threads_decode_with_one_model() -> None:
    model = every_kind()
    caches = [filled(model, rows) for rows in (1, 7)]
    expected = [compiled(model, cache.clone(), 40)[:40] for cache in caches]
    found: dict[int, list[Tensor]] = {}

    def run(number: int) -> None:
        found[number] = compiled(model, caches[number], 40)[:40]

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        assert all(map(torch.equal, found[number], expected[number]))


def test_keys_that_lie_apart_go_the_ordinary_way() -> None:
    model = every_kind()
    cache = filled(model)
    attention: Any = cache.layers[1]
    attention.k = attention.k.transpose(2, 3).contiguous().transpose(2, 3)
    with compiled_decoding() as refusals:
        found = decode(model, cache.clone(), 2)
    assert "not contiguous" in refusals[0]
    agree(found[:2], decode(model, cache, 2)[:2], 2e-5)


def test_hooks_on_all_modules_are_a_reason() -> None:
    model = every_kind()
    cache = filled(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with compiled_decoding() as refusals:
            decode(model, cache, 1)
    finally:
        handle.remove()
    assert refusals == ["there are hooks on all modules"]


def test_many_rows_go_the_ordinary_way() -> None:
    model = every_kind()
    cache = filled(model, MOST_ROWS + 1)
    with compiled_decoding() as refusals:
        found = decode(model, cache.clone(), 1)
    assert f"at most {MOST_ROWS}" in refusals[0]
    assert all(map(torch.equal, found, decode(model, cache.clone(), 1)))


@pytest.mark.parametrize("speculation", [None, SpeculationOptions(draft_length=3, adaptive=False)])
@pytest.mark.parametrize("prompts", [PROMPTS[0], PROMPTS], ids=["one", "ragged"])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_generate_writes_the_same_text(
    prompts: Any, speculation: SpeculationOptions | None, temperature: float
) -> None:
    model = every_kind()
    options = dict(temperature=temperature, seed=1, stop=(), speculation=speculation)
    expected = generate(model, prompts, 24, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(model, prompts, 24, compiled=True, **options) == expected


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing is known about compilers yet, and the cache folder is empty."""
    compiled_step._load.cache_clear()
    compiled_step._macros.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "nemotron_lite"
    compiled_step._load.cache_clear()
    compiled_step._macros.cache_clear()


@pytest.mark.parametrize("command", ["/no/such/compiler", "false"])
def test_without_a_compiler_decoding_goes_on(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("CC", command)
    model = every_kind()
    expected = generate(model, [1, 2, 3], 8, temperature=0)
    with pytest.warns(RuntimeWarning, match=command):
        assert generate(model, [1, 2, 3], 8, temperature=0, compiled=True) == expected
    assert not list(fresh.glob("*.so"))


def test_the_code_is_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_step.library(torch.float32)
    (file,) = fresh.glob("*.so")
    compiled_step._load.cache_clear()
    run, commands = compiled_step._run, []
    monkeypatch.setattr(compiled_step, "_run", lambda c: commands.append(list(c)) or run(c))
    compiled_step.library(torch.float32)
    assert list(fresh.glob("*.so")) == [file] and not any("-o" in c for c in commands)
    compiled_step.library(torch.bfloat16)
    assert len(list(fresh.glob("*.so"))) == 2


def test_a_folder_that_cannot_be_written_is_a_reason(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fresh.parent / "nemotron_lite").write_text("a file where the folder would be")
    with pytest.raises(compiled_step.CompilerError, match="cannot be kept"):
        compiled_step.library(torch.float32)


def test_tiny_numbers_are_rounded_as_before() -> None:
    compiled_step.library(torch.float32)
    tiny = torch.tensor([1e-40])
    assert float(tiny * 1.0) > 0, "the mode of the processor has not changed"


def test_gradients_do_not_go_through_it() -> None:
    model = every_kind()
    with compiled_decoding():
        loss = model(random_tokens(1, 6)).logits.sum()
    loss.backward()
    weights = [p for p in model.backbone.parameters() if isinstance(p, nn.Parameter)]
    assert all(p.grad is not None for p in weights)
