"""The model of chapter 01, which is a scan and nothing else, and its training.

    embedding → (norm → scan → +) twice → norm → logits

It has no convolution, no gate and no attention, so only the scan can learn. With `selective=True`
dt, B and C are computed from each token, as in Mamba. With `selective=False` the same linear map
gets zeros as input, so only its bias is left: dt, B and C are learned, and equal for all tokens.
Both variants have the same parameters; the second is a convolution with a learned kernel.

Left out: what a good layer needs besides (see `layers/mamba2.py`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron_lite import ops
from nemotron_lite.course.display import progress
from nemotron_lite.data.batches import Batch, BatchSource

CHUNK = 32  # rows of the chapter are about this long


class ScanLayer(nn.Module):
    """One scan, its inputs and its output projection.

    Args:
        d: width.
        selective: dt, B and C from the token, or from a learned constant.
        h: heads, in one group.
        p: width of a head.
        n: size of the state.
    """

    def __init__(self, d: int, *, selective: bool, h: int = 2, p: int = 16, n: int = 16) -> None:
        super().__init__()
        self.selective, self.heads, self.sizes = selective, (h, p), (n, n, h)
        self.norm, self.write = nn.RMSNorm(d), nn.Linear(d, h * p, bias=False)
        self.control, self.out = nn.Linear(d, 2 * n + h), nn.Linear(h * p, d, bias=False)
        self.A_log = nn.Parameter(torch.linspace(math.log(0.05), math.log(2), h))
        nn.init.normal_(self.control.bias)

    def forward(self, u: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Add what the scan reads to the stream."""
        v = self.norm(u)
        x = self.write(v).unflatten(-1, self.heads)
        dt, B, C = self.controls(v)
        y, _ = ops.ssd(x, dt, -self.A_log.exp(), B, C, chunk_size=CHUNK)
        return u + self.out(y.flatten(2))

    def controls(self, v: Float[Tensor, "b t d"]) -> tuple[Tensor, Tensor, Tensor]:
        """dt `b t h`, B and C `b t 1 n`: from each token, or from zeros through the same map."""
        B, C, dt = self.control(v if self.selective else 0 * v).split(self.sizes, -1)
        return F.softplus(dt), B.unsqueeze(2), C.unsqueeze(2)


class ScanModel(nn.Module):
    """Embedding, `layers` scan layers, logits.

    Args:
        vocab_size: tokens.
        selective: see `ScanLayer`.
        d: width.
        layers: how many.
        seed: of the weights.
    """

    def __init__(
        self, vocab_size: int, *, selective: bool, d: int = 32, layers: int = 2, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocab_size, d)
            self.layers = nn.Sequential(*(ScanLayer(d, selective=selective) for _ in range(layers)))
            self.norm, self.head = nn.RMSNorm(d), nn.Linear(d, vocab_size, bias=False)

    def forward(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        """Logits of the next token at each position."""
        logits: Tensor = self.head(self.norm(self.layers(self.embedding(tokens))))
        return logits

    @torch.no_grad()
    def step_sizes(self, tokens: Int[Tensor, "b t"]) -> list[Float[Tensor, "b t h"]]:
        """dt of every layer at every token."""
        found, stream = [], self.embedding(tokens)
        for layer in self.layers:
            assert isinstance(layer, ScanLayer)
            found.append(layer.controls(layer.norm(stream))[0])
            stream = layer(stream)
        return found


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
    steps: int = 400,
    batch_size: int = 64,
    lr: float = 0.01,
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
