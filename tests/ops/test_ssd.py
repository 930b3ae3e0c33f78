"""The state-space operator and its step: what the equivalence ladder does not test.

Properties (causality, independence of rows, splits at any place), documents that cannot see each
other, edge cases (no tokens, dt = 0, gradients of one output only), memory, and wrong input.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron_lite.backends import cpu_ssd
from nemotron_lite.ops import selective_scan, ssd, ssd_step
from tests.compare import relative_rms

H, P, N, G = 4, 3, 5, 2
NAMES = ("x", "dt", "A", "B", "C")


def make(
    b: int, t: int, dtype: torch.dtype = torch.float32, seed: int = 0, h: int = H
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        "x": normal(b, t, h, P), "dt": F.softplus(normal(b, t, h) - 1),
        "A": -torch.linspace(0.3, 4, h), "B": normal(b, t, G, N), "C": normal(b, t, G, N),
        "D": normal(h), "initial_state": normal(b, h, P, N),
    }  # fmt: skip
    return {name: v.to(dtype) for name, v in tensors.items()}


def test_two_tokens_by_hand() -> None:
    """S_1 = a_1 S_0 + d_1 x_1 b_1 and so on, with one head, one channel, one state."""
    a, d1, d2, x1, x2, s0 = -0.5, 0.3, 2.0, 1.5, -1.0, 4.0
    b1, b2, c1, c2, skip = 0.7, -0.2, 1.1, 0.6, 0.25
    s1 = torch.exp(torch.tensor(d1 * a)) * s0 + d1 * x1 * b1
    s2 = torch.exp(torch.tensor(d2 * a)) * s1 + d2 * x2 * b2
    expected = torch.stack([s1 * c1 + skip * x1, s2 * c2 + skip * x2])
    for impl in ("naive", "torch", "cpu"):
        y, state = ssd(
            torch.tensor([x1, x2]).view(1, 2, 1, 1),
            torch.tensor([d1, d2]).view(1, 2, 1),
            torch.tensor([a]),
            torch.tensor([b1, b2]).view(1, 2, 1, 1),
            torch.tensor([c1, c2]).view(1, 2, 1, 1),
            D=torch.tensor([skip]),
            initial_state=torch.tensor(s0).view(1, 1, 1, 1),
            impl=impl,
        )
        torch.testing.assert_close(y.flatten(), expected)
        torch.testing.assert_close(state.flatten(), s2.view(1))


@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize("documents", [False, True])
def test_gradients_against_central_differences(documents: bool, impl: str) -> None:
    inputs = make(2, 7, torch.float64)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3, 9]]) if documents else None

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(
            *values[:5],
            D=values[5],
            initial_state=values[6],
            seq_idx=seq_idx,
            chunk_size=3,
            impl=impl,
        )

    assert torch.autograd.gradcheck(call, [v.requires_grad_() for v in inputs.values()])


@settings(max_examples=25)
@given(t=st.integers(2, 150), data=st.data())
def test_causality(t: int, data: st.DataObject) -> None:
    """A token does not change any bit of y at earlier tokens."""
    at = data.draw(st.integers(1, t - 1))
    inputs = make(1, t, seed=t)
    y, _ = ssd(**inputs)
    other = {**inputs, **{name: inputs[name].clone() for name in ("x", "dt", "B", "C")}}
    for name in ("x", "dt", "B", "C"):
        other[name][:, at:] = other[name][:, at:].flip(1) * 3
    changed, _ = ssd(**other)
    assert torch.equal(y[:, :at], changed[:, :at])
    assert not torch.equal(y[:, at:], changed[:, at:])


@settings(max_examples=25)
@given(b=st.integers(2, 5), t=st.integers(1, 140), data=st.data())
def test_rows_do_not_see_each_other(b: int, t: int, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, b - 1))
    inputs = make(b, t, seed=t)
    alone = {k: v[row : row + 1] if v.ndim > 1 else v for k, v in inputs.items()}
    for whole, single in zip(ssd(**inputs), ssd(**alone), strict=True):
        assert relative_rms(whole[row : row + 1], single) < 3e-7


@pytest.mark.parametrize("impl", ["torch", "cpu"])
@settings(max_examples=25)
@given(t=st.integers(2, 200), data=st.data())
def test_split_anywhere(impl: str, t: int, data: st.DataObject) -> None:
    """Two calls that carry the state equal one call, forward and backward."""
    at = data.draw(st.integers(1, t - 1))
    inputs = make(1, t, torch.float64, seed=t)
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    weight = torch.randn(1, t, H, P, dtype=torch.float64)

    def through(cuts: tuple[slice, ...]) -> list[Tensor]:
        state, ys = leaves["initial_state"], []
        for cut in cuts:
            tokens = (leaves[k] if k == "A" else leaves[k][:, cut] for k in NAMES)
            y, state = ssd(*tokens, D=leaves["D"], initial_state=state, impl=impl)
            ys.append(y)
        y = torch.cat(ys, dim=1)
        loss = (y * weight).sum() + state.sum()
        return [y, state, *torch.autograd.grad(loss, list(leaves.values()))]

    whole = through((slice(None),))
    parts = through((slice(0, at), slice(at, None)))
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_concatenated_documents_do_not_see_each_other(impl: str) -> None:
    """Concatenated documents equal separate ones; gradients across a boundary are zero."""
    lengths = (1, 70, 64, 3, 90)
    inputs = make(1, sum(lengths))
    seq_idx = torch.repeat_interleave(
        torch.tensor([4, 0, 0, 7, 2]) + torch.arange(5) * 10, torch.tensor(lengths)
    ).unsqueeze(0)
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    y, last = ssd(**leaves, seq_idx=seq_idx, impl=impl)
    start = 0
    for i, length in enumerate(lengths):
        tokens = {k: inputs[k] if k == "A" else inputs[k][:, start : start + length] for k in NAMES}
        state = inputs["initial_state"] if i == 0 else None
        alone, end = ssd(**tokens, D=inputs["D"], initial_state=state, impl=impl)
        assert relative_rms(y[:, start : start + length].detach(), alone) < 3e-7
        start += length
    assert relative_rms(last.detach(), end) < 3e-7
    y[:, 71:135].sum().backward()
    for name in ("x", "B", "C", "dt"):
        grad = leaves[name].grad
        assert grad[:, 71:135].any()
        # Autograd adds and subtracts the gradient of running sums of dt: zero up to rounding.
        noise = 1e-12 if (impl, name) == ("torch", "dt") else 0.0
        assert grad[:, :71].abs().max() <= noise
        assert grad[:, 135:].abs().max() <= noise
    assert not leaves["initial_state"].grad.any()


@pytest.mark.parametrize("impl", ["naive", "torch", "cpu"])
def test_dt_of_zero_does_not_change_the_state(impl: str) -> None:
    """Padding on the right of a row has dt = 0, so that it has no effect."""
    inputs = make(2, 100)
    inputs["dt"][0, 40:] = 0.0
    y, state = ssd(**inputs, impl=impl)
    short = {k: v[:1, :40] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
    short["initial_state"] = inputs["initial_state"][:1]
    y_short, state_short = ssd(**short, impl=impl)
    torch.testing.assert_close(state[:1], state_short, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y[:1, :40], y_short, rtol=1e-5, atol=1e-5)


def test_gradient_of_a_dt_of_zero() -> None:
    inputs = make(1, 70, torch.float64)
    inputs["dt"][:, 5:9] = 0.0
    grads = []
    for impl in ("naive", "torch", "cpu"):
        dt = inputs["dt"].clone().requires_grad_()
        y, state = ssd(**{**inputs, "dt": dt}, impl=impl)
        (y.square().sum() + state.square().sum()).backward()
        grads.append(dt.grad)
    assert grads[0][:, 5:9].abs().min() > 0
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


@pytest.mark.parametrize("wanted", ["y", "state"])
def test_gradient_of_one_output_only(wanted: str) -> None:
    """For an unused output, autograd passes an expanded gradient or None."""
    inputs = make(2, 70, torch.float64)
    found = []
    for impl in ("naive", "torch", "cpu"):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        outputs = dict(zip(("y", "state"), ssd(**leaves, impl=impl), strict=True))
        used = list(leaves.values())
        grads = torch.autograd.grad(outputs[wanted].sum(), used, allow_unused=True)
        found.append(
            [torch.zeros_like(v) if g is None else g for g, v in zip(grads, used, strict=True)]
        )
    for a, b, c in zip(*found, strict=True):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a)


def test_no_tokens() -> None:
    inputs = make(2, 0)
    for impl in ("naive", "torch", "cpu"):
        y, state = ssd(**inputs, impl=impl)
        assert y.shape == (2, 0, H, P)
        assert torch.equal(state, inputs["initial_state"])


def test_many_rows_and_heads() -> None:
    """More rows times heads than are computed together: rows are taken in slices."""
    inputs = make(7, 70, h=20)
    for a, b in zip(ssd(**inputs), selective_scan(**inputs), strict=True):
        assert relative_rms(a, b) < 1e-6


@pytest.mark.parametrize("sizes", [(1, 64, 300), (300, 64, 1)])
def test_temporaries_of_an_earlier_block_size_can_be_used_again(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers are kept after a call; a call with another block size must work with them."""
    inputs = {k: v.requires_grad_() for k, v in make(3, 200).items()}
    found = []
    for heads in sizes:
        monkeypatch.setattr(cpu_ssd, "BLOCK_HEADS", heads)
        y, state = ssd(**inputs)
        grads = torch.autograd.grad(y.square().sum() + state.sum(), list(inputs.values()))
        found.append([y.detach(), state.detach(), *grads])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert relative_rms(a, b) < 1e-6


