"""Files with several dtypes: which of them a tensor of the model gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron_lite import Nemotron, generate, load, save
from nemotron_lite.checkpoint.weight_dtypes import ALWAYS_FLOAT32, KEPT_FLOAT32
from tests.checkpoint.modelopt_folder import edit, edit_config, message

TOKENS = torch.arange(24)[None] % 128
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ROUTER = "backbone.layers.1.mixer.gate.weight"


def cast(folder: Path, choose: Callable[[str], torch.dtype], named: str | None) -> None:
    """Store each tensor in the dtype that `choose` gives its name."""
    edit(
        folder,
        lambda t: t.update({name: value.to(choose(name)) for name, value in t.items()}),
    )
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    if named:
        edit_config(folder, torch_dtype=named)


def dtypes_of(model: Nemotron) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


def kept(name: str) -> bool:
    return name.endswith((ALWAYS_FLOAT32, *KEPT_FLOAT32))


def works(model: Nemotron) -> Tensor:
    """Prefill, decode and training run, and the decoded tokens are those of prefill."""
    with torch.no_grad():
        logits = model(TOKENS).logits
    assert bool(logits.isfinite().all())
    assert 1 <= len(generate(model, [[1, 2, 3]], 4, temperature=0.0)[0]) <= 4
    model.train()
    model(TOKENS, mtp_depths=2).logits.float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("mtp"))
    model.eval()
    return logits


@pytest.mark.parametrize("named", [None, "auto"])
def test_a_head_in_float32_beside_bfloat16(saved: Path, named: str | None) -> None:
    """axolotl#844: without a dtype in config.json, most weights decide."""
    cast(saved, lambda name: F32 if name == "lm_head.weight" else BF16, named)
    model = load(saved)
    assert model.dtype == BF16
    works(model)
    cast(saved, lambda name: BF16 if name == "lm_head.weight" else F32, named)
    assert set(dtypes_of(load(saved)).values()) == {F32}


@pytest.mark.parametrize("named", [None, "bfloat16"])
@pytest.mark.parametrize("low", [BF16, F16])
def test_a_router_in_float32_stays(saved: Path, low: torch.dtype, named: str | None) -> None:
    """vllm#35121: rounding the router changes which experts are chosen."""
    exact = load_file(saved / "model.safetensors")
    cast(saved, lambda name: F32 if kept(name) else low, named)
    model = load(saved)
    main = BF16 if named else low
    for name, dtype in dtypes_of(model).items():
        assert dtype == (F32 if kept(name) else main), name
        if kept(name) and name in exact:
            assert torch.equal(model.state_dict()[name], exact[name]), name
    assert model.dtype == main
    logits = works(model)
    save(model, saved.parent / "again")
    again = load(saved.parent / "again")
    assert dtypes_of(again) == dtypes_of(model)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, logits)


def test_the_dtype_of_the_caller(saved: Path) -> None:
    """A router that files store in float32 stays so in 16 bits, and is widened with the rest."""
    cast(saved, lambda name: F32 if name == ROUTER else BF16, "bfloat16")
    assert load(saved, dtype=F16).get_parameter(ROUTER).dtype == F32
    assert load(saved, dtype=F16).dtype == F16
    wide = load(saved, dtype=F64)
    assert {d for n, d in dtypes_of(wide).items() if not n.endswith(ALWAYS_FLOAT32)} == {F64}
    works(wide)
    assert load(saved, dtype=F16).to(BF16).get_parameter(ROUTER).dtype == BF16


def test_a_file_in_one_dtype_is_cast_as_a_whole(saved: Path) -> None:
    """float32 throughout says nothing about the router."""
    found = dtypes_of(load(saved, dtype=BF16))
    assert {d for n, d in found.items() if not n.endswith(ALWAYS_FLOAT32)} == {BF16}


@pytest.mark.parametrize("named", [None, "float64", "float32", "bfloat16"])
def test_float64_files(saved: Path, named: str | None) -> None:
    cast(saved, lambda name: F64, named)
    model = load(saved)
    assert model.dtype == getattr(torch, named or "float64")
    works(model)


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e5m2, torch.float8_e4m3fn],
)
@pytest.mark.parametrize("name", [ROUTER, "backbone.layers.1.norm.weight", "lm_head.weight"])
def test_other_dtypes_are_refused_by_name(saved: Path, dtype: torch.dtype, name: str) -> None:
    edit(saved, lambda t: t.update({name: t[name].to(dtype)}))
    text = message(saved)
    assert name.removesuffix(".weight") in text
    assert "1 problem" in text


def test_integers_in_place_of_a_vector(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    name = "backbone.layers.0.mixer.D"
    save_file(tensors | {name: tensors[name].to(torch.int32)}, saved / "model.safetensors")
    assert f"{name} (I32)" in message(saved)
