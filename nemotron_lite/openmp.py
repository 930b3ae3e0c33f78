"""Idle threads of OpenMP give their core back: one environment variable, set before torch loads.

torch's products run on several threads. Between two products the threads wait for the next one in a
loop ("they spin"), because that is the fastest way to notice it. Where another program uses a core
too, a spinning thread takes time from a thread that has work, and all others wait for that one:
training becomes many times slower. `GOMP_SPINCOUNT` is how many rounds a thread spins before it
sleeps; GNU OpenMP's own choice is 300,000. We set 2,000: long enough for the gap between two
operations, short enough for a machine that is shared.

GNU OpenMP reads the variable once, when `import torch` loads it. So the commands and
`nemotron_lite.course` call this when they are imported; in a program that imports torch first it
only reaches the processes that are started later. A value that the user set stays.
"""

from __future__ import annotations

import os

ROUNDS = "2000"


def let_idle_threads_sleep() -> None:
    """Set `GOMP_SPINCOUNT`, unless it is set."""
    os.environ.setdefault("GOMP_SPINCOUNT", ROUNDS)
