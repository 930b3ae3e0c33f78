"""What chapter 05 runs beside the learner's code: what it shows is what the layers compute."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.model.verdicts import KINDS, MARGIN, judge
from nemotron_lite import Nemotron, ledger, load
from nemotron_lite.config import NemotronConfig
from nemotron_lite.course import exercises
from nemotron_lite.course.chapters.ch05_latent_moe import lesson
from nemotron_lite.course.own_layers import with_own_layers
from nemotron_lite.course.records import record

STANDARD = lesson.Sizes(d=4096, latent=None, experts=128, top_k=6, f=2688)


def answer(name: str, chapter: str = "05") -> Any:
    return exercises.exercise(f"{chapter}.{name}").build()


def at_once(model: Nemotron, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    return logits


@pytest.fixture(scope="module")
def shipped() -> Nemotron:
    return load("lite")


@pytest.fixture(scope="module")
def features(shipped: Nemotron) -> dict[int, lesson.Features]:
    return lesson.features(shipped, lesson.held_out_tokens(shipped, 200))


@pytest.mark.parametrize("name", ["lite", "super", "nano"])
def test_weights_of_a_token_are_those_of_the_ledger(name: str) -> None:
    config = NemotronConfig.from_preset(name)
    found = lesson.weights_of_a_token(config)
    d, k, f = config.hidden_size, config.num_experts_per_tok, config.moe_intermediate_size
    assert found["router"] == config.n_routed_experts * d
    assert found["experts"] == k * 2 * f * config.expert_size
    latent = config.moe_latent_size
    assert found["latent projections"] == (0 if latent is None else 2 * d * latent)


def test_the_crossing_is_the_first_number_of_tokens() -> None:
    device, costs = lesson.Device(), answer("step_costs")
    for sizes in (STANDARD, lesson.Sizes.of(NemotronConfig.from_preset("super"))):
        found = lesson.crossing(costs, sizes, device)
        for tokens, later in ((found - 1, False), (found, True)):
            _, read, exchanged = device.microseconds(sizes.costs(costs, tokens))
            assert (exchanged > read) is later
    slow = lesson.Device(link=0.001)
    assert lesson.crossing(costs, STANDARD, slow) == 1
    with pytest.raises(ValueError, match="takes less time up to"):
        lesson.crossing(costs, STANDARD, lesson.Device(link=1e9))


def test_times_are_costs_by_what_the_device_can_do() -> None:
    device = lesson.Device(memory=2000.0, link=50.0, flops=500.0)
    assert device.microseconds((5e14, 2e12, 5e10)) == pytest.approx((1e6, 1e6, 1e6))


def test_digits_are_those_of_the_binomial_coefficient() -> None:
    assert lesson.digits(10, 1) == 2
    assert lesson.digits(9, 1) == 1
    assert lesson.digits(512, 22) == math.floor(math.log10(math.comb(512, 22))) + 1 == 39


def test_the_latent_model_costs_a_token_no_more() -> None:
    plain, latent = lesson.plain(), lesson.latent(answer("equal_cost"))
    spent = [sum(lesson.weights_of_a_token(m.config).values()) for m in (plain, latent)]
    one_more = latent.config.replace(num_experts_per_tok=latent.config.num_experts_per_tok + 1)
    assert spent[1] <= spent[0] < sum(lesson.weights_of_a_token(one_more).values())
    stored = [
        sum(r.each for r in ledger.parameters(m.config).rows if r.name == "experts")
        for m in (plain, latent)
    ]
    assert stored[0] == stored[1]


def test_a_learners_layer_is_taught_like_the_packages() -> None:
    costs = answer("equal_cost")
    theirs = lesson.teach(lesson.latent(costs, 1), "package", 1, steps=3)
    mine = with_own_layers(lesson.latent(costs, 1), "E", answer("latent_moe"))
    lesson.teach(mine, "own", 1, steps=3)
    tokens = lesson.training_tokens(2)
    torch.testing.assert_close(at_once(mine, tokens), at_once(theirs, tokens), rtol=0, atol=2e-2)
    other = lesson.teach(lesson.latent(costs, 1), "other batches", 2, steps=3)
    assert (at_once(other, tokens) - at_once(theirs, tokens)).abs().max() > 2e-2
    bias = mine.get_submodule("backbone.layers.1.mixer.gate").get_buffer("e_score_correction_bias")
    assert bool(bias.any())  # the training balances a learner's router too


def test_features_are_what_the_experts_read_and_write(shipped: Nemotron) -> None:
    tokens = lesson.held_out_tokens(shipped, 40)
    found = lesson.features(shipped, tokens)
    assert list(found) == [i for i, kind in enumerate(shipped.config.pattern) if kind == "E"]
    blocks: Any = shipped.backbone.layers
    with torch.no_grad():
        x = shipped.backbone.embed(tokens)
        for block in blocks[:3]:
            x = block(x)
        rows = blocks[3].norm(x)[0]
        mixer = blocks[3].mixer
        wrote = mixer.fc2_latent_proj(mixer.experts(mixer.fc1_latent_proj(rows), mixer.gate(rows)))
    torch.testing.assert_close(found[3].inputs, rows, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[3].outputs, wrote, rtol=1e-3, atol=1e-3)
    assert not mixer._forward_hooks


def test_tokens_are_text_that_was_held_out(shipped: Nemotron) -> None:
    words = shipped.tokenizer.decode(lesson.held_out_tokens(shipped, 50)[0].tolist())
    first = lesson.text().tokenizer.decode(lesson.exam().documents[0].tolist())
    assert first.startswith(words)
    with pytest.raises(ValueError, match="no tokenizer"):
        lesson.held_out_tokens(lesson.plain())


def test_energy_is_measured_in_the_rows_of_a_projection() -> None:
    rows = torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]])
    assert lesson.kept_by(torch.tensor([[2.0, 0.0, 0.0]]), rows) == pytest.approx(9 / 25)
    # Rows of a projection need not be orthogonal.
    slanted = torch.tensor([[1.0, 0.0, 0.0], [5.0, 0.1, 0.0]])
    assert lesson.kept_by(slanted, rows) == pytest.approx(9 / 25, abs=1e-5)


def test_energies_are_means_over_the_layers(
    shipped: Nemotron, features: dict[int, lesson.Features]
) -> None:
    d = shipped.config.hidden_size
    best, learned = lesson.energies(shipped, features, (64, d), answer("principal"))
    assert best[1] == pytest.approx(100, abs=1e-2)
    assert learned < best[0] < 100
    one = {number: layer for number, layer in features.items() if number == 1}
    blocks: Any = shipped.backbone.layers
    kept = lesson.kept_by(blocks[1].mixer.fc1_latent_proj.weight, features[1].inputs)
    found = lesson.energies(shipped, one, (64,), answer("principal"))[1]
    assert found == pytest.approx(100 * kept)


def test_only_the_early_projection_up_keeps_the_numbers(
    shipped: Nemotron, features: dict[int, lesson.Features]
) -> None:
    layer = answer("latent_moe")(shipped.config)
    layer.load_state_dict(shipped.get_submodule("backbone.layers.10.mixer").state_dict())
    found = lesson.bugs(layer, features[10].inputs[:60])
    assert [bug.error < 1e-4 for bug in found] == [False, False, False, False, True]
    assert [bug.exchanged for bug in found] == [768] * 4 + [1920]  # 2 * 6 * 64; 6 * 64 + 6 * 256
    assert lesson.harmless(found) == lesson.MISTAKES[-1]
    assert lesson.harmless(found[:1]) == "none"
    assert not layer.fc1_latent_proj._forward_hooks
    assert {bug.name for bug in found} == set(lesson.MISTAKES)


def small_layer(kind: Any = None) -> Any:
    """A layer with a square projection, in float64."""
    config = lesson.CONFIG.replace(moe_latent_size=lesson.CONFIG.hidden_size)
    layer = (kind or answer("latent_moe"))(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return layer


def test_mistakes_are_measured_against_the_layer_itself() -> None:
    """With a square, invertible projection z holds all of x, so two mistakes change nothing."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, lesson.CONFIG.hidden_size, generator=generator, dtype=torch.float64)
    errors = [bug.error for bug in lesson.bugs(small_layer(), x)]
    assert [error < 1e-6 for error in errors] == [True, True, False, False, True]


