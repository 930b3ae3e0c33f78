"""Models larger than the memory: all 88 layers of Super, and a checkpoint of full-size layers.

    python -m benchmarks full_size                    everything, about 7 minutes on two cores
    python -m benchmarks full_size --only files       the checkpoint
    python -m benchmarks full_size --quick            small layers, no record

Generated: Super with weights from a seed, in BF16 with a budget of 4 GiB and in NVFP4 with 8 GiB.
Each model reads a short prompt and writes tokens. FLOPs, weights and bytes are counted while it
runs, and must be those of the ledger.

Files: layers of Super's size in NVFP4 are saved as a checkpoint and opened with `offload=True`, in
a process whose memory is limited by the system (RLIMIT_AS) to less than the checkpoint. RLIMIT_AS
counts all memory that a process has asked for, mapped files and untouched pages too, so it is
stricter than the limit of a container. Loading the checkpoint into memory must fail there. The
tokens must be those of the same model in memory, and those of the generated model that was saved.
Then the same is measured with an empty page cache before each token, which gives the speed of the
disk.

Every measurement runs in its own process, with as many threads as PyTorch or OMP_NUM_THREADS says.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import in_own_process, summary
from benchmarks.record import write_record
from nemotron_lite import Nemotron, NemotronConfig, generate, ledger, load, save
from nemotron_lite.checkpoint import weight_bytes
from nemotron_lite.offload import Offloaded, count_flops
from nemotron_lite.quantization.packed_layers import PackedWeight

PATH = (
    "model(tokens, cache, logits_to_keep=1) of Nemotron.from_config(config, weights='generated') "
    "and of load(path, packed=True, offload=True)"
)
GIB = 2**30
PROMPT, NEW = 8, 5  # tokens read, and tokens written one by one
LAYERS = "MEM*E"  # of the checkpoint: two mixtures of 512 experts
VOCABULARY = 16_384  # so that its layers, and not its head, are what is large
LIMIT = 2.0  # GiB of address space beside what an idle process has
BUDGET = 0.75  # GiB of weights in it


def config_of(pattern: str, *, quick: bool) -> NemotronConfig:
    """Super with these layers; in small with `quick`."""
    full = NemotronConfig.from_preset("super")
    changes: dict[str, Any] = {} if pattern == full.pattern else {"vocab_size": VOCABULARY}
    config = full.replace(pattern=pattern, mtp_pattern="", mtp_depths=0, **changes)
    if not quick:
        return config
    return config.replace(
        hidden_size=256, vocab_size=512, n_routed_experts=32, moe_intermediate_size=128,
        moe_latent_size=64, moe_shared_expert_intermediate_size=256, mamba_num_heads=16,
    )  # fmt: skip


def run_tokens(model: Offloaded, *, cold: list[Path] | None = None) -> dict[str, Any]:
    """Read a prompt and write tokens; seconds, bytes and FLOPs of each call.

    Args:
        cold: files to drop from the page cache before each call.
    """
    config = model.config
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (1, PROMPT), generator=draw)
    cache = model.empty_cache(1)
    calls: list[dict[str, Any]] = []
    loads: list[float] = []
    for position in range(1 + NEW):
        drop_from_page_cache(cold or [])
        traffic = model.store.traffic
        traffic.reset()
        with count_flops(model) as count, torch.inference_mode():
            start = time.perf_counter()
            logits = model(tokens, cache, logits_to_keep=1).logits
            seconds = time.perf_counter() - start
        if not bool(logits.isfinite().all()):
            raise RuntimeError("the logits are not finite")
        if position:
            expected = ledger.flops(config, PROMPT + position - 1, "decode").total
        else:
            expected = ledger.flops(config, PROMPT, logits_to_keep=1).total
        if count.total != round(expected):
            raise RuntimeError(f"{count.total:,} FLOPs were counted; the ledger has {expected:,}")
        calls.append(
            {
                "seconds": seconds,
                "flops": count.total,
                "weights": traffic.weights,
                "used_bytes": traffic.used_bytes,
                "source_bytes": traffic.source_bytes,
                "hit_rate": traffic.hit_rate,
                "expert_hit_rate": traffic.expert_hit_rate,
            }
        )
        loads.append(os.getloadavg()[0])
        tokens = logits[:, -1].argmax(-1, keepdim=True)
    packed = any(isinstance(module, PackedWeight) for module in model.modules())
    used = ledger_of_a_token(config, packed=packed)
    for call in calls[1:]:
        if (call["weights"], call["used_bytes"]) != used:
            raise RuntimeError(
                f"a token used {call['weights']:,} weights and {call['used_bytes']:,} bytes; the "
                f"ledger has {used[0]:,} and {used[1]:,}"
            )
    # Without the first token: it still fills the memory in which weights stay.
    steady = calls[2:]
    per_token = summary([call["seconds"] for call in steady])
    return {
        "prompt": calls[0],
        "load_average": max(loads),  # with that of this process
        "decode": {
            "seconds": per_token,
            "tokens_per_second": 1 / per_token["median"],
            "flops": steady[0]["flops"],
            "weights": used[0],
            "used_bytes": used[1],
            **{
                name: summary([call[name] for call in steady])
                for name in ("source_bytes", "hit_rate", "expert_hit_rate")
            },
        },
    }


# Matrices in NVFP4 of the rows of the ledger; of the first one the other half stays in BF16.
PACKED = {"q_proj, o_proj": 1, "in_proj": 1, "out_proj": 1, "latent projections": 2}
PACKED |= {"shared expert": 2, "experts": 2}


def ledger_of_a_token(config: NemotronConfig, *, packed: bool) -> tuple[int, int]:
    """Weights that a token uses and their bytes in BF16 or NVFP4, from the rows of the ledger."""
    weights = config.hidden_size  # a row of the embedding
    used = 2.0 * weights
    for row in ledger.parameters(config).rows:
        if row.mtp or row.part == "embedding":
            continue
        active, bits = row.active, 16.0
        weights += int(active)
        if row.name == "router selection bias":
            bits = 32
        elif packed and row.name in PACKED:
            # 4 bits, one scale of 8 bits for 16 weights, and one of 32 bits for each matrix
            bits = (4.5 + 16) / 2 if row.name == "q_proj, o_proj" else 4.5
            each = config.num_experts_per_tok if row.name == "experts" else 1
            used += 4 * PACKED[row.name] * each * row.count
        used += active * bits / 8
    return weights, round(used)


def drop_from_page_cache(files: list[Path]) -> None:
    """Make the system forget what it keeps of these files in memory."""
    for file in files:
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def generated(pattern: str, packed: bool, budget: int | float, quick: bool) -> dict[str, Any]:
    """One generated model; run in its own process."""
    config = config_of(pattern, quick=quick)
    begun = time.perf_counter()
    model = Nemotron.from_config(
        config, weights="generated", packed=packed, budget=int(budget * GIB), progress=True
    )
    assert isinstance(model, Offloaded)
    made = time.perf_counter() - begun
    found = run_tokens(model)
    return {
        "layers": config.num_layers,
        "ledger_parameters": ledger.parameters(config).total,
        "format": "NVFP4" if packed else "BF16",
        "budget_gib": budget,
        "weights_in_memory_gib": model.store.nbytes / GIB,
        "peak_gib": peak(),
        "seconds_to_make": made,
        **found,
    }


def peak() -> float:
    """GiB of resident memory at most, since the process began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write_checkpoint(folder: str, quick: bool) -> dict[str, Any]:
    """Save generated layers, tensor by tensor; run in its own process."""
    config = config_of(LAYERS, quick=quick)
    model = Nemotron.from_config(config, weights="generated", packed=True, budget=GIB)
    begun = time.perf_counter()
    # Shards smaller than the limit: the library that checks their headers maps a whole file.
    save(model, folder, max_shard_bytes=256 * 2**20)
    seconds = time.perf_counter() - begun
    text = generate(model, [[1, 2, 3]], 4, temperature=0)
    found = {"seconds": seconds, "bytes": weight_bytes(folder), "peak_gib": peak()}
    return {**found, "text": text}


