"""The whole model against transformers' NemotronH: prefill, decode, training, memory, bfloat16.

    python -m benchmarks model_speed --size S --only prefill,decode --quick

Both programs hold the same weights in one process and take turns (`peers`, `measure`); they must
agree on logits before anything is timed. What is asked of us, in float32 on two cores:

    prefill   1.3 times transformers at 512 tokens, 1.4 at 2K, 1.6 at 8K, 2.5 at 32K
    decode    2 times at batch 1, 1.5 times at batch 8; cost per token that hardly grows
    training  1.5 times (batch 4, length 512), with at most 70 % of its peak memory
    bfloat16  1.7 times our own float32 prefill, with no loss of quality

Quality in bfloat16 has two readings. On the random model, whose routing is a coin toss where scores
nearly tie, the share of tokens whose first choice stays and the divergence from the float32 logits,
beside the same figures for transformers in bfloat16. On a small model trained for a minute, what
counts: bits per byte of held-out text in both precisions.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure, memory, peers
from benchmarks.record import write_record

PREFILL_AIMS = {512: 1.3, 2048: 1.4, 8192: 1.6, 32768: 2.5}
DECODE_AIMS = {1: 2.0, 8: 1.5}
TRAIN_AIM, TRAIN_MEMORY_AIM, BF16_AIM = 1.5, 0.7, 1.7
WORKS = ("prefill", "decode", "train", "memory", "bf16", "quality")


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    prefill: dict[int, int]  # length: rounds
    decode: tuple[tuple[int, int], ...]  # (batch, context)
    decode_rounds: int
    decode_steps: int  # tokens of each row per round
    train: tuple[int, int]  # batch, length
    train_rounds: int
    memory_length: int
    bf16: dict[int, int]  # length: rounds
    quality_seconds: float  # of training the small model; 0 leaves it out


FULL = Plan(
    prefill={512: 9, 2048: 7, 8192: 3, 32768: 2},
    decode=((1, 512), (8, 512), (1, 4096), (8, 4096)), decode_rounds=9, decode_steps=8,
    train=(4, 512), train_rounds=5, memory_length=8192, bf16={512: 7, 2048: 5, 8192: 3},
    quality_seconds=60.0,
)  # fmt: skip
QUICK = Plan(
    prefill={64: 2, 160: 2}, decode=((1, 64), (2, 64)), decode_rounds=2, decode_steps=2,
    train=(2, 64), train_rounds=2, memory_length=256, bf16={64: 2}, quality_seconds=0.0,
)  # fmt: skip


def measure_prefill(ours: nn.Module, peer: nn.Module, plan: Plan) -> Iterator[dict[str, Any]]:
    """Read prompts of growing length; logits of the last token, and a memory to go on from."""
    for length, rounds in plan.prefill.items():
        tokens = peers.random_tokens(ours.config, 1, length)
        seconds = measure.alternate(
            {
                "ours": lambda tokens=tokens: peers.prefill("ours", ours, tokens),
                "peer": lambda tokens=tokens: peers.prefill("peer", peer, tokens),
            },
            rounds,
            warmup=1 if length <= 8192 else 0,  # the lengths before have warmed everything up
        )
        aim = PREFILL_AIMS.get(length)
        yield measure.compare("prefill", seconds, tokens=length, aim=aim, length=length)


def measure_decode(ours: nn.Module, peer: nn.Module, plan: Plan) -> Iterator[dict[str, Any]]:
    """One token after another behind a context. Rows share the context and differ after it."""
    for batch, context in plan.decode:
        prompt = peers.random_tokens(ours.config, 1, context)
        inputs = peers.random_tokens(ours.config, batch, plan.decode_steps, seed=2)
        models = {"ours": ours, "peer": peer}
        calls = {}
        for who, model in models.items():
            kept = peers.widen(who, peers.prefill(who, model, prompt)[1], batch)
            calls[who] = lambda who=who, model=model, kept=kept: peers.decode(
                who, model, kept, inputs
            )
        seconds = measure.alternate(calls, plan.decode_rounds)
        yield measure.compare(
            "decode", seconds, tokens=batch * plan.decode_steps, aim=DECODE_AIMS.get(batch),
            batch=batch, context=context,
        )  # fmt: skip


def measure_train(ours: nn.Module, peer: nn.Module, plan: Plan) -> Iterator[dict[str, Any]]:
    """Forward, backward and AdamW, on copies: the models of the other measurements stay as is."""
    batch, length = plan.train
    tokens = peers.random_tokens(ours.config, batch, length)
    mine, theirs = copy.deepcopy(ours).train(), copy.deepcopy(peer).train()
    steps = {
        "ours": (peers.train_step_ours, mine, peers.new_optimizer(mine)),
        "peer": (peers.train_step_peer, theirs, peers.new_optimizer(theirs)),
    }
    losses: dict[str, list[float]] = {"ours": [], "peer": []}

    def step(who: str) -> None:
        run, model, optimizer = steps[who]
        losses[who].append(run(model, optimizer, tokens))

    seconds = measure.alternate(
        {who: lambda who=who: step(who) for who in steps}, plan.train_rounds
    )
    if abs(losses["ours"][0] - losses["peer"][0]) > 1e-3:
        raise RuntimeError(
            f"the first losses are {losses['ours'][0]:.4f} and {losses['peer'][0]:.4f}: the two "
            "programs do not train on the same thing."
        )
    entry = measure.compare(
        "train", seconds, tokens=batch * length, aim=TRAIN_AIM, batch=batch, length=length
    )
    yield entry | {"first_loss": {who: values[0] for who, values in losses.items()}}


def measure_memory(size: str, plan: Plan) -> Iterator[dict[str, Any]]:
    """Peak bytes above the model, each program in its own process."""
    for work, length in (("train", plan.train[1]), ("prefill", plan.memory_length)):
        peaks = {who: memory.peak(who, work, size, length) for who in ("ours", "peer")}
        entry: dict[str, Any] = {"what": f"{work} memory", "length": length, "bytes": peaks}
        if peaks["ours"] is not None and peaks["peer"]:
            entry["share_of_peer"] = peaks["ours"] / peaks["peer"]
            if work == "train":
                entry["aim"] = TRAIN_MEMORY_AIM
                entry["reached"] = entry["share_of_peer"] <= TRAIN_MEMORY_AIM
        yield entry


def measure_bf16(ours: nn.Module, peer: nn.Module, plan: Plan) -> Iterator[dict[str, Any]]:
    """Prefill in bfloat16 against our float32, and against transformers in bfloat16."""
    narrow, peer_narrow = peers.in_bfloat16(ours), peers.in_bfloat16(peer)
    for length, rounds in plan.bf16.items():
        tokens = peers.random_tokens(ours.config, 1, length)
        seconds = measure.alternate(
            {
                "ours": lambda tokens=tokens: peers.prefill("ours", narrow, tokens),
                "ours in float32": lambda tokens=tokens: peers.prefill("ours", ours, tokens),
                "peer": lambda tokens=tokens: peers.prefill("peer", peer_narrow, tokens),
            },
            rounds,
        )
        labels: dict[str, Any] = {"tokens": length, "length": length}
        yield measure.compare("bf16", seconds, over="ours in float32", aim=BF16_AIM, **labels)
        yield measure.compare("bf16 against the peer's", seconds, over="peer", **labels)
    tokens = peers.random_tokens(ours.config, 1, 512)
    with torch.inference_mode():
        exact = ours(tokens).logits
        yield {
            "what": "bf16 agreement with float32 on the random model",
            "ours": agreement(exact, narrow(tokens).logits),
            "peer": agreement(exact, peer_narrow(tokens, use_cache=True).logits),
        }


def agreement(exact: Tensor, other: Tensor) -> dict[str, float]:
    """How far logits `b t v` are from exact ones: mean KL in nats, share of equal first choices."""
    p, q = (F.log_softmax(logits.double(), -1).flatten(0, 1) for logits in (exact, other))
    return {
        "mean_kl": F.kl_div(q, p, log_target=True, reduction="batchmean").item(),
        "same_first_choice": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
    }


def measure_quality(seconds: float) -> dict[str, Any]:
    """Bits per byte of held-out text, of the lite model trained briefly, in both precisions."""
    from nemotron_lite.data import prepare
    from nemotron_lite.train.evaluate import bits_per_byte

    data = prepare()
    model = train_briefly(data, seconds).eval()
    exact = bits_per_byte(model, data.held_out)
    rounded = bits_per_byte(model.to(torch.bfloat16), data.held_out)
    return {
        "what": "bf16 quality",
        "model": f"lite, trained for {seconds:.0f} seconds",
        "bits_per_byte": {"float32": exact, "bfloat16": rounded},
        "relative_loss": rounded / exact - 1,
    }


def run(sizes: list[str], works: list[str], plan: Plan) -> dict[str, Any]:
    """Measure, saying each result as it comes; the payload of the record."""
    payload: dict[str, Any] = {"threads": torch.get_num_threads(), "sizes": {}}
    for size in sizes:
        ours, peer = peers.build_pair(size)
        found: dict[str, Any] = {
            "parameters": ours.num_parameters(),
            "largest_logit_difference": peers.check_same_model(ours, peer),
            "router": peers.router_spread(ours),
            "measurements": [],
        }
        print(f"{size}: {found['parameters']:,} parameters, logits agree to "
              f"{found['largest_logit_difference']:.1e}", flush=True)  # fmt: skip
        parts = {
            "prefill": lambda: measure_prefill(ours, peer, plan),
            "decode": lambda: measure_decode(ours, peer, plan),
            "train": lambda: measure_train(ours, peer, plan),
            "memory": lambda: measure_memory(size, plan),
            "bf16": lambda: measure_bf16(ours, peer, plan),
        }
        for work in works:
            for entry in parts[work]() if work in parts else ():
                found["measurements"].append(entry)
                text = measure.describe(entry) if "times_faster" in entry else str(entry)
                print(f"  {text}", flush=True)
        payload["sizes"][size] = found
    if "quality" in works and plan.quality_seconds:
        payload["quality"] = measure_quality(plan.quality_seconds)
        print(f"  {payload['quality']}", flush=True)
    return payload


def main(arguments: list[str] | None = None) -> None:
    """Measure what is asked for and write `benchmarks/records/model_speed.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks model_speed")
    parser.add_argument("--size", default="S,M", help="S, M or both")
    parser.add_argument("--only", default=",".join(WORKS), help="parts, separated by commas")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work at all?")
    asked = parser.parse_args(arguments)
    sizes = ["tiny"] if asked.quick else asked.size.split(",")
    works = asked.only.split(",")
    for value, known in [(s, peers.SIZES) for s in sizes] + [(w, WORKS) for w in works]:
        if value not in known:
            parser.error(f"{value!r} is not one of {', '.join(known)}")
    payload = run(sizes, works, QUICK if asked.quick else FULL)
    print(write_record("model_speed-quick" if asked.quick else "model_speed", payload))


if __name__ == "__main__":
    main()
