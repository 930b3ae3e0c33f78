"""Checks of chapter 00's exercises: for each mistake there is an input that shows it.

Answers about a config are compared with `nemotron_lite.ledger`, which is tested against the model
that it describes; answers about a model are compared with `Nemotron`. In `small` all sizes differ
for every seed, so an answer that mixes up two of them is noticed. Each check switches on one more
part (a shared expert, a latent, shared heads), so the first check that fails names the part that
the answer ignores. The published sizes come last.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_lite import ledger, ops
from nemotron_lite.config import LAYER_KINDS, PRESETS, SUPER_PATTERN, NemotronConfig
from nemotron_lite.course.compare import close, gradients, keeps_inputs, raises, strided
from nemotron_lite.model import Nemotron

Answer = Callable[..., Any]


def _integer(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def small(**changes: Any) -> NemotronConfig:
    """A config whose sizes are all different, so that mixing up two of them changes the result."""
    head = _integer(13, 17)
    sizes: dict[str, Any] = dict(
        pattern="ME", vocab_size=8, hidden_size=6 * head, num_attention_heads=6,
        num_key_value_heads=6, head_dim=head, mamba_num_heads=10, mamba_head_dim=_integer(12, 15),
        ssm_state_size=_integer(18, 21), n_groups=2, n_routed_experts=_integer(11, 12),
        num_experts_per_tok=3, moe_intermediate_size=_integer(40, 48), n_shared_experts=0,
        moe_shared_expert_intermediate_size=_integer(60, 72), conv_kernel=_integer(4, 5),
    )  # fmt: skip
    return NemotronConfig(**(sizes | changes))


# 00.read_pattern


def _same_layers(function: Answer, pattern: str) -> None:
    expected = {
        kind: [i for i, letter in enumerate(pattern) if letter == own]
        for own, kind in LAYER_KINDS.items()
    }
    found = function(pattern)
    assert isinstance(found, dict), f"expected a dict, got {type(found).__name__}"
    for kind, positions in expected.items():
        assert kind in found, f'{pattern!r}: the key "{kind}" is missing'
        assert list(found[kind]) == positions, (
            f'{pattern!r}: "{kind}" layers are at {positions}, not at {list(found[kind])}'
        )
    extra = sorted(set(found) - set(expected))
    assert not extra, f"{pattern!r}: there is no kind of layer {extra[0]!r}"


def places(function: Answer) -> None:
    _same_layers(function, "M*MM*")
    _same_layers(function, "*")


def all_four_letters(function: Answer) -> None:
    _same_layers(function, "M-M*-ME")
    _same_layers(function, "".join("ME*-"[_integer(0, 3)] for _ in range(12)))
    _same_layers(function, SUPER_PATTERN)


def foreign_letters(function: Answer) -> None:
    # Megatron's unified string: "|" between pipeline stages, and the MTP module behind a "/".
    others = "ABCDFGHIJKLNOPQRSTUVWXYZ +,"
    unknown = "ME" + others[_integer(0, len(others) - 1)] + "M*E"
    for pattern in ("MEM*E/*E", "ME|M*E", "mem", unknown):
        raises(function, pattern, error=ValueError, what=f"the pattern {pattern!r}")


# 00.normalize


def _expected_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return ops.rms_norm(x, weight, eps, impl="naive")


def rows_by_hand(function: Answer) -> None:
    x = torch.tensor([[3.0, 4.0], [-6.0, 8.0]])
    rms = torch.tensor([[12.5], [50.0]]).sqrt()
    close(function(x, torch.ones(2), 0.0), x / rms, what="the norm of [3, 4] and [-6, 8]")


def rows_apart(function: Answer) -> None:
    x = torch.randn(2, 3, 6) * torch.tensor([0.5, 1.0, 4.0])[:, None]
    weight = torch.ones(6)
    close(function(x, weight), _expected_norm(x, weight), what="the norm of 2 × 3 rows")


def eps_and_weight(function: Answer) -> None:
    x, weight = torch.randn(3, 5), torch.rand(5) + 0.5
    for eps in (0.7, 0.01):
        expected = _expected_norm(x, weight, eps)
        close(function(x.clone(), weight, eps), expected, what=f"with eps={eps}")
    small_rows = 1e-4 * x
    expected = _expected_norm(small_rows, weight)
    close(
        function(small_rows, weight), expected, what="rows of small numbers, with the default eps"
    )


def half_precision(function: Answer) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x, weight = (300 * torch.randn(4, 64)).to(dtype), torch.rand(64) + 0.5
        expected = _expected_norm(x.float(), weight).to(dtype)
        what = f"the norm of large numbers in {dtype}"
        close(function(x, weight), expected, what=what, rtol=0.01, dtype=True)


def norm_gradients(function: Answer) -> None:
    inputs = [torch.randn(2, 3, 6), torch.rand(6) + 0.5, 0.1]
    gradients(function, _expected_norm, inputs, what="2 × 3 rows of 6")


def norm_edges(function: Answer) -> None:
    x, weight = torch.randn(4, 1), torch.rand(1) + 0.5
    close(function(x, weight), _expected_norm(x, weight), what="rows of one channel")
    x, weight = torch.randn(4, 6), torch.rand(6) + 0.5
    expected = _expected_norm(x, weight)
    close(function(strided(x), weight), expected, what="rows that are not contiguous")
    keeps_inputs(function, x, weight, what="normalize")


# 00.layer_parameters


def _counted(
    function: Answer, config: NemotronConfig, letter: str, what: str, part: int | None = None
) -> None:
    layer = ledger.parameters(config.replace(pattern=letter)).layers[0]
    found = function(config, letter)
    pair = isinstance(found, tuple) and len(found) == 2
    assert pair, "expected a tuple (stored, read)"
    expected = (int(layer.total), int(layer.active))
    names = (f"stored in {what}", f"read by one token in {what}")
    for i in (0, 1) if part is None else (part,):
        integer = isinstance(found[i], int)
        assert integer, f"{names[i]}: expected an int, got {type(found[i]).__name__}"
        close(found[i], expected[i], what=names[i], rtol=0.0, atol=0.0)


def attention_parameters(function: Answer) -> None:
    _counted(function, small(), "*", "an attention layer")
    _counted(function, small(num_key_value_heads=2), "*", "attention with shared heads")
    _counted(function, small(num_key_value_heads=3, head_dim=40), "*", "attention with wide heads")


def mamba_parameters(function: Answer) -> None:
    _counted(function, small(), "M", "a Mamba layer")
    _counted(function, small(n_groups=5), "M", "a Mamba layer with five groups")


def plain_stored(function: Answer) -> None:
    _counted(function, small(), "E", "a mixture without extras", 0)


def plain_read(function: Answer) -> None:
    _counted(function, small(), "E", "a mixture without extras", 1)


def with_shared(function: Answer) -> None:
    _counted(function, small(n_shared_experts=1), "E", "a mixture with a shared expert")


def with_latent(function: Answer) -> None:
    latent = small(moe_latent_size=_integer(22, 28))
    _counted(function, latent, "E", "a mixture with a latent")


def published_layers(function: Answer) -> None:
    for name in ("nano", "super"):
        for letter in "M*E":
            _counted(function, PRESETS[name], letter, f"a layer {letter} of {name}")


# 00.cache_bytes


def _kept(function: Answer, config: NemotronConfig, part: int, what: str, **precision: int) -> None:
    names = {1: "float8_e4m3fn", 2: "bfloat16", 4: "float32"}
    given = {"kv_bytes": 2, "conv_bytes": 2, "state_bytes": 4} | precision
    kv, conv, state = (names[size] for size in given.values())
    kept = ledger.cache(config, 0, kv_dtype=kv, conv_dtype=conv, ssm_dtype=state)
    expected = (kept.kv_per_token, kept.conv + kept.ssm)
    found = function(config, **precision)
    pair = isinstance(found, tuple) and len(found) == 2
    assert pair, "expected a tuple (per_token, constant)"
    close(found[part], expected[part], what=what, rtol=0.0, atol=0.0)


def keys_and_values(function: Answer) -> None:
    _kept(function, small(pattern="*"), 0, "bytes per token of one attention layer")
    _kept(function, small(pattern="MEM*EM*E"), 0, "bytes per token of 'MEM*EM*E'")
    _kept(function, small(pattern="MEME"), 0, "bytes per token without attention")


def shared_heads(function: Answer) -> None:
    config = small(pattern="*", num_key_value_heads=2)
    _kept(function, config, 0, "bytes per token with 6 query and 2 key-value heads")


def own_head_width(function: Answer) -> None:
    _kept(function, small(pattern="*", head_dim=40), 0, "bytes per token with heads of 40 numbers")


def constant_bytes(function: Answer) -> None:
    _kept(function, small(pattern="M"), 1, "constant bytes of one Mamba layer")
    _kept(function, small(pattern="MEM*EM*E", n_groups=5), 1, "constant bytes of 'MEM*EM*E'")
    _kept(function, small(pattern="E*"), 1, "constant bytes without Mamba")


def other_bytes(function: Answer) -> None:
    config = small(pattern="MM*")
    for name, size in (("kv_bytes", 1), ("state_bytes", 2), ("conv_bytes", 4)):
        _kept(function, config, 0, f"bytes per token with {name}={size}", **{name: size})
        _kept(function, config, 1, f"constant bytes with {name}={size}", **{name: size})


def published_caches(function: Answer) -> None:
    for name in ("nano", "super"):
        _kept(function, PRESETS[name], 0, f"bytes per token of {name}")
        _kept(function, PRESETS[name], 1, f"constant bytes of {name}")


# 00.decode_flops


def _price(function: Answer, config: NemotronConfig, context: int, what: str) -> None:
    expected = ledger.flops(config, context, "decode").per_token
    close(function(config, context), expected, what=what, rtol=0.02, atol=0.0)


def weights_that_are_read(function: Answer) -> None:
    config = small(pattern="E", hidden_size=192, vocab_size=2, n_routed_experts=64)
    _price(function, config, 0, "FLOPs of one mixture layer that reads 3 of 64 experts")


def no_arithmetic_in_a_lookup(function: Answer) -> None:
    config = small(pattern="E", hidden_size=192, vocab_size=3000)
    _price(function, config, 10, "FLOPs with a vocabulary of 3,000")


def the_scan(function: Answer) -> None:
    config = small(pattern="M" * 4, ssm_state_size=160)
    _price(function, config, 10, "FLOPs of four Mamba layers")


def every_query_head(function: Answer) -> None:
    config = small(pattern="M*E*", num_key_value_heads=2, hidden_size=192)
    _price(function, config, 4000, "FLOPs of 'M*E*' after 4,000 tokens")
    narrow = small(pattern="*", hidden_size=4, vocab_size=2)  # here a single key counts
    for context in (0, 3):
        _price(function, narrow, context, f"FLOPs of one attention layer after {context} tokens")


def published_prices(function: Answer) -> None:
    for context in (1024, 1_048_576):
        what = f"Super's FLOPs after {context:,} tokens"
        _price(function, PRESETS["super"], context, what)


# 00.toy_model


def tiny(pattern: str, **changes: Any) -> NemotronConfig:
    """A model that runs in a millisecond."""
    sizes: dict[str, Any] = dict(
        vocab_size=13, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=2, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=6, moe_latent_size=5,
        moe_shared_expert_intermediate_size=10, initializer_range=0.3,
    )  # fmt: skip
    return NemotronConfig(pattern, **(sizes | changes))


def reference_model(config: NemotronConfig) -> Nemotron:
    """The package's model with random weights, those of the norms included."""
    model = Nemotron(config, seed=_integer(0, 10_000))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def _tokens(config: NemotronConfig, *shape: int) -> Tensor:
    return torch.randint(config.vocab_size, shape)


