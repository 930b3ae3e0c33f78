"""Speculative decoding with the MTP module beside plain decoding, run alternately.

    python -m benchmarks speculation                    trains for ten minutes first, then measures
    python -m benchmarks speculation --model lite       a model that is there already
    python -m benchmarks speculation --quick            a tiny untrained model, no record

The model is the `lite` preset, trained on Python's standard library and kept in runs/. Most of the
training time goes to the whole model. Then the backbone is frozen and continues pieces of its
training text, and the MTP module alone is trained on that text (train/healing.py), with the
backbone's own distributions as the target (train/distillation.py). All steps together take the
given seconds. Drafts use only the `SHORTLIST` tokens that are most frequent in the backbone's text.
Prompts are the beginnings of held-out files, one at a time (batch 1). For greedy and for sampled
decoding:

    plain       token by token: the "plain" of every ratio
    fixed k     drafts of k tokens, always
    adaptive    drafts as far as they pay, by prices measured on this machine (`measure_costs`)
    poor        adaptive, with an MTP module of random weights: what drafting costs where it is
                useless

Aims: 1.6 times plain at batch 1, and never below 0.95 times when acceptance is poor. Greedy
texts must be those of plain decoding; prompts whose text differs (a near tie of two logits, rounded
otherwise by the longer pass) are counted in `texts_that_differ`.

Beside each measured ratio stand two predictions, acceptance length over the price of a round: with
the ledger's prices, which count bytes, and with prices measured part by part. And for going back
after a draft: bytes kept for it, and the time of verifying it and taking in what stays, with
`Cache.accept` and with a copy of the whole cache (`Cache.clone`).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import measure
from benchmarks.record import write_record
from nemotron_lite import Nemotron, NemotronConfig, generate, load, save
from nemotron_lite.data import END_OF_TEXT_ID, prepare
from nemotron_lite.generation.speculative import (
    SpeculationCosts,
    SpeculationOptions,
    Statistics,
    ledger_costs,
    shortlist,
    speedup,
)
from nemotron_lite.generation.speculative.measured_costs import costs_from_seconds, measure_seconds
from nemotron_lite.train import Continuations, TrainConfig, evaluate, heal, train
from nemotron_lite.train.healing import GENERATION_BATCH_SIZE, generate_continuations

RUNS = measure.ROOT / "runs"
AIM, FLOOR = 1.6, 0.95
LENGTHS, LONGEST = (1, 2, 3, 4, 6), 6
PROMPT = 96  # tokens of a prompt that is measured
LEAD, WRITTEN = 32, 224  # of a piece of training text, and of what the backbone adds to it
BACKBONE, WRITING = 0.6, 0.1  # shares of the time; the rest heals
SHORTLIST = 1024  # tokens of 4,096 that drafts are made of


@dataclass
class Trained:
    """A model, what drafts are made of, prompts, and how it came about."""

    model: Nemotron
    shortlist: tuple[int, ...]
    prompts: list[list[int]]
    story: dict[str, Any]


def trained_model(seconds: float, prompts: int) -> Trained:
    """The `lite` model, trained once and stored in runs/."""
    data = prepare()
    config = NemotronConfig.from_preset(
        "lite", bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID
    )
    digest = measure.model_digest(config, data.tokenizer)
    folder, judges = RUNS / f"speculation-{seconds:.0f}-{digest}", _beginnings(data, prompts)
    if not (folder / "story.json").is_file():
        model = Nemotron(config, seed=0)
        began = time.perf_counter()
        whole = train(model, data, TrainConfig(max_seconds=BACKBONE * seconds, bias_rate=0.02))
        written = own_text(model, data, until=began + (BACKBONE + WRITING) * seconds)
        wrote = time.perf_counter() - began - whole.seconds
        how = TrainConfig(
            max_seconds=max(1.0, seconds - whole.seconds - wrote),
            seq_len=LEAD + WRITTEN,
            mtp_weight=1.0,
            mtp_target="backbone",
        )
        # Judging is not training, and stands outside the time: other held-out files than those
        # that are measured later.
        others = _beginnings(data, prompts + 6)[prompts:] or judges
        healed = heal(model, written, how, eval_prompts=others, eval_tokens=64)
        texts = [row[LEAD:] for row in written.tokens.tolist()]
        story = {
            "threads": torch.get_num_threads(),
            "backbone": {"seconds": whole.seconds, "steps": whole.step, "tokens": whole.tokens},
            "writing": {"seconds": wrote, "tokens": healed.generated_tokens},
            "healing": {"seconds": healed.result.seconds, "steps": healed.result.step},
            "acceptance_length_before_healing": healed.before.acceptance_length,
            "acceptance_length_after_healing": healed.after.acceptance_length,
            "acceptance_rates_before_healing": healed.before.acceptance_rates,
            "acceptance_rates_after_healing": healed.after.acceptance_rates,
            "held_out_bits_per_byte": evaluate(model.eval(), data.held_out).bits_per_byte,
            "shortlist": list(shortlist(texts, SHORTLIST)),
        }
        save(model, folder / "model", data.tokenizer)
        (folder / "story.json").write_text(json.dumps(story))
    story = json.loads((folder / "story.json").read_text())
    tokens = tuple(story.pop("shortlist"))
    return Trained(load(folder / "model"), tokens, judges, story)


def own_text(model: Nemotron, data: Any, until: float) -> Continuations:
    """The backbone's continuations of training text, half greedy and half sampled.

    As many rounds as fit before the time `until`; at least one.
    """
    model.eval()
    prompts: list[list[int]] = []
    texts: list[list[int]] = []
    while not prompts or time.perf_counter() < until:
        pieces = data.batch(
            len(prompts), batch_size=2 * GENERATION_BATCH_SIZE, seq_len=LEAD, seed=2
        ).tokens.tolist()
        for part, temperature in (
            (pieces[:GENERATION_BATCH_SIZE], 0.0),
            (pieces[GENERATION_BATCH_SIZE:], 0.7),
        ):
            made = generate_continuations(
                model, part, WRITTEN, temperature=temperature, seed=len(prompts)
            )
            prompts += part
            texts += made.tokens[:, LEAD:].tolist()
    return Continuations(prompts, texts)


def _beginnings(data: Any, count: int) -> list[list[int]]:
    long_enough = [d for d in data.held_out.documents if len(d) >= 2 * PROMPT]
    return [d[:PROMPT].tolist() for d in long_enough[:count]]


def poor(model: Nemotron) -> Nemotron:
    """The same backbone with an MTP module of random weights."""
    fresh = copy.deepcopy(model)
    assert fresh.mtp is not None
    other = Nemotron(model.config, seed=7)
    assert other.mtp is not None
    fresh.mtp.load_state_dict(other.mtp.state_dict())
    return fresh.eval()


def write_all(
    model: Nemotron,
    prompts: list[list[int]],
    tokens: int,
    texts: list[list[int]],
    statistics: list[Statistics],
    **options: Any,
) -> None:
    """Continue the prompts one after another; `texts` becomes what was written."""
    texts.clear()
    for i, prompt in enumerate(prompts):
        text, told = generate(
            model, prompt, tokens, seed=i, stop=(), return_statistics=True, **options
        )
        texts.append(text)
        statistics.append(told)


def measure_decoding(
    model: Nemotron,
    prompts: list[list[int]],
    tokens: int,
    rounds: int,
    temperature: float,
    prices: dict[str, SpeculationCosts],
    tokens_to_draft: tuple[int, ...] | None = None,
) -> list[dict[str, Any]]:
    """One entry per way of drafting, each against plain decoding in the same rounds."""
    ways = {
        f"fixed {k}": SpeculationOptions(draft_length=k, adaptive=False, shortlist=tokens_to_draft)
        for k in LENGTHS
    }
    ways["adaptive"] = SpeculationOptions(
        draft_length=LONGEST, costs=prices["measured"], shortlist=tokens_to_draft
    )
    models = dict.fromkeys(ways, model) | {"poor": poor(model)}
    ways["poor"] = ways["adaptive"]
    sampling: dict[str, Any] = dict(temperature=temperature, top_p=0.95 if temperature else None)
    told: dict[str, list[Statistics]] = {name: [] for name in ("plain", *ways)}
    texts: dict[str, list[list[int]]] = {name: [] for name in ("plain", *ways)}
    calls: dict[str, Any] = {
        "plain": partial(
            write_all, model, prompts, tokens, texts["plain"], told["plain"], **sampling
        )
    }
    for name, way in ways.items():
        calls[name] = partial(
            write_all,
            models[name],
            prompts,
            tokens,
            texts[name],
            told[name],
            speculation=way,
            **sampling,
        )
    seconds = measure.alternate(calls, rounds)
    entries = []
    for name in ways:
        statistics = sum(told[name], Statistics())
        entry = measure.compare(
            "decode",
            {"ours": seconds[name], "plain": seconds["plain"]},
            over="plain",
            tokens=len(prompts) * tokens,
            aim=FLOOR if name == "poor" else AIM,
            way=name,
            temperature=temperature,
        )
        # Every round of measurement wrote the same texts; the counts are those of all rounds.
        entry |= {"statistics": statistics.to_dict(), "predicted_times_faster": {}}
        for kind, price in prices.items():
            entry["predicted_times_faster"][kind] = predicted(statistics, price)
        if not temperature:
            pairs = zip(texts["plain"], texts[name], strict=True)
            entry["texts_that_differ"] = sum(a != b for a, b in pairs)
        entries.append(entry)
        print(f"  {describe(entry)}", flush=True)
    return entries


def predicted(statistics: Statistics, price: SpeculationCosts) -> float:
    """Tokens over plain steps paid; passes without a draft cost one."""
    rounds, plain = statistics.verifications, statistics.plain
    if not rounds:
        return 1.0
    drafted = speedup(statistics.acceptance_length, statistics.drafted / rounds, price)
    tokens = statistics.verified_tokens
    return (tokens + plain) / (tokens / drafted + plain)


def measure_rollback(model: Nemotron, rounds: int) -> list[dict[str, Any]]:
    """Bytes and seconds of going back after a draft of four tokens, of which the first stays."""
    found = []
    for way, measured in (("accept", verify_and_accept), ("clone", verify_and_clone)):
        bytes_kept, state_bytes, ratio = measured(model, rounds)
        entry = {
            "what": "rollback", "way": way, "draft_length": 4,
            "bytes_kept": bytes_kept, "state_bytes": state_bytes,
            "verify_and_keep_over_a_plain_step": ratio,
        }  # fmt: skip
        found.append(entry)
        print(f"  {entry}", flush=True)
    return found


def verify_and_accept(model: Nemotron, rounds: int) -> tuple[int, int, float]:
    """With `Cache.accept`: bytes kept, bytes of the cache, time in plain steps."""
    parts = measure_seconds(model, 4, rounds=rounds)
    cache = model.empty_cache(1)
    model(model.lm_head.weight.new_zeros(1, 5).long(), cache, draft=True)
    return cache.draft_nbytes, cache.nbytes, parts["verify_all"] / parts["step"]


@torch.inference_mode()
def verify_and_clone(model: Nemotron, rounds: int) -> tuple[int, int, float]:
    """The same with a copy: read the draft, return to the copy, read the token that stays."""
    tokens = model.lm_head.weight.new_zeros(1, 128).long()
    before = model.empty_cache(1, capacity=128 + 8 * 4)
    model(tokens, before)
    seconds: dict[str, list[float]] = {"step": [], "verify": []}
    for turn in range(rounds + 2):
        cache = before.clone()
        started = time.perf_counter()
        model(tokens[:, :1], cache).logits.argmax(-1).tolist()
        stepped = time.perf_counter() - started
        cache = before.clone()
        started = time.perf_counter()
        kept = cache.clone()
        model(tokens[:, :5], cache).logits.argmax(-1).tolist()
        model(tokens[:, :1], kept)
        verified = time.perf_counter() - started
        if turn > 1:  # the first two warm up
            seconds["step"].append(stepped)
            seconds["verify"].append(verified)
    ratio = median(seconds["verify"]) / median(seconds["step"])
    return before.nbytes, before.nbytes, ratio


def describe(entry: dict[str, Any]) -> str:
    """One line of the table: predicted and measured."""
    ratio, told = entry["times_faster"], entry["statistics"]
    predicted = ", ".join(f"{k} {v:.2f}" for k, v in entry["predicted_times_faster"].items())
    return (
        f"{entry['way']:>9} at temperature {entry['temperature']}: {ratio['median']:.2f} times "
        f"plain ({ratio['min']:.2f}-{ratio['max']:.2f}), predicted {predicted}; "
        f"{entry['tokens_per_second']['ours']:,.0f} tokens/s, acceptance length "
        f"{told['acceptance_length']:.2f}, mean draft {told['mean_draft']:.2f}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Train or load, measure, write `speculation.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks speculation", allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=600.0, help="of training")
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=192, help="generated after each prompt")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="a trial: tiny, no record")
    asked = parser.parse_args(arguments)
    story: dict[str, Any] | None = None
    drafted: tuple[int, ...] | None = None
    if asked.quick:
        config = NemotronConfig.from_preset(
            "lite", pattern="ME*E", vocab_size=128, hidden_size=32, mtp_pattern="*E"
        )
        model, prompts = Nemotron(config, seed=0).eval(), [[1, 2, 3], [4, 5]]
        drafted, asked.tokens, asked.rounds = tuple(range(64)), 8, 2
    elif asked.model:
        model = load(asked.model)
        prompts = _beginnings(prepare(vocab_size=model.config.vocab_size), asked.prompts)
    else:
        trained = trained_model(asked.seconds, asked.prompts)
        model, drafted, prompts = trained.model, trained.shortlist, trained.prompts
        story = trained.story
        print(f"  {story}", flush=True)
    parts = measure_seconds(
        model, LONGEST, context=PROMPT, rounds=3 if asked.quick else 40, shortlist=drafted
    )
    counted = None if drafted is None else len(drafted)
    prices = {
        "ledger": ledger_costs(model.config, LONGEST, drafted_tokens=counted),
        "measured": costs_from_seconds(parts, LONGEST),
    }
    print(f"  prices in plain steps: {prices}", flush=True)
    results = measure_rollback(model, 3 if asked.quick else 40)
    for temperature in (0.0, 0.7):
        results += measure_decoding(
            model, prompts, asked.tokens, asked.rounds, temperature, prices, drafted
        )
    if not asked.quick:
        payload = {
            "model": "lite" if not asked.model else asked.model.name,
            "parameters": model.num_parameters(),
            "path": "`generate` for every text, with and without speculation",
            "training": story,
            "shortlist": counted,
            "prompts": len(prompts), "prompt_tokens": PROMPT, "new_tokens": asked.tokens,
            "step_seconds": parts,
            "prices": {kind: vars(price) for kind, price in prices.items()},
            "aims": {"drafting": AIM, "poor drafts": FLOOR},
            "results": results,
        }  # fmt: skip
        print(write_record("speculation", payload))


if __name__ == "__main__":
    main()