def test_mistakes_run_the_learners_forward() -> None:
    """A layer that computes something else has other errors, and one without a call says so."""
    theirs: Any = answer("latent_moe")

    class Squared(theirs):  # type: ignore[misc]
        """W_up stands inside of a square, so it may not move."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = super().forward(x) ** 2
            return found

    class Uncalled(theirs):  # type: ignore[misc]
        """It multiplies by the weight of the projection, and calls no module."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows, up, down = x.flatten(0, -2), self.experts.up_proj, self.experts.down_proj
            z = rows @ self.fc1_latent_proj.weight.T
            found: torch.Tensor = z @ up[0].T @ down[0].T @ self.fc2_latent_proj.weight.T
            return found.view(x.shape)

    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    errors = [bug.error for bug in lesson.bugs(small_layer(Squared), x)]
    assert errors[-1] > 1e-2
    errors = [bug.error for bug in lesson.bugs(small_layer(Uncalled), x)]
    assert [math.isnan(error) for error in errors] == [False, False, True, True, False]


def test_with_fast_links_a_long_step_waits_for_the_arithmetic() -> None:
    """The text says 372 GB/s: there exchange and arithmetic of a plain layer take the same time."""
    for link, longer in ((371.0, True), (373.0, False)):
        costs = STANDARD.costs(answer("step_costs"), 4096)
        arithmetic, _, exchange = lesson.Device(link=link).microseconds(costs)
        assert (exchange > arithmetic) is longer


