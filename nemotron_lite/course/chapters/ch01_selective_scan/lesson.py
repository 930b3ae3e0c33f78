"""What chapter 01 builds around the learner's code: a model of scan layers, and Nemotron.

    embedding → (norm → scan layer → +) twice → norm → logits

`ScanModel` has no convolution, no gate and no attention, so only the scan can learn. It takes the
class of its layers as an argument: the learner's, or `ScanLayer`, the package's answer to the same
exercise. Both have the same names of weights. With `selective=False` a layer computes dt, B and C
from zeros instead of from the token: they are still learned, and equal for all tokens.

`with_scan` gives every Mamba-2 layer of a Nemotron another function for the scan, such as the
learner's, and leaves the rest of the layer and all weights as they are.

Left out: what a good layer needs besides the scan (see `layers/mamba2.py`).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron_lite import Nemotron, NemotronConfig, ops
from nemotron_lite.course.display import progress, progress_hook
from nemotron_lite.data.batches import (
    Batch,
    BatchSource,
    ConcatenatedDocuments,
    concatenate_documents,
)
from nemotron_lite.data.corpus import load_corpus
from nemotron_lite.data.tasks.selective_copy import SelectiveCopy
from nemotron_lite.layers import ForwardContext
from nemotron_lite.layers.mamba2 import Mamba2, MambaCache
from nemotron_lite.train import TrainConfig, train

CHUNK = 32  # rows of the chapter are about this long
EVERY_TOKEN = ForwardContext()  # whole rows of one document each

# Facts of Super, and the same of the model that the chapter trains.
OURS: Mapping[str, float] = {
    "super.mamba_heads": 4,
    "super.mamba_head_width": 8,
    "super.state_size": 8,
    "super.groups": 1,
    "super.scan_states_per_layer": 4 * 8 * 8,
    "super.dt_min": 0.05,
    "super.dt_max": 1.0,
}

# x, dt, A, B, C, D, state -> y, state
Scan = Callable[..., tuple[Tensor, Tensor]]


class ScanLayer(nn.Module):
    """One scan with its projections: the package's answer to exercise 01.scan_layer.

    Args:
        d: width.
        h: heads, in one group.
        p: width of a head.
        n: size of the state.
        selective: dt, B and C from the token, or from zeros.
    """

    def __init__(self, d: int, h: int, p: int, n: int, selective: bool = True) -> None:
        super().__init__()
        self.heads, self.selective = h, selective
        self.x_proj, self.dt_proj = nn.Linear(d, h * p, bias=False), nn.Linear(d, h)
        self.B_proj, self.C_proj = nn.Linear(d, n), nn.Linear(d, n)
        self.out_proj = nn.Linear(h * p, d, bias=False)
        self.A_log = nn.Parameter(torch.linspace(math.log(0.1), 0.0, h))
        self.D = nn.Parameter(torch.ones(h))
        steps = torch.linspace(math.log(0.05), 0.0, h).exp()
        with torch.no_grad():
            self.dt_proj.bias.copy_(torch.log(torch.expm1(steps)))

    def controls(self, u: Float[Tensor, "b t d"]) -> tuple[Tensor, Tensor, Tensor]:
        """dt `b t h`, B and C `b t 1 n`: from each token, or from zeros through the same maps."""
        seen = u if self.selective else torch.zeros_like(u)
        dt = F.softplus(self.dt_proj(seen))
        return dt, self.B_proj(seen).unsqueeze(2), self.C_proj(seen).unsqueeze(2)

    def forward(
        self, u: Float[Tensor, "b t d"], state: Float[Tensor, "b h p n"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b h p n"]]:
        """The output, and the state after the last token."""
        x = self.x_proj(u).unflatten(-1, (self.heads, -1))
        dt, B, C = self.controls(u)
        y, state = ops.ssd(
            x, dt, -self.A_log.exp(), B, C, D=self.D, initial_state=state, chunk_size=CHUNK
        )
        return self.out_proj(y.flatten(2)), state


class ScanModel(nn.Module):
    """Embedding, two scan layers with norms and residual connections, logits.

    Args:
        vocab_size: tokens.
        layer: the class of the layers, with the arguments of `ScanLayer`.
        selective: passed on to the layers.
        d: width.
        h, p, n: heads, their width, and the size of the state.
        seed: of the weights.
    """

    def __init__(
        self,
        vocab_size: int,
        layer: Callable[..., nn.Module] = ScanLayer,
        *,
        selective: bool = True,
        d: int = 32,
        h: int = 4,
        p: int = 8,
        n: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocab_size, d)
            self.layers = nn.ModuleList(layer(d, h, p, n, selective) for _ in range(2))
            self.norms = nn.ModuleList(nn.RMSNorm(d) for _ in range(2))
            self.norm, self.head = nn.RMSNorm(d), nn.Linear(d, vocab_size, bias=False)
            for one in cast(Sequence[Any], self.layers):  # B and C must differ from zero early on
                nn.init.normal_(one.B_proj.bias)
                nn.init.normal_(one.C_proj.bias)

    def forward(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        """Logits of the next token at each position."""
        stream = self.embedding(tokens)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            stream = stream + layer(norm(stream))[0]
        logits: Tensor = self.head(self.norm(stream))
        return logits

    @torch.no_grad()
    def step_sizes(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t h"]:
        """dt of the first layer at every token."""
        first = cast(Any, self.layers[0])
        dt: Tensor = first.controls(self.norms[0](self.embedding(tokens)))[0]
        return dt


def letters_to_silence(model: ScanModel, task: SelectiveCopy, exam: Batch) -> float:
    """Mean dt of letters over that of silence, in the head of layer 1 where it is largest."""
    assert exam.mask is not None
    steps = model.step_sizes(exam.tokens)
    letters = (exam.tokens >= task.FIRST_LETTER) & ~exam.mask
    silence = exam.tokens == task.SILENCE
    return float((steps[letters].mean(0) / steps[silence].mean(0)).max())


@torch.no_grad()
def exact_rows(logits: Float[Tensor, "b t v"], batch: Batch) -> float:
    """Rows of 100 in which the model predicts every answer in the mask.

    Each answer is predicted from the correct tokens before it. If all are right, the model would
    also generate the whole row correctly.

    Raises:
        ValueError: a batch without a mask.
    """
    if batch.mask is None:
        raise ValueError("this batch has no mask; expected one that marks its answers.")
    right = logits[:, :-1].argmax(-1) == batch.tokens[:, 1:]
    return 100 * (right | ~batch.mask[:, 1:]).all(1).double().mean().item()


def train_scan(
    model: nn.Module,
    task: BatchSource,
    exam: Batch,
    name: str,
    *,
    steps: int = 200,
    batch_size: int = 32,
    lr: float = 0.02,
    seed: int = 0,
    every: int = 25,
) -> list[float]:
    """Train on `task` in place, with a progress bar.

    Args:
        model: tokens `b t` to logits `b t v`.
        task: its `mask` says which tokens are answers; only they are learned.
        exam: the rows to measure on. Rows for training have the same length.
        name: the label of the bar.
        steps: updates of AdamW, without weight decay, in one cycle of the learning rate.
        batch_size: rows an update.
        lr: the highest learning rate.
        seed: of the data.
        every: updates between two measurements.

    Returns:
        `exact_rows` of the exam before the first update and after each `every`.
    """
    adam = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, lr, total_steps=steps)
    length = exam.tokens.shape[1]
    with torch.no_grad():
        curve = [exact_rows(model(exam.tokens), exam)]
    for i in progress(range(steps), name):
        batch = task.batch(i, batch_size=batch_size, seq_len=length, seed=seed)
        assert batch.mask is not None
        answers = batch.mask[:, 1:]
        loss = F.cross_entropy(model(batch.tokens)[:, :-1][answers], batch.tokens[:, 1:][answers])
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        rate.step()
        if (i + 1) % every == 0:
            with torch.no_grad():
                curve.append(exact_rows(model(exam.tokens), exam))
    return curve


class Mamba2WithScan(Mamba2):
    """The package's Mamba-2 layer, with `scan` in place of `ops.ssd` and `ops.ssd_step`.

    Projections, convolution, gate and norm are the package's. `scan` is called in the same way for
    a prompt and for one token. Left out: padding, drafts, and several documents in a row.
    """

    scan: Scan

    def forward(
        self,
        u: Float[Tensor, "b t d"],
        cache: MambaCache | None = None,
        context: ForwardContext = EVERY_TOKEN,
    ) -> Float[Tensor, "b t d"]:
        """As `Mamba2.forward`.

        Raises:
            ValueError: padded rows, several documents in a row, or a draft.
        """
        if context.lengths is not None or context.seq_idx is not None or context.draft:
            raise ValueError(
                "a layer with another scan reads whole rows of one document: call the model "
                "without lengths, seq_idx and draft."
            )
        z, xBC, dt = self.in_proj(u).split_with_sizes(self.splits, dim=-1)
        xBC, conv = ops.causal_conv1d(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_state=None if cache is None else cache.conv,
        )
        x, B, C = self._split_heads(xBC)
        if cache is None:
            state = x.new_zeros(x.shape[0], *x.shape[2:], self.state_size)
        else:
            state = cache.read_state()
        y, state = self.scan(x, self._step_sizes(dt), self._rates(), B, C, self.D, state)
        if cache is not None:
            cache.conv = conv
            cache.write_state(state)
        return self.out_proj(self.norm(y.flatten(2), z))


def with_scan(model: Nemotron, scan: Scan) -> Nemotron:
    """A copy of the model whose Mamba-2 layers call `scan`; the weights are equal.

    Args:
        model: it is not changed.
        scan: called with x, dt, A, B, C, D and the state, as in exercise 01.selective_recurrence.

    Raises:
        ValueError: the model has no Mamba-2 layer.
    """
    changed = copy.deepcopy(model)
    mixers = [m for m in changed.modules() if type(m) is Mamba2]
    if not mixers:
        raise ValueError(f"the model {model.config.pattern!r} has no Mamba-2 layer.")
    for mixer in mixers:
        mixer.__class__ = Mamba2WithScan
        cast(Mamba2WithScan, mixer).scan = scan
    return changed


SMALL = NemotronConfig(
    "MEM*E", vocab_size=256, hidden_size=64, initializer_range=0.1,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=16, n_groups=2, chunk_size=64,
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, moe_latent_size=32,
    moe_shared_expert_intermediate_size=64, intermediate_size=128,
    bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip


def byte_text() -> ConcatenatedDocuments:
    """Python's standard library as bytes: one token each, so nothing has to be prepared."""
    documents = [np.frombuffer(d.content, dtype=np.uint8) for d in load_corpus().train]
    return ConcatenatedDocuments(*concatenate_documents(documents), isolate_documents=False)


