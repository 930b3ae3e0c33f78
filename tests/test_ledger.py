"""The ledger against published totals, counts by hand and the model itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nemotron_lite import ledger
from nemotron_lite.config import PRESETS, NemotronConfig
from tests.published import ULTRA_BYTES

SUPER = PRESETS["super"]
NANO = PRESETS["nano"]

# Every option that adds or removes a tensor, beside the presets.
VARIANTS = {
    **PRESETS,
    "dense": NemotronConfig(pattern="M-*-", vocab_size=96, hidden_size=48, n_groups=2),
    "plain mixture": NemotronConfig(
        pattern="ME*E", vocab_size=96, hidden_size=48, n_shared_experts=0, use_conv_bias=False
    ),
    "mixture in MTP only": NemotronConfig(
        pattern="M", vocab_size=96, hidden_size=48, moe_latent_size=24, mtp_pattern="E*E",
        mtp_depths=1,
    ),
    "biases": NemotronConfig(
        pattern="M-*E", vocab_size=96, hidden_size=48, moe_latent_size=24, mtp_pattern="*E",
        mtp_depths=1, attention_bias=True, mlp_bias=True, use_bias=True,
    ),
    "biases of one kind": NemotronConfig(
        pattern="M-*E", vocab_size=96, hidden_size=48, n_shared_experts=0, mlp_bias=True
    ),
}  # fmt: skip


def test_super_has_the_published_number_of_parameters():
    count = ledger.parameters(SUPER)
    assert count.backbone == 120_668_707_840
    assert count.mtp == 2_942_325_248
    assert count.total == 123_611_033_088
    assert [layer.total for layer in count.layers[6:9]] == [109_640_064, 35_655_680, 2_873_102_848]


@pytest.mark.parametrize(
    ("config", "expected"),
    [(SUPER, "12.770 12.233 11.696"), (NANO, "3.580 3.228 2.875")],
    ids=["super", "nano"],
)
def test_active_parameters_match_the_reports(config, expected):
    count = ledger.parameters(config)
    active = (count.active, count.active_without_embedding, count.active_body)
    assert " ".join(f"{n / 1e9:.3f}" for n in active) == expected


def test_nano_has_the_published_number_of_parameters():
    count = ledger.parameters(NANO)
    assert f"{count.total / 1e9:.3f}" == "31.578"
    assert count.mtp == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_parts_and_layers_add_up(name):
    config = VARIANTS[name]
    count = ledger.parameters(config)
    parts = count.by_part
    assert sum(parts.values()) == count.total
    assert parts.get("mtp", 0) == count.mtp
    in_layers = sum(layer.total for layer in count.layers)
    assert in_layers + parts["embedding"] + parts["head"] + parts["norm"] == count.backbone
    active = sum(layer.active for layer in count.layers)
    assert active + parts["norm"] == count.active_body


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_built_without_memory_has_as_many_parameters(name):
    from nemotron_lite.model import Nemotron

    config = VARIANTS[name]
    with torch.device("meta"):
        model = Nemotron(config)
    stored = {n: p.numel() for n, p in model.named_parameters()}
    stored |= {
        n: b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")
    }
    count = ledger.parameters(config)
    assert sum(stored.values()) == count.total
    assert sum(n for name, n in stored.items() if name.startswith("mtp.")) == count.mtp
    for layer in count.layers:
        prefix = f"backbone.layers.{layer.index}."
        mine = sum(n for name, n in stored.items() if name.startswith(prefix))
        assert mine == layer.total, f"layer {layer.index}, {layer.kind}"


def test_worked_formula_shows_the_numbers_it_was_computed_from():
    row = next(r for r in ledger.parameters(SUPER).rows if r.name == "in_proj")
    assert row.worked == "4096 * (2*128*64 + 2*8*128 + 128)"
    assert row.each == 4096 * 18_560 == eval(row.worked)


def test_cache_of_super():
    at_one_million = ledger.cache(SUPER, 1_048_576)
    assert at_one_million.kv_per_token == 8192
    assert at_one_million.kv == 8 * 2**30
    assert at_one_million.ssm == 167_772_160
    assert at_one_million.conv == 2_457_600
    assert at_one_million.total == 8 * 2**30 + 167_772_160 + 2_457_600


def test_cache_dtypes_batch_and_mtp():
    assert ledger.cache(SUPER, 0).total == 167_772_160 + 2_457_600
    assert ledger.cache(SUPER, 1, kv_dtype="float8_e4m3fn").kv_per_token == 4096
    assert ledger.cache(SUPER, 1, ssm_dtype=torch.float16).ssm == 80 * 2**20
    assert ledger.cache(SUPER, 1, mtp=True).kv_per_token == 8192 + 1024
    assert ledger.cache(SUPER, 100, batch=3).total == 3 * ledger.cache(SUPER, 100).total
    nano = ledger.cache(NANO, 1_048_576)
    assert (nano.kv_per_token, nano.kv, nano.ssm) == (6144, 6 * 2**30, 46 * 2**20)


@pytest.mark.parametrize("name", ["lite", "tiny-super"])
def test_cache_is_what_a_cache_object_holds(name):
    from nemotron_lite.cache import Cache

    config = PRESETS[name]
    found = Cache.empty(config, 3, capacity=64).nbytes
    count = ledger.cache(config, 64, batch=3, kv_dtype=torch.float32, conv_dtype=torch.float32)
    assert found == count.total


def _brute_force(config: NemotronConfig, t: int, chunk: int) -> int:
    """FLOPs of a prompt by counting multiply-adds position by position."""
    d, inner = config.hidden_size, config.mamba_inner_size
    h, p, n, g = (
        config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size, config.n_groups
    )  # fmt: skip
    total = 0
    for kind in config.pattern:
        if kind == "M":
            for i in range(t):
                total += (
                    2 * d * config.mamba_in_proj_size + 2 * config.conv_kernel * config.conv_dim
                )
                total += 2 * inner * d
                total += (i % chunk + 1) * (2 * g * n + 2 * h * p)  # C·B, then its sum over x
                total += 2 * h * p * n + 2 * h * p * n  # into the chunk's state, out of the last
                total += 2 * h * p * n if i % chunk == 0 else 0  # carry one state per chunk
        elif kind == "*":
            width = config.num_attention_heads * config.head_dim
            kv_width = config.num_key_value_heads * config.head_dim
            for i in range(t):
                total += 2 * d * (2 * width + 2 * kv_width) + (i + 1) * (2 * width + 2 * width)
        elif kind == "E":
            latent = config.moe_latent_size
            routed = config.num_experts_per_tok * 4 * config.moe_intermediate_size
            per_token = 2 * d * config.n_routed_experts + routed * config.expert_size
            per_token += 4 * d * latent if latent else 0
            if config.n_shared_experts:
                per_token += 4 * d * config.moe_shared_expert_intermediate_size
            total += t * per_token
        else:
            total += t * 4 * d * config.intermediate_size
    return total + t * 2 * d * config.vocab_size


@pytest.mark.parametrize(
    "name", ["lite", "tiny-super", "super", "dense", "plain mixture", "biases"]
)
@pytest.mark.parametrize(("t", "chunk"), [(1, 64), (100, 32), (128, 128), (257, 64)])
def test_prefill_counts_every_multiply_add(name, t, chunk):
    count = ledger.flops(VARIANTS[name], t, "prefill", chunk=chunk)
    assert count.total == pytest.approx(_brute_force(VARIANTS[name], t, chunk), rel=1e-12)
    assert sum(count.by_part.values()) == pytest.approx(count.per_token)


@pytest.mark.parametrize("name", ["lite", "tiny-super", "dense", "plain mixture", "biases"])
def test_prefill_is_what_a_running_model_multiplies(name):
    """torch counts products of matrices with weights exactly as the ledger does.

    Two stated differences: the scan multiplies whole q x q squares where the ledger counts the
    causal triangle, and torch has no entry for the CPU's attention kernel.
    """
    from nemotron_lite.backends.cpu_ssd import best_chunk
    from nemotron_lite.model import Nemotron

    config, t = VARIANTS[name].replace(mtp_pattern="", mtp_depths=0, vocab_size=300), 384
    tokens = torch.randint(300, (1, t))
    onednn = torch.ops.mkldnn._linear_pointwise  # what `ops.linear` calls on some CPUs
    counts = {onednn: lambda x, weight, *_, out_shape: 2 * math.prod(x) * weight[0]}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=counts) as counter:
        Nemotron(config)(tokens)
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(
        counted.get(op, 0) for op in ("aten.mm", "aten.addmm", "mkldnn._linear_pointwise")
    )
    rows = ledger.flops(config, t, chunk=best_chunk(config.mamba_head_dim)).rows
    weights = [
        row for row in rows if not row.name.startswith(("scan", "conv1d", "scores and values"))
    ]
    assert products == sum(r.total for r in weights) * t
    scan = sum(row.total for row in rows if row.name.startswith("scan")) * t
    assert 0.9 * scan < counted["aten.bmm"] < 2 * scan


def test_the_head_of_a_prompt_can_be_counted_once():
    every = ledger.flops(SUPER, 1000)
    last = ledger.flops(SUPER, 1000, logits_to_keep=1)
    assert every.total - last.total == pytest.approx(999 * 2 * 4096 * 131_072)
    ten = ledger.flops(SUPER, 1000, logits_to_keep=10)
    assert every.total - ten.total == pytest.approx(990 * 2 * 4096 * 131_072)


def test_decode_grows_with_the_context_in_attention_only():
    short, long = (ledger.flops(SUPER, t, "decode").by_part for t in (0, 100_000))
    assert long["attention"] - short["attention"] == 8 * 4 * 4096 * 100_000
    assert {k: v for k, v in short.items() if k != "attention"} == {
        k: v for k, v in long.items() if k != "attention"
    }
    # Two FLOPs for every weight a token reads, near enough, once there is little context.
    body = ledger.parameters(SUPER).active_without_embedding
    assert sum(short.values()) == pytest.approx(2 * body, rel=0.02)


def test_ultra_weighs_what_its_index_says_to_the_byte():
    """Two bytes a weight; the selection bias of each mixture, the MTP module's too, has four."""
    ultra = PRESETS["ultra"]
    mixtures = ultra.pattern.count("E") + ultra.mtp_pattern.count("E")
    biases = mixtures * ultra.n_routed_experts
    assert 2 * ledger.parameters(ultra).total + 2 * biases == ULTRA_BYTES


