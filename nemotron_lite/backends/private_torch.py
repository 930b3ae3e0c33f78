"""Every private operator of PyTorch that we call, each with a public fallback.

PyTorch may rename or remove a private operator in any release. Each one is called in this file
only, and only if it exists; otherwise the public form beside it computes the same numbers, slower.
The CPU's name is read here too, because no public function of Python or PyTorch tells it on every
system.

    operator                                          what it gives                  fallback
    aten._scaled_dot_product_flash_attention_for_cpu  log-denominators as well       logsumexp
    mkldnn._linear_pointwise                          x W^T by oneDNN, any strides   F.linear
    mkldnn._reorder_linear_weight                     W in oneDNN's own layout       W itself
    _functorch.peek_interpreter_stack                 whether vmap runs this code    "no"

The flags `HAS_...` are read at every call, so that a test can switch an operator off. `HAS_ONEDNN`
says whether this PyTorch has the library at all.

Source: PyTorch's `native_functions.yaml` and `mkldnn/Linear.cpp`, version 2.10.
"""

from __future__ import annotations

import math
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

HAS_FLASH = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
HAS_ONEDNN = torch.backends.mkldnn.is_available()
HAS_ONEDNN_LINEAR = HAS_ONEDNN and hasattr(torch.ops.mkldnn, "_linear_pointwise")
HAS_ONEDNN_REORDER = HAS_ONEDNN_LINEAR and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
HAS_INTERPRETERS = hasattr(torch._C._functorch, "peek_interpreter_stack")
CPUINFO = Path("/proc/cpuinfo")  # Linux only


def attention_with_log(
    q: Float[Tensor, "b h t p"],
    k: Float[Tensor, "b h s p"],
    v: Float[Tensor, "b h s p"],
    *,
    is_causal: bool = False,
) -> tuple[Float[Tensor, "b h t p"], Float[Tensor, "b h t"]]:
    """Attention, and the logarithm of each softmax's denominator, on the CPU without gradients.

    Two results over different keys can be joined when their denominators are known; the public
    `scaled_dot_product_attention` does not return them.
    """
    if HAS_FLASH:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(q, k, v, is_causal=is_causal)
    scores = (q.float() @ k.float().mT) / math.sqrt(q.shape[-1])
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(later, -math.inf)
    log = scores.logsumexp(-1)
    weights = torch.exp(scores - log.unsqueeze(-1))
    return (weights @ v.float()).to(q.dtype), log


def onednn_linear(
    x: Float[Tensor, "*rows i"], weight: Float[Tensor, "o i"]
) -> Float[Tensor, "*rows o"]:
    """x W^T by oneDNN, without gradients; `weight` may come from `onednn_reorder`."""
    if HAS_ONEDNN_LINEAR:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    with torch.no_grad(), torch.autocast("cpu", enabled=False):  # as the operator, which ignores it
        return F.linear(x, weight)


def onednn_reorder(weight: Float[Tensor, "o i"]) -> Tensor:
    """A copy of a matrix in the layout that oneDNN reads fastest; only `onednn_linear` reads it."""
    weight = weight.detach()
    if HAS_ONEDNN_REORDER:
        return torch.ops.mkldnn._reorder_linear_weight(weight, 4)
    return weight


def inside_transform() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, jvp) is running this code."""
    if torch.compiler.is_compiling():  # a compiler cannot look, and refuses transforms itself
        return False
    return HAS_INTERPRETERS and torch._C._functorch.peek_interpreter_stack() is not None


def pass_to_export(kind: type) -> None:
    """Let `torch.export` give objects of a class to a model as they are, without looking inside.

    Otherwise it refuses them itself, and the model cannot say what to do instead.
    """
    torch.utils._pytree.register_pytree_node(
        kind,
        lambda thing: ([], thing),
        lambda leaves, thing: thing,
        flatten_with_keys_fn=lambda thing: ([], thing),
    )


def cpu_name() -> str:
    """The CPU's name and stepping as the system tells them; empty where nothing tells."""
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
    if CPUINFO.is_file():
        lines = [line.split(":", 1) for line in CPUINFO.read_text().splitlines() if ":" in line]
        found = {name.strip(): value.strip() for name, value in reversed(lines)}  # the first CPU's
        return " | ".join(found[name] for name in wanted if name in found)
    return platform.processor()


def has_bf16_instructions() -> bool:
    """Whether the CPU has instructions for products of BF16 matrices, as PyTorch sees it."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return HAS_ONEDNN and any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)
