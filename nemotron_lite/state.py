"""Everything a sequence remembers, in one object that can be kept, cut back, saved and restored.

A hybrid has three kinds of memory, and they behave differently:

    KV    attention layers      grows by one entry per token; cut back by forgetting a length
    conv  Mamba layers          the last k-1 inputs of the convolution; overwritten all the time
    SSM   Mamba layers          one p x n matrix per head; overwritten at every token

So going back in time is free for attention and impossible for Mamba, unless a copy was made before:
`snapshot` copies conv and SSM and notes the lengths, `rollback` puts them back. Snapshots are small
and of constant size (160 MiB in float32 for Super, at a million tokens as at ten).

Rows of a batch may have different lengths. `model(tokens, state)` advances a state in place.

Source: reference sheet 2.5 and 9.2. Left out: reduced-precision states, and sharing of prefixes.
"""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers import KVCache, MambaMemory, Memory

FORMAT = "nemotron_lite.state.v1"


class Snapshot:
    """A point in a state's past that `State.rollback` can return to. Made by `State.snapshot`."""

    def __init__(self, lengths: list[int], mamba: list[tuple[Tensor, Tensor] | None]) -> None:
        self.lengths = lengths
        self.mamba = mamba

    @property
    def nbytes(self) -> int:
        """Bytes held by the copies of conv and SSM states."""
        return sum(part.nbytes for pair in self.mamba if pair for part in pair)


class State:
    """The memory of `batch` sequences, layer by layer.

    Use `State.empty(config, batch)` for one that has seen nothing.
    """

    def __init__(self, layers: list[Memory], lengths: list[int], device: torch.device) -> None:
        self.layers = layers
        self.device = device
        self._lengths = lengths
        self._snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()

    @classmethod
    def empty(
        cls,
        config: NemotronConfig,
        batch: int,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        capacity: int = 256,
    ) -> State:
        """A state before the first token.

        Args:
            batch: rows.
            dtype: of keys, values and conv inputs. SSM states are float32, or float64 with it.
            capacity: tokens per row to make room for; the KV buffers grow when it is exceeded.

        Raises:
            ValueError: batch or capacity below 1.
        """
        if batch < 1 or capacity < 1:
            raise ValueError(f"batch={batch} and capacity={capacity} must both be at least 1.")
        device = torch.device(device)
        wide = torch.promote_types(dtype, torch.float32)
        heads, p, n = config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size
        keys = (batch, config.num_key_value_heads, capacity, config.head_dim)
        layers: list[Memory] = []
        for kind in config.pattern:
            if kind == "M":
                conv = torch.zeros(
                    batch, config.conv_kernel - 1, config.conv_dim, dtype=dtype, device=device
                )
                ssm = torch.zeros(batch, heads, p, n, dtype=wide, device=device)
                layers.append(MambaMemory(conv, ssm))
            elif kind == "*":
                k, v = (torch.zeros(keys, dtype=dtype, device=device) for _ in range(2))
                layers.append(KVCache(k, v))
            else:
                layers.append(None)
        return cls(layers, [0] * batch, device)

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self._lengths)

    @property
    def lengths(self) -> Int[Tensor, "b"]:
        """Tokens seen by each row."""
        return torch.tensor(self._lengths, dtype=torch.int64)

    @property
    def starts(self) -> int | Int[Tensor, "b"]:
        """Position of the next token: one number when all rows agree, else one per row."""
        first = self._lengths[0]
        if all(length == first for length in self._lengths):
            return first
        return self.lengths.to(self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, KV counted at capacity."""
        return sum(part.nbytes for memory in self.layers if memory for part in _parts(memory))

    def advance(self, tokens: int | Int[Tensor, "b"]) -> None:
        """Count tokens that every layer has taken in."""
        new = [tokens] * self.batch if isinstance(tokens, int) else tokens.tolist()
        self._lengths = [old + n for old, n in zip(self._lengths, new, strict=True)]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` per row in the KV buffers, so that they need not grow later."""
        for memory in self.layers:
            if isinstance(memory, KVCache):
                memory.reserve(tokens)

    def snapshot(self) -> Snapshot:
        """Copy what would be overwritten (conv, SSM), and note the lengths."""
        copies = [
            (memory.conv.clone(), memory.ssm.clone()) if isinstance(memory, MambaMemory) else None
            for memory in self.layers
        ]
        taken = Snapshot(list(self._lengths), copies)
        self._snapshots.add(taken)
        return taken

    def rollback(self, snapshot: Snapshot) -> None:
        """Return to a snapshot of this state. It stays valid; later ones do not.

        Raises:
            ValueError: the snapshot belongs to another state, or to a past that an earlier rollback
                has already undone (its keys and values may be overwritten).
        """
        if snapshot not in self._snapshots:
            raise ValueError(
                "this snapshot is not in the past of this state: it was taken from another state, "
                "or a rollback to an earlier snapshot has undone it. Take a new one."
            )
        for memory, copies in zip(self.layers, snapshot.mamba, strict=True):
            if isinstance(memory, MambaMemory):
                assert copies is not None
                memory.conv, memory.ssm = copies[0].clone(), copies[1].clone()
        self._lengths = list(snapshot.lengths)
        undone = [
            other
            for other in self._snapshots
            if any(a > b for a, b in zip(other.lengths, snapshot.lengths, strict=True))
        ]
        for other in undone:
            self._snapshots.discard(other)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, only the valid part of KV. Atomic: all or nothing."""
        path = Path(path)
        longest = max(max(self._lengths), 1)
        tensors = {}
        for i, memory in enumerate(self.layers):
            if isinstance(memory, MambaMemory):
                tensors[f"{i}.conv"] = memory.conv.contiguous()
                tensors[f"{i}.ssm"] = memory.ssm.contiguous()
            elif isinstance(memory, KVCache):
                tensors[f"{i}.k"] = memory.k[:, :, :longest].contiguous()
                tensors[f"{i}.v"] = memory.v[:, :, :longest].contiguous()
        metadata = {
            "format": FORMAT,
            "layers": str(len(self.layers)),
            "lengths": json.dumps(self._lengths),
        }
        temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary, metadata=metadata)
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> State:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, or is not a state.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no state file at {path}.")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(f"{path} cannot be read as a safetensors file: {error}.") from error
        if metadata.get("format") != FORMAT:
            found = metadata.get("format")
            raise ValueError(f"{path} is not a saved state: format {found!r}, not {FORMAT!r}.")
        layers: list[Memory] = []
        for i in range(int(metadata["layers"])):
            if f"{i}.ssm" in tensors:
                layers.append(MambaMemory(tensors[f"{i}.conv"], tensors[f"{i}.ssm"]))
            elif f"{i}.k" in tensors:
                layers.append(KVCache(tensors[f"{i}.k"], tensors[f"{i}.v"]))
            else:
                layers.append(None)
        return cls(layers, json.loads(metadata["lengths"]), torch.device(device))


def _parts(memory: KVCache | MambaMemory) -> tuple[Tensor, Tensor]:
    return (memory.k, memory.v) if isinstance(memory, KVCache) else (memory.conv, memory.ssm)
