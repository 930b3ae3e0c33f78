"""Exercises of chapter 01: the selective scan, from one step in continuous time to its gradient.

    01.discretise           two rules that turn a rate and a step size into a fade and a gain
    01.selective_recurrence the definition: fade, write, read, one token at a time
    01.combine_spans        the associative operator that lets a scan run in parallel
    01.scan_gradients       the gradient of the scan, which is a scan in the other direction

The checks are in `checks.py`; the mistakes that they have to catch are in
`tests/course/chapters/ch01_selective_scan/mutants.py`.
"""

from __future__ import annotations

from nemotron_lite.course.chapters.ch01_selective_scan import checks
from nemotron_lite.course.exercises import Check, Exercise

DISCRETISE = Exercise(
    id="01.discretise",
    title="Two ways to take a step",
    objective="O1: turn a rate of change into one step per token, by two rules.",
    minutes=10,
    difficulty=2,
    points=5,
    task=r"""
A state that follows $S' = A S + B x$ is advanced by one token of step size $dt$:

$$S_t = \mathrm{fade} \cdot S_{t-1} + \mathrm{gain} \cdot B x$$

Both rules below use $\mathrm{fade} = e^{dt\,A}$. They differ in the gain:

- `"zoh"` (zero-order hold) is exact when the input holds still during the step:
  $\mathrm{gain} = (e^{dt\,A} - 1) / A$
- `"euler"` is what Mamba does: $\mathrm{gain} = dt$

It has to work for $A = 0$, and for steps so small that $e^{dt\,A}$ rounds to 1.
""".strip(),
    stub='''
import torch


def discretise(dt, A, rule):
    """Fade and gain of one step of S' = A S + B x.

    Args:
        dt: step sizes, any shape that ends in h, zero or more.
        A: decay rates, h, zero or less.
        rule: "zoh" or "euler".

    Returns:
        (fade, gain), both of the shape of dt.
    """
    raise NotImplementedError
'''.strip(),
    solution='''
import torch


def discretise(dt, A, rule):
    """Fade and gain of one step of S' = A S + B x."""
    exponent = dt * A
    fade = exponent.exp()
    if rule == "euler":
        return fade, dt.clone()
    still = exponent == 0  # no fading: the limit of expm1(z) / z is 1
    safe = exponent.masked_fill(still, 1.0)
    return fade, dt * (torch.expm1(safe) / safe).masked_fill(still, 1.0)
'''.strip(),
    hints=(
        "`fade` is the same line for both rules: `torch.exp(dt * A)`. A is negative, so the fade "
        "lies between 0 and 1. Try dt = 0.5 and A = -2 by hand: the fade is $e^{-1}$.",
        "The zero-order hold is a step that can be cut in two: two steps of dt/2 have to give the "
        "same state as one of dt. If yours do not, look for a dt too many or too few. For small "
        "steps both gains approach dt, *whatever A is*, and nothing is clamped.",
        "For a tiny exponent `exp(z) - 1` loses its digits: in float32 it is 0 below 6e-8. "
        "`torch.expm1(z)` keeps them. For A = 0 the quotient is 0/0; replace z by 1 **before** "
        "dividing where it is 0, and put the limit in afterwards. A `where` after the division "
        "leaves NaN in the gradient.",
    ),
    checks=(
        Check("two steps by hand", checks.steps_by_hand, hint=1, points=1),
        Check("half a step twice", checks.half_a_step_twice, hint=2, points=1),
        Check("small steps are not clamped", checks.small_steps, hint=2, points=1),
        Check("steps so small that the fade is 1", checks.tiny_steps, hint=3, points=1),
        Check("no fading at all, and gradients", checks.no_fading, hint=3, points=1),
    ),
)

