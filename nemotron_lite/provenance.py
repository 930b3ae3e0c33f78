"""Where a measurement comes from: the machine, and the versions of Python and of packages.

Every record has both: those of benchmarks, the shipped model's record.json, and results of grading.

Left out: the load of other programs, and everything that names a person or a folder.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch

from nemotron_lite.backends.private_torch import CPUINFO
from nemotron_lite.input_files import FileError, read_text


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads and system; and the GPU, if there is one."""
    found: dict[str, Any] = {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        lines = read_text(CPUINFO).splitlines()
    except (FileNotFoundError, FileError):
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The version of Python, as "python", and of packages; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
