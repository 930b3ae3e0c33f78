"""The whole model: caches, splits, ragged rows, documents, MTP, precision, initialization."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_lite.cache import Cache
from nemotron_lite.config import NemotronConfig
from nemotron_lite.input_checks import check_call, to_int64
from nemotron_lite.model import SEGMENT, Nemotron

TINY = NemotronConfig(
    pattern="ME*M-E", vocab_size=61, hidden_size=32,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=2, chunk_size=16,
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, moe_latent_size=16,
    moe_shared_expert_intermediate_size=24, intermediate_size=24, routed_scaling_factor=2.5,
    mtp_pattern="*E", mtp_depths=2, initializer_range=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Nemotron:
    return Nemotron(TINY, dtype=torch.float64, seed=1)


def _tokens(b: int, t: int) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, (b, t), generator=torch.Generator().manual_seed(t))


def test_parameters_carry_the_published_names(model: Nemotron) -> None:
    names = set(model.state_dict())
    assert {
        "backbone.embeddings.weight",
        "backbone.layers.0.norm.weight",
        "backbone.layers.0.mixer.in_proj.weight",
        "backbone.layers.0.mixer.conv1d.weight",
        "backbone.layers.0.mixer.conv1d.bias",
        "backbone.layers.0.mixer.A_log",
        "backbone.layers.0.mixer.norm.weight",
        "backbone.layers.1.mixer.gate.weight",
        "backbone.layers.1.mixer.gate.e_score_correction_bias",
        "backbone.layers.1.mixer.experts.up_proj",
        "backbone.layers.1.mixer.fc1_latent_proj.weight",
        "backbone.layers.1.mixer.shared_experts.down_proj.weight",
        "backbone.layers.2.mixer.q_proj.weight",
        "backbone.layers.4.mixer.up_proj.weight",
        "backbone.norm_f.weight",
        "lm_head.weight",
        "mtp.layers.0.eh_proj.weight",
        "mtp.layers.0.enorm.weight",
        "mtp.layers.0.mixer.o_proj.weight",
        "mtp.layers.1.mixer.experts.down_proj",
        "mtp.layers.1.final_layernorm.weight",
    } <= names
    assert model.backbone.layers[0].mixer.conv1d.weight.shape == (TINY.conv_dim, 1, 4)


@settings(max_examples=12)
@given(cuts=st.lists(st.integers(1, 39), max_size=4))
def test_any_split_of_the_prompt_gives_the_same_logits(cuts: list[int]) -> None:
    model = Nemotron(TINY, dtype=torch.float64, seed=1)
    tokens = _tokens(2, 40)
    whole = model(tokens).logits
    cache = model.empty_cache(2, capacity=1)
    edges = [0, *sorted(set(cuts)), 40]
    parts = [
        model(tokens[:, a:b], cache).logits for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
    assert cache.lengths.tolist() == [40, 40]


def test_one_token_at_a_time(model: Nemotron) -> None:
    tokens = _tokens(3, 12)
    cache = model.empty_cache(3)
    steps = [model(tokens[:, i : i + 1], cache).logits for i in range(12)]
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens).logits, rtol=1e-9, atol=1e-9)


def test_ragged_rows_equal_each_row_alone(model: Nemotron) -> None:
    lengths, after = [9, 4, 1], 5
    rows = [_tokens(1, n + after)[0] for n in lengths]
    padded = torch.full((3, 9), 7)
    for i, n in enumerate(lengths):
        padded[i, :n] = rows[i][:n]
    cache = model.empty_cache(3)
    out = model(padded, cache, lengths=torch.tensor(lengths), logits_to_keep=1)
    found = [out.logits]
    for step in range(after):
        new = torch.stack([row[n + step] for row, n in zip(rows, lengths, strict=True)])
        found.append(model(new[:, None], cache).logits)
    found = torch.cat(found, 1)
    assert cache.lengths.tolist() == [n + after for n in lengths]
    for i, n in enumerate(lengths):
        alone = model(rows[i][None]).logits[0, n - 1 :]
        torch.testing.assert_close(found[i], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_lengths_of_any_integer_dtype(model: Nemotron, dtype: torch.dtype) -> None:
    """In rows that are longer than the largest number of the dtype."""
    tokens, lengths = _tokens(2, 300), torch.tensor([1, 120])
    for n in (0, 3):
        expected = model(tokens, lengths=lengths, logits_to_keep=n).logits
        found = model(tokens, lengths=lengths.to(dtype), logits_to_keep=n).logits
        assert torch.equal(found, expected)
    cache = model.empty_cache(2)
    model(tokens, cache, lengths=lengths.to(dtype))
    assert cache.lengths.tolist() == [1, 120]
    hidden = model.forward_hidden(tokens, lengths=lengths.to(dtype)).hidden
    assert torch.equal(hidden, model.forward_hidden(tokens, lengths=lengths).hidden)


def test_lengths_that_are_no_integers() -> None:
    for values in (torch.tensor([1.5]), torch.tensor([True]), torch.tensor([1j])):
        with pytest.raises(ValueError, match=r"lengths has dtype torch\.\w+; expected integers"):
            to_int64("lengths", values)
    with pytest.raises(TypeError, match=r"lengths is a list; expected a tensor"):
        to_int64("lengths", [3])


def test_only_the_last_logits_are_kept(model: Nemotron) -> None:
    tokens, lengths = _tokens(3, 9), torch.tensor([9, 4, 1])
    whole = model(tokens, lengths=lengths).logits
    assert torch.equal(model(tokens, logits_to_keep=0).logits, model(tokens).logits)
    for n in (1, 2, 9):
        last = model(tokens, logits_to_keep=n).logits
        torch.testing.assert_close(last, model(tokens).logits[:, -n:])
        kept = model(tokens, lengths=lengths, logits_to_keep=n).logits
        assert kept.shape == (3, n, 61)
        for row, length in enumerate(lengths.tolist()):
            real = min(n, length)
            torch.testing.assert_close(kept[row, n - real :], whole[row, length - real : length])
            # Before the first token of a short row stand copies of its logits.
            torch.testing.assert_close(kept[row, : n - real], whole[row, :1].expand(n - real, -1))


def test_rows_without_new_tokens_stay_as_they_are(model: Nemotron) -> None:
    tokens = _tokens(2, 11)
    cache = model.empty_cache(2)
    model(tokens[:, :5], cache)
    model(tokens[:, 5:8], cache, lengths=torch.tensor([3, 0]))
    out = model(tokens[:, 8:], cache, lengths=torch.tensor([3, 2]), logits_to_keep=1).logits
    torch.testing.assert_close(out[0, 0], model(tokens[:1]).logits[0, -1])
    alone = torch.cat([tokens[1:, :5], tokens[1:, 8:10]], 1)
    torch.testing.assert_close(out[1, 0], model(alone).logits[0, -1])


@pytest.mark.parametrize("numbers", [(0, 1, 2), (4, 1, 4)], ids=["counted", "returning"])
def test_concatenated_documents_equal_each_alone(model: Nemotron, numbers: tuple[int, ...]) -> None:
    tokens = _tokens(1, 14)
    one, two, three = numbers
    seq_idx = torch.tensor([[one] * 5 + [two] * 2 + [three] * 7])
    together = model(tokens, seq_idx=seq_idx, mtp_depths=1)
    for a, b in [(0, 5), (5, 7), (7, 14)]:
        alone = model(tokens[:, a:b], mtp_depths=1)
        torch.testing.assert_close(together.logits[:, a:b], alone.logits)
        torch.testing.assert_close(together.mtp_logits[0][:, a : b - 1], alone.mtp_logits[0])


def test_long_inputs_go_in_segments_with_the_same_result() -> None:
    model = Nemotron(TINY, seed=1)
    tokens = _tokens(1, 2 * SEGMENT + 37)
    with_gradients = model(tokens).logits.detach()
    with torch.no_grad():
        in_segments = model(tokens, logits_to_keep=0).logits
        last = model(tokens, logits_to_keep=1).logits
    torch.testing.assert_close(in_segments, with_gradients, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(last, in_segments[:, -1:])


def test_mtp_predicts_further_with_the_same_weights(model: Nemotron) -> None:
    tokens = _tokens(2, 10)
    out = model(tokens, mtp_depths=2)
    assert [x.shape for x in out.mtp_logits] == [(2, 9, 61), (2, 8, 61)]
    module, entry = model.mtp, model.mtp.layers[0]
    embedded = model.backbone.embeddings(tokens)

    def depth(hidden: torch.Tensor, k: int) -> torch.Tensor:
        later = embedded[:, k : k + hidden.shape[1]]
        x = entry.eh_proj(torch.cat([entry.enorm(later), entry.hnorm(hidden)], -1))
        x = x + entry.mixer(entry.norm(x))
        x = x + module.layers[1].mixer(module.layers[1].norm(x))
        return module.layers[1].final_layernorm(x)

    first = depth(out.hidden[:, :9], 1)
    second = depth(first[:, :8], 2)
    torch.testing.assert_close(out.mtp_logits[0], model.lm_head(first))
    torch.testing.assert_close(out.mtp_logits[1], model.lm_head(second))


def test_mtp_sees_no_token_beyond_its_depth(model: Nemotron) -> None:
    tokens = _tokens(1, 10)
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 61
    a, b = (model(x, mtp_depths=2) for x in (tokens, changed))
    for depth, (one, other) in enumerate(zip(a.mtp_logits, b.mtp_logits, strict=True), start=1):
        same = (one - other).abs().amax(-1)[0] < 1e-9
        assert same[: 6 - depth].all() and not same[6 - depth]


def test_router_statistics(model: Nemotron) -> None:
    out = model(_tokens(2, 5), router_stats=True, mtp_depths=1)
    names = [stats.name for stats in out.router]
    assert names == ["backbone.layers.1.mixer", "backbone.layers.5.mixer", "mtp.layers.1.mixer"]
    assert out.router[0].scores.shape == (2, 5, 8) and out.router[2].scores.shape == (2, 4, 8)
    assert out.router[0].indices.shape == (2, 5, 2) and out.router[0].scores.requires_grad
    assert model(_tokens(2, 5)).router == []
    for name in names:
        assert model.get_submodule(name).name == name


def test_every_parameter_gets_a_gradient() -> None:
    model = Nemotron(TINY, seed=1)
    out = model(_tokens(4, 32), mtp_depths=2)
    sum(x.square().mean() for x in [out.logits, *out.mtp_logits]).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_selection_bias_stays_exact_when_the_model_is_cast() -> None:
    model = Nemotron(TINY, seed=1)
    exact = torch.linspace(64, 64.01, 8)
    gate = model.backbone.layers[1].mixer.gate
    gate.e_score_correction_bias.copy_(exact)
    model.to(torch.bfloat16)
    assert gate.weight.dtype == torch.bfloat16
    assert torch.equal(gate.e_score_correction_bias, exact)


def test_bfloat16_runs_and_is_close() -> None:
    model = Nemotron(TINY.replace(pattern="M*M-"), seed=1)  # without routers: a flip is a jump
    tokens = _tokens(2, 30)
    exact = model(tokens).logits
    low = model.to(torch.bfloat16)(tokens).logits
    assert low.dtype == torch.float32
    assert (low - exact).norm() / exact.norm() < 0.03


def test_same_seed_same_weights_and_the_global_stream_is_left_alone() -> None:
    before = torch.get_rng_state()
    a, b = Nemotron(TINY, seed=3), Nemotron(TINY, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, Nemotron(TINY, seed=4).lm_head.weight)


DRAWN = {
    "mixed": (TINY, -12.7946065, 0.8866295218467712),
    "not scaled": (
        TINY.replace(rescale_prenorm_residual=False), 2.2548101, 0.8866295218467712,
    ),
    "dense": (
        NemotronConfig(pattern="M-*-", vocab_size=96, hidden_size=48, n_groups=2),
        -7.6778168, 0.6788182258605957,
    ),
    "no latent space": (
        NemotronConfig(
            pattern="ME*E", vocab_size=96, hidden_size=48, n_shared_experts=0, use_conv_bias=False
        ),
        -5.4750762, 0.9777711629867554,
    ),
}  # fmt: skip


def weighted_sum(tensors: Mapping[str, torch.Tensor]) -> float:
    """The sum of all numbers, each times another cosine: it changes if two of them change places.

    Logarithms and exponentials differ in the last bit between processors, so there are no digests.
    """
    numbers = torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])
    return float(numbers @ torch.arange(len(numbers), dtype=torch.float64).cos())


@pytest.mark.parametrize("name", DRAWN)
def test_a_seed_draws_the_same_weights_as_ever(name: str) -> None:
    """And as many random numbers: the next one is the same too.

    The numbers were taken when one function of the model drew the weights of all layers.
    """
    config, expected, following = DRAWN[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found = Nemotron(config).state_dict()
        assert float(torch.rand(())) == following
    assert weighted_sum(found) == pytest.approx(expected, abs=1e-4)
    swapped = found | {"lm_head.weight": found["lm_head.weight"].flip(0)}
    assert weighted_sum(swapped) != pytest.approx(expected, abs=1e-3)


def test_initialization_follows_the_sheet() -> None:
    config = NemotronConfig.from_preset("lite")
    model = Nemotron(config, seed=0)
    model.requires_grad_(False)
    mixer = model.backbone.layers[0].mixer
    assert mixer.A_log.exp().min() >= 1 and mixer.A_log.exp().max() <= 16
    step = torch.nn.functional.softplus(mixer.dt_bias)
    assert step.min() >= config.time_step_floor and step.max() <= config.time_step_max * 1.0001
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))
    std = config.initializer_range
    assert model.lm_head.weight.std() == pytest.approx(std, rel=0.02)
    assert mixer.out_proj.weight.std() == pytest.approx(std / math.sqrt(14), rel=0.02)
    moe = model.backbone.layers[1].mixer
    assert moe.experts.up_proj.std() == pytest.approx(std, rel=0.02)
    assert moe.fc2_latent_proj.weight.std() == pytest.approx(std / math.sqrt(14), rel=0.05)


def test_the_meta_device_builds_without_memory() -> None:
    model = Nemotron(NemotronConfig.from_preset("super"), device="meta")
    assert model.num_parameters() == 120_668_707_840 + 2_942_325_248


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.tensor([[3, 61]])), "vocabulary has 61 entries"),
        (lambda m: m(torch.zeros(2, 0, dtype=torch.int64)), "not empty"),
        (lambda m: m(_tokens(1, 2), mtp_depths=2), "needs more than 2 tokens"),
        (lambda m: m(_tokens(1, 2), logits_to_keep=3), r"logits_to_keep=3: expected 0 .* to 2"),
        (lambda m: m(_tokens(1, 2), logits_to_keep=-1), "logits_to_keep=-1"),
        (lambda m: m(_tokens(2, 2), m.empty_cache(1)), "2 rows of tokens, but a cache of 1"),
        (lambda m: m(_tokens(1, 2), lengths=torch.tensor([3])), "must be 0 to 2"),
        (
            lambda m: m(_tokens(1, 2), m.empty_cache(1), seq_idx=torch.zeros(1, 2).long()),
            "cannot continue a cache",
        ),
        (lambda m: m(_tokens(1, 9), m.empty_cache(1), mtp_depths=1), "without a cache"),
        (lambda m: m(_tokens(1, 9), mtp_depths=-1), "mtp_depths=-1 must be 0 or more"),
        (
            lambda m: m(_tokens(1, 9), Cache.empty(m.config.replace(pattern="M"), 1)),
            r"cache of 1 layers.*model\.empty_cache",
        ),
        (
            lambda m: m(
                _tokens(1, 9), Cache.empty(m.config.replace(pattern="M" * 6), 1, dtype=m.dtype)
            ),
            r"it belongs to another model.*model\.empty_cache",
        ),
        (
            lambda m: m(
                _tokens(1, 9), Cache.empty(m.config.replace(ssm_state_size=5), 1, dtype=m.dtype)
            ),
            "caches sizes",
        ),
        (
            lambda m: m(_tokens(1, 9), Cache.empty(m.config, 1)),
            "computes in torch.float64, but the cache holds torch.float32",
        ),
    ],
)
def test_bad_input_is_named(model: Nemotron, call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(model)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            dict(lengths=torch.tensor([3])),
            r"lengths has shape \[1\]; expected \[2\], one length per row",
        ),
        (
            dict(seq_idx=torch.zeros(2, 5).long()),
            r"seq_idx has shape \[2, 5\]; expected that of tokens, \[2, 9\]",
        ),
    ],
    ids=["lengths", "seq_idx"],
)
def test_what_the_shapes_of_the_signature_say_is_also_said_without_a_checker(
    wrong: dict[str, torch.Tensor], message: str
) -> None:
    call = dict(tokens=_tokens(2, 9), cache=None, lengths=None, seq_idx=None, mtp_depths=0)
    with pytest.raises(ValueError, match=message):
        check_call(TINY, torch.float32, **{**call, **wrong})


def test_a_cache_is_checked_again_when_the_model_has_been_cast(model: Nemotron) -> None:
    cast = copy.deepcopy(model)
    cache = cast.empty_cache(1)
    cast(_tokens(1, 3), cache)
    cast.bfloat16()
    with pytest.raises(ValueError, match="was the model cast after the cache was made"):
        cast(_tokens(1, 3), cache)
