"""Wrong answers to chapter 00's exercises, each a mistake that a real project shipped.

Issue and pull request numbers say where it was found or repaired. The reports were read, not
reproduced. The tests check that the graders refuse the same mistake and name a hint that helps.
"""

from __future__ import annotations

from tests.course.chapters.mutants import Mutant

IMPORTS = "from nemotron_lite import NemotronConfig, ledger\n\n\n"

READ_PATTERN = [
    Mutant(
        name="the first layer is number one",
        source="""
def read_pattern(pattern):
    kinds = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
    places = {kind: [] for kind in kinds.values()}
    for i, letter in enumerate(pattern, start=1):
        if letter not in kinds:
            raise ValueError(letter)
        places[kinds[letter]].append(i)
    return places
""",
        hint=1,
        bug="counting from one: every anchor and every checkpoint name is off by a layer",
    ),
    Mutant(
        name="only kinds that occur",
        source="""
def read_pattern(pattern):
    kinds = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
    places = {}
    for i, letter in enumerate(pattern):
        if letter not in kinds:
            raise ValueError(letter)
        places.setdefault(kinds[letter], []).append(i)
    return places
""",
        hint=1,
        bug="a model without one kind of layer crashes the code that asks for it",
    ),
    Mutant(
        name="no dense MLP",
        source="""
def read_pattern(pattern):
    kinds = {"M": "mamba", "*": "attention", "E": "moe"}
    places = {kind: [] for kind in (*kinds.values(), "mlp")}
    for i, letter in enumerate(pattern):
        places[kinds[letter]].append(i)
    return places
""",
        hint=2,
        bug="huggingface/transformers#45300: the parser knew no '-' and died with KeyError",
    ),
    Mutant(
        name="everything else is an MLP",
        source="""
def read_pattern(pattern):
    kinds = {"M": "mamba", "*": "attention", "E": "mlp", "-": "mlp"}
    places = {kind: [] for kind in ("mamba", "attention", "moe", "mlp")}
    for i, letter in enumerate(pattern):
        if letter not in kinds:
            raise ValueError(letter)
        places[kinds[letter]].append(i)
    return places
""",
        hint=2,
        bug="a reader from before mixtures takes E for a dense MLP",
    ),
    Mutant(
        name="unknown letters are skipped",
        source="""
def read_pattern(pattern):
    kinds = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
    places = {kind: [] for kind in kinds.values()}
    known = [letter for letter in pattern if letter in kinds]
    for i, letter in enumerate(known):
        places[kinds[letter]].append(i)
    return places
""",
        hint=3,
        bug="NVIDIA-NeMo/Megatron-Bridge#4129, NVIDIA/Model-Optimizer#2061: behind '/' stands the "
        "MTP module, and its layers were taken for the backbone's",
    ),
]

