"""The peer of the model benchmarks: transformers' NemotronH with the same weights.

A comparison is only fair if both programs do the same work. So:

- our model copies the weights of the peer, and both must then give the same logits
  (`check_same_model` runs before anything is timed);
- the peer has its best settings: SDPA attention, grouped expert products, a cache in prefill, and
  logits for the last token only;
- our model is called as a user calls it (`PATHS`);
- tokens are spread over all experts. A newly initialized router sends most tokens to a few experts,
  which no trained router does. Router rows are drawn with standard deviation 1/sqrt(d), so that
  logits have variance 1; `router_spread` reports the result.

One known difference is removed: transformers clamps dt at `time_step_min` in prefill (not in
decoding), Nemotron 3 does not. The peer gets a `time_step_min` that is too small to matter.

Sizes S and M have Super's shape at two widths, with 11 and 106 million parameters; lite is the
preset.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_lite import Cache, Nemotron, NemotronConfig, generate
from nemotron_lite.data.batches import Batch
from nemotron_lite.layers import KVCache, compiled_decoding
from nemotron_lite.layers.mamba2 import MambaCache
from nemotron_lite.train.loss import token_loss

_SHAPE: dict[str, Any] = dict(
    n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=1, routed_scaling_factor=2.5,
    chunk_size=128,
)  # fmt: skip

SIZES: dict[str, NemotronConfig] = {
    "S": NemotronConfig(
        pattern="MEMEM*EMEMEM*E", vocab_size=4096, hidden_size=192,
        num_attention_heads=6, num_key_value_heads=2, head_dim=32,
        mamba_num_heads=12, mamba_head_dim=32, ssm_state_size=64, n_groups=2,
        moe_latent_size=64, moe_intermediate_size=128, moe_shared_expert_intermediate_size=384,
        **_SHAPE,
    ),
    "M": NemotronConfig(
        pattern="MEMEM*EMEMEM*E", vocab_size=8192, hidden_size=512,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        mamba_num_heads=16, mamba_head_dim=64, ssm_state_size=128, n_groups=4,
        moe_latent_size=256, moe_intermediate_size=384, moe_shared_expert_intermediate_size=1024,
        **_SHAPE,
    ),
    # The preset of the course, without its MTP module: transformers' class has none.
    "lite": NemotronConfig.from_preset("lite", mtp_pattern="", mtp_depths=0),
    # For the tests of the benchmarks: every kind of layer, little time.
    "tiny": NemotronConfig(
        pattern="ME*E", vocab_size=128, hidden_size=32,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16, n_groups=2,
        moe_latent_size=16, moe_intermediate_size=24, moe_shared_expert_intermediate_size=48,
        **_SHAPE | dict(n_routed_experts=8, num_experts_per_tok=3, chunk_size=32),
    ),
}  # fmt: skip


def build_peer(
    config: NemotronConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """transformers' NemotronHForCausalLM with random parameters, on torch's default device."""
    from transformers import NemotronHConfig, NemotronHForCausalLM, logging

    logging.set_verbosity_error()  # it warns that its CUDA kernels are not available
    fields = dict(config.to_hf()) | {"time_step_min": 1e-12}
    torch.manual_seed(seed)
    peer = NemotronHForCausalLM._from_config(
        NemotronHConfig(**fields),
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
        dtype=dtype,
    )
    randomize(peer, config)
    return peer.eval()


@torch.no_grad()
def randomize(model: nn.Module, config: NemotronConfig) -> None:
    """Draw every parameter and selection bias of a model from torch's global generator."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        _draw(name, value, config)


def _draw(name: str, value: Tensor, config: NemotronConfig) -> None:
    if name.endswith("gate.weight"):
        value.normal_(0, config.hidden_size**-0.5)
    elif name.endswith("e_score_correction_bias"):
        value.uniform_(-0.05, 0.05)
    elif name.endswith("A_log"):
        value.uniform_(1, 16).log_()
    elif name.endswith("dt_bias"):
        value.uniform_(-5, -1)
    elif name.endswith(("norm.weight", "norm_f.weight", ".D")):
        value.uniform_(0.5, 1.5)
    elif value.ndim > 1 and "conv1d" not in name:
        # Variance 1/fan_in keeps activations at their size, so that errors show in the logits.
        value.normal_(0, 1.0 if "embeddings" in name else value.shape[-1] ** -0.5)


