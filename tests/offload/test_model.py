"""An offloaded model computes what layers in memory compute, and says what it cannot do."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron_lite import (
    CheckpointError,
    Nemotron,
    NemotronConfig,
    SpeculationOptions,
    generate,
    ledger,
    load,
    save,
)
from nemotron_lite.export import to_gguf
from nemotron_lite.layers.moe import Router
from nemotron_lite.layers.norm import RMSNorm
from nemotron_lite.offload import Offloaded
from nemotron_lite.offload.generated import BLOCKS, NUMBERS
from nemotron_lite.quantization import quantizable_modules
from nemotron_lite.quantization.nvfp4.cpu_packed_products import FEW_PAIRS
from tests.checkpoint.tiny import TINY
from tests.test_contexts import unchecked

BIASES = {"attention_bias": True, "mlp_bias": True, "use_bias": True}


def tables(dtype: torch.dtype = torch.float32, packed: bool = False) -> int:
    """Bytes of the random tables, which are part of the budget."""
    return 2 * NUMBERS * dtype.itemsize + (NUMBERS // 2 + BLOCKS if packed else 0)


def made(config: NemotronConfig = TINY, *, room: int = 40_000, **options: Any) -> Offloaded:
    """A generated model with a budget of the tables and a few bytes: by default some stay."""
    options = {"seed": 1, "dtype": torch.float32, **options}
    needed = tables(options["dtype"], options.get("packed", False))
    options = {"budget": needed + room, **options}
    model = Nemotron.from_config(config, weights="generated", **options)
    assert isinstance(model, Offloaded)
    return model


def in_memory(model: Nemotron, folder: Path, *, packed: bool) -> Nemotron:
    """The same weights in an ordinary model."""
    save(model, folder)
    loaded = load(folder, packed=packed)
    assert not isinstance(loaded, Offloaded)
    return loaded


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(128, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_equals_the_same_layers_in_memory(tmp_path: Path, packed: bool, dtype: Any) -> None:
    model = made(dtype=dtype, packed=packed)
    assert (model.dtype, model.device) == (dtype, torch.device("cpu"))
    ordinary = in_memory(model, tmp_path / "m", packed=packed)
    assert model.num_parameters() == ordinary.num_parameters()
    # A few plain experts are multiplied side by side in memory, and one by one here: in BF16 some
    # logits, of 0.1 to 0.5, may be the next number.
    atol = 1e-6 if dtype == torch.float32 else 2**-9
    for rows, length in ((1, 1), (1, 3), (3, 7), (2, FEW_PAIRS)):
        x = tokens(rows, length, seed=length)
        found, expected = (m(x, mtp_depths=min(1, length - 1)) for m in (model, ordinary))
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=atol)
        for one, other in zip(found.mtp_logits, expected.mtp_logits, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=atol)
    caches = [m.empty_cache(2) for m in (model, ordinary)]
    for length in (5, 1, 1):
        x, lengths = tokens(2, length, seed=length), torch.tensor([length, max(1, length - 2)])
        found, expected = (
            m(x, cache, lengths=lengths).logits
            for m, cache in zip((model, ordinary), caches, strict=True)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_generates_the_same_text(tmp_path: Path) -> None:
    model = made()
    ordinary = in_memory(model, tmp_path / "m", packed=False)
    for options in (
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 4},
        {"temperature": 0.0, "speculation": SpeculationOptions()},
    ):
        prompts = [[1, 2, 3], [7]]
        found = generate(model, prompts, 40, **options)  # type: ignore[misc]
        assert found == generate(ordinary, prompts, 40, **options)  # type: ignore[misc]
        assert len(found[0]) > 3


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(
    "changes", [{}, {"moe_latent_size": None}, BIASES], ids=["", "no latent space", "biases"]
)
@torch.no_grad()
def test_a_token_uses_what_the_ledger_says(packed: bool, changes: dict[str, Any]) -> None:
    config = TINY.replace(**changes)
    model = made(config, packed=packed, dtype=torch.bfloat16)
    cache = model.empty_cache(1)
    model(tokens(1, 5), cache)
    model.store.traffic.reset()
    model(tokens(1, 1), cache)
    traffic, found = model.store.traffic, ledger.parameters(config)
    layers = config.pattern.count("E")
    assert traffic.experts == 2 * config.num_experts_per_tok * layers
    weights = found.active_without_embedding + config.hidden_size  # one row of the embedding
    assert traffic.weights == weights, "without the padding of rows of 24 and 40 in NVFP4"
    if not packed:
        bias = config.n_routed_experts * layers  # in float32
        assert traffic.used_bytes == 2 * weights + 2 * bias


@torch.no_grad()
def test_a_prompt_reads_each_chosen_expert_once() -> None:
    model = made(room=27_000)
    reads: list[tuple[str, int | None]] = []
    read = model.store.source.read

    def noting(name: str, out: Tensor, **which: Any) -> int:
        if "up_proj" in name and which["expert"] is not None:
            reads.append((name, which["expert"]))
        return read(name, out, **which)

    model.store.source.read = noting  # type: ignore[method-assign]
    stats = model(tokens(3, 20), router_stats=True).router
    chosen = [
        (f"backbone.layers.{layer}.mixer.experts.up_proj", expert)
        for layer, each in zip((1, 5), stats, strict=True)
        for expert in sorted(each.indices.unique().tolist())
    ]
    assert reads == chosen
    reads.clear()
    model(tokens(1, 1))
    assert len(reads) == 2 * TINY.num_experts_per_tok


@torch.no_grad()
def test_no_memory_beyond_the_budget() -> None:
    x = tokens(2, 9)
    expected = made(room=10**9)(x).logits
    for room in (27_000, 60_000, 10**6):
        model = made(room=room)
        for _ in range(2):
            assert torch.equal(model(x).logits, expected)
            assert 0.9 * min(room, 150_000) < model.store.nbytes - tables() <= room
    assert model.store.traffic.hit_rate > 0.45, "the second call finds everything"


def test_an_interrupted_call_leaves_the_model_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made(), tokens(1, 4)
    expected = model(x).logits

    def interrupt(self: RMSNorm, x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    def fail(self: Router, x: Tensor) -> Any:
        raise ZeroDivisionError

    for kind, function, error in (
        (RMSNorm, interrupt, KeyboardInterrupt),
        (Router, fail, ZeroDivisionError),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", function)
            with pytest.raises(error):
                model(x)
        assert all(parameter.is_meta for parameter in model.parameters())
        with ThreadPoolExecutor(1) as pool:  # another thread may enter; this one always may
            assert torch.equal(pool.submit(lambda: model(x).logits).result(30), expected)


def test_several_threads_get_the_results_of_one() -> None:
    model, inputs = made(), [tokens(1, 5, seed) for seed in range(4)]
    expected = [model(x).logits for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for found in (list(pool.map(lambda x: model(x).logits, inputs)) for _ in range(3)):
            assert all(map(torch.equal, found, expected))


def test_memory_is_free_as_soon_as_nobody_uses_the_model() -> None:
    """Not only after the next run of the garbage collector: it may be gigabytes."""
    model = made(progress=True)
    cache = model.empty_cache(1)
    for length in (3, 1):
        model(tokens(1, length), cache)
    store = weakref.ref(model.store)
    gc.disable()
    try:
        del model
        assert store() is None
    finally:
        gc.enable()


def test_the_default_device_changes_nothing(tmp_path: Path) -> None:
    x = tokens(1, 4)
    expected = made()
    save(expected, tmp_path / "m")
    with torch.device("meta"):
        found = made()
        loaded = load(tmp_path / "m", offload=True)
        name = "backbone.layers.0.mixer.dt_bias"
        for model in (found, loaded):
            assert isinstance(model, Offloaded)
            assert model.read(name).is_cpu
        rows = found.store.rows("backbone.embeddings.weight", x[0])
    assert torch.equal(rows, expected.store.rows("backbone.embeddings.weight", x[0]))
    for model in (found, loaded):
        assert torch.equal(model(x).logits, expected(x).logits)


def test_no_gradients_and_other_modes() -> None:
    model, x = made(), tokens(1, 4)
    with torch.inference_mode():
        expected = model(x).logits
    found = model(x)
    assert not found.logits.requires_grad
    assert torch.equal(found.logits, expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(x).logits
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, expected, atol=0.02, rtol=0.05)


def test_autocast_is_that_of_the_layers_in_memory(tmp_path: Path) -> None:
    model = made()
    ordinary = in_memory(model, tmp_path / "m", packed=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(tokens(2, 9)).logits, ordinary(tokens(2, 9)).logits)


def test_a_subclass_stays_one() -> None:
    class Mine(Nemotron):
        """A class of a user."""

    model = Mine.from_config(TINY, weights="generated", budget=10**8)
    assert isinstance(model, Mine)
    assert isinstance(model, Offloaded)
    assert model(tokens(1, 2)).logits.isfinite().all()
    again = type(model).from_config(TINY, weights="generated", budget=10**8)
    assert type(again) is type(model)


def test_reports_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    made(progress=True)(tokens(1, 2))
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("layers: 100%")
    assert "of the weights were in memory" in lines[-1]
    made()(tokens(1, 2))
    assert capsys.readouterr().err == ""


REFUSED: dict[str, tuple[Callable[[Offloaded], object], str]] = {
    "train": (lambda m: m.train(), "be trained"),
    "half": (lambda m: m.half(), "be moved or cast"),
    "to": (lambda m: m.to(torch.bfloat16), "it is in torch.float32 on the CPU"),
    "state_dict": (lambda m: m.state_dict(), r"save\(model, path\)"),
    "load_state_dict": (lambda m: m.load_state_dict({}), "take a state_dict"),
    "compile": (lambda m: m.compile(), "be compiled"),
    "prepare": (lambda m: m.prepare_for_decoding(), "be prepared for decoding"),
    "init_weights": (lambda m: m.init_weights(), "be initialized"),
    "deepcopy": (copy.deepcopy, "be copied or pickled"),
    "pickle": (pickle.dumps, "be copied or pickled"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_offloaded_model_cannot_do(name: str) -> None:
    model, (call, reason) = made(), REFUSED[name]
    with pytest.raises(RuntimeError, match=f"an offloaded model cannot .*{reason}"):
        call(model)
    assert model.to("cpu") is model.cpu() is model
    assert model.to(torch.float32) is model.float() is model
    assert model.eval() is model
    assert model(tokens(1, 2)).logits.isfinite().all()


def test_other_tools_name_the_reason(tmp_path: Path) -> None:
    model = made()
    with pytest.raises(ValueError, match="offloaded"):
        quantizable_modules(model)
    with pytest.raises(CheckpointError, match="without offload=True"):
        to_gguf(model, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"weights": "files"}, ValueError, 'expected "initial" or "generated"'),
        ({"weights": "initial", "packed": True}, ValueError, "ordinary model in memory"),
        ({"weights": "initial", "budget": 10**9}, ValueError, "ordinary model in memory"),
        ({"dtype": torch.int8}, ValueError, r"packed=True gives matrices in NVFP4"),
        ({"dtype": torch.float8_e4m3fn}, ValueError, r"dtype=torch.float8_e4m3fn"),
        ({"budget": 10_000}, ValueError, r"no room for the largest tensor: .*in_proj has 12,800"),
        ({"budget": 0}, ValueError, "budget=0"),
        ({"budget": 1e9}, TypeError, "budget"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"seed": 2**64}, ValueError, "seed="),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], text: str) -> None:
    make = unchecked(Nemotron.from_config.__func__)  # type: ignore[attr-defined]
    with pytest.raises(error, match=text):
        make(Nemotron, TINY, **{"weights": "generated", **options})


def test_an_ordinary_model_from_a_config() -> None:
    found = Nemotron.from_config(TINY, seed=3, dtype=torch.bfloat16)
    expected = Nemotron(TINY, seed=3, dtype=torch.bfloat16)
    assert type(found) is Nemotron
    assert torch.equal(found.lm_head.weight, expected.lm_head.weight)
    assert found.dtype == torch.bfloat16


def test_an_unknown_token_is_an_error() -> None:
    for wrong in (128, -1):
        with pytest.raises(ValueError, match="the vocabulary has 128 entries"):
            made()(torch.tensor([[1, wrong]]))
    with pytest.raises(ValueError, match=r"tokens are on meta.*give tokens\.cpu\(\)"):
        made()(torch.empty(1, 2, dtype=torch.int64, device="meta"))
