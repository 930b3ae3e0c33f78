"""Everything a sequence remembers, in one object that can be kept, cut back, saved and restored.

A hybrid has three kinds of memory, and they behave differently:

    KV    attention layers      grows by one entry per token; cut back by forgetting a length
    conv  Mamba layers          the last k-1 inputs of the convolution; overwritten all the time
    SSM   Mamba layers          one p x n matrix per head; overwritten at every token

So going back in time is free for attention and impossible for Mamba, unless something was kept. Two
ways of going back, for two purposes:

- To a point chosen beforehand. `snapshot` copies conv and SSM and notes the lengths, `rollback`
  puts them back. A snapshot has constant size (160 MiB in float32 for Super, at a million tokens as
  at ten).

- To any token of a draft. `model(draft, state, hold=...)` answers for all its tokens but leaves the
  state where it was, and `keep(counts)` then takes in the first `counts` of them, row by row: keys
  and values were written behind the length and are cut by it, the inputs of the convolution are a
  window into those that were kept, and the SSM state comes from

      "snapshots"   a copy of the state after every token of the draft; `keep` picks one
      "replay"      x, dt and B of every token; `keep` adds the accepted ones to the old state

  Both equal a state that never saw the rejected tokens. Replay is the default: x, dt and B of one
  token are a hundredth of a state (37 KB against 4 MiB per layer of Super), and the draft is read
  as one small chunk, where snapshots go step by step. benchmarks/model/speculation.py measures
  both: for `lite` and drafts of four, 0.24 against 4.9 MB, and 1.5 against 1.9 plain steps of time.

Rows of a batch may have different lengths. `model(tokens, state)` advances a state in place. The
MTP module has an attention layer with keys and values of its own; they live in `mtp`, with lengths
of their own, since the module runs ahead of the backbone while it drafts (speculative/drafting.py).

SSM states are float32. `ssm_dtype=torch.float16` halves them: every write is then rounded by chance
(ops/stochastic_rounding.py), with bits from `ssm_seed`, the layer and the number of the write.
So a run can be repeated, a snapshot has the same future again, and a saved state goes on as if it
had not been saved. Rows have dice of their own, by their place in the batch.

Source: reference sheet 2.5, 5.5, 6.7 and 9.2. Left out: reduced-precision keys and values, and
sharing of prefixes.
"""

from __future__ import annotations

import json
import os
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemotron_lite import ops
from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers import KVCache, LayerCache, MambaCache

FORMAT = "nemotron_lite.cache.v3"
HOLDS = ("replay", "snapshots")


class Snapshot:
    """A point in a state's past that `Cache.rollback` can return to. Made by `Cache.snapshot`."""

    def __init__(
        self,
        lengths: list[int],
        mtp_lengths: list[int],
        mamba: list[MambaCache | None],
    ) -> None:
        self.lengths, self.mtp_lengths = lengths, mtp_lengths
        self.mamba = mamba

    @property
    def nbytes(self) -> int:
        """Bytes held by the copies of conv and SSM states."""
        return sum(part.nbytes for memory in self.mamba if memory for part in _parts(memory))


