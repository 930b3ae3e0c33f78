"""What chapter 06 runs beside the learner's code: what it shows is what models and files do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_lite import Nemotron, NemotronConfig, ledger, load, save
from nemotron_lite.course import exercises
from nemotron_lite.course.chapters.ch06_the_whole_backbone import lesson
from nemotron_lite.offload import DEFAULT_BUDGET

SMALL = lesson.TINY.replace(pattern="MEM*EME", bos_token_id=1)


def answer(name: str) -> Any:
    return exercises.exercise(f"06.{name}").build()


def read_folder(folder: Path) -> Any:
    given: dict[str, Any] = {}
    exec(exercises.exercise("06.checkpoint_tensors").stub, given)
    return given["read_folder"](folder)


@pytest.fixture(scope="module")
def shipped() -> Nemotron:
    return load("lite")


@pytest.fixture(scope="module")
def giant() -> lesson.Giant:
    """A small one, of whose matrices most are generated for each token."""
    found = lesson.Giant(SMALL, budget=17_200_000)
    found.token()
    return found


def test_a_token_uses_what_the_ledger_says(giant: lesson.Giant) -> None:
    before = len(giant.tokens)
    work = giant.token()
    assert work.weights == lesson.weights_of_a_token(giant.config)
    assert work.flops == ledger.flops(giant.config, before - 1, "decode").total
    assert work.seconds > 0
    assert len(giant.tokens) == before + 1
    assert giant.gib_in_memory * lesson.GIB <= 17_200_000
    assert not any(layer._forward_hooks for layer in giant.model.backbone.layers)


def test_a_giant_writes_what_its_model_writes() -> None:
    giant = lesson.Giant(SMALL, budget=17_200_000)
    twin = Nemotron.from_config(giant.config, weights="generated", seed=0)
    for _ in range(3):
        giant.token()
    with torch.inference_mode():
        logits = twin(torch.tensor([giant.tokens[:-1]])).logits[0]
    best = logits.max(-1).values - logits.gather(-1, torch.tensor(giant.tokens[1:])[:, None])[:, 0]
    assert giant.tokens[0] == SMALL.bos_token_id
    assert float(best.max()) < 0.1  # the same token, or one as good up to rounding in BF16


def test_super_within_its_budget_makes_every_layer_of_a_kind_alike() -> None:
    """One timed layer stands for all of its kind only if the same tensors stay in each."""
    giant = lesson.Giant()
    kept = giant.model.store.plan.kept
    assert lesson.BUDGET < DEFAULT_BUDGET
    for letter in "M*E":
        layers = [i for i, kind in enumerate(giant.config.pattern) if kind == letter]
        names = [
            {path.split(f"layers.{i}.", 1)[1] for path in kept if f".layers.{i}." in path}
            for i in layers
        ]
        assert all(found == names[0] for found in names)
    assert not any("shared_experts" in path for path in kept)


def test_work_of_the_parts_adds_up_to_that_of_a_token(giant: lesson.Giant) -> None:
    parts = giant.parts()
    assert set(parts) == {"M", "E", "*", "head"}
    counted = giant.token()
    weights = sum(parts[letter].weights for letter in [*giant.config.pattern, "head"])
    assert weights + 2 * giant.config.hidden_size == counted.weights  # a row, and the last norm
    assert parts["head"].flops == 2 * giant.config.vocab_size * giant.config.hidden_size
    sizes = ledger.parameters(giant.config).layers
    for letter in "M*E":
        place = giant.config.pattern.index(letter)
        assert parts[letter].weights == sizes[place].active
    seconds = lesson.together("ME", parts)
    expected = parts["M"].seconds + parts["E"].seconds + parts["head"].seconds
    assert seconds == pytest.approx(expected)
    assert parts["M"].amounts[1:] == parts["M"].in_memory[1:]
    assert parts["M"].in_memory[0] == 0


def test_rates_are_of_this_machine(giant: lesson.Giant) -> None:
    made, read, flops = lesson.rates(giant)
    vector = lesson.vector_rate(giant)
    assert min(made, read, flops, vector) > 1e6
    assert all(math.isfinite(rate) for rate in (made, read, flops, vector))


def test_logits_that_are_not_finite_stop_the_giant(monkeypatch: pytest.MonkeyPatch) -> None:
    giant = lesson.Giant(SMALL, budget=17_200_000)
    head = giant.model.lm_head.register_forward_hook(lambda m, a, out: out * math.inf)
    with pytest.raises(FloatingPointError, match="not finite"):
        giant.token()
    head.remove()
    assert len(giant.tokens) == 1


def test_the_stream_is_what_the_blocks_make(shipped: Nemotron) -> None:
    tokens = torch.tensor([[5, 17, 3, 99]])
    found = lesson.stream(shipped, tokens)
    assert [step.kind for step in found] == ["", *shipped.config.pattern]
    with torch.no_grad():
        x = shipped.backbone.embed(tokens)
        y = shipped.backbone.layers[0](x)
    assert found[0].after == pytest.approx(float(x.square().mean().sqrt()))
    assert found[1].after == pytest.approx(float(y.square().mean().sqrt()))
    assert found[1].size == pytest.approx(float((y - x).square().mean().sqrt()), rel=1e-4)


def test_the_stream_grows_with_and_without_the_division() -> None:
    """What the text says: neither keeps its size, and the division makes it nine times smaller."""
    for seed in (0, 1):
        divided, plain = (
            lesson.growth(lesson.deep().replace(rescale_prenorm_residual=d), seed)
            for d in (True, False)
        )
        assert len(divided) == 89
        times = [run[-1].after / run[0].after for run in (divided, plain)]
        assert 6 < times[0] < 10
        assert 7 < times[1] / times[0] < 12
        assert divided[1].size == pytest.approx(divided[0].after, rel=0.5)
        one = lesson.typical(plain)
        assert 9 < one["M"] < 13  # the prediction says "about 11"
        assert max(one["*"], one["E"]) < 0.5
        expected = math.sqrt(1 + 40 * one["M"] ** 2 / 88)
        assert times[0] == pytest.approx(expected, rel=0.15)


def test_the_stream_of_a_wider_model_grows_more() -> None:
    times = []
    for wider in (1, 2):
        config = lesson.deep(wider)
        run = lesson.growth(config)
        assert config.hidden_size == 64 * wider
        assert config.mamba_num_heads * config.mamba_head_dim == 2 * config.hidden_size
        times.append(run[-1].after / run[0].after)
    assert times[1] / times[0] == pytest.approx(2**0.5, rel=0.15)


def test_a_learners_block_computes_with_full_size_weights(giant: lesson.Giant) -> None:
    block = answer("block")
    for number, letter in ((0, "M"), (3, "*")):
        mine = block(giant.config, letter)
        assert lesson.full_size_difference(mine, giant, number) < 0.05
        wrong = block(giant.config.replace(norm_eps=0.5), letter)
        assert lesson.full_size_difference(wrong, giant, number) > 0.1


def test_gradients_along_the_stream() -> None:
    pre, post = (
        [lesson.gradient_of_input(post_norm=p, layers=n) for n in (4, 44)] for p in (False, True)
    )
    assert pre[1] / pre[0] < 11  # as many times as many layers
    assert post[1] / post[0] > 100


def test_additions_that_bf16_loses(shipped: Nemotron) -> None:
    shares = lesson.lost_in_bf16(shipped, torch.tensor([[5, 17, 3, 99]]))
    assert len(shares) == shipped.config.num_layers
    assert all(0 <= share < 0.3 for share in shares)
    assert max(shares) > 0


def test_a_prompt_reads_more_experts_than_a_token() -> None:
    config = NemotronConfig.from_preset("super")
    assert lesson.experts_of_a_prompt(config, 1) == lesson.weights_of_a_token(config)
    many = lesson.experts_of_a_prompt(config, 10_000)
    counted = ledger.parameters(config)
    everything = counted.backbone - counted.by_part["embedding"] + 10_000 * config.hidden_size
    assert many == pytest.approx(everything, rel=1e-6)


def test_a_learners_model_reads_what_transformers_wrote(tmp_path: Path) -> None:
    theirs = lesson.write_checkpoint(tmp_path)
    shards, weight_map = read_folder(tmp_path)
    assert len(shards) > 1
    tensors, mtp = answer("checkpoint_tensors")(shards, weight_map)
    assert not mtp
    mine = answer("backbone")(lesson.TINY)
    mine.load_state_dict(tensors)
    draw = torch.Generator().manual_seed(4)
    tokens = torch.randint(lesson.TINY.vocab_size, (1, 40), generator=draw)
    tokens[0, 3] = lesson.TINY.pad_token_id  # `generate` would hide it without a mask
    with torch.no_grad():
        torch.testing.assert_close(mine(tokens)[0], theirs(tokens).logits, rtol=1e-3, atol=1e-3)
    assert mine.write(tokens, 20)[0].tolist() == lesson.greedy_text(theirs, tokens, 20)


def test_writing_a_checkpoint_changes_no_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    lesson.write_checkpoint(tmp_path)
    assert torch.equal(torch.rand(2), expected)


def test_transformers_drops_the_mtp_module(tmp_path: Path) -> None:
    save(Nemotron(lesson.TINY, seed=0), tmp_path / "ours")
    found = lesson.reopened_by_transformers(tmp_path / "ours", tmp_path / "theirs")
    assert found["mtp in the files"] > 0
    assert found["mtp written again"] == 0
    assert found["modules in config.json"] == 1


@pytest.mark.parametrize(("pattern", "notices"), [("*E", False), ("*E*E", True), ("ME*E", True)])
def test_which_patterns_notice_the_order(pattern: str, notices: bool) -> None:
    model = answer("backbone")(lesson.TINY.replace(pattern=pattern))
    model.load_state_dict(lesson.small(pattern).state_dict())
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(lesson.TINY.vocab_size, (1, 40), generator=draw)
    change = lesson.shuffled(model, tokens, draw)
    assert change > 0.05 if notices else change < 1e-4


def test_step_sizes_are_those_of_the_scan(shipped: Nemotron) -> None:
    """A limit at the smallest dt changes nothing, one at a high dt does."""
    tokens = torch.tensor([shipped.tokenizer.encode("def f(x): return x").ids])
    dt = lesson.step_sizes(shipped, tokens)
    heads = shipped.config.mamba_num_heads
    assert dt.shape == (shipped.config.pattern.count("M"), tokens.numel() * heads)
    assert not any(module._forward_hooks for module in shipped.modules())
    low = float(dt.min())
    kl, same = lesson.divergence(shipped, lesson.clamped(shipped, 0.5 * low), tokens)
    assert kl == pytest.approx(0, abs=1e-6)
    assert same == 1
    assert lesson.divergence(shipped, lesson.clamped(shipped, 1.0), tokens)[0] > 0.01


def test_infinity_is_the_same_in_every_spelling() -> None:
    strict = {}
    for program, text in lesson.spellings().items():
        assert lesson.limit_read(text) == (0.0, math.inf)
        strict[program] = lesson.is_strict_json(text)
    assert strict == {"json.dumps": False, "transformers 5": True, "Ultra's file": True}
    assert json.dumps({"time_step_limit": [0.0, math.inf]}) == lesson.spellings()["json.dumps"]


def test_calls_are_counted(shipped: Nemotron) -> None:
    x = torch.ones(3)
    assert lesson.calls(lambda: x + 1) == 1
    assert lesson.calls(lambda: (x + 1) * 2) == 2
    assert lesson.calls(lambda: (x.unsqueeze(0) + 1).view(3)) == 1  # views are not counted
    mine = answer("backbone")(shipped.config)
    mine.load_state_dict(lesson.backbone_weights(shipped))
    found = lesson.calls_of_a_token(mine, shipped, torch.tensor([[5, 17, 3]]))
    for counts in found.values():
        assert list(counts) == ["M", "E", "*", "rest", "all"]
        assert sum(counts.values()) == 2 * counts["all"]
        assert min(counts.values()) > 0
    assert found["your model"]["E"] > 0.9 * found["your model"]["all"]  # a loop over all experts
    assert not any(layer._forward_hooks for layer in mine.backbone.layers)


def test_the_record_of_the_gpu_is_of_the_first_layers() -> None:
    gpu = lesson.h200()
    pattern = NemotronConfig.from_preset("super").pattern
    assert pattern.startswith(gpu.pattern)
    assert gpu.rates[0] == math.inf
    work = dict.fromkeys([*"ME*", "head"], (0, 2 * 10**8, 10**8))
    assert answer("seconds_per_token")(gpu.pattern, work, gpu.rates) < gpu.seconds < 0.1


WORK = lesson.Work(0.25, 100, 200, 100, 400)
SHOWN: list[tuple[Callable[[], None], str]] = [
    (lambda: lesson.shown_parts({"M": WORK, "head": WORK}, {"M": 0.2, "head": 0.1}, (1e9,) * 3,
                                2e9),
     "measured and estimated: Mamba-2, head\n"),
    (lambda: lesson.shown_seconds({"one": 2.0, "other": 0.002}, "Times"), "Times: one, other\n"),
    (lambda: lesson.shown_numbers({"one": 2.0}, "Numbers"), "Numbers: one\n"),
    (lambda: lesson.shown_clamp(0.1, 1e-4, 0.9),
     "the limit in our model: share of dt, KL, first choice\n"),
    (lambda: lesson.shown_calls({"your model": {"M": 7, "all": 7}}, "M"),
     "calls of one token: your model\n"),
    (lambda: lesson.show_text("Title", "noise"), "Title\n"),
]  # fmt: skip


@pytest.mark.parametrize(("show", "plain"), SHOWN)
def test_measured_numbers_are_not_in_the_plain_text(
    show: Callable[[], None], plain: str, capsys: pytest.CaptureFixture[str]
) -> None:
    show()
    assert capsys.readouterr().out == plain


def test_the_first_token_is_shown_without_its_number(
    giant: lesson.Giant, capsys: pytest.CaptureFixture[str]
) -> None:
    lesson.shown_first_token(giant, WORK)
    assert capsys.readouterr().out == "One token went through all layers; its logits are finite.\n"


def test_what_others_measured_is_a_fact(capsys: pytest.CaptureFixture[str]) -> None:
    lesson.dt_clamp_elsewhere()
    assert "0.0337 with the limit, and 0.0032" in capsys.readouterr().out.replace("\n", " ")