RECURRENCE = Exercise(
    id="01.selective_recurrence",
    title="The selective scan, token by token",
    objective="O2: write the selective scan as a recurrence.",
    minutes=20,
    difficulty=3,
    points=7,
    task=r"""
Write the definition, with a Python loop over tokens:

$$S_t = e^{dt_t A} S_{t-1} + dt_t\, x_t \otimes B_t \qquad y_t = S_t C_t + D x_t$$

Each head has its own $S$ of $p \times n$ numbers, its own $dt$, $A$ and $D$. $B$ and $C$ are shared
by groups of neighbouring heads: head $i$ uses group `i // (h // g)`.
""".strip(),
    stub='''
import torch


def selective_recurrence(x, dt, A, B, C, D, state):
    """The selective scan, one token at a time.

    Args:
        x: b t h p.
        dt: step sizes, b t h, zero or more.
        A: decay rates, h, negative.
        B, C: b t g n; g divides h.
        D: h.
        state: S before the first token, b h p n. It belongs to the caller: leave it alone.

    Returns:
        (y, state): b t h p, and S after the last token, b h p n.
    """
    raise NotImplementedError
'''.strip(),
    solution='''
import torch


def selective_recurrence(x, dt, A, B, C, D, state):
    """The selective scan, one token at a time."""
    shared = x.shape[2] // B.shape[2]
    B, C = (v.repeat_interleave(shared, dim=2) for v in (B, C))  # b t h n
    outputs = []
    for t in range(x.shape[1]):
        fade = torch.exp(dt[:, t] * A)[..., None, None]  # b h 1 1
        write = (dt[:, t].unsqueeze(-1) * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(-2)
        state = fade * state + write
        read = (state * C[:, t].unsqueeze(-2)).sum(-1)  # b h p
        outputs.append(read + D.unsqueeze(-1) * x[:, t])
    return torch.stack(outputs, dim=1), state
'''.strip(),
    hints=(
        "Three lines per token, in this order: fade and write, then read. A token reads what it "
        "has just written. The path through D takes x as it is, not dt * x. $x \\otimes B$ is "
        "`x.unsqueeze(-1) * B.unsqueeze(-2)`: `... p 1` times `... 1 n`.",
        "The scan of a text cut in two has to equal the scan of the whole: start from the `state` "
        "you are given, and hand on the last one. Make a new tensor at each token. `state *= fade` "
        "overwrites the caller's. And use dt as it is: with a lower limit on dt, a head that "
        "should wait forgets and writes.",
        "Neighbouring heads share a group: `B.repeat_interleave(h // g, dim=2)` gives groups "
        "0 0 1 1. `repeat` gives 0 1 0 1, which has the right shape and the wrong heads.",
    ),
    checks=(
        Check("one token by hand", checks.one_token_by_hand, hint=1, points=1),
        Check("values", checks.recurrence_values, hint=1, points=1),
        Check("a text cut in two", checks.cut_in_two, hint=2, points=1),
        Check("the caller's state", checks.state_left_alone, hint=2, points=1),
        Check("a head that waits", checks.waiting_head, hint=2, points=1),
        Check("gradients", checks.recurrence_gradients, hint=2, points=1),
        Check("groups", checks.groups, hint=3, points=1),
    ),
)