def test_nothing_is_lost_at_full_width_and_something_below() -> None:
    model = with_own_layers(lesson.plain(), "E", answer("mixture_of_experts", "04"))
    lesson.teach(model, "plain", steps=4)
    tokens = lesson.training_tokens(4)
    found = lesson.features(model, tokens)
    right = at_once(model, tokens)
    answers = answer("principal"), answer("compress")
    errors = [
        float((at_once(lesson.compressed(model, found, width, *answers), tokens) - right).norm())
        for width in (64, 32, 8)
    ]
    assert errors[0] < 1e-2 < errors[1] < errors[2]


def test_tokens_of_a_subspace_lose_nothing() -> None:
    """Tokens and outputs inside of l directions: the cut layer computes the same."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 8, generator=generator))[0]
    model = lesson.plain()
    name = "backbone.layers.1.mixer"
    mixer: Any = model.get_submodule(name)
    rows = torch.randn(50, 8, generator=generator) @ basis.T
    with torch.no_grad():
        mixer.experts.down_proj.copy_(basis @ basis.T @ mixer.experts.down_proj)
        shared = mixer.shared_experts
        outputs = mixer(rows[None])[0] - shared.down_proj(F.relu(shared.up_proj(rows)) ** 2)
    found = {1: lesson.Features(rows, outputs)}
    one = copy.deepcopy(model)
    blocks: Any = one.backbone.layers
    small = _cut_one(one, found, 8)
    torch.testing.assert_close(small(rows[None]), blocks[1].mixer(rows[None]), rtol=0, atol=1e-4)


def _cut_one(model: Nemotron, found: dict[int, lesson.Features], width: int) -> Any:
    """The mixer of layer 1 after the cut; layer 3 gets random directions."""
    whole = {**found, 3: found[1]}
    small = lesson.compressed(model, whole, width, answer("principal"), answer("compress"))
    return small.get_submodule("backbone.layers.1.mixer")


def test_random_directions_are_a_basis() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 32, generator=generator)
    basis, kept = lesson.random_directions(generator)(rows, 8)
    torch.testing.assert_close(basis.T @ basis, torch.eye(8), rtol=0, atol=1e-5)
    assert kept == pytest.approx(8 / 32, abs=0.05)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What `show_output` gets: plain text and HTML."""
    found: list[tuple[str, str]] = []
    monkeypatch.setattr(lesson.output, "show_output", lambda text, rich: found.append((text, rich)))
    return found


