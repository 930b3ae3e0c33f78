"""The SSD kernels against the recurrence in float64 of the same rounded inputs.

Tolerances are relative L2 errors: float32 forward 5e-6, gx, gB, gC
2e-6, gdt 2e-5, gA 3e-4 (a sum in which most terms cancel); float16 operands are rounded by 2^-11,
which is 1e-3 with the margin that bfloat16's 8e-3 has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nemotron_kernels.ssd as ssd_module
from nemotron_kernels import ssd_common, ssd_states
from nemotron_kernels.ssd import ssd
from nemotron_lite.backends import cpu_ssd, triton
from nemotron_lite.ops import selective_scan
from nemotron_lite.ops import ssd as torch_ssd

EXACT = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
NAMES = ("y", "state", *(f"g{name}" for name in EXACT))
TOLERANCE = {
    torch.float32: {
        "y": 5e-6, "state": 5e-6, "gx": 2e-6, "gdt": 2e-5, "gA": 3e-4, "gB": 2e-6, "gC": 2e-6,
        "gD": 2e-6, "gdt_bias": 2e-5, "ginitial_state": 2e-6,
    },
    torch.float16: dict.fromkeys(NAMES, 1e-3),
}  # fmt: skip
LENGTHS = [1, 63, 64, 65, 200]


def make(
    b: int,
    t: int,
    h: int = 4,
    p: int = 16,
    g: int = 2,
    n: int = 16,
    dtype: torch.dtype = torch.float32,
    decay: float = 4.0,
) -> dict[str, Tensor]:
    """Inputs in `dtype`; numbers per head and the state in float32."""
    v = {
        "x": torch.randn(b, t, h, p), "dt": torch.randn(b, t, h) - 1,
        "A": -torch.linspace(0.3, decay, h), "B": torch.randn(b, t, g, n) / n**0.5,
        "C": torch.randn(b, t, g, n), "D": torch.randn(h), "dt_bias": 0.3 * torch.randn(h),
        "initial_state": torch.randn(b, h, p, n),
    }  # fmt: skip
    return {k: x.to(dtype) if k in ("x", "dt", "B", "C") else x for k, x in v.items()}


def definition(v: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """softplus, then the recurrence."""
    v = dict(v)
    bias = v.pop("dt_bias", None)
    if bias is not None:
        v["dt"] = F.softplus(v["dt"] + bias)
    return selective_scan(**v, **options)


def kernel(v: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    return ssd(**v, dt_softplus="dt_bias" in v, **options)


def run(
    function: Callable[..., tuple[Tensor, Tensor]], v: dict[str, Tensor], wide: bool, **options: Any
) -> dict[str, Tensor]:
    """y, the last state, and the gradient of every input for fixed gradients of both."""
    leaves = {k: (x.double() if wide else x).detach().requires_grad_() for k, x in v.items()}
    y, state = function(leaves, **options)
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(out.shape, generator=generator) for out in (y, state)]
    grads[0] = grads[0].to(v["x"].dtype)
    grads = [grad.to(out.dtype) for grad, out in zip(grads, (y, state), strict=True)]
    torch.autograd.backward([y, state], grads)
    return {"y": y, "state": state, **{f"g{k}": leaf.grad for k, leaf in leaves.items()}}


def relative(found: Tensor, exact: Tensor) -> float:
    """Relative L2 error; inf where anything is not finite."""
    found, exact = found.detach(), exact.detach()
    if not found.isfinite().all():
        return float("inf")
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def check(v: dict[str, Tensor], *, seq_idx: Tensor | None = None, **options: Any) -> None:
    """Every value and gradient within its tolerance of the definition."""
    found = run(kernel, v, False, seq_idx=seq_idx, **options)
    exact = run(definition, v, True, seq_idx=seq_idx)
    limits = TOLERANCE[v["x"].dtype]
    errors = {name: relative(found[name], exact[name]) for name in exact}
    assert found["y"].dtype == v["x"].dtype
    assert found["state"].dtype == torch.float32
    assert all(error < limits[name] for name, error in errors.items()), errors


@pytest.fixture(params=["loop", "pass"])
def between_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with both forms of the pass over states, whichever would be selected."""
    monkeypatch.setattr(ssd_states, "loops_over_chunks", lambda *_: request.param == "loop")
    return str(request.param)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("t", LENGTHS)
def test_three_passes_and_every_gradient(t: int, dtype: torch.dtype, between_chunks: str) -> None:
    check(make(1, t, dtype=dtype), variant="three")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("t", LENGTHS)
def test_fused(t: int, dtype: torch.dtype) -> None:
    v = make(2, t, dtype=dtype)
    y, state = kernel(v, variant="fused")
    exact_y, exact_state = definition({k: x.double() for k, x in v.items()})
    assert relative(y, exact_y) < TOLERANCE[dtype]["y"]
    assert relative(state, exact_state) < TOLERANCE[dtype]["state"]


