"""Exercises of chapter 03: from a sum of outer products to an attention layer with its cache.

    03.outer_memory             pairs in one matrix, which is what a state holds
    03.grouped_attention        attention in which query heads share key heads
    03.blocked_attention        the same with a running softmax, block by block
    03.kv_cache                 a class: keys and values of the past, and the mask behind them
    03.memory_bytes             a cache and a state in bytes, and where they cross
    03.grouped_query_attention  a class: the layer, with the package's parameter names
    03.decode_kernel            optional: one query over a cache, in Triton
    03.merge_partials           stretch: one softmax from two halves of a cache

The checks are in `checks.py`; the mistakes that they have to catch are in
`tests/course/chapters/ch03_attention_anchors/mutants.py`.
"""

from __future__ import annotations

from nemotron_lite.course.chapters.ch03_attention_anchors import checks
from nemotron_lite.course.exercises import Check, Exercise

OUTER_MEMORY = Exercise(
    id="03.outer_memory",
    title="A memory of outer products",
    objective="O1: explain what a state of fixed size stores.",
    minutes=8,
    difficulty=2,
    points=4,
    task="""
Store pairs in one matrix and read them again, as a Mamba head does: `keys` are its B, `values` its
x, `queries` its C, and `keep` is the decay of one step.

Start with a state of zeros, `p n`. For each pair, in order, first multiply the state by `keep`,
then add the outer product of value and key. After the last pair, each answer is the product of
state and query.
""".strip(),
    stub='''
def outer_memory(keys, values, queries, keep=1.0):
    """Write pairs into one matrix, then read it with each query.

    Args:
        keys: float tensor `pairs n`.
        values: float tensor `pairs p`.
        queries: float tensor `questions n`.
        keep: what is left of the state after one step, above 0 and at most 1.

    Returns:
        The answers, `questions p`.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def outer_memory(keys, values, queries, keep=1.0):
    state = values.new_zeros(values.shape[1], keys.shape[1])
    for key, value in zip(keys, values):
        state = keep * state + torch.outer(value, key)
    return queries @ state.T
""",
    hints=(
        "Begin with one pair. `torch.outer(value, key)` is a `p n` matrix. Its product with a "
        "query is the value, times the dot product of key and query. There is no division and no "
        "softmax.",
        "The state is one matrix for all pairs: add each outer product to what is there already.",
        "Look at the order inside a step: `state = keep * state + torch.outer(value, key)`. The "
        "newest pair has not decayed. Use torch operations only, so that gradients flow.",
    ),
    checks=(
        Check("one pair comes back", checks.memory_one_pair, hint=1, points=1),
        Check("pairs add up in one state", checks.memory_adds, hint=2, points=1),
        Check("older pairs decay, the newest does not", checks.memory_decays, hint=3, points=1),
        Check("gradients", checks.memory_gradients, hint=3, points=1),
    ),
)


GROUPED_ATTENTION = Exercise(
    id="03.grouped_attention",
    title="Attention with shared key heads",
    objective="O2: write attention in which query heads share key heads.",
    minutes=12,
    difficulty=3,
    points=5,
    task=r"""
Write attention with matrix products and a softmax. The scale is $1/\sqrt p$. `mask` is True where
a query may look, at one key at least. Query head $i$ reads key head $\lfloor i\,m/h \rfloor$: with
4 query heads on 2 key heads the order is 0 0 1 1.
""".strip(),
    stub='''
def grouped_attention(q, k, v, mask):
    """Attention with shared key heads.

    Args:
        q: float tensor `b h t p`.
        k, v: float tensors `b m s p`; m divides h.
        mask: bool tensor `t s`, True where a query may look.

    Returns:
        Float tensor `b h t p`.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def grouped_attention(q, k, v, mask):
    shared = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(shared, dim=1)
    v = v.repeat_interleave(shared, dim=1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
""",
    hints=(
        "Scores are `q @ k.transpose(-1, -2)`, divided by the square root of p, the size of the "
        "last axis. The softmax is over keys, which is the last axis of the scores.",
        "Set the scores to -inf where `mask` is False, before the softmax. `masked_fill` fills "
        "where its argument is True, so give it `~mask`.",
        "Neighbours share a key head. `repeat_interleave` gives 0 0 1 1. `repeat` gives 0 1 0 1: "
        "it trains as well, but it is another model than the one whose weights you load.",
    ),
    checks=(
        Check("one query that sees all keys", checks.attention_one_query, hint=1, points=1),
        Check("the mask", checks.attention_masks, hint=2, points=1),
        Check("query heads share key heads in order", checks.attention_shares, hint=3, points=1),
        Check("gradients", checks.attention_gradients, hint=3, points=1),
        Check("strided heads, inputs unchanged", checks.attention_strided, hint=3, points=1),
    ),
)


