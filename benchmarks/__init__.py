"""Measurements against the best peers, each of which leaves a record; `python -m benchmarks`."""
