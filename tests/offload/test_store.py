"""What stays in memory, what is fetched again, and that the budget holds at every moment."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from torch import Tensor

from nemotron_lite.offload.source import Entry, Part
from nemotron_lite.offload.store import WeightStore

LAYERS, EXPERTS, SIZE = 3, 8, 64


class Numbered:
    """A source whose tensors hold a number for their name and expert."""

    nbytes = 100

    def __init__(self) -> None:
        self.reads: list[tuple[str, int | None]] = []

    def read(
        self, name: str, out: Tensor, *, expert: int | None = None, row: int | None = None
    ) -> int:
        self.reads.append((name, expert))
        out.fill_(value(name, expert) if row is None else row)
        return 7


def value(name: str, expert: int | None = None) -> int:
    return (sum(name.encode()) + 31 * (expert or 0)) % 250


def entry(path: str, size: int, *leaves: str) -> Entry:
    parts = {leaf: Part(f"{path}.{leaf}", (size,), torch.uint8, size) for leaf in leaves}
    return Entry(path, parts)


MODULES = {f"l{i}.proj": entry(f"l{i}.proj", 320, "weight", "bias") for i in range(LAYERS)}
STACKS = {f"l{i}.experts.up": entry(f"l{i}.experts.up", SIZE, "weight") for i in range(LAYERS)}
SMALLEST = 100 + 640  # the source, and a workspace for one module
TABLE = {"table": Part("table", (10, 4), torch.float32, 40)}


def store(budget: int) -> WeightStore:
    return WeightStore(Numbered(), MODULES, STACKS, TABLE, budget)


def use_layer(store: WeightStore, layer: int, *experts: int) -> None:
    with store.choosing(f"l{layer}.experts", experts):
        for expert in experts:
            found = store.expert(f"l{layer}.experts.up", expert)["weight"]
            assert set(found.tolist()) == {value(f"l{layer}.experts.up.weight", expert)}


@pytest.mark.parametrize("budget", [SMALLEST, SMALLEST + 1000, SMALLEST + 1500, 10**5])
def test_every_weight_is_right_and_the_budget_holds(budget: int) -> None:
    held, draw = store(budget), random.Random(budget)
    for _ in range(200):
        layer = draw.randrange(LAYERS)
        path = f"l{layer}.proj"
        with held.weights_of(path) as tensors:
            for leaf in ("weight", "bias"):
                assert set(tensors[leaf].tolist()) == {value(f"{path}.{leaf}")}
        use_layer(held, layer, *draw.sample(range(EXPERTS), draw.randint(1, 4)))
        assert held.nbytes <= budget
    everything = 100 + LAYERS * (640 + EXPERTS * SIZE)
    assert held.nbytes > 0.7 * min(budget, everything), "the budget is used"


def test_nested_modules_do_not_overwrite_each_other() -> None:
    sizes = {"m": 128, "m.proj": 320, "z": 64}
    modules = {path: entry(path, size, "weight") for path, size in sizes.items()}
    held = WeightStore(Numbered(), modules, {}, {}, 100 + 448 + 63)
    assert not held.plan.kept
    for _ in range(2):
        with held.weights_of("m") as outer:
            for _ in range(3):
                with held.weights_of("m.proj") as inner:
                    assert set(inner["weight"].tolist()) == {value("m.proj.weight")}
            assert set(outer["weight"].tolist()) == {value("m.weight")}


def test_a_failed_block_gives_the_workspace_back() -> None:
    held = store(SMALLEST)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt), held.weights_of("l0.proj"):
            raise KeyboardInterrupt
    with held.weights_of("l1.proj") as tensors:
        assert set(tensors["bias"].tolist()) == {value("l1.proj.bias")}


def test_layers_read_in_turn_keep_their_own_experts() -> None:
    """With one cache for all layers, nothing would ever be found here."""
    held = store(SMALLEST + LAYERS * 2 * SIZE)
    assert held.plan.per_layer // SIZE >= 2
    for _ in range(3):
        for layer in range(LAYERS):
            use_layer(held, layer, 1, 2)
    assert (held.traffic.experts, held.traffic.experts_found) == (18, 12)


def test_the_least_recently_used_expert_is_evicted() -> None:
    held = store(SMALLEST + LAYERS * 2 * SIZE)
    for expert in (1, 2, 1, 3):  # 3 takes the place of 2
        use_layer(held, 0, expert)
    held.traffic.reset()
    use_layer(held, 0, 1)
    use_layer(held, 0, 3)
    assert held.traffic.experts_found == 2
    use_layer(held, 0, 2)
    assert held.traffic.experts_found == 2


def test_a_call_does_not_evict_what_it_uses() -> None:
    """The same experts again and again, more than there is room for, in the same order."""
    held = store(SMALLEST + LAYERS * 3 * SIZE)
    for _ in range(4):
        use_layer(held, 0, 0, 1, 2, 3, 4, 5)
    assert held.traffic.experts_found == 3 * 3


def test_traffic_counts_what_was_used_and_fetched() -> None:
    held = store(SMALLEST + LAYERS * 2 * SIZE)
    for _ in range(2):
        with held.weights_of("l0.proj"):
            pass
        use_layer(held, 0, 5)
    rows = held.rows("table", torch.tensor([3, 9, 3]))
    assert rows[:, 0].tolist() == [3, 9, 3]
    found = held.traffic
    assert found.used_bytes == 2 * (640 + SIZE) + 2 * 16
    assert found.fetched_bytes == 2 * 640 + SIZE + 2 * 16
    assert found.source_bytes == 7 * (2 * 2 + 1 + 2)
    assert found.weights == 2 * (640 + SIZE) + 2 * 4
    assert found.hit_rate == pytest.approx(1 - found.fetched_bytes / found.used_bytes)
    assert found.expert_hit_rate == 0.5
    found.reset()
    assert (found.used_bytes, found.experts, found.hit_rate, found.expert_hit_rate) == (0, 0, 0, 0)


def test_weights_fetched_in_inference_mode_serve_outside_of_it() -> None:
    held = store(SMALLEST + 640 * LAYERS + LAYERS * SIZE)
    with torch.inference_mode():
        use_layer(held, 0, 1)
        with held.weights_of("l0.proj"):
            pass
    use_layer(held, 0, 1)
    use_layer(held, 0, 2)  # written into the memory of expert 1
    assert held.traffic.experts_found == 1
    with held.weights_of("l0.proj") as tensors:
        assert not tensors["weight"].is_inference()


def test_a_second_thread_waits() -> None:
    held, entered, order = store(SMALLEST), threading.Event(), list[str]()

    def second() -> None:
        entered.set()
        with held.weights_of("l1.proj"):
            order.append("second")

    with held.weights_of("l0.proj") as tensors:
        thread = threading.Thread(target=second)
        thread.start()
        assert entered.wait(10)
        thread.join(0.05)
        assert set(tensors["weight"].tolist()) == {value("l0.proj.weight")}
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
