"""Weights on disk, in the layout of Hugging Face's `nemotron_h`: `load` and `save`.

    locations           the folder of a checkpoint: a path, or a model in the hub's cache
    names               the names of a tensor on disk and in the model
    weight_files        which weight files there are, and what their headers say
    modelopt            how quantized weights are stored, by NVIDIA's ModelOpt and others
    declaration         what a config file says about them, compared with what is stored
    modelopt_config     such files of ModelOpt
    compressed_tensors  such files of llm-compressor, and of plain FP8
    contents            all of this for one folder
    validation          finds all problems of a folder before weights are read
    companions          the small files that belong to the model
    tokenizer           tokenizer.json, and whether it fits the model
    loading             load: one tensor at a time, into a model that had no memory until then
    weight_dtypes       which dtype each weight gets
    weight_reading      the values of the tensors, cast or decoded
    file_source         weights of an offloaded model, read from the files at their use
    packed_loading      layers that keep them quantized
    saving              save: the hub's layout, in shards
    storage             how many bytes the weights take in which format
    errors              CheckpointError, which says everything that is wrong in a short message

Saving is atomic: `nemotron_lite/files.py` replaces a folder as a whole.
"""

from nemotron_lite.checkpoint.errors import CheckpointError
from nemotron_lite.checkpoint.loading import Offload, load, load_as
from nemotron_lite.checkpoint.saving import save
from nemotron_lite.checkpoint.storage import StorageRow, storage_summary, weight_bytes

__all__ = [
    "CheckpointError",
    "Offload",
    "StorageRow",
    "load",
    "load_as",
    "save",
    "storage_summary",
    "weight_bytes",
]
