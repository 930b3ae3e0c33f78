"""`EmulatedPrecision` swaps quantized layers in and out, and makes the random bits reproducible."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite.config import NemotronConfig
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.emulated_layers import MXFP8Linear, NVFP4Experts, NVFP4Linear
from nemotron_lite.quantization.emulated_training import EmulatedPrecision

CONFIG = NemotronConfig(
    pattern="ME*E", vocab_size=96, hidden_size=32,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=2, chunk_size=8,
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, moe_latent_size=16,
    moe_shared_expert_intermediate_size=32, mtp_pattern="*E", mtp_depths=2,
)  # fmt: skip


@pytest.fixture
def model() -> Nemotron:
    return Nemotron(CONFIG, seed=0)


def test_modules_are_swapped_and_put_back(model: Nemotron) -> None:
    before = dict(model.named_modules())
    names, parameters = list(model.state_dict()), list(model.parameters())
    with EmulatedPrecision(model, "nvfp4") as precision:
        found = {
            path: type(module).__name__
            for path, module in model.named_modules()
            if isinstance(module, NVFP4Linear | NVFP4Experts | MXFP8Linear)
        }
        assert found == {
            "backbone.layers.0.mixer.in_proj": "NVFP4Linear",
            "backbone.layers.0.mixer.out_proj": "MXFP8Linear",
            "backbone.layers.1.mixer.experts": "NVFP4Experts",
            "backbone.layers.1.mixer.shared_experts.up_proj": "NVFP4Linear",
            "backbone.layers.1.mixer.shared_experts.down_proj": "NVFP4Linear",
        }  # attention (2) and the last layer (3, the tail) stay
        assert list(model.state_dict()) == names
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        with pytest.raises(RuntimeError, match="inside an `EmulatedPrecision` already"):
            EmulatedPrecision(model, "bf16").__enter__()
        assert precision.autocast().fast_dtype == torch.bfloat16
    with pytest.raises(KeyError), EmulatedPrecision(model, "nvfp4"):
        raise KeyError
    assert dict(model.named_modules()) == before


def test_another_seed_gives_other_random_bits(model: Nemotron) -> None:
    """The same batch with other random bits: the loss is the same, the gradients are not."""
    batch = torch.randint(1, 96, (2, 24))
    found = []
    for seed, micro_batch in ((0, 0), (0, 0), (1, 0), (0, 1)):
        model.zero_grad()
        with EmulatedPrecision(model, "nvfp4", seed) as precision, precision.autocast():
            precision.start_micro_batch(micro_batch)
            loss = model(batch).logits.square().mean()
            loss.backward()
        found.append((loss.item(), model.backbone.layers[0].mixer.in_proj.weight.grad.clone()))
    assert len({loss for loss, _ in found}) == 1
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], found[2][1])
    assert not torch.equal(found[0][1], found[3][1])