def with_pairs(differences: list[float], updates: int = 384, seeds: int = 3) -> dict[str, Any]:
    """The record, as if every pair of models had these differences."""
    changed = copy.deepcopy(record(lesson.RECORD))
    changed["scale"]["updates"], changed["planned"]["seeds"] = updates, seeds
    for claim in changed["claims"]:
        claim.update(judge(differences, claim["kind"]))
    # The latent model has these differences to the dense one. Here the standard hybrid has no gain.
    for name, model in changed["models"].items():
        model["seeds"] = list(range(len(differences)))
        each = [2 + d if name.startswith("latent") else 2.0 for d in differences]
        model["curve"][-1]["bits_per_byte"]["each"] = each
    return changed


def test_the_record_is_shown_as_it_is(shown: list[tuple[str, str]]) -> None:
    lesson.recorded()
    whole = record(lesson.RECORD)
    claims = [c for c in whole["claims"] if c["model"] in lesson.LATENT]
    assert len(claims) >= 3
    assert shown[0][1].count("<tr>") == len(claims) + 2  # head and comparison
    assert f"{whole['scale']['updates']:,} updates" in shown[0][1]
    assert f"{whole['planned']['seeds']} seeds are planned" in shown[0][1]
    for claim in claims:
        assert f'<td style="text-align: left">{claim["n"]} of' in shown[0][1]


def scores_of(model: dict[str, Any]) -> dict[int, float]:
    """Bits per byte after the last update, by seed."""
    return dict(zip(model["seeds"], model["curve"][-1]["bits_per_byte"]["each"], strict=True))


def test_the_standard_hybrid_stands_beside_the_dense_transformer(
    shown: list[tuple[str, str]],
) -> None:
    """The other way to the same number: hybrid against moe and moe against dense."""
    lesson.recorded()
    whole = record(lesson.RECORD)
    claims = {(c["model"], c["other"]): c for c in whole["claims"]}
    pairs = ("hybrid", "moe"), ("moe", "dense")
    assert claims[pairs[0]]["seeds"] == claims[pairs[1]]["seeds"]
    standard = sum(claims[pair]["mean"] for pair in pairs)
    assert f">{standard:+.3f}</td>" in shown[0][1]
    latent = claims["latent", "dense"]
    assert f"{latent['mean']:+.3f} with LatentMoE, {standard:+.3f} with a standard" in shown[0][1]
    assert "comes from the hybrid, not from LatentMoE" in shown[0][1]
    ours = {name: scores_of(whole["models"][name]) for name in ("latent", "dense")}
    for seed, each in zip(latent["seeds"], latent["each"], strict=True):
        assert ours["latent"][seed] - ours["dense"][seed] == pytest.approx(each)


def test_a_gain_of_the_latent_mixture_is_not_given_to_the_hybrid(
    shown: list[tuple[str, str]],
) -> None:
    lesson.recorded(with_pairs([-0.02, -0.021, -0.022]))
    lesson.recorded(with_pairs([0.02, 0.021, 0.022]))
    lesson.recorded(with_pairs([-0.02]))
    assert "-0.021 with LatentMoE, +0.000 with a standard mixture. So not all" in shown[0][1]
    for _, rich in shown[1:]:  # no gain, or too few seeds to say so
        assert "with LatentMoE, " not in rich


def test_the_recap_says_what_the_record_says() -> None:
    """ "In our record, no" stands in the chapter."""
    claims = {(c["model"], c["other"]): c for c in record(lesson.RECORD)["claims"]}
    chapter = Path(__file__).parents[4] / "notebooks" / "05_latent_moe.ipynb"
    recap = next(c for c in json.loads(chapter.read_text())["cells"] if c["id"] == "c05-41")
    words = " ".join("".join(recap["source"]).split())
    assert claims["latent", "hybrid"]["verdict"] == "no"
    assert claims["latent", "hybrid"]["n"] == 5
    assert "In our record, no: five seeds exclude a gain that matters." in words


