"""The names of a tensor: in the model, on the hub, and in files that other programs wrote.

The model uses the hub's names, so most tensors have the same name everywhere but for a prefix:

    backbone.layers.3.mixer.in_proj.weight        the hub, and here
    model.layers.3.mixer.in_proj.weight           transformers 5, in memory
    model.backbone.layers.3.mixer.in_proj.weight  wrapped in one more module by a training program
    language_model.backbone.layers.3....          the text model inside a multimodal release

Routed experts are the exception. The hub stores two matrices per expert, which are 2 x 512 small
tensors in every mixture layer of Super. To multiply them, one stacked tensor is better:

    disk     backbone.layers.1.mixer.experts.{e}.up_proj.weight     [f l] each
    model    backbone.layers.1.mixer.experts.up_proj                [e f l]

transformers 5 stacks them in memory under the same name, and can save them like that. Here both are
read, and the hub's names are written. A quantized (packed) stack is a module with several tensors.
Each of them is stored expert by expert: `experts.up_proj.weight_scale` becomes
`experts.{e}.up_proj.weight_scale`. `mtp.*` and `lm_head.weight` have no prefix in any naming, but
for that of a multimodal release.

Source: reference sheet 10.1; the conversion table of transformers 5.23 and its `nemotron_h_omni`.
Left out: the names inside vLLM and Megatron, which do not save this format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Of the text model in a multimodal release. The name of each tensor begins with one of them.
TEXT_PREFIXES = ("model.language_model.", "language_model.")
# Longest first: "model.backbone." also starts with "model.".
PREFIXES = ("model.backbone.", "backbone.", "model.")

_ONE_EXPERT = re.compile(r"(.+\.mixer\.experts)\.([0-9]{1,9})\.(up_proj|down_proj)\.weight")
_ALL_EXPERTS = re.compile(r".+\.mixer\.experts\.(up_proj|down_proj)")
_PACKED_EXPERTS = re.compile(
    r"(.+\.mixer\.experts)\.((?:up|down)_proj\.(?:weight|weight_scale|weight_scale_2|input_scale))"
)


class Destination(NamedTuple):
    """Where a tensor of a file is loaded to: a tensor of the model, or one expert's slice of it."""

    name: str  # key of the model's state_dict
    expert: int | None = None


def destination_of(disk_name: str) -> Destination:
    """Where a tensor called `disk_name` in a file is loaded to, for all spellings above.

    An unknown name is returned unchanged. The caller has to check that the model has this tensor.
    """
    name, prefix = without_prefix(disk_name)
    if prefix:
        name = "backbone." + name
    if match := _ONE_EXPERT.fullmatch(name):
        return Destination(f"{match[1]}.{match[3]}", int(match[2]))
    return Destination(name)


def without_prefix(name: str) -> tuple[str, str]:
    """A name without what programs write before `layers.`, and the prefix of the backbone, if any.

    >>> without_prefix("language_model.backbone.layers.3.mixer.in_proj")
    ('layers.3.mixer.in_proj', 'backbone.')
    >>> without_prefix("lm_head")
    ('lm_head', '')
    """
    if name.startswith(TEXT_PREFIXES):
        name = name.partition("language_model.")[2]
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix), prefix
    return name, ""


def is_mtp(disk_name: str) -> bool:
    """Whether a tensor of a file belongs to the MTP module."""
    return "mtp." in disk_name and destination_of(disk_name).name.startswith("mtp.")


def split_multimodal(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The names of the text model's tensors in a multimodal release, and the names of the others.

    Released ones write `language_model.` before the names of the text model. Where no name has this
    prefix, the text model is what has the names of a text model.
    """
    names = list(names)
    prefixes: tuple[str, ...] = TEXT_PREFIXES
    if not any(name.startswith(prefixes) for name in names):
        prefixes = (*PREFIXES, "lm_head.", "mtp.")
    text = [name for name in names if name.startswith(prefixes)]
    return text, [name for name in names if not name.startswith(prefixes)]


def is_stack_of_experts(name: str) -> bool:
    """Whether the model's tensor `name` holds the matrices of all experts, `e f l` or `e l f`."""
    return _ALL_EXPERTS.fullmatch(name) is not None


def hub_names(name: str, experts: int) -> Iterator[tuple[str, int | None]]:
    """The names under which the hub stores the model's tensor `name`.

    Args:
        name: key of the model's state_dict.
        experts: length of the tensor's first axis; used only if this axis is the experts.

    Yields:
        (disk name, expert): one slice per expert, or expert None for the whole tensor.
    """
    if packed := _PACKED_EXPERTS.fullmatch(name):
        for expert in range(experts):
            yield f"{packed[1]}.{expert}.{packed[2]}", expert
        return
    if not is_stack_of_experts(name):
        yield name, None
        return
    stem, _, matrix = name.rpartition(".")
    for expert in range(experts):
        yield f"{stem}.{expert}.{matrix}.weight", expert
