"""Training and decoding of `lite` while another program uses one of two cores.

    python -m benchmarks busy_machine

Each measurement is a process of its own that may use two cores. Beside half of them a neighbour
runs: a process that counts in a loop, pinned to the first of the two cores. Quiet and busy
measurements alternate, and the share is that of two measurements next to each other in time. The
machine should do nothing else; the record has its load. The aim: 40 % of the quiet speed.

Three ways of starting Python, because each may set its threads in another way:

    command line    `python -m nemotron_lite train` and `generate`, which `nemotron-lite` runs
    script          `python -c` with `nemotron_lite.train.train` and `generate`
    thread          the same calls in a thread, after `openmp.watch_until_exit`, as in a notebook

Environment variables of OpenMP that are set are passed on, and the record has them: measure
without them. Training: tokens per second of the median update after the first few; the model and
the text are made before. Decoding: greedy, one row, prompt and preparation of the weights included.

Left out: more than one neighbour, neighbours that use memory instead of a core, a real kernel of a
notebook. Linux only, because other systems cannot pin a process to a core this way.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.record import processor, write_record
from nemotron_lite import Nemotron, NemotronConfig, generate, load, openmp
from nemotron_lite.checkpoint import save
from nemotron_lite.data import prepare
from nemotron_lite.train import TrainConfig, train

AIM = 0.4
STARTS = ("command line", "script", "thread")
WORKS = ("training", "decoding")
FIRST_UPDATES = 3  # not counted
PROMPT = "def "
SPIN = "import os; os.sched_setaffinity(0, {{{core}}}); print(1, flush=True)\nwhile True: pass"


@contextmanager
def neighbour(core: int) -> Iterator[int]:
    """A process that counts in a loop on one core, while the block runs; its id."""
    process = subprocess.Popen(
        [sys.executable, "-c", SPIN.format(core=core)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "1":
            raise RuntimeError(f"the neighbour did not start on core {core}.")
        yield process.pid
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def two_cores() -> list[int]:
    """The two cores that are used.

    Raises:
        RuntimeError: the system cannot pin processes, or there is one core only.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise RuntimeError("this system cannot pin a process to a core: measure on Linux.")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise RuntimeError(f"this process may use {len(cores)} core; expected 2 or more.")
    return cores[:2]


def make_files(folder: Path, config: NemotronConfig, text: Path | None) -> None:
    """A checkpoint with random weights that never ends its text, and the text that it reads."""
    data = prepare(vocab_size=config.vocab_size, root=text)
    model = Nemotron(config, seed=0)
    with torch.no_grad():  # other logits are above zero somewhere
        model.lm_head.weight[list(config.eos_token_ids)] = 0
    model.tokenizer = data.tokenizer
    save(model, folder / "model")


def run(command: Sequence[str], cores: Sequence[int]) -> str:
    """What a command prints; it may use these cores only.

    Raises:
        RuntimeError: it failed; the message has the end of its error output.
    """
    # The child inherits the cores of this thread, so they are set before and put back after.
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        process = subprocess.Popen(
            command, cwd=measure.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    finally:
        os.sched_setaffinity(0, before)
    out, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors[-2000:]}")
    return out


def speed(
    start: str, work: str, folder: Path, size: tuple[int, int], text: Path | None, cores: list[int]
) -> float:
    """Tokens per second of one measurement in a process of its own.

    Args:
        start: one of STARTS.
        work: one of WORKS.
        folder: made by `make_files`.
        size: updates of training, new tokens of decoding.
        text: what is trained on; None is the standard library.
        cores: what the process may use.
    """
    updates, new = size
    model = str(folder / "model")
    if start != "command line":
        call = f"from benchmarks.model.busy_machine import child; child({start!r}, {work!r}, "
        call += f"{model!r}, {size!r}, {text and str(text)!r})"
        return float(json.loads(run([sys.executable, "-c", call], cores).splitlines()[-1]))
    command = [sys.executable, "-m", "nemotron_lite"]
    if work == "decoding":
        command += ["generate", "--model", model, "--prompt", PROMPT, "--temperature", "0"]
        command += ["--max-new-tokens", str(new), "--json", "--quiet"]
        (answer,) = (json.loads(line) for line in run(command, cores).splitlines())
        if answer["tokens"] != new:
            raise RuntimeError(f"generate wrote {answer['tokens']} tokens, expected {new}.")
        return float(answer["tokens_per_second"])
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command += ["train", "--init-from", model, "--steps", str(updates), "--out", f"{out}/run"]
        command += ["--quiet", *(["--text", str(text)] if text else [])]
        run(command, cores)
        log = (Path(out) / "run" / "log.jsonl").read_text().splitlines()
    return _median_speed([json.loads(line) for line in log])


