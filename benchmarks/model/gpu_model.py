"""The model on a GPU, at the widths of Nano and Super: prefill, decode, a training step.

    python -m benchmarks gpu_model
    python -m benchmarks gpu_model --slice super --only decode

All of Nano fills a GPU and Super fills four, so the model is a slice: the first layers of the
pattern, up to the first attention layer and the MoE layer after it, with embeddings and head. The
pattern repeats, so the layers of a slice stand for those of the model; only the head has too large
a share. Weights are random, in bfloat16, with tokens spread over the experts (`peers`), and the
model chooses its kernels itself.

Two comparisons. The limit of the hardware: the ledger's FLOPs at the speed of a large product, or
the bytes of the weights that a token needs at the speed of a copy, whichever takes longer. And
transformers' NemotronH with the same weights (the same tensors), run alternately, without its
optional CUDA packages; benchmarks/kernels/device.py compares single operations with mamba_ssm's
kernels. transformers decodes with cuDNN's attention, which plans again for each number of keys and
keeps its plans. So a model with the same heads that is measured later does not pay for them.

The slice of Super has 26 GB of weights, that of Nano 9.5 GB.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import measure
from benchmarks.model import peers
from benchmarks.model.model_speed import agreement
from benchmarks.record import write_record
from nemotron_lite import Nemotron, NemotronConfig, ledger

DEVICE = "cuda"
SLICES = ("nano", "super")
WORKS = ("prefill", "decode", "train")
PREFILL = {512: 7, 2048: 7, 8192: 5, 32768: 3}  # length: rounds
DECODE = ((1, 512), (8, 512), (32, 512), (1, 32768))  # (batch, context)
COPIED, SQUARE = 2**28, 8192  # floats of the copy, side of the product: see measure_ceilings
STEPS, DECODE_ROUNDS = 8, 5
TRAIN = (1, 2048)  # batch, length
TRAIN_SLICES = ("nano",)  # the gradients of Super's experts do not fit


def slice_of(preset: str) -> NemotronConfig:
    """The first layers of a preset, up to the first attention layer and what follows it."""
    config = NemotronConfig.from_preset(preset)
    end = config.pattern.index("*") + 2
    return config.replace(pattern=config.pattern[:end], mtp_pattern="", mtp_depths=0)


def measure_ceilings() -> dict[str, float]:
    """Bytes per second of a large copy, FLOP/s of a large bfloat16 product; best of ten."""
    source = torch.randn(COPIED, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(SQUARE, SQUARE, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    calls: dict[str, Callable[[], object]] = {
        "copy": partial(target.copy_, source), "product": partial(torch.matmul, a, b)
    }  # fmt: skip
    best = {name: min(values) for name, values in alternate(calls, 10).items()}
    return {
        "bytes_per_s": 2 * source.nbytes / best["copy"],
        "flops_per_s": 2 * SQUARE**3 / best["product"],
    }


def alternate(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """`measure.alternate`; each call waits until the GPU has finished."""

    def waited(call: Callable[[], object]) -> None:
        call()
        torch.cuda.synchronize()

    return measure.alternate({n: partial(waited, call) for n, call in calls.items()}, rounds)


def fits(call: Callable[[], object]) -> bool:
    """Whether a call runs in the memory of this GPU."""
    try:
        call()
        return True
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def entry(
    what: str,
    calls: dict[str, Callable[[], object]],
    rounds: int,
    tokens: int,
    bound: float,
    **labels: Any,
) -> dict[str, Any]:
    """Ours beside the peer, if it fits, and beside `bound`, the shortest possible seconds."""
    if "peer" in calls and not fits(calls["peer"]):
        del calls["peer"]
    if "peer" not in calls:
        labels["peer"] = "out of memory"
    seconds = alternate(calls, rounds)
    if "peer" in seconds:
        found = measure.compare(what, seconds, tokens=tokens, **labels)
    else:
        summaries = {name: measure.summary(values) for name, values in seconds.items()}
        speeds = {name: tokens / s["median"] for name, s in summaries.items()}
        found = {"what": what, **labels, "seconds": summaries, "tokens_per_second": speeds}
    found["share_of_floor"] = bound / found["seconds"]["ours"]["median"]
    return found


def measure_prefill(
    ours: Nemotron, peer: nn.Module, ceilings: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """One prompt of growing length."""
    for length, rounds in PREFILL.items():
        tokens = peers.random_tokens(ours.config, 1, length).to(ours.device)
        calls: dict[str, Callable[[], object]] = {
            who: partial(peers.prefill, who, model, tokens)
            for who, model in (("ours", ours), ("peer", peer))
        }
        work = ledger.flops(ours.config, length, logits_to_keep=1).per_token * length
        bound = max(
            work / ceilings["flops_per_s"], weight_bytes(ours, length) / ceilings["bytes_per_s"]
        )
        yield entry("prefill", calls, rounds, length, bound, length=length)


def weight_bytes(model: Nemotron, tokens: int) -> float:
    """Bytes of the weights that `tokens` tokens read, if experts are chosen at random."""
    config, parts = model.config, ledger.parameters(model.config)
    unread = parts.by_part["moe"] - parts.active_by_part["moe"]  # by one token
    share = (1 - config.num_experts_per_tok / config.n_routed_experts) ** (tokens - 1)
    numbers = parts.total - parts.by_part["embedding"] - unread * share
    return model.lm_head.weight.element_size() * numbers


def measure_decode(
    ours: Nemotron, peer: nn.Module, ceilings: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """One token after another after a context; rows share it and differ after it."""
    for batch, context in DECODE:
        prompt = peers.random_tokens(ours.config, 1, context).to(ours.device)
        inputs = peers.random_tokens(ours.config, batch, STEPS, seed=2).to(ours.device)
        calls: dict[str, Callable[[], object]] = {}
        for who, model in (("ours", ours), ("peer", peer)):
            if not fits(partial(peers.prefill, who, model, prompt)):
                continue
            cache = peers.widen(who, peers.prefill(who, model, prompt)[1], batch)
            calls[who] = partial(peers.decode, who, model, cache, inputs)
        sizes = ledger.cache(ours.config, context)
        moved = weight_bytes(ours, batch) + batch * (sizes.kv + 2 * sizes.ssm)
        bound = STEPS * moved / ceilings["bytes_per_s"]
        yield entry(
            "decode", calls, DECODE_ROUNDS, batch * STEPS, bound, batch=batch, context=context
        )


def measure_train(
    ours: Nemotron, peer: nn.Module, ceilings: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Forward and backward pass without the optimizer, and their peak memory."""
    batch, length = TRAIN
    tokens = peers.random_tokens(ours.config, batch, length).to(ours.device)
    models = {"ours": ours.train(), "peer": peer.train()}
    steps = {"ours": peers.gradients_ours, "peer": peers.gradients_peer}

    def step(who: str) -> None:
        models[who].zero_grad(set_to_none=True)
        steps[who](models[who], tokens)
        models[who].zero_grad(set_to_none=True)

    peaks = {}
    for who in models:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if fits(partial(step, who)):
            peaks[who] = torch.cuda.max_memory_allocated() - before
        models[who].zero_grad(set_to_none=True)
    calls: dict[str, Callable[[], object]] = {who: partial(step, who) for who in peaks}
    work = ledger.flops(ours.config, length, "train").per_token * batch * length
    yield entry(
        "train",
        calls,
        5,
        batch * length,
        work / ceilings["flops_per_s"],
        batch=batch,
        length=length,
        peak_bytes=peaks,
    )
    ours.eval()
    peer.eval()