def train_small(
    model: Nemotron, text: BatchSource, name: str, *, steps: int = 50, seed: int = 0
) -> list[float]:
    """Train a model of `SMALL` in place, with a bar; returns its loss at every update."""
    recipe = TrainConfig(steps=steps, batch_size=4, seq_len=64, lr=4e-3, min_lr=4e-5, seed=seed)
    result = train(model, text, recipe, progress=False, on_step=progress_hook(name, steps))
    return [float(record["ce"]) for record in result.history]


def random_inputs(
    t: int,
    generator: torch.Generator,
    *,
    h: int = 4,
    p: int = 8,
    g: int = 2,
    n: int = 8,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D and a zero state, in the order in which a scan takes them."""
    normal = partial(torch.randn, generator=generator, dtype=dtype)
    dt = F.softplus(normal(1, t, h) - 2)
    A = -torch.linspace(0.5, 4, h, dtype=dtype)
    state = torch.zeros(1, h, p, n, dtype=dtype)
    return normal(1, t, h, p), dt, A, normal(1, t, g, n), normal(1, t, g, n), normal(h), state


def package_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The package's scan, which works in chunks, with the arguments of the exercises."""
    return ops.ssd(x, dt, A, B, C, D=D, initial_state=state)


@torch.no_grad()
def seconds(scan: Scan, inputs: Sequence[Tensor], runs: int = 3) -> float:
    """The shortest of some runs: other programs can only make one longer."""
    took = []
    for _ in range(runs):
        start = time.perf_counter()
        scan(*inputs)
        took.append(time.perf_counter() - start)
    return min(took)


def time_scans(
    scans: Mapping[str, Scan], lengths: Sequence[int], generator: torch.Generator
) -> dict[str, list[float]]:
    """Seconds of each scan at each length, for a small state in float32."""
    took: dict[str, list[float]] = {name: [] for name in scans}
    for t in progress(lengths, "timing"):
        inputs = random_inputs(t, generator, dtype=torch.float32)
        for name, scan in scans.items():
            took[name].append(seconds(scan, inputs, runs=5))
    return took


def half_lives(model: Nemotron) -> list[Tensor]:
    """For each Mamba-2 layer, after how many tokens its heads keep half of a state, `h`.

    The step size of a token is that of an input of zero: softplus(dt_bias).
    """
    mixers = [m for m in model.modules() if isinstance(m, Mamba2)]
    return [math.log(2) / (F.softplus(m.dt_bias) * m.A_log.exp()).detach() for m in mixers]
