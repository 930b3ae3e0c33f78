"""Exercises of chapter 02: the parts of Mamba-2 that ports get wrong.

    02.decay_mask     what is left of token r when token l reads: a lower triangle of products
    02.one_chunk      one chunk of the scan: its outputs, and the state it hands on
    02.gate_and_norm  the gate, then one norm per group
    02.conv_token     one token of the convolution, with the state it carries

The checks are in `checks.py`; the mistakes that they have to catch are in
`tests/course/chapters/ch02_mamba2/mutants.py`.
"""

from __future__ import annotations

from nemotron_lite.course.chapters.ch02_mamba2 import checks
from nemotron_lite.course.exercises import Check, Exercise

DECAY_MASK = Exercise(
    id="02.decay_mask",
    title="The decay mask",
    objective="O1: write the recurrence of a head as a masked matrix.",
    minutes=10,
    difficulty=2,
    points=5,
    task=r"""
For each head, build the matrix $L$ with

$$L_{lr} = \exp(a_{r+1} + \dots + a_l) \quad (r \le l), \qquad a_t = dt_t A, \qquad
L_{lr} = 0 \quad (r > l)$$

No loop over tokens. It has to stay finite when a head forgets everything at each token.
""".strip(),
    stub='''
import torch


def decay_mask(dt, A):
    """How much of what token r wrote is left when token l reads.

    Args:
        dt: step sizes, b t h, not negative.
        A: decay rates, h, negative.

    Returns:
        b h t t, entry [l, r] in the last two axes.
    """
    raise NotImplementedError
'''.strip(),
    solution='''
import torch


def decay_mask(dt, A):
    """How much of what token r wrote is left when token l reads."""
    total = (dt * A).cumsum(1).transpose(1, 2)  # b h t
    exponent = total.unsqueeze(-1) - total.unsqueeze(-2)  # b h l r
    t = dt.shape[1]
    seen = torch.ones(t, t, dtype=torch.bool, device=dt.device).tril()
    return exponent.masked_fill(~seen, -torch.inf).exp()
'''.strip(),
    hints=(
        "The sum from r+1 to l is a difference of two running sums: `s_l - s_r`, with s the "
        "`cumsum` of dt * A along **time**. On the diagonal it is 0: a token reads what it has "
        "just written, undiminished.",
        "dt is `b t h`, the mask `b h t t`: move the head axis forward, then subtract with "
        "`s.unsqueeze(-1) - s.unsqueeze(-2)`. Rows are readers l, columns are writers r.",
        "Above the diagonal the difference is **positive**, and its exponential can be infinite. "
        "Multiplying by 0 afterwards gives NaN, at the latest in the gradient. Fill those places "
        "with -inf *before* the exponential. Never divide exp(s_l) by exp(s_r) either.",
    ),
    checks=(
        Check("three tokens by hand", checks.mask_by_hand, hint=1, points=1),
        Check("as part of the matrix", checks.mask_in_the_matrix, hint=2, points=1),
        Check("strong decay", checks.mask_under_strong_decay, hint=3, points=2),
        Check("gradients", checks.mask_gradients, hint=3, points=1),
    ),
)

