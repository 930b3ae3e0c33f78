"""Exercises of chapter 01: the selective scan, its parallel form, and a layer around it.

    01.discretise               two rules that turn a rate and a step size into a fade and a gain
    01.selective_recurrence     the definition: fade, write, read, one token at a time
    01.combine_spans            the associative operator that lets a scan run in parallel
    01.parallel_scan            all prefixes in about log2(t) rounds, by doubling
    01.parallel_selective_scan  the selective scan made of it
    01.scan_layer               a layer whose dt, B and C come from the token
    01.scan_kernel              optional: the loop as a Triton kernel
    01.scan_gradients           stretch: the gradient of the scan, a scan in the other direction

Later exercises call the answers to earlier ones. The checks are in `checks.py`; the mistakes that
they have to catch are in `tests/course/chapters/ch01_selective_scan/mutants.py`.
"""

from __future__ import annotations

from nemotron_lite.course.chapters.ch01_selective_scan import checks
from nemotron_lite.course.exercises import Check, Exercise

DISCRETISE = Exercise(
    id="01.discretise",
    title="One step, by two rules",
    objective="O1: turn a rate of change into one step per token, by two rules.",
    minutes=10,
    difficulty=2,
    points=5,
    task=r"""
A state follows $S' = A S + B x$. One token advances it by a step of size $dt$:

$$S_t = \mathrm{fade} \cdot S_{t-1} + \mathrm{gain} \cdot B x$$

Both rules below use $\mathrm{fade} = e^{dt\,A}$. They differ in the gain:

- `"zoh"` (zero-order hold) is exact if the input is constant during the step:
  $\mathrm{gain} = (e^{dt\,A} - 1) / A$
- `"euler"` is what Mamba uses: $\mathrm{gain} = dt$ (Euler's own fade would be $1 + dt\,A$)

The function has to work for $A = 0$, and for steps so small that $e^{dt\,A}$ rounds to 1. Its
gradient has to be finite and right too.
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
        "A step of the zero-order hold can be cut in two: two steps of dt/2 have to give the same "
        "state as one of dt. If yours do not, look for a dt too many or too few. For small steps "
        "both gains approach dt, whatever A is, and nothing is clamped.",
        "For a tiny exponent `exp(z) - 1` loses its digits: in float32 it is 0 for |z| below 3e-8. "
        "`torch.expm1(z)` keeps them. For A = 0 the quotient is 0/0. Replace z by 1 **before** "
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
    needs=("01.discretise",),
    task=r"""
Write the definition, with a Python loop over tokens:

$$S_t = e^{dt_t A} S_{t-1} + dt_t\, x_t \otimes B_t \qquad y_t = S_t C_t + D x_t$$

Each head has its own $S$, $dt$, $A$ and $D$. Neighbouring heads share $B$ and $C$ in groups: head
$i$ uses group `i // (h // g)`. Your `discretise` with the rule `"euler"` gives both factors.
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
        state: S before the first token, b h p n. It belongs to the caller: do not change it.

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
    fade, gain = discretise(dt, A, "euler")
    outputs = []
    for t in range(x.shape[1]):
        write = (gain[:, t].unsqueeze(-1) * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(-2)
        state = fade[:, t][..., None, None] * state + write
        read = (state * C[:, t].unsqueeze(-2)).sum(-1)  # b h p
        outputs.append(read + D.unsqueeze(-1) * x[:, t])
    return torch.stack(outputs, dim=1), state
'''.strip(),
    hints=(
        "For each token in this order: fade and write, then read. A token reads what it has just "
        "written. The path through D takes x as it is, not dt * x. $x \\otimes B$ is "
        "`x.unsqueeze(-1) * B.unsqueeze(-2)`: `... p 1` times `... 1 n`.",
        "The scan of a text cut in two has to equal the scan of the whole: start from the `state` "
        "you are given, and return the last one. Make a new tensor at each token, because "
        "`state *= fade` overwrites the caller's. Use dt as it is: with a lower limit on dt, a "
        "head with very small steps forgets too fast.",
        "Neighbouring heads share a group: `B.repeat_interleave(h // g, dim=2)` gives groups "
        "0 0 1 1. `repeat` gives 0 1 0 1, which has the right shape and the wrong heads.",
    ),
    checks=(
        Check("one token by hand", checks.one_token_by_hand, hint=1, points=1),
        Check("values", checks.recurrence_values, hint=1, points=1),
        Check("a text cut in two", checks.cut_in_two, hint=2, points=1),
        Check("the caller's state", checks.state_left_alone, hint=2, points=1),
        Check("a head with very small steps", checks.small_step_head, hint=2, points=1),
        Check("gradients", checks.recurrence_gradients, hint=2, points=1),
        Check("groups", checks.groups, hint=3, points=1),
    ),
)

COMBINE = Exercise(
    id="01.combine_spans",
    title="Two spans of tokens as one",
    objective="O3: scan in parallel with an associative operator.",
    minutes=10,
    difficulty=3,
    points=5,
    task=r"""
One token maps $S$ to $f S + w$. A span of tokens does the same with another pair $(f, w)$: its
whole fade, and what it has added to the state by its end. Write the pair of two spans that follow
each other.
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
        "Insert one into the other: after the first span the state is `f1 * S + w1`. Give that to "
        "the second, `f2 * (...) + w2`, and collect the factor in front of S.",
        "Fades multiply, they do not add. What the earlier span wrote fades through the **later** "
        "one; what the later span wrote does not fade any more. So the order matters: "
        "combine(a, b) is not combine(b, a). A scan may regroup spans but never swap them.",
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

PARALLEL_SCAN = Exercise(
    id="01.parallel_scan",
    title="All prefixes by doubling",
    objective="O3: scan in parallel with an associative operator.",
    minutes=15,
    difficulty=4,
    points=5,
    needs=("01.combine_spans",),
    task=r"""
Compute all prefixes by doubling. At first, entry $i$ is token $i$ alone. In rounds with distances
$s = 1, 2, 4, \dots$ each entry $i \ge s$ is combined with entry $i - s$, all at the same time. The
entries before $s$ are complete. Stop when $s$ reaches the length, which can be any number.

One call of your `combine_spans` does a whole round: give it slices, not single tokens. The checks
compare values only; the measurement below shows whether yours is fast.
""".strip(),
    stub='''
import torch


def parallel_scan(fade, write):
    """The spans of tokens 0 to i, for every i.

    Args:
        fade: of each token, t and more axes; it broadcasts to the write.
        write: of each token, t and more axes.

    Returns:
        (fade, write) of the spans, with the shapes of the arguments.
    """
    raise NotImplementedError
'''.strip(),
    solution='''
import torch


def parallel_scan(fade, write):
    """The spans of tokens 0 to i, for every i."""
    step = 1
    while step < len(write):
        earlier = fade[:-step], write[:-step]
        later = fade[step:], write[step:]
        joined = combine_spans(earlier, later)
        fade = torch.cat([fade[:step], joined[0]])
        write = torch.cat([write[:step], joined[1]])
        step *= 2
    return fade, write
'''.strip(),
    hints=(
        "A round with distance s: `fade[:-s], write[:-s]` are the earlier spans, "
        "`fade[s:], write[s:]` the later ones. The result has t - s entries. Put the first s "
        "entries, unchanged, in front of it with `torch.cat`.",
        "The distance doubles until it is at least t: for 5 tokens the rounds have the distances "
        "1, 2 and 4. Entries before s have no partner: nothing comes from the end of the row.",
        "Write no result into the tensors that you read from. Within a round every entry needs "
        "the old values of the others, and the first tensors belong to the caller. Multiply by "
        "fades, never divide by them: a product of many fades is too small for that.",
    ),
    checks=(
        Check("four tokens by hand", checks.prefixes_by_hand, hint=1, points=1),
        Check("any length, also one", checks.prefixes_of_any_length, hint=2, points=1),
        Check("a fade that broadcasts", checks.prefixes_broadcast, hint=1, points=1),
        Check("long rows and the caller's tensors", checks.prefixes_of_long_rows, hint=3, points=1),
        Check("gradients", checks.prefix_gradients, hint=3, points=1),
    ),
)

PARALLEL_SELECTIVE_SCAN = Exercise(
    id="01.parallel_selective_scan",
    title="The selective scan in parallel",
    objective="O3: scan in parallel with an associative operator.",
    minutes=15,
    difficulty=3,
    points=5,
    needs=("01.discretise", "01.parallel_scan"),
    task=r"""
Compute what `selective_recurrence` computes, without a loop over tokens. Make the fade and the
write of every token, scan them with your `parallel_scan`, and read all states at once. Remember the
given `state`: a span maps it to $f S + w$.
""".strip(),
    stub='''
import torch


def parallel_selective_scan(x, dt, A, B, C, D, state):
    """The selective scan of all tokens at once.

    Args:
        x: b t h p.
        dt: step sizes, b t h, zero or more.
        A: decay rates, h, negative.
        B, C: b t g n; g divides h.
        D: h.
        state: S before the first token, b h p n. It belongs to the caller: do not change it.

    Returns:
        (y, state): b t h p, and S after the last token, b h p n.
    """
    raise NotImplementedError
'''.strip(),
    solution='''
import torch


def parallel_selective_scan(x, dt, A, B, C, D, state):
    """The selective scan of all tokens at once."""
    shared = x.shape[2] // B.shape[2]
    B, C = (v.repeat_interleave(shared, dim=2) for v in (B, C))  # b t h n
    fade, gain = discretise(dt, A, "euler")
    write = (gain.unsqueeze(-1) * x).unsqueeze(-1) * B.unsqueeze(-2)  # b t h p n
    spans = parallel_scan(fade[..., None, None].transpose(0, 1), write.transpose(0, 1))
    states = (spans[0] * state + spans[1]).transpose(0, 1)
    y = (states * C.unsqueeze(-2)).sum(-1) + D.unsqueeze(-1) * x
    return y, states[:, -1]
'''.strip(),
    hints=(
        "The write of all tokens is `b t h p n`, the fade `b t h 1 1`. `parallel_scan` runs over "
        "the first axis, so move time to the front with `transpose(0, 1)`, and back afterwards.",
        "The state after token i is `fade_span[i] * state + write_span[i]`. Without the first "
        "term the scan ignores what came before, and a text cut in two gives another result.",
        "Reading is `(states * C.unsqueeze(-2)).sum(-1)`, and `D.unsqueeze(-1) * x` comes on top. "
        "Groups are as in the recurrence: `repeat_interleave` over the axis of the groups.",
    ),
    checks=(
        Check("values", checks.recurrence_values, hint=1, points=1),
        Check("a text cut in two", checks.cut_in_two, hint=2, points=1),
        Check("the caller's tensors", checks.state_left_alone, hint=2, points=1),
        Check("groups", checks.groups, hint=3, points=1),
        Check("gradients", checks.recurrence_gradients, hint=3, points=1),
    ),
)

SCAN_LAYER = Exercise(
    id="01.scan_layer",
    title="A layer that selects",
    objective="O4: build a layer whose dt, B and C come from the token.",
    minutes=25,
    difficulty=4,
    points=8,
    needs=("01.parallel_selective_scan",),
    task=r"""
Build the layer. Its weights:

- `A_log` and `D`, parameters of shape `h`, with $A = -e^{\mathtt{A\_log}}$. Start with $|A|$ from
  0.1 (head 0) to 1 (last head), evenly spaced in the logarithm, and with `D` at one.
- the bias of `dt_proj`. Start with $\mathrm{softplus}(\mathrm{bias})$ from 0.05 (head 0) to 1 (last
  head), evenly spaced in the logarithm. The inverse of softplus is $\log(e^{dt} - 1)$.

`controls` returns $dt = \mathrm{softplus}(W u + \mathrm{bias})$ from `dt_proj`, and $B$ and $C$
with an axis for their single group. With `selective=False` these three projections get zeros like
$u$, so that only their biases are left.

`forward` makes $x$ with `x_proj` (always from the token), scans with your
`parallel_selective_scan`, and returns the output of `out_proj` and the last state. It starts from
`state`, or from zeros if that is None.
""".strip(),
    stub='''
import torch
import torch.nn.functional as F
from torch import nn


class ScanLayer(nn.Module):
    """One selective scan with its projections.

    Args:
        d: width.
        h, p: heads (all in one group) and their width.
        n: size of the state.
        selective: whether dt, B and C come from the token.
    """

    def __init__(self, d, h, p, n, selective=True):
        super().__init__()
        self.heads, self.selective = h, selective
        self.x_proj = nn.Linear(d, h * p, bias=False)
        self.dt_proj = nn.Linear(d, h)
        self.B_proj = nn.Linear(d, n)
        self.C_proj = nn.Linear(d, n)
        self.out_proj = nn.Linear(h * p, d, bias=False)
        # A_log, D and the bias of dt_proj are yours to make.
        raise NotImplementedError

    def controls(self, u):
        """dt `b t h`, B and C `b t 1 n` for tokens u `b t d`."""
        raise NotImplementedError

    def forward(self, u, state=None):
        """(output `b t d`, state `b h p n`) for tokens u `b t d` after an optional state."""
        raise NotImplementedError
'''.strip(),
    solution='''
import torch
import torch.nn.functional as F
from torch import nn


class ScanLayer(nn.Module):
    """One selective scan with its projections."""

    def __init__(self, d, h, p, n, selective=True):
        super().__init__()
        self.heads, self.selective = h, selective
        self.x_proj = nn.Linear(d, h * p, bias=False)
        self.dt_proj = nn.Linear(d, h)
        self.B_proj = nn.Linear(d, n)
        self.C_proj = nn.Linear(d, n)
        self.out_proj = nn.Linear(h * p, d, bias=False)
        spread = torch.linspace(1.0, 0.0, h)
        self.A_log = nn.Parameter(torch.log(0.1**spread))
        self.D = nn.Parameter(torch.ones(h))
        with torch.no_grad():
            self.dt_proj.bias.copy_(torch.log(torch.expm1(0.05**spread)))

    def controls(self, u):
        """dt `b t h`, B and C `b t 1 n` for tokens u `b t d`."""
        if not self.selective:
            u = torch.zeros_like(u)
        dt = F.softplus(self.dt_proj(u))
        return dt, self.B_proj(u).unsqueeze(2), self.C_proj(u).unsqueeze(2)

    def forward(self, u, state=None):
        """(output `b t d`, state `b h p n`) for tokens u `b t d` after an optional state."""
        x = self.x_proj(u).unflatten(-1, (self.heads, -1))
        dt, B, C = self.controls(u)
        if state is None:
            state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])
        A = -self.A_log.exp()
        y, state = parallel_selective_scan(x, dt, A, B, C, self.D, state)
        return self.out_proj(y.flatten(2)), state
