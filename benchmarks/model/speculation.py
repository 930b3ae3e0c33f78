"""What drafts of the MTP module gain: the shipped model with and without, run alternately.

    python -m benchmarks speculation                       the speed needs a quiet machine
    python -m benchmarks speculation --only acceptance     how many drafts are right: no times
    python -m benchmarks speculation --model FOLDER        another trained model
    python -m benchmarks speculation --quick               a tiny untrained model, no record

Prompts are the beginnings of files that the model has never seen, one at a time (batch 1), greedy
and at temperature 0.7 with top_p 0.95, as `nemotron-lite run` shows it. The ways of drafting:

    plain        token by token: the "plain" of every ratio
    fixed k      drafts of k tokens, always
    shortlist    drafts of 4, of the `SHORTLIST` tokens that are most frequent in the training text
    adaptive     drafts as far as they pay, by prices measured on this machine (`measure_costs`)
    poor         adaptive, with an MTP module of random weights: what drafting costs where it is
                 useless

**Acceptance** (`speculation_acceptance.json`): the acceptance length of drafts of a fixed length,
by prompt, and the share of accepted tokens by position. It depends on the model and the texts, and
not on the machine.

**Speed** (`speculation.json`): tokens per second of every way. Aims: 1.6 times plain at batch 1,
and never below 0.95 times when acceptance is poor. Greedy texts must be those of plain decoding;
prompts whose text differs (a near tie of two logits, rounded otherwise by the longer pass) are
counted in `texts_that_differ`. Beside each measured ratio stand two predictions, acceptance length
over the price of a round: with the ledger's prices, which count bytes, and with prices measured
part by part. And for going back after a draft: bytes kept for it, and the time of verifying it and
taking in what stays, with `Cache.accept` and with a copy of the whole cache (`Cache.clone`).
"""

from __future__ import annotations

import argparse
import copy
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import measure
from benchmarks.model import shipped
from benchmarks.record import write_record
from nemotron_lite import Nemotron, NemotronConfig, generate
from nemotron_lite.data import HeldOut
from nemotron_lite.generation.speculative import (
    SpeculationCosts,
    SpeculationOptions,
    Statistics,
    ledger_costs,
    shortlist,
    speedup,
)
from nemotron_lite.generation.speculative.measured_costs import costs_from_seconds, measure_seconds

AIM, FLOOR = 1.6, 0.95
TEMPERATURES, TOP_P = (0.0, 0.7), 0.95
LENGTHS, LONGEST = (1, 2, 3, 4, 6), 6
PROMPT = 96  # tokens
SHORTLIST, SHORTLISTED = 1024, 4  # tokens to draft from, and tokens of such a draft
WORKS = ("acceptance", "speed")


def beginnings(held_out: HeldOut, count: int) -> list[list[int]]:
    """The first tokens of held-out files that are twice as long."""
    long_enough = [d for d in held_out.documents if len(d) >= 2 * PROMPT]
    return [document[:PROMPT].tolist() for document in long_enough[:count]]


def fixed_ways(tokens_to_draft: tuple[int, ...]) -> dict[str, SpeculationOptions]:
    """The ways of drafting that do not depend on the machine."""
    ways = {f"fixed {k}": SpeculationOptions(draft_length=k, adaptive=False) for k in LENGTHS}
    ways["shortlist"] = SpeculationOptions(
        draft_length=SHORTLISTED, adaptive=False, shortlist=tokens_to_draft
    )
    return ways


def sampling(temperature: float) -> dict[str, Any]:
    """The options of a temperature."""
    return {"temperature": temperature, "top_p": TOP_P if temperature else None, "stop": ()}


def measure_acceptance(
    model: Nemotron, prompts: list[list[int]], tokens: int, tokens_to_draft: tuple[int, ...]
) -> list[dict[str, Any]]:
    """One entry for each temperature and way: acceptance by prompt and by position."""
    entries = []
    for temperature in TEMPERATURES:
        for name, way in fixed_ways(tokens_to_draft).items():
            told: list[Statistics] = []
            write_all(model, prompts, tokens, [], told, speculation=way, **sampling(temperature))
            whole = sum(told, Statistics())
            entry: dict[str, Any] = {
                "what": "acceptance", "way": name, "temperature": temperature,
                "acceptance_length": whole.acceptance_length,
                "by_prompt": measure.summary([each.acceptance_length for each in told]),
                "rates": whole.acceptance_rates,
                "verifications": whole.verifications,
            }  # fmt: skip
            entries.append(entry)
            spread = entry["by_prompt"]
            print(
                f"  {name} at temperature {temperature}: acceptance length "
                f"{whole.acceptance_length:.2f} (prompts: {spread['min']:.2f} to "
                f"{spread['max']:.2f}), rates "
                + " ".join(f"{rate:.2f}" for rate in whole.acceptance_rates),
                flush=True,
            )
    return entries


