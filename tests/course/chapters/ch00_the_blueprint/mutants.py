"""Wrong answers to chapter 00's exercises, each a mistake that a real project shipped.

Issue and pull request numbers say where it was found or repaired. The reports were read, not
reproduced. The tests check that the graders refuse the same mistake and name a hint that helps.

Most mutants are the reference with one place changed (`changed`), so that nothing else differs.
"""

from __future__ import annotations

from nemotron_lite.course.exercises import exercise
from tests.course.chapters.mutants import Mutant


def changed(exercise_id: str, *edits: tuple[str, str]) -> str:
    """The reference of an exercise with some texts replaced, each of which must be there once."""
    source = exercise(exercise_id).solution
    for old, new in edits:
        if source.count(old) != 1:
            raise ValueError(f"{exercise_id} has {source.count(old)} times {old!r}; expected one.")
        source = source.replace(old, new)
    return source


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
    Mutant(
        name="a list of separators",
        source="""
def read_pattern(pattern):
    kinds = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
    places = {kind: [] for kind in kinds.values()}
    for i, letter in enumerate(pattern):
        if letter in "/|" or letter.islower():
            raise ValueError(letter)
        if letter in kinds:
            places[kinds[letter]].append(i)
    return places
""",
        hint=3,
        bug="only the separators known today are refused; a new kind of layer is skipped",
    ),
]

NORM = "00.normalize"
NORMALIZE = [
    Mutant(
        name="mean subtracted",
        source=changed(NORM, ("wide = x.float()", "wide = x.float() - x.float().mean(-1, True)")),
        hint=1,
        bug="a LayerNorm in the place of an RMSNorm: the mean is subtracted first",
    ),
    Mutant(
        name="sum of squares",
        source=changed(NORM, (".mean(-1, keepdim=True)", ".sum(-1, keepdim=True)")),
        hint=1,
        bug="the length of the row instead of its root mean square: too small by sqrt(d)",
    ),
    Mutant(
        name="one root for all rows",
        source=changed(NORM, (".mean(-1, keepdim=True)", ".mean()")),
        hint=1,
        bug="the statistics go over the whole batch, so a row depends on the other rows",
    ),
    Mutant(
        name="one plus weight",
        source=changed(NORM, ("weight * wide", "(1 + weight) * wide")),
        hint=1,
        bug="Gemma's convention, in which the stored weight is the difference to one",
    ),
    Mutant(
        name="eps outside the root",
        source=changed(NORM, ("torch.rsqrt(mean_square + eps)", "1 / (mean_square.sqrt() + eps)")),
        hint=2,
        bug="NVIDIA/TransformerEngine#364: tests and export added eps behind the root",
    ),
    Mutant(
        name="eps of one's own",
        source=changed(NORM, ("mean_square + eps", "mean_square + 1e-6")),
        hint=2,
        bug="apache/tvm#15856, huggingface/transformers#38025: a fixed eps, not the config's",
    ),
    Mutant(
        name="half precision throughout",
        source=changed(NORM, ("x.float()", "x")),
        hint=3,
        bug="pytorch/pytorch#133085: the square of a float16 number overflowed",
    ),
    Mutant(
        name="float32 comes back",
        source=changed(NORM, (".to(x.dtype)", "")),
        hint=3,
        bug="skyzh/tiny-llm#18: the result was not converted back to the dtype of x",
    ),
    Mutant(
        name="statistics without gradient",
        source=changed(NORM, ("wide.square()", "wide.detach().square()")),
        hint=3,
        bug="the root treated as a constant: the forward pass is right, the gradient is not",
    ),
    Mutant(
        name="in place",
        source=changed(NORM, ("return (weight * wide *", "return (wide.mul_(weight) *")),
        hint=3,
        bug="`.float()` returns x itself where x is float32, so the caller's tensor changes",
    ),
]