def test_results_are_not_overwritten_by_the_next_call() -> None:
    """The next call reuses the memory of temporaries, but must not reuse that of results."""
    inputs, others = make(2, 130), make(2, 130, seed=1)
    found = ssd(**inputs)
    copies = [v.clone() for v in found]
    ssd(**others)
    assert all(torch.equal(a, b) for a, b in zip(found, copies, strict=True))


def test_inference_mode_and_training_may_alternate() -> None:
    inputs = make(1, 33, seed=3)
    with torch.inference_mode():
        expected, _ = ssd(**inputs)
    leaf = inputs["x"].clone().requires_grad_()
    y, _ = ssd(**{**inputs, "x": leaf})
    y.sum().backward()
    assert torch.equal(y.detach(), expected.clone())
    assert leaf.grad.isfinite().all()


def test_threads_do_not_share_temporaries() -> None:
    cases = [make(2, 150, seed=seed) for seed in range(4)]
    expected = [ssd(**case)[0] for case in cases]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(15):
            if relative_rms(ssd(**cases[i])[0], expected[i]) > 1e-6:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_graph_keeps_little_memory() -> None:
    """Besides its inputs, the graph keeps one state per few chunks: less memory than x."""
    inputs = {k: v.requires_grad_() for k, v in make(1, 2048).items()}
    kept: dict[int, int] = {}

    def pack(v: Tensor) -> Tensor:
        kept[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        ssd(**inputs)
    for v in inputs.values():
        kept.pop(v.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) < inputs["x"].nbytes


def test_the_fast_step_overwrites_the_state_it_was_given() -> None:
    inputs = make(2, 1)
    stack = torch.stack([inputs["initial_state"]] * 3, dim=2)  # not contiguous when sliced
    token = [inputs[k] if k == "A" else inputs[k][:, 0] for k in NAMES]
    expected_y, expected = ssd_step(stack[:, :, 1], *token, D=inputs["D"], impl="naive")
    assert torch.equal(stack[:, :, 1], inputs["initial_state"])
    plain_y, plain = ssd_step(stack[:, :, 1], *token, D=inputs["D"], impl="torch")
    torch.testing.assert_close(plain_y, expected_y)
    torch.testing.assert_close(plain, expected)
    assert torch.equal(stack[:, :, 1], inputs["initial_state"])
    y, state = ssd_step(stack[:, :, 1], *token, D=inputs["D"], impl="cpu")
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(stack[:, :, 1], expected)
    assert state.data_ptr() == stack[:, :, 1].data_ptr()
    assert torch.equal(stack[:, :, 0], inputs["initial_state"])


@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize("documents", [False, True])
def test_bfloat16_rounds_y_and_not_the_state(documents: bool, impl: str) -> None:
    """Against float64 on the same rounded numbers. Without gradients, products for y are BF16."""
    inputs = {k: v.bfloat16() if k in ("x", "B", "C") else v for k, v in make(2, 333).items()}
    seq_idx = (torch.arange(333) // 70).expand(2, -1) if documents else None
    exact_y, exact = ssd(**{k: v.double() for k, v in inputs.items()}, seq_idx=seq_idx)
    with torch.no_grad():
        y, state = ssd(**inputs, seq_idx=seq_idx, impl=impl)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert relative_rms(y, exact_y) < 4e-3  # 2^-9 is 2e-3
    assert relative_rms(state, exact) < 1e-6


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_step_keeps_a_wide_state_for_half_precision_tokens(impl: str) -> None:
    inputs = make(2, 1)
    half = [inputs[k].float() if k in ("A", "dt") else inputs[k].bfloat16() for k in NAMES]
    token = [v if v.ndim == 1 else v[:, 0] for v in half]
    state = inputs["initial_state"].clone()
    expected_y, expected = ssd_step(state, *token, impl="naive")
    y, state = ssd_step(state, *token, impl=impl)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    torch.testing.assert_close(state, expected)
    torch.testing.assert_close(y, expected_y)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "dt": ({"dt": torch.ones(2, 5, H + 1)}, r"dt has shape \(2, 5, 5\).*needs \(2, 5, 4\)"),
    "A": ({"A": -torch.ones(1)}, r"A has shape \(1,\)"),
    "C": ({"C": torch.ones(2, 5, G, N + 1)}, r"C has shape \(2, 5, 2, 6\)"),
    "groups": (
        {"B": torch.ones(2, 5, 3, N), "C": torch.ones(2, 5, 3, N)},
        "4 heads do not split into 3 groups",
    ),
    "D": ({"D": torch.ones(H, P)}, r"D has shape \(4, 3\)"),
    "state": ({"initial_state": torch.ones(2, H, N, P)}, "initial_state has shape"),
    "seq_idx": ({"seq_idx": torch.zeros(2, 4, dtype=torch.long)}, "seq_idx has shape"),
    "x": ({"x": torch.ones(2, 5, H * P)}, r"x must be \(b, t, h, p\)"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("function", [ssd, selective_scan], ids=["ssd", "selective_scan"])
def test_wrong_shapes_are_named(function: Any, name: str) -> None:
    """Shape annotations are not checked here, as for users, who get our own messages."""
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(function)(**{**make(2, 5), **change})


def test_other_wrong_arguments() -> None:
    inputs = make(1, 3)
    with pytest.raises(ValueError, match="no implementation 'fast'"):
        ssd(**inputs, impl="fast")
    with pytest.raises(ValueError, match="chunk_size is 0"):
        ssd(**inputs, chunk_size=0)
    token = [inputs[k] if k == "A" else inputs[k][:, 0] for k in NAMES]
    token[4] = torch.ones(1, 3, N)
    with pytest.raises(ValueError, match="C has shape"):
        inspect.unwrap(ssd_step)(inputs["initial_state"], *token)
