"""Wrong answers to chapter 01: bugs that were published somewhere, one change each.

A mutant is the reference solution with one change, so that a check can only fail because of the
bug. `hint` is the hint that the check names.
"""

from __future__ import annotations

from nemotron_lite.course.chapters.ch01_selective_scan.exercises import (
    COMBINE,
    DISCRETISE,
    GRADIENTS,
    PARALLEL_SCAN,
    PARALLEL_SELECTIVE_SCAN,
    RECURRENCE,
    SCAN_KERNEL,
    SCAN_LAYER,
)
from nemotron_lite.course.exercises import Exercise
from tests.course.chapters.mutants import Mutant


def altered(exercise: Exercise, old: str, new: str) -> str:
    """The reference solution with `old` replaced; it must be there exactly once."""
    found = exercise.solution.count(old)
    if found != 1:
        raise ValueError(f"{exercise.id}: {old!r} is {found} times in the solution; expected once.")
    return exercise.solution.replace(old, new)


_GAIN = "return fade, dt * (torch.expm1(safe) / safe).masked_fill(still, 1.0)"
_STEPS = 'fade, gain = discretise(dt, A, "euler")'
_UPDATE = "state = fade[:, t][..., None, None] * state + write"
_READ = "read = (state * C[:, t].unsqueeze(-2)).sum(-1)  # b h p"
_SPANS = "return earlier[0] * later[0], later[0] * earlier[1] + later[1]"
_KEPT = """        before.append(state)
        state = fade[t].unsqueeze(-1) * state + write[t]
"""