'''.strip(),
    hints=(
        "Evenly spaced in the logarithm: `0.1 ** torch.linspace(1.0, 0.0, h)` for $|A|$. `A_log` "
        "is its logarithm. `A_log` and `D` are `nn.Parameter`. Write into `dt_proj.bias` with "
        "`copy_`, under `torch.no_grad()`.",
        "`dt = F.softplus(self.dt_proj(u))`: the bias inside the linear map is the bias of dt. "
        "`unsqueeze(2)` gives B and C their group. `selective=False` replaces u by "
        "`torch.zeros_like(u)` in `controls`, and only there: x always comes from the token.",
        "In `forward`: `x = self.x_proj(u).unflatten(-1, (self.heads, -1))`, "
        "`A = -self.A_log.exp()`, the scan, then `self.out_proj(y.flatten(2))`. Return the state "
        "too, and start from the one that is given.",
    ),
    checks=(
        Check("names and shapes of the weights", checks.layer_weights, hint=1, points=1),
        Check("the weights at the start", checks.layer_start, hint=1, points=1),
        Check("dt, B and C of the token", checks.layer_controls, hint=2, points=1),
        Check(
            "the same dt, B and C for every token", checks.layer_time_invariant, hint=2, points=1
        ),
        Check("the output with the package's weights", checks.layer_output, hint=3, points=2),
        Check("a text cut in two", checks.layer_cut_in_two, hint=3, points=1),
        Check("gradients", checks.layer_gradients, hint=3, points=1),
    ),
)

SCAN_KERNEL = Exercise(
    id="01.scan_kernel",
    title="The loop as a Triton kernel",
    objective="O2: write the selective scan as a recurrence.",
    minutes=20,
    difficulty=4,
    points=4,
    kind="optional",
    task=r"""
One program runs one head: it loops over the tokens and keeps the state of $p \times n$ numbers in
registers. Write the rest of `_scan`. The wrapper below it is given.

All tensors are contiguous and float32: `x_ptr` and `y_ptr` point to `row t p`, `dt_ptr` to `row t`,
`B_ptr` and `C_ptr` to `row t n`. Start from the state at `place`, and store the last state there.
`P` and `N` are powers of two.
""".strip(),
    stub='''