BLOCKED_ATTENTION = Exercise(
    id="03.blocked_attention",
    title="A softmax in blocks",
    objective="O2: write attention in blocks, with a running softmax.",
    minutes=20,
    difficulty=4,
    points=6,
    task=r"""
Read `block` keys at a time, and keep three tensors for each query: the largest score so far, `top`;
the sum of the weights $\exp(\text{score} - \text{top})$, `total`; and the sum of weights times
values, `mixed`. When `top` changes, multiply the old `total` and `mixed` by
$\exp(\text{old top} - \text{new top})$, then add those of the block. At the end divide.

Here every query head has its own key head, and each query may look at a key of the first block. The
last block may be shorter. Scores can be large: $\exp(800)$ overflows. Skip a block that the mask
hides from all queries: it may hold anything, even NaN.
""".strip(),
    stub='''
def blocked_attention(q, k, v, mask, block):
    """Attention with a running softmax.

    Args:
        q: float tensor `b h t p`.
        k, v: float tensors `b h s p`.
        mask: bool tensor `t s`, True where a query may look.
        block: keys that are read at a time.

    Returns:
        Float tensor `b h t p`.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def blocked_attention(q, k, v, mask, block):
    top = q.new_full((*q.shape[:3], 1), -math.inf)
    total, mixed = torch.zeros_like(top), torch.zeros_like(q)
    for start in range(0, k.shape[2], block):
        seen = mask[:, start : start + block]
        if not seen.any():
            continue
        keys, values = k[:, :, start : start + block], v[:, :, start : start + block]
        scores = q @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~seen, -math.inf)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights = (scores - new_top).exp()
        rescale = (top - new_top).exp()
        total = rescale * total + weights.sum(-1, keepdim=True)
        mixed = rescale * mixed + weights @ values
        top = new_top
    return mixed / total
""",
    hints=(
        "Start with `top` at -inf, `total` and `mixed` at zero; `top` and `total` have shape "
        "`b h t 1`. `range(0, s, block)` gives the starts of all blocks, the short one included. "
        "Where `mask[:, start : start + block]` is True nowhere, go on with the next block: even a "
        "weight of 0 times NaN is NaN.",
        "Inside a block: `new_top = torch.maximum(top, scores.amax(-1, keepdim=True))`, and the "
        "weights are `(scores - new_top).exp()`. The maximum is the running one, so the exponent "
        "is never above 0.",
        "`rescale = (top - new_top).exp()` multiplies `total` and `mixed` before the block is "
        "added. Keep `new_top` for the next block. Divide once, after the loop.",
    ),
    checks=(
        Check("one block that holds all keys", checks.blocks_one, hint=1, points=1),
        Check("blocks of any size", checks.blocks_ragged, hint=3, points=1),
        Check("large scores do not overflow", checks.blocks_large, hint=2, points=1),
        Check("a mask that hides whole blocks", checks.blocks_hidden, hint=3, points=1),
        Check("a block that nobody sees is skipped", checks.blocks_skipped, hint=1, points=1),
        Check("gradients", checks.blocks_gradients, hint=3, points=1),
    ),
)


KV_CACHE = Exercise(
    id="03.kv_cache",
    title="A cache and the mask behind it",
    objective="O3: continue attention from a KV cache, one token or many at a time.",
    minutes=18,
    difficulty=3,
    points=7,
    task="""
`length` counts the valid tokens; the buffers `k` and `v` have a capacity for more.

- `append` writes new keys and values behind the valid ones. If they do not fit, the capacity
  doubles, or becomes exactly what is needed if that is more. New token i is at position
  `old length + i` and sees keys up to there.
- `drop` forgets the last `count` tokens, such as a rejected draft. Nothing beyond `length` is
  read, so nothing need be cleared.
""".strip(),
    stub='''
class KVCache:
    """Keys and values of one attention layer, in buffers that double when they are full."""

    def __init__(self, batch, heads, width, capacity=4, dtype=torch.float32):
        self.k = torch.zeros(batch, heads, capacity, width, dtype=dtype)
        self.v = torch.zeros(batch, heads, capacity, width, dtype=dtype)
        self.length = 0

    def append(self, k, v):
        """Store new tokens.

        Args:
            k, v: keys and values of the new tokens, `b m t p`.

        Returns:
            (keys, values, mask): all valid ones, `b m length p` twice, and a bool tensor
            `t length` that is True where a new token may look.
        """
        raise NotImplementedError

    def drop(self, count):
        """Forget the last `count` tokens."""
        raise NotImplementedError
'''.strip(),
    solution="""class KVCache:
    def __init__(self, batch, heads, width, capacity=4, dtype=torch.float32):
        self.k = torch.zeros(batch, heads, capacity, width, dtype=dtype)
        self.v = torch.zeros(batch, heads, capacity, width, dtype=dtype)
        self.length = 0

    def append(self, k, v):
        new, capacity = k.shape[2], self.k.shape[2]
        total = self.length + new
        if total > capacity:
            more = max(capacity, total - capacity)
            self.k = F.pad(self.k, (0, 0, 0, more))
            self.v = F.pad(self.v, (0, 0, 0, more))
        self.k[:, :, self.length : total] = k
        self.v[:, :, self.length : total] = v
        self.length = total
        mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)
        return self.k[:, :, :total], self.v[:, :, :total], mask

    def drop(self, count):
        self.length -= count
""",
    hints=(
        "New tokens go to the places `length` to `length + t` of the buffers "
        "(`self.k[:, :, a:b] = k`); then `length` grows by t. Return the buffers up to there: "
        "what follows is unused, or old values of a rejected draft.",
        "The i-th new token sees keys 0 to `old length + i`. `torch.ones(t, total).tril()` starts "
        "its triangle in the top left corner, which is right for an empty cache only; `tril` "
        "takes a `diagonal`.",
        "To grow, make a larger buffer that begins with the old one: "
        "`F.pad(self.k, (0, 0, 0, more))` adds `more` places at the end of the third axis. With "
        "`more = max(capacity, total - capacity)` it doubles, or fits. `drop` only counts back.",
    ),
    checks=(
        Check("keys and values in their places", checks.cache_writes, hint=1, points=1),
        Check("the mask", checks.cache_masks, hint=2, points=2),
        Check("the capacity doubles, what was stored stays", checks.cache_grows, hint=3, points=1),
        Check("a draft is dropped", checks.cache_drops, hint=3, points=1),
        Check("pieces equal the whole", checks.cache_pieces, hint=2, points=2),
    ),
)


MEMORY_BYTES = Exercise(
    id="03.memory_bytes",
    title="Where cache and state cross",
    objective="O5: compute the memory of a sequence, and where cache and state cross.",
    minutes=8,
    difficulty=2,
    points=3,
    task="""
Return three whole numbers: `kv`, the bytes of keys and values in one attention layer after
`context` tokens, in bfloat16 (2 bytes a number); `state`, the bytes of the state $S$ of one Mamba-2
layer, in float32 (4 bytes a number); and `crossing`, the smallest number of tokens at which keys
and values have at least as many bytes as the state.
""".strip(),
    stub='''
def memory_bytes(config, context):
    """Bytes that one layer of each kind keeps for one sequence.

    Args:
        config: a NemotronConfig; needed are num_key_value_heads, head_dim, mamba_num_heads,
            mamba_head_dim and ssm_state_size. What the convolution keeps is not counted.
        context: tokens of the sequence.

    Returns:
        (kv, state, crossing): bytes, bytes, tokens.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def memory_bytes(config, context):
    per_token = 2 * config.num_key_value_heads * config.head_dim * 2
    state = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size * 4
    return per_token * context, state, math.ceil(state / per_token)
""",
    hints=(
        "A token adds one key and one value for each *key* head, `head_dim` numbers each, 2 bytes "
        "a number. Query heads keep nothing.",
        "A Mamba layer keeps one `p n` matrix for each of its heads, 4 bytes a number, however "
        "long the sequence is.",
        "The crossing is `state` divided by the bytes of one token, rounded up. Nothing limits "
        "`context`: `max_position_embeddings` plays no part.",
    ),
    checks=(
        Check("keys and values", checks.bytes_kv, hint=1, points=1),
        Check("the state", checks.bytes_state, hint=2, points=1),
        Check("the crossing", checks.bytes_crossing, hint=3, points=1),
    ),
)


