"""Wrong answers to chapter 02: bugs that were published somewhere, one change each.

A mutant is the reference solution with one line changed, so that a check can only fail because of
the bug. `hint` is the hint that the check names.
"""

from __future__ import annotations

from nemotron_lite.course.chapters.ch02_mamba2.exercises import (
    CAUSAL_CONV,
    CHUNK_GRADIENTS,
    CHUNKED_SCAN,
    DECAY_MASK,
    DECODING,
    GATE_AND_NORM,
    MAMBA2,
    SCAN_BY_MATRIX,
    STEP_KERNEL,
)
from nemotron_lite.course.exercises import Exercise
from tests.course.chapters.mutants import Mutant


def altered(exercise: Exercise, old: str, new: str) -> str:
    """The reference solution with the only occurrence of `old` replaced."""
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
    "02.scan_by_matrix": [
        Mutant(
            "dt left out",
            altered(SCAN_BY_MATRIX, "dt.unsqueeze(-1) * x", "x"),
            hint=1,
            bug="y = M x: the duality stated without dt, as in many texts about it",
        ),
        Mutant(
            "the reader's dt",
            altered(SCAN_BY_MATRIX, "dt.unsqueeze(-1) * x)", "x) * dt.unsqueeze(-1)"),
            hint=3,
            bug="dt multiplied into y instead of x: right for one token, wrong for more",
        ),
        Mutant(
            "groups repeated in turns",
            altered(
                SCAN_BY_MATRIX,
                "scores.repeat_interleave(x.shape[2] // B.shape[2], dim=1)",
                "scores.repeat(1, x.shape[2] // B.shape[2], 1, 1)",
            ),
            hint=2,
            bug="repeat for repeat_interleave: right with one group, wrong with more",
        ),
        Mutant(
            "readers and writers exchanged",
            altered(SCAN_BY_MATRIX, "C, B)", "B, C)"),
            hint=3,
            bug="scores B C^T: the same on the diagonal, wrong below it",
        ),
        Mutant(
            "a softmax, as in attention",
            altered(
                SCAN_BY_MATRIX,
                "decay_mask(dt, A) * scores",
                "decay_mask(dt, A) * scores.softmax(-1)",
            ),
            hint=1,
            bug="an attention kernel used for the scan: its rows add up to 1",
        ),
    ],
    "02.chunked_scan": [
        Mutant(
            "groups repeated in turns",
            altered(
                CHUNKED_SCAN, "v.repeat_interleave(shared, dim=2)", "v.repeat(1, 1, shared, 1)"
            ),
            hint=2,
            bug="repeat for repeat_interleave: right with one group, wrong with more",
        ),
        Mutant(
            "dt left out of the state",
            altered(CHUNKED_SCAN, " * step.unsqueeze(-1) * X", " * X"),
            hint=3,
            bug="the discretized B is dt * B; ports that fold dt elsewhere lose it",
        ),
        Mutant(
            "the state from before is ignored",
            altered(CHUNKED_SCAN, "outputs.append(y + s.exp() * read)", "outputs.append(y)"),
            hint=2,
            bug="vLLM up to 0.15.0: the second piece of a prompt started from nothing",
        ),
        Mutant(
            "the first token reads a state that has not decayed",
            altered(CHUNKED_SCAN, "s.exp() * read", "(s - (step * A).unsqueeze(-1)).exp() * read"),
            hint=2,
            bug="the reading decay is one token behind the writing decay",
        ),
        Mutant(
            "the old state does not decay",
            altered(CHUNKED_SCAN, "s[:, -1].exp().unsqueeze(-1) * state", "state"),
            hint=3,
            bug="the step from chunk to chunk adds and never forgets",
        ),
        Mutant(
            "writes decayed from the start of the chunk",
            altered(CHUNKED_SCAN, "(s[:, -1:] - s).exp()", "s.exp()"),
            hint=3,
            bug="exp(s_r) for exp(s_q - s_r): the first token is kept best, not the last",
        ),
        Mutant(
            "the new state is read",
            altered(
                CHUNKED_SCAN,
                "        state = s[:, -1].exp().unsqueeze(-1) * state + added  # 3\n",
                "",
            )
            .replace(
                "        outputs.append(y + s.exp() * read)  # 4\n",
                "        state = s[:, -1].exp().unsqueeze(-1) * state + added\n"
                '        read = torch.einsum("blhn,bhpn->blhp", queries, state)\n'
                "        outputs.append(y + s.exp() * read)\n",
            )
            .replace(
                "        read = torch",
                "        written = (s[:, -1:] - s).exp() * step.unsqueeze(-1) * X\n"
                '        added = torch.einsum("brhp,brhn->bhpn", written, keys)\n'
                "        read = torch",
                1,
            ),
            hint=1,
            bug="step 3 before step 4: a chunk reads what it has itself written, twice",
        ),
        Mutant(
            "a text that does not divide is cut off",
            altered(
                CHUNKED_SCAN,
                "    outputs = []\n",
                "    outputs = []\n    whole = max(1, x.shape[1] // chunk_size) * chunk_size\n"
                "    x, dt, B, C = (v[:, :whole] for v in (x, dt, B, C))\n",
            ),
            hint=3,
            bug="state-spaces/mamba: early chunked scans needed a length that divides into chunks",
        ),
        Mutant(
            "a ratio of exponentials",
            altered(CHUNKED_SCAN, "(s[:, -1:] - s).exp()", "(s[:, -1:].exp() / s.exp())"),
            hint=3,
            bug="both exponentials decay to zero, and their ratio is NaN",
        ),
        Mutant(
            "one token in each chunk",
            altered(CHUNKED_SCAN, "v.split(chunk_size, dim=1)", "v.split(1, dim=1)"),
            hint=1,
            bug="chunk_size is ignored: right numbers at the speed of the recurrence",
        ),
        Mutant(
            "the whole text as one chunk",
            altered(CHUNKED_SCAN, "v.split(chunk_size, dim=1)", "v.split(v.shape[1], dim=1)"),
            hint=1,
            bug="chunk_size is ignored: right numbers, and work that grows with the text",
        ),
        Mutant(
            "the state is overwritten",
            altered(
                CHUNKED_SCAN,
                "state = s[:, -1].exp().unsqueeze(-1) * state + added",
                "state = state.mul_(s[:, -1].exp().unsqueeze(-1)).add_(added)",
            ),
            hint=3,
            bug="a snapshot that was kept to roll back a draft is changed",
        ),
    ],
    "02.causal_conv": [
        Mutant(
            "newest tap first",
            altered(CAUSAL_CONV, "* weight)", "* weight.flip(1))"),
            hint=1,
            bug="taps in the order of a textbook convolution; conv1d correlates",
        ),
        Mutant(
            "no SiLU",
            altered(CAUSAL_CONV, "return F.silu(y),", "return y,"),
            hint=1,
            bug="the activation belongs to the convolution, and got lost in the one-token path",
        ),
        Mutant(
            "the state is ignored",
            altered(CAUSAL_CONV, "torch.cat([state, x]", "torch.cat([torch.zeros_like(state), x]"),
            hint=1,
            bug="huggingface/transformers#46741: the second piece of a prompt starts from nothing",
        ),
        Mutant(
            "the newest input is forgotten",
            altered(CAUSAL_CONV, "window[:, x.shape[1] :]", "window[:, x.shape[1] - 1 : -1]"),
            hint=2,
            bug="the window is cut at the wrong end: the state is one token behind",
        ),
        Mutant(
            "short texts make a short state",
            altered(CAUSAL_CONV, "window[:, x.shape[1] :]", "x[:, 1 - weight.shape[1] :]"),
            hint=2,
            bug="the last k-1 of x instead of the window: wrong for prompts shorter than k-1",
        ),
        Mutant(
            "outputs kept instead of inputs",
            altered(
                CAUSAL_CONV,
                "window[:, x.shape[1] :]",
                "torch.cat([state, F.silu(y)], dim=1)[:, x.shape[1] :]",
            ),
            hint=2,
            bug="state-spaces/mamba#1027, in an attention layer: outputs kept after a prefill",
        ),
        Mutant(
            "state overwritten in place",
            altered(
                CAUSAL_CONV,
                "window[:, x.shape[1] :]",
                "state.data.copy_(window[:, x.shape[1] :])",
            ),
            hint=3,
            bug="rollback of a draft finds its snapshot changed",
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
    "02.mamba2": [
        Mutant(
            "the order of the cut",
            altered(
                MAMBA2,
                "z, xBC, dt = self.in_proj(u).split([inner, c.conv_dim,",
                "xBC, z, dt = self.in_proj(u).split([c.conv_dim, inner,",
            ),
            hint=1,
            bug="xBC | z | dt: fine to train, wrong with published weights",
        ),
        Mutant(
            "B and C exchanged",
            altered(MAMBA2, "x, B, C = xBC.split", "x, C, B = xBC.split"),
            hint=1,
            bug="the names of keys and queries exchanged in a port",
        ),
        Mutant(
            "the bias after the softplus",
            altered(MAMBA2, "F.softplus(dt + self.dt_bias)", "F.softplus(dt) + self.dt_bias"),
            hint=1,
            bug="dt may become negative, and the state grows",
        ),
        Mutant(
            "dt is clamped",
            altered(
                MAMBA2,
                "F.softplus(dt + self.dt_bias)",
                "F.softplus(dt + self.dt_bias).clamp(min=0.5)",
            ),
            hint=1,
            bug="huggingface/transformers#48989: dt clamped from below, except in single steps",
        ),
        Mutant(
            "no direct path",
            altered(
                MAMBA2,
                "(y + self.D.unsqueeze(-1) * x).flatten(-2)",
                "y.flatten(-2)",
            ),
            hint=2,
            bug="D left out: the model was trained with it",
        ),
        Mutant(
            "one norm over all groups",
            altered(MAMBA2, "self.norm.weight, c.n_groups, c", "self.norm.weight, 1, c"),
            hint=2,
            bug="huggingface/transformers#35943: right with one group, wrong with eight",
        ),
        Mutant(
            "an eps of its own",
            altered(MAMBA2, "c.n_groups, c.norm_eps", "c.n_groups, 1e-6"),
            hint=2,
            bug="the default of another library instead of the config's eps",
        ),
        Mutant(
            "rates without the exponential",
            altered(MAMBA2, "-self.A_log.exp()", "-self.A_log.abs()"),
            hint=3,
            bug="A_log is a logarithm; ports that store A itself load it unchanged",
        ),
        Mutant(
            "the convolution starts from nothing",
            altered(
                MAMBA2,
                "self.project(u, conv)",
                "self.project(u, torch.zeros_like(conv))",
            ),
            hint=3,
            bug="huggingface/transformers#46741: the second piece of a prompt starts from nothing",
        ),
        Mutant(
            "the state starts from nothing",
            altered(MAMBA2, "B, C, ssm, 64)", "B, C, torch.zeros_like(ssm), 64)"),
            hint=3,
            bug="vLLM up to 0.15.0: the state of a chunked prefill was not handed over",
        ),
        Mutant(
            "the cache is changed in place",
            altered(
                MAMBA2,
                "return self.finish(y, x, z), (conv, ssm)",
                "ssm = ssm if cache is None else cache[1].data.copy_(ssm)\n"
                "        return self.finish(y, x, z), (conv, ssm)",
            ),
            hint=3,
            bug="the package's own layer writes into its cache; this one promised not to",
        ),
        Mutant(
            "a detached rate",
            altered(MAMBA2, "-self.A_log.exp()", "-self.A_log.detach().exp()"),
            hint=3,
            bug="A_log never trains: it was treated as a constant",
        ),
    ],
    "02.decoding": [
        Mutant(
            "read before the write",
            altered(DECODING, "y = (ssm * C", "y = (decay * cache[1] * C"),
            hint=1,
            bug="the output of the state before the token: one token late",
        ),
        Mutant(
            "the old state does not decay",
            altered(DECODING, "decay * cache[1] + write", "cache[1] + write"),
            hint=1,
            bug="the decay left out of the one-token path",
        ),
        Mutant(
            "dt left out of the write",
            altered(DECODING, "(dt[:, 0].unsqueeze(-1) * x[:, 0])", "x[:, 0]"),
            hint=1,
            bug="the discretized B is dt * B in prefill, and was B in decode",
        ),
        Mutant(
            "groups repeated in turns",
            altered(DECODING, ".repeat_interleave(shared, dim=1)", ".repeat(1, shared, 1)"),
            hint=1,
            bug="repeat for repeat_interleave: right with one group, wrong with more",
        ),
        Mutant(
            "the inputs of the convolution are not handed on",
            altered(DECODING, "[:, 0], (conv, ssm)", "[:, 0], (cache[0], ssm)"),
            hint=2,
            bug="the convolution sees the end of the prompt for ever",
        ),
        Mutant(
            "the state is overwritten",
            altered(
                DECODING,
                "ssm = decay * cache[1] + write",
                "ssm = cache[1].data.mul_(decay).add_(write)",
            ),
            hint=3,
            bug="two continuations of one prompt disturb each other",
        ),
    ],
    "02.step_kernel": [
        Mutant(
            "read before the write",
            altered(
                STEP_KERNEL, "    read = tl.sum(state", "    read = tl.sum(tl.load(S + places)"
            ),
            hint=1,
            bug="the output of the state before the token",
        ),
        Mutant(
            "no direct path",
            altered(STEP_KERNEL, "read + tl.load(D + head) * inputs", "read"),
            hint=1,
            bug="D left out of the fused step",
        ),
        Mutant(
            "every head reads group 0",
            altered(STEP_KERNEL, "B + group * N + n", "B + row * G * N + n"),
            hint=2,
            bug="right with one group, wrong with more",
        ),
        Mutant(
            "one rate for all heads",
            altered(STEP_KERNEL, "tl.load(A + head)", "tl.load(A)"),
            hint=2,
            bug="a pointer that is not moved: right for the first head",
        ),
        Mutant(
            "the state is overwritten",
            altered(STEP_KERNEL, "    read =", "    tl.store(S + places, state)\n    read ="),
            hint=3,
            bug="an in-place kernel under a wrapper that promised a new state",
        ),
        Mutant(
            "the state is stored before the write",
            altered(
                STEP_KERNEL,
                "tl.store(new + places, state)",
                "tl.store(new + places, decay * state)",
            ),
            hint=3,
            bug="the decay applied twice to what is stored",
        ),
    ],
    "02.chunk_gradients": [
        Mutant(
            "the matrix is not transposed",
            altered(CHUNK_GRADIENTS, "(L * (C @ B.T)).T @ grad_y", "(L * (C @ B.T)) @ grad_y"),
            hint=1,
            bug="the gradient flows to earlier tokens, so the triangle is transposed",
        ),
        Mutant(
            "the state after the chunk sends nothing back to w",
            altered(CHUNK_GRADIENTS, " + left * (B @ grad_state.T)\n", "\n"),
            hint=1,
            bug="gradients stop at chunk borders: truncated backpropagation by accident",
        ),
        Mutant(
            "B and C exchanged",
            altered(CHUNK_GRADIENTS, "grad_B = grad_scores.T @ C", "grad_B = grad_scores @ C"),
            hint=2,
            bug="scores transposed in the backward pass",
        ),
        Mutant(
            "the state does not decay on the way back",
            altered(CHUNK_GRADIENTS, "s[-1].exp() * grad_state +", "grad_state +"),
            hint=2,
            bug="the decay of the chunk left out of the backward pass from chunk to chunk",
        ),
        Mutant(
            "the last entry of s",
            altered(
                CHUNK_GRADIENTS, "    grad_s[-1] += kept.sum() + s[-1]", "    grad_s[-1] += s[-1]"
            ),
            hint=3,
            bug="s_q raises every write in S': a term of the gradient of dt that ports forget",
        ),
        Mutant(
            "the columns of L",
            altered(CHUNK_GRADIENTS, " - inside.sum(0)", ""),
            hint=3,
            bug="huggingface/transformers#47246: a sum over the wrong axis of the decay matrix",
        ),
    ],
}
