"""Wrong answers to chapter 02: bugs that were published somewhere, one change each.

A mutant is the reference solution with one line changed, so that a check can only fail because of
the bug. `hint` is the hint that the check names.
"""

from __future__ import annotations

from nemotron_lite.course.chapters.ch02_mamba2.exercises import (
    CONV_TOKEN,
    DECAY_MASK,
    GATE_AND_NORM,
    ONE_CHUNK,
)
from nemotron_lite.course.exercises import Exercise
from tests.course.chapters.mutants import Mutant


def altered(exercise: Exercise, old: str, new: str) -> str:
    """The reference solution with `old` replaced; it must be there."""
    found = exercise.solution.count(old)
    if found != 1:
        raise ValueError(f"{exercise.id}: {old!r} is {found} times in the solution; expected once.")
    return exercise.solution.replace(old, new)


_FILLED = "return exponent.masked_fill(~seen, -torch.inf).exp()"

MUTANTS: dict[str, list[Mutant]] = {
    "02.decay_mask": [
        Mutant(
            "the writer's own step counted",
            altered(
                DECAY_MASK,
                "total.unsqueeze(-1) - total.unsqueeze(-2)",
                "total.unsqueeze(-1) - (total - (dt * A).transpose(1, 2)).unsqueeze(-2)",
            ),
            hint=1,
            bug="state-spaces/mamba#709: a segment sum that begins one token early",
        ),
        Mutant(
            "readers and writers exchanged",
            altered(
                DECAY_MASK,
                "total.unsqueeze(-1) - total.unsqueeze(-2)",
                "total.unsqueeze(-2) - total.unsqueeze(-1)",
            ),
            hint=1,
            bug="the sign of the difference turned round: states grow instead of fading",
        ),
        Mutant(
            "summed along the heads",
            altered(DECAY_MASK, "(dt * A).cumsum(1)", "(dt * A).cumsum(2)"),
            hint=1,
            bug="huggingface/transformers#47246: a term of the slow path over the wrong axis",
        ),
        Mutant(
            "no causal mask",
            altered(DECAY_MASK, _FILLED, "return exponent.exp()"),
            hint=1,
            bug="tokens read what comes after them",
        ),
        Mutant(
            "masked after the exponential",
            altered(DECAY_MASK, _FILLED, "return exponent.exp() * seen"),
            hint=3,
            bug="vllm-project/vllm#37501: a positive decay difference overflows to inf",
        ),
        Mutant(
            "masked after the exponential, by choosing",
            altered(DECAY_MASK, _FILLED, "return torch.where(seen, exponent.exp(), 0.0)"),
            hint=3,
            bug="the same with values that look right: inf times 0 is NaN in the gradient alone",
        ),
        Mutant(
            "a ratio of exponentials",
            altered(
                DECAY_MASK,
                _FILLED,
                "return (total.exp().unsqueeze(-1) / total.exp().unsqueeze(-2)).tril()",
            ),
            hint=3,
            bug="both exponentials fade to zero, and their ratio is NaN",
        ),
    ],
    "02.one_chunk": [
        Mutant(
            "groups dealt out like cards",
            altered(ONE_CHUNK, "v.repeat_interleave(shared, dim=2)", "v.repeat(1, 1, shared, 1)"),
            hint=1,
            bug="repeat for repeat_interleave: right with one group, wrong with more",
        ),
        Mutant(
            "dt left out of the write",
            altered(ONE_CHUNK, "dt.unsqueeze(-1) * x", "x"),
            hint=1,
            bug="the discretised B is dt * B; ports that fold dt elsewhere lose it",
        ),
        Mutant(
            "the state from before is ignored",
            altered(ONE_CHUNK, "return inside + before,", "return inside,"),
            hint=2,
            bug="vLLM up to 0.15.0: the second piece of a prompt started from nothing",
        ),
        Mutant(
            "the first token reads an unfaded state",
            altered(ONE_CHUNK, "total.exp().unsqueeze(-1)", "(total - dt * A).exp().unsqueeze(-1)"),
            hint=2,
            bug="the reading decay is one token behind the writing decay",
        ),
        Mutant(
            "the old state does not fade",
            altered(ONE_CHUNK, "total[:, -1].exp()[..., None, None] * state", "state"),
            hint=3,
            bug="the walk from chunk to chunk adds and never forgets",
        ),
        Mutant(
            "writes faded from the start of the chunk",
            altered(ONE_CHUNK, "(total[:, -1:] - total).exp()", "total.exp()"),
            hint=3,
            bug="exp(s_r) for exp(s_q - s_r): the first token is kept best, not the last",
        ),
        Mutant(
            "writes faded by their own step too",
            altered(
                ONE_CHUNK, "(total[:, -1:] - total).exp()", "(total[:, -1:] - total + dt * A).exp()"
            ),
            hint=3,
            bug="off by one between what fades a state and what fades a write",
        ),
        Mutant(
            "masked after the exponential",
            altered(ONE_CHUNK, ".masked_fill(~seen, -torch.inf)", "").replace(
                "exponent.exp()", "(exponent.exp() * seen)"
            ),
            hint=3,
            bug="vllm-project/vllm#37501 in a chunk: strong decay makes NaN above the diagonal",
        ),
    ],
    "02.gate_and_norm": [
        Mutant(
            "norm before gate",
            altered(
                GATE_AND_NORM,
                "y.to(wide) * F.silu(z.to(wide))",
                "y.to(wide)",
            ).replace("(normed.flatten(-2)", "(F.silu(z.to(wide)) * normed.flatten(-2)"),
            hint=1,
            bug="norm_before_gate=True, which Nemotron 3 never uses",
        ),
        Mutant(
            "gate by a sigmoid",
            altered(GATE_AND_NORM, "F.silu(z.to(wide))", "torch.sigmoid(z.to(wide))"),
            hint=1,
            bug="the gate of an LSTM instead of SiLU",
        ),
        Mutant(
            "a layer norm",
            altered(
                GATE_AND_NORM,
                "(groups, -1))",
                "(groups, -1))\n    split = split - split.mean(-1, keepdim=True)",
            ),
            hint=1,
            bug="the mean subtracted",
        ),
        Mutant(
            "one norm over all groups",
            altered(
                GATE_AND_NORM,
                "split.square().mean(-1, keepdim=True)",
                "split.square().mean((-2, -1), keepdim=True)",
            ),
            hint=2,
            bug="the most frequent porting error: right with one group, wrong with eight",
        ),
        Mutant(
            "eps outside the root",
            altered(
                GATE_AND_NORM,
                "split * torch.rsqrt(split.square().mean(-1, keepdim=True) + eps)",
                "split / (split.square().mean(-1, keepdim=True).sqrt() + eps)",
            ),
            hint=3,
            bug="no difference until channels are small",
        ),
        Mutant(
            "squares in half precision",
            altered(GATE_AND_NORM, "torch.promote_types(y.dtype, torch.float32)", "y.dtype"),
            hint=3,
            bug="float16 squares overflow beyond 255, and the layer answers zero",
        ),
    ],
    "02.conv_token": [
        Mutant(
            "newest tap first",
            altered(CONV_TOKEN, "weight.T", "weight.flip(1).T"),
            hint=1,
            bug="taps in the order of a textbook convolution; conv1d correlates",
        ),
        Mutant(
            "no SiLU",
            altered(CONV_TOKEN, "return F.silu(y),", "return y,"),
            hint=1,
            bug="the activation belongs to the convolution, and got lost in the one-token path",
        ),
        Mutant(
            "state one token behind",
            altered(CONV_TOKEN, "window[:, 1:]", "window[:, :-1]"),
            hint=2,
            bug="the window is cut at the wrong end: the newest input is forgotten",
        ),
        Mutant(
            "outputs kept instead of inputs",
            altered(
                CONV_TOKEN,
                "F.silu(y), window[:, 1:]",
                "F.silu(y), torch.cat([state[:, 1:], F.silu(y).unsqueeze(1)], dim=1)",
            ),
            hint=2,
            bug="the state is what goes into the convolution, not what comes out",
        ),
        Mutant(
            "state overwritten in place",
            altered(
                CONV_TOKEN, "F.silu(y), window[:, 1:]", "F.silu(y), state.data.copy_(window[:, 1:])"
            ),
            hint=3,
            bug="rollback of a draft finds its snapshot changed",
        ),
    ],
}
