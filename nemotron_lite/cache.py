"""The cache: everything a sequence remembers, in one object that can be copied, saved and loaded.

A hybrid model has three kinds of cache, and they behave differently:

    KV    attention layers      grows by one entry per token; entries can be dropped from its end
    conv  Mamba layers          the last k-1 inputs of the convolution; overwritten at every token
    SSM   Mamba layers          one p x n matrix per head; overwritten at every token

So dropping the last tokens costs nothing in attention layers and is impossible in Mamba layers,
unless something was kept. Speculative decoding needs it all the time: it reads a draft of several
tokens and then accepts only the first few. It goes like this:

    out = model(draft, cache, draft=True)    logits for all tokens; the cache is not advanced
    cache.accept(counts)                     take in the first `counts` tokens of each row

Keys and values are written after a row's last token, so `accept` only raises the row's length. The
inputs of the convolution are a slice of those before and in the draft. The SSM state is computed
from the old one. x, dt and B of every token of the draft are kept, and `accept` adds those of the
first c tokens:

    S' = exp(s_c) S + sum_{r <= c} exp(s_c - s_r) dt_r x_r (outer) B_r       (ops/draft_scan.py)

with s_r the sum of dt A over the first r tokens of the draft.

With states in float32 or float64, the result equals, up to rounding, a cache that never saw the
rejected tokens. States in float16 are close to those of such a cache, but they may be rounded with
other random bits: each write takes the next seed, and the accepted tokens are written at once and
not one by one. After `accept(0)` a cache of any dtype continues exactly as if it had not read the
draft.

The other way would be a copy of the state after every token. x, dt and B of one token are a
hundredth of a state (37 KB against 4 MiB per layer of Super), and the draft is read as one small
chunk instead of token by token. The tests compare with such copies.

To continue from one point in several ways, copy the cache: `cache.clone()`.

Rows of a batch may have different lengths. `model(tokens, cache)` advances a cache in place. The
MTP module has an attention layer with keys and values of its own. They are in `mtp` and have
lengths of their own, since the module runs ahead of the backbone while it drafts
(generation/speculative/drafter.py).

SSM states are float32. `ssm_dtype=torch.float16` halves them: every write is then stochastically
rounded (ops/stochastic_rounding.py). The random bits follow from `ssm_seed`, the layer, the number
of the write and the row. So a run can be repeated, and a copy or a loaded file continues exactly as
the original would.

Source: reference sheet 2.5, 5.5, 6.7 and 9.2. Left out: reduced-precision keys and values, and
sharing of prefixes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemotron_lite.config import NemotronConfig
from nemotron_lite.files import atomic_file
from nemotron_lite.layers import MIXERS, CacheOptions, LayerCache

FORMAT = "nemotron_lite.cache.v4"


class Cache:
    """The cache of `batch` sequences, layer by layer.

    Use `Cache.empty(config, batch)`, or `model.empty_cache(batch)`, for one that has read nothing.

    Attributes:
        pattern: of the backbone's layers, one letter per layer as in the config.
        layers: of the backbone, one entry per layer; None for layers that remember nothing.
        mtp_pattern, mtp: the same for the MTP module; empty in a cache without it.
        draft_length: tokens per row of a draft that waits for `accept`; 0 when there is none.
        checked_for: config and dtype of the model that this cache was last found to fit
            (input_checks.py).
    """

    def __init__(
        self,
        pattern: str,
        layers: list[LayerCache | None],
        lengths: list[int],
        device: torch.device,
        mtp_pattern: str = "",
        mtp: list[LayerCache | None] | None = None,
        mtp_lengths: list[int] | None = None,
    ) -> None:
        self.pattern = pattern
        self.layers = layers
        self.device = device
        self.mtp_pattern = mtp_pattern
        self.mtp = mtp or []
        self.draft_length = 0
        self.checked_for: tuple[NemotronConfig, torch.dtype] | None = None
        self._lengths = lengths
        self._mtp_lengths = mtp_lengths or [0] * len(lengths)

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
        """A cache before the first token.

        Args:
            batch: rows.
            dtype: of keys, values and conv inputs.
            capacity: tokens per row to allocate at first; the KV buffers grow when it is exceeded.
            mtp: allocate the MTP module's keys and values too.
            ssm_dtype: of SSM states; float16 halves them. None is float32, or float64 with `dtype`.
            ssm_seed: of the stochastic rounding of float16 states; None rounds to nearest, whose
                errors add up.

        Raises:
            ValueError: batch or capacity below 1, another `ssm_dtype`, a seed out of range.
        """
        if batch < 1 or capacity < 1:
            raise ValueError(f"batch={batch} and capacity={capacity} must both be at least 1.")
        device = torch.device(device)
        wide = torch.promote_types(dtype, torch.float32)
        if ssm_dtype not in (None, wide, torch.float16):
            raise ValueError(
                f"ssm_dtype={ssm_dtype} for a model in {dtype}: expected torch.float16 or {wide} "
                f"(None means {wide}). Other formats keep too few digits of a running sum."
            )
        if ssm_dtype == torch.float16 and ssm_seed is not None and not 0 <= ssm_seed < 2**63:
            raise ValueError(f"ssm_seed={ssm_seed}: expected 0 to 2^63 - 1, or None.")
        options = CacheOptions(batch, capacity, dtype, ssm_dtype or wide, ssm_seed, device)
        mtp_pattern = config.mtp_pattern if mtp else ""
        layers = [
            MIXERS[kind].empty_cache(config, i, options)
            for i, kind in enumerate(config.pattern + mtp_pattern)
        ]
        count = config.num_layers
        return cls(config.pattern, layers[:count], [0] * batch, device, mtp_pattern, layers[count:])

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self._lengths)

    @property
    def lengths(self) -> Int[Tensor, "b"]:
        """Tokens read by each row."""
        return torch.tensor(self._lengths, dtype=torch.int64)

    @property
    def starts(self) -> int | Int[Tensor, "b"]:
        """Position of the next token: one number when all rows agree, else one per row."""
        return _as_starts(self._lengths, self.device)

    @property
    def mtp_lengths(self) -> Int[Tensor, "b"]:
        """Entries of each row in the MTP module's own cache."""
        return torch.tensor(self._mtp_lengths, dtype=torch.int64)

    @property
    def mtp_starts(self) -> int | Int[Tensor, "b"]:
        """Position of the next entry there: one number when all rows agree, else one per row."""
        return _as_starts(self._mtp_lengths, self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, KV counted at capacity, without what a waiting draft adds."""
        return sum(cache.nbytes for cache in self._present())

    @property
    def draft_nbytes(self) -> int:
        """Bytes kept for a waiting draft, beside the keys and values it wrote."""
        return sum(cache.draft_nbytes for cache in self._present())

    def _present(self) -> list[LayerCache]:
        return [cache for cache in [*self.layers, *self.mtp] if cache is not None]

    def advance(self, tokens: int | Int[Tensor, "b"]) -> None:
        """Count tokens that every layer of the backbone has taken in."""
        self._lengths = [
            n + more for n, more in zip(self._lengths, self._per_row(tokens), strict=True)
        ]

    def advance_mtp(self, tokens: int | Int[Tensor, "b"]) -> None:
        """Count entries of the MTP module."""
        self._mtp_lengths = [
            n + more for n, more in zip(self._mtp_lengths, self._per_row(tokens), strict=True)
        ]

    def truncate_mtp(self, lengths: Int[Tensor, "b"]) -> None:
        """Drop the MTP module's entries beyond `lengths`.

        Raises:
            ValueError: a row has fewer entries.
        """
        new = lengths.tolist()
        if any(n < 0 or n > have for n, have in zip(new, self._mtp_lengths, strict=True)):
            raise ValueError(
                f"MTP entries {self._mtp_lengths} cannot be cut back to {new}: expected at most as "
                "many in each row as there are."
            )
        self._mtp_lengths = new

    def accept(self, counts: int | Int[Tensor, "b"]) -> None:
        """Take in the first `counts` tokens of the waiting draft and drop the others.

        Args:
            counts: 0 to the draft's length, for all rows or row by row. 0 for all rows drops the
                draft: the cache continues exactly as if it had not read it.

        Raises:
            ValueError: no draft is waiting, or counts that are no integers or out of range.
        """
        if isinstance(counts, Tensor):
            inexact = counts.is_floating_point() or counts.is_complex()
            whole = counts.dim() == 1 and not inexact and counts.dtype != torch.bool
        else:
            whole = type(counts) is int
        if not whole:
            raise ValueError(
                f"counts={counts!r}: expected an int, or a tensor of integers with one per row."
            )
        each = self._per_row(counts)
        if not self.draft_length:
            raise ValueError("no draft is waiting: call model(tokens, cache, draft=True) first.")
        if min(each) < 0 or max(each) > self.draft_length:
            raise ValueError(
                f"counts {each}: expected 0 to {self.draft_length}, the tokens of the draft."
            )
        same = each[0] if len(set(each)) == 1 else torch.tensor(each)
        for cache in self.layers:
            if cache is not None:
                cache.accept(same)
        self.advance(same)
        self.draft_length = 0

    def _per_row(self, tokens: int | Tensor) -> list[int]:
        each = [tokens] * self.batch if isinstance(tokens, int) else tokens.tolist()
        if len(each) != self.batch:
            raise ValueError(
                f"{len(each)} counts, but a cache of {self.batch} rows: give one count per row, or "
                "one number for all."
            )
        return each

    def reserve(self, tokens: int) -> None:
        """Allocate KV buffers for `tokens` per row, so that they need not grow later."""
        for cache in self._present():
            cache.reserve(tokens)

    def clone(self) -> Cache:
        """An independent copy that continues exactly as this cache would.

        It costs as many bytes as the cache has (`nbytes`), so it grows with the context.

        Raises:
            ValueError: a draft is waiting.
        """
        self._refuse_draft()
        layers, mtp = (
            [None if cache is None else cache.clone() for cache in caches]
            for caches in (self.layers, self.mtp)
        )
        copy = Cache(
            self.pattern,
            layers,
            list(self._lengths),
            self.device,
            self.mtp_pattern,
            mtp,
            list(self._mtp_lengths),
        )
        copy.checked_for = self.checked_for
        return copy

    def _refuse_draft(self) -> None:
        if self.draft_length:
            raise ValueError(
                f"a draft of {self.draft_length} tokens is waiting: call accept(counts) first "
                "(accept(0) drops it)."
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, with the valid part of KV only. Atomic: all or nothing.

        Raises:
            ValueError: a draft is waiting.
        """
        self._refuse_draft()
        tensors: dict[str, Tensor] = {}
        extras: dict[str, Any] = {}
        for prefix, caches, lengths in (
            ("", self.layers, self._lengths),
            ("mtp.", self.mtp, self._mtp_lengths),
        ):
            longest = max(max(lengths), 1)
            for i, cache in enumerate(caches):
                if cache is None:
                    continue
                for name, tensor in cache.saved_tensors(longest).items():
                    tensors[f"{prefix}{i}.{name}"] = tensor
                extra = cache.saved_extra()
                if extra is not None:
                    extras[f"{prefix}{i}"] = extra
        metadata = {
            "format": FORMAT,
            "patterns": json.dumps([self.pattern, self.mtp_pattern]),
            "lengths": json.dumps([self._lengths, self._mtp_lengths]),
            "extras": json.dumps(extras),
        }
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> Cache:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: `path` does not exist.
            ValueError: the file is damaged, or is not a saved cache.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no cache file at {path}.")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(f"{path} cannot be read as a safetensors file: {error}.") from error
        if metadata.get("format") != FORMAT:
            found = metadata.get("format")
            raise ValueError(
                f"{path} is not a saved cache: its format is {found!r}, expected {FORMAT!r}. Give "
                "a file that Cache.save wrote."
            )
        try:
            extras = json.loads(metadata["extras"])
            pattern, mtp_pattern = json.loads(metadata["patterns"])
            lengths, mtp_lengths = json.loads(metadata["lengths"])

            def layer_cache(kind: str, name: str) -> LayerCache | None:
                layer_class = MIXERS[kind].CACHE
                if layer_class is None:
                    return None
                mine = {part: tensors[f"{name}.{part}"] for part in layer_class.TENSORS}
                return layer_class.from_saved(mine, extras.get(name))

            layers = [layer_cache(kind, f"{i}") for i, kind in enumerate(pattern)]
            mtp = [layer_cache(kind, f"mtp.{i}") for i, kind in enumerate(mtp_pattern)]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a saved cache: its metadata or tensors are incomplete or damaged "
                f"({type(error).__name__}: {error}). Give a file that Cache.save wrote."
            ) from error
        device = torch.device(device)
        return cls(pattern, layers, lengths, device, mtp_pattern, mtp, mtp_lengths)


def _as_starts(lengths: list[int], device: torch.device) -> int | Tensor:
    first = lengths[0]
    # Counted, not compared one by one: for `length == first` TorchInductor (torch 2.13) writes code
    # that reads a variable which it never sets.
    if lengths.count(first) == len(lengths):
        return first
    return torch.tensor(lengths, dtype=torch.int64, device=device)
