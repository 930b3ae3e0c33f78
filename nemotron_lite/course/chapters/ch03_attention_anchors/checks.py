"""Checks of chapter 03's exercises.

Each check isolates one mistake: the last query depends on the scale and not on the mask; with as
many key heads as query heads the result depends on the mask and not on the sharing. So a failure
names the hint about the actual mistake. Expected values come from the package
(`ops.selective_scan`, `ops.causal_attention`, `ledger.cache`), computed from seeded inputs when a
check runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemotron_lite import ops
from nemotron_lite.config import NemotronConfig
from nemotron_lite.course.exercises import close, gradients
from nemotron_lite.ledger import cache

Answer = Callable[..., Any]


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _outer_memory(keys: Tensor, values: Tensor, queries: Tensor, keep: float = 1.0) -> Tensor:
    """The package's scan: decay exp(dt A) = keep, B the keys, x the values, C the queries."""
    pairs, asked = len(keys), len(queries)
    zeros = keys.new_zeros(asked, values.shape[1])
    x = torch.cat([values, zeros])[None, :, None]
    B = torch.cat([keys, queries])[None, :, None]
    dt = torch.cat([keys.new_ones(pairs), keys.new_zeros(asked)])[None, :, None]
    A = keys.new_tensor([keep]).log()
    y, _ = ops.selective_scan(x, dt, A, B, B)
    return y[0, pairs:, 0]


def memory_one_pair(answer: Answer) -> None:
    key, value = _random(1, 3, seed=0), _random(1, 5, seed=1)
    got = answer(key, value, key)
    close(got, (key @ key.T) * value, what="one pair, asked with its own key")


def memory_adds(answer: Answer) -> None:
    keys, values, queries = _random(4, 3, seed=2), _random(4, 5, seed=3), _random(2, 3, seed=4)
    expected = _outer_memory(keys, values, queries)
    close(answer(keys, values, queries), expected, what="four pairs in one state")


def memory_fades(answer: Answer) -> None:
    keys, values, queries = _random(4, 3, seed=5), _random(4, 4, seed=6), _random(2, 3, seed=7)
    expected = _outer_memory(keys, values, queries, 0.5)
    close(answer(keys, values, queries, 0.5), expected, what="four pairs with keep=0.5")


def memory_gradients(answer: Answer) -> None:
    inputs = (
        _random(3, 2, seed=8),
        _random(3, 4, seed=9).mT.contiguous().mT,
        _random(2, 2, seed=1),
    )
    gradients(
        lambda k, v, q: answer(k, v, q, 0.9), lambda k, v, q: _outer_memory(k, v, q, 0.9), inputs
    )


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.causal_attention(q, k, v, impl="naive")


def _qkv(b: int, h: int, kv: int, t: int, p: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _random(b, h, t, p, seed=seed),
        _random(b, kv, t, p, seed=seed + 1),
        _random(b, kv, t, p, seed=seed + 2),
    )


def attention_last_query(answer: Answer) -> None:
    # The last query sees every key, so a wrong mask does not change its answer.
    q, k, v = _qkv(2, 2, 2, 6, 16, seed=0)
    q = 3 * q
    got, expected = answer(q, k, v), _attention(q, k, v)
    assert got.shape == expected.shape, f"the shape is {list(got.shape)}, not {list(q.shape)}"
    close(got[:, :, -1], expected[:, :, -1], what="the last query, which sees every key")


def attention_is_causal(answer: Answer) -> None:
    q, k, v = _qkv(1, 2, 2, 7, 4, seed=3)
    close(answer(q, k, v), _attention(q, k, v), what="all queries, a key head for each query head")
    first = answer(q[:, :, :1], k[:, :, :1], v[:, :, :1])
    close(first, v[:, :, :1], what="a single token, which can only see itself")


def attention_shares(answer: Answer) -> None:
    for h, kv in ((4, 2), (6, 2), (4, 1)):
        q, k, v = _qkv(2, h, kv, 5, 4, seed=h + kv)
        close(answer(q, k, v), _attention(q, k, v), what=f"{h} query heads on {kv} key heads")


