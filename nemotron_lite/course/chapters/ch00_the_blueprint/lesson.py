"""The small model of chapter 00 and its training.

`TOY` has one layer of each kind: Mamba-2, a mixture of experts, attention. It is small enough to
learn something from the source of the standard library in a quarter of a minute. It has no MTP
module, so the learner's class and `Nemotron` have the same weights.

`train_toy` is a loop of a few lines: next-token cross-entropy, AdamW, one cycle of the learning
rate. It takes any model that turns token ids into logits, so that the learner's class and the
package's model are trained in the same way, on the same batches.

Left out, on purpose: multi-token prediction, the balance of the experts, weight decay only for
matrices. `nemotron_lite.train` does all of it.
"""

from __future__ import annotations

from html import escape

import torch
import torch.nn.functional as F
from torch import nn

from nemotron_lite.config import NemotronConfig
from nemotron_lite.course import output
from nemotron_lite.course.display import progress
from nemotron_lite.data.batches import BatchSource

TOY = NemotronConfig(
    "ME*", vocab_size=1024, hidden_size=96, initializer_range=0.09,
    num_attention_heads=4, num_key_value_heads=2, head_dim=24,
    mamba_num_heads=6, mamba_head_dim=32, ssm_state_size=8, n_groups=1,
    n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=64, moe_latent_size=24,
    moe_shared_expert_intermediate_size=96, routed_scaling_factor=2.5,
    bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip

# Text of the map, with figures from facts.toml.
LETTERS_AND_CLAIMS = """
| letter | layer | what it does with a token | you build it in |
|---|---|---|---|
| `M` | Mamba-2 | passes information on through a state of constant size | 01, 02 |
| `*` | attention | looks at every earlier token | 03 |
| `E` | mixture of experts | uses a few of many small networks, for this token alone | planned |

The [report](https://arxiv.org/abs/2604.12374) makes six claims. No laptop can repeat the benchmarks
of such a model, but it can test the mechanism behind each claim:

1. **Quality for its cost**: experts store much and each token reads little of it; only
   {super.attention_layers} of {super.layers} layers are attention. → **00** counts both, **01** to
   **03** build both kinds.
2. **LatentMoE**, experts of a smaller width: MMLU-Pro, a test of knowledge, from
   {latent_moe.standard_mmlu_pro} to {latent_moe.latent_mmlu_pro} % at equal cost, in a
   smaller model. → **00**: its cost. The rest is planned.
3. **Multi-token prediction** (MTP, the last row of the map): {super.mtp_acceptance_length} tokens
   accepted per step. → Planned.
4. **Training in NVFP4**, four bits a number: in a smaller model, a loss within
   {nvfp4.gap_a8b} % of BF16's. → Planned.
5. **Reinforcement learning for agents**, in {super.rl_environments} environments. → Planned.
6. **A million tokens of context**: RULER, a test on long texts, {super.ruler_1m} %. → **00**: its
   memory. **02**: its cost. **03**: recall.
"""


def train_toy(
    model: nn.Module,
    data: BatchSource,
    label: str,
    *,
    steps: int = 120,
    batch_size: int = 8,
    seq_len: int = 64,
    lr: float = 6e-3,
    seed: int = 0,
) -> list[float]:
    """Train in place, with a progress bar.

    Args:
        model: token ids `b t` to logits `b t v`, as a tensor or as `.logits` of its output.
        data: the source of batches.
        label: of the bar.
        steps: updates.
        batch_size, seq_len: of each batch.
        lr: the highest learning rate.
        seed: of the order of the data.

    Returns:
        The loss of each update, in nats per token.
    """
    adam = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, lr, total_steps=steps)
    losses = []
    model.train()
    for i in progress(range(steps), label):
        tokens = data.batch(i, batch_size=batch_size, seq_len=seq_len, seed=seed).tokens
        found = model(tokens)
        logits = getattr(found, "logits", found)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        rate.step()
        losses.append(loss.item())
    model.eval()
    return losses


def show_text(title: str, text: str) -> None:
    """Show what a model wrote. It differs between machines, so the compared text is the title."""
    output.show_output(title, f"<b>{escape(title)}</b><pre>{escape(text)}</pre>")
