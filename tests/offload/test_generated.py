"""Generated weights: the same everywhere, like an ordinary start, and rounded to NVFP4."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from nemotron_lite import Nemotron, NemotronConfig
from nemotron_lite.offload import GeneratedWeights, Offloaded, generated_model
from nemotron_lite.offload.generated import NUMBERS, normal_table
from nemotron_lite.quantization.packed_layers import PackedWeight, decode_weight
from tests.checkpoint.tiny import TINY

# Matrices with enough numbers that their mean and variance say something.
MEDIUM = TINY.replace(
    pattern="ME*-E", hidden_size=256, vocab_size=512, mamba_num_heads=32, mamba_head_dim=16,
    moe_intermediate_size=96, moe_latent_size=64, num_attention_heads=16, head_dim=16,
    intermediate_size=128, moe_shared_expert_intermediate_size=128,
)  # fmt: skip
BIASED = TINY.replace(attention_bias=True, mlp_bias=True, use_bias=True)


@pytest.fixture(scope="module")
def table() -> Tensor:
    return normal_table(1)


def source(config: NemotronConfig, seed: int = 3, **packed: int) -> GeneratedWeights:
    return GeneratedWeights(config, seed, torch.float32, packed)


def test_the_table_is_the_same_on_every_machine(table: Tensor) -> None:
    digest = hashlib.sha256(table.numpy().tobytes()).hexdigest()
    assert digest == "dd042d82998319724a65a99423499e4c6bbc945daacaea3e09be99c48cbcea3f"
    assert not torch.equal(table, normal_table(2))


def test_the_table_is_nearly_normal(table: Tensor) -> None:
    wide = table.double()
    assert wide.mean().abs() < 4 / math.sqrt(NUMBERS)
    assert wide.var() == pytest.approx(1, abs=6 / math.sqrt(NUMBERS))
    assert (wide**3).mean().abs() < 4 * math.sqrt(15 / NUMBERS)
    assert (wide**4).mean() == pytest.approx(2.85, abs=0.02)
    inside = [float((wide.abs() < k).double().mean()) for k in (1, 2, 3)]
    assert inside == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.008)
    # Neighbors, and numbers a row apart, have nothing to do with each other.
    for lag in (1, 2, 16, 1024, 4096):
        assert (wide[lag:] * wide[:-lag]).mean().abs() < 5 / math.sqrt(NUMBERS)


def test_no_two_rows_of_a_long_matrix_are_equal() -> None:
    rows = torch.empty(2500, 4096)  # the table is 1024 rows long
    source(MEDIUM).read("backbone.layers.0.mixer.in_proj.weight", rows)
    assert len(rows[:, :8].unique(dim=0)) == len(rows)
    rows /= rows.norm(dim=1, keepdim=True)
    overlap = rows @ rows.mT - torch.eye(len(rows))
    assert overlap.abs().max() < 7 / math.sqrt(4096)


def test_the_scale_of_each_tensor_is_that_of_an_ordinary_model() -> None:
    ordinary = Nemotron(MEDIUM, dtype=torch.float32, seed=0)
    made = source(MEDIUM)
    for name, expected in ordinary.state_dict().items():
        found = torch.empty_like(expected)
        for expert, slot in enumerate(found) if ".mixer.experts." in name else [(None, found)]:
            made.read(name, slot, expert=expert)
        if expected.unique().numel() == 1:  # a constant
            assert torch.equal(found, expected), name
            continue
        error = 6 * float(expected.std()) / math.sqrt(expected.numel())
        assert float(found.mean()) == pytest.approx(float(expected.mean()), abs=2 * error), name
        tolerance = 6 / math.sqrt(expected.numel())
        assert float(found.std()) == pytest.approx(float(expected.std()), rel=tolerance), name
        assert float(found.min()) > float(expected.min()) - 3 * float(expected.std()), name


def test_without_a_latent_space_experts_write_into_the_residual_stream() -> None:
    plain = MEDIUM.replace(moe_latent_size=None)
    name, out = "backbone.layers.1.mixer.experts.down_proj", torch.empty(64, 96)
    stds = []
    for config in (plain, MEDIUM, plain.replace(rescale_prenorm_residual=False)):
        source(config).read(name, out, expert=2)
        stds.append(float(out.std()))
    assert stds[0] * math.sqrt(len(plain.pattern)) == pytest.approx(stds[1]) == stds[2]


def test_seeds_names_and_experts_differ() -> None:
    seen = set[bytes]()
    for seed in (3, 4):
        made = source(MEDIUM, seed)
        for layer in (1, 4):
            for leaf in ("up_proj", "down_proj"):
                for expert in range(6):
                    out = torch.empty(96, 64)
                    name = f"backbone.layers.{layer}.mixer.experts.{leaf}"
                    made.read(name, out, expert=expert)
                    seen.add(out[:2].numpy().tobytes())
    assert len(seen) == 2 * 2 * 2 * 6


def test_rows_of_the_embedding_are_those_of_the_whole() -> None:
    made, whole, row = source(TINY), torch.empty(128, 32), torch.empty(32)
    made.read("backbone.embeddings.weight", whole)
    for index in (0, 1, 77, 127):
        made.read("backbone.embeddings.weight", row, row=index)
        assert torch.equal(row, whole[index])


@pytest.mark.parametrize(
    "config", [MEDIUM, TINY, BIASED], ids=["whole blocks", "padded rows", "biases"]
)
def test_packed_weights_are_the_plain_ones_rounded(config: NemotronConfig) -> None:
    plain = generated_model(Nemotron, config, seed=5, dtype=torch.float32)
    packed = generated_model(Nemotron, config, seed=5, dtype=torch.float32, packed=True)
    assert isinstance(plain, Offloaded)
    assert isinstance(packed, Offloaded)
    found = {n: m for n, m in packed.named_modules() if isinstance(m, PackedWeight)}
    matrices = {"M": 2, "*": 1, "-": 2, "E": 6}  # q, k and v stay plain
    assert len(found) == sum(matrices[kind] for kind in config.pattern)
    for path, module in found.items():
        stack = len(module.shape) == 3
        name = path if stack else f"{path}.weight"
        for expert in range(module.shape[0]) if stack else [None]:
            stored = {
                leaf: packed.read(f"{path}.{leaf}", expert)
                for leaf in ("weight", "weight_scale", "weight_scale_2")
            }
            decoded = decode_weight("nvfp4", stored, module.shape[-2:], torch.float32)
            exact = plain.read(name, expert)
            assert decoded.shape == exact.shape
            assert (decoded - exact).norm() < 0.12 * exact.norm(), path
            if padding := -module.shape[-1] % 16:
                assert not stored["weight"][..., -(padding // 2) :].any()
    same = [name for name in plain._shapes if plain._shapes[name] == packed._shapes.get(name)]
    assert {"lm_head.weight", "backbone.norm_f.weight", "mtp.layers.0.eh_proj.weight"} <= {*same}
    assert sum(name.endswith("_proj.bias") for name in same) >= (8 if config is BIASED else 0)
    for name in same:
        assert torch.equal(packed.read(name), plain.read(name)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_round_the_same_numbers(dtype: torch.dtype) -> None:
    name = "backbone.layers.0.mixer.out_proj.weight"
    wide, narrow = torch.empty(32, 64), torch.empty(32, 64, dtype=dtype)
    source(TINY).read(name, wide)
    GeneratedWeights(TINY, 3, dtype, {}).read(name, narrow)
    assert torch.equal(narrow, wide.to(dtype))


def test_activations_have_the_scale_of_an_ordinary_model() -> None:
    config = MEDIUM.replace(pattern="MEMEM*EMEM*-E", n_routed_experts=32, num_experts_per_tok=6)
    tokens = torch.randint(512, (4, 64), generator=torch.Generator().manual_seed(0))
    made = generated_model(Nemotron, config, seed=1, dtype=torch.float32)
    with torch.no_grad():
        found = made(tokens, router_stats=True)
        ordinary = [
            Nemotron(config, dtype=torch.float32, seed=seed)(tokens, router_stats=True)
            for seed in range(3)
        ]
    scales = [float(each.logits.std()) for each in ordinary]
    assert 0.9 * min(scales) < float(found.logits.std()) < 1.1 * max(scales)
    loads = [
        max(
            float(stats.indices.flatten().bincount(minlength=32).max()) / stats.indices.numel()
            for stats in each.router
        )
        for each in (found, *ordinary)
    ]
    assert loads[0] < 1.5 * max(loads[1:]), "routers spread tokens as random routers do"