COMBINE = Exercise(
    id="01.combine_spans",
    title="Two spans of tokens as one",
    objective="O4: scan in parallel with an associative operator.",
    minutes=10,
    difficulty=3,
    points=5,
    task=r"""
One token does $S \mapsto f S + w$. So does a whole span of tokens, with another pair $(f, w)$: the
fade over the span, and what it has added to the state by its end.

Write the pair of two spans that follow each other. It is all a parallel scan needs.
""".strip(),
    stub='''
import torch


def combine_spans(earlier, later):
    """The pair (fade, write) of two neighbouring spans.

    Args:
        earlier: (fade, write) of the first span. The fade has the shape of the write, or
            broadcasts to it.
        later: (fade, write) of the span after it.

    Returns:
        (fade, write) of both together; new tensors.
    """
    raise NotImplementedError
'''.strip(),
    solution='''
import torch


def combine_spans(earlier, later):
    """The pair (fade, write) of two neighbouring spans."""
    return earlier[0] * later[0], later[0] * earlier[1] + later[1]
'''.strip(),
    hints=(
        "Insert one into the other: after the first span the state is `f1 * S + w1`; give that to "
        "the second, `f2 * (...) + w2`, and collect the factor in front of S.",
        "Fades multiply, they do not add. What the earlier span wrote fades through the **later** "
        "one; what the later span wrote does not fade any more. So the order matters: "
        "combine(a, b) is not combine(b, a), and a scan may regroup but never swap.",
        "Return new tensors. A scan uses the same span in several combinations; `write += ...` "
        "changes it for the other combinations too.",
    ),
    checks=(
        Check("the same token twice", checks.spans_by_hand, hint=1, points=1),
        Check("the order of the spans", checks.spans_in_order, hint=2, points=1),
        Check("grouping does not matter", checks.spans_regrouped, hint=2, points=1),
        Check("folding tokens is the recurrence", checks.spans_folded, hint=2, points=1),
        Check("its arguments stay as they were", checks.spans_left_alone, hint=3, points=1),
    ),
)

GRADIENTS = Exercise(
    id="01.scan_gradients",
    title="The way back",
    objective="O5: compute the gradient of the scan by hand.",
    minutes=25,
    difficulty=4,
    points=6,
    task=r"""
For $S_t = f_t S_{t-1} + w_t$, the loss depends on every state: `grad[t]` is its derivative with
respect to $S_t$ **as it is read at t**, leaving out what $S_t$ does to later states. Compute the
derivatives with respect to every fade, every write and the first state, without autograd.

The answer is a scan again. It runs from the last token to the first.
""".strip(),
    stub='''
import torch


def scan_gradients(fade, write, state, grad):
    """The gradient of the scan S_t = fade_t S_{t-1} + write_t.

    Args:
        fade: t h.
        write: t h s.
        state: S before the first token, h s.
        grad: of the loss with respect to each S_t as it is read, t h s.

    Returns:
        (grad_fade, grad_write, grad_state): t h, t h s, h s.
    """
    raise NotImplementedError
'''.strip(),
    solution='''
import torch


def scan_gradients(fade, write, state, grad):
    """The gradient of the scan S_t = fade_t S_{t-1} + write_t."""
    before = []  # S_{t-1}
    for t in range(len(fade)):
        before.append(state)
        state = fade[t].unsqueeze(-1) * state + write[t]
    grad_fade, grad_write = torch.empty_like(fade), torch.empty_like(write)
    flowing = torch.zeros_like(state)
    for t in reversed(range(len(fade))):
        flowing = flowing + grad[t]
        grad_write[t] = flowing
        grad_fade[t] = (flowing * before[t]).sum(-1)
        flowing = fade[t].unsqueeze(-1) * flowing
    return grad_fade, grad_write, flowing
'''.strip(),
    hints=(
        "Call the whole derivative with respect to $S_t$ $G_t$. S_t is read at t, and it makes "
        "$S_{t+1}$: $G_t$ = `grad[t]` $+ f_{t+1} G_{t+1}$. The last one is `grad[-1]`. The write "
        "enters $S_t$ with a factor of 1, so its gradient is $G_t$ itself.",
        "Watch the indices: $G$ flows back through the fade of the **next** token, $f_{t+1}$; "
        "behind the first token it has also gone through $f_1$, and that is the gradient of the "
        "first state.",
        "The fade multiplies the state **before** it: $\\partial S_t / \\partial f_t = S_{t-1}$. "
        "For the first token that is `state`. One fade serves s numbers, so sum over them.",
    ),
    checks=(
        Check("two tokens by hand", checks.gradients_by_hand, hint=1, points=1),
        Check("gradient of the writes", checks.write_gradient, hint=2, points=2),
        Check("gradient of the first state", checks.state_gradient, hint=2, points=1),
        Check("gradient of the fades", checks.fade_gradient, hint=3, points=2),
    ),
)

EXERCISES = (DISCRETISE, RECURRENCE, COMBINE, GRADIENTS)