ONE_CHUNK = Exercise(
    id="02.one_chunk",
    title="One chunk and its state",
    objective="O2: compute the scan in chunks, in four numbered steps.",
    minutes=25,
    difficulty=4,
    points=8,
    task=r"""
Compute one chunk of the scan from matrix products: the outputs of its q tokens, and the state it
hands to the next chunk. With $s$ the running sum of $a = dt\,A$ inside the chunk:

$$y_l = \sum_{r \le l} (C_l \cdot B_r)\, e^{s_l - s_r}\, dt_r x_r + e^{s_l} S C_l, \qquad
S' = e^{s_q} S + \sum_r e^{s_q - s_r}\, dt_r\, x_r \otimes B_r$$

No loop over tokens. There is no $D$ here.
""".strip(),
    stub='''
import torch


def one_chunk(x, dt, A, B, C, state):
    """One chunk of the selective scan.

    Args:
        x: b q h p.
        dt: step sizes, b q h.
        A: decay rates, h, negative.
        B, C: b q g n. Head i reads group i // (h / g).
        state: S before the chunk, b h p n.

    Returns:
        (y, state): b q h p, and S after the chunk, b h p n.
    """
    raise NotImplementedError
'''.strip(),
    solution='''
import torch


def one_chunk(x, dt, A, B, C, state):
    """One chunk of the selective scan."""
    q, shared = x.shape[1], x.shape[2] // B.shape[2]
    B, C = (v.repeat_interleave(shared, dim=2) for v in (B, C))  # b q h n
    written = dt.unsqueeze(-1) * x
    total = (dt * A).cumsum(1)  # b q h
    seen = torch.ones(q, q, dtype=torch.bool, device=x.device).tril().unsqueeze(-1)
    exponent = (total.unsqueeze(2) - total.unsqueeze(1)).masked_fill(~seen, -torch.inf)
    mix = torch.einsum("blhn,brhn->blrh", C, B) * exponent.exp()
    inside = torch.einsum("blrh,brhp->blhp", mix, written)
    before = torch.einsum("blhn,bhpn->blhp", C, state) * total.exp().unsqueeze(-1)
    out_of = (total[:, -1:] - total).exp().unsqueeze(-1)
    added = torch.einsum("brhp,brhn->bhpn", written * out_of, B)
    kept = total[:, -1].exp()[..., None, None] * state
    return inside + before, kept + added
'''.strip(),
    hints=(
        "First the tokens among themselves (step 1): scores `C_l . B_r` per **group**, copied to "
        "its heads with `repeat_interleave`, times the decay mask, times `dt_r x_r`. Neighbouring "
        "heads share a group; `repeat` would alternate the groups.",
        "Then the past (step 4): every token reads the old state, `S C_l`, faded by everything "
        "since the chunk began, its own step included: `exp(s_l)`.",
        "Last the future (steps 2 and 3): the old state fades by the whole chunk, `exp(s_q)`; "
        "what token r wrote only by what comes **after** it, `exp(s_q - s_r)`. Form the difference "
        "before the exponential, and mask before it too. For the last token the factor is 1.",
    ),
    checks=(
        Check("tokens of one chunk among themselves", checks.chunk_alone, hint=1, points=2),
        Check("reading the state before", checks.chunk_reads_state, hint=2, points=1),
        Check("the state handed on", checks.chunk_hands_on, hint=3, points=2),
        Check("three chunks in a row", checks.chunks_in_a_row, hint=3, points=1),
        Check("strong decay", checks.chunk_under_strong_decay, hint=3, points=1),
        Check("gradients", checks.chunk_gradients, hint=3, points=1),
    ),
)

