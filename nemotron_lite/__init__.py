"""Nemotron 3 Super in files small enough to read: build it, train it, load it, generate with it.

    from nemotron_lite import Nemotron, NemotronConfig, generate

    model = Nemotron(NemotronConfig.from_preset("lite"))

The names below are the public interface. What the modules are for, from the ground up:

    config, hf_config   the sizes of a model, and its `config.json`
    arguments           integers and numbers that a caller gives
    input_files         small files that anybody may have written
    shipped_models      the models that come with the package
    progress            how far a long computation is: a bar, or lines in a file
    openmp              threads that wait, on a machine that others use too
    backends            fast implementations of the operations, and the choice between them
    ops                 the operations as pure functions, one idea a file
    layers              modules over ops
    ledger              the arithmetic of a config: parameters, FLOPs, cache bytes
    model, cache        the whole model, and what a sequence remembers
    backbone, outputs   the stack of layers, and what a call of the model returns
    cache_file          what is checked before a saved cache is used
    input_checks        checks of the arguments of a call of the model
    finite              where NaN or infinity began
    wrappers            the model inside torch.compile, DistributedDataParallel and others
    checkpoint          reading and writing Hugging Face files, ModelOpt's quantized ones too
    quantization        a trained model in 4 and 8 bits per weight
    offload             models larger than the memory: weights fetched when they are used
    generation          writing text: prompts, sampling, speculative decoding
    export              files for other programs: GGUF, which llama.cpp runs
    data, train         corpora and batches; the training loop
    course, coursework  what the chapters call; handing out and grading exercises
    authoring           publishing and checking the chapters
    cli                 the commands

A name is imported when it is first used (PEP 562). So `import nemotron_lite` takes next to no time,
and a program that only reads a config does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemotron_lite import layers, ledger, ops, train
    from nemotron_lite.cache import Cache
    from nemotron_lite.checkpoint import CheckpointError, load, save
    from nemotron_lite.config import ConfigError, NemotronConfig
    from nemotron_lite.generation.chat import Chat
    from nemotron_lite.generation.generate import generate, stream
    from nemotron_lite.generation.options import GenerationOptions, SpeculationOptions
    from nemotron_lite.generation.results import GenerationResult
    from nemotron_lite.generation.score import Score, score
    from nemotron_lite.model import Nemotron

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "Chat",
    "CheckpointError",
    "ConfigError",
    "GenerationOptions",
    "GenerationResult",
    "Nemotron",
    "NemotronConfig",
    "Score",
    "SpeculationOptions",
    "__version__",
    "generate",
    "layers",
    "ledger",
    "load",
    "ops",
    "save",
    "score",
    "stream",
    "train",
]

_MODULE_OF = {
    "CheckpointError": "checkpoint",
    "ConfigError": "config",
    "Nemotron": "model",
    "NemotronConfig": "config",
    "Cache": "cache",
    "Chat": "generation.chat",
    "GenerationOptions": "generation.options",
    "GenerationResult": "generation.results",
    "Score": "generation.score",
    "SpeculationOptions": "generation.options",
    "generate": "generation.generate",
    "load": "checkpoint",
    "save": "checkpoint",
    "score": "generation.score",
    "stream": "generation.generate",
}
_MODULES = ("layers", "ledger", "ops", "train")


def __getattr__(name: str) -> Any:
    """Import a public name on its first use; afterwards it is an ordinary attribute."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _MODULE_OF:
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"nemotron_lite has no {name!r}; its public names are {__all__}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