def _loaded(function: Answer, reference: Nemotron) -> Any:
    """An instance of the learner's class with the weights of `reference`."""
    model = function(reference.config)
    wanted = {name: tuple(value.shape) for name, value in reference.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    assert not missing, f"there is no weight {missing[0]!r} (yours are {sorted(found)[:4]} …)"
    assert not extra, f"there is a weight {extra[0]!r}, which the package's model does not have"
    for name, shape in wanted.items():
        assert found[name] == shape, f"{name} has shape {found[name]}; expected {shape}"
    model.load_state_dict(reference.state_dict())
    return model


def _same_logits(function: Answer, reference: Nemotron, tokens: Tensor, what: str) -> None:
    model = _loaded(function, reference)
    with torch.no_grad():
        expected = reference(tokens).logits
    close(model(tokens), expected, what=what, rtol=1e-3, atol=1e-4)


def weights_load(function: Answer) -> None:
    for pattern in ("M", "ME*", "E*EM"):
        reference = reference_model(tiny(pattern))
        wanted, found = reference.state_dict(), _loaded(function, reference).state_dict()
        for name, value in wanted.items():
            close(found[name], value, what=f"after loading, {name}", rtol=0.0, atol=0.0)


def final_norm(function: Answer) -> None:
    reference = reference_model(tiny("*"))
    with torch.no_grad():  # a layer that adds nothing, whose own norm would change nothing either
        reference.backbone.embeddings.weight.normal_()
        layer: Any = reference.backbone.layers[0]
        layer.mixer.o_proj.weight.zero_()
        layer.norm.weight.fill_(1.0)
    what = "with a layer that adds nothing, the logits"
    _same_logits(function, reference, _tokens(reference.config, 2, 5), what)


def one_layer(function: Answer) -> None:
    for letter in "*ME":
        reference = reference_model(tiny(letter))
        tokens = _tokens(reference.config, 2, 6)
        _same_logits(function, reference, tokens, f"the logits of the one-layer model {letter!r}")


def own_eps(function: Answer) -> None:
    reference = reference_model(tiny("E", norm_eps=0.5))
    tokens = _tokens(reference.config, 1, 4)
    _same_logits(function, reference, tokens, "with norm_eps=0.5, the logits")


def layers_in_order(function: Answer) -> None:
    for pattern in ("ME*", "*EM", "MM"):
        reference = reference_model(tiny(pattern))
        tokens = _tokens(reference.config, 2, 7)
        _same_logits(function, reference, tokens, f"the logits of {pattern!r}")


def single_tokens(function: Answer) -> None:
    reference = reference_model(tiny("ME*"))
    _same_logits(function, reference, _tokens(reference.config, 1, 1), "the logits of one token")
    model, tokens = _loaded(function, reference), _tokens(reference.config, 3, 5)
    alone = torch.cat([model(row[None]) for row in tokens])
    close(model(tokens), alone, what="three rows together and one by one", rtol=1e-3, atol=1e-4)


def model_gradients(function: Answer) -> None:
    reference = reference_model(tiny("ME*"))
    model, tokens = _loaded(function, reference), _tokens(reference.config, 2, 8)
    sizes = []
    for logits, owner in ((model(tokens), model), (reference(tokens).logits, reference)):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        slopes = [p.grad for p in owner.parameters() if p.grad is not None]
        assert len(slopes) == len(list(owner.parameters())), "a weight has no gradient"
        sizes.append(sorted(float(slope.norm()) for slope in slopes))
    close(sizes[0], sizes[1], what="the sizes of the gradients", rtol=1e-2, atol=1e-5)


# 00.triton_norm


def _rows(*shape: int) -> Tensor:
    """Random rows where kernels run: on the CPU in Triton's interpreter, else on the GPU."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    on_gpu = torch.cuda.is_available() and not interpreted
    return torch.randn(*shape).to("cuda" if on_gpu else "cpu")


def kernel_rows(function: Answer) -> None:
    for rows in (1, 6):
        x, weight = _rows(rows, 8), _rows(8)
        close(function(x, weight), _expected_norm(x, weight), what=f"{rows} rows of 8")


def kernel_ragged(function: Answer) -> None:
    for rows, size in ((1, 1), (2, 5), (2, 33)):
        x, weight = _rows(rows, size), _rows(size)
        close(function(x, weight), _expected_norm(x, weight), what=f"{rows} rows of {size}")


def kernel_half(function: Answer) -> None:
    x, weight = _rows(1, 12), _rows(12)
    close(function(x, weight, 0.5), _expected_norm(x, weight, 0.5), what="with eps=0.5")
    x = (300 * x).half()
    expected = _expected_norm(x.float(), weight).half()
    close(function(x, weight), expected, what="large float16 numbers", rtol=0.01, dtype=True)


# 00.longest_context


def _fits(
    function: Answer, config: NemotronConfig, spare: int, what: str, size: int = 2, batch: int = 1
) -> None:
    """Ask about a memory that holds the weights, the constant part of the caches, and `spare`."""
    kept = ledger.cache(config, 0, batch=batch)
    memory = ledger.parameters(config).backbone * size + kept.total + spare
    expected = spare // (batch * kept.kv_per_token)
    found = function(config, memory, size, batch)
    close(found, expected, what=what, rtol=0.0, atol=0.0)


def one_sequence(function: Answer) -> None:
    config = small(pattern="M*M")
    for spare in (_integer(100_000, 900_000), 0):
        _fits(function, config, spare, f"tokens that fit into {spare:,} bytes beside the rest")


def all_weights(function: Answer) -> None:
    config = small(pattern="ME*", n_routed_experts=64, n_shared_experts=1)
    for size in (1, 4):
        _fits(function, config, 123_457, f"tokens with {size} bytes per parameter", size)


def several_sequences(function: Answer) -> None:
    for batch in (3, 8):
        config = small(pattern="MM*E", num_key_value_heads=2)
        what = f"tokens of each of {batch} sequences"
        _fits(function, config, 1_234_567, what, batch=batch)


def nothing_fits(function: Answer) -> None:
    config = small(pattern="ME*")
    least = 2 * ledger.parameters(config).backbone + ledger.cache(config, 0).total
    for memory in (least - 1, least // 2):
        close(function(config, memory), -1, what="with too little memory, the answer", atol=0.0)


def no_limit(function: Answer) -> None:
    config = small(pattern="ME")
    least = 2 * ledger.parameters(config).backbone + ledger.cache(config, 0).total
    assert function(config, least) is None, "a model without attention has no limit: return None"
    close(function(config, least - 1), -1, what="with one byte too little, the answer", atol=0.0)
