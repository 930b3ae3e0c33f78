"""The tensors of a GGUF file: their names, shapes and number formats, and how each one is made.

    ours                                    in the file
    A_log                                   ssm_a, -exp(A_log), [h, 1]
    D                                       ssm_d, [h, 1]
    conv1d.weight, [c, 1, k]                ssm_conv1d.weight, [c, k]
    mixer.norm.weight, [h*p]                ssm_norm.weight, [g, h*p/g]
    experts.up_proj, [e, f, l]              ffn_up_exps.weight, the same
    fc1_latent_proj, fc2_latent_proj        ffn_latent_down, ffn_latent_up
    mtp.layers.0 and mtp.layers.1           one block behind the others

(shapes as PyTorch has them; a GGUF file lists the axes in reverse). All other tensors keep their
values and shapes. Where the model has no bias of the convolution, zeros are written, because
llama.cpp adds one always. Of the other biases it has those of attention and of dense layers.

Matrices have the number format that is asked for, or their own. What is no matrix (norms, biases,
A, D), the convolution and the router are float32 in every file: llama.cpp computes with them in
float32, and the router's scores decide between experts.

**NVFP4.** A packed weight keeps its codes and scales; only their order in memory changes. A block
has 64 numbers: four scales (E4M3, without sign), then four times eight bytes. Byte i of sixteen
numbers holds numbers i and i + 8, where ModelOpt's holds 2i and 2i + 1. The scale of the whole
tensor is a tensor of its own beside it (`….scale`), with one number for each expert.

Source: `gguf`'s table of names; llama.cpp's loader; `gguf.quants.NVFP4`. Left out: formats that
round anew (Q8_0, Q4_K, ...), which llama.cpp's own quantizer makes from a file in float32 or BF16;
the scales that a calibration stored for inputs and for the cache, which nothing here computes with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nemotron_lite.checkpoint.errors import count_and_names
from nemotron_lite.checkpoint.model_tree import ModelTree
from nemotron_lite.config import NemotronConfig
from nemotron_lite.quantization.nvfp4.e2m1 import pack_codes, unpack_codes
from nemotron_lite.quantization.packed_layers import PackedWeight

FORMATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
NVFP4 = "NVFP4"
NVFP4_BLOCK = 64  # numbers in one block of the file
NVFP4_BYTES = 36  # of a block: 4 scales and 32 bytes of codes

# The name of each tensor of a layer in `gguf.MODEL_TENSOR`, and what follows it in the file.
_NORM = {"norm.weight": ("ATTN_NORM", ".weight")}
_ATTENTION = {
    f"mixer.{name}_proj.{leaf}": (f"ATTN_{kind}", f".{leaf}")
    for name, kind in (("q", "Q"), ("k", "K"), ("v", "V"), ("o", "OUT"))
    for leaf in ("weight", "bias")
}
_MAMBA = {
    "mixer.in_proj.weight": ("SSM_IN", ".weight"),
    "mixer.conv1d.weight": ("SSM_CONV1D", ".weight"),
    "mixer.conv1d.bias": ("SSM_CONV1D", ".bias"),
    "mixer.dt_bias": ("SSM_DT", ".bias"),
    "mixer.A_log": ("SSM_A", ""),
    "mixer.D": ("SSM_D", ""),
    "mixer.norm.weight": ("SSM_NORM", ".weight"),
    "mixer.out_proj.weight": ("SSM_OUT", ".weight"),
}
_EXPERTS = {
    "mixer.gate.weight": ("FFN_GATE_INP", ".weight"),
    "mixer.gate.e_score_correction_bias": ("FFN_EXP_PROBS_B", ".bias"),
    "mixer.experts.up_proj": ("FFN_UP_EXP", ".weight"),
    "mixer.experts.down_proj": ("FFN_DOWN_EXP", ".weight"),
    "mixer.fc1_latent_proj.weight": ("MOE_LATENT_DOWN", ".weight"),
    "mixer.fc2_latent_proj.weight": ("MOE_LATENT_UP", ".weight"),
    "mixer.shared_experts.up_proj.weight": ("FFN_UP_SHEXP", ".weight"),
    "mixer.shared_experts.down_proj.weight": ("FFN_DOWN_SHEXP", ".weight"),
}
_MLP = {
    f"mixer.{name}_proj.{leaf}": (f"FFN_{name.upper()}", f".{leaf}")
    for name in ("up", "down")
    for leaf in ("weight", "bias")
}
_OF_KIND = {"M": _NORM | _MAMBA, "*": _NORM | _ATTENTION, "E": _NORM | _EXPERTS, "-": _NORM | _MLP}
_MTP_ATTENTION = _NORM | _ATTENTION | {
    "enorm.weight": ("NEXTN_ENORM", ".weight"),
    "hnorm.weight": ("NEXTN_HNORM", ".weight"),
    "eh_proj.weight": ("NEXTN_EH_PROJ", ".weight"),
}  # fmt: skip
_MTP_EXPERTS = _EXPERTS | {
    "norm.weight": ("ATTN_POST_NORM", ".weight"),
    "final_layernorm.weight": ("NEXTN_SHARED_HEAD_NORM", ".weight"),
}
_OUTSIDE = {
    "backbone.embeddings.weight": ("TOKEN_EMBD", ".weight"),
    "backbone.norm_f.weight": ("OUTPUT_NORM", ".weight"),
    "lm_head.weight": ("OUTPUT", ".weight"),
}
_FLOAT32 = ("FFN_GATE_INP", "SSM_CONV1D")  # beside everything that is no matrix
# llama.cpp multiplies by these matrices without the scale of a whole tensor. It has one for the MTP
# module, but refuses the file where it does not load that module.
_WITHOUT_SCALE = ("TOKEN_EMBD", "MOE_LATENT_DOWN", "MOE_LATENT_UP", "FFN_GATE_INP")


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: in the file.
        source: the name of ours that it is made from.
        shape: in PyTorch's order; for NVFP4 that of the numbers.
        format: "F32", "BF16", "F16" or "NVFP4".
        make: gives the numbers; for NVFP4 the bytes.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    format: str
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        count = math.prod(self.shape)
        if self.format == NVFP4:
            return count // NVFP4_BLOCK * NVFP4_BYTES
        return count * (4 if self.format == "F32" else 2)

    def array(self) -> np.ndarray:
        """The numbers as the file holds them; BF16 as uint16, NVFP4 as bytes.

        Raises:
            OverflowError: a number that float16 cannot hold.
        """
        values = self.make().detach().cpu()
        if self.format == "BF16":
            return values.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
        if self.format == "F16":
            narrow = values.to(torch.float16)
            if bool((narrow.isinf() & values.isfinite()).any()):
                largest = float(values[values.isfinite()].abs().max())
                raise OverflowError(
                    f"{self.source} has the number {largest:g}, and float16 ends at 65,504: take "
                    "bfloat16 or float32"
                )
            return narrow.contiguous().numpy()
        if self.format == NVFP4:
            return values.contiguous().numpy()
        return values.to(torch.float32).contiguous().numpy()


def plan(
    tree: ModelTree, names: Callable[[str, int | None], str], mtp: bool, dtype: torch.dtype | None,
    unpack: bool,
) -> tuple[list[Entry], list[str]]:  # fmt: skip
    """All tensors of the file in their order, and what cannot be written, one sentence a reason.

    Args:
        names: gives the name in the file for a name in `gguf.MODEL_TENSOR` and a block number.
        mtp: write the MTP module too.
        dtype: of matrices; None keeps that of each. Packed NVFP4 weights stay packed.
        unpack: decode packed weights that the file cannot hold; else they are problems.
    """
    # A stack of experts is a parameter of its module, where a linear layer has a `weight`.
    packed = {
        name if len(each.shape) == 3 else f"{name}.weight": each
        for name, each in tree.packed.items()
    }
    config = tree.model.config
    entries: list[Entry] = []
    refused = []
    for ours, (kind, suffix), block in _sources(config, mtp):
        stem = names(kind, block)
        if (weight := packed.get(ours)) is not None:
            if _fits_nvfp4(weight, kind) and not ours.startswith("mtp."):
                entries += _nvfp4_entries(stem, ours, weight)
            elif unpack:
                narrow = _narrow(dtype or tree.model.dtype)
                make = partial(_decode, weight, narrow)
                entries.append(Entry(f"{stem}{suffix}", ours, weight.shape, FORMATS[narrow], make))
            else:
                refused.append(f"{ours} ({weight.format}, {list(weight.shape)})")
        elif (value := tree.tensors.get(ours)) is not None:
            entries.append(_plain_entry(f"{stem}{suffix}", ours, kind, value, config, dtype))
        elif ours.endswith("conv1d.bias"):
            make = partial(torch.zeros, config.conv_dim)
            entries.append(Entry(f"{stem}{suffix}", ours, (config.conv_dim,), "F32", make))
    problems = []
    if refused:
        problems.append(
            f"{count_and_names(refused, 'packed weight')}: a GGUF file holds NVFP4 only, in rows "
            f"of a multiple of {NVFP4_BLOCK} numbers, and not for the MTP module, embedding, "
            "router and latent projections. Decode these with unpack=True (--unpack), or load the "
            "model with packed=False"
        )
    return entries, problems


def _sources(
    config: NemotronConfig, mtp: bool
) -> Iterator[tuple[str, tuple[str, str], int | None]]:
    """The names of ours in the order of the file, what they are there, and the block."""
    for name, target in _OUTSIDE.items():
        yield name, target, None
    for index, kind in enumerate(config.pattern):
        for name, target in _OF_KIND[kind].items():
            yield f"backbone.layers.{index}.{name}", target, index
    if mtp and config.mtp_pattern:
        for index, table in enumerate((_MTP_ATTENTION, _MTP_EXPERTS)):
            for name, target in table.items():
                yield f"mtp.layers.{index}.{name}", target, config.num_layers


def _narrow(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else dtype


def _plain_entry(
    name: str, ours: str, kind: str, value: Tensor, config: NemotronConfig,
    dtype: torch.dtype | None,
) -> Entry:  # fmt: skip
    """The tensor of the file that is made from a plain tensor of ours."""
    if kind == "SSM_A":
        return Entry(
            name, ours, (*value.shape, 1), "F32", lambda: -torch.exp(_wide(value)).unsqueeze(1)
        )
    shapes = {
        "SSM_D": (*value.shape, 1),
        "SSM_NORM": (config.n_groups, value.numel() // config.n_groups),
        "SSM_CONV1D": tuple(value.shape[::2]),  # without the axis of one in the middle
    }
    shape = shapes.get(kind, tuple(value.shape))
    wide = value.ndim < 2 or kind in _FLOAT32
    format = "F32" if wide else FORMATS[_narrow(dtype or value.dtype)]
    return Entry(name, ours, shape, format, lambda: value.reshape(shape))


def _wide(value: Tensor) -> Tensor:
    """float32, or float64 where it already is: A is computed like this in the layer too."""
    value = value.detach()
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def _decode(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The numbers of a packed weight; a stack is decoded matrix by matrix."""
    if len(weight.shape) == 2:
        return weight.decode(dtype)
    made = torch.empty(weight.shape, dtype=dtype)
    for expert in range(weight.shape[0]):
        made[expert] = weight.decode(dtype, expert)
    return made


