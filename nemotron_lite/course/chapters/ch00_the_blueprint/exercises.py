"""Chapter 00's exercises: read a pattern, count a mixture, compute what a token costs.

    00.read_pattern    a model is a string
    00.moe_parameters  what a mixture stores, and what a token reads of it
    00.kv_bytes        what a token leaves behind in the attention layers
    00.decode_flops    what the next token costs

Four functions of a config with a few lines of arithmetic each. Production code got each of them
wrong: memory planners that counted a KV cache for every layer of a hybrid, throughput meters that
counted experts which no token read, readers that knew three of the four letters. The checks are in
`checks.py`; the mistakes that they have to catch are in
`tests/course/chapters/ch00_the_blueprint/mutants.py`.

Left out: FLOPs of training and of a prompt in chunks, which are `ledger.flops` with another mode.
"""

from __future__ import annotations

from nemotron_lite.course.chapters.ch00_the_blueprint import checks
from nemotron_lite.course.exercises import Check, Exercise

READ_PATTERN = Exercise(
    id="00.read_pattern",
    title="Read a pattern",
    objective="O1: read a model from its pattern string.",
    minutes=5,
    difficulty=1,
    points=3,
    task="""A model of this family is a string. Write the function that reads it: where does each
kind of layer stand?

`M` is `"mamba"`, `*` is `"attention"`, `E` is `"moe"` and `-` is `"mlp"`. A string from another
program may hold other signs (Megatron writes `|` between pipeline stages, and the MTP module behind
a `/`). Refuse them: a reader that skips what it does not know builds a different model and says
nothing.""",
    stub='''def read_pattern(pattern: str) -> dict[str, list[int]]:
    """Where each kind of layer stands.

    Args:
        pattern: one letter a layer: M mamba, * attention, E moe, - mlp.

    Returns:
        {"mamba": [...], "attention": [...], "moe": [...], "mlp": [...]}: positions, the first
        layer is 0. A kind that does not occur has an empty list.

    Raises:
        ValueError: any other letter.
    """
    raise NotImplementedError
''',
    solution='''def read_pattern(pattern: str) -> dict[str, list[int]]:
    """Where each kind of layer stands."""
    kinds = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
    places: dict[str, list[int]] = {kind: [] for kind in kinds.values()}
    for i, letter in enumerate(pattern):
        if letter not in kinds:
            raise ValueError(f"{letter!r} at {i} is none of {', '.join(kinds)}.")
        places[kinds[letter]].append(i)
    return places
''',
    hints=(
        "Start from a dict with four empty lists, so that a kind that does not occur is there too. "
        "Then go over the letters with `enumerate`, which counts from 0 as the published "
        "positions do.",
        "`E` and `-` are different layers: a mixture of experts and a dense MLP. Keep a dict from "
        'letter to kind: `{"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}`.',
        "Before you look a letter up, test that it is there: `if letter not in kinds: raise "
        'ValueError(f"{letter!r} is not a layer")`. That covers `/`, `|` and lower-case letters.',
    ),
    checks=(
        Check("places, counted from 0", checks.places, hint=1, points=1),
        Check("all four letters, and Super", checks.all_four_letters, hint=2, points=1),
        Check("letters of another program", checks.foreign_letters, hint=3, points=1),
    ),
)


MOE_PARAMETERS = Exercise(
    id="00.moe_parameters",
    title="Count a mixture",
    objective="O2: count what a layer stores, and what one token reads.",
    minutes=12,
    difficulty=2,
    points=5,
    task="""Count one `E` layer from its config: how many numbers it stores, and how many of them
one token reads. Count everything `show_source(layers.MoE)` creates, the router's selection bias
included, and the weight of the norm in front of the layer.

Both must be exact integers. The same function has to work with and without a latent
(`moe_latent_size=None`), and with and without a shared expert.""",
    stub='''from nemotron_lite import NemotronConfig


def moe_parameters(config: NemotronConfig) -> tuple[int, int]:
    """Parameters of one mixture-of-experts layer.

    Args:
        config: sizes d hidden_size, e n_routed_experts, k num_experts_per_tok,
            f moe_intermediate_size, l moe_latent_size (None: no latent, experts work at width d),
            s moe_shared_expert_intermediate_size (counts only if n_shared_experts is 1).

    Returns:
        (stored, read): numbers the layer stores, and numbers one token reads.
    """
    raise NotImplementedError
''',
    solution='''def moe_parameters(config: NemotronConfig) -> tuple[int, int]:
    """Parameters of one mixture-of-experts layer."""
    d, f = config.hidden_size, config.moe_intermediate_size
    width = config.moe_latent_size or d
    always = d  # the norm in front
    always += config.n_routed_experts * (d + 1)  # router and its selection bias
    if config.moe_latent_size is not None:
        always += 2 * d * config.moe_latent_size
    if config.n_shared_experts:
        always += 2 * d * config.moe_shared_expert_intermediate_size
    expert = 2 * f * width
    stored = always + config.n_routed_experts * expert
    return stored, always + config.num_experts_per_tok * expert
''',
    hints=(
        "Make a list first. Norm: d. Router: one row of d per expert, plus one bias per expert. "
        "Experts: how many matrices has one? Squared ReLU has no gate, so it is an up and a down "
        "projection, and no third.",
        "Split the list in two: what every token reads, and what only chosen tokens read. The "
        "second is the routed experts and nothing else: a token reads k of e. The router is read "
        "whole (that is how it chooses), and so is the shared expert, 2·d·s at full width.",
        "With a latent, an expert is 2·f·l instead of 2·f·d, and two projections of d·l each lead "
        "in and out; every token reads both. So `always = d + e*(d+1) + 2*d*l + 2*d*s` and "
        "`stored = always + e*2*f*l`.",
    ),
    checks=(
        Check("a mixture without extras: stored", checks.plain_stored, hint=1, points=1),
        Check("a mixture without extras: read", checks.plain_read, hint=2, points=1),
        Check("a shared expert", checks.with_shared, hint=2, points=1),
        Check("a latent", checks.with_latent, hint=3, points=1),
        Check("Nano and Super", checks.published_mixtures, hint=3, points=1),
    ),
)


