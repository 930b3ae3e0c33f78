"""Wrong answers to chapter 03's exercises: mistakes that real projects have shipped.

Each has to fail, and the message has to name the hint that is given here.
"""

from __future__ import annotations

from tests.course.chapters.mutants import Mutant

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
            source="""
import torch


def outer_memory(keys, values, queries, keep=1.0):
    for key, value in zip(keys, values):
        state = torch.outer(value, key)
    return queries @ state.T
""",
            hint=2,
            bug="The state is overwritten instead of added to.",
        ),
        Mutant(
            name="the newest pair fades too",
            source="""
import torch


def outer_memory(keys, values, queries, keep=1.0):
    state = values.new_zeros(values.shape[1], keys.shape[1])
    for key, value in zip(keys, values):
        state = keep * (state + torch.outer(value, key))
    return queries @ state.T
""",
            hint=3,
            bug="Decay counted from the wrong step: the off-by-one of many minimal scans.",
        ),
        Mutant(
            name="the state grows",
            source="""
import torch


def outer_memory(keys, values, queries, keep=1.0):
    state = values.new_zeros(values.shape[1], keys.shape[1])
    for key, value in zip(keys, values):
        state = state / keep + torch.outer(value, key)
    return queries @ state.T
""",
            hint=3,
            bug="Sign of the decay's exponent (vllm-project/vllm#37501: a positive difference).",
        ),
        Mutant(
            name="no gradient to the values",
            source="""
import torch


def outer_memory(keys, values, queries, keep=1.0):
    state = values.new_zeros(values.shape[1], keys.shape[1])
    for key, value in zip(keys, values):
        state = keep * state + torch.outer(value.detach(), key)
    return queries @ state.T
""",
            hint=3,
            bug="Right values, and a model that cannot learn what to write.",
        ),
    ],
    "03.grouped_attention": [
        Mutant(
            name="no scale",
            source="""
import torch


def grouped_attention(q, k, v):
    shared = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(shared, dim=1)
    v = v.repeat_interleave(shared, dim=1)
    scores = q @ k.transpose(-1, -2)
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ v
""",
            hint=1,
            bug="The 1/sqrt(p) forgotten: a softmax that is too sharp.",
        ),
        Mutant(
            name="scale of all heads together",
            source="""
import torch


def grouped_attention(q, k, v):
    shared = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(shared, dim=1)
    v = v.repeat_interleave(shared, dim=1)
    scores = q @ k.transpose(-1, -2) * (q.shape[1] * q.shape[-1]) ** -0.5
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ v
""",
            hint=1,
            bug="The model's width in place of the head's.",
        ),
        Mutant(
            name="softmax over queries",
            source="""
import torch


def grouped_attention(q, k, v):
    shared = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(shared, dim=1)
    v = v.repeat_interleave(shared, dim=1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-2) @ v
""",
            hint=1,
            bug="The wrong axis: columns sum to one, rows do not.",
        ),
        Mutant(
            name="one token of the future",
            source="""
import torch


def grouped_attention(q, k, v):
    shared = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(shared, dim=1)
    v = v.repeat_interleave(shared, dim=1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(2)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ v
""",
            hint=2,
            bug="Mask off by one: the loss falls to nothing, and so does the model.",
        ),
        Mutant(
            name="masked after the softmax",
            source="""
import torch


def grouped_attention(q, k, v):
    shared = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(shared, dim=1)
    v = v.repeat_interleave(shared, dim=1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return scores.softmax(-1).masked_fill(future, 0.0) @ v
""",
            hint=2,
            bug="The future still stands in the denominator.",
        ),
        Mutant(
            name="key heads tiled",
            source="""
import torch


def grouped_attention(q, k, v):
    shared = q.shape[1] // k.shape[1]
    k = k.repeat(1, shared, 1, 1)
    v = v.repeat(1, shared, 1, 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ v
""",
            hint=3,
            bug="repeat for repeat_interleave (onnx/onnx#7274, apple/axlearn#842).",
        ),
        Mutant(
            name="only the first key head",
            source="""
import torch


def grouped_attention(q, k, v):
    if k.shape[1] < q.shape[1]:
        k, v = k[:, :1], v[:, :1]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ v
""",
            hint=3,
            bug="Broadcasting does for one shared head what it does not for several.",
        ),
    ],
    "03.extend_cache": [
        Mutant(
            name="behind the whole buffer",
            source="""
import torch


def extend_cache(buffer_k, buffer_v, used, k, v):
    keys = torch.cat([buffer_k, k], dim=2)
    values = torch.cat([buffer_v, v], dim=2)
    mask = torch.ones(k.shape[2], keys.shape[2], dtype=torch.bool).tril(buffer_k.shape[2])
    return keys, values, mask
""",
            hint=1,
            bug="Empty slots of a static cache are attended to.",
        ),
        Mutant(
            name="the last cached token overwritten",
            source="""
import torch


def extend_cache(buffer_k, buffer_v, used, k, v):
    start = max(used - 1, 0)
    total = used + k.shape[2]
    buffer_k[:, :, start : start + k.shape[2]] = k
    buffer_v[:, :, start : start + k.shape[2]] = v
    mask = torch.ones(k.shape[2], total, dtype=torch.bool).tril(used)
    return buffer_k[:, :, :total], buffer_v[:, :, :total], mask
""",
            hint=1,
            bug="Index of the last token taken for the number of tokens.",
        ),
        Mutant(
            name="a triangle from the top left corner",
            source="""
import torch


def extend_cache(buffer_k, buffer_v, used, k, v):
    new = k.shape[2]
    total = used + new
    buffer_k[:, :, used:total] = k
    buffer_v[:, :, used:total] = v
    mask = torch.ones(new, total, dtype=torch.bool).tril()
    return buffer_k[:, :, :total], buffer_v[:, :, :total], mask
""",
            hint=2,
            bug="What is_causal=True means to PyTorch (pytorch/pytorch#144858, onnx/onnx#8068).",
        ),
        Mutant(
            name="no mask among the new tokens",
            source="""
import torch


def extend_cache(buffer_k, buffer_v, used, k, v):
    new = k.shape[2]
    total = used + new
    buffer_k[:, :, used:total] = k
    buffer_v[:, :, used:total] = v
    mask = torch.ones(new, total, dtype=torch.bool)
    return buffer_k[:, :, :total], buffer_v[:, :, :total], mask
""",
            hint=2,
            bug="True for one new token, wrong for a chunk or a verified draft.",
        ),
        Mutant(
            name="one token of the future",
            source="""
import torch


def extend_cache(buffer_k, buffer_v, used, k, v):
    new = k.shape[2]
    total = used + new
    buffer_k[:, :, used:total] = k
    buffer_v[:, :, used:total] = v
    mask = torch.ones(new, total, dtype=torch.bool).tril(used + 1)
    return buffer_k[:, :, :total], buffer_v[:, :, :total], mask
""",
            hint=2,
            bug="Mask off by one.",
        ),
        Mutant(
            name="the buffers are never written",
            source="""
import torch


def extend_cache(buffer_k, buffer_v, used, k, v):
    keys = torch.cat([buffer_k[:, :, :used], k], dim=2)
    values = torch.cat([buffer_v[:, :, :used], v], dim=2)
    mask = torch.ones(k.shape[2], keys.shape[2], dtype=torch.bool).tril(used)
    return keys, values, mask
""",
            hint=3,
            bug="The first piece is right; every later one has forgotten those between.",
        ),
    ],
    "03.memory_bytes": [
        Mutant(
            name="query heads counted",
            source="""
def memory_bytes(config, context):
    kv_values = 2 * config.num_attention_heads * config.head_dim * context
    kv = config.pattern.count("*") * kv_values * 2
    conv = (config.conv_kernel - 1) * config.conv_dim * 2
    state = config.mamba_inner_size * config.ssm_state_size * 4
    return kv, config.pattern.count("M") * (conv + state)
""",
            hint=1,
            bug="A cache of repeated heads: what sharing was to save is spent again.",
        ),
        Mutant(
            name="every layer counted as attention",
            source="""
def memory_bytes(config, context):
    kv_values = 2 * config.num_key_value_heads * config.head_dim * context
    kv = config.num_layers * kv_values * 2
    conv = (config.conv_kernel - 1) * config.conv_dim * 2
    state = config.mamba_inner_size * config.ssm_state_size * 4
    return kv, config.pattern.count("M") * (conv + state)
""",
            hint=1,
            bug="A cache allocated for num_hidden_layers, which a hybrid does not need.",
        ),
        Mutant(
            name="values forgotten",
            source="""
def memory_bytes(config, context):
    kv_values = config.num_key_value_heads * config.head_dim * context
    kv = config.pattern.count("*") * kv_values * 2
    conv = (config.conv_kernel - 1) * config.conv_dim * 2
    state = config.mamba_inner_size * config.ssm_state_size * 4
    return kv, config.pattern.count("M") * (conv + state)
""",
            hint=1,
            bug="Keys without values: half.",
        ),
        Mutant(
            name="convolution without B and C",
            source="""
def memory_bytes(config, context):
    kv_values = 2 * config.num_key_value_heads * config.head_dim * context
    kv = config.pattern.count("*") * kv_values * 2
    conv = (config.conv_kernel - 1) * config.mamba_inner_size * 2
    state = config.mamba_inner_size * config.ssm_state_size * 4
    return kv, config.pattern.count("M") * (conv + state)
""",
            hint=2,
            bug="Convolution state of the wrong width (NVIDIA-NeMo/Nemotron#142).",
        ),
        Mutant(
            name="one tap too many",
            source="""
def memory_bytes(config, context):
    kv_values = 2 * config.num_key_value_heads * config.head_dim * context
    kv = config.pattern.count("*") * kv_values * 2
    conv = config.conv_kernel * config.conv_dim * 2
    state = config.mamba_inner_size * config.ssm_state_size * 4
    return kv, config.pattern.count("M") * (conv + state)
""",
            hint=2,
            bug="k slots where k-1 are needed: the current input is not a memory.",
        ),
        Mutant(
            name="the context capped",
            source="""
def memory_bytes(config, context):
    context = min(context, config.max_position_embeddings)
    kv_values = 2 * config.num_key_value_heads * config.head_dim * context
    kv = config.pattern.count("*") * kv_values * 2
    conv = (config.conv_kernel - 1) * config.conv_dim * 2
    state = config.mamba_inner_size * config.ssm_state_size * 4
    return kv, config.pattern.count("M") * (conv + state)
""",
            hint=3,
            bug="max_position_embeddings taken for a limit; Super is trained to four times that.",
        ),
    ],
}