def measure_prices(
    model: Nemotron, rounds: int, tokens_to_draft: tuple[int, ...] | None = None
) -> tuple[dict[str, float], dict[str, SpeculationCosts]]:
    """Seconds of each part of a round, and what they cost in plain steps, counted and measured."""
    parts = measure_seconds(
        model, LONGEST, context=PROMPT, rounds=rounds, shortlist=tokens_to_draft
    )
    counted = None if tokens_to_draft is None else len(tokens_to_draft)
    return parts, {
        "ledger": ledger_costs(model.config, LONGEST, drafted_tokens=counted),
        "measured": costs_from_seconds(parts, LONGEST),
    }


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
        text, told = generate(model, prompt, tokens, seed=i, return_statistics=True, **options)
        texts.append(text)
        statistics.append(told)


def measure_decoding(
    model: Nemotron,
    prompts: list[list[int]],
    tokens: int,
    rounds: int,
    temperature: float,
    prices: dict[str, dict[str, SpeculationCosts]],
    tokens_to_draft: tuple[int, ...],
) -> list[dict[str, Any]]:
    """One entry per way of drafting, each against plain decoding in the same rounds.

    Args:
        prices: of drafts from "all tokens" and from a "shortlist", by their kind.
    """
    ways = fixed_ways(tokens_to_draft)
    ways["adaptive"] = SpeculationOptions(
        draft_length=LONGEST, costs=prices["all tokens"]["measured"]
    )
    models = dict.fromkeys(ways, model) | {"poor": poor(model)}
    ways["poor"] = ways["adaptive"]
    options = sampling(temperature)
    told: dict[str, list[Statistics]] = {name: [] for name in ("plain", *ways)}
    texts: dict[str, list[list[int]]] = {name: [] for name in ("plain", *ways)}
    calls: dict[str, Any] = {
        "plain": partial(
            write_all, model, prompts, tokens, texts["plain"], told["plain"], **options
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
            **options,
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
        for kind, price in prices["shortlist" if name == "shortlist" else "all tokens"].items():
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
    """Measure, and write `speculation_acceptance.json` and `speculation.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks speculation", allow_abbrev=False)
    parser.add_argument("--only", default=",".join(WORKS), help="acceptance, speed or both")
    parser.add_argument("--model", type=Path, help="a trained checkpoint folder")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128, help="generated after each prompt")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="a trial: tiny, no record")
    asked = parser.parse_args(arguments)
    works = asked.only.split(",")
    if not set(works) <= set(WORKS):
        parser.error(f"--only {asked.only}: expected acceptance, speed or both.")
    if asked.quick:
        config = NemotronConfig.from_preset(
            "lite", pattern="ME*E", vocab_size=128, hidden_size=32, mtp_pattern="*E"
        )
        model, prompts = Nemotron(config, seed=0).eval(), [[1, 2, 3], [4, 5]]
        drafted, tokens, rounds, trials, about = tuple(range(64)), 8, 2, 3, {}
    else:
        trained = shipped.open_trained(asked.model)
        model, about = trained.model, trained.about
        prompts = beginnings(trained.data.held_out, asked.prompts)
        tokens, rounds, trials = asked.tokens, asked.rounds, 40
        drafted = shortlist([trained.data.train.tokens.tolist()], SHORTLIST)
    texts = {
        **about, "prompts": len(prompts), "prompt_tokens": PROMPT, "new_tokens": tokens,
        "top_p": TOP_P, "shortlist": len(drafted),
    }  # fmt: skip
    if "acceptance" in works:
        payload = {
            "path": "`generate` with speculation, one prompt at a time",
            **texts,
            "results": measure_acceptance(model, prompts, tokens, drafted),
        }  # fmt: skip
        if not asked.quick:
            print(write_record("speculation_acceptance", payload))
    if "speed" not in works:
        return
    parts, prices = {}, {}
    for name, short in (("all tokens", None), ("shortlist", drafted)):
        parts[name], prices[name] = measure_prices(model, trials, short)
        print(f"  prices in plain steps, {name}: {prices[name]}", flush=True)
    results = measure_rollback(model, trials)
    for temperature in TEMPERATURES:
        results += measure_decoding(model, prompts, tokens, rounds, temperature, prices, drafted)
    if not asked.quick:
        payload = {
            "path": "`generate` for every text, with and without speculation",
            **texts,
            "step_seconds": parts,
            "prices": {
                name: {kind: vars(price) for kind, price in found.items()}
                for name, found in prices.items()
            },
            "aims": {"drafting": AIM, "poor drafts": FLOOR},
            "results": results,
        }  # fmt: skip
        print(write_record("speculation", payload))


if __name__ == "__main__":
    main()
