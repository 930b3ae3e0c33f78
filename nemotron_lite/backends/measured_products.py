"""Which library multiplies float32 matrices fastest on this CPU, found by measuring once.

    library      what it is
    mkl          PyTorch's own choice: `F.linear`
    onednn       oneDNN, which PyTorch carries as well
    prepacked    oneDNN with a copy of the matrix in its own layout

No rule about the CPU's vendor or its instructions says which is faster: that depends on the number
of rows, on the size of the matrix, on the number of threads and on the versions of the libraries.
So each combination of a class of rows and a class of sizes is measured, in about half a second. The
times are kept in a file per machine, number of threads and version of PyTorch, and every later
process reads them: a run that is repeated on one machine gives the same bits. The same file says
whether products of BF16 matrices are faster than those of float32.

The file is `products-....json` in the folder of prepared texts. Delete it to measure again. With
`NEMOTRON_LITE_MEASURE=0` nothing is measured or read, and PyTorch chooses. Where the file cannot be
written, each process measures for itself, and a repeated run may differ by rounding.

The measurement runs in a thread of its own. So it does not see what is set in the thread that asks:
autocast, inference mode, a default device, or fake tensors.

Source: measured. Left out: bias, other dtypes, and shapes that are far from square.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_lite.backends import private_torch
from nemotron_lite.files import atomic_file, cache_folder
from nemotron_lite.input_files import FileError, read_json

_log = logging.getLogger(__name__)

VARIABLE = "NEMOTRON_LITE_MEASURE"
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)  # a class reaches up to its number; the last has no end
SIZES = tuple(2**power for power in range(14, 23))  # numbers in the matrix, in the same way
LIBRARIES = ("mkl", "onednn", "prepacked")
GAIN = 1.1  # how much faster another library must be to take the place of PyTorch's own choice
BF16_GAIN = 1.5  # the same for BF16, whose casts take time too
ROUNDS, ROUND_SECONDS = 3, 4e-4  # of each measurement; the shortest round counts
FORMAT = 1


@dataclass(frozen=True)
class Choices:
    """What was measured, as answers by class.

    Attributes:
        onednn: by class of rows and of sizes, whether oneDNN multiplies a plain matrix faster.
        prepacked: the same for a copy in oneDNN's layout, compared with the better of the others.
        bf16: how many times faster BF16 is than float32, for a large product.
    """

    onednn: tuple[tuple[bool, ...], ...]
    prepacked: tuple[tuple[bool, ...], ...]
    bf16: float


_NOTHING = (tuple((False,) * len(SIZES) for _ in ROWS),) * 2
_known: dict[int, Choices] = {}  # by number of threads
_lock = threading.Lock()


def row_class(rows: int) -> int:
    """The place of a number of rows in `ROWS`."""
    power = max(0, rows - 1).bit_length()
    return power if power < 7 else 7


def size_class(numel: int) -> int:
    """The place of a number of matrix entries in `SIZES`."""
    power = max(0, numel - 1).bit_length()
    return min(max(power - 14, 0), len(SIZES) - 1)


def choices() -> Choices:
    """Those of this machine and of PyTorch's present number of threads."""
    threads = torch.get_num_threads()
    found = _known.get(threads)
    if found is None:
        with _lock:
            found = _known.get(threads)
            if found is None:
                found = _known[threads] = _find(threads)
    return found


def prefers_onednn(rows: int, numel: int) -> bool:
    """Whether oneDNN multiplies this many rows with a matrix of this size faster."""
    return choices().onednn[row_class(rows)][size_class(numel)]


def prefers_prepacked(rows: int, numel: int) -> bool:
    """The same for a copy of the matrix in oneDNN's layout."""
    return choices().prepacked[row_class(rows)][size_class(numel)]


def prefers_bf16(device: torch.device) -> bool:
    """Whether BF16 products are clearly faster than float32 ones; on a GPU they are."""
    if device.type != "cpu":
        return True
    if not _measures():
        return private_torch.has_bf16_instructions()
    return choices().bf16 >= BF16_GAIN


def _measures() -> bool:
    wanted = os.environ.get(VARIABLE, "1")
    if wanted not in ("0", "1"):
        raise ValueError(f"{VARIABLE}={wanted!r}: expected 1 (measure once) or 0 (do not).")
    return wanted == "1"


def _find(threads: int) -> Choices:
    if not _measures() or not private_torch.HAS_ONEDNN_LINEAR:
        return Choices(*_NOTHING, bf16=0.0)
    file = _file(threads)
    times = None if file is None else _read(file)
    if times is None:
        times = _measure_in_a_thread(threads)
        times = _keep(file, times)
    return _decide(times)


