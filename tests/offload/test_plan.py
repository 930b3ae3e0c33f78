"""A budget is divided as the docstring says, and refused if a tensor does not fit."""

from __future__ import annotations

import re

import pytest
import torch

from nemotron_lite.offload.plan import Plan, make_plan
from nemotron_lite.offload.source import Entry, Part


def entry(path: str, size: int) -> Entry:
    return Entry(path, {"weight": Part(f"{path}.weight", (size,), torch.uint8, size)})


SIZES = {"a.norm": 64, "a.in_proj": 640, "b.norm": 64, "head": 1280, "mtp.proj": 128}
MODULES = {path: entry(path, size) for path, size in SIZES.items()}
EXPERTS = {f"layer{i}.experts.{leaf}": entry("", 256) for i in (0, 1) for leaf in ("up", "down")}


def plan(budget: int, fixed: int = 0) -> Plan:
    return make_plan(MODULES, EXPERTS, 2, budget, fixed)


@pytest.mark.parametrize(
    ("budget", "workspace", "kept", "per_layer"),
    [
        (1280, 1280, "", 0),
        (1280 + 64, 1280, "a.norm", 0),
        (1280 + 700, 1280, "a.norm b.norm", (700 - 128) // 2),
        (1280 + 768, 1280, "a.norm b.norm a.in_proj", 0),
        # With the largest tensor kept, the workspace needs room for an expert only.
        (64 + 64 + 640 + 1280 + 256, 256, "a.norm b.norm a.in_proj head", 0),
        (10_000, 256, "a.norm b.norm a.in_proj head mtp.proj", (10_000 - 2176 - 256) // 2),
    ],
)
def test_small_tensors_first_and_the_rest_to_the_experts(
    budget: int, workspace: int, kept: str, per_layer: int
) -> None:
    found = plan(budget)
    assert found.kept == set(kept.split())
    assert (found.workspace, found.per_layer) == (workspace, per_layer)
    assert found.kept_bytes == sum(SIZES[path] for path in found.kept)
    assert found.kept_bytes + found.workspace + 2 * found.per_layer <= budget
    assert plan(budget + 333, fixed=333) == found._replace(budget=budget + 333)


def test_the_workspace_has_room_for_nested_modules() -> None:
    modules = {"m": entry("m", 640), "m.in_proj": entry("m.in_proj", 1280), "other": entry("", 64)}
    assert make_plan(modules, {}, 0, 1280 + 640, 0).workspace == 1280 + 640
    with pytest.raises(ValueError, match=r"1,920"):
        make_plan(modules, {}, 0, 1280 + 640 - 1, 0)


@pytest.mark.parametrize("fixed", [0, 777])
@pytest.mark.parametrize("experts", [EXPERTS, {}, {"layer.experts.up": entry("", 5120)}])
def test_the_smallest_budget_is_named(experts: dict[str, Entry], fixed: int) -> None:
    with pytest.raises(ValueError, match="no room for the largest tensor: head has") as caught:
        make_plan(MODULES, experts, 2, 100, fixed)
    needed = int(re.search(r"at least budget=([\d,]+)", str(caught.value))[1].replace(",", ""))  # type: ignore[index]
    assert make_plan(MODULES, experts, 2, needed, fixed).budget == needed
    with pytest.raises(ValueError):
        make_plan(MODULES, experts, 2, needed - 1, fixed)