def _fits_nvfp4(weight: PackedWeight, kind: str) -> bool:
    return (
        weight.format == "nvfp4"
        and weight.shape[-1] % NVFP4_BLOCK == 0
        and kind not in _WITHOUT_SCALE
    )


def _nvfp4_entries(stem: str, ours: str, weight: PackedWeight) -> list[Entry]:
    scale = weight.weight_scale_2
    count = weight.shape[0] if len(weight.shape) == 3 else 1
    return [
        Entry(f"{stem}.weight", ours, weight.shape, NVFP4, partial(nvfp4_bytes, weight)),
        Entry(f"{stem}.scale", ours, (count,), "F32", lambda: scale.reshape(count)),
    ]


def nvfp4_bytes(weight: PackedWeight) -> Tensor:
    """The bytes of a packed weight `*stack out in` in GGUF's order, `*stack out in/64*36`.

    One matrix is converted after the other, so that the codes of one expert are unpacked at a time.
    """
    *stack, rows, cols = weight.shape
    blocks = cols // NVFP4_BLOCK
    codes = weight.weight.detach().reshape(-1, rows, cols // 2)
    scales = weight.weight_scale.detach().view(torch.uint8).reshape(-1, rows, blocks, 4)
    made = torch.empty(len(codes), rows, blocks, NVFP4_BYTES, dtype=torch.uint8)
    for number in range(len(codes)):
        halves = unpack_codes(codes[number].cpu()).view(rows, blocks, 4, 2, 8)
        pairs = pack_codes(halves.transpose(-1, -2).flatten(-2))  # numbers i and i + 8 in a byte
        made[number, ..., :4] = scales[number].cpu()
        made[number, ..., 4:] = pairs.flatten(-2)
    return made.view(*stack, rows, blocks * NVFP4_BYTES)
