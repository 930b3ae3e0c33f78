"""Wrong answers to chapter 03's exercises: mistakes that real projects have shipped.

Each has to fail, and the message has to name the hint that is given here. Most are the reference
solution with one place changed.
"""

from __future__ import annotations

from nemotron_lite.course.exercises import exercise
from tests.course.chapters.mutants import Mutant


def _with(exercise_id: str, *changes: tuple[str, str]) -> str:
    """The reference solution with places exchanged; each must be there exactly once."""
    source = exercise(exercise_id).solution
    for old, new in changes:
        assert source.count(old) == 1, f"{exercise_id}: {old!r} is there {source.count(old)} times"
        source = source.replace(old, new)
    return source


MUTANTS: dict[str, list[Mutant]] = {
    "03.outer_memory": [
        Mutant(
            name="the read is normalised",
            source="""
import torch


def outer_memory(keys, values, queries, keep=1.0):
    state = values.new_zeros(values.shape[1], keys.shape[1])
    total = keys.new_zeros(keys.shape[1])
    for key, value in zip(keys, values):
        state = keep * state + torch.outer(value, key)
        total = keep * total + key
    return (queries @ state.T) / (queries @ total)[:, None]
""",
            hint=1,
            bug="The denominator of linear attention, which Mamba does not have.",
        ),
        Mutant(
            name="only the last pair",
            source=_with("03.outer_memory", ("keep * state + ", "")),
            hint=2,
            bug="The state is overwritten instead of added to.",
        ),
        Mutant(
            name="the newest pair decays too",
            source=_with(
                "03.outer_memory",
                (
                    "keep * state + torch.outer(value, key)",
                    "keep * (state + torch.outer(value, key))",
                ),
            ),
            hint=3,
            bug="Decay counted from the wrong step: the off-by-one of many minimal scans.",
        ),
        Mutant(
            name="the state grows",
            source=_with("03.outer_memory", ("keep * state", "state / keep")),
            hint=3,
            bug="Sign of the decay's exponent (vllm-project/vllm#37501: a positive difference).",
        ),
        Mutant(
            name="no gradient to the values",
            source=_with("03.outer_memory", ("outer(value,", "outer(value.detach(),")),
            hint=3,
            bug="Right values, and a model that cannot learn what to write.",
        ),
    ],
    "03.grouped_attention": [
        Mutant(
            name="no scale",
            source=_with("03.grouped_attention", (" * q.shape[-1] ** -0.5", "")),
            hint=1,
            bug="The 1/sqrt(p) forgotten: a softmax that is too sharp.",
        ),
        Mutant(
            name="scale of all heads together",
            source=_with(
                "03.grouped_attention",
                ("q.shape[-1] ** -0.5", "(q.shape[1] * q.shape[-1]) ** -0.5"),
            ),
            hint=1,
            bug="The model's width in place of the head's.",
        ),
        Mutant(
            name="softmax over queries",
            source=_with("03.grouped_attention", ("softmax(-1)", "softmax(-2)")),
            hint=1,
            bug="The wrong axis: columns sum to one, rows do not.",
        ),
        Mutant(
            name="the mask the other way round",
            source="""
import math


def grouped_attention(q, k, v, mask):
    shared = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(shared, dim=1)
    v = v.repeat_interleave(shared, dim=1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if not mask.all():
        scores = scores.masked_fill(mask, -math.inf)
    return scores.softmax(-1) @ v
""",
            hint=2,
            bug="True hides a key in nn.MultiheadAttention and shows it in "
            "scaled_dot_product_attention (pytorch/pytorch#170400, rasbt/LLMs-from-scratch#1061).",
        ),
        Mutant(
            name="masked after the softmax",
            source=_with(
                "03.grouped_attention",
                (
                    "scores.masked_fill(~mask, -math.inf).softmax(-1)",
                    "scores.softmax(-1).masked_fill(~mask, 0.0)",
                ),
            ),
            hint=2,
            bug="The future still stands in the denominator.",
        ),
        Mutant(
            name="key heads tiled",
            source=_with(
                "03.grouped_attention",
                ("k.repeat_interleave(shared, dim=1)", "k.repeat(1, shared, 1, 1)"),
                ("v.repeat_interleave(shared, dim=1)", "v.repeat(1, shared, 1, 1)"),
            ),
            hint=3,
            bug="repeat for repeat_interleave (onnx/onnx#7274, apple/axlearn#842).",
        ),
        Mutant(
            name="only the first key head",
            source="""
import math


def grouped_attention(q, k, v, mask):
    if k.shape[1] < q.shape[1]:
        k, v = k[:, :1], v[:, :1]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
""",
            hint=3,
            bug="Broadcasting does for one shared head what it does not for several.",
        ),
    ],
    "03.blocked_attention": [
        Mutant(
            name="no maximum",
            source=_with(
                "03.blocked_attention",
                (
                    "torch.maximum(top, scores.amax(-1, keepdim=True))",
                    "torch.zeros_like(total)",
                ),
                ("rescale = (top - new_top).exp()", "rescale = torch.ones_like(total)"),
            ),
            hint=2,
            bug="exp without its maximum: right in every small test, inf at large scores.",
        ),
        Mutant(
            name="the maximum of the block",
            source=_with(
                "03.blocked_attention",
                (
                    "torch.maximum(top, scores.amax(-1, keepdim=True))",
                    "scores.amax(-1, keepdim=True)",
                ),
            ),
            hint=2,
            bug="Falls back to a smaller maximum; a hidden block makes it -inf, and NaN follows.",
        ),
        Mutant(
            name="the old values are not rescaled",
            source=_with("03.blocked_attention", ("rescale * mixed", "mixed")),
            hint=3,
            bug="The accumulator is not rescaled when the maximum changes.",
        ),
        Mutant(
            name="the old sum is not rescaled",
            source=_with("03.blocked_attention", ("rescale * total", "total")),
            hint=3,
            bug="The same for the denominator.",
        ),
        Mutant(
            name="normalised in every block",
            source=_with(
                "03.blocked_attention",
                (
                    "        top = new_top\n",
                    "        top = new_top\n        mixed = mixed / total\n",
                ),
                ("return mixed / total", "return mixed"),
            ),
            hint=3,
            bug="Each block is divided by the sum so far, and the next block counts on.",
        ),
        Mutant(
            name="the short block is left out",
            source=_with(
                "03.blocked_attention",
                ("range(0, k.shape[2], block)", "range(0, max(k.shape[2] - block, 0) + 1, block)"),
            ),
            hint=3,
            bug="Whole blocks only: the last keys are never read.",
        ),
        Mutant(
            name="one softmax over all keys",
            source="""
import math


def blocked_attention(q, k, v, mask, block):
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
""",
            hint=1,
            bug="All scores at once: the block size is ignored.",
        ),
        Mutant(
            name="hidden blocks are read",
            source=_with(
                "03.blocked_attention",
                ("        if not seen.any():\n            continue\n", ""),
            ),
            hint=1,
            bug="A place that was never written holds NaN, and 0 times NaN is NaN: a masked value "
            "still reaches the output.",
        ),
    ],
    "03.kv_cache": [
        Mutant(
            name="the whole buffer is returned",
            source=_with(
                "03.kv_cache",
                (
                    "return self.k[:, :, :total], self.v[:, :, :total], mask",
                    "return self.k, self.v, mask",
                ),
            ),
            hint=1,
            bug="Empty slots of a static cache are attended to.",
        ),
        Mutant(
            name="the last cached token overwritten",
            source=_with(
                "03.kv_cache",
                (
                    "self.k[:, :, self.length : total] = k",
                    "start = max(self.length - 1, 0)\n"
                    "        self.k[:, :, start : start + new] = k",
                ),
                ("self.v[:, :, self.length : total] = v", "self.v[:, :, start : start + new] = v"),
            ),
            hint=1,
            bug="Index of the last token taken for the number of tokens.",
        ),
        Mutant(
            name="a triangle from the top left corner",
            source=_with("03.kv_cache", ("tril(total - new)", "tril()")),
            hint=2,
            bug="What is_causal=True means to PyTorch (pytorch/pytorch#144858, onnx/onnx#8068).",
        ),
        Mutant(
            name="no mask among the new tokens",
            source=_with("03.kv_cache", (".tril(total - new)", "")),
            hint=2,
            bug="True for one new token, wrong for a chunk or a verified draft.",
        ),
        Mutant(
            name="one token of the future",
            source=_with("03.kv_cache", ("tril(total - new)", "tril(total - new + 1)")),
            hint=2,
            bug="Mask off by one.",
        ),
        Mutant(
            name="a new buffer without the old tokens",
            source=_with(
                "03.kv_cache",
                (
                    "self.k = F.pad(self.k, (0, 0, 0, more))",
                    "self.k = F.pad(torch.zeros_like(self.k), (0, 0, 0, more))",
                ),
                (
                    "self.v = F.pad(self.v, (0, 0, 0, more))",
                    "self.v = F.pad(torch.zeros_like(self.v), (0, 0, 0, more))",
                ),
            ),
            hint=3,
            bug="Growing by allocating: right until the first growth.",
        ),
        Mutant(
            name="one more place for each token",
            source=_with("03.kv_cache", ("max(capacity, total - capacity)", "total - capacity")),
            hint=3,
            bug="torch.cat for every token: the whole cache is copied for each, in quadratic time.",
        ),
        Mutant(
            name="dropped tokens still count",
            source=_with("03.kv_cache", ("self.length -= count", "self.k[:, :, -count:] = 0.0")),
            hint=3,
            bug="A rejected draft is cleared, and its places are still attended to.",
        ),
    ],
    "03.memory_bytes": [
        Mutant(
            name="query heads counted",
            source=_with("03.memory_bytes", ("num_key_value_heads", "num_attention_heads")),
            hint=1,
            bug="A cache of repeated heads: what sharing was to save is spent again.",
        ),
        Mutant(
            name="values forgotten",
            source=_with(
                "03.memory_bytes",
                ("2 * config.num_key_value_heads", "config.num_key_value_heads"),
            ),
            hint=1,
            bug="Keys without values: half.",
        ),
        Mutant(
            name="the context capped",
            source="""
import math


def memory_bytes(config, context):
    per_token = 2 * config.num_key_value_heads * config.head_dim * 2
    state = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size * 4
    seen = min(context, config.max_position_embeddings)
    return per_token * seen, state, math.ceil(state / per_token)
""",
            hint=1,
            bug="max_position_embeddings taken for a limit; Super is trained to four times that.",
        ),
        Mutant(
            name="one state for all heads",
            source=_with("03.memory_bytes", ("config.mamba_num_heads * ", "")),
            hint=2,
            bug="Every Mamba head has a state of its own.",
        ),
        Mutant(
            name="a state in bfloat16",
            source=_with("03.memory_bytes", ("ssm_state_size * 4", "ssm_state_size * 2")),
            hint=2,
            bug="The dtype of the model taken for that of the state.",
        ),
        Mutant(
            name="rounded down",
            source=_with("03.memory_bytes", ("math.ceil(state / per_token)", "state // per_token")),
            hint=3,
            bug="A capacity computed with floor division: one token too few.",
        ),
    ],
    "03.grouped_query_attention": [
        Mutant(
            name="a bias",
            source=_with(
                "03.grouped_query_attention",
                (
                    "nn.Linear(queries, config.hidden_size, bias=False)",
                    "nn.Linear(queries, config.hidden_size)",
                ),
            ),
            hint=1,
            bug="nn.Linear's default, which published weights do not have.",
        ),
        Mutant(
            name="width of a head from the width of the model",
            source=_with(
                "03.grouped_query_attention",
                ("config.head_dim", "config.hidden_size // config.num_attention_heads"),
            ),
            hint=1,
            bug="head_dim is a field of its own (vllm-project/vllm#2622: a cache of wrong size).",
        ),
        Mutant(
            name="tokens and heads mixed",
            source=_with(
                "03.grouped_query_attention",
                (
                    "projection(x).unflatten(-1, (-1, self.width)).transpose(1, 2)",
                    "projection(x).reshape(x.shape[0], -1, x.shape[1], self.width)",
                ),
            ),
            hint=2,
            bug="reshape where a transpose is needed: shapes are right, numbers are not.",
        ),
        Mutant(
            name="heads not joined again",
            source=_with(
                "03.grouped_query_attention",
                ("y.transpose(1, 2).flatten(2)", "y.reshape(*x.shape[:2], -1)"),
            ),
            hint=2,
            bug="The same at the end of the layer.",
        ),
        Mutant(
            name="the cache is written and not read",
            source=_with(
                "03.grouped_query_attention",
                (
                    "            k, v, mask = cache.append(k, v)\n",
                    "            cache.append(k, v)\n"
                    "            mask = torch.ones(q.shape[2], q.shape[2]).tril().bool()\n",
                ),
            ),
            hint=3,
            bug="Each piece attends to itself only; a first piece is right.",
        ),
        Mutant(
            name="the cache never filled",
            source=_with(
                "03.grouped_query_attention",
                ("if cache is None:", "if cache is None or cache.length == 0:"),
            ),
            hint=3,
            bug="A prompt that is not stored, because nothing precedes it.",
        ),
        Mutant(
            name="a cache for each query head",
            source=_with(
                "03.grouped_query_attention",
                (
                    "KVCache(batch, self.key_heads,",
                    "KVCache(batch, self.q_proj.out_features // self.width,",
                ),
                (
                    "            k, v, mask = cache.append(k, v)\n",
                    "            shared = q.shape[1] // k.shape[1]\n"
                    "            k, v = (part.repeat_interleave(shared, 1) for part in (k, v))\n"
                    "            k, v, mask = cache.append(k, v)\n",
                ),
            ),
            hint=3,
            bug="Key heads are repeated before they are stored: right results, and the memory "
            "that sharing was to save.",
        ),
        Mutant(
            name="a float32 cache for all weights",
            source=_with("03.grouped_query_attention", (", dtype=self.k_proj.weight.dtype", "")),
            hint=3,
            bug="The default dtype of the cache: a layer in float64 or bfloat16 cannot use it.",
        ),
    ],
    "03.decode_kernel": [
        Mutant(
            name="unused rows take part",
            source=_with(
                "03.decode_kernel",
                (
                    'tl.where(valid, tl.sum(keys * q[None, :], axis=1), float("-inf"))',
                    "tl.sum(keys * q[None, :], axis=1)",
                ),
            ),
            hint=2,
            bug="Padding rows of zeros have the score 0, not -inf.",
        ),
        Mutant(
            name="the accumulator is not rescaled",
            source=_with("03.decode_kernel", ("rescale * mixed", "mixed")),
            hint=3,
            bug="The accumulator is not rescaled when the maximum changes.",
        ),
        Mutant(
            name="the maximum of the block",
            source=_with(
                "03.decode_kernel",
                ("tl.maximum(top, tl.max(scores, axis=0))", "tl.max(scores, axis=0)"),
            ),
            hint=3,
            bug="A later block with smaller scores makes the factor overflow.",
        ),
        Mutant(
            name="not normalised",
            source=_with("03.decode_kernel", ("mixed / total", "mixed")),
            hint=1,
            bug="The sum of the weights is computed and not used.",
        ),
    ],
    "03.merge_partials": [
        Mutant(
            name="the mean of the two",
            source="""
import torch


def merge_partials(o1, l1, o2, l2):
    return (o1 + o2) / 2, torch.logaddexp(l1, l2)
""",
            hint=2,
            bug="Two halves averaged, as if both had the same sum.",
        ),
        Mutant(
            name="overflow",
            source="""
import torch


def merge_partials(o1, l1, o2, l2):
    e1, e2 = l1.exp(), l2.exp()
    w1, w2 = ((part / (e1 + e2)).nan_to_num(0.0)[..., None] for part in (e1, e2))
    return w1 * o1 + w2 * o2, (e1 + e2).log()
""",
            hint=1,
            bug="exp of a log-sum-exp of several hundred.",
        ),
        Mutant(
            name="NaN for two empty parts",
            source=_with("03.merge_partials", (".nan_to_num()", "")),
            hint=3,
            bug="-inf minus -inf, two empty parts (vllm-project/vllm#39148, "
            "flashinfer-ai/flashinfer#4051).",
        ),
    ],
}
