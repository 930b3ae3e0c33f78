"""Benchmarks of the Triton kernels: compiled for every GPU, checked and timed on one.

    python -m benchmarks.kernels.aot          compile all cases; compare with the snapshot
    python -m benchmarks.kernels.device       on a GPU: check every case, then time it
    python -m benchmarks.kernels.warm         compile everything that a device run will launch
    python -m benchmarks.kernels.catalogue    write the tables of kernels/README.md

Run them in the root of the checkout. `nemotron_kernels` lies one folder deeper than the other
packages, so its folder is added to the search path here; a checkout that was not installed works
as well.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if str(ROOT / "kernels") not in sys.path:
    sys.path.insert(0, str(ROOT / "kernels"))