def measure_slice(
    name: str, works: list[str], ceilings: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """All `works` of one slice; after each measurement, everything measured so far."""
    config = slice_of(name)
    with torch.device(DEVICE):
        peer = peers.build_peer(config, dtype=torch.bfloat16)
    ours = peers.build_ours(config, peer, share=True)
    tokens = peers.random_tokens(config, 1, 512).to(DEVICE)
    with torch.inference_mode():
        agree = agreement(peer(tokens, use_cache=True).logits, ours(tokens).logits)
    found: dict[str, Any] = {
        "pattern": config.pattern, "parameters": ours.num_parameters(),
        "agreement": agree, "router": peers.router_spread(ours), "measurements": [],
    }  # fmt: skip
    print(f"{name}: {config.pattern}, {found['parameters']:,} parameters, {agree}", flush=True)
    parts = {"prefill": measure_prefill, "decode": measure_decode, "train": measure_train}
    for work in (w for w in works if w in parts):
        if work == "train" and name not in TRAIN_SLICES:
            continue
        for measured in parts[work](ours, peer, ceilings):
            found["measurements"].append(measured)
            print(f"  {measure.describe(measured)}", flush=True)
            yield found


def main(arguments: list[str] | None = None) -> None:
    """Measure. Writes `gpu_model_<gpu>.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu_model", allow_abbrev=False)
    parser.add_argument("--slice", default=",".join(SLICES), help="nano, super or both")
    parser.add_argument("--only", default=",".join(WORKS), help="parts, separated by commas")
    asked = parser.parse_args(arguments)
    slices, works = asked.slice.split(","), asked.only.split(",")
    for value, known in [(s, SLICES) for s in slices] + [(w, WORKS) for w in works]:
        if value not in known:
            parser.error(f"{value!r} is not one of {', '.join(known)}")
    if not torch.cuda.is_available():
        sys.exit(
            "There is no CUDA GPU here; `python -m benchmarks -h` lists benchmarks that need none."
        )
    gpu = "".join(c if c.isalnum() else "_" for c in torch.cuda.get_device_name().lower())
    ceilings = measure_ceilings()
    found: dict[str, Any] = {}
    for name in slices:
        for so_far in measure_slice(name, works, ceilings):
            found[name] = so_far
            payload = {"path": peers.PATHS, "ceilings": ceilings, "slices": found}
            path = write_record(f"gpu_model_{gpu}", payload)
        gc.collect()
        torch.cuda.empty_cache()
    print(path)


if __name__ == "__main__":
    main()