@pytest.mark.parametrize(("h", "g"), [(1, 1), (3, 1), (4, 4), (6, 2)])
def test_groups(h: int, g: int) -> None:
    check(make(2, 37, h=h, g=g), variant="fused")


def test_heads_of_a_group_in_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """gB and gC are then sums of partial sums."""
    monkeypatch.setattr(ssd_common, "INTERPRETED_PROCESSORS", 1000)
    check(make(1, 20, h=6, g=2), variant="three")


@pytest.mark.parametrize(("p", "n"), [(5, 3), (24, 40)])
def test_sizes_below_a_block(p: int, n: int) -> None:
    check(make(1, 35, h=2, g=1, p=p, n=n), variant="fused")


@pytest.mark.parametrize(("block_p", "block_n"), [(16, 16)])
def test_p_and_n_in_several_blocks(
    block_p: int, block_n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = {"fused": "BLOCK_P", "states": "BLOCK_P", "grad_bc": "BLOCK_N"}
    for name, block in blocks.items():
        size = block_p if block == "BLOCK_P" else block_n
        config = ssd_common.CONFIGS[name][4][0]
        changed = ssd_common.Config({**config.blocks, block: size})
        monkeypatch.setitem(ssd_common.CONFIGS[name][4], 0, changed)
    check(make(1, 70, h=2, g=1, p=40, n=35), variant="fused")


@pytest.mark.parametrize("chunk", [1, 20, 64, 256])
def test_the_chunk_changes_nothing_but_rounding(chunk: int) -> None:
    check(make(1, 70, h=2, g=1), variant="three", chunk=chunk)


def test_views_of_one_projection_and_axes_apart() -> None:
    """x, B and C are slices of one tensor, dt of another; p and n are not contiguous."""
    b, t, h, p, g, n = 2, 66, 2, 8, 2, 16
    v = make(b, t, h=h, p=p, g=g, n=n)
    parts = [v[k].flatten(2) for k in ("x", "B", "C", "dt")]
    wide = torch.cat([torch.randn(b, t, 3), *parts], dim=-1)
    _, x, B, C, dt = wide.split([3, h * p, g * n, g * n, h], dim=-1)
    views = {"x": x.unflatten(-1, (h, p)), "B": B.unflatten(-1, (g, n)), "dt": dt}
    views["C"] = C.unflatten(-1, (g, n)).permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    state = v["initial_state"].transpose(2, 3).contiguous().transpose(2, 3)
    strided = {**v, **views, "initial_state": state}
    assert not any(strided[k].is_contiguous() for k in (*views, "initial_state"))
    for variant in ("fused", "three"):
        found, expected = (run(kernel, w, False, variant=variant) for w in (strided, v))
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("variant", "loop"), [("fused", True), ("three", True), ("three", False)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_concatenated_documents(
    variant: str, loop: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents begin at a chunk's edge, twice in a chunk, and one token apart, or not at all."""
    monkeypatch.setattr(ssd_states, "loops_over_chunks", lambda *_: loop)
    seq_idx = torch.zeros(2, 150, dtype=torch.int32)
    for start in (1, 20, 64, 65, 127):
        seq_idx[0, start:] += 3
    check(make(2, 150, h=2, g=1, dtype=dtype), variant=variant, seq_idx=seq_idx)


@pytest.mark.parametrize(("variant", "loop"), [("fused", True), ("three", True), ("three", False)])
def test_a_repeated_document_number_starts_a_new_document(
    variant: str, loop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 1 0 within a chunk, across the edge of a chunk, and from its first to its last token."""
    monkeypatch.setattr(ssd_states, "loops_over_chunks", lambda *_: loop)
    seq_idx = torch.zeros(2, 140, dtype=torch.int64)
    seq_idx[0, 20:22], seq_idx[0, 63:65], seq_idx[1, 64:128] = 1, 1, 7
    check(make(2, 140, h=2, g=1), variant=variant, seq_idx=seq_idx)


def test_documents_do_not_see_each_other() -> None:
    """Each document has the values that it has alone; equal bits if the chunks are the same."""
    v = make(1, 128, h=2, g=1)
    seq_idx = torch.arange(256).view(1, 256)[:, ::2] // 128  # strided, int64
    y, state = kernel(v, seq_idx=seq_idx)
    later = {k: x[:, 64:] if k in ("x", "dt", "B", "C") else x for k, x in v.items()}
    del later["initial_state"]
    alone, last = kernel(later)
    assert torch.equal(y[:, 64:], alone)
    assert torch.equal(state, last)


@pytest.mark.parametrize("variant", ["fused", "three"])
def test_only_the_required_arguments(variant: str) -> None:
    """No D, no initial state, no bias and no softplus."""
    v = make(2, 67, h=2, g=1)
    v = {k: v[k] for k in ("x", "dt", "A", "B", "C")}
    v["dt"] = F.softplus(v["dt"])
    check(v, variant=variant)


@pytest.mark.parametrize("variant", ["fused", "three"])
def test_strong_decay(variant: str) -> None:
    """Here exp(s_l - s_r) overflows above the diagonal and is soon zero below it."""
    check(make(1, 100, h=4, g=1, decay=400.0), variant=variant)


@pytest.mark.parametrize("variant", ["fused", "three"])
def test_small_decays_are_precise(variant: str) -> None:
    """One write, then a decay of e^-1 per token, down to e^-59, the last above the floor."""
    one = torch.ones(1, 60, 1, 1)
    x = torch.zeros(1, 60, 1, 1)
    x[0, 0] = 1
    options = {"chunk": 32, "variant": variant}
    y, _ = ssd(x, one[..., 0], -torch.ones(1), one, one, **options)
    exact = torch.exp(-torch.arange(60).double())
    torch.testing.assert_close(y.flatten().double(), exact, rtol=1e-5, atol=0)
    state = torch.ones(1, 1, 1, 1)
    y, _ = ssd(0 * x, one[..., 0], -torch.ones(1), one, one, None, state, **options)
    torch.testing.assert_close(y.flatten().double(), exact / torch.e, rtol=1e-5, atol=0)


def test_steps_of_zero_do_not_change_the_state() -> None:
    v = make(2, 70, h=2, g=1)
    del v["dt_bias"]
    v["dt"] = F.softplus(v["dt"])
    v["dt"][:, 40:] = 0
    check(v)
    short = {k: x[:, :40] if k in ("x", "dt", "B", "C") else x for k, x in v.items()}
    torch.testing.assert_close(kernel(v)[1], kernel(short)[1])


@pytest.mark.parametrize("variant", ["fused", "three"])
def test_padding_is_a_step_of_zero_before_softplus(variant: str) -> None:
    """A dt of minus infinity does not change the state, and its gradient is not NaN."""
    v = make(2, 70, h=2, g=1)
    v["dt"][0, 40:], v["dt"][1, 3] = -torch.inf, -torch.inf
    found, exact = run(kernel, v, False, variant=variant), run(definition, v, True)
    for name, error in ((k, relative(found[k], exact[k])) for k in exact):
        assert error < TOLERANCE[torch.float32][name], (name, error)
    assert (found["gdt"][0, 40:] == 0).all()
    short = {k: x[:1, :40] if k in ("x", "dt", "B", "C") else x for k, x in v.items()}
    short["initial_state"] = v["initial_state"][:1]
    torch.testing.assert_close(found["state"][:1], kernel(short, variant=variant)[1])


def test_softplus_and_its_gradient_for_small_and_large_steps() -> None:
    """Steps of e^-30 to 30, one document each, so that y is dt times x (C . B).

    The tolerance of 2e-6 is the error of exp2 after rounding -30 log2(e).
    """
    dt = torch.linspace(-30, 30, 61).view(1, -1, 1).requires_grad_()
    one, seq_idx = torch.ones(1, 61, 1, 1), torch.arange(61).view(1, -1)
    y, _ = ssd(one, dt, -torch.ones(1), one, one, seq_idx=seq_idx, dt_softplus=True)
    exact = dt.detach().double().requires_grad_()
    expected = F.softplus(exact, threshold=100)
    torch.testing.assert_close(y.flatten(), expected.flatten().float(), rtol=2e-6, atol=0)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(dt.grad, exact.grad.float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("output", [0, 1])
def test_gradients_of_one_output_only(output: int) -> None:
    """The other output has no gradient; this one's gradient is expanded from one number."""
    v = make(1, 66, h=2, g=1)
    found, exact = (
        {k: (x.double() if wide else x.clone()).requires_grad_() for k, x in v.items()}
        for wide in (False, True)
    )
    kernel(found)[output].sum().backward()
    definition(exact)[output].sum().backward()
    for name, leaf in found.items():
        if exact[name].grad is None:  # the state does not depend on D
            assert not leaf.grad.any()
        else:
            error = relative(leaf.grad, exact[name].grad)
            assert error < TOLERANCE[torch.float32][f"g{name}"], (name, error)


@pytest.mark.parametrize("split", [1, 64, 99])
def test_carrying_the_state_across_a_split(split: int) -> None:
    v = make(1, 100, h=2, g=1)
    whole, end = kernel(v)
    halves = [
        {k: x[:, part] if k in ("x", "dt", "B", "C") else x for k, x in v.items()}
        for part in (slice(0, split), slice(split, None))
    ]
    first, state = kernel(halves[0])
    second, last = kernel({**halves[1], "initial_state": state})
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, end, rtol=1e-5, atol=1e-5)


def test_mixed_dtypes() -> None:
    """As in a model: 16-bit x, B and C, float32 dt and A, and a 16-bit state."""
    v = make(1, 65, h=2, g=1, dtype=torch.float16)
    v["dt"], v["initial_state"] = v["dt"].float(), v["initial_state"].half()
    check(v)
    found = run(kernel, v, False)
    assert all(found[f"g{k}"].dtype == x.dtype for k, x in v.items())


@pytest.mark.parametrize(("b", "t"), [(2, 0), (0, 5)])
def test_no_tokens(b: int, t: int) -> None:
    v = {k: x.requires_grad_() for k, x in make(b, t).items()}
    y, state = kernel(v)
    assert y.shape == (b, t, 4, 16)
    assert torch.equal(state, v["initial_state"])
    state.sum().backward()
    assert (v["initial_state"].grad == 1).all()
    del v["initial_state"]
    assert not kernel(v)[1].any()


def test_the_arguments_of_the_other_implementations() -> None:
    """They have the same positional arguments, so that `ops.ssd` can call any of them."""

    def parameters(function: Callable[..., Any], kind: Any) -> list[str]:
        return [n for n, p in inspect.signature(function).parameters.items() if p.kind is kind]

    by_place, by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    theirs = list(inspect.getmodule(torch_ssd).Inputs._fields)
    assert parameters(triton.ssd, by_place) == theirs
    count = len(parameters(ssd, by_place))
    assert parameters(ssd, by_place) == theirs[:count]
    assert set(theirs[count:]) <= set(parameters(ssd, by_name))
    v = make(1, 70)
    del v["dt_bias"]
    v["dt"] = F.softplus(v["dt"])
    arguments = (*v.values(), None, 32)
    limits = cpu_ssd.LIMITS
    assert limits[torch.float32].low == pytest.approx(
        float(ssd_common.FLOOR.value) * 0.6931472, abs=0.1
    )
    for found, expected in zip(ssd(*arguments), torch_ssd(**v, chunk_size=32), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_which_variant_is_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass over states loops for few chunks or many heads; fused is for few chunks only."""
    monkeypatch.setattr(ssd_common, "processors", lambda _: 132)

    def x(b: int, t: int, h: int) -> Tensor:
        return torch.zeros(1, dtype=torch.float16).expand(b, t, h, 64)

    assert ssd_common.loops_over_chunks(x(1, 4096, 128), 64, 64)
    assert not ssd_common.loops_over_chunks(x(1, 4096, 16), 64, 64)
    assert ssd_common.loops_over_chunks(x(1, 256, 16), 4, 64)
    assert ssd_common.loops_over_chunks(x(1, 4096, 22), 64, 32)
    chunk = ssd_common.config("fused", x(1, 1, 1))["Q"]
    assert ssd_module._variant(x(1, ssd_common.FEW_CHUNKS * chunk, 128)) == "fused"
    assert ssd_module._variant(x(1, ssd_common.FEW_CHUNKS * chunk + 1, 128)) == "three"
    assert ssd_module._variant(x(1, chunk, 2).float()) == "three"
    monkeypatch.setattr(ssd_common, "processors", lambda _: 100)
    heads = ssd_common.heads_per_program
    assert heads(x(1, 64, 96), 4, 4 * 100, 16) == 12  # 24 heads per group: only divisors
    assert heads(x(1, 64, 96), 4, 4, 16) == 1
    assert heads(x(1, 64, 96), 4, 20, 16) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 4)}, r"x must be \(b, t, h, p\)"),
        ({"dt": torch.zeros(2, 5, 3)}, r"dt has shape \(2, 5, 3\).*needs \(2, 5, 4\)"),
        ({"D": torch.zeros(4, 16)}, r"D has shape \(4, 16\)"),
        ({"initial_state": torch.zeros(2, 4, 16, 8)}, "initial_state has shape"),
        ({"B": torch.zeros(2, 5, 3, 16)}, "4 heads do not split into 3 groups"),
        ({"x": torch.zeros(2, 5, 4, 16).double()}, "not torch.float64"),
        ({"x": torch.zeros(2, 5, 4, 300)}, "p is 300.*up to 256"),
        ({"chunk": 0}, "chunk is 0"),
        ({"variant": "best"}, "no variant 'best'"),
        ({"precision": "bf16"}, "no precision 'bf16'"),
    ],
)
def test_wrong_input_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssd(**{**make(2, 5), **change})
