"""The facts are valid, agree with the configs and the ledger, and name their sources."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from nemotron_lite import Nemotron, NemotronConfig, ledger
from nemotron_lite.checkpoint.names import hub_names, is_mtp, is_stack_of_experts
from nemotron_lite.course import FactError, facts, facts_table, tell
from nemotron_lite.course.factsheet import all_facts, parse_facts
from tests.course.conftest import Shown

CONFIG_FIELDS = {
    "layers": "num_layers", "pattern": "pattern", "width": "hidden_size",
    "query_heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
    "head_width": "head_dim", "mamba_heads": "mamba_num_heads",
    "mamba_head_width": "mamba_head_dim", "mamba_inner_width": "mamba_inner_size",
    "state_size": "ssm_state_size", "groups": "n_groups", "conv_taps": "conv_kernel",
    "chunk_length": "chunk_size", "experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok", "expert_width": "moe_intermediate_size",
    "latent_width": "moe_latent_size", "shared_expert_width": "moe_shared_expert_intermediate_size",
    "router_scale": "routed_scaling_factor", "vocabulary": "vocab_size",
    "in_proj_width": "mamba_in_proj_size", "conv_width": "conv_dim", "mtp_pattern": "mtp_pattern",
}  # fmt: skip


def test_every_fact_is_complete() -> None:
    for key, fact in all_facts().items():
        assert fact.source, key
        assert fact.value not in ("", None), key
        assert fact.name.strip() == fact.name != "", key
        assert fact.caveat == "" or fact.caveat.endswith("."), f"{key}: a caveat is a sentence"


@pytest.mark.parametrize("model", ["nano", "super", "ultra"])
def test_sizes_agree_with_the_presets(model: str) -> None:
    config = NemotronConfig.from_preset(model)
    known = all_facts()
    checked = 0
    for name, field in CONFIG_FIELDS.items():
        if f"{model}.{name}" in known:
            assert facts(f"{model}.{name}").value == getattr(config, field), f"{model}.{name}"
            checked += 1
    assert checked >= 17
    for letter, kind in (("M", "mamba"), ("E", "moe"), ("*", "attention")):
        assert facts(f"{model}.{kind}_layers").value == config.pattern.count(letter)


def test_positions_are_those_of_the_pattern() -> None:
    for model in ("super", "nano"):
        pattern = facts(f"{model}.pattern").value
        places = ", ".join(str(i) for i, letter in enumerate(pattern) if letter == "*")
        assert facts(f"{model}.attention_positions").value == places


def test_what_is_derived_agrees_with_the_ledger() -> None:
    config = NemotronConfig.from_preset("super")
    sizes = ledger.parameters(config)
    cache = ledger.cache(config, 1_048_576)
    layers = {layer.kind: layer for layer in sizes.layers}
    value = {key: fact.value for key, fact in all_facts().items()}
    assert value["super.backbone_parameters"] == sizes.backbone
    assert value["super.mtp_parameters"] == sizes.mtp
    assert value["super.parameters_with_mtp"] == round(sizes.total / 1e9, 2)
    assert value["super.mamba_layer_parameters"] == layers["mamba"].total
    assert value["super.attention_layer_parameters"] == layers["attention"].total
    assert value["super.moe_layer_parameters"] == layers["moe"].total
    assert value["super.moe_layer_active_parameters"] == round(layers["moe"].active / 1e6, 2)
    assert value["super.moe_share_parameters"] == round(40 * layers["moe"].total / 1e9, 3)
    assert value["super.kv_bytes_per_token"] == cache.kv_per_token
    assert value["super.ssm_state_bytes"] == cache.ssm
    assert value["super.ssm_state_mib"] == cache.ssm / 2**20
    assert value["super.kv_gib_at_1m"] == 8192 * 2**20 / 2**30
    assert value["super.state_equals_kv_at"] == cache.ssm / cache.kv_per_token
    assert value["super.total_cache_gib_at_1m"] == pytest.approx(
        (8192 * 2**20 + cache.ssm + value["super.conv_state_bytes"]) / 2**30, abs=0.005
    )
    assert value["super.weights_gb_bf16"] == round(2 * sizes.backbone / 1e9, 1)
    assert value["super.active_exact"] == sizes.active
    assert value["super.active_exact_without_embedding"] == sizes.active_without_embedding
    experts = config.n_routed_experts * config.moe_intermediate_size * config.moe_latent_size
    bits = 2 * experts * config.pattern.count("E") * value["nvfp4.bits_per_value"]
    assert value["super.expert_gb_nvfp4"] == round(bits / 8 / 1e9, 1)
    nano = ledger.cache(NemotronConfig.from_preset("nano"), 1)
    assert value["nano.kv_bytes_per_token"] == nano.kv_per_token
    assert value["nano.ssm_state_mib"] == nano.ssm / 2**20


def test_what_is_derived_for_latent_mixtures_agrees_with_the_preset() -> None:
    config = NemotronConfig.from_preset("super")
    d, latent, k = config.hidden_size, config.expert_size, config.num_experts_per_tok
    value = {key: fact.value for key, fact in all_facts().items()}
    assert value["super.latent_projection_parameters"] == 2 * d * latent
    assert value["super.exchanged_numbers"] == 2 * k * latent
    assert value["latent_moe.wide_exchanged_numbers"] == 2 * k * d
    assert value["latent_moe.standard_exchanged_numbers"] == 2 * 6 * d
    for key, experts, chosen in (
        ("super.combinations_log10", config.n_routed_experts, k),
        ("latent_moe.standard_combinations_log10", 128, 6),
    ):
        assert value[key] == round(math.log10(math.comb(experts, chosen)), 2)


def test_counts_of_tensors_are_those_of_the_model() -> None:
    config = NemotronConfig.from_preset("super")
    names = Nemotron(config, device="meta").state_dict()
    stored = {
        name: [disk for disk, _ in hub_names(name, config.n_routed_experts)] for name in names
    }
    own = [name for name in names if not is_mtp(name)]
    value = {key: fact.value for key, fact in all_facts().items()}
    assert value["super.model_tensors"] == len(own)
    assert value["super.checkpoint_tensors"] == sum(len(stored[name]) for name in own)
    experts = sum(len(stored[name]) for name in own if is_stack_of_experts(name))
    assert value["super.expert_tensors"] == experts
    mtp = sum(len(stored[name]) for name in names if is_mtp(name))
    assert value["super.mtp_checkpoint_tensors"] == mtp


def test_published_totals_are_those_of_the_ledger() -> None:
    for model, places in (("super", 1), ("nano", 1)):
        sizes = ledger.parameters(NemotronConfig.from_preset(model))
        assert facts(f"{model}.total_parameters").value == pytest.approx(
            sizes.backbone / 1e9, abs=0.15 if model == "super" else 0.05
        ), places


def test_a_fact_is_written_as_published() -> None:
    assert str(facts("super.latent_width")) == "1,024"
    assert f"{facts('super.latent_width'):unit}" == "1,024 channels"
    assert f"{facts('super.total_parameters'):.0f}" == "121"
    assert str(facts("super.final_learning_rate")) == "4.5e-6"
    assert str(facts("latent_moe.standard_mmlu_pro")) == "48.30"
    assert f"{facts('latent_moe.standard_mmlu_pro').value + 1:.1f}" == "49.3"
    assert facts("super.layers").source == "Nemotron 3 Super report (arXiv 2604.12374), Table 1"


def test_an_unknown_fact_names_similar_ones() -> None:
    with pytest.raises(FactError, match=r"no 'super\.latent_widht'.*super\.latent_width"):
        facts("super.latent_widht")
    with pytest.raises(FactError, match="Known: "):
        facts("zzz")


def test_tell_puts_facts_in_and_names_sources_once(shown: Callable[..., Shown]) -> None:
    seen = shown(tell, r"{super.layers} of {super.layers:unit}, $\frac{a}{b}$, ours {n}.", n=1234)
    assert seen.plain.splitlines() == [
        r"88 of 88, $\frac{a}{b}$, ours 1,234.",
        "Sources: Nemotron 3 Super report (arXiv 2604.12374), Table 1.",
    ]
    assert seen.bundles[0]["text/markdown"].count("Table 1") == 1


def test_tell_shows_caveats(shown: Callable[..., Shown]) -> None:
    assert "Batch size and number of GPUs" in shown(tell, "{super.throughput_vs_gpt_oss}").plain


def test_one_caveat_of_two_facts_is_shown_once(shown: Callable[..., Shown]) -> None:
    seen = shown(
        tell, "{latent_moe.standard_code} {latent_moe.latent_code} {super.throughput_vs_qwen}"
    )
    notes = seen.plain.splitlines()[2:]
    assert [note.partition(":")[0] for note in notes] == [
        "Code, average, standard experts; code, average, latent experts",
        "Throughput against Qwen3.5-122B (Super)",
    ]


def test_tell_refuses_what_it_cannot_fill() -> None:
    with pytest.raises(FactError, match=r"no 'super\.nothing'"):
        tell("{super.nothing}")
    with pytest.raises(FactError, match=r"got \['ours'\]"):
        tell("{super.layers}", ours=3)


def test_a_table_shows_our_numbers_beside_theirs(shown: Callable[..., Shown]) -> None:
    seen = shown(facts_table, "super.layers", "super.width", ours={"super.layers": 14}, title="T")
    lines = seen.plain.splitlines()
    assert lines[0] == "T"
    assert lines[1].split() == ["ours", "NVIDIA's"]
    assert lines[3].split() == ["layers", "14", "88"]
    assert lines[4].split()[-2:] == ["–", "4,096"]
    assert "<td" in seen.html
    assert "Table 1" in seen.html


def test_a_table_of_models(shown: Callable[..., Shown]) -> None:
    seen = shown(facts_table, "latent_width", models=("nano", "super"))
    assert seen.plain.splitlines()[0].split() == ["Nano", "Super"]
    assert seen.plain.splitlines()[2].split()[-2:] == ["–", "1,024"]


def test_what_was_measured_stays_out_of_the_text(shown: Callable[..., Shown]) -> None:
    seen = shown(facts_table, "super.layers", ours={"super.layers": 3.21}, measured=True)
    assert "3.21" in seen.html
    assert "3.21" not in seen.plain
    assert "ours" not in seen.plain


def test_a_table_refuses_unknown_keys() -> None:
    with pytest.raises(FactError, match="not rows of the table"):
        facts_table("super.layers", ours={"super.width": 3})
    with pytest.raises(FactError, match="no model"):
        facts_table("wings", models=("super",))


FILE = (
    '[sources]\nS = "A report"\n[a.b]\nvalue = 1\nunit = ""\nsource = "S, Table 1"\ncaveat = ""\n'
)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('unit = ""\n', "", r"has no \['unit'\]"),
        ('unit = ""', 'unit = ""\nwhen = 1', r"unknown fields \['when'\]"),
        ("S, Table", "T, Table", "cites 'T'"),
        ('"S, Table 1"', '""', "has an empty source"),
        ("[a.b]", "[a.B]", "not a key"),
        ("[a.b]", "[b]", "not a key"),
        ("[a.b]", "[a]\nstray = 2\n[a.b]", "a.stray is not part of a fact"),
    ],
)
def test_a_bad_entry_is_refused(old: str, new: str, words: str) -> None:
    assert parse_facts(FILE)["a.b"].source == "A report, Table 1"
    with pytest.raises(FactError, match=words):
        parse_facts(FILE.replace(old, new))
