"""Quality per FLOP: equal compute, verdicts that can be no, and runs that continue where they were.

The runs are tiny and say nothing about the models; what is tested is the instrument.
"""

from __future__ import annotations

import json
import statistics
import sysconfig
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import figures, quality_plot, record
from benchmarks.model import equal_compute, quality_per_flop, verdicts
from benchmarks.model.equal_compute import TOLERANCE, flops_per_token
from nemotron_lite import Nemotron, ledger
from nemotron_lite.data import prepare
from nemotron_lite.train.optimizer import make_optimizer

FULL = quality_per_flop.SCALES["full"]
TRIAL = replace(
    quality_per_flop.SCALES["quick"],
    reference=FULL.reference.replace(vocab_size=300, hidden_size=64, moe_intermediate_size=128,
                                     moe_shared_expert_intermediate_size=128),
    steps=8, seeds=2, batch_size=1, length=64, contexts=(64,),
)  # fmt: skip


def test_all_models_cost_the_same_and_mixtures_store_the_same() -> None:
    models = FULL.models()
    wanted = flops_per_token(FULL.reference, FULL.length)
    for model in models.values():
        cost = flops_per_token(model.config, FULL.length)
        assert abs(cost * model.longer - wanted) <= TOLERANCE * wanted or model.name == "latent_eff"
        built = Nemotron(model.config, device="meta")
        assert built.num_parameters() == ledger.parameters(model.config).total
    stored = {name: ledger.parameters(m.config).total for name, m in models.items()}
    for name in ("latent", "moe", "latent_eff"):
        assert stored[name] == pytest.approx(stored["hybrid"], rel=0.03)
    assert stored["dense"] < stored["hybrid"] / 3
    assert models["latent_eff_longer"].config == models["latent_eff"].config
    assert flops_per_token(models["latent_eff"].config, FULL.length) < 0.85 * wanted


def test_the_variants_of_latent_moe_are_those_of_the_paper() -> None:
    models = FULL.models()
    standard, acc, eff = (models[n].config for n in ("hybrid", "latent", "latent_eff"))
    for latent in (acc, eff):
        assert latent.moe_latent_size == standard.hidden_size // 4
        assert latent.n_routed_experts == 4 * standard.n_routed_experts
        assert latent.moe_intermediate_size == standard.moe_intermediate_size
        assert latent.pattern == standard.pattern
    assert eff.num_experts_per_tok == standard.num_experts_per_tok
    # 8 would be four times as many; the projections and the larger router cost about one expert.
    assert acc.num_experts_per_tok == 7
    scale = [c.routed_scaling_factor / c.num_experts_per_tok**0.5 for c in (standard, acc, eff)]
    assert scale == pytest.approx([1.0] * 3)
    # Super's own numbers follow from Nano's by the same rule, within 5 %.
    nano, super_ = 2.5 / 6**0.5, 5.0 / 22**0.5
    assert nano == pytest.approx(super_, rel=0.05)


def test_a_width_is_found_for_other_references_or_refused() -> None:
    wider = FULL.reference.replace(hidden_size=192, moe_intermediate_size=320)
    for model in equal_compute.model_list(wider, 256).values():
        assert model.name == "latent_eff" or flops_per_token(
            model.config, 256
        ) * model.longer == pytest.approx(flops_per_token(wider, 256), rel=TOLERANCE)
    dense = FULL.reference.replace(pattern="*-" * 40)
    with pytest.raises(ValueError, match=r"no sizes give a model of pattern .* change the pattern"):
        equal_compute.with_equal_mlp(dense, FULL.reference, 512)
    with pytest.raises(ValueError, match="no sizes"):
        equal_compute.with_equal_top_k(dense.replace(pattern="E" * 40), FULL.reference, 512)


def test_bytes_of_a_decoded_token_are_weights_and_cache() -> None:
    config = FULL.models()["moe"].config
    costs = equal_compute.costs(config, 512, (512, 1024))
    first, second = costs["bytes_per_decoded_token"].values()
    # Four attention layers with two heads of 32, keys and values in two bytes.
    assert second - first == 512 * 4 * 2 * 2 * 32 * 2
    count = ledger.parameters(config)
    table = config.vocab_size * config.hidden_size
    weights = 2 * (count.active - table + config.hidden_size)
    assert first == weights + ledger.cache(config, 512).total
    assert sum(costs["flops_by_part"].values()) == costs["flops_per_token"]


