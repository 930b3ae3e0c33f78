"""Logits and greedy tokens against transformers, on checkpoints that transformers wrote.

Each case is a tiny `nemotron_h` model with random values in every parameter. transformers saves it,
`load` opens it, and both get the same tokens: logits agree within 2e-4 in float32, and 64 greedy
tokens are the same, each with its own cache.

`time_step_min` is 1e-30 in transformers' config: it clamps dt at that value in prefill but not in
decode (reference sheet 2.4), and no Nemotron was trained with that clamp. The random step sizes go
down to 1e-4, below the published 1e-3, so that a clamp on either side would be seen.

Attention is eager and experts run one by one, which are transformers' definitions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from nemotron_lite import Nemotron, NemotronConfig, generate, load, save
from nemotron_lite.config import PRESETS
from tests.checkpoint.tiny import randomize

TOLERANCE = 2e-4
GREEDY = 64

BASE = dict(
    vocab_size=128, hidden_size=48, max_position_embeddings=512,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    mamba_num_heads=8, mamba_head_dim=12, ssm_state_size=16, n_groups=2, chunk_size=16,
    n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=20,
    moe_shared_expert_intermediate_size=36, intermediate_size=64,
    time_step_min=1e-30,
)  # fmt: skip

CASES: dict[str, dict[str, object]] = {
    "mamba only": dict(hybrid_override_pattern="MMM"),
    "attention": dict(hybrid_override_pattern="M*M*"),
    "attention only": dict(hybrid_override_pattern="**"),
    "dense mlp": dict(hybrid_override_pattern="M-*-"),
    "moe": dict(hybrid_override_pattern="MEM*E"),
    "latent moe": dict(hybrid_override_pattern="MEM*E", moe_latent_size=12),
    "mamba and moe, no attention": dict(hybrid_override_pattern="MEME", moe_latent_size=12),
    "group-limited": dict(
        hybrid_override_pattern="ME*E", n_group=4, topk_group=2, num_experts_per_tok=5
    ),
    "scaled": dict(hybrid_override_pattern="ME*E", routed_scaling_factor=5.0, moe_latent_size=12),
    "not normalized": dict(
        hybrid_override_pattern="ME*E", norm_topk_prob=False, routed_scaling_factor=2.5
    ),
    # As published: far from zero, and close together.
    "large selection bias": dict(hybrid_override_pattern="ME*E", moe_latent_size=12),
    "four groups": dict(hybrid_override_pattern="MM*M", n_groups=4),
    "a group per head": dict(hybrid_override_pattern="M*", n_groups=8),
    "one group, no conv bias, two taps": dict(
        hybrid_override_pattern="MM*", n_groups=1, use_conv_bias=False, conv_kernel=2
    ),
    "wide mamba, one key head": dict(
        hybrid_override_pattern="M*M", mamba_num_heads=12, mamba_head_dim=16, num_key_value_heads=1,
        num_attention_heads=6, head_dim=24, layer_norm_epsilon=1e-2,
    ),
    "chunk longer than the text": dict(hybrid_override_pattern="MEM*", chunk_size=128),
    "chunk of eight": dict(hybrid_override_pattern="MM*", chunk_size=8),
    "biases": dict(hybrid_override_pattern="ME-*", use_bias=True, mlp_bias=True),
    "biases and a latent": dict(
        hybrid_override_pattern="ME*-E", use_bias=True, mlp_bias=True, moe_latent_size=12
    ),
    "miniature of super": dict(
        hybrid_override_pattern="MEM*EME", moe_latent_size=24, num_experts_per_tok=6,
        routed_scaling_factor=5.0, n_groups=4,
    ),
}  # fmt: skip


@dataclass
class Pair:
    """The same checkpoint, opened by both."""

    theirs: NemotronHForCausalLM
    ours: Nemotron
    folder: Path

    @property
    def has_cache(self) -> bool:
        """transformers gets the size of its cache from the first attention layer; it needs one."""
        return "*" in self.ours.config.pattern


def write_reference(folder: Path, seed: int, **config: object) -> NemotronHForCausalLM:
    """A random model in transformers, and its checkpoint in `folder`."""
    model = NemotronHForCausalLM(NemotronHConfig(**{**BASE, **config})).eval()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    randomize(model.state_dict().items(), seed)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name: str = request.param
    folder = tmp_path_factory.mktemp("case")
    theirs = write_reference(folder, seed=list(CASES).index(name), **CASES[name])
    if name == "large selection bias":
        for key, tensor in theirs.state_dict().items():
            if key.endswith("e_score_correction_bias"):
                tensor.mul_(0.3).add_(64)
        theirs.save_pretrained(folder)
    return Pair(theirs, load(folder), folder)


def prompt(length: int, rows: int = 2, vocab: int = 128) -> Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(length))


def their_logits(model: NemotronHForCausalLM, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def worst(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def margin(model: Nemotron, tokens: Tensor) -> float:
    """The smallest score difference of the last chosen expert and the first one not chosen."""
    gaps = [torch.tensor(1.0)]
    with torch.no_grad():
        stats = model(tokens, router_stats=True).router
    for layer in stats:
        gate = model.get_submodule(layer.name).gate
        biased = (layer.scores + gate.e_score_correction_bias).sort(-1, descending=True).values
        if (
            gate.choice["n_group"] == 1
        ):  # with groups the first expert not chosen is not simply the next
            top_k = layer.indices.shape[-1]
            gaps.append((biased[..., top_k - 1] - biased[..., top_k]).min())
    return float(torch.stack(gaps).min())


@pytest.mark.parametrize("length", [75, 64, 17, 3, 1])
def test_logits_equal_those_of_transformers(pair: Pair, length: int) -> None:
    tokens = prompt(length)
    with torch.no_grad():
        ours = pair.ours(tokens).logits
    theirs = their_logits(pair.theirs, tokens)
    assert theirs.std() > 0.3, "the logits vary too little to tell two models apart"
    assert margin(pair.ours, tokens) > 2e-6, "two experts are nearly tied; take another seed"
    assert worst(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("length", [37, 2])
def test_greedy_tokens_equal_those_of_transformers(pair: Pair, length: int) -> None:
    tokens = prompt(length)
    theirs = _greedy_cached(pair, tokens) if pair.has_cache else _greedy_full(pair, tokens)
    assert generate(pair.ours, tokens, GREEDY, temperature=0, stop=()) == theirs.tolist()


def _greedy_cached(pair: Pair, tokens: Tensor) -> Tensor:
    found, cache = [], None
    with torch.no_grad():
        for _ in range(GREEDY):
            out = pair.theirs(tokens, past_key_values=cache, use_cache=True)
            cache, tokens = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            found.append(tokens)
    return torch.cat(found, dim=1)


def _greedy_full(pair: Pair, tokens: Tensor) -> Tensor:
    start = tokens.shape[1]
    for _ in range(GREEDY):
        chosen = their_logits(pair.theirs, tokens)[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, chosen], dim=1)
    return tokens[:, start:]


def test_transformers_opens_our_checkpoints(pair: Pair, tmp_path: Path) -> None:
    save(pair.ours, tmp_path / "ours")
    theirs = NemotronHForCausalLM.from_pretrained(tmp_path / "ours").eval()
    for name, tensor in pair.theirs.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    tokens = prompt(50)
    assert worst(their_logits(theirs, tokens), their_logits(pair.theirs, tokens)) <= TOLERANCE


RICH = CASES["miniature of super"]


@pytest.mark.parametrize("stacked", [False, True], ids=["per expert", "stacked"])
@pytest.mark.parametrize("shard", ["5GB", "30KB"], ids=["one file", "shards"])
def test_every_layout_that_transformers_writes(tmp_path: Path, stacked: bool, shard: str) -> None:
    theirs = write_reference(tmp_path, seed=5, **RICH)
    for file in tmp_path.iterdir():
        file.unlink()
    theirs.save_pretrained(tmp_path, save_original_format=not stacked, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard != "5GB")
    ours = load(tmp_path)
    for name, tensor in theirs.state_dict().items():
        mine = ours.state_dict()[name.replace("model.", "backbone.", 1)]
        assert torch.equal(tensor, mine), name
    tokens = prompt(40)
    with torch.no_grad():
        assert worst(ours(tokens).logits, their_logits(theirs, tokens)) <= TOLERANCE


@pytest.mark.parametrize("shard", [10**9, 50_000], ids=["one file", "shards"])
def test_our_model_with_mtp_opens_in_transformers(
    tmp_path: Path, tiny: NemotronConfig, make: Callable[..., Nemotron], shard: int
) -> None:
    """Steps far below the published time_step_min: config.json must disable the clamp."""
    ours = make(tiny)
    assert tiny.time_step_min == 0.001
    save(ours, tmp_path / "m", max_shard_bytes=shard)
    theirs, info = NemotronHForCausalLM.from_pretrained(
        tmp_path / "m", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    tokens = prompt(60)
    with torch.no_grad():
        assert worst(ours(tokens).logits, their_logits(theirs.eval(), tokens)) <= TOLERANCE
    assert load(tmp_path / "m").config == tiny


def test_bfloat16_and_the_float32_bias_survive_transformers(
    tmp_path: Path, tiny: NemotronConfig, make: Callable[..., Nemotron]
) -> None:
    """Compares weights only: in bfloat16, two programs choose different experts now and then."""
    ours = make(tiny.replace(mtp_pattern="", mtp_depths=0), dtype=torch.bfloat16)
    save(ours, tmp_path / "ours")
    theirs = NemotronHForCausalLM.from_pretrained(tmp_path / "ours")
    assert theirs.dtype == torch.bfloat16
    theirs.save_pretrained(tmp_path / "theirs")
    again = load(tmp_path / "theirs")
    for name, tensor in ours.state_dict().items():
        assert again.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_transformers_config(tmp_path: Path, name: str) -> None:
    config = PRESETS[name]
    theirs = NemotronHConfig(**config.to_hf())
    assert theirs.hybrid_override_pattern == config.pattern
    theirs.save_pretrained(tmp_path)
    reread = transformers.AutoConfig.from_pretrained(tmp_path)
    assert NemotronConfig.from_hf(reread.to_dict()) == config
