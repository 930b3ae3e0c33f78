"""The model inside a wrapper of PyTorch: torch.compile, DistributedDataParallel and others.

A wrapper is a module around the model. It has no `config` and no `empty_cache`, so what works on a
`Nemotron` cannot work on it. Two kinds are told apart:

    computes the same     torch.compile, DistributedDataParallel, DataParallel, AveragedModel,
                          checkpointing of activations: the model inside can take its place
    spreads the weights   FSDP: each process has a part of them

A class is looked up only where its module was imported already: else there is no object of it.

Source: the wrappers' documentation in PyTorch 2.13. Left out: wrappers of other libraries. One that
has the attributes of the model inside, as peft's has, is used as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import nn

from nemotron_lite.config import NemotronConfig
from nemotron_lite.model import Nemotron

_COMPILED = ("torch._dynamo.eval_frame", "OptimizedModule")

# Wrappers that compute what the module inside computes: (module, class, name of the inside).
_WRAPPERS = (
    (*_COMPILED, "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.optim.swa_utils", "AveragedModel", "module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "CheckpointWrapper",
        "_checkpoint_wrapped_module",
    ),
)
_SHARDED = (
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
    ("torch.distributed.fsdp", "FSDPModule"),
)
GATHER = (
    "each process has a part of the weights. Gather them with get_model_state_dict(model, options="
    "StateDictOptions(full_state_dict=True, cpu_offload=True)) of "
    "torch.distributed.checkpoint.state_dict on every process; then, on the first one, load_state_"
    "dict(state, assign=True) into Nemotron(config), and {then}"
)


def wrappers(module: Any) -> Iterator[Any]:
    """The module, and then what is inside each wrapper that computes the same."""
    yield module
    for where, name, inside in _WRAPPERS:
        if _is_any(module, ((where, name),)):
            yield from wrappers(module._modules[inside])
            return


def unwrap(module: Any) -> Any:
    """The module inside all wrappers that compute the same; an object that is none stays."""
    *_, inside = wrappers(module)
    return inside


def is_sharded(module: object) -> bool:
    """Whether FSDP has spread the weights of this module."""
    return _is_any(module, _SHARDED)


def plain_model(model: object) -> Nemotron:
    """The model that can be asked for its config, its cache and its hidden states.

    Wrappers are left out, but what `torch.compile(model)` gave is called as it is.

    Raises:
        TypeError: something that is no model of this package, nor a wrapper around one.
    """
    if isinstance(model, Nemotron):
        return model
    inside = unwrap(model)
    if _is_any(model, (_COMPILED,)) and cast(nn.Module, model)._modules["_orig_mod"] is inside:
        inside = model
    if isinstance(model, type) or not isinstance(getattr(inside, "config", None), NemotronConfig):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model={kind}: expected a Nemotron.")
    return cast(Nemotron, inside)


def model_for_inference(model: object) -> Nemotron:
    """`plain_model`, for a caller that computes in inference mode.

    Raises:
        TypeError: as there.
        ValueError: the weights are spread by FSDP, which does not work in that mode.
    """
    found = plain_model(model)
    if "torch.distributed.fsdp" in sys.modules and any(map(is_sharded, found.modules())):
        raise ValueError(
            "the model is spread by FSDP, which cannot gather weights in inference mode: "
            f"{GATHER.format(then='use that')}."
        )
    return found


def _is_any(module: object, classes: Iterable[tuple[str, str]]) -> bool:
    for where, name in classes:
        kind = getattr(sys.modules.get(where), name, None)
        if isinstance(kind, type) and isinstance(module, kind):
            return True
    return False