def build_ours(config: NemotronConfig, peer: nn.Module, *, share: bool = False) -> Nemotron:
    """Our model with the peer's weights: copies, or with `share` the same tensors."""
    weights = {
        f"backbone.{name.removeprefix('model.')}" if name.startswith("model.") else name: value
        for name, value in peer.state_dict().items()
    }
    ours = Nemotron(config, device="meta" if share else None)
    ours.load_state_dict(weights, strict=True, assign=share)
    return ours.eval()


def build_pair(size: str, seed: int = 0) -> tuple[Nemotron, nn.Module]:
    """(our model, the peer) with the same weights, in float32."""
    peer = build_peer(SIZES[size], seed)
    return build_ours(SIZES[size], peer), peer


def random_tokens(config: NemotronConfig, batch: int, length: int, seed: int = 1) -> Tensor:
    """Uniform random tokens `b t`: they use more experts than text does, the worst case."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


@torch.inference_mode()
def check_same_model(
    ours: Nemotron, peer: nn.Module, length: int = 300, tolerance: float = 5e-4
) -> float:
    """The largest difference of logits over a prompt and eight cached steps.

    If the scores of two experts are almost equal, the programs may choose different experts, and
    the logits of that token differ. So one token in a hundred is ignored; the largest difference of
    the others is returned.

    Raises:
        RuntimeError: the models disagree, so timing them against each other would mean nothing.
    """
    tokens = random_tokens(ours.config, 2, length + 8).to(ours.device)
    cache = ours.empty_cache(2, capacity=length + 8)
    prompt = ours(tokens[:, :length], cache)
    reference = peer(tokens[:, :length], use_cache=True)
    mine, theirs = [prompt.logits], [reference.logits]
    peer_cache = reference.past_key_values
    for position in range(length, length + 8):
        step = tokens[:, position : position + 1]
        mine.append(ours(step, cache).logits)
        theirs.append(peer(step, past_key_values=peer_cache, use_cache=True).logits)
    worst = (torch.cat(mine, 1) - torch.cat(theirs, 1)).abs().amax(-1).flatten()
    error = worst.sort().values[: int(0.99 * worst.numel())].max().item()
    if not error <= tolerance:
        raise RuntimeError(
            f"logits differ by {error:.2e}, expected at most {tolerance:.0e}: the two models are "
            "not the same model. Find the difference layer by layer before timing anything."
        )
    return error


@torch.inference_mode()
def router_spread(ours: Nemotron, length: int = 2048) -> dict[str, float]:
    """How evenly experts are used: share of experts with tokens, largest load over the mean."""
    tokens = random_tokens(ours.config, 1, length).to(ours.device)
    used, worst = [], []
    for stats in ours(tokens, router_stats=True).router:
        load = torch.bincount(stats.indices.flatten(), minlength=ours.config.n_routed_experts)
        used.append((load > 0).double().mean().item())
        worst.append((load.max() / load.double().mean()).item())
    return {"experts_in_use": min(used), "largest_load_over_mean": max(worst)}


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW, the fastest implementation, for both programs."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)


def train_step_ours(model: Any, optimizer: torch.optim.Optimizer, tokens: Tensor) -> float:
    """One step of next-token training: forward, backward, AdamW."""
    optimizer.zero_grad(set_to_none=True)
    loss = gradients_ours(model, tokens)
    optimizer.step()
    return loss.item()


def train_step_peer(model: Any, optimizer: torch.optim.Optimizer, tokens: Tensor) -> float:
    """The same step with transformers' own loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = gradients_peer(model, tokens)
    optimizer.step()
    return loss.item()


