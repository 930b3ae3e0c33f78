"""Causal attention on a GPU without gradients: kernels of PyTorch that need no plan.

On a GPU PyTorch would take cuDNN's kernel, which is fast once it has a plan. It makes one for every
number of keys, and decoding has another number for each token; what that costs shows in the times
of transformers in benchmarks/records/gpu_model_nvidia_h200.json. So cuDNN trains, and prefill and
decoding take the kernels that need no plan. There is no mask in memory where the causal triangle is
enough.

Left out: a Triton kernel of our own, and training, for which PyTorch chooses by itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemotron_lite.backends.cpu_attention import one_token
from nemotron_lite.masks import keys_seen, visible_keys

_WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(
    q: Float[Tensor, "b h t p"],
    k: Float[Tensor, "b kv s p"],
    v: Float[Tensor, "b kv s p"],
    starts: int | Int[Tensor, "b"],
    documents: Int[Tensor, "b t"] | None,
) -> Float[Tensor, "b h t p"]:
    """`ops.causal_attention` without gradients; documents come from `number_documents`."""
    tokens = q.shape[2]
    seen = keys_seen(starts, tokens, k.shape[2])
    k, v = k[:, :, :seen], v[:, :, :seen]
    triangle = isinstance(starts, int) and documents is None
    if tokens == 1 and not triangle:
        return one_token(q, k, v, visible_keys(tokens, seen, starts, documents, q.device))
    with sdpa_kernel(_WITHOUT_PLANS):
        if triangle and seen == tokens > 1:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        mask: Tensor | None = None
        if triangle and tokens == 1:
            pass
        elif triangle and q.dtype in (torch.bfloat16, torch.float16):
            # The flash kernel's own mask, which has no float32. Its import would import triton.
            from torch.nn.attention.bias import causal_lower_right

            mask = causal_lower_right(tokens, seen)
        else:
            mask = visible_keys(tokens, seen, starts, documents, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