MOE_PARAMETERS = [
    Mutant(
        name="gated experts",
        source=IMPORTS
        + """def moe_parameters(config):
    d, f = config.hidden_size, config.moe_intermediate_size
    width = config.moe_latent_size or d
    always = d + config.n_routed_experts * (d + 1)
    if config.moe_latent_size is not None:
        always += 2 * d * config.moe_latent_size
    if config.n_shared_experts:
        always += 3 * d * config.moe_shared_expert_intermediate_size
    expert = 3 * f * width
    stored = always + config.n_routed_experts * expert
    return stored, always + config.num_experts_per_tok * expert
""",
        hint=1,
        bug="three matrices per expert, as in SwiGLU; squared ReLU has two (the opposite slip is "
        "allenai/open-instruct#1096)",
    ),
    Mutant(
        name="no router",
        source=IMPORTS
        + """def moe_parameters(config):
    d, f = config.hidden_size, config.moe_intermediate_size
    width = config.moe_latent_size or d
    always = d
    if config.moe_latent_size is not None:
        always += 2 * d * config.moe_latent_size
    if config.n_shared_experts:
        always += 2 * d * config.moe_shared_expert_intermediate_size
    expert = 2 * f * width
    stored = always + config.n_routed_experts * expert
    return stored, always + config.num_experts_per_tok * expert
""",
        hint=1,
        bug="the router and its selection bias are forgotten; a bias that nobody counted is one "
        "that nobody saves (FlagScale#411)",
    ),
    Mutant(
        name="everything is active",
        source=IMPORTS
        + """def moe_parameters(config):
    d, f = config.hidden_size, config.moe_intermediate_size
    width = config.moe_latent_size or d
    always = d + config.n_routed_experts * (d + 1)
    if config.moe_latent_size is not None:
        always += 2 * d * config.moe_latent_size
    if config.n_shared_experts:
        always += 2 * d * config.moe_shared_expert_intermediate_size
    stored = always + config.n_routed_experts * 2 * f * width
    return stored, stored
""",
        hint=2,
        bug="PrimeIntellect-ai/prime-rl#778: utilisation computed from total parameters",
    ),
    Mutant(
        name="a share of the whole layer",
        source=IMPORTS
        + """def moe_parameters(config):
    d, f = config.hidden_size, config.moe_intermediate_size
    width = config.moe_latent_size or d
    stored = d + config.n_routed_experts * (d + 1 + 2 * f * width)
    if config.moe_latent_size is not None:
        stored += 2 * d * config.moe_latent_size
    if config.n_shared_experts:
        stored += 2 * d * config.moe_shared_expert_intermediate_size
    return stored, stored * config.num_experts_per_tok // config.n_routed_experts
""",
        hint=2,
        bug="the layer scaled by k/e, though router and shared expert are read whole",
    ),
    Mutant(
        name="no shared expert",
        source=IMPORTS
        + """def moe_parameters(config):
    d, f = config.hidden_size, config.moe_intermediate_size
    width = config.moe_latent_size or d
    always = d + config.n_routed_experts * (d + 1)
    if config.moe_latent_size is not None:
        always += 2 * d * config.moe_latent_size
    expert = 2 * f * width
    stored = always + config.n_routed_experts * expert
    return stored, always + config.num_experts_per_tok * expert
""",
        hint=2,
        bug="the shared expert is forgotten (a planner that saw one MLP a layer: vllm-fit#27)",
    ),
    Mutant(
        name="no latent projections",
        source=IMPORTS
        + """def moe_parameters(config):
    d, f = config.hidden_size, config.moe_intermediate_size
    width = config.moe_latent_size or d
    always = d + config.n_routed_experts * (d + 1)
    if config.n_shared_experts:
        always += 2 * d * config.moe_shared_expert_intermediate_size
    expert = 2 * f * width
    stored = always + config.n_routed_experts * expert
    return stored, always + config.num_experts_per_tok * expert
""",
        hint=3,
        bug="the projections into and out of the latent are forgotten",
    ),
    Mutant(
        name="experts at full width",
        source=IMPORTS
        + """def moe_parameters(config):
    d, f = config.hidden_size, config.moe_intermediate_size
    always = d + config.n_routed_experts * (d + 1)
    if config.moe_latent_size is not None:
        always += 2 * d * config.moe_latent_size
    if config.n_shared_experts:
        always += 2 * d * config.moe_shared_expert_intermediate_size
    expert = 2 * f * d
    stored = always + config.n_routed_experts * expert
    return stored, always + config.num_experts_per_tok * expert
""",
        hint=3,
        bug="an expert counted at the wrong width (OpenSparseLLMs/Linear-MoE#17 took another field "
        "for it): Super would have four times its experts",
    ),
]

