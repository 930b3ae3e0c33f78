"""Every published relative: its config.json is read, its parameters are counted, a miniature runs.

A miniature has all keys of the release but the sizes, and a part of its pattern. It goes to
transformers and comes back: the same logits each time, of a whole text and token by token.
"""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import NemotronHConfig, NemotronHForCausalLM

from nemotron_lite import Nemotron, NemotronConfig, load, save
from nemotron_lite.checkpoint.names import hub_names
from nemotron_lite.hf_config import NO_CLAMP
from nemotron_lite.ledger import parameters
from tests.checkpoint.test_transformers_parity import (
    TOLERANCE,
    margin,
    prompt,
    their_logits,
    worst,
)
from tests.checkpoint.tiny import randomize
from tests.published import RELATIVES

SMALL: dict[str, Any] = dict(
    vocab_size=128, hidden_size=48, max_position_embeddings=512,
    num_attention_heads=4, num_key_value_heads=2,
    mamba_num_heads=8, mamba_head_dim=12, ssm_state_size=16, chunk_size=16, intermediate_size=64,
)  # fmt: skip
SMALL_EXPERTS: dict[str, Any] = dict(
    n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=20,
    moe_shared_expert_intermediate_size=36,
)  # fmt: skip
LAYERS = ("hybrid_override_pattern", "layers_block_type", "num_hidden_layers")


def miniature(name: str) -> dict[str, Any]:
    """The keys of the release with small sizes; its layers are spelled as the release does."""
    release = RELATIVES[name]
    whole = NemotronConfig.from_hf(release.file).pattern
    assert release.miniature in whole
    start, stop = (at := whole.index(release.miniature)), at + len(release.miniature)
    file = release.file | SMALL
    if "n_routed_experts" in file:
        file |= SMALL_EXPERTS
    if file.get("moe_latent_size") is not None:
        file["moe_latent_size"] = 12
    for key in LAYERS[:2]:
        if key in file:
            file[key] = file[key][start:stop]
    if "num_hidden_layers" in file:
        file["num_hidden_layers"] = stop - start
    return file


@pytest.mark.parametrize("name", RELATIVES)
def test_parameters_are_as_many_as_published(name: str) -> None:
    published = RELATIVES[name].parameters
    found = parameters(NemotronConfig.from_hf(RELATIVES[name].file)).total
    if isinstance(published, str):
        exponent = Decimal(published).as_tuple().exponent
        assert str(round(Decimal(found) / 10**9, -int(exponent))) == published
    else:
        assert found == published


def test_the_table_of_releases_is_this_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "using.md").read_text()
    table = {
        name: f"{parameters(NemotronConfig.from_hf(each.file)).total:,}"
        for name, each in RELATIVES.items()
    }
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| Nemotron")]
    assert {row[0].removeprefix("| "): row[1] for row in rows} == table


@pytest.mark.parametrize("name", [n for n, each in RELATIVES.items() if each.tensors])
def test_tensors_are_as_many_as_in_the_released_files(name: str) -> None:
    model = Nemotron(NemotronConfig.from_hf(RELATIVES[name].file), device="meta")
    names = [
        disk_name
        for key, tensor in model.state_dict().items()
        for disk_name, _ in hub_names(key, tensor.shape[0])
    ]
    assert len(set(names)) == len(names) == RELATIVES[name].tensors


@pytest.mark.parametrize("name", RELATIVES)
def test_a_miniature_goes_to_transformers_and_back(
    name: str, tmp_path: Path, no_fsync: None
) -> None:
    config = NemotronConfig.from_hf(miniature(name))
    assert config.pattern == RELATIVES[name].miniature
    ours = Nemotron(config)
    randomize(ours.state_dict().items(), seed=len(config.pattern))
    save(ours, tmp_path / "ours")
    theirs, info = NemotronHForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert all(key.startswith("mtp.") for key in info["unexpected_keys"])
    theirs.eval().save_pretrained(tmp_path / "theirs")
    back = load(tmp_path / "theirs", mtp="drop")
    tokens = prompt(40)
    with torch.no_grad():
        found = ours(tokens).logits
        assert torch.equal(back(tokens).logits, found)
    assert found.std() > 0.3
    assert margin(ours, tokens) > 2e-6
    expected = their_logits(theirs, tokens)
    assert worst(found, expected) <= TOLERANCE
    assert worst(_in_two_steps(ours, tokens, 23), expected) <= TOLERANCE


def _in_two_steps(model: Nemotron, tokens: torch.Tensor, first: int) -> torch.Tensor:
    """Logits of a prompt, and then of one token after the other."""
    cache = model.empty_cache(len(tokens), capacity=tokens.shape[1])
    with torch.inference_mode():
        pieces = [model(tokens[:, :first], cache).logits]
        for i in range(first, tokens.shape[1]):
            pieces.append(model(tokens[:, i : i + 1], cache).logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("name", RELATIVES)
def test_a_checkpoint_with_the_release_s_own_keys_is_read(name: str, tmp_path: Path) -> None:
    """transformers writes it from these keys, and its config.json has what it made of them."""
    file = miniature(name) | {"time_step_min": NO_CLAMP}
    theirs = NemotronHForCausalLM(NemotronHConfig(**file)).eval()
    theirs.set_attn_implementation("eager")
    randomize(theirs.state_dict().items(), seed=3)
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path, mtp="drop")
    assert model.config == NemotronConfig.from_hf(file | {"num_nextn_predict_layers": 0})
    tokens = prompt(20)
    with torch.no_grad():
        found = model(tokens).logits
    assert margin(model, tokens) > 2e-6
    assert worst(found, their_logits(theirs, tokens)) <= TOLERANCE


def test_biases_of_attention_which_transformers_drops(tmp_path: Path, no_fsync: None) -> None:
    """transformers reads `attention_bias` and builds no such bias; NVIDIA's own code does.

    With projections that have one, its attention computes what ours does.
    """
    file = miniature("Nemotron-H 8B") | {"attention_bias": True, "use_bias": True, "mlp_bias": True}
    ours = Nemotron(NemotronConfig.from_hf(file))
    randomize(ours.state_dict().items(), seed=4)
    save(ours, tmp_path / "ours")
    theirs, info = NemotronHForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    tokens = prompt(30)
    with torch.no_grad():
        found = ours(tokens).logits
    dropped = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {key.split(".")[-2] for key in info["unexpected_keys"]} == dropped
    assert worst(found, their_logits(theirs.eval(), tokens)) > 0.1, "is in transformers now: say so"
    at = ours.config.pattern.index("*")
    for name in dropped:
        mine = ours.get_submodule(f"backbone.layers.{at}.mixer.{name}")
        biased = nn.Linear(mine.in_features, mine.out_features)
        biased.load_state_dict(mine.state_dict())
        theirs.set_submodule(f"model.layers.{at}.mixer.{name}", biased)
    expected = their_logits(theirs, tokens)
    assert worst(found, expected) <= TOLERANCE
    assert worst(_in_two_steps(ours, tokens, 11), expected) <= TOLERANCE
    again = load(tmp_path / "ours")
    assert again.config == ours.config
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, found)