def test_training_costs_three_forward_passes_with_mtp():
    forward = ledger.flops(SUPER, 4096, mtp_depths=2)
    train = ledger.flops(SUPER, 4096, "train")
    assert train.per_token == pytest.approx(3 * forward.per_token)
    assert ledger.flops(SUPER, 4096, "train", mtp_depths=0).by_part.keys() == {
        "mamba",
        "attention",
        "moe",
        "head",
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ledger.flops(NANO, 0), "context=0"),
        (lambda: ledger.flops(NANO, 8, "prefil"), "mode='prefil'"),
        (lambda: ledger.flops(NANO, 8, mtp_depths=1), "no MTP module"),
        (lambda: ledger.flops(NANO, 8, chunk=0), "chunk=0"),
        (lambda: ledger.flops(NANO, 8, logits_to_keep=9), r"logits_to_keep=9: expected .* to 8"),
        (lambda: ledger.cache(NANO, -1), "context=-1"),
        (lambda: ledger.cache(NANO, 1, batch=0), "batch=0"),
        (lambda: ledger.cache(NANO, 1, kv_dtype="int7"), "dtype='int7'.*bfloat16"),
    ],
)
def test_errors_name_the_value_that_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_family_is_counted_member_by_member() -> None:
    members = ledger.family((1, 4), context=100)
    assert [member.depth for member in members] == [1, 4]
    for member in members:
        config = NemotronConfig.lite(member.depth)
        assert member.config == config
        assert member.parameters == ledger.parameters(config)
        assert member.training == ledger.flops(config, 100, "train")
        assert member.cache == ledger.cache(config, 100)
    assert [member.depth for member in ledger.family()] == [*range(1, 13)]
