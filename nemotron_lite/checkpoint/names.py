"""What a tensor is called: in the model, on the hub, and in files written elsewhere.

The model's own names are the hub's, so most tensors need no table:

    backbone.layers.3.mixer.in_proj.weight        the hub, and here
    model.layers.3.mixer.in_proj.weight           transformers 5, in memory
    model.backbone.layers.3.mixer.in_proj.weight  wrapped once more by a trainer

Routed experts are the exception. The hub keeps two matrices per expert, 2 x 512 small tensors in
every mixture layer of Super; a program that multiplies wants one stacked tensor:

    disk     backbone.layers.1.mixer.experts.{e}.up_proj.weight     [f l] each
    model    backbone.layers.1.mixer.experts.up_proj                [e f l]

transformers 5 stacks them in memory under the same name, and can be told to save them so. Both are
read here; the hub's is written. A packed stack is a module with several tensors, each of which goes
to disk expert by expert: `experts.up_proj.weight_scale` as `experts.{e}.up_proj.weight_scale`.
`mtp.*` and `lm_head.weight` carry no prefix anywhere.

Source: reference sheet 10.1; the conversion table of transformers 5.23. Left out: the names inside
vLLM and Megatron, which never reach the disk in this format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

# Longest first: "model.backbone." also starts with "model.".
PREFIXES = ("model.backbone.", "backbone.", "model.")

_ONE_EXPERT = re.compile(r"(.+\.mixer\.experts)\.(\d+)\.(up_proj|down_proj)\.weight")
_ALL_EXPERTS = re.compile(r".+\.mixer\.experts\.(up_proj|down_proj)")
_PACKED_EXPERTS = re.compile(
    r"(.+\.mixer\.experts)\.((?:up|down)_proj\.(?:weight|weight_scale|weight_scale_2|input_scale))"
)


class Place(NamedTuple):
    """Where a tensor of a file belongs: a tensor of the model, or one expert's slice of it."""

    name: str  # key of the model's state_dict
    expert: int | None = None


def place_of(disk_name: str) -> Place:
    """The place in the model of a tensor called `disk_name` in a file, under any known spelling.

    A name that fits no spelling comes back as it is; whether the model has such a tensor is for the
    caller to see.
    """
    name = disk_name
    for prefix in PREFIXES:
        if name.startswith(prefix):
            name = "backbone." + name.removeprefix(prefix)
            break
    if match := _ONE_EXPERT.fullmatch(name):
        return Place(f"{match[1]}.{match[3]}", int(match[2]))
    return Place(name)


def is_stack_of_experts(name: str) -> bool:
    """Whether the model's tensor `name` holds the matrices of all experts, `e f l` or `e l f`."""
    return _ALL_EXPERTS.fullmatch(name) is not None


def hub_names(name: str, experts: int) -> Iterator[tuple[str, int | None]]:
    """The names under which the hub keeps the model's tensor `name`.

    Args:
        name: key of the model's state_dict.
        experts: length of the tensor's first axis; used where it counts experts.

    Yields:
        (disk name, expert whose slice it is, or None for the whole tensor).
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