def child(start: str, work: str, model: str, size: tuple[int, int], text: str | None) -> None:
    """Measure in this process, and print the tokens per second as JSON."""
    found: list[float] = []

    def measure_once() -> None:
        loaded = load(model)
        if work == "training":
            root = Path(text) if text else None
            data = prepare(vocab_size=loaded.config.vocab_size, root=root)
            config = TrainConfig(steps=size[0])
            found.append(_median_speed(train(loaded, data, config, progress=False).history))
            return
        started = time.perf_counter()
        written = generate(loaded, PROMPT, size[1], temperature=0.0, stop=(), return_details=True)
        found.append(len(written.tokens) / (time.perf_counter() - started))

    if start == "thread":
        openmp.watch_until_exit()
        thread = threading.Thread(target=measure_once)
        thread.start()
        thread.join()
    else:
        measure_once()
    print(json.dumps(found[0]))


def _median_speed(log: list[dict[str, Any]]) -> float:
    speeds = [entry["tokens_per_second"] for entry in log if "tokens_per_second" in entry]
    if len(speeds) <= FIRST_UPDATES:
        raise RuntimeError(f"{len(speeds)} updates: expected more than {FIRST_UPDATES}.")
    return statistics.median(speeds[FIRST_UPDATES:])


def compare(quiet: Callable[[], float], busy: Callable[[], float], rounds: int) -> dict[str, Any]:
    """Alternate two measurements: their tokens per second, and the shares within each round."""
    speeds: dict[str, list[float]] = {"quiet": [], "busy": []}
    for number in range(rounds):
        calls = [("quiet", quiet), ("busy", busy)]
        for name, call in calls if number % 2 == 0 else reversed(calls):
            speeds[name].append(call())
    shares = [b / q for q, b in zip(speeds["quiet"], speeds["busy"], strict=True)]
    entry: dict[str, Any] = {
        "tokens_per_second": {name: measure.summary(values) for name, values in speeds.items()},
        "share_of_quiet": measure.summary(shares),
        "aim": AIM,
    }
    return entry | {"reached": entry["share_of_quiet"]["median"] >= AIM}


def measure_all(
    config: NemotronConfig,
    starts: Sequence[str],
    works: Sequence[str],
    *,
    size: tuple[int, int],
    rounds: int,
    text: Path | None = None,
) -> list[dict[str, Any]]:
    """Every start and work, printed one by one."""
    cores, entries = two_cores(), []
    with tempfile.TemporaryDirectory(prefix="nemotron-lite-") as name:
        folder = Path(name)
        make_files(folder, config, text)
        for start in starts:
            for work in works:
                once = partial(speed, start, work, folder, size, text, cores)

                def busy(once: Callable[[], float] = once) -> float:
                    with neighbour(cores[0]):
                        return once()

                entry = {"what": work, "start": start, **compare(once, busy, rounds)}
                entries.append(entry)
                quiet, beside = (
                    entry["tokens_per_second"][name]["median"] for name in ("quiet", "busy")
                )
                share = entry["share_of_quiet"]["median"]
                print(
                    f"  {start}, {work}: {quiet:,.0f} tokens/s alone, {beside:,.0f} beside a "
                    f"neighbour, {share:.0%}",
                    flush=True,
                )
    return entries


def main(arguments: list[str] | None = None) -> None:
    """Measure. Writes `busy_machine_PROCESSOR.json`; --start adds the starts to the name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks busy_machine", allow_abbrev=False)
    parser.add_argument("--start", default=",".join(STARTS), help="some of " + ", ".join(STARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a trial: few tokens, no record")
    asked = parser.parse_args(arguments)
    starts = asked.start.split(",")
    for start in starts:
        if start not in STARTS:
            parser.error(f"{start!r} is not one of {', '.join(STARTS)}")
    config = NemotronConfig.from_preset("lite")
    size, rounds = ((5, 40), 1) if asked.quick else ((40, 1000), asked.rounds)
    entries = measure_all(config, starts, WORKS, size=size, rounds=rounds)
    if not asked.quick:
        names = "-".join(start.replace(" ", "_") for start in sorted(starts))
        suffix = "" if set(starts) == set(STARTS) else f"-{names}"
        payload = {
            "path": "`nemotron-lite train` and `generate`; `train` and `generate` of the package",
            "model": "lite", "parameters": Nemotron(config, device="meta").num_parameters(),
            "updates": size[0], "new_tokens": size[1], "results": entries,
        }  # fmt: skip
        print(write_record(f"busy_machine_{processor()}{suffix}", payload))


if __name__ == "__main__":
    main()