import torch
import torch.nn.functional as F
import triton
import triton.language as tl


@triton.jit
def _scan(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, state_ptr, y_ptr, t, P: tl.constexpr, N: tl.constexpr
):
    row = tl.program_id(0)  # one head of one row of the batch
    A, D = tl.load(A_ptr + row), tl.load(D_ptr + row)
    p, n = tl.arange(0, P), tl.arange(0, N)
    place = state_ptr + (row * P + p[:, None]) * N + n[None, :]  # pointers, P N
    raise NotImplementedError


def scan_kernel(x, dt, A, B, C, D, state):
    """`selective_recurrence` for float32, p and n powers of two: launch one program a head."""
    (b, t, h, p), n, device = x.shape, B.shape[-1], x.device
    B, C = (v.repeat_interleave(h // v.shape[2], dim=2) for v in (B, C))
    x, dt, B, C = (v.transpose(1, 2) for v in (x, dt, B, C))  # b h t ...
    A, D = A.repeat(b), D.repeat(b)
    # Copies, on the GPU if there is one, with 64k zeros on both sides: a wrong pointer then
    # overwrites nothing else.
    there = "cuda" if torch.cuda.is_available() else "cpu"
    x, dt, A, B, C, D, state, y = (
        F.pad(v.to(there).flatten(), (2**16, 2**16))[2**16 : -(2**16)].view(v.shape)
        for v in (x, dt, A, B, C, D, state, 0 * x)
    )
    _scan[(b * h,)](x, dt, A, B, C, D, state, y, t, P=p, N=n)
    return y.transpose(1, 2).to(device), state.to(device)
'''.strip(),
    solution='''
import torch
import torch.nn.functional as F
import triton
import triton.language as tl


@triton.jit
def _scan(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, state_ptr, y_ptr, t, P: tl.constexpr, N: tl.constexpr
):
    row = tl.program_id(0)  # one head of one row of the batch
    A, D = tl.load(A_ptr + row), tl.load(D_ptr + row)
    p, n = tl.arange(0, P), tl.arange(0, N)
    place = state_ptr + (row * P + p[:, None]) * N + n[None, :]  # pointers, P N
    state = tl.load(place)
    for i in range(t):
        at = row * t + i
        dt = tl.load(dt_ptr + at)
        x = tl.load(x_ptr + at * P + p)
        B = tl.load(B_ptr + at * N + n)
        C = tl.load(C_ptr + at * N + n)
        state = tl.exp(dt * A) * state + dt * x[:, None] * B[None, :]
        y = tl.sum(state * C[None, :], axis=1) + D * x
        tl.store(y_ptr + at * P + p, y)
    tl.store(place, state)


def scan_kernel(x, dt, A, B, C, D, state):
    """`selective_recurrence` for float32, p and n powers of two: launch one program a head."""
    (b, t, h, p), n, device = x.shape, B.shape[-1], x.device
    B, C = (v.repeat_interleave(h // v.shape[2], dim=2) for v in (B, C))
    x, dt, B, C = (v.transpose(1, 2) for v in (x, dt, B, C))  # b h t ...
    A, D = A.repeat(b), D.repeat(b)
    # Copies, on the GPU if there is one, with 64k zeros on both sides: a wrong pointer then
    # overwrites nothing else.
    there = "cuda" if torch.cuda.is_available() else "cpu"
    x, dt, A, B, C, D, state, y = (
        F.pad(v.to(there).flatten(), (2**16, 2**16))[2**16 : -(2**16)].view(v.shape)
        for v in (x, dt, A, B, C, D, state, 0 * x)
    )
    _scan[(b * h,)](x, dt, A, B, C, D, state, y, t, P=p, N=n)
    return y.transpose(1, 2).to(device), state.to(device)
'''.strip(),
    hints=(
        "`state = tl.load(place)`, then `for i in range(t)`, then `tl.store(place, state)`. Token "
        "i of this program is number `row * t + i`: `dt_ptr + number` is its dt, "
        "`x_ptr + number * P + p` are the pointers of its x.",
        "The two equations are the same as in PyTorch: "
        "`state = tl.exp(dt * A) * state + dt * x[:, None] * B[None, :]`. Write first, then read.",
        "Reading is a sum over the axis of n: `tl.sum(state * C[None, :], axis=1)`. Add `D * x`, "
        "and store the p numbers at `y_ptr + number * P + p`.",
    ),
    checks=(
        Check("one token by hand", checks.kernel_by_hand, hint=1, points=1),
        Check("values", checks.kernel_values, hint=2, points=1),
        Check("groups, and another shape", checks.kernel_groups, hint=3, points=1),
        Check("a text cut in two", checks.kernel_cut_in_two, hint=1, points=1),
    ),
)

GRADIENTS = Exercise(
    id="01.scan_gradients",
    title="The gradient of the scan",
    objective="O3: scan in parallel with an associative operator.",
    minutes=25,
    difficulty=5,
    points=6,
    kind="stretch",
    task=r"""
In $S_t = f_t S_{t-1} + w_t$ the loss depends on every state. `grad[t]` is its derivative with
respect to $S_t$ as it is read at token t, without what $S_t$ does to later states. Compute the
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
        "Check the indices: $G$ flows back through the fade of the **next** token, $f_{t+1}$; "
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

EXERCISES = (
    DISCRETISE,
    RECURRENCE,
    COMBINE,
    PARALLEL_SCAN,
    PARALLEL_SELECTIVE_SCAN,
    SCAN_LAYER,
    SCAN_KERNEL,
    GRADIENTS,
)
