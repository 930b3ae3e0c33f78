"""Checks of chapter 03's exercises.

Each check isolates one mistake: one query that sees every key depends on the scale and not on the
mask; with as many key heads as query heads the result depends on the mask and not on the sharing.
So a failure names the hint about the actual mistake. Expected values come from the package
(`ops.selective_scan`, `layers.Attention`, `ledger.cache`) or from PyTorch's
`scaled_dot_product_attention`. Inputs come from torch's global generator, which the grader seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_lite import ledger, ops
from nemotron_lite.config import NemotronConfig
from nemotron_lite.course.exercises import close, gradients, keeps_inputs, strided
from nemotron_lite.layers import Attention

Answer = Callable[..., Any]


def _random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


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
    key, value = _random(1, 3), _random(1, 5)
    got = answer(key, value, key)
    close(got, (key @ key.T) * value, what="one pair, read with its own key", dtype=True)


def memory_adds(answer: Answer) -> None:
    keys, values, queries = _random(4, 3), _random(4, 5), _random(2, 3)
    expected = _outer_memory(keys, values, queries)
    got = keeps_inputs(answer, keys, values, queries, what="outer_memory")
    close(got, expected, what="four pairs in one state")


def memory_decays(answer: Answer) -> None:
    keys, values, queries = _random(4, 3), _random(4, 4), _random(2, 3)
    expected = _outer_memory(keys, values, queries, 0.5)
    close(answer(keys, values, queries, 0.5), expected, what="four pairs with keep=0.5")


def memory_gradients(answer: Answer) -> None:
    def ours(keys: Tensor, values: Tensor, queries: Tensor) -> Any:
        return answer(keys, values, queries, 0.9)

    def package(keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        return _outer_memory(keys, values, queries, 0.9)

    gradients(ours, package, (_random(3, 2), strided(_random(3, 4)), _random(2, 2)))


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _qkv(b: int, h: int, m: int, t: int, s: int, p: int) -> tuple[Tensor, Tensor, Tensor]:
    return _random(b, h, t, p), _random(b, m, s, p), _random(b, m, s, p)


def _causal(t: int, s: int) -> Tensor:
    """The mask of the t newest of s tokens."""
    return torch.ones(t, s, dtype=torch.bool).tril(s - t)


def attention_one_query(answer: Answer) -> None:
    # A query that sees every key does not depend on the mask, one key head not on the sharing.
    q, k, v = _qkv(2, 2, 2, 1, 6, 16)
    q = 3 * q
    everything = torch.ones(1, 6, dtype=torch.bool)
    got, expected = answer(q, k, v, everything), _attention(q, k, v, everything)
    close(got, expected, what="one query that sees six keys", dtype=True)


def attention_masks(answer: Answer) -> None:
    q, k, v = _qkv(1, 2, 2, 7, 7, 4)
    mask = _causal(7, 7)
    close(answer(q, k, v, mask), _attention(q, k, v, mask), what="seven tokens, causal")
    q, mask = q[:, :, :3], _causal(3, 7)
    close(answer(q, k, v, mask), _attention(q, k, v, mask), what="three queries behind four keys")


def attention_shares(answer: Answer) -> None:
    for h, m in ((4, 2), (6, 2), (4, 1)):
        q, k, v = _qkv(2, h, m, 5, 5, 4)
        mask = _causal(5, 5)
        expected = _attention(q, k, v, mask)
        close(answer(q, k, v, mask), expected, what=f"{h} query heads on {m} key heads")


def attention_gradients(answer: Answer) -> None:
    gradients(answer, _attention, (*_qkv(1, 4, 2, 4, 4, 3), _causal(4, 4)))


def attention_strided(answer: Answer) -> None:
    # Heads as a layer makes them: split off the last axis, then moved forward.
    q, k, v = (_random(2, 5, h, 8).transpose(1, 2) for h in (4, 2, 2))
    mask = _causal(5, 5)
    got = keeps_inputs(answer, q, k, v, mask, what="grouped_attention")
    close(got, _attention(q, k, v, mask), what="heads that are views of a wider tensor")


def blocks_one(answer: Answer) -> None:
    q, k, v = _qkv(2, 3, 3, 4, 6, 8)
    mask = _causal(4, 6)
    got = answer(q, k, v, mask, 6)
    close(got, _attention(q, k, v, mask), what="all six keys in one block", dtype=True)


def blocks_ragged(answer: Answer) -> None:
    q, k, v = _qkv(2, 2, 2, 5, 11, 4)
    q, mask = 3 * q, torch.ones(5, 11, dtype=torch.bool)
    expected = _attention(q, k, v, mask)
    for block in (4, 5, 1, 16):
        got = keeps_inputs(answer, q, k, v, mask, block, what="blocked_attention")
        close(got, expected, what=f"eleven keys in blocks of {block}")


def blocks_large(answer: Answer) -> None:
    # The largest score is in the middle, so the maximum of any other block would overflow.
    q, v = torch.ones(1, 1, 2, 4, dtype=torch.float64), _random(1, 1, 6, 4)
    sizes = torch.tensor([1.0, 1.5, 400.0, 401.0, 2.0, 2.5], dtype=torch.float64)
    k = sizes[None, None, :, None].expand(1, 1, 6, 4)
    mask = torch.ones(2, 6, dtype=torch.bool)
    close(answer(q, k, v, mask, 2), _attention(q, k, v, mask), what="scores up to 802")


def blocks_hidden(answer: Answer) -> None:
    # Causal from the first token on: the later blocks are hidden from the first queries.
    q, k, v = _qkv(1, 2, 2, 9, 9, 4)
    mask = _causal(9, 9)
    close(answer(q, k, v, mask, 2), _attention(q, k, v, mask), what="nine tokens, blocks of 2")


def blocks_skipped(answer: Answer) -> None:
    # One softmax over all keys gives the weight 0 here, and 0 times NaN is NaN.
    q, k, v = _qkv(2, 2, 2, 3, 11, 4)
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[:, 4:8] = False
    expected = _attention(q, k, v, mask)
    for buffer in (k, v):
        buffer[:, :, 4:8] = math.nan
    got = answer(q, k, v, mask, 4)
    close(got, expected, what="eleven keys in blocks of 4, the second hidden and full of NaN")


def blocks_gradients(answer: Answer) -> None:
    mask = _causal(3, 5)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return answer(q, k, v, mask, 2)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attention(q, k, v, mask)

    gradients(ours, expected, _qkv(1, 2, 2, 3, 5, 3))


def _appended(cache: Any, k: Tensor, v: Tensor) -> tuple[Any, Any, Any]:
    """What `append` returns, refused in words if it is no triple."""
    got = cache.append(k, v)
    if not isinstance(got, tuple | list) or len(got) != 3:
        raise AssertionError(f"append returned {type(got).__name__}; expected 3 results.")
    keys, values, mask = got
    return keys, values, mask


def _cache(answer: Answer, capacity: int = 12, heads: int = 2, width: int = 3) -> Any:
    return answer(2, heads, width, capacity=capacity, dtype=torch.float64)


def cache_writes(answer: Answer) -> None:
    cache = _cache(answer)
    k, v = _random(2, 2, 7, 3), _random(2, 2, 7, 3)
    for start, end in ((0, 4), (4, 7)):
        keys, values, _ = _appended(cache, k[:, :, start:end], v[:, :, start:end])
        for got, expected, name in ((keys, k, "keys"), (values, v, "values")):
            what = f"the {name} after {end} tokens"
            close(got, expected[:, :, :end], what=what, dtype=True)


def cache_masks(answer: Answer) -> None:
    cache = _cache(answer)
    for before, new in ((0, 3), (3, 1), (4, 5)):
        _, _, mask = _appended(cache, _random(2, 2, new, 3), _random(2, 2, new, 3))
        what = f"the mask of {new} new tokens behind {before}"
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise AssertionError(f"{what} is no bool tensor.")
        close(mask.int(), _causal(new, before + new).int(), what=what)


def cache_grows(answer: Answer) -> None:
    cache = _cache(answer, capacity=4)
    k, v = _random(2, 2, 40, 3), _random(2, 2, 40, 3)
    sizes = []
    for i in range(17):
        keys, values, _ = _appended(cache, k[:, :, i : i + 1], v[:, :, i : i + 1])
        sizes.append((cache.k.shape[2], cache.v.shape[2]))
    close(keys, k[:, :, :17], what="the keys after 17 tokens, from a capacity of 4")
    close(values, v[:, :, :17], what="the values after 17 tokens, from a capacity of 4")
    expected = [4] * 4 + [8] * 4 + [16] * 8 + [32]
    assert sizes == [(n, n) for n in expected], (
        f"the capacity of keys and values, token by token from 4: {sizes}; expected {expected}."
    )
    cache = _cache(answer, capacity=4)
    keys, values, _ = _appended(cache, k, v)
    close(keys, k, what="40 keys at once, into a capacity of 4")
    close(values, v, what="40 values at once, into a capacity of 4")
    assert cache.k.shape[2] == 40, f"a capacity of 4 became {cache.k.shape[2]}; 40 were needed."


def cache_drops(answer: Answer) -> None:
    cache = _cache(answer)
    k, v, draft = (_random(2, 2, 5, 3) for _ in range(3))
    _appended(cache, k[:, :, :3], v[:, :, :3])
    _appended(cache, draft, -draft)
    cache.drop(4)  # one token of the draft was accepted
    keys, values, mask = _appended(cache, k[:, :, 3:], v[:, :, 3:])
    kept = torch.cat([k[:, :, :3], draft[:, :, :1], k[:, :, 3:]], dim=2)
    close(keys, kept, what="the keys after 4 of 5 draft tokens were dropped")
    kept = torch.cat([v[:, :, :3], -draft[:, :, :1], v[:, :, 3:]], dim=2)
    close(values, kept, what="the values after 4 of 5 draft tokens were dropped")
    close(mask.int(), _causal(2, 6).int(), what="the mask after 4 of 5 were dropped")


def cache_pieces(answer: Answer) -> None:
    q, k, v = _qkv(2, 2, 2, 10, 10, 4)
    whole = _attention(q, k, v, _causal(10, 10))
    for sizes in ((7, 3), (1, 1, 5, 3)):
        cache = _cache(answer, capacity=2, width=4)
        at = 0
        for new in sizes:
            piece = slice(at, at + new)
            got = _attention(q[:, :, piece], *_appended(cache, k[:, :, piece], v[:, :, piece]))
            at += new
            what = f"attention in pieces of {sizes}, up to token {at}"
            close(got, whole[:, :, piece], what=what)


LITE = NemotronConfig.from_preset("lite")
SUPER = NemotronConfig.from_preset("super")
ODD = LITE.replace(head_dim=48, num_key_value_heads=4, ssm_state_size=25, mamba_head_dim=20)


def _bytes(answer: Answer, config: NemotronConfig, context: int) -> list[Any]:
    got = answer(config, context)
    if not isinstance(got, tuple | list) or len(got) != 3:
        raise AssertionError(f"memory_bytes returned {got!r:.60}; expected 3 whole numbers.")
    return list(got)


def bytes_kv(answer: Answer) -> None:
    for config, name in ((SUPER, "Super"), (LITE, "lite"), (ODD, "4 key heads of 48")):
        for context in (1000, 2**20):
            expected = ledger.cache(config.replace(pattern="*"), context).kv
            what = f"{name}, {context:,} tokens: bytes of keys and values"
            close(_bytes(answer, config, context)[0], expected, what=what, rtol=0)


def bytes_state(answer: Answer) -> None:
    for config, name in ((SUPER, "Super"), (LITE, "lite"), (ODD, "heads of 20 by 25")):
        expected = ledger.cache(config.replace(pattern="M"), 0).ssm
        for context in (1, 5000):
            what = f"{name}, {context:,} tokens: bytes of the state"
            close(_bytes(answer, config, context)[1], expected, what=what, rtol=0)


def bytes_crossing(answer: Answer) -> None:
    for config, name in ((SUPER, "Super"), (ODD, "a model whose crossing is between two tokens")):
        state = ledger.cache(config.replace(pattern="M"), 0).ssm
        per_token = ledger.cache(config.replace(pattern="*"), 1).kv
        got = _bytes(answer, config, 2**20)[2]
        close(got, -(-state // per_token), what=f"{name}: the crossing", rtol=0)


SMALL = LITE.replace(
    hidden_size=24, num_attention_heads=6, num_key_value_heads=2, head_dim=4, pattern="*"
)
WIDE_HEADS = SMALL.replace(num_attention_heads=4, head_dim=10)


def _package_layer(config: NemotronConfig) -> Attention:
    layer = Attention(config)
    with torch.no_grad():
        layer.init_weights(0.3, 1.0)
    return layer


def _loaded(answer: Answer, config: NemotronConfig) -> tuple[Any, Attention]:
    """The learner's layer and the package's, with the same weights."""
    package, layer = _package_layer(config), answer(config)
    weights = package.state_dict()
    names = {name: list(value.shape) for name, value in layer.state_dict().items()}
    wanted = {name: list(value.shape) for name, value in weights.items()}
    assert names == wanted, f"the layer has the weights {names}; expected {wanted}."
    layer.load_state_dict(weights)
    return layer, package


def layer_parameters(answer: Answer) -> None:
    layer, _ = _loaded(answer, SMALL)
    count = sum(parameter.numel() for parameter in layer.parameters())
    expected = sum(parameter.numel() for parameter in _package_layer(SMALL).parameters())
    assert count == expected, f"the layer has {count} trainable numbers; expected {expected}."


def layer_values(answer: Answer) -> None:
    layer, package = _loaded(answer, SMALL)
    for tokens in (7, 1):
        x = _random(2, tokens, SMALL.hidden_size, dtype=torch.float32)
        expected = package(x).detach()
        got = keeps_inputs(layer, x, what="the layer")
        close(got, expected, what=f"{tokens} tokens, the package's weights", dtype=True)


def layer_wide_heads(answer: Answer) -> None:
    layer, package = _loaded(answer, WIDE_HEADS)
    x = strided(_random(1, 5, WIDE_HEADS.hidden_size, dtype=torch.float32))
    close(layer(x), package(x).detach(), what="4 heads of 10 numbers at a model width of 24")


def layer_gradients(answer: Answer) -> None:
    layer, package = _loaded(answer, SMALL)
    x = _random(1, 4, SMALL.hidden_size, dtype=torch.float32)
    gradients(layer, package, (x,), atol=1e-4)


def layer_cached(answer: Answer) -> None:
    layer, package = _loaded(answer, SMALL)
    x = _random(2, 9, SMALL.hidden_size, dtype=torch.float32)
    whole = package(x).detach()
    for sizes in ((4, 5), (1, 1, 6, 1)):
        cache, at = layer.empty_cache(2), 0
        for new in sizes:
            got = layer(x[:, at : at + new], cache)
            what = f"pieces of {sizes} tokens with a cache, up to token {at + new}"
            close(got, whole[:, at : at + new], what=what)
            at += new
    close(layer(x), whole, what="nine tokens without a cache, after a run with one")


def layer_cache_size(answer: Answer) -> None:
    layer = answer(SMALL)
    cache = layer.empty_cache(3)
    layer(_random(3, 5, SMALL.hidden_size, dtype=torch.float32), cache)
    heads = [cache.k.shape[i] for i in (0, 1, 3)]
    assert heads == [3, 2, 4], (
        f"the cache has rows, heads and width {heads}; expected [3, 2, 4]: a key head is stored "
        "once, not once for each query head that reads it."
    )
    assert cache.length == 5, f"after 5 tokens the cache counts {cache.length}."
    layer.double()
    dtype = layer.empty_cache(1).k.dtype
    assert dtype == torch.float64, f"the cache of a layer with float64 weights is {dtype}."


def _decoded(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    k, v = k[None, :, :length], v[None, :, :length]
    return F.scaled_dot_product_attention(q[None, :, None], k, v, enable_gqa=True)[0, :, 0]


def _decoding(h: int, m: int, rows: int, p: int) -> tuple[Tensor, Tensor, Tensor]:
    k, v = _random(2, m, rows, p, dtype=torch.float32)
    return 3 * _random(h, p, dtype=torch.float32), k, v


def kernel_one_block(answer: Answer) -> None:
    q, k, v = _decoding(2, 2, 8, 4)
    got = keeps_inputs(answer, q, k, v, 8, 8, what="decode_attention")
    close(got, _decoded(q, k, v, 8), what="eight tokens in one block")


def kernel_length(answer: Answer) -> None:
    q, k, v = _decoding(2, 2, 16, 4)
    for buffer in (k, v):
        buffer[:, 5:] = 50.0
    for length in (5, 1):
        got = answer(q, k, v, length, 8)
        close(got, _decoded(q, k, v, length), what=f"{length} tokens in a buffer of 16")


def kernel_blocks(answer: Answer) -> None:
    q, k, v = _decoding(2, 2, 32, 8)
    for length in (32, 19):
        got = answer(q, k, v, length, 8)
        close(got, _decoded(q, k, v, length), what=f"{length} tokens in blocks of 8")
    # The largest score comes in a later block, and far above the first.
    k[:, 20] = 40 * q
    close(answer(q, k, v, 32, 8), _decoded(q, k, v, 32), what="a late key with a large score")


def kernel_shares(answer: Answer) -> None:
    q, k, v = _decoding(6, 2, 8, 4)
    close(answer(q, k, v, 7, 4), _decoded(q, k, v, 7), what="6 query heads on 2 key heads")


def _partial(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def merge_halves(answer: Answer) -> None:
    q, k, v = _random(2, 3, 4), _random(2, 7, 4), _random(2, 7, 4)
    got = keeps_inputs(
        answer,
        *_partial(q, k[:, :2], v[:, :2]),
        *_partial(q, k[:, 2:], v[:, 2:]),
        what="merge_partials",
    )
    close(got, _partial(q, k, v), what="two keys and five keys, combined")


def merge_large(answer: Answer) -> None:
    q, k, v = 900 * torch.ones(1, 2, 1, dtype=torch.float64), _random(1, 6, 1), _random(1, 6, 3)
    k[:, 0], k[:, 3] = 1.0, 1.001
    parts = (*_partial(q, k[:, :3], v[:, :3]), *_partial(q, k[:, 3:], v[:, 3:]))
    close(answer(*parts), _partial(q, k, v), what="scores of about 900")


def merge_empty(answer: Answer) -> None:
    o, size = _random(3, 4), _random(3)
    nothing, none = torch.zeros(3, 4, dtype=torch.float64), torch.full_like(size, -math.inf)
    close(answer(o, size, nothing, none), (o, size), what="an empty second part")
    close(answer(nothing, none, o, size), (o, size), what="an empty first part")
    got = answer(nothing, none, nothing, none)
    close(got, (nothing, none), what="two empty parts")


def merge_gradients(answer: Answer) -> None:
    def expected(o1: Tensor, l1: Tensor, o2: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
        e1, e2 = l1.exp(), l2.exp()
        share = (e1 / (e1 + e2))[..., None]
        return share * o1 + (1 - share) * o2, (e1 + e2).log()

    gradients(answer, expected, (_random(3, 2), _random(3), _random(3, 2), _random(3)))
