"""Run the benchmarks: `python -m benchmarks`, or one of them with its options.

    python -m benchmarks                              several hours on two cores
    python -m benchmarks --quick                      the same on tiny sizes, without records
    python -m benchmarks model_speed --size S --only decode
    python -m benchmarks growth --peer-limit 8192

Some run only when they are named, because they need more than this package and time:

    python -m benchmarks cpu_peers --size M --long    llama.cpp, from the package xllamacpp
    python -m benchmarks quality_per_flop             hours; it continues where it stopped
    python -m benchmarks busy_machine                 Linux, and two cores that nothing else uses
    python -m benchmarks full_size                    all 88 layers of Super
    python -m benchmarks gpu_model                    a GPU
    python -m benchmarks figures                      rewrites docs/benchmarks.md and README.md

Each writes records under benchmarks/records (machine, versions, command, n, median, spread). After
all of them the figures of docs/benchmarks.md and README.md are written from the records. On a
machine that others use too, trust the ratios between programs that ran alternately more than the
seconds.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module

BENCHMARKS = (
    "ssd_operator",
    "model_speed",
    "prefill_profile",
    "growth",
    "speculation",
    "nvfp4_training",
    "nvfp4_checkpoints",
    "float16_states",
    "removal",
    "router_statistics",
)
BY_NAME = (
    "quality_per_flop", "cpu_peers", "busy_machine", "full_size", "gpu_model", "figures",
)  # fmt: skip


def main(arguments: list[str]) -> None:
    """Run the named benchmark, or all of BENCHMARKS with the same options."""
    if arguments and not arguments[0].startswith("-"):
        name, *options = arguments
        if name not in (*BENCHMARKS, *BY_NAME):
            known = ", ".join((*BENCHMARKS, *BY_NAME))
            sys.exit(f"there is no benchmark {name!r}; expected one of {known}.")
        names: tuple[str, ...] = (name,)
    elif set(arguments) & {"-h", "--help"}:
        print(__doc__)
        return
    else:
        names, options = BENCHMARKS, arguments
        if set(options) - {"--quick"}:
            sys.exit(
                f"{' '.join(options)}: name the benchmark first; without a name only --quick works."
            )
        names = names if options else (*names, "figures")
    for name in names:
        started = time.perf_counter()
        print(f"== {name}", flush=True)
        import_module(f"benchmarks.{'' if name == 'figures' else 'model.'}{name}").main(options)
        print(f"== {name} took {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
