"""Weights on disk, in the layout of Hugging Face's `nemotron_h`: `load`, `save`, `contents`.

The rooms behind them:

    names       what a tensor is called on disk and in the model
    inventory   what a folder holds, and everything that is wrong with it, before anything is read
    reader      load: one tensor at a time into a model that had no memory until then
    writer      save: the hub's layout, in shards
    atomic      a folder that appears whole or not at all
    contents    what a folder holds in which format, in how many bytes
"""

from nemotron_lite.checkpoint.reader import load
from nemotron_lite.checkpoint.storage import StoredGroup, storage_report, weight_bytes
from nemotron_lite.checkpoint.validation import CheckpointError
from nemotron_lite.checkpoint.writer import save

__all__ = ["CheckpointError", "StoredGroup", "load", "save", "storage_report", "weight_bytes"]