def attention_gradients(answer: Answer) -> None:
    gradients(answer, _attention, _qkv(1, 4, 2, 4, 3, seed=20))


def attention_strided(answer: Answer) -> None:
    # Heads as a layer makes them: split off the last axis, then moved forward.
    q, k, v = (_random(2, 5, h, 8, seed=h).transpose(1, 2) for h in (4, 2, 1))
    v = v.expand(-1, 2, -1, -1)
    close(answer(q, k, v), _attention(q, k, v), what="heads that are views of a wider tensor")


def _buffers(b: int, kv: int, s: int, p: int) -> tuple[Tensor, Tensor]:
    """Buffers whose unused slots hold old values of a rejected draft."""
    stale = torch.full((b, kv, s, p), 50.0, dtype=torch.float64)
    return stale, -stale


def cache_writes(answer: Answer) -> None:
    buffer_k, buffer_v = _buffers(2, 2, 12, 3)
    k, v = _random(2, 2, 7, 3, seed=0), _random(2, 2, 7, 3, seed=1)
    buffer_k[:, :, :4], buffer_v[:, :, :4] = k[:, :, :4], v[:, :, :4]
    keys, values, _ = answer(buffer_k, buffer_v, 4, k[:, :, 4:], v[:, :, 4:])
    for got, expected, name in ((keys, k, "keys"), (values, v, "values")):
        assert got.shape == expected.shape, (
            f"{name}: {got.shape[2]} are returned, for 4 cached and 3 new tokens"
        )
        close(got, expected, what=f"{name}: 4 cached, then 3 new")


def cache_masks(answer: Answer) -> None:
    for used, t in ((0, 3), (4, 3), (4, 1)):
        k = _random(1, 1, t, 2, seed=used)
        _, _, mask = answer(*_buffers(1, 1, 9, 2), used, k, k)
        assert mask.dtype == torch.bool, f"the mask is {mask.dtype}, not bool"
        assert list(mask.shape) == [t, used + t], (
            f"the mask is {list(mask.shape)}, not {[t, used + t]} (new tokens, all tokens)"
        )
        expected = torch.ones(t, used + t, dtype=torch.bool).tril(used)
        close(mask.double(), expected.double(), what=f"mask of {t} new tokens after {used}")


def cache_chunks(answer: Answer) -> None:
    q, k, v = _qkv(2, 4, 2, 9, 4, seed=5)
    expected = _attention(q, k, v)
    buffers = _buffers(2, 2, 11, 4)
    used, parts = 0, []
    for t in (4, 1, 3, 1):
        new = slice(used, used + t)
        keys, values, mask = answer(*buffers, used, k[:, :, new], v[:, :, new])
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q[:, :, new], keys, values, attn_mask=mask, enable_gqa=True
            )
        )
        used += t
    close(torch.cat(parts, 2), expected, what="a prompt in pieces of 4, 1, 3 and 1 tokens")


_CONFIGS = {name: NemotronConfig.from_preset(name) for name in ("super", "nano", "tiny-super")}


def bytes_kv(answer: Answer) -> None:
    for name, config in _CONFIGS.items():
        kv, _ = answer(config, 1000)
        expected = cache(config, 1000).kv
        assert kv == expected, f"{name}, keys and values of 1,000 tokens: {kv:,}, not {expected:,}"


def bytes_state(answer: Answer) -> None:
    for name, config in _CONFIGS.items():
        _, state = answer(config, 1000)
        found = cache(config, 1000)
        expected = found.conv + found.ssm
        assert state == expected, f"{name}, state of the Mamba layers: {state:,}, not {expected:,}"


def bytes_growth(answer: Answer) -> None:
    config = _CONFIGS["super"]
    (short, state), (long, later) = answer(config, 0), answer(config, 2**20)
    assert short == 0, f"with no tokens the keys and values take {short:,} bytes; expected 0"
    assert state == later, f"the state grows from {state:,} to {later:,} bytes"
    assert long == cache(config, 2**20).kv, f"at 1,048,576 tokens: {long:,} bytes"
