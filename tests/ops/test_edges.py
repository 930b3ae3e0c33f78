"""Operations at their edges: no rows, mixed dtypes, autocast, transposed inputs, wrong starts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nemotron_lite import ops

IMPLS = ("naive", "torch", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    made = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return made.requires_grad_(grad)


def calls(b: int, t: int, make: Callable[..., Tensor]) -> dict[str, Callable[[str], Any]]:
    """Every operation on b rows of t tokens, as a function of `impl`."""
    x, dt, A = make(b, t, 4, 8), make(b, t, 4).abs(), -make(4).abs()
    B, C = make(b, t, 2, 5), make(b, t, 2, 5) + 1
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    state = make(b, 4, 8, 5).detach().to(wide)
    documents = torch.arange(t).expand(b, -1) // 3
    q, k, v = make(b, 4, t, 8), make(b, 2, t + 3, 8), make(b, 2, t + 3, 8) + 1
    starts = torch.arange(b) % 4
    taps = make(6, 4)
    one = (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])
    indices = (torch.arange(2 * b * t) * 5 % 4).view(b * t, 2)
    return {
        "attention": lambda i: ops.causal_attention(q, k, v, starts=3, impl=i),
        "attention by row": lambda i: ops.causal_attention(q, k, v, starts=starts, impl=i),
        "conv": lambda i: ops.causal_conv1d(make(b, t, 6), taps, make(6), impl=i),
        "conv documents": lambda i: ops.causal_conv1d(
            make(b, t, 6), taps, make(6), seq_idx=documents, impl=i
        ),
        "conv after": lambda i: ops.causal_conv1d(
            make(b, t, 6), taps, initial_state=make(b, 3, 6), impl=i
        ),
        "window": lambda i: ops.causal_conv1d_window(make(b, t + 3, 6).detach(), taps, impl=i),
        "ssd": lambda i: ops.ssd(x, dt, A, B, C, D=make(4), impl=i),
        "ssd documents": lambda i: ops.ssd(x, dt, A, B, C, seq_idx=documents, impl=i),
        "step": lambda i: ops.ssd_step(state.clone(), *one, impl=i),
        "read draft": lambda i: ops.ssd_read_draft(state, x, dt, A, B, C, impl=i),
        "accept draft": lambda i: ops.ssd_accept_draft(state.clone(), x, dt, A, B, 1, impl=i),
        "accept by row": lambda i: ops.ssd_accept_draft(
            state.clone(), x, dt, A, B, torch.arange(b) % (t + 1), impl=i
        ),
        "norm": lambda i: ops.rms_norm(make(b, t, 6), make(6), impl=i),
        "gated norm": lambda i: ops.gated_rms_norm(
            make(b, t, 6), make(b, t, 6) + 1, make(6), 2, impl=i
        ),
        "experts": lambda i: ops.expert_mlp(
            make(b * t, 6), make(4, 5, 6), make(4, 6, 5), make(b * t, 2).abs(), indices, impl=i
        ),
        "route": lambda i: (
            ops.route(
                make(b * t, 6),
                make(4, 6),
                torch.zeros(4),
                top_k=2,
                impl=i if i != "cpu" else "auto",
            ).scores
        ),
    }


NAMES = tuple(calls(1, 1, random))
TRACED = (
    "attention", "attention by row", "conv", "conv documents", "conv after", "window", "ssd",
    "ssd documents", "step", "experts",
)  # fmt: skip
FORMS = [*itertools.product(NAMES, IMPLS), *((name, "traced") for name in TRACED)]
WITHOUT_GRADIENTS = ("window", "step", "read draft", "accept draft", "accept by row")


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize(("name", "impl"), FORMS)
def test_no_rows_give_no_rows(name: str, impl: str) -> None:
    """In every dtype, with and without gradients, for one token and for many."""
    for dtype, grad, t in itertools.product(DTYPES, (False, True), (1, 5, 130)):
        if grad and name in WITHOUT_GRADIENTS:
            continue

        def make(*shape: int, dtype: torch.dtype = dtype, grad: bool = grad) -> Tensor:
            return random(*shape, dtype=dtype, grad=grad)

        with torch.set_grad_enabled(grad):
            none, some = (calls(b, t, make)[name](impl) for b in (0, 1))
            for empty, full in zip(tensors(none), tensors(some), strict=True):
                per_row = t if name in ("experts", "route") else 1
                assert len(empty) == 0 and len(full) == per_row
                assert empty.shape[1:] == full.shape[1:] and empty.dtype == full.dtype
            if grad and (name, impl) not in (("experts", "naive"), ("experts", "torch")):
                # These two loop over tokens: without tokens there is no gradient.
                sum(part.sum() for part in tensors(none) if part.requires_grad).backward()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_states_and_sums(name: str, narrow: torch.dtype) -> None:
    """Products with weights and attention take the dtype of autocast; everything else does not."""
    casts = ("attention", "attention by row", "experts")
    impls = [impl for found, impl in FORMS if found == name]
    for impl, t in itertools.product(impls, (1, 70)):
        with torch.no_grad():
            exact = tensors(calls(2, t, random)[name](impl))
            with torch.autocast("cpu", narrow):
                found = tensors(calls(2, t, random)[name](impl))
        for a, b in zip(found, exact, strict=True):
            if name in casts:
                assert a.dtype == narrow
                torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.1 * float(b.abs().max()))
            else:
                assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_GRADIENTS])
def test_gradients_are_the_same_where_backward_runs_under_autocast(name: str) -> None:
    found = []
    for inside in (False, True):
        leaves: list[Tensor] = []

        def make(*shape: int, leaves: list[Tensor] = leaves) -> Tensor:
            leaves.append(random(*shape, grad=True))
            return leaves[-1]

        out = sum(part.square().sum() for part in tensors(calls(2, 9, make)[name]("cpu")))
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            out.backward()
        found.append([leaf.grad for leaf in leaves if leaf.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    if name not in ("attention", "attention by row", "route"):  # PyTorch's own backward passes
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_convolution_answers_in_the_dtype_of_its_input(impl: str, dtype: torch.dtype) -> None:
    x, taps, bias = random(2, 9, 6, dtype=dtype), random(6, 4), random(6)
    exact, _ = ops.causal_conv1d(x.double(), taps.double(), bias.double(), impl="naive")
    limit = {torch.bfloat16: 0.1, torch.float16: 0.01}.get(dtype, 1e-4)
    y, state = ops.causal_conv1d(x, taps, bias, impl=impl)
    assert y.dtype == state.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=limit)
    one, state = ops.causal_conv1d_step(state, x[:, 0], taps, bias)
    assert one.dtype == state.dtype == dtype
    # A cache of another dtype keeps its own.
    for other in DTYPES:
        before = random(2, 3, 6, dtype=other)
        y, state = ops.causal_conv1d(x, taps, bias, initial_state=before, impl=impl)
        one, after = ops.causal_conv1d_step(before, x[:, 0], taps, bias)
        assert (y.dtype, state.dtype, one.dtype, after.dtype) == (dtype, other, dtype, other)
        torch.testing.assert_close(one.double(), y[:, 0].double(), rtol=0, atol=limit)


@pytest.mark.parametrize("impl", IMPLS)
def test_norms_of_transposed_inputs_have_gradients(impl: str) -> None:
    def gradients(turn: bool) -> list[Tensor]:
        y, z, weight = random(5, 3, 8), random(5, 3, 8) + 1, random(8)
        if turn:
            y, z = (v.transpose(0, 1).contiguous().transpose(0, 1) for v in (y, z))
        leaves = [v.requires_grad_() for v in (y, z, weight)]
        out = ops.rms_norm(y, weight, impl=impl) + ops.gated_rms_norm(y, z, weight, 2, impl=impl)
        out.square().sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [1, 3])
def test_an_eps_of_zero_follows_the_equation(impl: str, rows: int) -> None:
    x, weight = random(rows, 8), random(8)
    with torch.no_grad():
        wanted = weight * x / x.square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(ops.rms_norm(x, weight, 0.0, impl=impl), wanted)
        assert ops.rms_norm(torch.zeros(rows, 8), weight, 0.0, impl=impl).isnan().all()
        assert not ops.rms_norm(torch.zeros(rows, 8), weight, 1e-5, impl=impl).any()
    for eps in (-1e-5, float("nan")):
        with pytest.raises(ValueError, match=f"eps={eps}"):
            ops.rms_norm(x, weight, eps, impl=impl)
        with pytest.raises(ValueError, match=f"eps={eps}"):
            ops.gated_rms_norm(x, x, weight, 2, eps, impl=impl)


@pytest.mark.parametrize("impl", [*IMPLS, "gpu"])
@pytest.mark.parametrize("new", [1, 4])
def test_starts_that_the_keys_do_not_cover(impl: str, new: int) -> None:
    q, k = random(2, 4, new, 8), random(2, 2, 9, 8)

    def attend(starts: Any) -> Tensor:
        with torch.no_grad():
            return ops.causal_attention(q, k, k, starts=starts, impl=impl)

    good = torch.tensor([9 - new, 1])
    wanted = attend(good)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(attend(good.to(dtype)), wanted)
    same = attend(2)
    for two in (np.int64(2), np.uint8(2), torch.tensor(2), torch.tensor([2, 2])):
        torch.testing.assert_close(attend(two), same)
    for starts in (torch.tensor([10 - new, 1]), torch.tensor([0, 200]), 10 - new, np.int64(10)):
        with pytest.raises(ValueError, match="keys do not cover starts"):
            attend(starts)
    for starts in (torch.tensor([-1, 0]), -1, np.int8(-1)):
        with pytest.raises(ValueError, match=r"starts must be 0 or more|of at least 0"):
            attend(starts)
    for starts in (torch.tensor([1]), torch.tensor([1, 1, 1])):
        with pytest.raises(ValueError, match=r"expected \[2\] and integers"):
            attend(starts)


def test_keys_of_another_dtype_are_read_in_that_of_the_queries() -> None:
    q, k = random(2, 4, 3, 8, dtype=torch.bfloat16), random(2, 2, 9, 8)
    for starts in (6, torch.tensor([6, 2])):
        found = ops.causal_attention(q, k, k, starts=starts)
        narrow = k.bfloat16()
        wanted = ops.causal_attention(q, narrow, narrow, starts=starts)
        assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)


@pytest.mark.parametrize(("name", "impl"), FORMS)
def test_negated_views_are_numbers_like_others(name: str, impl: str) -> None:
    """The memory of such a view has the opposite sign: code that reads memory would be wrong."""

    def negated(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = random(*shape, dtype=dtype)
        view = torch.complex(torch.zeros_like(values), -values).conj().imag
        assert view.is_neg() and torch.equal(view, values)
        return view

    for t in (1, 5, 130):
        with torch.no_grad():
            found, exact = (tensors(calls(2, t, make)[name](impl)) for make in (negated, random))
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a, b)  # strided memory is summed in another order