COUNT = "00.layer_parameters"
LAYER_PARAMETERS = [
    Mutant(
        name="query heads for keys",
        source=changed(
            COUNT,
            (
                "config.num_attention_heads + config.num_key_value_heads",
                "2 * config.num_attention_heads",
            ),
        ),
        hint=1,
        bug="k_proj and v_proj counted with the query heads, as in a model without shared heads",
    ),
    Mutant(
        name="no norms",
        source=changed(
            COUNT,
            (
                "3 * config.mamba_num_heads + inner + inner * d",
                "3 * config.mamba_num_heads + inner * d",
            ),
        ),
        hint=1,
        bug="the norm behind the gate is forgotten, a second norm of the layer",
    ),
    Mutant(
        name="convolution without bias",
        source=changed(COUNT, ("config.conv_kernel + 1", "config.conv_kernel")),
        hint=1,
        bug="the only linear bias of the model, that of the convolution, is forgotten",
    ),
    Mutant(
        name="gated experts",
        source=changed(
            COUNT,
            ("expert = 2 * config.moe", "expert = 3 * config.moe"),
        ),
        hint=2,
        bug="three matrices per expert, as in SwiGLU; squared ReLU has two (the opposite slip is "
        "allenai/open-instruct#1096)",
    ),
    Mutant(
        name="no selection bias",
        source=changed(COUNT, ("config.n_routed_experts * (d + 1)", "config.n_routed_experts * d")),
        hint=2,
        bug="FlagScale#411: a bias that nobody counted is one that nobody saves",
    ),
    Mutant(
        name="everything is active",
        source=changed(
            COUNT, ("config.num_experts_per_tok * expert", "config.n_routed_experts * expert")
        ),
        hint=2,
        bug="PrimeIntellect-ai/prime-rl#778: utilisation computed from total parameters",
    ),
    Mutant(
        name="a share of the whole layer",
        source=changed(
            COUNT,
            (
                "return stored, always + config.num_experts_per_tok * expert",
                "return stored, stored * config.num_experts_per_tok // config.n_routed_experts",
            ),
        ),
        hint=2,
        bug="the layer scaled by k/e, though router and shared expert are read whole",
    ),
    Mutant(
        name="no shared expert",
        source=changed(COUNT, ("if config.n_shared_experts:", "if False:")),
        hint=2,
        bug="the shared expert is forgotten (a planner that saw one MLP a layer: vllm-fit#27)",
    ),
    Mutant(
        name="no latent projections",
        source=changed(COUNT, ("if config.moe_latent_size is not None:", "if False:")),
        hint=3,
        bug="the projections into and out of the latent are forgotten",
    ),
    Mutant(
        name="experts at full width",
        source=changed(COUNT, ("* config.expert_size", "* d")),
        hint=3,
        bug="an expert counted at the wrong width (OpenSparseLLMs/Linear-MoE#17 took another field "
        "for it): Super would have four times its experts",
    ),
    Mutant(
        name="counts as floats",
        source=changed(
            COUNT,
            (
                "expert = 2 * config.moe_intermediate_size * config.expert_size",
                "expert = 2.0 * config.moe_intermediate_size * config.expert_size",
            ),
        ),
        hint=2,
        bug="counts kept as floats: sums of a large model in lower precision are no longer exact",
    ),
]

CACHE = "00.cache_bytes"
CACHE_BYTES = [
    Mutant(
        name="keys only",
        source=changed(CACHE, ("= 2 * config.num_key", "= config.num_key")),
        hint=1,
        bug="the values are forgotten: half of the cache",
    ),
    Mutant(
        name="every layer",
        source=changed(CACHE, ('len(places["attention"])', "len(config.pattern)")),
        hint=1,
        bug="NVIDIA/TensorRT-LLM#5371, inference-sim/inference-sim#1558: every layer of a hybrid "
        "was given keys and values",
    ),
    Mutant(
        name="query heads",
        source=changed(CACHE, ("config.num_key_value_heads", "config.num_attention_heads")),
        hint=2,
        bug="query heads for key-value heads: sixteen times too much for Super",
    ),
    Mutant(
        name="width over heads",
        source=changed(
            CACHE, ("config.head_dim", "(config.hidden_size // config.num_attention_heads)")
        ),
        hint=2,
        bug="vllm-project/vllm#2622, NVIDIA/Model-Optimizer#2482, LMCache/LMCache#688: head_dim "
        "computed though the config states it",
    ),
    Mutant(
        name="no states",
        source=changed(CACHE, ('len(places["mamba"]) * layer', "0")),
        hint=3,
        bug="ai-dynamo/aisimulate#176: the states of the Mamba layers were left out of the plan",
    ),
    Mutant(
        name="all taps",
        source=changed(CACHE, ("config.conv_kernel - 1", "config.conv_kernel")),
        hint=3,
        bug="as many inputs as the convolution has taps; the newest one need not be kept",
    ),
    Mutant(
        name="inputs of the inner width",
        source=changed(CACHE, ("* config.conv_dim", "* config.mamba_inner_size")),
        hint=3,
        bug="NVIDIA-NeMo/Nemotron#142: the convolution state had the inner width, without B and C",
    ),
    Mutant(
        name="always two bytes",
        source=changed(CACHE, ("keys_and_values * kv_bytes", "keys_and_values * 2")),
        hint=3,
        bug="the cache's own precision is ignored: FP8 keys and values priced as BF16",
    ),
    Mutant(
        name="a default follows the keys",
        source=changed(
            CACHE,
            (
                "inputs * conv_bytes",
                "inputs * (kv_bytes if conv_bytes == 2 else conv_bytes)",
            ),
        ),
        hint=3,
        bug="a precision that was not given is taken from the keys: FP8 keys shrink the inputs too",
    ),
]

