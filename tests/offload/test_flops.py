"""FLOPs counted while a model runs are those of the ledger, and of PyTorch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nemotron_lite import Nemotron, NemotronConfig, ledger
from nemotron_lite.offload import count_flops
from tests.checkpoint.tiny import TINY

LITE = NemotronConfig.from_preset("lite", vocab_size=128)


def draw(*shape: int) -> torch.Tensor:
    return torch.randint(128, shape, generator=torch.Generator().manual_seed(1))


def by_ledger(flops: ledger.Flops) -> dict[str, int]:
    """Sums over the lines that the counter puts under one name."""
    names = {"router": "gate", "experts": "experts", "logits": "lm_head", "conv1d": "conv1d"}
    found: dict[str, int] = {}
    for row in flops.rows:
        name = "scan" if row.name.startswith("scan") else names.get(row.name, row.name)
        times = 1 if flops.mode == "decode" else flops.context
        found[name] = found.get(name, 0) + round(row.total * times)
    return found


@pytest.mark.parametrize("config", [TINY, LITE, TINY.replace(moe_latent_size=None)])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@torch.no_grad()
def test_prompt_and_step_cost_what_the_ledger_says(config: NemotronConfig, packed: bool) -> None:
    model = Nemotron.from_config(config, weights="generated", packed=packed, budget=10**8)
    for length in (1, 5, 37):
        with count_flops(model) as count:
            model(draw(1, length))
        assert count.total == round(ledger.flops(config, length).total)
        with count_flops(model, chunk=4) as count:
            model(draw(1, length), logits_to_keep=1)
        expected = ledger.flops(config, length, chunk=4, logits_to_keep=1)
        assert count.total == expected.total
        lines = by_ledger(expected)
        for name in ("scan", "gate", "experts", "lm_head", "conv1d", "scores and values"):
            assert count.by_name[name] == lines[name], name
    cache = model.empty_cache(1)
    model(draw(1, 37), cache)
    for context in (37, 38):
        with count_flops(model) as count:
            model(draw(1, 1), cache)
        assert count.total == ledger.flops(config, context, "decode").total
    assert count.total == sum(count.by_name.values())


@torch.no_grad()
def test_models_in_memory_rows_and_the_mtp_module() -> None:
    model = Nemotron(TINY, seed=0)
    with count_flops(model) as count:
        model(draw(3, 9))
        model(draw(3, 9))
    assert count.total == 2 * 3 * ledger.flops(TINY, 9).total
    cache = model.empty_cache(2)
    model(draw(2, 6), cache, lengths=torch.tensor([6, 2]))
    with count_flops(model) as count:
        model(draw(2, 1), cache)
    each = [ledger.flops(TINY, context, "decode").total for context in (6, 2)]
    assert count.total == sum(each)
    with count_flops(model) as count:
        model(draw(1, 9), mtp_depths=1)
    plain = ledger.flops(TINY, 9).total
    # The module reads eight pairs of tokens, and its head and attention read as many.
    module = ledger.flops(TINY, 8, mtp_depths=1).total - ledger.flops(TINY, 8).total
    assert count.total == plain + module
    before = count.total
    model(draw(1, 2))
    assert count.total == before, "the block has ended"


# What PyTorch's counter knows nothing about.
def _matrix_vector(matrix: Any, vector: Any, *_: Any, **__: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _plus_matrix_vector(start: Any, matrix: Any, vector: Any, *_: Any, **__: Any) -> int:
    return 2 * matrix[0] * matrix[1]


@torch.no_grad()
def test_the_products_are_those_that_pytorch_ran() -> None:
    """In decoding, where nothing is computed and then masked."""
    model = Nemotron(TINY, seed=0, dtype=torch.bfloat16)
    cache = model.empty_cache(1)
    model(draw(1, 7), cache)
    aten = torch.ops.aten
    more = {aten.mv: _matrix_vector, aten.addmv: _plus_matrix_vector}
    twin = cache.clone()
    with FlopCounterMode(display=False, custom_mapping=more) as ran:
        model(draw(1, 1), cache)
    with count_flops(model) as count:
        model(draw(1, 1), twin)
    # PyTorch counts no elementwise products: the convolution, and the first three of the five
    # FLOPs with which the scan's step updates a state.
    elementwise = count.by_name["conv1d"] + count.by_name["scan"] * 3 // 5
    assert ran.get_total_flops() == count.total - elementwise
