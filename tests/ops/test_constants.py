"""Constants are made once and kept: not those of FakeTensorMode, and not any number of them."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nemotron_lite.backends.constants import MOST_KEPT, kept_constant


def test_what_is_kept() -> None:
    made = []

    @kept_constant
    def powers(count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(count)
        places = torch.arange(count, device=device)
        return places, places * 2.0

    cpu = torch.device("cpu")
    with FakeTensorMode():
        assert powers(3, cpu)[1].shape == (3,)
    with torch.inference_mode(), torch.device("meta"):
        _, doubled = powers(3, cpu)
    assert doubled.tolist() == [0, 2, 4] and not doubled.is_inference()
    assert powers(3, cpu)[1] is doubled
    assert made == [3, 3], "made anew after FakeTensorMode, then kept"
    for count in range(2 * MOST_KEPT):
        powers(count, cpu)
    made.clear()
    for count in range(2 * MOST_KEPT):
        powers(count, cpu)
    assert made, "a limited number is kept"