def _decide(times: Mapping[str, Any]) -> Choices:
    own, onednn, prepacked = (times[library] for library in LIBRARIES)
    cells = [[*zip(*rows, strict=True)] for rows in zip(own, onednn, prepacked, strict=True)]
    return Choices(
        onednn=tuple(tuple(b * GAIN <= a for a, b, _ in row) for row in cells),
        prepacked=tuple(tuple(c * GAIN <= min(a, b) for a, b, c in row) for row in cells),
        bf16=float(times["bf16"]),
    )


def _file(threads: int) -> Path | None:
    """Where the times of this machine are kept; None if there is no such place."""
    folder = cache_folder()
    if folder is None:
        return None
    machine = [private_torch.cpu_name(), os.cpu_count(), platform.machine()]
    parts = [FORMAT, machine, threads, torch.__version__, ROWS, SIZES]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return folder / f"products-{key}.json"


def _read(file: Path) -> dict[str, Any] | None:
    """The times in a file; None if there is none, or if it is damaged."""
    try:
        content = read_json(file)
    except (FileNotFoundError, FileError, ValueError):
        return None
    return content if _is_complete(content) else None


def _is_complete(content: Any) -> bool:
    def time_like(value: Any) -> bool:
        return type(value) is float and math.isfinite(value) and value > 0

    if not isinstance(content, dict) or not time_like(content.get("bf16")):
        return False
    for library in LIBRARIES:
        table = content.get(library)
        if not isinstance(table, list) or len(table) != len(ROWS):
            return False
        for row in table:
            if not isinstance(row, list) or len(row) != len(SIZES) or not all(map(time_like, row)):
                return False
    return True


def _keep(file: Path | None, times: dict[str, Any]) -> dict[str, Any]:
    """Write the times, unless another process was faster; then take its times."""
    if file is None:
        return times
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if (other := _read(file)) is not None:
            return other
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps(times))
    except OSError as error:
        _log.warning(
            "%s cannot be written (%s): every process measures again which library multiplies "
            "fastest, and repeated runs may differ by rounding. %s=0 turns this off.",
            file, error.strerror or error, VARIABLE,
        )  # fmt: skip
    return times


def _measure_in_a_thread(threads: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with torch.inference_mode():
                found.update(measure())
        except BaseException as error:  # raised again by the caller
            errors.append(error)

    started = time.perf_counter()
    thread = threading.Thread(target=run, name="measured products")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    seconds = time.perf_counter() - started
    _log.info("measured the matrix products of %d threads in %.1f s", threads, seconds)
    return found


def measure() -> dict[str, Any]:
    """Seconds of each library by class of rows and sizes, and how much faster BF16 is."""
    times: dict[str, Any] = {library: [[] for _ in ROWS] for library in LIBRARIES}
    for size in SIZES:
        inputs = 2 ** (size.bit_length() // 2)
        weight = torch.ones(size // inputs, inputs, dtype=torch.float32, device="cpu")
        packed = private_torch.onednn_reorder(weight)
        for number, rows in enumerate(ROWS):
            x = torch.ones(rows, inputs, dtype=torch.float32, device="cpu")
            found = _shortest(
                partial(F.linear, x, weight),
                partial(private_torch.onednn_linear, x, weight),
                partial(private_torch.onednn_linear, x, packed),
            )
            for library, seconds in zip(LIBRARIES, found, strict=True):
                times[library][number].append(seconds)
    wide = torch.ones(512, 512, dtype=torch.float32, device="cpu")
    narrow = wide.bfloat16()
    slow, fast = _shortest(partial(F.linear, wide, wide), partial(F.linear, narrow, narrow))
    return {**times, "bf16": slow / fast}


def _shortest(*calls: Callable[[], Tensor]) -> list[float]:
    """The time of each call, from its shortest round; the calls take turns."""
    best, repeats = [], []
    for call in calls:
        call()  # prepares what a first call prepares
        started = time.perf_counter()
        call()
        best.append(time.perf_counter() - started)
        repeats.append(max(1, min(50, round(ROUND_SECONDS / max(best[-1], 1e-7)))))
    for _ in range(ROUNDS):
        for number, call in enumerate(calls):
            started = time.perf_counter()
            for _ in range(repeats[number]):
                call()
            seconds = (time.perf_counter() - started) / repeats[number]
            best[number] = min(best[number], seconds)
    return best
