"""Exercises of chapter 03: the two kinds of memory, and how many bytes they need.

    03.outer_memory       pairs in one matrix, which is what a state holds
    03.grouped_attention  causal attention in which query heads share key heads
    03.extend_cache       several new tokens after a cache, and what each may see
    03.memory_bytes       keys and values against states, in bytes

The checks are in `checks.py`; the mistakes that they have to catch are in
`tests/course/chapters/ch03_attention_anchors/mutants.py`.
"""

from __future__ import annotations

from nemotron_lite.course.chapters.ch03_attention_anchors import checks
from nemotron_lite.course.exercises import Check, Exercise

OUTER_MEMORY = Exercise(
    id="03.outer_memory",
    title="A memory of outer products",
    objective="O1: say what a state of fixed size stores, and why recall falls as pairs crowd it.",
    minutes=8,
    difficulty=2,
    points=4,
    task="""
Store pairs in one matrix and ask for them again. This is the core of a Mamba
head: `keys` are its B, `values` its x, `queries` its C, and `keep` the decay of one step.

Start with a state of zeros, `p n`. For each pair in order, first fade the state by `keep`, then add
the outer product of value and key. Afterwards answer every query with state times query. Asking
does not change the state.
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
        "One pair first: `torch.outer(value, key)` is a `p n` matrix. Multiplied by a query of n "
        "numbers it gives the value, times the dot product of key and query. No division, no "
        "softmax.",
        "The state is one matrix for all pairs: add each outer product to what is there already.",
        "The order inside a step matters: `state = keep * state + torch.outer(value, key)`. The "
        "newest pair is not faded. Keep torch operations throughout, so that gradients flow.",
    ),
    checks=(
        Check("one pair comes back", checks.memory_one_pair, hint=1, points=1),
        Check("pairs add up in one state", checks.memory_adds, hint=2, points=1),
        Check("older pairs fade, the newest does not", checks.memory_fades, hint=3, points=1),
        Check("gradients", checks.memory_gradients, hint=3, points=1),
    ),
)


GROUPED_ATTENTION = Exercise(
    id="03.grouped_attention",
    title="Attention with shared key heads",
    objective="O2: write causal attention in which query heads share key heads.",
    minutes=12,
    difficulty=3,
    points=5,
    task=r"""
Write the attention of an anchor, the whole sequence at once: causal, scale $1/\sqrt p$, no
positions. There are fewer key heads than query heads: query head i reads key head i // (h / kv).
Build it from matrix products and a softmax; leave `scaled_dot_product_attention` to the package.
""".strip(),
    stub='''
def grouped_attention(q, k, v):
    """Causal attention with shared key heads.

    Args:
        q: float tensor `b h t p`.
        k, v: float tensors `b kv t p`; kv divides h.

    Returns:
        Float tensor `b h t p`.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def grouped_attention(q, k, v):
    shared = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(shared, dim=1)
    v = v.repeat_interleave(shared, dim=1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ v
""",
    hints=(
        "Scores are `q @ k.transpose(-1, -2)`, divided by the square root of p, the width of one "
        "head (the last axis). The softmax runs over keys, again the last axis.",
        "Query i sees keys 0 to i, itself included. Set the rest to -inf before the softmax: "
        "`torch.ones(t, t, dtype=torch.bool).triu(1)` is True on the future.",
        "Neighbours share: with 4 query heads on 2 key heads the order is 0 0 1 1, which is "
        "`repeat_interleave`. `repeat` gives 0 1 0 1, which trains and is a different model from "
        "the one whose weights you load.",
    ),
    checks=(
        Check("the last query", checks.attention_last_query, hint=1, points=1),
        Check("no query sees the future", checks.attention_is_causal, hint=2, points=1),
        Check("query heads share key heads in order", checks.attention_shares, hint=3, points=1),
        Check("gradients", checks.attention_gradients, hint=3, points=1),
        Check("strided heads", checks.attention_strided, hint=3, points=1),
    ),
)


EXTEND_CACHE = Exercise(
    id="03.extend_cache",
    title="New tokens behind a cache",
    objective="O3: continue attention from a KV cache, several tokens at a time.",
    minutes=12,
    difficulty=3,
    points=5,
    task="""
A cache is a pair of buffers with room for more tokens than there are. `used` slots are
valid; the slots after them hold old values of a rejected draft. Write the new keys and values into
the buffers, in place, after the used ones. Return the valid part, old and new, and the mask that
says which keys each new token may see.
""".strip(),
    stub='''
def extend_cache(buffer_k, buffer_v, used, k, v):
    """Append a piece of a sequence to a KV cache.

    Args:
        buffer_k, buffer_v: float tensors `b kv s p`, written in place; s is large enough.
        used: how many slots hold tokens already.
        k, v: the new tokens' keys and values, `b kv t p`.

    Returns:
        (keys, values, mask): `b kv used+t p` twice, and a bool tensor `t used+t` that is True
        where a new token may look.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def extend_cache(buffer_k, buffer_v, used, k, v):
    new = k.shape[2]
    total = used + new
    buffer_k[:, :, used:total] = k
    buffer_v[:, :, used:total] = v
    mask = torch.ones(new, total, dtype=torch.bool).tril(used)
    return buffer_k[:, :, :total], buffer_v[:, :, :total], mask
""",
    hints=(
        "New tokens go into slots `used` to `used + t`. Return the slots up to there: those after "
        "them hold old values.",
        "The i-th new token is at position `used + i` and sees keys 0 to `used + i`. A "
        "triangle that starts in the top left corner is right only for an empty cache; `tril` "
        "takes a `diagonal`.",
        "The next piece calls you with the same buffers. Assign to a slice of the buffer "
        "(`buffer_k[:, :, a:b] = k`); a new tensor made by `torch.cat` is lost.",
    ),
    checks=(
        Check("keys and values in their slots", checks.cache_writes, hint=1, points=1),
        Check("the mask", checks.cache_masks, hint=2, points=2),
        Check("pieces equal the whole", checks.cache_chunks, hint=3, points=2),
    ),
)


MEMORY_BYTES = Exercise(
    id="03.memory_bytes",
    title="Bytes of a sequence",
    objective="O5: reckon what a sequence costs in memory, in both kinds of layer.",
    minutes=10,
    difficulty=2,
    points=3,
    task="""
How many bytes does one sequence of `context` tokens keep? Return two whole numbers: keys and values
of the attention layers (bfloat16, 2 bytes each), and what the Mamba layers keep: the last k-1
inputs of the convolution (bfloat16) and the state (float32, 4 bytes each).

`config.pattern` is the string of layers, `*` attention and `M` Mamba. The other fields that matter:
`num_key_value_heads`, `head_dim`, `conv_kernel`, `conv_dim`, `mamba_inner_size` (h times p) and
`ssm_state_size`.
""".strip(),
    stub='''
def memory_bytes(config, context):
    """Bytes that one sequence keeps.

    Args:
        config: a NemotronConfig.
        context: tokens of the sequence.

    Returns:
        (kv, state): keys and values of the attention layers; convolution inputs and states of the
        Mamba layers.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def memory_bytes(config, context):
    kv_values = 2 * config.num_key_value_heads * config.head_dim * context
    kv = config.pattern.count("*") * kv_values * 2
    conv = (config.conv_kernel - 1) * config.conv_dim * 2
    state = config.mamba_inner_size * config.ssm_state_size * 4
    return kv, config.pattern.count("M") * (conv + state)
""",
    hints=(
        "Per attention layer and token: one key and one value for each *key* head, `head_dim` "
        "numbers each, 2 bytes each. Query heads keep nothing. Only the `*` of the pattern count.",
        "Per Mamba layer: `conv_kernel - 1` inputs of `conv_dim` numbers (x, B and C side by "
        "side), 2 bytes each; and `mamba_inner_size * ssm_state_size` numbers of 4 bytes.",
        "Only one of the two grows with `context`.",
    ),
    checks=(
        Check("keys and values", checks.bytes_kv, hint=1, points=1),
        Check("what the Mamba layers keep", checks.bytes_state, hint=2, points=1),
        Check("growth to a million tokens", checks.bytes_growth, hint=3, points=1),
    ),
)

EXERCISES: tuple[Exercise, ...] = (OUTER_MEMORY, GROUPED_ATTENTION, EXTEND_CACHE, MEMORY_BYTES)
