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

from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Int, Integer
from torch import Tensor

from nemotron_lite import cache_file
from nemotron_lite.arguments import integer
from nemotron_lite.cache_file import SavedCache
from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers import MIXERS, CacheOptions, LayerCache
from nemotron_lite.layers.mixer import ordinary_tensors

MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Transcript:
    """What `generate` leaves with a cache about the tokens that it has read.

    It is valid as long as the cache has these lengths: `Cache.transcript` is None after a call of
    the model that `generate` does not know about.

    Attributes:
        tokens: all tokens of each row; None for a row whose first tokens were read elsewhere.
        hidden: the model's output before the head at each row's last token, `b d`. With it a row
            can be continued without a new token, and the MTP module makes its entry for the last
            token when the next one is known.
        lengths: of the rows.

    Raises:
        ValueError: the three do not fit together.
    """

    tokens: list[list[int] | None]
    hidden: Tensor
    lengths: list[int]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.lengths):
            raise ValueError(
                f"a transcript of {len(self.tokens)} rows has lengths of {len(self.lengths)}."
            )
        known = [
            n if row is None else len(row) for row, n in zip(self.tokens, self.lengths, strict=True)
        ]
        if known != self.lengths:
            raise ValueError(
                f"a transcript of rows with {known} tokens does not fit the lengths "
                f"{self.lengths}: give all tokens of a row, or None for it."
            )
        if self.hidden.ndim != 2 or len(self.hidden) != len(self.lengths):
            raise ValueError(
                f"hidden has shape {list(self.hidden.shape)}: expected one vector for each of "
                f"{len(self.lengths)} rows."
            )


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
        broken_by: the error that ended `generate` in the middle of a pass, "" if there was none.
            Its layers may then have read different numbers of tokens, and `generate` refuses it.
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
        self.broken_by = ""
        self._transcript: Transcript | None = None
        self._lengths = lengths
        self._mtp_lengths = mtp_lengths or [0] * len(lengths)

    @classmethod
    def empty(
        cls,
        config: NemotronConfig,
        batch: SupportsIndex,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        capacity: SupportsIndex = 256,
        mtp: bool = False,
        ssm_dtype: torch.dtype | None = None,
        ssm_seed: SupportsIndex | None = 0,
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
            TypeError: a batch, capacity or seed that is not an integer.
            ValueError: batch or capacity below 1, another `dtype` or `ssm_dtype`, a seed out of
                range, or an unknown device.
        """
        batch = integer("batch", batch, low=1)
        capacity = integer("capacity", capacity, low=1)
        if ssm_seed is not None:
            ssm_seed = integer("ssm_seed", ssm_seed, low=0, high=2**64 - 1)
        if dtype not in MODEL_DTYPES:
            raise ValueError(
                f"dtype={dtype}: expected that of a model: "
                f"{', '.join(str(known) for known in MODEL_DTYPES)}."
            )
        device = as_device(device)
        wide = torch.promote_types(dtype, torch.float32)
        if ssm_dtype not in (None, wide, torch.float16):
            raise ValueError(
                f"ssm_dtype={ssm_dtype} for a model in {dtype}: expected torch.float16 or {wide} "
                f"(None means {wide}). Other formats keep too few digits of a running sum."
            )
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
        return torch.tensor(self._lengths, dtype=torch.int64, device="cpu")

    @property
    def starts(self) -> int | Int[Tensor, "b"]:
        """Position of the next token: one number when all rows agree, else one per row."""
        return _as_starts(self._lengths, self.device)

    @property
    def transcript(self) -> Transcript | None:
        """What is known about the tokens that were read; None where nothing is."""
        known = self._transcript
        return known if known is not None and known.lengths == self._lengths else None

    @transcript.setter
    def transcript(self, transcript: Transcript | None) -> None:
        self._transcript = transcript

    @property
    def mtp_lengths(self) -> Int[Tensor, "b"]:
        """Entries of each row in the MTP module's own cache."""
        return torch.tensor(self._mtp_lengths, dtype=torch.int64, device="cpu")

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

    def advance(self, tokens: SupportsIndex | Integer[Tensor, "b"]) -> None:
        """Count tokens that every layer of the backbone has taken in."""
        self._lengths = [
            n + more for n, more in zip(self._lengths, self._per_row(tokens), strict=True)
        ]

    def advance_mtp(self, tokens: SupportsIndex | Integer[Tensor, "b"]) -> None:
        """Count entries of the MTP module."""
        self._mtp_lengths = [
            n + more for n, more in zip(self._mtp_lengths, self._per_row(tokens), strict=True)
        ]

    def truncate_mtp(self, lengths: Integer[Tensor, "b"]) -> None:
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

    def accept(self, counts: SupportsIndex | Integer[Tensor, "b"]) -> None:
        """Take in the first `counts` tokens of the waiting draft and drop the others.

        Args:
            counts: 0 to the draft's length, for all rows or row by row. 0 for all rows drops the
                draft: the cache continues exactly as if it had not read it.

        Raises:
            TypeError: counts that are no integers.
            ValueError: no draft is waiting, or counts out of range.
        """
        each = self._per_row(counts)
        if not self.draft_length:
            raise ValueError("no draft is waiting: call model(tokens, cache, draft=True) first.")
        if min(each) < 0 or max(each) > self.draft_length:
            raise ValueError(
                f"counts {each}: expected 0 to {self.draft_length}, the tokens of the draft."
            )
        same = each[0] if len(set(each)) == 1 else torch.tensor(each, device="cpu")
        for cache in self.layers:
            if cache is not None:
                cache.accept(same)
        self.advance(same)
        self.draft_length = 0

    def _per_row(self, tokens: Any) -> list[int]:
        """One count per row, from one integer for all or from a tensor."""
        if type(tokens) is int:
            return [tokens] * self.batch
        if not isinstance(tokens, Tensor) or tokens.ndim == 0:
            return [integer("counts", tokens)] * self.batch
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TypeError(f"counts have dtype {tokens.dtype}: expected integers, one per row.")
        if list(tokens.shape) != [self.batch]:
            raise ValueError(
                f"counts have shape {list(tokens.shape)}, but the cache has {self.batch} rows: "
                "give one count per row, or one number for all."
            )
        each: list[int] = tokens.tolist()
        return each

    def reserve(self, tokens: SupportsIndex) -> None:
        """Allocate KV buffers for `tokens` per row, so that they need not grow later.

        Raises:
            TypeError: not an integer.
            ValueError: below 0.
        """
        tokens = integer("tokens", tokens, low=0)
        for cache in self._present():
            cache.reserve(tokens)

    def clone(self) -> Cache:
        """An independent copy that continues exactly as this cache would.

        It costs as many bytes as the cache has (`nbytes`), so it grows with the context.

        Raises:
            ValueError: a draft is waiting.
        """
        return self.repeat(1)

    def repeat(self, times: int) -> Cache:
        """An independent copy with each row `times` times, side by side: rows 0, 0, 1, 1 for two.

        Raises:
            ValueError: a draft is waiting.
        """
        self.refuse_draft()
        layers, mtp = (
            [
                None if cache is None else cache.clone() if times == 1 else cache.repeat(times)
                for cache in caches
            ]
            for caches in (self.layers, self.mtp)
        )
        copy = Cache(
            self.pattern,
            layers,
            _repeated(self._lengths, times),
            self.device,
            self.mtp_pattern,
            mtp,
            _repeated(self._mtp_lengths, times),
        )
        copy.checked_for, copy.broken_by = self.checked_for, self.broken_by
        known = self.transcript
        if known is not None:
            tokens = [None if row is None else list(row) for row in known.tokens]
            copy.transcript = Transcript(
                _repeated(tokens, times),
                known.hidden.repeat_interleave(times, 0),
                _repeated(known.lengths, times),
            )
        return copy

    def refuse_draft(self) -> None:
        """What cannot be done before `accept` calls this first.

        Raises:
            ValueError: a draft is waiting.
        """
        if self.draft_length:
            raise ValueError(
                f"a draft of {self.draft_length} tokens is waiting in the cache: call "
                "cache.accept(counts) first (accept(0) drops it)."
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, with the valid part of KV only. Atomic: all or nothing.

        The transcript is saved too, so a loaded cache continues with `generate` in every way that
        this one does. The file then holds the text that was read.

        Raises:
            ValueError: a draft is waiting, or a path that is not UTF-8.
        """
        self.refuse_draft()
        if self.broken_by:
            raise ValueError(
                f"this cache cannot be saved: a call ended in the middle ({self.broken_by}), and "
                "its layers may have read different numbers of tokens."
            )
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
        known = None
        if (left := self.transcript) is not None:
            known = [row is not None for row in left.tokens]
            ids = [token for row in left.tokens for token in row or ()]
            tensors[cache_file.TOKENS] = torch.tensor(ids, dtype=torch.int64, device="cpu")
            tensors[cache_file.HIDDEN] = left.hidden.contiguous()
        patterns = (self.pattern, self.mtp_pattern)
        saved = SavedCache(patterns, (self._lengths, self._mtp_lengths), extras, known, tensors)
        cache_file.write(path, saved)

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> Cache:
        """Read what `save` wrote. The whole file is checked first (cache_file.py).

        Raises:
            FileNotFoundError: `path` does not exist.
            ValueError: the file is damaged, or is not a saved cache.
        """
        device = as_device(device)
        saved = cache_file.read(path)

        @ordinary_tensors
        def layer_caches(prefix: str, pattern: str) -> list[LayerCache | None]:
            found: list[LayerCache | None] = []
            for i, kind in enumerate(pattern):
                tensors, extra = saved.layer(f"{prefix}{i}")
                moved = {name: tensor.to(device) for name, tensor in tensors.items()}
                layer_class = MIXERS[kind].CACHE
                found.append(None if layer_class is None else layer_class.from_saved(moved, extra))
            return found

        pattern, mtp_pattern = saved.patterns
        layers, mtp = layer_caches("", pattern), layer_caches("mtp.", mtp_pattern)
        cache = cls(pattern, layers, saved.lengths[0], device, mtp_pattern, mtp, saved.lengths[1])
        if saved.known is not None:
            hidden = saved.tensors[cache_file.HIDDEN].to(device)
            cache.transcript = Transcript(saved.tokens(), hidden, list(saved.lengths[0]))
        return cache

    def __copy__(self) -> Cache:
        """`clone`: two caches with the same buffers would change each other."""
        return self.clone()

    def __getstate__(self) -> dict[str, Any]:
        """All but `checked_for`: a copy is compared with the model at its first call."""
        return {**self.__dict__, "checked_for": None}


def as_device(device: str | torch.device) -> torch.device:
    """A device by its name.

    Raises:
        ValueError: no name of a device.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device={device!r}: expected a device of PyTorch, such as 'cpu', 'cuda' or 'cuda:1'."
        ) from error


def _repeated(values: list[Any], times: int) -> list[Any]:
    return [value for value in values for _ in range(times)]


def _as_starts(lengths: list[int], device: torch.device) -> int | Tensor:
    first = lengths[0]
    # Counted, not compared one by one: for `length == first` TorchInductor (torch 2.13) writes code
    # that reads a variable which it never sets.
    if lengths.count(first) == len(lengths):
        return first
    return torch.tensor(lengths, dtype=torch.int64, device=device)