def limited(folder: str, cold: bool, budget: int | float, limit: int | float) -> dict[str, Any]:
    """Run a checkpoint with a hard limit on address space; run in its own process."""
    files = sorted(Path(folder).glob("*.safetensors"))
    idle = set_limit(limit)
    model = load(folder, packed=True, offload=True, budget=int(budget * GIB), progress=True)
    assert isinstance(model, Offloaded)
    found = run_tokens(model, cold=files if cold else None)
    text = generate(model, [[1, 2, 3]], 4, temperature=0)
    return {
        "page_cache": "dropped before each call" if cold else "warm",
        "budget_gib": budget,
        "limit_gib": limit,
        "idle_gib": idle / GIB,
        "peak_gib": peak(),
        "text": text,
        **found,
    }


def set_limit(limit: int | float) -> int:
    """Limit the address space to these GiB beside what this idle process has, which it returns."""
    idle = status("VmSize")
    most = idle + int(limit * GIB)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return idle


def load_with_limit(folder: str, limit: int | float) -> str:
    """The error of loading a checkpoint into memory under this limit; run in its own process."""
    set_limit(limit)
    try:
        load(folder, packed=True)
    except (RuntimeError, MemoryError, ValueError, OSError) as error:
        return type(error).__name__
    return "succeeded"


