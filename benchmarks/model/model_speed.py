"""The whole model against transformers' NemotronH: prefill, decode, training, memory, bfloat16.

    python -m benchmarks model_speed --size S --only prefill,decode --quick

Both programs have the same weights in one process and run alternately (`peers`, `measure`). They
must agree on logits before anything is timed. The aims, in float32 on two cores:

    prefill   1.3 times transformers at 512 tokens, 1.4 at 2K, 1.6 at 8K, 2.5 at 32K
    decode    2 times at batch 1, 1.5 times at batch 8, almost independent of the context
    training  1.5 times (batch 4, length 512), with at most 70 % of its peak memory
    bfloat16  1.7 times our own float32 prefill without loss of quality, on a processor where one
              matrix product gains as much ("bf16 bare product"); 1.7 times the prefill aims above
              when compared with transformers in float32

Quality in bfloat16 is measured in two ways. On the random model: the share of tokens whose most
likely next token stays the same, and the divergence from the float32 logits; both also for
transformers in bfloat16. (Its routing changes where two scores are almost equal.) On the shipped
model: bits per byte of held-out text in both precisions.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.model import memory, peers, shipped
from benchmarks.record import processor, write_record
from nemotron_lite import Nemotron, NemotronConfig
from nemotron_lite.ops.linear import linear
from nemotron_lite.train import evaluate

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
    quality: bool = True  # whether the shipped model is scored
    aims: bool = True  # the aims are meant for sizes S and M

    def aim(self, ratio: float | None) -> float | None:
        """The required ratio, if this plan has aims."""
        return ratio if self.aims else None


FULL = Plan(
    prefill={512: 9, 2048: 7, 8192: 3, 32768: 2},
    decode=((1, 512), (8, 512), (1, 4096), (8, 4096)), decode_rounds=9, decode_steps=8,
    train=(4, 512), train_rounds=5, memory_length=8192, bf16={512: 7, 2048: 5, 8192: 3},
)  # fmt: skip
QUICK = Plan(
    prefill={64: 2, 160: 2}, decode=((1, 64), (8, 64)), decode_rounds=2, decode_steps=2,
    train=(2, 64), train_rounds=2, memory_length=256, bf16={64: 2}, quality=False,
    aims=False,
)  # fmt: skip


def measure_prefill(ours: Nemotron, peer: nn.Module, plan: Plan) -> Iterator[dict[str, Any]]:
    """Read prompts of growing length: logits of the last token, and a cache."""
    for length, rounds in plan.prefill.items():
        tokens = peers.random_tokens(ours.config, 1, length)
        seconds = measure.alternate(
            {
                "ours": partial(peers.prefill, "ours", ours, tokens),
                "peer": partial(peers.prefill, "peer", peer, tokens),
            },
            rounds,
            warmup=1 if length <= 8192 else 0,  # the shorter lengths were a warm-up
        )
        aim = plan.aim(PREFILL_AIMS.get(length))
        yield measure.compare("prefill", seconds, tokens=length, aim=aim, length=length)


def measure_decode(ours: Nemotron, peer: nn.Module, plan: Plan) -> Iterator[dict[str, Any]]:
    """One token after another after a context. Rows share the context and differ after it."""
    peers.prepare_as_generate_does(ours)
    for batch, context in plan.decode:
        prompt = peers.random_tokens(ours.config, 1, context)
        inputs = peers.random_tokens(ours.config, batch, plan.decode_steps, seed=2)
        calls = {}
        for who, model in (("ours", ours), ("peer", peer)):
            cache = peers.widen(who, peers.prefill(who, model, prompt)[1], batch)
            calls[who] = partial(peers.decode, who, model, cache, inputs)
        seconds = measure.alternate(calls, plan.decode_rounds)
        yield measure.compare(
            "decode",
            seconds,
            tokens=batch * plan.decode_steps,
            aim=plan.aim(DECODE_AIMS[batch]),
            batch=batch,
            context=context,
        )


def measure_train(ours: Nemotron, peer: nn.Module, plan: Plan) -> Iterator[dict[str, Any]]:
    """Forward, backward and AdamW, on copies: the other measurements need the models unchanged."""
    batch, length = plan.train
    tokens = peers.random_tokens(ours.config, batch, length)
    mine, theirs = copy.deepcopy(ours).train(), copy.deepcopy(peer).train()
    steps: dict[str, tuple[Callable[..., float], nn.Module, torch.optim.Optimizer]] = {
        "ours": (peers.train_step_ours, mine, peers.new_optimizer(mine)),
        "peer": (peers.train_step_peer, theirs, peers.new_optimizer(theirs)),
    }
    losses: dict[str, list[float]] = {"ours": [], "peer": []}

    def step(who: str) -> None:
        run, model, optimizer = steps[who]
        losses[who].append(run(model, optimizer, tokens))

    seconds = measure.alternate({who: partial(step, who) for who in steps}, plan.train_rounds)
    if abs(losses["ours"][0] - losses["peer"][0]) > 1e-3:
        raise RuntimeError(
            f"the first losses are {losses['ours'][0]:.4f} and {losses['peer'][0]:.4f}, expected "
            "a difference of at most 1e-3: the two programs do not train on the same task."
        )
    entry = measure.compare(
        "train", seconds, tokens=batch * length, aim=plan.aim(TRAIN_AIM), batch=batch, length=length
    )
    yield entry | {"first_loss": {who: values[0] for who, values in losses.items()}}


def measure_memory(size: str, plan: Plan) -> Iterator[dict[str, Any]]:
    """Peak memory above the model in bytes, each program in its own process."""
    for work, length in (("train", plan.train[1]), ("prefill", plan.memory_length)):
        peaks = {who: memory.peak(who, work, size, length) for who in ("ours", "peer")}
        entry: dict[str, Any] = {"what": f"{work} memory", "length": length, "bytes": peaks}
        if peaks["ours"] is not None and peaks["peer"]:
            entry["share_of_peer"] = peaks["ours"] / peaks["peer"]
            if work == "train" and plan.aims:
                entry["aim"] = TRAIN_MEMORY_AIM
                entry["reached"] = entry["share_of_peer"] <= TRAIN_MEMORY_AIM
        yield entry


def measure_bf16(ours: Nemotron, peer: nn.Module, plan: Plan) -> Iterator[dict[str, Any]]:
    """Prefill in bfloat16 against our float32, and against transformers in both precisions."""
    yield measure_products(ours.config)
    narrow, peer_narrow = peers.in_bfloat16(ours), peers.in_bfloat16(peer)
    for length, rounds in plan.bf16.items():
        tokens = peers.random_tokens(ours.config, 1, length)
        seconds = measure.alternate(
            {
                "ours": partial(peers.prefill, "ours", narrow, tokens),
                "ours in float32": partial(peers.prefill, "ours", ours, tokens),
                "peer": partial(peers.prefill, "peer", peer_narrow, tokens),
                "peer in float32": partial(peers.prefill, "peer", peer, tokens),
            },
            rounds,
        )
        yield measure.compare(
            "bf16",
            seconds,
            over="ours in float32",
            tokens=length,
            aim=plan.aim(BF16_AIM),
            length=length,
        )
        yield measure.compare("bf16 against the peer's", seconds, tokens=length, length=length)
        together = plan.aim(BF16_AIM * PREFILL_AIMS.get(length, 1.0))
        yield measure.compare(
            "bf16 against the peer's float32",
            seconds,
            over="peer in float32",
            tokens=length,
            aim=together,
            length=length,
        )
    tokens = peers.random_tokens(ours.config, 1, 512)
    with torch.inference_mode():
        exact = ours(tokens).logits
        yield {
            "what": "bf16 agreement with float32 on the random model",
            "ours": agreement(exact, narrow(tokens).logits),
            "peer": agreement(exact, peer_narrow(tokens, use_cache=True).logits),
        }


def measure_products(config: NemotronConfig, rows: int = 1024) -> dict[str, Any]:
    """How much faster bfloat16 makes one matrix product of this model's size on this processor.

    It is compared with the float32 product of our layers (`ops.linear`, which uses oneDNN where
    that is faster) and with torch's, which transformers' layers use. A model cannot gain more than
    its products do, so read the aim for bfloat16 together with this figure.
    """
    shape = (config.hidden_size, config.mamba_in_proj_size)
    wide = torch.randn(rows, shape[0]), torch.randn(shape[1], shape[0])
    narrow = [part.bfloat16() for part in wide]
    calls = {
        "ours": partial(linear, *narrow),
        "float32": partial(linear, *wide),
        "torch float32": partial(F.linear, *wide),
    }
    with torch.inference_mode():
        seconds = measure.alternate(calls, 31, warmup=3)
    entry = measure.compare(
        "bf16 bare product", seconds, tokens=rows, over="float32", shape=[rows, *shape]
    )
    flops = 2 * rows * shape[0] * shape[1] / 1e9
    entry["gflops_per_second"] = {k: flops / v["median"] for k, v in entry["seconds"].items()}
    return entry


def agreement(exact: Tensor, other: Tensor) -> dict[str, float]:
    """How far logits `b t v` are from exact ones: mean KL in nats, share of equal argmax."""
    p, q = (F.log_softmax(logits.double(), -1).flatten(0, 1) for logits in (exact, other))
    return {
        "mean_kl": F.kl_div(q, p, log_target=True, reduction="batchmean").item(),
        "same_first_choice": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
    }


def measure_quality() -> dict[str, Any]:
    """Bits per byte of held-out text, of the shipped model, in both precisions."""
    trained = shipped.open_trained()
    exact = evaluate(trained.model, trained.data.held_out)
    rounded = evaluate(trained.model.to(torch.bfloat16), trained.data.held_out)
    return {
        "what": "bf16 quality",
        "path": "`evaluate` in float32 and after model.to(torch.bfloat16)",
        **trained.about,
        "bits_per_byte": {"float32": exact.bits_per_byte, "bfloat16": rounded.bits_per_byte},
        "relative_loss": rounded.bits_per_byte / exact.bits_per_byte - 1,
    }


def measure_size(size: str, works: Collection[str], plan: Plan) -> dict[str, Any]:
    """All `works` at one size, printed one by one; the payload of a record."""
    ours, peer = peers.build_pair(size)
    found: dict[str, Any] = {
        "size": size,
        "path": peers.PATHS,
        "parameters": ours.num_parameters(),
        "largest_logit_difference": peers.check_same_model(ours, peer),
        "router": peers.router_spread(ours),
        "measurements": [],
    }
    print(
        f"{size}: {found['parameters']:,} parameters, logits agree to "
        f"{found['largest_logit_difference']:.1e}",
        flush=True,
    )
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "prefill": partial(measure_prefill, ours, peer, plan),
        "decode": partial(measure_decode, ours, peer, plan),
        "train": partial(measure_train, ours, peer, plan),
        "memory": partial(measure_memory, size, plan),
        "bf16": partial(measure_bf16, ours, peer, plan),
    }
    for work in (w for w in parts if w in works):
        for entry in parts[work]():
            found["measurements"].append(entry)
            print(f"  {measure.describe(entry)}", flush=True)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure. Writes `model_speed_SIZE_PROCESSOR.json` and `bf16_quality.json`.

    A run of some parts writes records whose names end with these parts.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks model_speed", allow_abbrev=False)
    parser.add_argument("--size", default="S,M", help="S, M, lite, or several")
    parser.add_argument("--only", default=",".join(WORKS), help="parts, separated by commas")
    parser.add_argument("--quick", action="store_true", help="a trial: a tiny size, no record")
    asked = parser.parse_args(arguments)
    sizes = ["tiny"] if asked.quick else asked.size.split(",")
    works = asked.only.split(",")
    for value, known in [(s, list(peers.SIZES)) for s in sizes] + [(w, WORKS) for w in works]:
        if value not in known:
            parser.error(f"{value!r} is not one of {', '.join(known)}")
    plan = QUICK if asked.quick else FULL
    partly = "" if set(works) >= set(WORKS) - {"quality"} else "-" + "-".join(sorted(works))
    for size in sizes if set(works) - {"quality"} else ():
        found = measure_size(size, works, plan)
        if not asked.quick:
            print(write_record(f"model_speed_{size}_{processor()}{partly}", found))
    if "quality" in works and plan.quality:
        quality = measure_quality()
        print(f"  {measure.describe(quality)}", flush=True)
        print(write_record("bf16_quality", quality))


if __name__ == "__main__":
    main()
