"""How a budget of bytes is divided: a workspace, tensors that stay, and a part for each mixture.

See the package's docstring for the reasons. Modules may be nested (a Mamba layer holds its step
sizes while its projection runs), so the workspace has room for a tensor and those around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from nemotron_lite.offload.source import Entry

DEFAULT_BUDGET = 4 * 2**30  # bytes
_GIB = 2**30


class Plan(NamedTuple):
    """What stays in memory.

    Attributes:
        budget: bytes of weights in memory at most.
        workspace: bytes of the buffer for weights that do not stay.
        kept: paths of the modules whose tensors stay.
        kept_bytes: of these.
        per_layer: bytes for the experts of each layer that has some.
    """

    budget: int
    workspace: int
    kept: frozenset[str]
    kept_bytes: int
    per_layer: int


def make_plan(
    modules: Mapping[str, Entry], experts: Mapping[str, Entry], layers: int, budget: int, fixed: int
) -> Plan:
    """Divide a budget.

    Args:
        modules: tensors that every token uses, by path.
        experts: one expert's matrix of each stack, by the path of the stack.
        layers: how many layers have experts.
        budget: bytes.
        fixed: bytes that are in memory in any case.

    Raises:
        ValueError: the budget has no room for the largest tensor.
    """
    nested = {path: _with_those_around(path, modules) for path in modules}
    expert = max((entry.nbytes for entry in experts.values()), default=0)
    # The MTP module last: most calls do not use it.
    order = sorted(modules, key=lambda path: (path.startswith("mtp."), modules[path].nbytes, path))
    best, kept_bytes = -1, 0
    sums = [0]
    for path in order:
        sums.append(sums[-1] + modules[path].nbytes)
    for count in range(len(order) + 1):
        workspace = max([expert, *(nested[path] for path in order[count:])])
        if fixed + sums[count] + workspace <= budget:
            best, kept_bytes, chosen = count, sums[count], workspace
    if best < 0:
        raise ValueError(_too_small(modules, experts, budget, fixed))
    left = budget - fixed - kept_bytes - chosen
    return Plan(budget, chosen, frozenset(order[:best]), kept_bytes, left // max(1, layers))


def _with_those_around(path: str, modules: Mapping[str, Entry]) -> int:
    """Bytes of a module's tensors and of those of the modules that hold it."""
    total, parts = 0, path.split(".")
    for length in range(1, len(parts) + 1):
        entry = modules.get(".".join(parts[:length]))
        total += 0 if entry is None else entry.nbytes
    return total


def _too_small(
    modules: Mapping[str, Entry], experts: Mapping[str, Entry], budget: int, fixed: int
) -> str:
    """The error for a budget without room for one tensor at a time."""
    largest = max(modules.values(), key=lambda entry: entry.nbytes)
    needed = fixed + max(_with_those_around(path, modules) for path in modules)
    text = f"{largest.path} has {largest.nbytes:,} bytes"
    if experts:
        one = max(experts.values(), key=lambda entry: entry.nbytes)
        needed = max(needed, fixed + one.nbytes)
        text += f", one expert of {one.path} {one.nbytes:,}"
    if fixed:
        text += f", and {fixed:,} bytes are needed in any case"
    return (
        f"budget={budget:,} bytes has no room for the largest tensor: {text}. Give at least "
        f"budget={needed:,} ({needed / _GIB:.2f} GiB); with more, fewer weights are fetched again."
    )