def in_memory(folder: str) -> dict[str, Any]:
    """The same checkpoint in memory, without a limit; run in its own process."""
    model = load(folder, packed=True)
    text = generate(model, [[1, 2, 3]], 4, temperature=0)
    return {"text": text, "peak_gib": peak()}


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark runs on Linux.")


def measure_files(quick: bool) -> dict[str, Any]:
    """Write a checkpoint, and run it with and without a limit."""
    folder = tempfile.mkdtemp(prefix="full-size-")
    try:
        stored = own("write_checkpoint", folder, quick)
        limit, budget = (0.4, 0.03) if quick else (LIMIT, BUDGET)
        runs = [own("limited", folder, cold, budget, limit) for cold in (False, True)]
        failed = own("load_with_limit", folder, limit)
        whole = own("in_memory", folder)
    finally:
        shutil.rmtree(folder)
    for written in (stored, *runs):
        if written.pop("text") != whole["text"]:
            raise RuntimeError("the offloaded model wrote other tokens than the one in memory")
    if not quick and failed == "succeeded":
        raise RuntimeError("the checkpoint fits into the limit, so nothing was shown")
    return {
        "what": "files",
        "pattern": LAYERS,
        "checkpoint": stored,
        "runs": runs,
        "load_in_memory": failed,
        "in_memory_peak_gib": whole["peak_gib"],
    }


def own(function: str, *arguments: Any) -> Any:
    """A function of this module in a process of its own."""
    return in_own_process(
        "benchmarks.model.full_size", "--call", json.dumps([function, *arguments])
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure and write `full_size.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks full_size", allow_abbrev=False)
    parser.add_argument("--only", choices=("bf16", "nvfp4", "files"), help="one part")
    parser.add_argument("--quick", action="store_true", help="small layers, no record")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.call:
        name, *values = json.loads(asked.call)
        print(json.dumps(globals()[name](*values)))
        return
    pattern = LAYERS if asked.quick else NemotronConfig.from_preset("super").pattern
    results: list[dict[str, Any]] = []
    for part, packed, budget in (("bf16", False, 4), ("nvfp4", True, 8)):
        if asked.only in (None, part):
            found = own("generated", pattern, packed, budget, asked.quick)
            results.append({"what": "generated", **found})
            print(json.dumps(results[-1], indent=1), flush=True)
    if asked.only in (None, "files"):
        results.append(measure_files(asked.quick))
        print(json.dumps(results[-1], indent=1), flush=True)
    if not asked.quick:
        name = "full_size" if asked.only is None else f"full_size_{asked.only}"
        payload = {"path": PATH, "prompt": PROMPT, "new": NEW, "results": results}
        print(write_record(name, payload))


if __name__ == "__main__":
    main(sys.argv[1:])