KV_BYTES = Exercise(
    id="00.kv_bytes",
    title="What a token leaves behind",
    objective="O3: say how many bytes a conversation occupies.",
    minutes=6,
    difficulty=2,
    points=5,
    task="""Every token leaves a key and a value in each attention layer, and they stay until the
conversation ends. How many bytes is that, for the whole model?""",
    stub='''from nemotron_lite import NemotronConfig


def kv_bytes_per_token(config: NemotronConfig, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values that one token adds, over all layers.

    Args:
        config: its pattern says which layers are attention (*).
        bytes_per_value: 2 for BF16, 1 for FP8.
    """
    raise NotImplementedError
''',
    solution='''def kv_bytes_per_token(config: NemotronConfig, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values that one token adds, over all layers."""
    layers = config.pattern.count("*")
    return layers * 2 * config.num_key_value_heads * config.head_dim * bytes_per_value
''',
    hints=(
        "Two things are kept, a key and a value. Which layers keep them? "
        '`config.pattern.count("*")` of them; Mamba layers keep a state instead, which does not '
        "grow.",
        "A query is used once and thrown away. What is kept has `num_key_value_heads` heads; "
        "several query heads share each.",
        "A head has `config.head_dim` values. Do not compute that as `hidden_size // "
        "num_attention_heads`: it happens to agree for Super and does not for Nano. "
        "layers · 2 · KV heads · head_dim · bytes_per_value.",
    ),
    checks=(
        Check("keys and values", checks.keys_and_values, hint=1, points=1),
        Check("attention layers only", checks.only_attention_layers, hint=1, points=1),
        Check("shared heads", checks.shared_heads, hint=2, points=1),
        Check("heads of their own width", checks.own_head_width, hint=3, points=1),
        Check("Super, in two and in one byte", checks.other_bytes, hint=3, points=1),
    ),
)


DECODE_FLOPS = Exercise(
    id="00.decode_flops",
    title="What the next token costs",
    objective="O4: price the arithmetic of the next token.",
    minutes=15,
    difficulty=3,
    points=5,
    task="""How much arithmetic is one more token, after `context` tokens? A multiply-add counts as
two. Three terms are enough to come within two percent:

1. every weight the token reads is used in one multiply-add,
2. every attention layer compares one query with each key and adds up as many values,
3. every Mamba layer updates its state and reads it: 5 operations for each of its h·p·n numbers.

`ledger.parameters(config)` may be used; `ledger.flops` would be the answer.""",
    stub='''from nemotron_lite import NemotronConfig, ledger


def decode_flops(config: NemotronConfig, context: int) -> float:
    """FLOPs of the token after `context` others, to within two percent.

    Args:
        config: sizes. Attention has num_attention_heads query heads of head_dim; a Mamba layer's
            state has mamba_inner_size (h*p) times ssm_state_size (n) numbers.
        context: tokens already read. The new one attends to them and to itself.
    """
    raise NotImplementedError
''',
    solution='''def decode_flops(config: NemotronConfig, context: int) -> float:
    """FLOPs of the token after `context` others, to within two percent."""
    weights = ledger.parameters(config).active_without_embedding
    queries = config.num_attention_heads * config.head_dim
    attention = 2 * 2 * queries * (context + 1)
    scan = 5 * config.mamba_inner_size * config.ssm_state_size
    layers = config.pattern.count
    return 2 * weights + layers("*") * attention + layers("M") * scan
''',
    hints=(
        "A token multiplies only with the weights it reads. `ledger.parameters(config)` has "
        "`total`, and several kinds of `active`. Each weight is one multiply-add, so two FLOPs.",
        "Looking up a row of the embedding table is not arithmetic, however large the table is: "
        "`active_without_embedding`. The head at the end is a matrix product and counts.",
        "Attention and scan also compute without weights. Per attention layer "
        "2·2·h·p·(context+1), with h the *query* heads: sharing keys and values saves memory, not "
        "arithmetic. Per Mamba layer "
        '`5 * config.mamba_inner_size * config.ssm_state_size`. `config.pattern.count("*")` and '
        '`.count("M")` say how many there are.',
    ),
    checks=(
        Check("weights that are read", checks.weights_that_are_read, hint=1, points=1),
        Check("a lookup is not arithmetic", checks.no_arithmetic_in_a_lookup, hint=2, points=1),
        Check("the scan", checks.the_scan, hint=3, points=1),
        Check("every query head", checks.every_query_head, hint=3, points=1),
        Check("Super", checks.published_prices, hint=3, points=1),
    ),
)

EXERCISES: tuple[Exercise, ...] = (READ_PATTERN, MOE_PARAMETERS, KV_BYTES, DECODE_FLOPS)