MUTANTS: dict[str, list[Mutant]] = {
    "01.discretise": [
        Mutant(
            "the exponential replaced by its first two terms",
            altered(DISCRETISE, "fade = exponent.exp()", "fade = 1 + exponent"),
            hint=1,
            bug="Euler for the fade too: negative for dt * A < -1, unstable below -2",
        ),
        Mutant(
            "A taken as positive",
            altered(DISCRETISE, "exponent = dt * A", "exponent = dt * A.abs()"),
            hint=1,
            bug="exp(A_log) without its minus sign: a state that grows at every token",
        ),
        Mutant(
            "the gain without dt",
            altered(DISCRETISE, _GAIN, _GAIN.replace("dt * ", "")),
            hint=2,
            bug="(e^z - 1) / z for the whole gain; state-spaces/mamba#114 asks where dt is",
        ),
        Mutant(
            "dt clamped from below",
            altered(DISCRETISE, "    exponent", "    dt = dt.clamp(min=1e-3)\n    exponent"),
            hint=2,
            bug="transformers#48989: time_step_min, meant for initialization, used as a floor",
        ),
        Mutant(
            "digits cancelled",
            altered(DISCRETISE, "torch.expm1(safe)", "(torch.exp(safe) - 1)"),
            hint=3,
            bug="exp(z) - 1 in float32: a gain of zero, or off by a large part, for small steps",
        ),
        Mutant(
            "zero divided by zero",
            altered(DISCRETISE, _GAIN, "return fade, torch.expm1(exponent) / A"),
            hint=3,
            bug="the textbook formula as it stands: NaN for A = 0",
        ),
        Mutant(
            "NaN hidden from the value, not from the gradient",
            altered(
                DISCRETISE,
                _GAIN,
                "return fade, torch.where(still, dt, torch.expm1(exponent) / A)",
            ),
            hint=3,
            bug="pytorch#68425: torch.where sends 0 * NaN back through the branch not taken",
        ),
    ],
    "01.selective_recurrence": [
        Mutant(
            "read before writing",
            altered(RECURRENCE, f"{_UPDATE}\n        {_READ}", f"{_READ}\n        {_UPDATE}"),
            hint=1,
            bug="the output off by one token: y_t from S_{t-1}",
        ),
        Mutant(
            "the direct path scaled by dt",
            altered(
                RECURRENCE,
                "D.unsqueeze(-1) * x[:, t]",
                "D.unsqueeze(-1) * dt[:, t].unsqueeze(-1) * x[:, t]",
            ),
            hint=1,
            bug="x overwritten by dt * x before D is applied, as in chunked ports",
        ),
        Mutant(
            "the exact gain instead of Euler's",
            altered(RECURRENCE, '"euler"', '"zoh"'),
            hint=1,
            bug="the formula of the paper instead of that of the code, state-spaces/mamba#114",
        ),
        Mutant(
            "every call starts from nothing",
            altered(RECURRENCE, "outputs = []", "outputs, state = [], 0 * state"),
            hint=2,
            bug="transformers#46741: chunked prefill that drops the state of the chunk before",
        ),
        Mutant(
            "the caller's state overwritten",
            altered(RECURRENCE, _UPDATE, "state.mul_(fade[:, t][..., None, None]).add_(write)"),
            hint=2,
            bug="an update in place where the caller still needs the old state, as for roll-back",
        ),
        Mutant(
            "dt clamped from below",
            altered(RECURRENCE, _STEPS, f"dt = dt.clamp(min=1e-3)\n    {_STEPS}"),
            hint=2,
            bug="transformers#48989: prefill clamps dt at 0.001, decoding does not",
        ),
        Mutant(
            "the past cut off the graph",
            altered(
                RECURRENCE, _UPDATE, _UPDATE.replace("state + write", "state.detach() + write")
            ),
            hint=2,
            bug="a state detached at every token, as one does between batches: right values only",
        ),
        Mutant(
            "heads read group i % g",
            altered(RECURRENCE, "v.repeat_interleave(shared, dim=2)", "v.repeat(1, 1, shared, 1)"),
            hint=3,
            bug="repeat for repeat_interleave: head i reads group i % g",
        ),
    ],
    "01.combine_spans": [
        Mutant(
            "fades added",
            altered(COMBINE, "earlier[0] * later[0]", "earlier[0] + later[0]"),
            hint=1,
            bug="the rule for log-fades used on the fades themselves",
        ),
        Mutant(
            "both writes faded",
            altered(COMBINE, "earlier[1] + later[1]", "(earlier[1] + later[1])"),
            hint=1,
            bug="the state faded after writing instead of before",
        ),
        Mutant(
            "spans swapped",
            altered(
                COMBINE,
                "later[0] * earlier[1] + later[1]",
                "earlier[0] * later[1] + earlier[1]",
            ),
            hint=2,
            bug="triton#2359: an associative scan that hands its operands over reversed",
        ),
        Mutant(
            "written into the argument",
            altered(
                COMBINE,
                _SPANS,
                "return earlier[0] * later[0], later[1].add_(later[0] * earlier[1])",
            ),
            hint=3,
            bug="an update in place in a parallel scan, where neighbours still read the old span",
        ),
    ],
    "01.parallel_scan": [
        Mutant(
            "spans swapped",
            altered(
                PARALLEL_SCAN, "combine_spans(earlier, later)", "combine_spans(later, earlier)"
            ),
            hint=1,
            bug="triton#2359: an associative scan that hands its operands over reversed",
        ),
        Mutant(
            "the first entries dropped from the row's end",
            altered(
                PARALLEL_SCAN,
                "earlier = fade[:-step], write[:-step]",
                "earlier = fade.roll(step, 0)[step:], write.roll(-step, 0)[step:]",
            ),
            hint=1,
            bug="a shift in the wrong direction, so that tokens read their future",
        ),
        Mutant(
            "powers of two only",
            altered(PARALLEL_SCAN, "while step < len(write):", "while 2 * step <= len(write):"),
            hint=2,
            bug="log2 rounded down: the last round is missing, as in scans written for 2^k threads",
        ),
        Mutant(
            "written into the caller's tensors",
            altered(
                PARALLEL_SCAN,
                "write = torch.cat([write[:step], joined[1]])",
                "write[step:] = joined[1]",
            ),
            hint=3,
            bug="a scan in place that also changes the caller's tokens",
        ),
        Mutant(
            "divided by the product of the fades",
            """
import torch


def parallel_scan(fade, write):
    product = fade.cumprod(0)
    return product, product * (write / product).cumsum(0)
""".strip(),
            hint=3,
            bug="the cumprod and cumsum shortcut: 1 / product overflows after some hundred tokens",
        ),
    ],
    "01.parallel_selective_scan": [
        Mutant(
            "the first state forgotten",
            altered(PARALLEL_SELECTIVE_SCAN, "spans[0] * state + spans[1]", "spans[1]"),
            hint=2,
            bug="transformers#46741: chunked prefill that drops the state of the chunk before",
        ),
        Mutant(
            "the first state does not fade",
            altered(PARALLEL_SELECTIVE_SCAN, "spans[0] * state + spans[1]", "state + spans[1]"),
            hint=2,
            bug="an initial state added after the scan instead of carried through it",
        ),
        Mutant(
            "heads scanned instead of tokens",
            altered(
                PARALLEL_SELECTIVE_SCAN,
                "parallel_scan(fade[..., None, None].transpose(0, 1), write.transpose(0, 1))",
                "[v.transpose(0, 1).transpose(0, 2) for v in parallel_scan(fade[..., None, None]"
                ".transpose(0, 2), write.transpose(0, 2))]",
            ),
            hint=1,
            bug="the wrong axis in front: sizes fit wherever b, t and h agree",
        ),
        Mutant(
            "heads read group i % g",
            altered(
                PARALLEL_SELECTIVE_SCAN,
                "v.repeat_interleave(shared, dim=2)",
                "v.repeat(1, 1, shared, 1)",
            ),
            hint=3,
            bug="repeat for repeat_interleave: head i reads group i % g",
        ),
    ],
    "01.scan_layer": [
        Mutant(
            "A_log is not trained",
            altered(
                SCAN_LAYER,
                "self.A_log = nn.Parameter(torch.log(0.1**spread))",
                'self.register_buffer("A_log", torch.log(0.1**spread))',
            ),
            hint=1,
            bug="a tensor kept as a buffer: it is saved and loaded, and the optimizer misses it",
        ),
        Mutant(
            "the bias is the step itself",
            altered(SCAN_LAYER, "torch.log(torch.expm1(0.05**spread))", "0.05**spread"),
            hint=1,
            bug="dt_bias without the inverse of softplus: all heads start with steps near 1",
        ),
        Mutant(
            "dt without softplus",
            altered(SCAN_LAYER, "F.softplus(self.dt_proj(u))", "self.dt_proj(u).exp()"),
            hint=2,
            bug="another positive function for dt: weights of a checkpoint give other steps",
        ),
        Mutant(
            "x is constant too",
            altered(
                SCAN_LAYER,
                "        x = self.x_proj(u)",
                "        if not self.selective:\n            u = torch.zeros_like(u)\n"
                "        x = self.x_proj(u)",
            ),
            hint=2,
            bug="an ablation that removes more than it says: the layer no longer sees its input",
        ),
        Mutant(
            "A positive",
            altered(SCAN_LAYER, "A = -self.A_log.exp()", "A = self.A_log.exp()"),
            hint=3,
            bug="exp(A_log) without its minus sign: a state that grows at every token",
        ),
        Mutant(
            "every call starts from nothing",
            altered(SCAN_LAYER, "if state is None:", "if True:"),
            hint=3,
            bug="a layer that accepts a cache and does not read it",
        ),
        Mutant(
            "rates cut off the graph",
            altered(SCAN_LAYER, "-self.A_log.exp()", "-self.A_log.detach().exp()"),
            hint=3,
            bug="A computed once under no_grad for speed: right values, A_log never learns",
        ),
    ],
    "01.scan_kernel": [
        Mutant(
            "the last state not stored",
            altered(SCAN_KERNEL, "    tl.store(place, state)\n", ""),
            hint=1,
            bug="a kernel that returns y only: the next piece starts from the old state",
        ),
        Mutant(
            "the decay without dt",
            altered(SCAN_KERNEL, "tl.exp(dt * A)", "tl.exp(A)"),
            hint=2,
            bug="a fade that is the same for all tokens: right only where dt is 1",
        ),
        Mutant(
            "read before writing",
            altered(
                SCAN_KERNEL,
                "        state = tl.exp(dt * A) * state + dt * x[:, None] * B[None, :]\n"
                "        y = tl.sum(state * C[None, :], axis=1) + D * x\n",
                "        y = tl.sum(state * C[None, :], axis=1) + D * x\n"
                "        state = tl.exp(dt * A) * state + dt * x[:, None] * B[None, :]\n",
            ),
            hint=1,
            bug="the output off by one token: y_t from S_{t-1}",
        ),
        Mutant(
            "x read with the stride of the state",
            altered(
                SCAN_KERNEL, "x = tl.load(x_ptr + at * P + p)", "x = tl.load(x_ptr + at * N + p)"
            ),
            hint=2,
            bug="a stride taken from the wrong tensor: right while p equals n",
        ),
    ],
    "01.scan_gradients": [
        Mutant(
            "nothing flows back",
            altered(GRADIENTS, "flowing = flowing + grad[t]", "flowing = grad[t]"),
            hint=1,
            bug="each state treated as if no later state came from it",
        ),
        Mutant(
            "the fade of the wrong token",
            altered(
                GRADIENTS,
                "flowing = fade[t].unsqueeze(-1) * flowing",
                "flowing = fade[max(t - 1, 0)].unsqueeze(-1) * flowing",
            ),
            hint=2,
            bug="the gradient carried through f_t instead of f_{t+1}: a reversed scan off by one",
        ),
        Mutant(
            "the first state not faded",
            altered(GRADIENTS, "grad_write, flowing", "grad_write, grad_write[0].clone()"),
            hint=2,
            bug="the gradient of the initial state taken one token too late",
        ),
        Mutant(
            "the state after instead of before",
            altered(GRADIENTS, _KEPT, "".join(reversed(_KEPT.splitlines(keepends=True)))),
            hint=3,
            bug="the saved states off by one: S_t where the chain rule asks for S_{t-1}",
        ),
        Mutant(
            "the initial state forgotten",
            altered(GRADIENTS, "    before = []", "    before, state = [], 0 * state"),
            hint=3,
            bug="states computed again for the backward pass from zero, not from the cached state",
        ),
    ],
}