GATE_AND_NORM = Exercise(
    id="02.gate_and_norm",
    title="Gate, then norm by groups",
    objective="O3: follow a token through the mixer, to its gate and its grouped norm.",
    minutes=10,
    difficulty=2,
    points=5,
    task=r"""
The mixer's last step before its output projection. Gate first, $v = y \cdot \mathrm{silu}(z)$, then
divide each of the g groups of neighbouring channels by **its own** root mean square,
$\sqrt{\mathrm{mean}(v^2) + \epsilon}$, and scale each channel by its weight.

Compute in float32 when y is a half type, and give the result back in the dtype of y.
""".strip(),
    stub='''
import torch
import torch.nn.functional as F


def gate_and_norm(y, z, weight, groups, eps=1e-5):
    """Gate y by z, then normalise each group of channels.

    Args:
        y, z: any leading axes, then c channels.
        weight: scale of each channel, c.
        groups: how many equal runs of channels have a norm of their own.
    """
    raise NotImplementedError
'''.strip(),
    solution='''
import torch
import torch.nn.functional as F


def gate_and_norm(y, z, weight, groups, eps=1e-5):
    """Gate y by z, then normalise each group of channels."""
    wide = torch.promote_types(y.dtype, torch.float32)
    gated = y.to(wide) * F.silu(z.to(wide))
    split = gated.unflatten(-1, (groups, -1))
    normed = split * torch.rsqrt(split.square().mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight.to(wide)).to(y.dtype)
'''.strip(),
    hints=(
        "Order and function: `y * F.silu(z)` comes first, the norm sees the gated values. No mean "
        "is subtracted; this is a root mean square, not a layer norm.",
        "`unflatten(-1, (groups, -1))` splits the channels; take the mean of the squares over the "
        "last axis only, with `keepdim=True`, and flatten the two axes again.",
        "eps is **inside** the root, added to the mean of squares. Squares of float16 overflow "
        "beyond 255: widen with `torch.promote_types(y.dtype, torch.float32)` before squaring.",
    ),
    checks=(
        Check("one group", checks.norm_one_group, hint=1, points=1),
        Check("groups do not see each other", checks.norm_groups, hint=2, points=1),
        Check("near zero", checks.norm_small, hint=3, points=1),
        Check("half precision", checks.norm_half, hint=3, points=1),
        Check("gradients", checks.norm_gradients, hint=3, points=1),
    ),
)

CONV_TOKEN = Exercise(
    id="02.conv_token",
    title="One token of the convolution",
    objective="O4: continue from a state, one token at a time.",
    minutes=10,
    difficulty=2,
    points=5,
    task=r"""
While a model writes, the causal convolution sees one token at a time. It remembers the last
$k - 1$ **inputs**. Compute

$$y = \mathrm{silu}\Big(\mathrm{bias} + \sum_{j=0}^{k-1} w_j\, x_{t-k+1+j}\Big)$$

for one new token, and the state for the next one. The last tap, $w_{k-1}$, belongs to the new
token. Do not write into the state you were given.
""".strip(),
    stub='''
import torch
import torch.nn.functional as F


def conv_token(state, x, weight, bias):
    """One token of a causal depthwise convolution with SiLU.

    Args:
        state: the last k-1 inputs, oldest first, b k-1 c.
        x: the new input, b c.
        weight: taps, oldest first, c k.
        bias: c.

    Returns:
        (y, state): b c, and the last k-1 inputs after this token.
    """
    raise NotImplementedError
'''.strip(),
    solution='''
import torch
import torch.nn.functional as F


def conv_token(state, x, weight, bias):
    """One token of a causal depthwise convolution with SiLU."""
    window = torch.cat([state, x.unsqueeze(1)], dim=1)  # b k c
    y = (window * weight.T).sum(1) + bias
    return F.silu(y), window[:, 1:]
'''.strip(),
    hints=(
        "Append the new input to the state: a window of k inputs, oldest first. `weight.T` is "
        "`k c` and lines up with it; multiply, sum over the k, add the bias, then SiLU.",
        "The state is made of **inputs**, before convolution and SiLU, and it always ends with the "
        "newest one: drop the first entry of the window, not the last.",
        "`torch.cat` makes a new tensor; `state[:, :-1] = ...` or `copy_` would write into memory "
        "that a snapshot still needs, and would break the gradient.",
    ),
    checks=(
        Check("one output", checks.conv_output, hint=1, points=2),
        Check("nine tokens in a row", checks.conv_text, hint=2, points=1),
        Check("the old state is left alone", checks.conv_keeps_snapshot, hint=3, points=1),
        Check("gradients", checks.conv_gradients, hint=3, points=1),
    ),
)

EXERCISES: tuple[Exercise, ...] = (DECAY_MASK, ONE_CHUNK, GATE_AND_NORM, CONV_TOKEN)