GROUPED_QUERY_ATTENTION = Exercise(
    id="03.grouped_query_attention",
    title="The attention layer",
    objective="O3: build the layer, with and without its cache.",
    minutes=20,
    difficulty=3,
    points=8,
    task="""
The layer has four `nn.Linear` without bias: `q_proj` to `num_attention_heads` heads of `head_dim`
numbers, `k_proj` and `v_proj` to `num_key_value_heads` heads, and `o_proj` from all query heads
back to `hidden_size`. `head_dim` need not be `hidden_size` divided by the number of heads.

`forward` splits the projections into heads (`b t h*p` to `b h t p`), appends keys and values to the
cache if there is one, attends, and joins the heads. Without a cache the mask is the causal
triangle. Use your `grouped_attention` and `KVCache`.
""".strip(),
    stub='''
class GroupedQueryAttention(nn.Module):
    """Causal attention with shared key heads and no positions."""

    def __init__(self, config):
        super().__init__()
        raise NotImplementedError

    def empty_cache(self, batch):
        """An empty `KVCache` for `batch` sequences, of the dtype of the weights."""
        raise NotImplementedError

    def forward(self, x, cache=None):
        """The layer's output.

        Args:
            x: float tensor `b t d`.
            cache: a `KVCache` that holds the tokens before x; x is appended to it.

        Returns:
            Float tensor `b t d`.
        """
        raise NotImplementedError
'''.strip(),
    solution="""class GroupedQueryAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.width, self.key_heads = config.head_dim, config.num_key_value_heads
        queries = config.num_attention_heads * self.width
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.key_heads * self.width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.key_heads * self.width, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def empty_cache(self, batch):
        return KVCache(batch, self.key_heads, self.width, dtype=self.k_proj.weight.dtype)

    def forward(self, x, cache=None):
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is None:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        else:
            k, v, mask = cache.append(k, v)
        y = grouped_attention(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))
""",
    hints=(
        "`nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, "
        "bias=False)` is q_proj. k_proj and v_proj use `num_key_value_heads`. o_proj has the two "
        "sizes of q_proj the other way round. Call `super().__init__()` first.",
        "To split: `q_proj(x).unflatten(-1, (-1, head_dim)).transpose(1, 2)`. A `view` straight to "
        "`b h t p` mixes tokens and heads. To join: `y.transpose(1, 2).flatten(2)`, then o_proj.",
        "With a cache, `k, v, mask = cache.append(k, v)` before attending: the queries are those "
        "of x only. `empty_cache` has `num_key_value_heads` heads, and the dtype of the weights "
        "(`k_proj.weight.dtype`). Key heads are repeated when they are read and not when they are "
        "stored.",
    ),
    checks=(
        Check("parameters have the package's names", checks.layer_parameters, hint=1, points=1),
        Check("the package's weights", checks.layer_values, hint=2, points=2),
        Check("a head width of its own", checks.layer_wide_heads, hint=1, points=1),
        Check("gradients", checks.layer_gradients, hint=2, points=1),
        Check("with its cache, in pieces", checks.layer_cached, hint=3, points=2),
        Check("the cache of a layer", checks.layer_cache_size, hint=3, points=1),
    ),
    needs=("03.grouped_attention", "03.kv_cache"),
)