KV_BYTES = [
    Mutant(
        name="keys only",
        source=IMPORTS
        + """def kv_bytes_per_token(config, bytes_per_value=2):
    layers = config.pattern.count("*")
    return layers * config.num_key_value_heads * config.head_dim * bytes_per_value
""",
        hint=1,
        bug="the values are forgotten: half of the cache",
    ),
    Mutant(
        name="every layer",
        source=IMPORTS
        + """def kv_bytes_per_token(config, bytes_per_value=2):
    return config.num_layers * 2 * config.num_key_value_heads * config.head_dim * bytes_per_value
""",
        hint=1,
        bug="NVIDIA/TensorRT-LLM#5371: every layer of a hybrid was given keys and values",
    ),
    Mutant(
        name="query heads",
        source=IMPORTS
        + """def kv_bytes_per_token(config, bytes_per_value=2):
    layers = config.pattern.count("*")
    return layers * 2 * config.num_attention_heads * config.head_dim * bytes_per_value
""",
        hint=2,
        bug="query heads for key-value heads: sixteen times too much for Super",
    ),
    Mutant(
        name="width over heads",
        source=IMPORTS
        + """def kv_bytes_per_token(config, bytes_per_value=2):
    head = config.hidden_size // config.num_attention_heads
    return config.pattern.count("*") * 2 * config.num_key_value_heads * head * bytes_per_value
""",
        hint=3,
        bug="vllm-project/vllm#2622, NVIDIA/Model-Optimizer#2482, LMCache/LMCache#688: head_dim "
        "computed though the config states it",
    ),
    Mutant(
        name="always two bytes",
        source=IMPORTS
        + """def kv_bytes_per_token(config, bytes_per_value=2):
    return config.pattern.count("*") * 2 * config.num_key_value_heads * config.head_dim * 2
""",
        hint=3,
        bug="the cache's own precision is ignored: FP8 keys and values priced as BF16",
    ),
]

DECODE_FLOPS = [
    Mutant(
        name="a multiply-add is one",
        source=IMPORTS
        + """def decode_flops(config, context):
    weights = ledger.parameters(config).active_without_embedding
    queries = config.num_attention_heads * config.head_dim
    attention = 2 * 2 * queries * (context + 1)
    scan = 5 * config.mamba_inner_size * config.ssm_state_size
    layers = config.pattern.count
    return weights + layers("*") * attention + layers("M") * scan
""",
        hint=1,
        bug="multiply-adds counted once: every speed comes out at half",
    ),
    Mutant(
        name="all weights",
        source=IMPORTS
        + """def decode_flops(config, context):
    weights = ledger.parameters(config).total
    queries = config.num_attention_heads * config.head_dim
    attention = 2 * 2 * queries * (context + 1)
    scan = 5 * config.mamba_inner_size * config.ssm_state_size
    layers = config.pattern.count
    return 2 * weights + layers("*") * attention + layers("M") * scan
""",
        hint=1,
        bug="PrimeIntellect-ai/prime-rl#778: total instead of active parameters, utilisation far "
        "too good",
    ),
    Mutant(
        name="the lookup is charged",
        source=IMPORTS
        + """def decode_flops(config, context):
    weights = ledger.parameters(config).active
    queries = config.num_attention_heads * config.head_dim
    attention = 2 * 2 * queries * (context + 1)
    scan = 5 * config.mamba_inner_size * config.ssm_state_size
    layers = config.pattern.count
    return 2 * weights + layers("*") * attention + layers("M") * scan
""",
        hint=2,
        bug="huggingface/trl#5698: the embedding table charged as a matrix product",
    ),
    Mutant(
        name="weights only",
        source=IMPORTS
        + """def decode_flops(config, context):
    return 2 * ledger.parameters(config).active_without_embedding
""",
        hint=3,
        bug="2N and nothing else: the price of a long context disappears",
    ),
    Mutant(
        name="key-value heads",
        source=IMPORTS
        + """def decode_flops(config, context):
    weights = ledger.parameters(config).active_without_embedding
    heads = config.num_key_value_heads * config.head_dim
    attention = 2 * 2 * heads * (context + 1)
    scan = 5 * config.mamba_inner_size * config.ssm_state_size
    layers = config.pattern.count
    return 2 * weights + layers("*") * attention + layers("M") * scan
""",
        hint=3,
        bug="facebookresearch/xformers#1404: FLOPs of grouped queries counted with the KV heads",
    ),
    Mutant(
        name="attention everywhere",
        source=IMPORTS
        + """def decode_flops(config, context):
    weights = ledger.parameters(config).active_without_embedding
    queries = config.num_attention_heads * config.head_dim
    attention = 2 * 2 * queries * (context + 1)
    return 2 * weights + config.num_layers * attention
""",
        hint=3,
        bug="a formula for Transformers (6N + 12·l·h·q·t) used on a hybrid: every layer pays for "
        "the context",
    ),
]

MUTANTS = {
    "00.read_pattern": READ_PATTERN,
    "00.moe_parameters": MOE_PARAMETERS,
    "00.kv_bytes": KV_BYTES,
    "00.decode_flops": DECODE_FLOPS,
}
