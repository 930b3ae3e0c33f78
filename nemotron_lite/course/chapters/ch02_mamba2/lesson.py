"""What chapter 02 runs beside the learner's code: comparisons, times, wrong ports, training.

The ports are the learner's own layer with one published bug each. They show how an error looks
when it is drawn over the positions of a text that is read in three ways: a piece at once, a second
piece after the cache of the first, and then token by token.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron_lite import data, ops
from nemotron_lite.config import NemotronConfig
from nemotron_lite.course import display, output
from nemotron_lite.course.chapters.ch02_mamba2.checks import kernel_device
from nemotron_lite.generation.generate import generate
from nemotron_lite.generation.options import GenerationSettings
from nemotron_lite.model import Nemotron
from nemotron_lite.train import TrainConfig, train

PIECES = (48, 24, *[1] * 24)
MARKS = {"second piece": 48, "one by one": 72}

# A model of bytes that trains in seconds: two Mamba-2 layers, an attention layer and experts.
SMALL = NemotronConfig.from_preset(
    "lite",
    pattern="ME*M",
    vocab_size=256,
    hidden_size=96,
    mamba_num_heads=6,
    n_groups=2,
    ssm_state_size=16,
    num_attention_heads=4,
    head_dim=24,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    moe_latent_size=32,
    moe_shared_expert_intermediate_size=96,
    mtp_pattern="",
    mtp_depths=0,
)
EVERY = 10  # steps that one value of the loss curves is the mean of


def same(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-3) -> None:
    """Assert that two results agree up to rounding, and say so.

    Raises:
        AssertionError: they differ by more than `tolerance`.
    """
    gap = (found - expected).abs().max().item()
    assert gap < tolerance, f"{what} differ by {gap:.3g}; expected less than {tolerance:g}"
    print(f"{what}: equal, no number differs by more than {tolerance:g}")


def loaded(make: Callable[[NemotronConfig], Any], layer: nn.Module, config: NemotronConfig) -> Any:
    """A layer made by `make`, with the weights of `layer`."""
    made = make(config)
    made.load_state_dict(layer.state_dict())
    return made


def read(layer: Any, u: Tensor, pieces: Sequence[int] = PIECES) -> Tensor:
    """The outputs of a layer that reads `u`, `b t d`, in pieces of these lengths."""
    outputs, cache = [], None
    with torch.no_grad():
        for piece in u.split(list(pieces), dim=1):
            out, cache = layer(piece, cache)
            outputs.append(out)
    return torch.cat(outputs, dim=1)


def error_by_token(layer: Any, right: Tensor, u: Tensor) -> Tensor:
    """The largest error at each position, `t`, of a layer that reads `u` in pieces."""
    return (read(layer, u) - right).abs().amax((0, 2))


def ports(layer: Any) -> dict[str, Any]:
    """The same layer with one published bug each, by the name of the bug."""
    base: Any = type(layer)

    class OneNorm(base):  # type: ignore[misc]
        """huggingface/transformers#35943: one norm over all groups."""

        def finish(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
            y = (y + self.D.unsqueeze(-1) * x).flatten(-2)
            normed = ops.gated_rms_norm(y, z, self.norm.weight, 1, self.config.norm_eps)
            result: Tensor = self.out_proj(normed)
            return result

    class FromNothing(base):  # type: ignore[misc]
        """huggingface/transformers#46741: a second piece starts from an empty state."""

        def forward(self, u: Tensor, cache: Any = None) -> Any:
            if cache is not None and u.shape[1] > 1:
                cache = cache[0], torch.zeros_like(cache[1])
            return super().forward(u, cache)

    class KeepsOutputs(base):  # type: ignore[misc]
        """state-spaces/mamba#1027: a prefill keeps outputs of the convolution, not inputs."""

        def project(self, u: Tensor, conv: Tensor) -> Any:
            z, x, dt, B, C, after = super().project(u, conv)
            if u.shape[1] > 1:
                outputs = torch.cat([x.flatten(2), B.flatten(2), C.flatten(2)], dim=-1)
                after = outputs[:, -conv.shape[1] :]
            return z, x, dt, B, C, after

    class ClampsSteps(base):  # type: ignore[misc]
        """huggingface/transformers#48989: dt is clamped from below in prefill only."""

        def project(self, u: Tensor, conv: Tensor) -> Any:
            z, x, dt, B, C, after = super().project(u, conv)
            if u.shape[1] > 1:
                dt = dt.clamp(min=self.config.time_step_min)
            return z, x, dt, B, C, after

    bugs = {
        "one norm": OneNorm,
        "from nothing": FromNothing,
        "keeps outputs": KeepsOutputs,
        "clamps dt": ClampsSteps,
    }
    return {name: loaded(port, layer, layer.config) for name, port in bugs.items()}


def scan_inputs(config: NemotronConfig, tokens: int, random: torch.Generator) -> list[Tensor]:
    """x, dt, A, B, C and a state of zero, for one text in the sizes of a layer of `config`."""
    h, p = config.mamba_num_heads, config.mamba_head_dim
    g, n = config.n_groups, config.ssm_state_size
    B, C = torch.randn(2, 1, tokens, g, n, generator=random)
    return [
        torch.randn(1, tokens, h, p, generator=random),
        F.softplus(torch.randn(1, tokens, h, generator=random) - 3),
        -torch.rand(h, generator=random).mul(15).add(1),
        B,
        C,
        torch.zeros(1, h, p, n),
    ]


def seconds(*runs: Callable[[], object], label: str, repeats: int = 2) -> list[float]:
    """CPU seconds of each call, the median of `repeats` rounds; the calls take turns.

    CPU time does not count what other programs do meanwhile.

    Args:
        runs: what is timed.
        label: of the progress bar.
        repeats: rounds that count; one more before them warms up.
    """
    times: list[list[float]] = [[] for _ in runs]
    with torch.no_grad():
        for turn in display.progress(range((repeats + 1) * len(runs)), label):
            start = time.process_time()
            runs[turn % len(runs)]()
            times[turn % len(runs)].append(time.process_time() - start)
    return [float(np.median(found[1:])) for found in times]


def python_source() -> data.ConcatenatedDocuments:
    """Python source code, byte by byte."""
    documents = [np.frombuffer(d.content, np.uint8) for d in data.load_corpus().train]
    return data.ConcatenatedDocuments(*data.concatenate_documents(documents))


def train_briefly(
    model: Nemotron, source: data.ConcatenatedDocuments, name: str, steps: int = 120
) -> np.ndarray:
    """Train in place; returns the mean loss of every `EVERY` steps, in nats per byte."""
    recipe = TrainConfig(steps=steps, batch_size=4, seq_len=128, lr=5e-3)
    hook = display.progress_hook(f"training with {name}", total=steps)
    run = train(model, source, recipe, progress=False, on_step=hook)
    return np.reshape([record["ce"] for record in run.history], (-1, EVERY)).mean(1)


def write_with(first: Nemotron, second: Nemotron, prompt: str, new: int = 120) -> None:
    """Let two models with the same weights continue a prompt, and show the text.

    Both draw with the same random numbers.

    Raises:
        AssertionError: they write different bytes.
    """
    ids = list(prompt.encode())
    how: GenerationSettings = {"temperature": 0.6, "seed": 1, "stop": ()}
    one, other = (generate(net, ids, new, **how) for net in (first, second))
    assert one == other, "two models with the same weights should write the same text"
    text = html.escape(prompt + bytes(one).decode(errors="replace"))
    output.show_output(f"both models wrote the same {new} bytes", f"<pre>{text}</pre>")


def show_scores(scores: Mapping[str, float]) -> None:
    """Show the share of right answers of each model; only the HTML has the numbers."""
    rows = [[output.inline_html(name), f"{share:.0%}"] for name, share in scores.items()]
    names = ", ".join(scores)
    table = output.html_table(["model", "right answers"], rows, title="Recall, measured here")
    output.show_output(f"share of right answers: {names}", table)


def with_step_kernel(layer: Any, step_by_kernel: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    """The same layer; the recurrence of its one-token path is computed by `step_by_kernel`."""
    base: Any = type(layer)

    class KernelStep(base):  # type: ignore[misc]
        def step(self, u: Tensor, cache: Any) -> Any:
            z, x, dt, B, C, conv = self.project(u.unsqueeze(1), cache[0])
            x_, dt_, B_, C_ = (part[:, 0].contiguous() for part in (x, dt, B, C))
            no_path = torch.zeros_like(self.D)  # `finish` adds D x
            tensors = (cache[1], x_, dt_, -self.A_log.exp(), B_, C_, no_path)
            found = step_by_kernel(*(tensor.to(kernel_device()) for tensor in tensors))
            y, ssm = (tensor.to(u.device) for tensor in found)
            return self.finish(y.unsqueeze(1), x, z)[:, 0], (conv, ssm)

    return loaded(KernelStep, layer, layer.config)


def compare_chunk_gradients(
    chunk_gradients: Callable[..., Sequence[Tensor]],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk: int,
) -> None:
    """Compare the gradient of a text, chunk by chunk from its end, with that of the recurrence.

    Args:
        chunk_gradients: the answer to 02.chunk_gradients.
        x: `t p`, one head.
        dt: `t`.
        A: one number.
        B, C: `t n`.
        chunk: tokens per chunk.

    Raises:
        AssertionError: a gradient differs.
    """
    leaves = [v.detach().clone().requires_grad_() for v in (x, dt, B, C)]
    x_, dt_, B_, C_ = (v.unsqueeze(0) for v in leaves)
    y, _ = ops.selective_scan(
        x_.unsqueeze(2), dt_.unsqueeze(2), A.view(1), B_.unsqueeze(2), C_.unsqueeze(2)
    )
    grad_y = y.detach()[0, :, 0]  # of half the sum of squares
    expected = torch.autograd.grad(y.square().sum() / 2, leaves)

    parts = [v.split(chunk) for v in (dt.unsqueeze(1) * x, dt * A, B, C, grad_y)]
    chunks = list(zip(*parts, strict=True))
    state = x.new_zeros(x.shape[1], B.shape[1])
    before = []
    for w, a, keys, _, _ in chunks:
        before.append(state)
        s = a.cumsum(0)
        state = s[-1].exp() * state + ((s[-1] - s).exp().unsqueeze(1) * w).T @ keys
    grad_state = torch.zeros_like(state)
    found: list[list[Tensor]] = []
    for (w, a, keys, queries, grad), old in reversed(list(zip(chunks, before, strict=True))):
        grad_w, grad_s, *directions, grad_state = chunk_gradients(
            w, a.cumsum(0), keys, queries, old, grad, grad_state
        )
        # s is a running sum: the gradient of a is the sum of those behind it.
        grad_a = grad_s.flip(0).cumsum(0).flip(0)
        found.insert(0, [grad_w, grad_a, *directions])
    grad_w, grad_a, grad_B, grad_C = (torch.cat(v) for v in zip(*found, strict=True))
    grad_dt = (grad_w * x).sum(1) + A * grad_a
    pairs = ((dt.unsqueeze(1) * grad_w, "x"), (grad_dt, "dt"), (grad_B, "B"), (grad_C, "C"))
    for (mine, name), theirs in zip(pairs, expected, strict=True):
        same(mine, theirs, f"gradient of {name}")