def test_the_products_of_the_optimizer_are_counted_as_torch_counts_them() -> None:
    config = TRIAL.models()["latent"].config
    model = Nemotron(config, seed=0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer(
        model, name="muon", lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert equal_compute.optimizer_flops(config) == counter.get_total_flops()


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    turn = equal_compute._Rotation(8)
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(16, generator=random).expand(1, 20, 16) for _ in range(2))
    scores = torch.einsum(
        "thp,shp->hts", *(turn(torch.nn.Identity(), None, x).view(20, 2, 8) for x in (q, k))
    )
    for distance in (0, 1, 7):
        line = scores.diagonal(-distance, dim1=1, dim2=2)
        torch.testing.assert_close(line, line[:, :1].expand_as(line), atol=1e-5, rtol=1e-5)
    assert (scores[:, 9, 9] - scores[:, 9, 2]).abs().min() > 1e-3
    torch.testing.assert_close(scores[:, 0, 0], (q[0, 0] * k[0, 0]).view(2, 8).sum(-1))


def test_only_transformers_have_positions() -> None:
    models = TRIAL.models()
    assert {name for name, model in models.items() if model.rotary} == {"moe", "dense"}
    tokens = torch.randint(300, (1, 12), generator=torch.Generator().manual_seed(0))
    model = models["dense"].build(seed=3)
    plain = Nemotron(models["dense"].config, seed=3)
    with torch.no_grad():
        ours, others = model(tokens).logits, plain(tokens).logits
    torch.testing.assert_close(ours[:, 0], others[:, 0])  # position 0 is not turned
    assert (ours[:, -1] - others[:, -1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("differences", "kind", "verdict"),
    [
        ([-0.03, -0.031, -0.029], "better", "yes"),
        ([-0.004, -0.0041, -0.0039], "better", "yes"),  # a small gain is a gain
        ([0.03, 0.031, 0.029], "better", "no"),
        ([0.001, -0.001, 0.0], "better", "no"),  # a gain of the margin is excluded
        ([-0.03, 0.02, -0.01], "better", "not decided"),
        ([-0.03, -0.03], "better", "not decided"),  # two seeds
        ([0.001, -0.001, 0.0], "not worse", "yes"),
        ([0.03, 0.031, 0.029], "not worse", "no"),
        ([0.03, 0.0, 0.01], "not worse", "not decided"),
        ([], "better", "not decided"),
    ],
)
def test_verdicts(differences: list[float], kind: str, verdict: str) -> None:
    found = verdicts.judge(differences, kind, margin=0.01)
    assert found["verdict"] == verdict
    assert found["n"] == len(differences)


def test_the_interval_is_that_of_the_t_test() -> None:
    values = [0.012, -0.003, 0.004, 0.02, -0.001]
    found = verdicts.judge(values, "better")
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(verdicts.CONFIDENCE)
    assert found["interval"] == pytest.approx([expected.low, expected.high])
    assert found["mean"] == pytest.approx(statistics.fmean(values))
    assert verdicts.judge(values[:1], "better")["interval"] is None
    with pytest.raises(ValueError, match="kind='worse'"):
        verdicts.judge(values, "worse")


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """2,000 made-up experiments of three seeds with a true gain of 0.02."""
    random = np.random.default_rng(0)
    held = []
    for differences in random.normal(-0.02, 0.01, (2000, 3)):
        low, high = verdicts.judge(differences.tolist(), "better")["interval"]
        held.append(low <= -0.02 <= high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_claims_use_the_seeds_that_both_models_have() -> None:
    scores = {
        "hybrid": {0: 2.0, 1: 2.1, 2: 2.2}, "latent": {0: 1.9, 2: 2.0, 5: 1.0}, "moe": {},
    }  # fmt: skip
    by_pair = {(c["model"], c["other"]): c for c in verdicts.judge_all(scores)}
    claim = by_pair["latent", "hybrid"]
    assert claim["seeds"] == [0, 2]
    assert claim["each"] == pytest.approx([-0.1, -0.2])
    assert by_pair["hybrid", "moe"]["n"] == 0
    names = set(FULL.models())
    assert {name for pair in by_pair for name in pair} <= names


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("text")
    for source in Path(sysconfig.get_path("stdlib"), "asyncio").glob("*.py"):
        if source.stat().st_size < 8_000:
            (folder / source.name).write_bytes(source.read_bytes())
    return prepare(vocab_size=300, held_out_bytes=2_000, root=folder, cache=folder / "cache")


def test_a_run_that_was_interrupted_continues(
    text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TRIAL.models()["latent"]
    whole = quality_per_flop.one_run(TRIAL, model, 1, text, tmp_path / "whole")
    assert whole is not None
    assert [point["step"] for point in whole["curve"]] == [1, 2, 4, 6, 8]
    assert [point["tokens"] for point in whole["curve"]] == [64, 128, 256, 384, 512]
    real, calls = quality_per_flop.evaluate, []

    def fails(*args: Any, **options: Any) -> Any:
        assert options["window"] == TRIAL.length
        calls.append(1)
        if len(calls) == 3:  # after update 4
            raise OSError("the machine")
        return real(*args, **options)

    monkeypatch.setattr(quality_per_flop, "evaluate", fails)
    with pytest.raises(OSError, match="the machine"):
        quality_per_flop.one_run(TRIAL, model, 1, text, tmp_path / "parts")
    again = quality_per_flop.one_run(TRIAL, model, 1, text, tmp_path / "parts")
    assert again is not None
    assert again["curve"] == whole["curve"]
    assert again["train_nats"] == whole["train_nats"]
    assert len(calls) == 6  # two, the failed one, and three more
    # Finished: nothing is trained again, and the checkpoints are gone.
    assert quality_per_flop.one_run(TRIAL, model, 1, text, tmp_path / "parts") == again
    assert len(calls) == 6
    (folder,) = (tmp_path / "parts").iterdir()
    assert sorted(path.name for path in folder.iterdir() if path.name != "run.lock") == [
        "curve.json", "log.jsonl", "run.json", "tokenizer.json",
    ]  # fmt: skip


def test_recipes_differ_in_the_number_of_updates_only() -> None:
    recipes = [TRIAL.recipe(model, 3).to_dict() for model in TRIAL.models().values()]
    steps = [recipe.pop("steps") for recipe in recipes]
    assert all(recipe == recipes[0] for recipe in recipes)
    assert recipes[0]["seed"] == 3
    assert steps[:5] == [8] * 5
    assert steps[5] > 8


def test_all_models_of_a_seed_read_the_same_batches(
    text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[torch.Tensor] = []
    real = type(text).batch

    def batch(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        read.append(found.tokens)
        return found

    monkeypatch.setattr(type(text), "batch", batch)
    short = replace(TRIAL, steps=4)
    of_model = {}
    for name, model in short.models().items():
        read.clear()
        quality_per_flop.one_run(short, model, 1, text, tmp_path)
        of_model[name] = torch.stack(read)
    assert len(of_model["hybrid"]) == 4
    for tokens in of_model.values():
        assert torch.equal(tokens[:4], of_model["hybrid"])
    assert len(of_model["latent_eff_longer"]) == 5
    read.clear()
    quality_per_flop.one_run(short, short.models()["hybrid"], 2, text, tmp_path)
    assert not torch.equal(torch.stack(read), of_model["hybrid"])


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Any) -> list[tuple[str, int]]:
    """Runs that were made; each is an invention of its model and seed."""
    made: list[tuple[str, int]] = []
    better = {"hybrid": 0.0, "latent": -0.03, "moe": 0.002, "dense": 0.05, "latent_eff": 0.03}

    def one_run(scale: Any, model: Any, seed: int, text: Any, kept: Path) -> dict[str, Any]:
        made.append((model.name, seed))
        score = 2.0 + 0.1 * seed + better.get(model.name, 0.0) + 0.0001 * (seed % 2)
        steps = scale.recipe(model, seed).steps
        tokens = scale.batch_size * scale.length
        curve = [
            {"step": n, "tokens": n * tokens, "bits_per_byte": score + 1 - n / steps}
            for n in (steps // 2, steps)
        ]
        run = {
            "model": model.name, "seed": seed, "curve": curve, "train_nats": 1.5, "max_vio": 0.5,
            "tokens_per_second": 1000.0,
        }  # fmt: skip
        folder = quality_per_flop.run_folder(kept, model, scale.recipe(model, seed), text)
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(run))
        return run

    monkeypatch.setattr(quality_per_flop, "one_run", one_run)
    monkeypatch.setattr(quality_per_flop, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(quality_per_flop, "open_text", lambda scale, quick=False: text)
    monkeypatch.setattr(record, "RECORDS", tmp_path / "benchmarks" / "records")
    monkeypatch.setitem(quality_per_flop.SCALES, "full", replace(TRIAL, seeds=3))
    return made


def test_runs_are_made_seed_by_seed_and_not_twice(made: list[tuple[str, int]]) -> None:
    names = list(TRIAL.models())
    quality_per_flop.measure_runs("full", minutes=0.0)
    assert made == []
    assert not list(record.RECORDS.glob("*"))
    quality_per_flop.measure_runs("full", minutes=1.0, models=["latent"], seeds=1)
    assert made == [("latent", 0)]
    quality_per_flop.measure_runs("full", minutes=1.0)
    seeds = [(name, seed) for seed in range(3) for name in names]
    assert made == [("latent", 0), *(pair for pair in seeds if pair != ("latent", 0))]
    quality_per_flop.measure_runs("full", minutes=1.0)
    assert len(made) == len(seeds)
    with pytest.raises(ValueError, match="models='lstm': expected some of hybrid, latent"):
        quality_per_flop.measure_runs("full", minutes=1.0, models=["lstm"])


def test_the_record_says_yes_no_and_the_spread(made: list[tuple[str, int]]) -> None:
    quality_per_flop.measure_runs("full", minutes=1.0)
    found = json.loads((record.RECORDS / "quality_per_flop.json").read_text())
    by_pair = {(c["model"], c["other"]): c for c in found["claims"]}
    assert by_pair["latent", "hybrid"]["verdict"] == "yes"
    assert by_pair["latent", "hybrid"]["mean"] == pytest.approx(-0.03)
    assert by_pair["latent_eff", "hybrid"]["verdict"] == "no"
    assert by_pair["latent_eff_longer", "hybrid"]["verdict"] == "no"
    hybrid = found["models"]["hybrid"]
    assert hybrid["bits_per_byte"] == pytest.approx({"n": 3, "median": 2.1001, "min": 2.0,
                                                     "max": 2.2})  # fmt: skip
    assert hybrid["flops_of_reference"] == 1.0
    point = hybrid["curve"][-1]
    assert point["flops"] == 8 * 64 * flops_per_token(TRIAL.reference, 64)
    assert len(point["bits_per_byte"]["each"]) == 3
    assert found["planned"] == {"models": list(TRIAL.models()), "seeds": 3}
    assert "text" in found["scale"]


def test_a_trial_leaves_nothing_behind(
    made: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(quality_per_flop.SCALES, "quick", TRIAL)
    quality_per_flop.main(["--quick", "--seeds", "1"])
    assert len(made) == 6
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):
        quality_per_flop.main(["--models", "hybrid,lstm"])


def test_the_figures_and_the_drawing_follow_the_record(
    made: list[tuple[str, int]], tmp_path: Path
) -> None:
    assert "still to be made" in figures.quality_per_flop(record.RECORDS)
    with pytest.raises(FileNotFoundError, match="python -m benchmarks quality_per_flop"):
        quality_plot.draw(record.RECORDS / "quality_per_flop.json")
    quality_per_flop.measure_runs("full", minutes=1.0)
    shown = figures.quality_per_flop(record.RECORDS)
    assert "3 of 3 planned seeds" in shown
    assert "| 2.070 (1.970 to 2.170) | 3 |" in shown
    assert shown.count("| yes |") >= 1
    assert shown.count("| no |") >= 2
    found = json.loads((record.RECORDS / "quality_per_flop.json").read_text())
    lines = {trace.name: trace for trace in quality_plot.figure(found).data}
    curve = lines["hybrid, LatentMoE"]
    assert list(curve.y) == pytest.approx([2.5701, 2.0701], abs=1e-4)
    assert curve.x[-1] == pytest.approx(found["models"]["latent"]["curve"][-1]["flops"] / 1e12)
    assert list(lines["seeds of claim 3"].x) == pytest.approx([-0.03] * 3)
    assert len({trace.line.dash for trace in lines.values() if trace.showlegend is None}) == 6
    words = quality_plot.summary(found)
    assert "LatentMoE (acc) learns more than a standard mixture. yes." in words
    # A record with one run of one model is drawn too.
    kept = {name: (entry if name == "moe" else {**entry, "seeds": []})
            for name, entry in found["models"].items()}  # fmt: skip
    none = [{**c, "each": [], "n": 0, "mean": None, "interval": None} for c in found["claims"]]
    assert len(quality_plot.figure({**found, "models": kept, "claims": none}).data) == 7


def test_the_committed_drawing_is_that_of_the_record() -> None:
    root = ET.fromstring(quality_plot.DRAWING.read_text())
    found = json.loads(quality_plot.RECORD.read_text())
    words = root.find("{http://www.w3.org/2000/svg}desc").text
    assert words == quality_plot.summary(found), "run python -m benchmarks.quality_plot"
    assert root.get("role") == "img"


def test_the_committed_record_is_of_these_models() -> None:
    """Another solver or other sizes would make its figures those of models that nobody trained."""
    found = json.loads(quality_plot.RECORD.read_text())
    assert list(found["models"]) == list(FULL.models())
    assert found["planned"]["seeds"] == FULL.seeds
    recipe = FULL.recipe(FULL.models()["hybrid"], 0).to_dict()
    assert found["scale"]["recipe"] == {**recipe, "seed": "that of the run"}
    for name, model in FULL.models().items():
        costs = equal_compute.costs(model.config, FULL.length, FULL.contexts)
        assert {key: found["models"][name][key] for key in costs} == costs
    scores = {
        name: dict(zip(entry["seeds"], entry["curve"][-1]["bits_per_byte"]["each"], strict=True))
        for name, entry in found["models"].items()
        if entry["seeds"]
    }
    assert found["claims"] == verdicts.judge_all(scores)
