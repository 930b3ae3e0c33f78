"""Healing changes only the MTP module, and the acceptance of its drafts gets better."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite import generate
from nemotron_lite.model import Nemotron
from nemotron_lite.train import TrainConfig
from nemotron_lite.train.healing import Continuations, generate_continuations, heal
from tests.generation.speculative.conftest import SMALL


@pytest.fixture
def model() -> Nemotron:
    return Nemotron(SMALL.replace(vocab_size=12, initializer_range=0.3), seed=4)


def test_drafts_get_better_and_the_text_does_not_change(model: Nemotron) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(12, (40, 4), generator=generator).tolist()
    eval_prompts = torch.randint(12, (8, 4), generator=generator).tolist()
    written = generate_continuations(model, prompts, 28, temperature=0.7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text = generate(model, eval_prompts, 20, temperature=0, stop=())
    config = TrainConfig(steps=80, batch_size=8, seq_len=32, lr=1e-2, min_lr=1e-4, mtp_weight=1.0)
    found = heal(
        model,
        written,
        config,
        eval_prompts=eval_prompts,
        eval_tokens=40,
        draft_length=3,
        progress=False,
    )
    moved = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved and all(name.startswith("mtp.") for name in moved)
    assert "mtp.layers.1.mixer.gate.e_score_correction_bias" not in moved
    assert generate(model, eval_prompts, 20, temperature=0, stop=()) == text
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert found.generated_tokens == 40 * 28
    losses = [record["mtp"][0] for record in found.result.history]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert found.after.acceptance_length > found.before.acceptance_length + 0.3


def test_batches_repeat_and_prompts_are_masked() -> None:
    source = Continuations([[1, 2], [3, 4]], [[5, 6, 7], [8, 9, 10]])
    one = source.batch(3, batch_size=4, seq_len=5, seed=1)
    again = source.batch(3, batch_size=4, seq_len=5, seed=1)
    assert torch.equal(one.tokens, again.tokens)
    assert one.mask is not None
    assert one.mask.tolist() == [[False, False, True, True, True]] * 4
    with pytest.raises(ValueError, match="seq_len=2 does not work: expected more than the prompt"):
        source.batch(0, batch_size=1, seq_len=2, seed=0)
    with pytest.raises(ValueError, match="prompts of one length"):
        Continuations([[1], [2, 3]], [[4], [5]])


def test_a_model_without_a_module_is_refused() -> None:
    model = Nemotron(SMALL.replace(mtp_pattern="", mtp_depths=0), seed=0)
    written = Continuations([[1]], [[2, 3]])
    with pytest.raises(ValueError, match="healing trains the MTP module"):
        heal(model, written, TrainConfig(steps=1), eval_prompts=[[1]])
    whole = Nemotron(SMALL, seed=0)
    with pytest.raises(ValueError, match=r"mtp_pattern='\*E' and mtp_weight=0"):
        heal(whole, written, TrainConfig(steps=1, mtp_weight=0.0), eval_prompts=[[1]])