DECODE_KERNEL = Exercise(
    id="03.decode_kernel",
    title="One query over a cache, in Triton",
    objective="O2: write attention in blocks, with a running softmax.",
    minutes=25,
    difficulty=4,
    points=4,
    task="""
One program computes one query head; its query `q` is loaded and scaled. Write the loop over the
cache: load `BLOCK` keys and values at a time, keep `top`, `total` and `mixed` as in
`blocked_attention`, and store the result.

Key `row` of this head begins at `k_ptr + first + row * P`; rows from `length` on must not be read.
Scores are `tl.sum(keys * q[None, :], axis=1)`, `mixed` has `P` numbers.
""".strip(),
    stub='''
import triton
import triton.language as tl


@triton.jit
def _decode(q_ptr, k_ptr, v_ptr, o_ptr, length, rows, shared, P: tl.constexpr, BLOCK: tl.constexpr):
    # rows: places for tokens in a buffer, used or not; shared: query heads of one key head.
    head = tl.program_id(0)
    column = tl.arange(0, P)
    q = tl.load(q_ptr + head * P + column) * P**-0.5
    first = (head // shared) * rows * P  # where this key head begins in the buffers
    top = float("-inf")
    total = 0.0
    mixed = tl.zeros([P], dtype=tl.float32)
    # You need tl.arange, tl.load with mask= and other=, tl.where, tl.maximum, tl.max, tl.sum,
    # tl.exp and tl.store.
    raise NotImplementedError


def decode_attention(q, k, v, length, block=16):
    """Attention of one new token over its cache.

    Args:
        q: float32 tensor `h p`; p is a power of two.
        k, v: float32 buffers `m rows p`, of which the first `length` rows are valid.
        length: tokens in the cache, at least 1.
        block: rows that are read at a time, a power of two.

    Returns:
        Float32 tensor `h p`.
    """
    (h, p), (m, rows, _) = q.shape, k.shape
    # Copies with zeros on both sides: a wrong address then overwrites nothing else.
    q, k, v, out = (F.pad(x.flatten(), (65536, 65536))[65536:-65536] for x in (q, k, v, q))
    _decode[(h,)](q, k, v, out, length, rows, h // m, P=p, BLOCK=block)
    return out.view(h, p)
'''.strip(),
    solution="""import triton
import triton.language as tl


@triton.jit
def _decode(q_ptr, k_ptr, v_ptr, o_ptr, length, rows, shared, P: tl.constexpr, BLOCK: tl.constexpr):
    # rows: places for tokens in a buffer, used or not; shared: query heads of one key head.
    head = tl.program_id(0)
    column = tl.arange(0, P)
    q = tl.load(q_ptr + head * P + column) * P**-0.5
    first = (head // shared) * rows * P  # where this key head begins in the buffers
    top = float("-inf")
    total = 0.0
    mixed = tl.zeros([P], dtype=tl.float32)
    for start in range(0, length, BLOCK):
        row = start + tl.arange(0, BLOCK)
        place = first + row[:, None] * P + column[None, :]
        valid = row < length
        keys = tl.load(k_ptr + place, mask=valid[:, None], other=0.0)
        values = tl.load(v_ptr + place, mask=valid[:, None], other=0.0)
        scores = tl.where(valid, tl.sum(keys * q[None, :], axis=1), float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        weights = tl.exp(scores - new_top)
        rescale = tl.exp(top - new_top)
        total = rescale * total + tl.sum(weights, axis=0)
        mixed = rescale * mixed + tl.sum(weights[:, None] * values, axis=0)
        top = new_top
    tl.store(o_ptr + head * P + column, mixed / total)


def decode_attention(q, k, v, length, block=16):
    (h, p), (m, rows, _) = q.shape, k.shape
    # Copies with zeros on both sides: a wrong address then overwrites nothing else.
    q, k, v, out = (F.pad(x.flatten(), (65536, 65536))[65536:-65536] for x in (q, k, v, q))
    _decode[(h,)](q, k, v, out, length, rows, h // m, P=p, BLOCK=block)
    return out.view(h, p)
""",
    hints=(
        "`row = start + tl.arange(0, BLOCK)` are the rows of a block, and "
        "`place = first + row[:, None] * P + column[None, :]` their numbers in memory. Load "
        "keys and values with `mask=(row < length)[:, None], other=0.0`.",
        "A row that was not loaded holds zeros, so its score is 0, not -inf. Set it with "
        '`tl.where(row < length, scores, float("-inf"))`, or it takes part in the softmax.',
        "`new_top = tl.maximum(top, tl.max(scores, axis=0))`; weights are "
        "`tl.exp(scores - new_top)`; `tl.exp(top - new_top)` multiplies the old `total` and "
        "`mixed`; `tl.sum(weights[:, None] * values, axis=0)` is added to `mixed`. Store "
        "`mixed / total` at `o_ptr + head * P + column`.",
    ),
    checks=(
        Check("one full block", checks.kernel_one_block, hint=1, points=1),
        Check("nothing behind the last token is read", checks.kernel_length, hint=2, points=1),
        Check("several blocks", checks.kernel_blocks, hint=3, points=1),
        Check("query heads share key heads in order", checks.kernel_shares, hint=1, points=1),
    ),
    kind="optional",
)