def test_reading_hardly_grows_from_a_hundred_tokens_on() -> None:
    costs = answer("step_costs")
    read = [STANDARD.costs(costs, tokens)[1] for tokens in (100, 100_000)]
    assert read[0] > 0.99 * read[1]
    assert lesson.crossing(costs, STANDARD, lesson.Device()) == 1912


def test_without_experts_only_the_routed_part_is_missing() -> None:
    model = with_own_layers(lesson.plain(), "E", answer("mixture_of_experts", "04"))
    before = copy.deepcopy(model.state_dict())
    bare = lesson.without_experts(model)
    tokens = lesson.training_tokens(2)
    for found in lesson.features(bare, tokens).values():
        torch.testing.assert_close(found.outputs, torch.zeros_like(found.outputs))
    for name, weight in bare.state_dict().items():
        routed = name.endswith(".experts.down_proj")
        assert bool(weight.any()) is (bool(before[name].any()) and not routed), name
        torch.testing.assert_close(model.state_dict()[name], before[name])  # it is a copy


def test_a_record_without_pairs_says_so(shown: list[tuple[str, str]]) -> None:
    lesson.recorded(with_pairs([]))
    assert "No pair of runs exists yet" in shown[0][1]
    assert shown[0][1].count("<b>not tested yet</b>") >= 3
    assert "not decided</b>" not in shown[0][1]


def test_verdicts_come_with_pairs_interval_and_rule(shown: list[tuple[str, str]]) -> None:
    for differences in ([0.02], [0.02, 0.021, 0.022], [-0.02, -0.021, -0.022]):
        lesson.recorded(with_pairs(differences))
    one, worse, better = (rich for _, rich in shown)
    assert "384 updates" in one
    assert "3 seeds are planned" in one
    assert "1 of 3" in one
    assert "provisional" in one
    assert "<b>not decided</b>" in one
    assert "No pair" not in one
    assert "+0.021 (+0.019 to +0.023)" in worse
    assert "<b>no</b>" in worse
    assert "All planned pairs exist" in worse
    assert "<b>yes</b>" in better
    assert "<b>no</b>" not in better
    assert "fewer than 3 pairs" in better
    assert "all of it is above -0.01" in better
    assert len({text for text, _ in shown}) == 1  # the compared text has no verdict


@pytest.mark.parametrize("kind", KINDS)
def test_the_rule_that_is_shown_is_the_rule_of_the_verdicts(kind: str) -> None:
    """Intervals around the bounds that the cell names: 0 and -0.01, +0.01 and +0.01."""
    yes, no = (0.0, -MARGIN) if kind == "better" else (MARGIN, MARGIN)
    tiny, step = 1e-6, 1e-4
    assert judge([yes - step - tiny, yes - step, yes - step + tiny], kind)["verdict"] == "yes"
    assert judge([no + step - tiny, no + step, no + step + tiny], kind)["verdict"] != "not decided"
    around = judge([yes - step, yes, yes + step], kind)["verdict"]
    assert around == ("no" if kind == "better" else "not decided")


def test_mistakes_are_shown_without_errors_in_the_plain_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lesson.show_bugs([lesson.Bug("a norm", 0.5, 768)])
    assert capsys.readouterr().out == "a norm: exchanges 768 numbers\n"


def test_a_mistake_that_did_not_run_has_no_error(shown: list[tuple[str, str]]) -> None:
    lesson.show_bugs([lesson.Bug("a norm", math.nan, 768)])
    assert "not run: call" in shown[0][1]
    assert lesson.harmless([lesson.Bug("a norm", math.nan, 768)]) == "none"


def test_super_is_described_with_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    lesson.at_full_scale()
    shown = capsys.readouterr().out
    assert "| MMLU-Pro | 48.30 | 52.87 |" in shown
    assert "exchanges\n45,056 numbers" in shown
    assert "serving speed of *acc*" in shown
