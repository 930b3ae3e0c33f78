"""SSD in Triton: the selective scan of a whole sequence by chunks, with its gradient.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t (outer) B_t,      y_t = S_t C_t + D x_t

`ssd` has the arguments of `nemotron_lite.ops.ssd`, and two more for measurements: the variant
(fused or in passes), and how float32 is multiplied. The kernels can also apply the bias and the
softplus of dt, which saves a pass over dt in each direction. `mamba_chunk_scan_combined` has the
arguments of mamba_ssm, so that it can replace that function.

The other files: ssd_common.py has the decays, the configurations and the rule that selects the
variant, ssd_states.py the states between chunks, ssd_forward.py the outputs, and ssd_backward.py
the gradients.

Only the inputs are kept for the backward pass; the states are computed again. The backward pass
needs memory for two states per chunk, b*h*p*n numbers each in the dtype of x: for one million
tokens of Super in chunks of 64, 66 GB in bfloat16. The forward pass needs one of the two, or none
when it is fused. A long prompt is read in segments, so that there are few chunks at a time.

Left out: float64 (a kernel would not be faster; use impl="torch"), second derivatives, and
inside the kernels D per channel and dt_limit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_kernels._compat import cdiv, check_inputs, check_rows, next_power_of_2, on_device
from nemotron_kernels.ssd_backward import backward
from nemotron_kernels.ssd_common import FEW_CHUNKS, Inputs, config
from nemotron_kernels.ssd_forward import forward_fused, forward_three

VARIANTS = ("auto", "fused", "three")
PRECISIONS = ("ieee", "tf32x3", "tf32")
WIDEST = 256  # p and n: wider tiles fit no GPU's shared memory


def ssd(
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    D: Float[Tensor, "h"] | None = None,
    initial_state: Float[Tensor, "b h p n"] | None = None,
    seq_idx: Int[Tensor, "b t"] | None = None,
    chunk: int | None = None,
    *,
    dt_bias: Float[Tensor, "h"] | None = None,
    dt_softplus: bool = False,
    variant: str = "auto",
    precision: str = "ieee",
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """The selective scan over t tokens; every argument but `seq_idx` is differentiable.

    Args:
        x: the input of each head: float32, bfloat16 or float16, any strides, any t. Matrix products
            take operands in this dtype.
        dt: step size per token and head; before `dt_bias` and softplus if those are given.
        A: decay rate per head, negative.
        B, C: write and read directions, one per group; g divides h.
        D: weight of the direct path from x to y, D x; no such path when None.
        initial_state: state before the first token; zeros when None.
        seq_idx: number of the document of each token, if a row holds concatenated documents. Where
            it changes, the state is reset to zero; `initial_state` belongs to the first document of
            the row.
        chunk: tokens per chunk, at most. The kernels use a power of two, at least 16 and at most
            what their tiles hold. Only rounding depends on it. By default, the configured size.
        dt_bias: added to dt.
        dt_softplus: whether dt (plus bias) goes through softplus.
        variant: "fused" (one kernel), "three" (three passes), or "auto": fused for a few chunks,
            otherwise three. Three passes need memory for one state per chunk, fused does not.
        precision: of products of float32 operands: "ieee" (exact, without tensor cores), "tf32x3"
            (error about 1e-6) or "tf32" (about 3e-4). It does not affect 16-bit operands.

    Returns:
        (y, state): y in the dtype of x, contiguous, and the state after the last token in float32.

    Raises:
        ValueError: shapes that do not fit each other, float64, a chunk below 1, p or n above 256,
            an unknown variant or precision, more than 65,535 rows.
        RuntimeError: tensors on the CPU, outside the interpreter.
    """
    check_inputs("ssd", x, dt, A, B, C, D, initial_state, seq_idx, dt_bias)
    _check_shapes(x, dt, A, B, C, D, initial_state, seq_idx, dt_bias)
    check_rows("ssd", x.shape[0])
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1 token.")
    for name, value, known in (
        ("variant", variant, VARIANTS),
        ("precision", precision, PRECISIONS),
    ):
        if value not in known:
            raise ValueError(f"ssd has no {name} {value!r}; choose one of {', '.join(known)}.")
    state = None if initial_state is None else initial_state.to(torch.float32).contiguous()
    if x.numel() == 0:
        b, _, h, p = x.shape
        last = x.new_zeros(b, h, p, B.shape[3], dtype=torch.float32) if state is None else state
        return torch.zeros_like(x), last.clone()
    vectors = (None if v is None else v.contiguous() for v in (A, D, dt_bias))
    A, D, dt_bias = vectors  # type: ignore[assignment]
    with on_device(x):
        return _Ssd.apply(  # type: ignore[no-any-return]
            x, dt, A, B, C, D, dt_bias, state, seq_idx, dt_softplus, chunk, precision, variant
        )


def mamba_chunk_scan_combined(
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    chunk_size: int,
    D: Float[Tensor, "h"] | Float[Tensor, "h p"] | None = None,
    z: Float[Tensor, "b t h p"] | None = None,
    dt_bias: Float[Tensor, "h"] | None = None,
    initial_states: Float[Tensor, "b h p n"] | None = None,
    seq_idx: Int[Tensor, "b t"] | None = None,
    cu_seqlens: Int[Tensor, "docs1"] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ssd` with the argument names, order and result of mamba_ssm's function of this name.

    Differences: `chunk_size` is an upper bound. A document of `seq_idx` begins where the number
    changes, and `initial_states` belongs to the first document of a row, whatever its number.
    Three options are computed outside the kernel, because Nemotron 3 does not use them: a D per
    channel, the gate by z (Nemotron 3 applies it in the norm that follows) and `dt_limit`.

    Returns:
        y `b t h p`, times silu(z) where z is given; with `return_final_states`, (y, final states
        `b h p n` in float32).

    Raises:
        ValueError: `return_varlen_states`; and as `ssd`.
        RuntimeError: as `ssd`.
    """
    if return_varlen_states:  # mamba_ssm uses cu_seqlens only for this
        raise ValueError(
            "mamba_chunk_scan_combined: return_varlen_states is not supported. To get the last "
            "state of each document, call the function once per document."
        )
    if tuple(dt_limit) != (0.0, float("inf")):
        dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
        dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
        dt_bias, dt_softplus = None, False
    per_channel = D is not None and D.ndim == 2
    y, last = ssd(
        x,
        dt,
        A,
        B,
        C,
        None if per_channel else D,
        initial_states,
        seq_idx,
        chunk_size,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
    )
    if D is not None and per_channel:
        y = (y + D * x).to(x.dtype)
    if z is not None:
        y = y * F.silu(z)
    return (y, last) if return_final_states else y


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, x, dt, A, B, C, D, dt_bias, initial, seq_idx, softplus, chunk, precision, variant
    ) -> tuple[Tensor, Tensor]:
        tensors = (x, dt, A, B, C, D, dt_bias, initial, seq_idx)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.softplus, ctx.chunk, ctx.precision = softplus, chunk, precision
        if variant == "auto":
            variant = _variant(x)
        kernel, run = ("fused", forward_fused) if variant == "fused" else ("scan", forward_three)
        return run(Inputs(*tensors, softplus), _chunk(kernel, x, chunk), precision)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        inputs = Inputs._make((*ctx.saved_tensors, ctx.softplus))
        x = inputs.x
        if grad_y is None:
            grad_y = x.new_zeros(()).expand_as(x)
        if grad_last is not None:
            grad_last = grad_last.contiguous()
        chunk = _chunk("grad_x", x, ctx.chunk)
        with on_device(x):
            grads = backward(inputs, grad_y, grad_last, chunk, ctx.precision)
        found = tuple(
            None if value is None else grad.to(value.dtype)
            for value, grad in zip(inputs[:8], grads, strict=True)
        )
        return (*found, None, None, None, None, None)