PRICE = "00.decode_flops"
DECODE_FLOPS = [
    Mutant(
        name="a multiply-add is one",
        source=changed(PRICE, ("return 2 * read", "return read")),
        hint=1,
        bug="multiply-adds counted once: every speed comes out at half",
    ),
    Mutant(
        name="all parameters",
        source=changed(
            PRICE, ("layer_parameters(config, letter)[1]", "layer_parameters(config, letter)[0]")
        ),
        hint=1,
        bug="PrimeIntellect-ai/prime-rl#778: total instead of active parameters, utilisation far "
        "too good",
    ),
    Mutant(
        name="the lookup is charged",
        source=changed(PRICE, ("read = config.vocab_size", "read = 2 * config.vocab_size")),
        hint=2,
        bug="huggingface/trl#5698: the embedding table charged as a matrix product",
    ),
    Mutant(
        name="weights only",
        source=changed(PRICE, ("return 2 * read + attention + scan", "return 2 * read")),
        hint=3,
        bug="2N and nothing else: the price of a long context disappears",
    ),
    Mutant(
        name="key-value heads",
        source=changed(PRICE, ("config.num_attention_heads", "config.num_key_value_heads")),
        hint=3,
        bug="facebookresearch/xformers#1404: FLOPs of grouped queries counted with the KV heads",
    ),
    Mutant(
        name="attention everywhere",
        source=changed(
            PRICE,
            ('len(places["attention"])', "len(config.pattern)"),
            ("+ attention + scan", "+ attention"),
        ),
        hint=3,
        bug="a formula for Transformers (6N + 12·l·h·q·t) used on a hybrid: every layer pays for "
        "the context",
    ),
]

MODEL = "00.toy_model"
STEP = 'x + self.mixer(normalize(x, self.norm["weight"], self.eps))'
LAST = 'self.lm_head(normalize(x, self.backbone.norm_f["weight"], self.eps))'
TOY_MODEL = [
    Mutant(
        name="other names",
        source=changed(
            MODEL,
            ("self.mixer = kinds[letter](config)", "self.inner = kinds[letter](config)"),
            ("self.mixer(normalize", "self.inner(normalize"),
        ),
        hint=1,
        bug="vllm-project/vllm#53020: a weight under another name stays at its random values",
    ),
    Mutant(
        name="a head with a bias",
        source=changed(MODEL, ("config.vocab_size, bias=False)", "config.vocab_size)")),
        hint=1,
        bug="nn.Linear has a bias by default; the family has none",
    ),
    Mutant(
        name="tied head",
        source=changed(
            MODEL,
            (
                "config.vocab_size, bias=False)\n",
                "config.vocab_size, bias=False)\n"
                "        self.lm_head.weight = self.backbone.embeddings.weight\n",
            ),
        ),
        hint=1,
        bug="huggingface/transformers#42612, deepspeedai/DeepSpeed#4088: head and embedding tied "
        "though the checkpoint has two matrices",
    ),
    Mutant(
        name="the normalized input is passed on",
        source=changed(
            MODEL,
            (
                f"return {STEP}",
                'y = normalize(x, self.norm["weight"], self.eps)\n        return y + self.mixer(y)',
            ),
        ),
        hint=2,
        bug="Howuhh/faster-trajectory-transformer#3: norm(x) + attn(norm(x))",
    ),
    Mutant(
        name="no residual",
        source=changed(MODEL, (STEP, STEP.removeprefix("x + "))),
        hint=3,
        bug="the sum is forgotten: each layer replaces what came before",
    ),
    Mutant(
        name="norm behind the sum",
        source=changed(
            MODEL, (STEP, 'normalize(x + self.mixer(x), self.norm["weight"], self.eps)')
        ),
        hint=2,
        bug="the order of the first Transformers (post-norm)",
    ),
    Mutant(
        name="a fixed eps",
        source=changed(MODEL, (STEP, STEP.replace(", self.eps", ""))),
        hint=2,
        bug="huggingface/transformers#38025: eps of the config was not passed to the norm",
    ),
    Mutant(
        name="no final norm",
        source=changed(MODEL, (LAST, "self.lm_head(x)")),
        hint=3,
        bug="vllm-project/speculators#313: the head was applied to hidden states without the final "
        "norm",
    ),
    Mutant(
        name="the last layer first",
        source=changed(
            MODEL,
            ("for layer in self.backbone.layers:", "for layer in reversed(self.backbone.layers):"),
        ),
        hint=3,
        bug="layers applied in another order than they are numbered",
    ),
]

