"""Weights on disk, in the layout of Hugging Face's `nemotron_h`: `load` and `save`.

    names            the names of a tensor on disk and in the model
    validation       reads headers and finds all problems of a folder before weights are read
    modelopt         how NVIDIA's ModelOpt stores quantized weights
    modelopt_config  what ModelOpt's config files say about them
    loading          load: one tensor at a time, into a model that had no memory until then
    saving           save: the hub's layout, in shards
    storage          how many bytes the weights take in which format

Saving is atomic: `nemotron_lite/files.py` replaces a folder as a whole.
"""

from nemotron_lite.checkpoint.loading import load, load_as
from nemotron_lite.checkpoint.saving import save
from nemotron_lite.checkpoint.storage import StorageRow, storage_summary, weight_bytes
from nemotron_lite.checkpoint.validation import CheckpointError

__all__ = [
    "CheckpointError",
    "StorageRow",
    "load",
    "load_as",
    "save",
    "storage_summary",
    "weight_bytes",
]