def _chunk(kernel: str, x: Tensor, wanted: int | None) -> int:
    """Tokens per chunk: the configured size, or a smaller power of two if `wanted` is smaller."""
    most = config(kernel, x)["Q"]
    return most if wanted is None else min(most, max(16, next_power_of_2(wanted)))


def _variant(x: Tensor) -> str:
    """Three passes, unless there are so few chunks that the launches cost more than they save.

    On an H200 the fused kernel takes 5.3 us per chunk, for any number of heads up to one per
    multiprocessor. Three passes take 4.5 us for Super's 128 heads and 3.4 us for Nano's 64
    (benchmarks/records/kernels_nvidia_h200.json). Float32 always takes three passes, because
    without tensor cores the fused kernel spills most of its registers.
    """
    few = cdiv(x.shape[1], config("fused", x)["Q"]) <= FEW_CHUNKS
    return "fused" if few and x.dtype != torch.float32 else "three"


def _check_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_bias: Tensor | None,
) -> None:
    if x.ndim != 4 or B.ndim != 4:
        raise ValueError(
            f"x must be (b, t, h, p) and B (b, t, g, n); got {tuple(x.shape)} and {tuple(B.shape)}."
        )
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    if h % g:
        raise ValueError(f"{h} heads do not split into {g} groups: g must divide h.")
    if max(p, n) > WIDEST:
        raise ValueError(
            f"p is {p} and n is {n}; the kernels take up to {WIDEST}. Use nemotron_lite.ops with "
            "impl='torch'."
        )
    expected = {
        "dt": (dt, (b, t, h)),
        "A": (A, (h,)),
        "B": (B, (b, t, g, n)),
        "C": (C, (b, t, g, n)),
        "D": (D, (h,)),
        "initial_state": (initial_state, (b, h, p, n)),
        "seq_idx": (seq_idx, (b, t)),
        "dt_bias": (dt_bias, (h,)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; x {tuple(x.shape)} with {g} groups of "
                f"states of size {n} needs {shape}."
            )