class Cache:
    """The memory of `batch` sequences, layer by layer.

    Use `Cache.empty(config, batch)` for one that has seen nothing.

    Attributes:
        layers: of the backbone, one entry per layer; None for layers that remember nothing.
        mtp: the same for the MTP module; empty where no room was made for it.
        held: tokens per row of a draft that waits for `keep`; 0 when there is none.
        fits: config and dtype of the model that this state was last found to fit (`arguments`).
    """

    def __init__(
        self,
        layers: list[LayerCache],
        lengths: list[int],
        device: torch.device,
        mtp: list[LayerCache] | None = None,
        mtp_lengths: list[int] | None = None,
    ) -> None:
        self.layers = layers
        self.device = device
        self.mtp = mtp or []
        self.held = 0
        self.fits: tuple[NemotronConfig, torch.dtype] | None = None  # the model it is known to fit
        self._lengths = lengths
        self._mtp_lengths = mtp_lengths or [0] * len(lengths)
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
        mtp: bool = False,
        ssm_dtype: torch.dtype | None = None,
        ssm_seed: int | None = 0,
    ) -> Cache:
        """A state before the first token.

        Args:
            batch: rows.
            dtype: of keys, values and conv inputs.
            capacity: tokens per row to make room for; the KV buffers grow when it is exceeded.
            mtp: make room for the MTP module's keys and values too.
            ssm_dtype: of SSM states; float16 halves them. None is float32, or float64 with `dtype`.
            ssm_seed: of the rounding of states in float16; None rounds to nearest, which drifts.

        Raises:
            ValueError: batch or capacity below 1, another `ssm_dtype`, a seed out of range.
        """
        if batch < 1 or capacity < 1:
            raise ValueError(f"batch={batch} and capacity={capacity} must both be at least 1.")
        device = torch.device(device)
        wide = torch.promote_types(dtype, torch.float32)
        if ssm_dtype not in (None, wide, torch.float16):
            raise ValueError(
                f"ssm_dtype={ssm_dtype} for a model in {dtype}: expected torch.float16 or {wide}, "
                "which None stands for. Other formats keep too few digits of a running sum."
            )
        half = ssm_dtype == torch.float16
        if half and ssm_seed is not None and not 0 <= ssm_seed < 2**63:
            raise ValueError(f"ssm_seed={ssm_seed}: expected 0 to 2^63 - 1, or None.")
        heads, p, n = config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size
        keys = (batch, config.num_key_value_heads, capacity, config.head_dim)

        def memory(place: int, kind: str) -> LayerCache:
            if kind == "M":
                conv = torch.zeros(
                    batch, config.conv_kernel - 1, config.conv_dim, dtype=dtype, device=device
                )
                ssm = torch.zeros(batch, heads, p, n, dtype=ssm_dtype or wide, device=device)
                return MambaCache(conv, ssm, ops.RoundingSeeds(ssm_seed, place) if half else None)
            if kind == "*":
                k, v = (torch.zeros(keys, dtype=dtype, device=device) for _ in range(2))
                return KVCache(k, v)
            return None

        layers = [memory(i, kind) for i, kind in enumerate(config.pattern)]
        behind = enumerate(config.mtp_pattern, len(layers))
        ahead = [memory(i, kind) for i, kind in behind] if mtp else []
        return cls(layers, [0] * batch, device, ahead)

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
        return _as_starts(self._lengths, self.device)

    @property
    def mtp_lengths(self) -> Int[Tensor, "b"]:
        """Entries of each row in the MTP module's own memory."""
        return torch.tensor(self._mtp_lengths, dtype=torch.int64)

    @property
    def mtp_starts(self) -> int | Int[Tensor, "b"]:
        """Place of the next entry there: one number when all rows agree, else one per row."""
        return _as_starts(self._mtp_lengths, self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, KV counted at capacity, without what a held draft adds."""
        memories = [*self.layers, *self.mtp]
        return sum(part.nbytes for memory in memories if memory for part in _parts(memory))

    @property
    def held_nbytes(self) -> int:
        """Bytes kept for a held draft, beside the keys and values it wrote."""
        mambas = [memory for memory in self.layers if isinstance(memory, MambaCache)]
        return sum(memory.held.nbytes for memory in mambas if memory.held is not None)

    def advance(self, tokens: int | Int[Tensor, "b"]) -> None:
        """Count tokens that every layer of the backbone has taken in."""
        self._lengths = [
            n + more for n, more in zip(self._lengths, self._each(tokens), strict=True)
        ]

    def advance_mtp(self, tokens: int | Int[Tensor, "b"]) -> None:
        """Count entries of the MTP module."""
        self._mtp_lengths = [
            n + more for n, more in zip(self._mtp_lengths, self._each(tokens), strict=True)
        ]

    def cut_mtp(self, lengths: Int[Tensor, "b"]) -> None:
        """Forget the MTP module's entries beyond `lengths`; there must be as many in each row.

        Raises:
            ValueError: a row has fewer.
        """
        new = lengths.tolist()
        if any(n < 0 or n > have for n, have in zip(new, self._mtp_lengths, strict=True)):
            raise ValueError(f"MTP entries {self._mtp_lengths} cannot be cut back to {new}.")
        self._mtp_lengths = new

    def keep(self, counts: int | Int[Tensor, "b"]) -> None:
        """Take in the first `counts` tokens of the draft that `hold` left, and forget the others.

        Args:
            counts: 0 to the draft's length, for all rows or row by row.

        Raises:
            ValueError: no draft is held, or counts out of range.
        """
        each = self._each(counts)
        if not self.held:
            raise ValueError("no draft is held: call model(tokens, state, hold='replay') first.")
        if min(each) < 0 or max(each) > self.held:
            raise ValueError(f"counts {each}: expected 0 to {self.held}, the tokens held.")
        same = each[0] if len(set(each)) == 1 else torch.tensor(each)
        for memory in self.layers:
            if isinstance(memory, MambaCache):
                memory.keep(same)
        self.advance(same)
        self.held = 0

    def _each(self, tokens: int | Tensor) -> list[int]:
        each = [tokens] * self.batch if isinstance(tokens, int) else tokens.tolist()
        if len(each) != self.batch:
            raise ValueError(f"{len(each)} counts, but a cache of {self.batch} rows.")
        return each

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` per row in the KV buffers, so that they need not grow later."""
        for memory in [*self.layers, *self.mtp]:
            if isinstance(memory, KVCache):
                memory.reserve(tokens)

    def snapshot(self) -> Snapshot:
        """Copy what would be overwritten (conv, SSM), and note the lengths.

        Raises:
            ValueError: a draft is held, so what the state is has not been settled.
        """
        if self.held:
            raise ValueError(f"a draft of {self.held} tokens is held: call keep(counts) first.")
        copies = [m.clone() if isinstance(m, MambaCache) else None for m in self.layers]
        taken = Snapshot(list(self._lengths), list(self._mtp_lengths), copies)
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
        for place, copy in enumerate(snapshot.mamba):
            if copy is not None:
                self.layers[place] = copy.clone()
        self.held = 0
        self._lengths = list(snapshot.lengths)
        self._mtp_lengths = list(snapshot.mtp_lengths)
        undone = [
            other
            for other in self._snapshots
            if any(a > b for a, b in zip(other.lengths, snapshot.lengths, strict=True))
        ]
        for other in undone:
            self._snapshots.discard(other)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, only the valid part of KV. Atomic: all or nothing.

        Raises:
            ValueError: a draft is held.
        """
        if self.held:
            raise ValueError(f"a draft of {self.held} tokens is held: call keep(counts) first.")
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        dithers: dict[str, Any] = {}
        for prefix, memories, lengths in (
            ("", self.layers, self._lengths), ("mtp.", self.mtp, self._mtp_lengths),
        ):  # fmt: skip
            longest = max(max(lengths), 1)
            for i, memory in enumerate(memories):
                if isinstance(memory, MambaCache):
                    tensors[f"{prefix}{i}.conv"] = memory.conv.contiguous()
                    tensors[f"{prefix}{i}.ssm"] = memory.ssm.contiguous()
                    if memory.dither is not None:
                        dithers[f"{prefix}{i}"] = asdict(memory.dither)
                elif isinstance(memory, KVCache):
                    tensors[f"{prefix}{i}.k"] = memory.k[:, :, :longest].contiguous()
                    tensors[f"{prefix}{i}.v"] = memory.v[:, :, :longest].contiguous()
        metadata = {
            "format": FORMAT,
            "layers": json.dumps([len(self.layers), len(self.mtp)]),
            "lengths": json.dumps([self._lengths, self._mtp_lengths]),
            "dithers": json.dumps(dithers),
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
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> Cache:
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

        dithers = json.loads(metadata["dithers"])

        def memory(name: str) -> LayerCache:
            if f"{name}.ssm" in tensors:
                dither = ops.RoundingSeeds(**dithers[name]) if name in dithers else None
                return MambaCache(tensors[f"{name}.conv"], tensors[f"{name}.ssm"], dither)
            if f"{name}.k" in tensors:
                return KVCache(tensors[f"{name}.k"], tensors[f"{name}.v"])
            return None

        count, ahead = json.loads(metadata["layers"])
        lengths, mtp_lengths = json.loads(metadata["lengths"])
        layers, mtp = (
            [memory(f"{i}") for i in range(count)],
            [memory(f"mtp.{i}") for i in range(ahead)],
        )
        return cls(layers, lengths, torch.device(device), mtp, mtp_lengths)


def _as_starts(lengths: list[int], device: torch.device) -> int | Tensor:
    first = lengths[0]
    if all(length == first for length in lengths):
        return first
    return torch.tensor(lengths, dtype=torch.int64, device=device)


def _parts(memory: KVCache | MambaCache) -> tuple[Tensor, Tensor]:
    return (memory.k, memory.v) if isinstance(memory, KVCache) else (memory.conv, memory.ssm)
