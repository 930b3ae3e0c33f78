"""Scanning a draft and accepting a part of it, against the recurrence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_lite import ops
from tests.compare import relative_rms

Drawn = dict[str, Any]


def _inputs(b: int, t: int, g: int, seed: int, decay: float = 1.0) -> Drawn:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h, p, n = 2 * g, 5, 7
    return {
        "state": normal(b, h, p, n),
        "x": normal(b, t, h, p),
        "dt": torch.rand(b, t, h, generator=generator, dtype=torch.float64) * decay,
        "A": -torch.rand(h, generator=generator, dtype=torch.float64) * 16,
        "B": normal(b, t, g, n),
        "C": normal(b, t, g, n),
    }


def _read(given: Drawn, impl: str) -> torch.Tensor:
    return ops.ssd_read_draft(**given, D=torch.ones(given["A"].shape[0]).double(), impl=impl)


@given(
    b=st.integers(1, 3), t=st.integers(1, 9), g=st.integers(1, 3), seed=st.integers(0, 999),
    decay=st.sampled_from([1e-3, 0.1, 5.0]),
)  # fmt: skip
def test_reading_is_the_scan_and_leaves_the_state(
    b: int, t: int, g: int, seed: int, decay: float
) -> None:
    given = _inputs(b, t, g, seed, decay)
    before = given["state"].clone()
    exact, plain, found = (_read(given, impl) for impl in ("naive", "torch", "cpu"))
    decays = ops.draft_decays(given["dt"], given["A"], torch.float64)
    assert torch.equal(_read({**given, "decays": decays}, "cpu"), found)
    torch.testing.assert_close(plain, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    assert torch.equal(given["state"], before)


@given(data=st.data(), b=st.integers(1, 3), t=st.integers(1, 9), g=st.integers(1, 3))
def test_accepting_is_the_scan_of_a_prefix(data: st.DataObject, b: int, t: int, g: int) -> None:
    given = _inputs(b, t, g, data.draw(st.integers(0, 999)), data.draw(st.sampled_from([0.01, 3])))
    counts = torch.tensor(data.draw(st.lists(st.integers(0, t), min_size=b, max_size=b)))
    del given["C"]
    state = given.pop("state")
    before = state.clone()
    exact = ops.ssd_accept_draft(state, **given, counts=counts, impl="naive")
    plain = ops.ssd_accept_draft(state, **given, counts=counts, impl="torch")
    assert torch.equal(state, before), "the definition and the plain form leave the state alone"
    found = ops.ssd_accept_draft(state.clone(), **given, counts=counts)
    decays = ops.draft_decays(given["dt"], given["A"], torch.float64)
    again = ops.ssd_accept_draft(state.clone(), **given, counts=counts, decays=decays)
    torch.testing.assert_close(plain, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(again, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    assert torch.equal(exact[counts == 0], state[counts == 0])
    assert torch.equal(plain[counts == 0], state[counts == 0])
    same = int(counts[0])
    for impl in ("torch", "cpu"):
        torch.testing.assert_close(
            ops.ssd_accept_draft(state[:1].clone(), **_first_row(given), counts=same, impl=impl),
            exact[:1],
            rtol=1e-9,
            atol=1e-9,
        )


def _first_row(given: Drawn) -> Drawn:
    return {name: v if name == "A" else v[:1] for name, v in given.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_narrow_inputs_are_computed_in_the_dtype_of_the_state(
    dtype: torch.dtype, impl: str
) -> None:
    given = {name: v.to(dtype) for name, v in _inputs(2, 6, 2, seed=1).items()}
    wide = {name: v.double() for name, v in given.items()}
    given |= {name: given[name].float() for name in ("state", "dt", "A")}
    wide |= {name: given[name].double() for name in ("state", "dt", "A")}
    found = ops.ssd_read_draft(**given, impl=impl)
    assert found.dtype == dtype
    limit = 5e-6 if dtype == torch.float32 else 4e-3
    assert relative_rms(found, ops.ssd_read_draft(**wide, impl="naive")) < limit
    for each in (given, wide):
        del each["C"]
    exact = ops.ssd_accept_draft(**wide, counts=torch.tensor([4, 6]), impl="naive")
    after = ops.ssd_accept_draft(**given, counts=torch.tensor([4, 6]), impl=impl)
    assert after.dtype == torch.float32
    assert relative_rms(after, exact) < 5e-6


def test_wrong_inputs_are_refused() -> None:
    given = _inputs(2, 3, 1, seed=0)
    thrice = {name: v.expand(-1, -1, 3, -1) for name, v in given.items() if name in "BC"}
    with pytest.raises(ValueError, match="2 heads do not split into 3 groups"):
        ops.ssd_read_draft(**{**given, **thrice})
    del given["C"]
    with pytest.raises(ValueError, match="counts from 0 to 4: expected 0 to 3"):
        ops.ssd_accept_draft(**given, counts=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="counts from -1"):
        ops.ssd_accept_draft(**given, counts=-1)
