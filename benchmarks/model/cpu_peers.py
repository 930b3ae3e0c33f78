"""Prefill and decoding on a CPU beside all peers: transformers, llama.cpp, plain transformers.

    python -m benchmarks cpu_peers --size S,M,lite
    python -m benchmarks cpu_peers --size M --long       also 32K tokens, and decoding after 4K
    python -m benchmarks cpu_peers --peers transformers,llama.cpp --only decode

Up to six programs run alternately in one process, with the same number of threads:

    ours            the calls that a user makes (`peers.PATHS`), decoding with `compiled=True`
    ordinary        the same without `compiled=True`, for decoding only
    transformers    NemotronH with the same weights
    llama.cpp       the same weights, exported with `to_gguf`, in the same precision (`llama_cpp`)
    dense, moe      transformers' Qwen3 and Qwen3-MoE, random weights, with as many parameters per
                    token as ours (`equal_transformers`)

Each peer has its best settings: llama.cpp with or without flash attention, and Qwen3 decodes with
the growing or with the static cache, whichever is faster in a trial of the same length. The entry
says which it was.

A comparison is refused if the programs do not write the same text. All rows take the most likely
token and read what they wrote themselves. The first 16 tokens of ours and of llama.cpp must be the
same, in float32 for seven of eight rows and for each single row. (Where two tokens are almost
equally likely, rounding decides.) In bfloat16 rounding decides often, because llama.cpp rounds the
inputs of products and ours does not. So the first 4 tokens of two of eight rows must be the same
there, which no other model would reach, and a single row need not be. The same holds for the two
caches of a Qwen3 model.
transformers' NemotronH must have the logits of ours in float32 (`peers.check_same_model`).

A run with all peers and works writes `cpu_peers_SIZE_PROCESSOR.json`, which the tables of
docs/benchmarks.md are made from. A part of them writes a record whose name ends with these parts,
and no table reads it. Left out: training, memory, sampling, drafts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.model import equal_transformers, llama_cpp, peers
from benchmarks.record import processor, write_record
from nemotron_lite import Nemotron

PEERS = ("transformers", "llama.cpp", "dense", "moe")
WORKS = ("prefill", "decode")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAME_TOKENS = 16  # in float32
SAME_IN_BFLOAT16 = 4
_Call = TypeVar("_Call")
# Required ratios by peer: of prefill by length, of decoding by rows.
PREFILL_AIMS: dict[str, dict[int, float]] = {
    "transformers": {512: 2.0, 2048: 2.5, 8192: 2.5, 32768: 3.0},
    "llama.cpp": dict.fromkeys((512, 2048, 8192, 32768), 1.0),
}
DECODE_AIMS: dict[str, dict[int, float]] = {
    "transformers": {1: 2.5, 8: 2.5},
    "llama.cpp": {1: 1.0, 8: 1.0},
}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    prefill: dict[int, int]  # length: rounds
    decode: tuple[tuple[int, int], ...]  # (rows, context)
    decode_rounds: int
    decode_steps: int  # of each row per round
    check: tuple[int, int] = (8, 64)  # rows and tokens of the prompts that are compared first
    aims: bool = True

    def aim(self, ratios: dict[str, dict[int, float]], key: int) -> dict[str, float | None]:
        """The required ratios by peer, if this plan has aims."""
        return {peer: by_key.get(key) for peer, by_key in ratios.items()} if self.aims else {}


FULL = Plan(
    prefill={512: 9, 2048: 7, 8192: 3}, decode=((1, 512), (8, 512)), decode_rounds=9,
    decode_steps=16,
)  # fmt: skip
LONG = replace(FULL, prefill=FULL.prefill | {32768: 2}, decode=(*FULL.decode, (1, 4096), (8, 4096)))
QUICK = Plan(
    prefill={64: 2, 160: 2}, decode=((1, 64), (8, 64)), decode_rounds=2, decode_steps=8,
    check=(8, 20), aims=False,
)  # fmt: skip


@dataclass
class Programs:
    """What is compared: models by name, and the file that llama.cpp loads."""

    models: dict[str, Any]  # "ours", "transformers", "dense", "moe"
    file: Path | None  # None leaves llama.cpp out
    dtype: str

    @property
    def ours(self) -> Nemotron:
        """Our model."""
        return self.models["ours"]

    @property
    def exact(self) -> bool:
        """Whether keys and values are float32 in llama.cpp too."""
        return self.dtype == "float32"

    @property
    def alike(self) -> int:
        """How many first tokens of a row are compared."""
        return SAME_TOKENS if self.exact else SAME_IN_BFLOAT16

    def needed(self, rows: int) -> int:
        """How many of some rows must have the same tokens, see the docstring of this module."""
        return rows - rows // 8 if self.exact else rows // 4


class Decoder:
    """Rows that a model of torch writes, a few tokens per call, each most likely after the last."""

    @torch.inference_mode()
    def __init__(self, who: str, model: Any, prompts: Tensor, *, static: int = 0) -> None:
        """Read the prompts `b t`, which are the same up to their last token.

        Args:
            who: "ours" or "ordinary" (see `peers.decode`), or any name for a model of transformers.
            model: the model.
            prompts: token ids.
            static: tokens of a static cache; 0 is the cache that the model makes.
        """
        self.kind, self.model = who if who in ("ours", "ordinary") else "peer", model
        shared, rows = prompts[:1, :-1], prompts.shape[0]
        if static:
            from transformers import StaticCache

            # It is made for the rows of the first call, so all of them read the prompt.
            cache: Any = StaticCache(config=model.config, max_cache_len=static)
            model(shared.expand(rows, -1), past_key_values=cache, logits_to_keep=1)
            self.cache = cache
        else:
            reader = "peer" if self.kind == "peer" else "ours"
            self.cache = peers.widen(reader, peers.prefill(reader, model, shared)[1], rows)
        self.last = prompts[:, -1:]
        self.written: list[list[int]] = [[] for _ in prompts]

    def step(self, steps: int) -> None:
        """Write `steps` tokens in each row."""
        for _ in range(steps):
            self.last = peers.decode(self.kind, self.model, self.cache, self.last)
            for row, token in zip(self.written, self.last[:, 0].tolist(), strict=True):
                row.append(token)


def same_rows(
    first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], count: int = SAME_TOKENS
) -> int:
    """How many rows begin with the same `count` tokens."""
    return sum(
        len(a) >= count and list(a[:count]) == list(b[:count])
        for a, b in zip(first, second, strict=True)
    )


def check_same_text(programs: Programs, plan: Plan) -> dict[str, int]:
    """Compare greedy tokens of ours and llama.cpp: all rows in one batch, then one row alone.

    Returns:
        How many rows were compared, and how many had the same 16 tokens.

    Raises:
        RuntimeError: too few rows are the same.
    """
    assert programs.file is not None
    rows, length = plan.check
    prompts = _prompts(programs.ours, rows, length)
    ours = Decoder("ours", programs.ours, prompts)
    ours.step(SAME_TOKENS)
    with llama_cpp.serve(
        programs.file, rows=rows, context=length + 2 * SAME_TOKENS, exact=programs.exact
    ) as server:
        theirs = llama_cpp.Rows(server, prompts.tolist())
        theirs.step(SAME_TOKENS)
        alone = llama_cpp.Rows(server, prompts[:1].tolist())
        alone.step(SAME_TOKENS)
    same = same_rows(ours.written, theirs.written, programs.alike)
    needed = programs.needed(rows)
    single = same_rows(alone.written, theirs.written[:1], programs.alike)
    if same < needed or single < programs.needed(1):
        raise RuntimeError(
            f"ours and llama.cpp write the same {programs.alike} tokens in {same} of {rows} rows "
            f"in {programs.dtype}, expected at least {needed}: they do not compute the same model, "
            "so their times are not compared."
        )
    return {"rows": rows, "same": same}


def measure_prefill(programs: Programs, plan: Plan) -> Iterator[dict[str, Any]]:
    """Read prompts of growing length: logits of the last token, and a cache."""
    for length, rounds in plan.prefill.items():
        tokens = peers.random_tokens(programs.ours.config, 1, length)
        settings: dict[str, Any] = {}
        calls: dict[str, Callable[[], object]] = {
            who: partial(peers.prefill, "ours" if who == "ours" else "peer", model, tokens)
            for who, model in programs.models.items()
        }
        first = peers.prefill("ours", programs.ours, tokens)[0].argmax().item()
        with ExitStack() as stack:
            if programs.file is not None:
                prompt = tokens[0].tolist()

                def trial(server: llama_cpp.Server) -> tuple[Callable[[], object], float, bool]:
                    seconds, token = server.prefill(prompt)
                    same = token == first or not programs.needed(1)
                    return (lambda: server.prefill(prompt)[0]), seconds, same

                call, flash = fastest_server(stack, programs, trial, rows=1, context=length + 64)
                calls["llama.cpp"], settings["flash_attention"] = call, flash
            seconds = measure.alternate(
                calls, rounds, warmup=1 if length <= 8192 else 0
            )  # the shorter lengths were a warm-up
        yield measure.compare_each(
            _name("prefill", programs), seconds, tokens=length, length=length,
            aims=plan.aim(PREFILL_AIMS, length), settings=settings,
        )  # fmt: skip


def measure_decode(programs: Programs, plan: Plan) -> Iterator[dict[str, Any]]:
    """One token after another. Rows share the context except for its last token."""
    peers.prepare_as_generate_does(programs.ours)
    for rows, context in plan.decode:
        prompts = _prompts(programs.ours, rows, context)
        # The trials, a warm-up, and one token more per call of llama.cpp.
        most = context + 4 * SAME_TOKENS + (plan.decode_rounds + 2) * (plan.decode_steps + 1)
        settings: dict[str, Any] = {}
        ours = Decoder("ours", programs.ours, prompts)
        ours.step(SAME_TOKENS)
        ordinary = Decoder("ordinary", programs.ours, prompts)
        steps: dict[str, Callable[[int], object]] = {"ours": ours.step, "ordinary": ordinary.step}
        with ExitStack() as stack:
            for who, model in programs.models.items():
                if who == "transformers":
                    steps[who] = Decoder(who, model, prompts).step
                elif who != "ours":
                    decoder, cache = fastest_cache(programs, who, model, prompts, most)
                    steps[who], settings[f"cache of {who}"] = decoder.step, cache
            if programs.file is not None:

                def trial(
                    server: llama_cpp.Server,
                ) -> tuple[Callable[[int], object], float, bool]:
                    written = llama_cpp.Rows(server, prompts.tolist())
                    written.step(SAME_TOKENS)
                    same = same_rows(ours.written, written.written, programs.alike)
                    enough = same >= programs.needed(rows)
                    return written.step, written.step(SAME_TOKENS), enough

                step, flash = fastest_server(stack, programs, trial, rows=rows, context=most)
                steps["llama.cpp"], settings["flash_attention"] = step, flash
            calls = {who: partial(step, plan.decode_steps) for who, step in steps.items()}
            seconds = measure.alternate(calls, plan.decode_rounds)
        yield measure.compare_each(
            _name("decode", programs), seconds, tokens=rows * plan.decode_steps, batch=rows,
            context=context, aims=plan.aim(DECODE_AIMS, rows), settings=settings,
        )  # fmt: skip


def fastest_server(
    stack: ExitStack,
    programs: Programs,
    trial: Callable[[llama_cpp.Server], tuple[_Call, float, bool]],
    *,
    rows: int,
    context: int,
) -> tuple[_Call, bool]:
    """Try llama.cpp with and without flash attention: (the faster one's call, whether it has it).

    Args:
        stack: ends the server that is kept.
        programs: what is compared.
        trial: gives the call to be timed, the seconds of a first one, and whether it wrote what
            ours writes.
        rows: of the server.
        context: tokens of each row.

    Raises:
        RuntimeError: neither writes what ours writes.
    """
    assert programs.file is not None
    best: tuple[_Call, float, bool, ExitStack] | None = None
    for flash in (False, True):
        own = stack.enter_context(ExitStack())
        server = own.enter_context(
            llama_cpp.serve(
                programs.file, rows=rows, context=context, flash_attention=flash,
                exact=programs.exact,
            )
        )  # fmt: skip
        call, seconds, same = trial(server)
        if same and (best is None or seconds < best[1]):
            if best is not None:
                best[3].close()
            best = call, seconds, flash, own
        else:
            own.close()
    if best is None:
        raise RuntimeError(
            f"llama.cpp does not write the tokens of ours ({rows} rows, context of {context} "
            f"tokens, {programs.dtype}): their times are not compared."
        )
    return best[0], best[2]


def fastest_cache(
    programs: Programs, who: str, model: nn.Module, prompts: Tensor, most: int
) -> tuple[Decoder, str]:
    """Decode with the growing and with the static cache: the faster one, and its name.

    Raises:
        RuntimeError: they write different tokens.
    """
    found: dict[str, tuple[float, Decoder]] = {}
    for name, static in (("growing", 0), ("static", most)):
        decoder = Decoder(who, model, prompts, static=static)
        decoder.step(SAME_TOKENS)
        started = time.perf_counter()
        decoder.step(SAME_TOKENS)
        found[name] = time.perf_counter() - started, decoder
    rows = prompts.shape[0]
    first, second = (decoder.written for _, decoder in found.values())
    same = same_rows(first, second, programs.alike)
    if same < programs.needed(rows):
        raise RuntimeError(
            f"the {who} transformer writes the same {programs.alike} tokens with both its caches "
            f"in {same} of {rows} rows, expected at least {programs.needed(rows)}: one of the "
            "caches is used wrongly, so it is not timed."
        )
    name = min(found, key=lambda name: found[name][0])
    return found[name][1], name


def _prompts(ours: Nemotron, rows: int, length: int) -> Tensor:
    """Token ids `rows length` that are the same except for the last one."""
    shared = peers.random_tokens(ours.config, 1, length).repeat(rows, 1)
    generator = torch.Generator().manual_seed(2)
    shared[:, -1] = torch.randperm(ours.config.vocab_size, generator=generator)[:rows]
    return shared


def _name(work: str, programs: Programs) -> str:
    return work if programs.dtype == "float32" else f"{work} in {programs.dtype}"


def measure_size(
    size: str, dtypes: Collection[str], asked: Collection[str], works: Collection[str], plan: Plan
) -> dict[str, Any]:
    """All that is asked for at one size, printed one by one; the payload of a record."""
    config = peers.SIZES[size]
    peer = peers.build_peer(config)
    with torch.no_grad():  # llama.cpp is told not to end a text, so no program may
        peer.get_parameter("lm_head.weight")[list(config.eos_token_ids)] = 0
    ours = peers.build_ours(config, peer)
    found: dict[str, Any] = {
        "size": size,
        "path": {work: peers.PATHS[work] for work in WORKS} | PEER_PATHS,
        "parameters": ours.num_parameters(),
        "active_parameters": equal_transformers.ledger.parameters(config).active,
        "largest_logit_difference": peers.check_same_model(ours, peer),
        "router": peers.router_spread(ours),
        "transformers_of_equal_active_size": {},
        "same_tokens": {},
        "measurements": [],
    }
    models: dict[str, Any] = {"ours": ours}
    if "transformers" in asked:
        models["transformers"] = peer
    for kind in (kind for kind in equal_transformers.KINDS if kind in asked):
        sizes = equal_transformers.equal_sizes(config, kind)
        models[kind] = equal_transformers.build_equal(config, sizes)
        found["transformers_of_equal_active_size"][kind] = sizes.to_record()
    print(
        f"{size}: {found['parameters']:,} parameters, {found['active_parameters']:,} active",
        flush=True,
    )
    parts = {"prefill": measure_prefill, "decode": measure_decode}
    for dtype in dtypes:
        inside = models
        if dtype != "float32":
            inside = {who: peers.in_bfloat16(model) for who, model in models.items()}
        with tempfile.TemporaryDirectory(prefix="nemotron-lite-") as folder:
            file = Path(folder) / "model.gguf" if "llama.cpp" in asked else None
            programs = Programs(inside, file, dtype)
            if file is not None:
                llama_cpp.write_file(programs.ours, file)
                found["same_tokens"][dtype] = check_same_text(programs, plan)
            for work in (w for w in parts if w in works):
                for entry in parts[work](programs, plan):
                    found["measurements"].append(entry)
                    print(f"  {measure.describe(entry)}", flush=True)
    return found


PEER_PATHS = {
    "transformers": "the same with NemotronHForCausalLM and its cache",
    "llama.cpp": "the server inside xllamacpp: its own prompt_ms and predicted_ms, without HTTP",
    "dense, moe": "as transformers; the cache that is faster, growing or static",
}


def main(arguments: list[str] | None = None) -> None:
    """Measure. Writes `cpu_peers_SIZE_PROCESSOR.json`; a run of parts has them in its name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks cpu_peers", allow_abbrev=False)
    parser.add_argument("--size", default="S,M,lite", help="S, M, lite, or several")
    parser.add_argument("--only", default=",".join(WORKS), help="prefill, decode, or both")
    parser.add_argument("--dtype", default=",".join(DTYPES), help="float32, bfloat16, or both")
    parser.add_argument("--peers", default=",".join(PEERS), help="some of " + ", ".join(PEERS))
    parser.add_argument("--long", action="store_true", help="also prefill of 32K; takes minutes")
    parser.add_argument("--quick", action="store_true", help="a trial: a tiny size, no record")
    given = parser.parse_args(arguments)
    sizes = ["tiny"] if given.quick else given.size.split(",")
    works, dtypes, asked = (value.split(",") for value in (given.only, given.dtype, given.peers))
    for values, known in (
        (sizes, list(peers.SIZES)), (works, WORKS), (dtypes, list(DTYPES)), (asked, PEERS)
    ):  # fmt: skip
        for value in values:
            if value not in known:
                parser.error(f"{value!r} is not one of {', '.join(known)}")
    plan = QUICK if given.quick else LONG if given.long else FULL
    parts = [
        part
        for part, whole in ((works, WORKS), (dtypes, DTYPES), (asked, PEERS))
        if set(part) < set(whole)
    ]
    suffix = "".join(f"-{'-'.join(sorted(part))}" for part in parts)
    for size in sizes:
        found = measure_size(size, dtypes, asked, works, plan)
        if not given.quick:
            print(write_record(f"cpu_peers_{size}_{processor()}{suffix}", found))


if __name__ == "__main__":
    main()