def gradients_ours(model: Any, tokens: Tensor) -> Tensor:
    """Forward and backward pass of next-token training; the loss."""
    hidden = model.forward_hidden(tokens).hidden
    loss = token_loss(hidden, [], model.lm_head, Batch(tokens), mtp_weight=0.0).total
    loss.backward()
    return loss.detach()


def gradients_peer(model: Any, tokens: Tensor) -> Tensor:
    """The same with transformers' own loss."""
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.detach()


# Which calls of ours are measured. They are those that a user's call makes.
PATHS = {
    "prefill": "one forward pass over the prompt with an empty cache and logits of the last token, "
    "as `generate` reads a prompt",
    "decode": "after one call of `generate`, which prepares the weights where that pays: one "
    "forward pass and argmax per token, as greedy `generate(compiled=True)` does; on a GPU, and "
    "where the table says so, without compiled code",
    "train": "forward_hidden, token_loss, backward and fused AdamW, as `train` does",
}


def prepare_as_generate_does(model: Nemotron) -> None:
    """Call `generate` once: it prepares the weights for decoding, where that pays.

    It does so for 32 new tokens or more, and the preparation stays with the model.
    """
    generate(model, [[0]], 32, temperature=0.0, stop=())


@torch.inference_mode()
def prefill(who: str, model: Any, tokens: Tensor) -> tuple[Tensor, Any]:
    """Read a prompt: (logits of its last token `b 1 v`, the cache)."""
    if who == "ours":
        cache = model.empty_cache(tokens.shape[0], capacity=tokens.shape[1] + 1)
        return model(tokens, cache, logits_to_keep=1).logits, cache
    found = model(tokens, use_cache=True, logits_to_keep=1)
    return found.logits, found.past_key_values


@torch.inference_mode()
def decode(who: str, model: Any, cache: Any, tokens: Tensor) -> Tensor:
    """Greedy decoding steps: reads `tokens` `b steps`, returns the tokens chosen, `b steps`.

    The next input is given, not taken from the output, so that both programs do the same work even
    if they choose different tokens.

    Args:
        who: "ours" decodes by compiled code on a CPU, "ordinary" is ours without it, and "peer" is
            a model of transformers.
        model: the model.
        cache: of the tokens before.
        tokens: `b steps`.

    Raises:
        RuntimeError: compiled code cannot be used.
    """
    compiled = who == "ours" and tokens.device.type == "cpu"
    written = []
    with compiled_decoding() if compiled else nullcontext() as refusals:
        for column in tokens.split(1, dim=1):
            if who == "peer":
                out = model(column, past_key_values=cache, use_cache=True, logits_to_keep=1)
            else:
                out = model(column, cache, logits_to_keep=1)
            written.append(out.logits.argmax(-1))
    if refusals:
        raise RuntimeError(f"this would not measure compiled code: {refusals[0]}")
    return torch.cat(written, 1)


def widen(who: str, cache: Any, rows: int) -> Any:
    """The cache of one sequence, copied to `rows` rows: a long context is read only once."""
    if who == "peer":
        cache.reorder_cache(torch.zeros(rows, dtype=torch.long))
        return cache
    layers: list[Any] = []
    for layer in cache.layers:
        if isinstance(layer, KVCache):
            layers.append(KVCache(layer.k.repeat(rows, 1, 1, 1), layer.v.repeat(rows, 1, 1, 1)))
        elif isinstance(layer, MambaCache):
            layers.append(
                MambaCache(layer.conv.repeat(rows, 1, 1), layer.ssm.repeat(rows, 1, 1, 1))
            )
        else:
            layers.append(None)
    return Cache(cache.pattern, layers, cache.lengths.tolist() * rows, cache.device)


def in_bfloat16(model: nn.Module) -> nn.Module:
    """A copy in bfloat16 whose router selection biases stay float32, as both programs load them."""
    biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("correction_bias")}
    copied = copy.deepcopy(model).to(torch.bfloat16)
    for name, bias in biases.items():
        owner, _, leaf = name.rpartition(".")
        setattr(copied.get_submodule(owner), leaf, bias)
    return copied