KERNEL = "00.triton_norm"
TRITON_NORM = [
    Mutant(
        name="every program the same row",
        source=changed(KERNEL, ("tl.load(x_row", "tl.load(x_ptr + channel")),
        hint=1,
        bug="the row is left out of the pointer: all rows get the first one's norm",
    ),
    Mutant(
        name="weight of another row",
        source=changed(KERNEL, ("weight_ptr + channel", "weight_ptr + row * size + channel")),
        hint=1,
        bug="the weight read as if it had rows: memory behind its end is read",
    ),
    Mutant(
        name="mean over the block",
        source=changed(KERNEL, ("axis=0) / size", "axis=0) / BLOCK")),
        hint=2,
        bug="triton-lang/triton#9838: places behind the end of the row count in the statistics",
    ),
    Mutant(
        name="half precision",
        source=changed(
            KERNEL,
            ("(x_row, mask=inside, other=0.0).to(tl.float32)", "(x_row, mask=inside, other=0.0)"),
        ),
        hint=3,
        bug="xlite-dev/LeetCUDA#335: squares of float16 numbers overflow in the kernel",
    ),
    Mutant(
        name="store without a mask",
        source=changed(
            KERNEL,
            (".to(out_ptr.dtype.element_ty), mask=inside)", ".to(out_ptr.dtype.element_ty))"),
        ),
        hint=2,
        bug="thu-ml/TurboDiffusion#103: a store ran over the end of its row",
    ),
]

PLAN = "00.longest_context"
LONGEST_CONTEXT = [
    Mutant(
        name="one embedding",
        source=changed(PLAN, ("weights = 2 * config.vocab_size", "weights = config.vocab_size")),
        hint=1,
        bug="embedding and head counted as one matrix, though they are not tied",
    ),
    Mutant(
        name="active parameters",
        source=changed(
            PLAN, ("layer_parameters(config, letter)[0]", "layer_parameters(config, letter)[1]")
        ),
        hint=1,
        bug="only the chosen experts are planned for; all of them must be in memory",
    ),
    Mutant(
        name="one state for all",
        source=changed(PLAN, ("- batch * constant", "- constant")),
        hint=2,
        bug="NVIDIA/TensorRT-LLM#5371: states were not counted for the size of the batch",
    ),
    Mutant(
        name="a negative context",
        source=changed(PLAN, ("    if left < 0:\n        return -1\n", "")),
        hint=3,
        bug="a plan without a test for too little memory promises a negative number of tokens",
    ),
    Mutant(
        name="divided by zero",
        source=changed(PLAN, (" if per_token else None", "")),
        hint=3,
        bug="jundot/omlx#2912: a model without attention layers had an estimate of zero per token",
    ),
]

MUTANTS = {
    "00.read_pattern": READ_PATTERN,
    NORM: NORMALIZE,
    COUNT: LAYER_PARAMETERS,
    CACHE: CACHE_BYTES,
    PRICE: DECODE_FLOPS,
    MODEL: TOY_MODEL,
    KERNEL: TRITON_NORM,
    PLAN: LONGEST_CONTEXT,
}
