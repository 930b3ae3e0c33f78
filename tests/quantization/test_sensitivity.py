"""The estimated cost of a format, compared with its definition and with the measured cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from nemotron_lite import Nemotron
from nemotron_lite.quantization import (
    Sensitivity,
    allocate_bits,
    bits_per_weight,
    calibrate,
    measure_sensitivity,
    quantizable_modules,
    quantize_model,
    single_format,
)
from nemotron_lite.quantization.pack_model import packed_copy
from tests.quantization.learnable_text import loss_of, text

Fresh = Callable[[], Nemotron]
IN_PROJ = "backbone.layers.0.mixer.in_proj"


def test_the_estimate_is_its_formula(fresh: Fresh) -> None:
    model, batch = fresh(), text(1)
    found = calibrate(model, [batch])
    costs = measure_sensitivity(model, [batch[:1], batch[1:]], found)
    mixer = model.backbone.layers[0].mixer
    kept = {}

    def keep(module, args, y):  # type: ignore[no-untyped-def]
        kept["x"], kept["y"] = args[0], y
        y.retain_grad()

    handle = mixer.in_proj.register_forward_hook(keep)
    logits = model(batch).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").backward()
    handle.remove()
    for form in ("nvfp4", "fp8"):
        weight = packed_copy(model, IN_PROJ, form, found).decode(torch.float32)
        change = kept["x"] @ weight.mT - kept["y"]
        expected = 0.5 * (kept["y"].grad.double() * change).square().sum() / batch[:, 1:].numel()
        number = [module.path for module in costs.modules].index(IN_PROJ)
        assert costs.nats[number][form] == pytest.approx(expected.item(), rel=1e-3)
        assert costs.nats[number]["bf16"] == 0
    assert all(not module._forward_hooks for module in model.modules()), "the hooks are removed"


def test_fewer_bits_cost_more_and_rounded_inputs_cost_more_still(fresh: Fresh) -> None:
    model, batch = fresh(), text(2)
    found = calibrate(model, [batch])
    weights = measure_sensitivity(model, [batch], found)
    both = measure_sensitivity(model, [batch], found, inputs=True)
    for one in weights.nats:
        assert 0 < one["fp8"] < one["nvfp4"]
    total = [sum(n["nvfp4"] for n in costs.nats) for costs in (weights, both)]
    assert total[0] < total[1]


def test_the_estimate_ranks_what_is_measured(fresh: Fresh) -> None:
    model = fresh()
    found = calibrate(model, [text(3)])
    costs = measure_sensitivity(model, [text(3, rows=32)], found)
    batch = text(3, rows=32)
    base = loss_of(model, batch)
    estimated, measured = [], []
    for module, nats in zip(costs.modules, costs.nats, strict=True):
        estimated.append(nats["nvfp4"])
        measured.append(abs(loss_of(quantize_model(fresh(), {module.path: "nvfp4"}), batch) - base))
    ranks = [torch.tensor(v).argsort().argsort().double() for v in (estimated, measured)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.4


def test_a_mix_within_the_budget_beats_the_same_bits_spent_badly(fresh: Fresh) -> None:
    model = fresh()
    found = calibrate(model, [text(4)])
    costs = measure_sensitivity(model, [text(4, rows=16)], found)
    modules = costs.modules
    chosen = allocate_bits(costs, 6.0)
    assert bits_per_weight(modules, chosen) <= 6.0
    worst = allocate_bits(
        Sensitivity(modules, [{f: -v for f, v in nats.items()} for nats in costs.nats]), 6.0
    )
    batch = text(8, rows=32)
    base = loss_of(fresh(), batch)
    mix, bad, all4 = (
        loss_of(quantize_model(fresh(), formats), batch) - base
        for formats in (chosen, worst, single_format(modules, "nvfp4"))
    )
    assert abs(mix) < abs(all4)
    assert abs(mix) < abs(bad)
    assert set(chosen.values()) > {"nvfp4"}


def test_errors(fresh: Fresh) -> None:
    model = fresh()
    found = calibrate(model, [text(0)])
    with pytest.raises(ValueError, match="no text"):
        measure_sensitivity(model, [], found)
    with pytest.raises(ValueError, match="rows of 1 tokens"):
        measure_sensitivity(model, [text(0)[:, :1]], found)
    assert len(quantizable_modules(model)) == 17