MERGE_PARTIALS = Exercise(
    id="03.merge_partials",
    title="One softmax from two halves",
    objective="O2: combine parts of a softmax that were computed apart.",
    minutes=15,
    difficulty=4,
    points=4,
    task=r"""
A long cache can be split: one worker attends to its first half, another to its second. Each returns
its output $o$, normalised over its own keys only, and $\ell = \log \sum_j \exp(\text{score}_j)$.
Combine two such pairs into the output and $\ell$ of attention to all keys.

A worker that may not look at any of its keys returns $o = 0$ and $\ell = -\infty$. If both do, the
combination is $0$ and $-\infty$ too, and not NaN. $\ell$ can be several hundred.
""".strip(),
    stub='''
def merge_partials(o1, l1, o2, l2):
    """Combine attention to two sets of keys.

    Args:
        o1, o2: outputs over each set, `... p`.
        l1, l2: logarithm of the sum of exp(score) over each set, `...`.

    Returns:
        (o, l): the same for both sets together.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def merge_partials(o1, l1, o2, l2):
    both = torch.logaddexp(l1, l2)
    w1, w2 = ((part - both).exp().nan_to_num().unsqueeze(-1) for part in (l1, l2))
    return w1 * o1 + w2 * o2, both
""",
    hints=(
        "The sum over both sets is `exp(l1) + exp(l2)`. Its logarithm, without overflow, is "
        "`torch.logaddexp(l1, l2)`.",
        "Each output was divided by its own sum. It enters with weight `exp(l1 - l)`: its share of "
        "the whole sum. The two weights add up to 1.",
        "If both are empty, `l1 - l` is -inf minus -inf, which is NaN. Set such weights to 0: "
        "`(l1 - l).exp().nan_to_num()`.",
    ),
    checks=(
        Check("two halves of one softmax", checks.merge_halves, hint=2, points=1),
        Check("large scores", checks.merge_large, hint=1, points=1),
        Check("one part is empty, or both", checks.merge_empty, hint=3, points=1),
        Check("gradients", checks.merge_gradients, hint=2, points=1),
    ),
    kind="stretch",
)

EXERCISES: tuple[Exercise, ...] = (
    OUTER_MEMORY,
    GROUPED_ATTENTION,
    BLOCKED_ATTENTION,
    KV_CACHE,
    MEMORY_BYTES,
    GROUPED_QUERY_ATTENTION,
    DECODE_KERNEL,
    MERGE_PARTIALS,
)
