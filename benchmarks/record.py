"""The record of a measurement: a figure is only useful if one knows where it comes from.

`write_record` writes the results of a benchmark to `benchmarks/records/<name>.json`, with the
machine, the versions, the command and the date. Every speed or memory figure in the texts of this
project comes from such a file. So each measurement states how often it was taken (n), the median
and the spread, and each record says which calls were measured (`path`).

The file is written under another name and then renamed, so that an interrupted run leaves the old
record complete.

Left out: the load of other programs on a shared machine, except for the load average at the time of
writing. Compare programs inside one record, not across records.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nemotron_lite.files import atomic_file
from nemotron_lite.provenance import describe_machine, versions

RECORDS = Path(__file__).parent / "records"
PACKAGES = ("torch", "transformers", "xllamacpp", "triton", "numpy", "einops")
SPREADS = ({"min", "max"}, {"q1", "q3"})  # either pair gives the spread


def write_record(name: str, payload: dict[str, Any]) -> Path:
    """Write `benchmarks/records/<name>.json`.

    Args:
        name: the record's file name without ".json".
        payload: results, as JSON allows them. "path" says in words which calls are measured, so
            that a reader can tell whether they are the ones a user makes. A dictionary with a
            "median" must also have "n" and a spread ("min" and "max", or "q1" and "q3").

    Returns:
        The path of the file.

    Raises:
        ValueError: a name that is no plain file name, a payload without "path", a median without
            its n or spread, or a number that is not finite; the message says where.
    """
    if not name or Path(name).name != name:
        raise ValueError(f"{name!r} is not the name of a record: expected a plain file name.")
    if not payload.get("path"):
        raise ValueError(f"{name} has no 'path': say in words which calls were measured.")
    faults = list(_faults(payload, name))
    if faults:
        raise ValueError("\n".join(faults))
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "machine": machine(),
        "versions": versions(PACKAGES),
        **payload,
    }
    RECORDS.mkdir(parents=True, exist_ok=True)
    path = RECORDS / f"{name}.json"
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    return path


def processor() -> str:
    """This processor as a part of a file name, such as "amd_epyc" or "intel_xeon".

    Speeds of a CPU differ between processors by more than a change of the program makes. So a
    record of such speeds has the processor in its name, and the tables show each processor.
    """
    words = re.findall(r"[a-z0-9]+", re.sub(r"\(.*?\)|@.*", " ", machine()["cpu"].lower()))
    return "_".join(word for word in words if word not in ("processor", "cpu"))


def machine() -> dict[str, Any]:
    """Processor, cores, threads, system, memory, how threads wait, load; and the GPU, if any."""
    return describe_machine() | {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "openmp": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "GOMP_", "KMP_"))
        },
        "ram_gib": _ram_gib(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _command() -> str:
    """The command line as typed, without the folders of this machine."""
    home = str(RECORDS.parents[1]) + os.sep
    words = ["python", *(word.replace(home, "") for word in sys.orig_argv[1:])]
    return shlex.join(f".../{Path(w).name}" if Path(w).is_absolute() else w for w in words)


def _faults(value: Any, place: str) -> Iterator[str]:
    """What is wrong in a payload, and where."""
    if isinstance(value, Mapping):
        keys = set(value)
        if "median" in keys and not ("n" in keys and any(pair <= keys for pair in SPREADS)):
            yield (
                f"{place} has a median but not both of n and a spread "
                f"(min and max, or q1 and q3); it has {', '.join(sorted(keys))}."
            )
        for key, item in value.items():
            yield from _faults(item, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _faults(item, f"{place}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place} is {value}: expected a finite number; write None for what failed."


def _ram_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
