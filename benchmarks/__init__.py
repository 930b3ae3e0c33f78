"""Measurements beside the best peers; each writes a record. Run them by `python -m benchmarks`."""
