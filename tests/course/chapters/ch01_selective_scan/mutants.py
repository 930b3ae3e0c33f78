"""Wrong answers to chapter 01: bugs that were published somewhere, one change each.

A mutant is the reference solution with one change, so that a check can only fail because of the
bug. `hint` is the hint that the check names.
"""

from __future__ import annotations

from nemotron_lite.course.chapters.ch01_selective_scan.exercises import (
    COMBINE,
    DISCRETISE,
    GRADIENTS,
    RECURRENCE,
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
_FADE = "fade = torch.exp(dt[:, t] * A)[..., None, None]  # b h 1 1"
_UPDATE = "state = fade * state + write"
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
            altered(RECURRENCE, _READ, _READ.replace("state *", "(state - write) / fade *")),
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
            "every call starts from nothing",
            altered(RECURRENCE, "outputs = []", "outputs, state = [], 0 * state"),
            hint=2,
            bug="transformers#46741: chunked prefill that drops the state of the chunk before",
        ),
        Mutant(
            "the caller's state overwritten",
            altered(RECURRENCE, _UPDATE, "state.mul_(fade).add_(write)"),
            hint=2,
            bug="an update in place where the caller still needs the old state, as for roll-back",
        ),
        Mutant(
            "dt clamped from below",
            altered(RECURRENCE, _FADE, f"dt = dt.clamp(min=1e-3)\n        {_FADE}"),
            hint=2,
            bug="transformers#48989: prefill clamps dt at 0.001, decoding does not",
        ),
        Mutant(
            "the past cut off the graph",
            altered(RECURRENCE, _UPDATE, "state = fade * state.detach() + write"),
            hint=2,
            bug="a state detached at every token, as one does between batches: right values only",
        ),
        Mutant(
            "groups dealt out like cards",
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
