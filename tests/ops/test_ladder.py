"""The equivalence ladder of the state-space operator, against the recurrence in float64.

    recurrence = plain chunks = fast chunks = other chunk lengths = one step at a time = any split

for values and for every gradient; over ragged lengths, several groups, initial states, concatenated
documents, contiguous and strided inputs; under weak, mixed and strong decay. The relative rms error
in float32 must be at most 1e-6.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_lite.masks import document_starts
from nemotron_lite.ops import selective_scan, ssd, ssd_step
from tests import ladder
from tests.compare import run

OUTPUTS = ("y", "state")
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 4e-3}
LENGTHS = (1, 2, 63, 64, 65, 200)


class Case(NamedTuple):
    """One set of inputs."""

    tokens: int
    sizes: tuple[int, int, int, int]  # heads, head width, state size, groups
    decay: str
    several: bool  # documents in a row

    def __str__(self) -> str:
        h, p, n, g = self.sizes
        several = "-documents" if self.several else ""
        return f"t{self.tokens}-h{h}p{p}n{n}g{g}-{self.decay}{several}"


CASES = [
    Case(tokens, sizes, decay, several)
    for tokens in LENGTHS
    for decay in ("weak", "mixed", "strong")
    for sizes, several in (((4, 8, 16, 2), False), ((4, 16, 8, 1), True), ((6, 4, 5, 3), True))
]

Rung = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(scope="module", autouse=True)
def _record() -> Iterator[None]:
    yield
    if ladder.wants_record():
        ladder.write()


def inputs_of(case: Case, dtype: torch.dtype, batch: int = 2) -> dict[str, Tensor]:
    """Random inputs of order one, rounded to `dtype`."""
    h, p, n, g = case.sizes
    t = case.tokens
    generator = torch.Generator().manual_seed(CASES.index(case))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if case.decay == "weak":  # the state keeps the whole row
        A, dt = torch.linspace(0.01, 0.1, h), F.softplus(normal(batch, t, h) - 2)
    elif case.decay == "mixed":  # as trained models have it
        A, dt = torch.linspace(1, 16, h), F.softplus(normal(batch, t, h) - 3)
    else:  # the state decays within a token or two
        A, dt = torch.linspace(4, 16, h), 0.5 + normal(batch, t, h).sigmoid()
    inputs = {
        "x": normal(batch, t, h, p), "dt": dt, "A": -A.double(),
        "B": normal(batch, t, g, n), "C": normal(batch, t, g, n),
        "D": normal(h), "initial_state": normal(batch, h, p, n),
    }  # fmt: skip
    return {name: v.to(dtype) for name, v in inputs.items()}


def documents(case: Case, batch: int = 2) -> Tensor | None:
    """Document numbers, with other boundaries in each row; each number is used again later."""
    if not case.several:
        return None
    place = torch.arange(case.tokens) + torch.arange(batch).unsqueeze(1) * 11
    return place // 37 % 2


def bind(rung: Callable[..., tuple[Tensor, Tensor]], case: Case) -> Rung:
    """The rung as a function of the tensors alone, in the order of `inputs_of`."""
    seq_idx = documents(case)

    def call(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        return rung(x, dt, A, B, C, D=D, initial_state=s, seq_idx=seq_idx)

    return call


@functools.cache
def exact(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Values and gradients of the definition in float64."""
    inputs = inputs_of(case, dtype)
    return run(bind(selective_scan, case), list(inputs.values()), torch.float64)


@functools.cache
def cancellation(case: Case, dtype: torch.dtype) -> float:
    """The ratio of the terms of dA, a sum over rows and tokens, to dA itself; at least 1.

    In float32 the error of a sum depends on the size of its terms, not on that of the sum. To find
    the terms, dt must act only on the decay: x is divided by dt, so that dt x is constant.
    """
    inputs = inputs_of(case, dtype) | {"D": torch.zeros(case.sizes[0])}
    amounts = (inputs["x"].double() * inputs["dt"].double().unsqueeze(-1)).detach()

    def decay_only(x, dt, A, *others):  # type: ignore[no-untyped-def]
        return bind(selective_scan, case)(amounts / dt.unsqueeze(-1) + 0 * x, dt, A, *others)

    _, grads = run(decay_only, list(inputs.values()), torch.float64)
    terms = grads[1] * inputs["dt"] / inputs["A"]  # a = dt A: da/ddt = A and da/dA = dt
    size = terms.square().sum((0, 1)).mean().sqrt() / grads[2].square().mean().sqrt()
    return max(1.0, float(size))


def strided(x, dt, A, B, C, *, impl, **others):  # type: ignore[no-untyped-def]
    """`ssd` as the Mamba layer calls it: x, B and C are slices of one tensor."""
    parts = [v.flatten(2) for v in (x, B, C)]
    whole = torch.cat(parts, dim=-1).split([v.shape[-1] for v in parts], dim=-1)
    x, B, C = (v.unflatten(-1, like.shape[2:]) for v, like in zip(whole, (x, B, C), strict=True))
    assert x.shape[1] == 1 or not x.is_contiguous()
    return ssd(x, dt, A, B, C, impl=impl, **others)


