"""PyTorch implementations of the state-space operator by others, with one signature.

    call(x, dt, A, B, C, chunk) -> y        without D, which two of them do not have

- transformers: the chunked scan of its NemotronH, the only peer that is installed.
- mamba_ssm, "ssd_minimal": listing 1 of the Mamba-2 paper.
- mamba_ssm, "chunk_scan_ref": the reference that its Triton kernels are tested against.
- fla, "naive_chunk_simple_gla": gated linear attention with one gate per head, the same recurrence.

The last three need checkouts of the peers' repositories, given by `--peers DIR`; this project has
no copy of their code. Their packages import GPU kernels, so the functions are read from their files
unchanged and compiled alone.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

Peer = Callable[..., Tensor]

MAMBA = "mamba/mamba_ssm"
FLA = "flash-linear-attention/fla"


def find_peers(checkouts: Path | None) -> dict[str, Peer]:
    """Every available peer, by name.

    Args:
        checkouts: a folder with clones of state-spaces/mamba as `mamba` and of
            fla-org/flash-linear-attention as `flash-linear-attention`; without it the only peer
            is transformers.

    Raises:
        FileNotFoundError: a file is missing from the checkouts.
    """
    peers: dict[str, Peer] = {"transformers": _transformers}
    if checkouts is not None:
        peers["mamba_ssm ssd_minimal"] = _ssd_minimal(checkouts)
        peers["mamba_ssm chunk_scan_ref"] = _chunk_scan_ref(checkouts)
        peers["fla naive_chunk_simple_gla"] = _simple_gla(checkouts)
    return peers


def _transformers(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    # It always computes the last state; returning it costs nothing.
    y, _ = mamba2_chunk_scan(x, dt, A, B, C, chunk_size=chunk, return_final_states=True)
    return y


def _ssd_minimal(checkouts: Path) -> Peer:
    names = ("segsum", "ssd_minimal_discrete")
    scan = _functions(checkouts / MAMBA / "modules/ssd_minimal.py", names)["ssd_minimal_discrete"]

    def call(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
        shared = x.shape[2] // B.shape[2]
        B, C = (v.repeat_interleave(shared, dim=2) for v in (B, C))
        y, _ = scan(x * dt.unsqueeze(-1), A * dt, B, C, chunk)
        return y

    return call


def _chunk_scan_ref(checkouts: Path) -> Peer:
    folder = checkouts / MAMBA / "ops/triton"
    known: dict[str, Any] = {}
    for file, name in (
        ("ssd_chunk_state.py", "chunk_state_ref"),
        ("ssd_state_passing.py", "state_passing_ref"),
        ("ssd_chunk_scan.py", "chunk_scan_ref"),
        ("ssd_combined.py", "ssd_chunk_scan_combined_ref"),
    ):
        known |= _functions(folder / file, (name,), known)
    scan = known["ssd_chunk_scan_combined_ref"]
    return lambda x, dt, A, B, C, chunk: scan(x, dt, A, B, C, chunk)


def _simple_gla(checkouts: Path) -> Peer:
    name = "naive_chunk_simple_gla"
    scan = _functions(checkouts / FLA / "ops/simple_gla/naive.py", (name,))[name]

    def call(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
        shared = x.shape[2] // B.shape[2]
        B, C = (v.repeat_interleave(shared, dim=2) for v in (B, C))
        y, _ = scan(
            C,
            B,
            x * dt.unsqueeze(-1),
            dt * A,
            output_final_state=True,
            chunk_size=chunk,
            scale=1.0,
        )
        return y

    return call


def _functions(
    file: Path, names: tuple[str, ...], known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Compile the named functions of a file, without the rest of the file.

    Args:
        known: functions of other files that they call.
    """
    wanted: list[ast.stmt] = [
        node
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    if len(wanted) != len(names):
        raise FileNotFoundError(
            f"{file} does not define all of {names}: use a version of the peer that does."
        )
    space: dict[str, Any] = {"torch": torch, "F": F, "rearrange": rearrange, "repeat": repeat}
    space |= known or {}
    exec(compile(ast.Module(wanted, type_ignores=[]), str(file), "exec"), space)
    return {name: space[name] for name in names}
