"""All 88 layers of Super run on this machine, and cost what the ledger says."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from nemotron_lite import Nemotron, NemotronConfig, ledger
from nemotron_lite.offload import Offloaded, count_flops

BUDGET = 2 * 2**30


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
@torch.no_grad()
def test_super_reads_and_writes_a_token() -> None:
    config = NemotronConfig.from_preset("super")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = Nemotron.from_config(config, weights="generated", budget=BUDGET)
    assert isinstance(model, Offloaded)
    assert len(model.backbone.layers) == 88
    assert ledger.parameters(config).backbone == 120_668_707_840
    assert model.num_parameters() == ledger.parameters(config).total
    cache, tokens = model.empty_cache(1), torch.tensor([[17, 4]])
    with count_flops(model) as count:
        logits = model(tokens, cache, logits_to_keep=1).logits
    assert count.total == ledger.flops(config, 2, logits_to_keep=1).total
    model.store.traffic.reset()
    with count_flops(model) as count:
        logits = model(logits.argmax(-1), cache).logits
    assert count.total == ledger.flops(config, 2, "decode").total
    weights = ledger.parameters(config).active_without_embedding + config.hidden_size
    traffic = model.store.traffic
    assert traffic.weights == weights
    biases = config.pattern.count("E") * config.n_routed_experts  # in float32, the others in BF16
    assert traffic.used_bytes == 2 * (weights + biases)
    assert logits.isfinite().all()
    assert 0.5 < float(logits.std()) < 1.5, "0.014 * sqrt(4096) = 0.9 for independent weights"
    assert model.store.nbytes <= BUDGET
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert grown < BUDGET + 0.6 * 2**30, "beside the budget: states of 168 MB, activations, tables"