def one_at_a_time(x, dt, A, B, C, *, D, initial_state, seq_idx, impl="naive"):  # type: ignore[no-untyped-def]
    """`ssd_step` over the tokens, with documents reset by hand."""
    state, ys = initial_state, []
    fresh = None if seq_idx is None else document_starts(seq_idx)
    for t in range(x.shape[1]):
        if fresh is not None:
            state = state.masked_fill(fresh[:, t, None, None, None], 0.0)
        y, state = ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D=D, impl=impl)
        ys.append(y)
    return torch.stack(ys, dim=1), state


def split_at(cut: float, impl: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """`ssd` in two calls, the second of which continues from the state of the first."""

    def call(x, dt, A, B, C, *, D, initial_state, seq_idx):  # type: ignore[no-untyped-def]
        at = max(1, min(round(x.shape[1] * cut), x.shape[1] - 1))
        state, ys = initial_state, []
        for part in (slice(0, at), slice(at, None)):
            ids = None if seq_idx is None else seq_idx[:, part]
            if ids is not None and part.start:
                fresh = ids[:, 0] != seq_idx[:, at - 1]
                state = state.masked_fill(fresh[:, None, None, None], 0.0)
            y, state = ssd(
                x[:, part],
                dt[:, part],
                A,
                B[:, part],
                C[:, part],
                D=D,
                initial_state=state,
                seq_idx=ids,
                impl=impl,
            )
            ys.append(y)
        return torch.cat(ys, dim=1), state

    return call


RUNGS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    f"{name}{how}": rung
    for name, impl in (("plain", "torch"), ("chunked", "cpu"), ("traced", "traced"))
    for how, rung in {
        "": functools.partial(ssd, impl=impl),
        ", chunks of 16": functools.partial(ssd, impl=impl, chunk_size=16),
        ", chunks of 128": functools.partial(ssd, impl=impl, chunk_size=128),
        ", strided inputs": functools.partial(strided, impl=impl),
        ", split early": split_at(0.1, impl),
        ", split late": split_at(0.7, impl),
    }.items()
}


def holds(found: dict[str, float], case: Case, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Fail if the error of any quantity exceeds its tolerance, and show all of them."""
    factors = dict.fromkeys(found, factor) | {"dA": factor * cancellation(case, dtype)}
    off = {name: e for name, e in found.items() if e > TOLERANCE[dtype] * factors[name]}
    assert not off, off


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rung", RUNGS)
def test_chunked_forms_equal_the_recurrence(rung: str, case: Case) -> None:
    if case.tokens == 1 and "split" in rung:
        pytest.skip("one token cannot be split")
    dtype = torch.float32
    found = ladder.climb(
        "ssd",
        rung,
        bind(RUNGS[rung], case),
        inputs_of(case, dtype),
        OUTPUTS,
        exact(case, dtype),
        "recurrence in float64",
        dtype,
    )
    holds(found, case, dtype)


@pytest.mark.parametrize("case", [c for c in CASES if c.tokens in (2, 65, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rung", ["plain", "chunked", "traced"])
def test_other_dtypes(rung: str, dtype: torch.dtype, case: Case) -> None:
    """Only inputs and outputs are stored in half precision; everything between is float32.

    So y has its own rounding error, and the state almost none. The gradients start from a rounded
    gradient of y; where they are sums that cancel, this error becomes larger.
    """
    found = ladder.climb(
        "ssd",
        rung,
        bind(RUNGS[rung], case),
        inputs_of(case, dtype),
        OUTPUTS,
        exact(case, dtype),
        "recurrence in float64",
        dtype,
    )
    if dtype == torch.bfloat16:
        assert found.pop("state") < TOLERANCE[torch.float32]
        assert found.pop("y") < TOLERANCE[dtype]
    holds(found, case, dtype, factor=5.0 if dtype == torch.bfloat16 else 1.0)


@pytest.mark.parametrize("case", [c for c in CASES if c.tokens in (1, 65)], ids=str)
@pytest.mark.parametrize("rung", ["recurrence", "step"])
def test_the_definition_in_float32(rung: str, case: Case) -> None:
    """The definition rounds dt * A to float32 and is less precise than the chunked form."""
    form = {"recurrence": selective_scan, "step": one_at_a_time}[rung]
    dtype = torch.float32
    found = ladder.climb(
        "ssd",
        rung,
        bind(form, case),
        inputs_of(case, dtype),
        OUTPUTS,
        exact(case, dtype),
        "recurrence in float64",
        dtype,
    )
    holds(found, case, dtype, factor=3.0)


@pytest.mark.parametrize("case", [c for c in CASES if c.tokens in (1, 65)], ids=str)
@pytest.mark.parametrize(
    ("rung", "impl"), [("plain step", "torch"), ("step in place", "cpu"), ("traced step", "traced")]
)
def test_fast_steps(rung: str, impl: str, case: Case) -> None:
    inputs = inputs_of(case, torch.float32)
    state = inputs.pop("initial_state")
    with torch.no_grad():
        found = one_at_a_time(
            **inputs, initial_state=state.clone(), seq_idx=documents(case), impl=impl
        )
    for name, a, b in zip(OUTPUTS, found, exact(case, torch.float32)[0], strict=True):
        error = ladder.relative_rms(a, b)
        ladder.keep("ssd", rung, "recurrence in float64", "float32", name, error)
        assert error < 2e-6, name
