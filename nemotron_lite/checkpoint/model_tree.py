"""Which tensors of a model are saved, and whether they are all of it.

A file holds tensors by name. So what is written is the model only if `load` builds the same modules
around these tensors. A training program may have changed them:

    wrapped      torch.compile, DistributedDataParallel, an average of weights, checkpointing of
                 activations: names get a prefix, and what is computed stays the same
    replaced     a linear layer with an adapter (LoRA), a parametrized weight, a quantized layer
                 of another library: the module computes more than its `weight` says
    spread       FSDP, tensor parallelism: this process has a part of each weight
    changed      a module, a parameter or a layer was added, removed, renamed or resized

Wrappers of the first kind are looked through, at any depth. Everything else is a problem, which
names the modules and the way out. Two names for one tensor (tied weights) are no problem: it is
written twice, and the loaded model computes the same.

The comparison is with the model that `load` builds from `model.config`, made on the meta device.

Source: the wrappers' documentation in PyTorch 2.13. Left out: hooks and patched methods, which are
no part of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nemotron_lite.checkpoint.errors import shorten
from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers import BiasedLinear
from nemotron_lite.model import Nemotron
from nemotron_lite.offload import Offloaded
from nemotron_lite.quantization.packed_layers import (
    LinearWithKVScale,
    PackedWeight,
    stored_tensors,
)
from nemotron_lite.wrappers import GATHER, is_sharded, unwrap

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_GATHER = GATHER.format(then="save that")


@dataclass
class ModelTree:
    """The modules and tensors of a model under the names that `load` knows.

    Attributes:
        model: without wrappers.
        modules: every module without wrappers, by name.
        tensors: parameters and persistent buffers, by name; they share memory with the model.
        problems: why it cannot be saved, one sentence each.
    """

    model: Nemotron
    modules: dict[str, nn.Module] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def packed(self) -> dict[str, PackedWeight]:
        """The packed weights, by name."""
        return {n: m for n, m in self.modules.items() if isinstance(m, PackedWeight)}


def read_tree(model: object, *, offloaded: bool = False) -> ModelTree:
    """All that would be saved of a model, and the reasons why it cannot be.

    Args:
        offloaded: accept an offloaded model, whose tensors are on meta and are fetched with `read`.

    Raises:
        TypeError: `model` is no Nemotron, nor a known wrapper around one.
    """
    sharded = [name for name, module in _modules_of(model) if is_sharded(module)]
    inside = unwrap(model)
    if not isinstance(inside, Nemotron):
        if sharded and (found := [m for _, m in _modules_of(model) if isinstance(m, Nemotron)]):
            return ModelTree(found[0], problems=[f"the model is wrapped by FSDP: {_GATHER}"])
        raise TypeError(_not_a_model(inside))
    tree = ModelTree(inside)
    if sharded:
        names = shorten(name or "the model" for name in sharded)
        tree.problems.append(f"{names}: {_GATHER}")
        return tree
    _walk(tree, inside, "", ())
    if isinstance(inside, Offloaded):
        if not offloaded:
            tree.problems.append(
                "the weights of an offloaded model are not in memory: load it without offload=True"
            )
    else:
        tree.problems += _wrong_tensors(tree.tensors, tree.packed)
    config: object = inside.config
    if isinstance(config, NemotronConfig):
        tree.problems += _differences(tree, _reference(config))
    else:
        kind = type(config).__name__
        tree.problems.append(f"model.config is a {kind}; expected a NemotronConfig")
    return tree


def _modules_of(model: object) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules()) if isinstance(model, nn.Module) else []


def _not_a_model(found: object) -> str:
    kind = found.__name__ if isinstance(found, type) else type(found).__name__
    what = f"the class {kind}" if isinstance(found, type) else f"a {kind}"
    if callable(getattr(found, "merge_and_unload", None)):
        advice = "Merge the adapter and save the result: save(model.merge_and_unload(), path)"
    elif inside := [name for name, each in _modules_of(found) if isinstance(each, Nemotron)]:
        advice = (
            f'Its submodule {inside[0]!r} is one: save(model.get_submodule("{inside[0]}"), path) '
            "saves that, and not what is around it"
        )
    elif isinstance(found, Mapping):
        advice = "Load a dict of tensors into a model first: model.load_state_dict(tensors)"
    else:
        advice = "A model of another library has its own way to save"
    return f"model is {what}; expected a Nemotron. {advice}."


def _walk(tree: ModelTree, module: nn.Module, name: str, above: tuple[int, ...]) -> None:
    """Note a module, its tensors and all modules inside it."""
    module = unwrap(module)
    if id(module) in above:
        tree.problems.append(f"{name} is a module that holds itself: remove that attribute")
        return
    tree.modules[name] = module
    prefix = f"{name}." if name else ""
    if parametrize.is_parametrized(module):
        leaf = next(iter(module.parametrizations))  # type: ignore[arg-type]
        tree.problems.append(
            f"{prefix}{leaf} is parametrized: it is computed from other tensors. Write its value "
            "into the module first: torch.nn.utils.parametrize.remove_parametrizations("
            f'model.get_submodule("{name}"), "{leaf}")'
        )
    own = {**module._parameters, **module._buffers}
    for leaf, tensor in own.items():
        if tensor is not None and leaf not in module._non_persistent_buffers_set:
            tree.tensors[f"{prefix}{leaf}"] = tensor
    for leaf, inner in module._modules.items():
        if inner is not None and inner is not getattr(module, "parametrizations", None):
            _walk(tree, inner, f"{prefix}{leaf}", (*above, id(module)))


def _wrong_tensors(tensors: Mapping[str, Tensor], packed: Mapping[str, PackedWeight]) -> list[str]:
    """Tensors whose values cannot be read from memory, or not be written to a file."""
    plain = {name: tensor for name, tensor in tensors.items() if _is_plain(tensor)}
    others = [f"{n} ({type(t).__name__})" for n, t in tensors.items() if n not in plain]
    empty = [name for name, tensor in plain.items() if tensor.is_meta]
    unsupported = [
        f"{name} ({tensor.dtype})"
        for name, tensor in plain.items()
        if tensor.dtype not in DTYPES and name.rpartition(".")[0] not in packed
    ]
    freed = [name for name, tensor in plain.items() if _is_freed(tensor)]
    problems = []
    if others:
        problems.append(
            f"{len(others)} tensors are of a class whose values cannot be written: "
            f"{shorten(others)}. Expected torch.Tensor and torch.nn.Parameter: convert them (a "
            "DTensor with full_tensor(), a quantized one by loading the original)"
        )
    if empty:
        problems.append(
            f"the model has no weights: {len(empty)} tensors are on the meta device, such as "
            f"{empty[0]}. Create it on a real device, or load a checkpoint"
        )
    if freed:
        problems.append(
            f"the memory of {len(freed)} tensors was freed: {shorten(freed)}. Bring the weights "
            "back first"
        )
    if unsupported:
        problems.append(
            f"{len(unsupported)} tensors have a dtype that cannot be saved, such as "
            f"{shorten(unsupported)}; expected one of {', '.join(map(str, DTYPES))}"
        )
    return problems


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


def _is_freed(tensor: Tensor) -> bool:
    """Whether the storage is shorter than the tensor, as after `storage.resize_(0)`."""
    if tensor.is_meta or not tensor.numel():
        return False
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.untyped_storage().nbytes() < size


class _Reference(NamedTuple):
    """The model that `load` builds: the class of each module, and the shape of each tensor."""

    classes: Mapping[str, type[nn.Module]]
    shapes: Mapping[str, tuple[int, ...]]


@lru_cache(maxsize=1)  # a run saves the same model again and again
def _reference(config: NemotronConfig) -> _Reference:
    model = Nemotron(config, device="meta")
    return _Reference(
        MappingProxyType({name: type(module) for name, module in model.named_modules()}),
        MappingProxyType({n: tuple(tensor.shape) for n, tensor in model.state_dict().items()}),
    )


def _differences(tree: ModelTree, reference: _Reference) -> list[str]:
    """What differs from the model that `load` would build."""
    classes = reference.classes
    replaced = {
        name: module
        for name, module in tree.modules.items()
        if name and name in classes and not _computes_the_same(module, classes[name])
    }
    problems = []
    if replaced:
        # An adapter is often called Linear too, so the whole name of its class is shown.
        described = shorten(
            (
                f"{name} ({type(each).__module__}.{type(each).__qualname__}, expected "
                f"{classes[name].__name__})"
                for name, each in replaced.items()
            ),
            limit=4,
        )
        problems.append(
            f"{len(replaced)} modules were replaced by others, which may compute something else: "
            f"{described}. Merge an adapter into the weight and put the original module back (with "
            "peft: model.merge_and_unload()). Weights alone can be saved from a new model: "
            "plain = Nemotron(model.config); plain.load_state_dict(...)"
        )
    expected = _expected(tree, reference.shapes)
    inside = tuple(f"{name}." for name in replaced)  # named already
    found = {n: tuple(t.shape) for n, t in tree.tensors.items()}
    added = [n for n in found if n not in expected and not n.startswith(inside)]
    missing = [n for n in expected if n not in found and not n.startswith(inside)]
    missing = [n for n in missing if not _is_parametrized_weight(tree, n)]
    resized = [
        f"{name} {list(found[name])} for {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape and not name.startswith(inside)
    ]
    if added:
        problems.append(
            f"{len(added)} tensors are in the model, but not in one that its config describes: "
            f"{shorten(added)}. Remove these modules or parameters, or merge them into the weights "
            "(an adapter), and save them separately if they are needed"
        )
    if missing:
        problems.append(
            f"{len(missing)} tensors that the config describes are not in the model: "
            f"{shorten(missing)}. {_advice_for_missing(missing)}"
        )
    if resized:
        problems.append(
            f"{len(resized)} tensors have another shape than the config says (found for expected): "
            f"{shorten(resized)}. Set model.config to what the model is now: model.config.replace()"
        )
    return problems


def _is_parametrized_weight(tree: ModelTree, name: str) -> bool:
    above, _, leaf = name.rpartition(".")
    module = tree.modules.get(above)
    return module is not None and parametrize.is_parametrized(module, leaf)


def _computes_the_same(module: nn.Module, expected: type[nn.Module]) -> bool:
    """Whether `load` would build this class, or one of this package computes with its tensors."""
    kind = type(module)
    if parametrize.is_parametrized(module):  # named already
        return True
    if kind is expected or kind.__module__.partition(".")[0] == __package__.partition(".")[0]:
        return True
    return (
        kind is nn.Linear
        and issubclass(expected, nn.Linear)
        and (module.bias is not None) == issubclass(expected, BiasedLinear)
    )


def _expected(
    tree: ModelTree, plain_shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, where packed layers have others than plain ones."""
    shapes = dict(plain_shapes)
    for name, packed in tree.packed.items():
        plain = name if name in shapes else f"{name}.weight"
        shape = shapes.pop(plain, packed.shape)
        stored = stored_tensors(packed.format, shape)
        present = packed.tensors()
        shapes |= {f"{name}.{leaf}": size for leaf, (size, _) in stored.items() if leaf in present}
    for name, module in tree.modules.items():
        if isinstance(module, LinearWithKVScale):
            shapes |= {f"{name}.{leaf}": () for leaf in module._buffers}
    return shapes


def _advice_for_missing(names: list[str]) -> str:
    if all(name.startswith("mtp.") for name in names):
        return (
            'To save without MTP: model.config = model.config.replace(mtp_pattern="", mtp_depths=0)'
        )
    return "Put them back, or set model.config to what the model is now: model.config.replace()"
