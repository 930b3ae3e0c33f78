"""Nemotron 3 Super in rooms small enough to read: build it, train it, load it, write with it.

    from nemotron_lite import Nemotron, NemotronConfig, generate

    model = Nemotron(NemotronConfig.from_preset("lite"))

The public names below are the whole front door; everything else is a room behind it:

    config, hf_config   what a model is, and its `config.json`
    ledger              the arithmetic of a config: parameters, FLOPs, cache bytes
    ops                 pure functions, one idea a file
    layers              modules over ops
    model, state        the stack of layers, and what a sequence remembers
    arguments           what a call of the model must look like
    generation          writing text; prompts, sampling: what it starts from and how it chooses
    speculative         drafts of several tokens, exactly accepted
    checkpoint          Hugging Face files in and out, ModelOpt's quantized ones too
    quantize            a trained model in 4 and 8 bits a weight
    train, cli          the training loop and the commands

Names are imported when they are first used (PEP 562), so `import nemotron_lite` costs next to
nothing and a reader who wants a config's arithmetic does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemotron_lite import layers, ledger, ops, train
    from nemotron_lite.cache import Cache
    from nemotron_lite.checkpoint import CheckpointError, load, save
    from nemotron_lite.config import ConfigError, NemotronConfig
    from nemotron_lite.generation.decoding import generate, stream
    from nemotron_lite.generation.options import GenerationOptions, SpeculationOptions
    from nemotron_lite.model import Nemotron

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "CheckpointError",
    "ConfigError",
    "GenerationOptions",
    "Nemotron",
    "NemotronConfig",
    "SpeculationOptions",
    "__version__",
    "generate",
    "layers",
    "ledger",
    "load",
    "ops",
    "save",
    "stream",
    "train",
]

_ROOM_OF = {
    "CheckpointError": "checkpoint",
    "ConfigError": "config",
    "Nemotron": "model",
    "NemotronConfig": "config",
    "Cache": "cache",
    "GenerationOptions": "generation.options",
    "SpeculationOptions": "generation.options",
    "generate": "generation.decoding",
    "load": "checkpoint",
    "save": "checkpoint",
    "stream": "generation.decoding",
}
_ROOMS = ("layers", "ledger", "ops", "train")


def __getattr__(name: str) -> Any:
    """Import a public name on its first use; afterwards it is an ordinary attribute."""
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name in _ROOM_OF:
        value = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"nemotron_lite has no {name!r}; its public names are {__all__}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
