"""Chapter 00's exercises: the ledger of a model from its config, and a three-layer model.

    00.read_pattern      a model is a string
    00.normalize         RMSNorm, the first function with a gradient
    00.layer_parameters  what a layer stores, and what one token reads of it
    00.cache_bytes       what a token adds to the cache, and what is constant
    00.decode_flops      the arithmetic of the next token
    00.toy_model         embedding, residual layers, norm and head: the class of the chapter
    00.triton_norm       RMSNorm of a row, as a first kernel (optional)
    00.longest_context   the longest context that fits into a memory (stretch)

The four functions of a config make up a ledger. Production code got each of them wrong: memory
planners that counted a KV cache for every layer of a hybrid, throughput meters that counted experts
which no token read, readers that knew three of the four letters. `ToyModel` takes the package's
mixers as they are; chapters 01 to 03 build them. The checks are in `checks.py`; the mistakes that
they have to catch are in `tests/course/chapters/ch00_the_blueprint/mutants.py`.

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
    task="""Return the positions of each kind of layer. The first layer has position 0.

`M` is `"mamba"`, `*` is `"attention"`, `E` is `"moe"` and `-` is `"mlp"` (a dense feed-forward
layer, which Super does not use). Strings of other programs may hold other characters: Megatron
writes `|` between pipeline stages. Raise `ValueError` for them. A reader that skips what it does
not know builds a different model without a warning.""",
    stub='''def read_pattern(pattern: str) -> dict[str, list[int]]:
    """Positions of each kind of layer.

    Args:
        pattern: one letter a layer: M mamba, * attention, E moe, - mlp.

    Returns:
        {"mamba": [...], "attention": [...], "moe": [...], "mlp": [...]}: positions, from 0.
        A kind that does not occur has an empty list.

    Raises:
        ValueError: any other letter.
    """
    raise NotImplementedError
''',
    solution='''def read_pattern(pattern: str) -> dict[str, list[int]]:
    """Positions of each kind of layer."""
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
        "Then go over the letters with `enumerate`, which counts from 0.",
        "`E` and `-` are different layers: a mixture of experts and a dense MLP. Keep a dict from "
        'letter to kind: `{"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}`.',
        "Before you look a letter up, test that it is there: `if letter not in kinds: raise "
        'ValueError(f"{letter!r} is not a layer")`. That covers `/`, `|` and lower-case letters.',
    ),
    checks=(
        Check("positions, counted from 0", checks.places, hint=1, points=1),
        Check("all four letters, and Super", checks.all_four_letters, hint=2, points=1),
        Check("characters of another program", checks.foreign_letters, hint=3, points=1),
    ),
)


NORMALIZE = Exercise(
    id="00.normalize",
    title="RMSNorm",
    objective="O2: write RMSNorm, and say why each layer begins with it.",
    minutes=10,
    difficulty=2,
    points=6,
    task=r"""Write the norm that stands in front of every mixer. Each row of $d$ numbers is divided
by its root mean square, and each channel is multiplied by a learned weight:

$$y_i=w_i\,\frac{x_i}{\sqrt{\frac{1}{d}\sum_jx_j^2+\epsilon}}$$

The mean goes over the last axis only. $\epsilon$ (`eps`) stands under the root. Compute in float32
and return the dtype of `x`: in float16 the square of 300 is already infinite. Use operations that
autograd knows; then the gradient needs no code of yours.""",
    stub='''import torch


def normalize(x, weight, eps=1e-5):
    """RMSNorm of each row.

    Args:
        x: any shape that ends in d; float32, bfloat16 or float16. It belongs to the caller.
        weight: one factor per channel, d.
        eps: added to the mean square.

    Returns:
        The shape and the dtype of x.
    """
    raise NotImplementedError
''',
    solution='''import torch


def normalize(x, weight, eps=1e-5):
    """RMSNorm of each row."""
    wide = x.float()
    mean_square = wide.square().mean(-1, keepdim=True)
    return (weight * wide * torch.rsqrt(mean_square + eps)).to(x.dtype)
''',
    hints=(
        "Only the mean of the squares is needed, and no mean is subtracted. "
        "`.mean(-1, keepdim=True)` gives one number per row, which broadcasts against x. Multiply "
        "by `weight` as it is, not by 1 + weight.",
        "`torch.rsqrt(v)` is $1 / \\sqrt{v}$. Add `eps` to the mean square before you take the "
        "root, and use the `eps` that was passed in.",
        "Begin with `wide = x.float()`, compute everything with `wide`, and end with "
        "`.to(x.dtype)`. Work on new tensors: `x /= …` changes the caller's tensor. `.detach()` or "
        "`torch.no_grad()` would remove a part of the gradient.",
    ),
    checks=(
        Check("two rows by hand", checks.rows_by_hand, hint=1, points=1),
        Check("one root mean square per row", checks.rows_apart, hint=1, points=1),
        Check("eps and the weight", checks.eps_and_weight, hint=2, points=1),
        Check("half precision", checks.half_precision, hint=3, points=1),
        Check("gradients of x and of the weight", checks.norm_gradients, hint=3, points=1),
        Check("one channel, strided input, x unchanged", checks.norm_edges, hint=3, points=1),
    ),
)


LAYER_PARAMETERS = Exercise(
    id="00.layer_parameters",
    title="Count a layer",
    objective="O3: count what a layer stores, and what one token reads.",
    minutes=15,
    difficulty=3,
    points=7,
    task="""Count one layer from its config: how many numbers it stores, and how many of them one
token reads. Both must be exact integers. These are the tensors, with the letters of the symbol
table:

- every layer: the weight of its norm, d.
- `M`: `in_proj` (2hp+2gn+h)×d; a convolution with k taps and one bias for each of its hp+2gn
  channels; `A_log`, `D` and `dt_bias` of h each; a second norm of hp; `out_proj` d×hp.
- `*`: `q_proj` hp×d and `o_proj` d×hp, with h query heads; `k_proj` and `v_proj` jp×d each.
- `E`: a router e×d, and one selection bias per expert (it balances their use); latent projections
  l×d and d×l; e experts, each f×l and l×f; one shared expert, s×d and d×s.

A token reads all of a layer, except the experts that it does not choose. Without a latent
(`moe_latent_size=None`) there are no latent projections and the experts work at width d;
`config.expert_size` is l or d accordingly. The shared expert is there if `n_shared_experts` is
1.""",
    stub='''from nemotron_lite import NemotronConfig


def layer_parameters(config: NemotronConfig, letter: str) -> tuple[int, int]:
    """Parameters of one layer.

    Args:
        config: d hidden_size. M: hp mamba_inner_size, h mamba_num_heads, k conv_kernel,
            hp + 2gn conv_dim, 2hp + 2gn + h mamba_in_proj_size. *: h num_attention_heads,
            j num_key_value_heads, p head_dim. E: e n_routed_experts, k num_experts_per_tok,
            f moe_intermediate_size, l expert_size, s moe_shared_expert_intermediate_size.
        letter: "M", "*" or "E".

    Returns:
        (stored, read): numbers that the layer stores, and numbers that one token reads.
    """
    raise NotImplementedError
''',
    solution='''from nemotron_lite import NemotronConfig


def layer_parameters(config: NemotronConfig, letter: str) -> tuple[int, int]:
    """Parameters of one layer."""
    d, inner = config.hidden_size, config.mamba_inner_size
    if letter == "M":
        always = d * config.mamba_in_proj_size + config.conv_dim * (config.conv_kernel + 1)
        always += 3 * config.mamba_num_heads + inner + inner * d
        return d + always, d + always
    if letter == "*":
        heads = config.num_attention_heads + config.num_key_value_heads
        always = 2 * d * heads * config.head_dim
        return d + always, d + always
    always = d + config.n_routed_experts * (d + 1)
    if config.moe_latent_size is not None:
        always += 2 * d * config.moe_latent_size
    if config.n_shared_experts:
        always += 2 * d * config.moe_shared_expert_intermediate_size
    expert = 2 * config.moe_intermediate_size * config.expert_size
    stored = always + config.n_routed_experts * expert
    return stored, always + config.num_experts_per_tok * expert
''',
    hints=(
        "Begin with `*`: four matrices and the norm. `q_proj` and `o_proj` have as many numbers as "
        "each other, and so have `k_proj` and `v_proj`, but these two use the key-value heads. "
        "Then `M`, tensor by tensor, in the order of the table.",
        "For `E`, split the list in two: what every token reads, and what only its chosen experts "
        "hold. The second is the routed experts and nothing else: a token reads k of e. The router "
        "is read whole, because it compares all experts, and so is the shared expert. An expert "
        "has two matrices, up and down: squared ReLU has no gate.",
        "With a latent, `always = d + e*(d+1) + 2*d*l + 2*d*s` and `stored = always + e*2*f*l`, "
        "`read = always + k*2*f*l`. Test `config.moe_latent_size is not None` before you add the "
        "two projections, and `config.n_shared_experts` before you add the shared expert.",
    ),
    checks=(
        Check("attention", checks.attention_parameters, hint=1, points=1),
        Check("Mamba-2", checks.mamba_parameters, hint=1, points=1),
        Check("a mixture without extras: stored", checks.plain_stored, hint=2, points=1),
        Check("a mixture without extras: read", checks.plain_read, hint=2, points=1),
        Check("a shared expert", checks.with_shared, hint=2, points=1),
        Check("a latent", checks.with_latent, hint=3, points=1),
        Check("Nano and Super", checks.published_layers, hint=3, points=1),
    ),
)


CACHE_BYTES = Exercise(
    id="00.cache_bytes",
    title="What a sequence keeps",
    objective="O4: say how many bytes a sequence keeps, and in which layers.",
    minutes=10,
    difficulty=2,
    points=6,
    needs=("00.read_pattern",),
    task="""Two kinds of layers have a cache:

- **attention** keeps a key and a value of every token, each of j heads of p numbers;
- **Mamba-2** keeps a state of h·p·n numbers, and the last k-1 inputs of its convolution, each of
  hp+2gn numbers. Both are overwritten with every token, so their size is constant.

Return the bytes that each further token adds, and the bytes that are constant, for the whole model.
`read_pattern` may be called.""",
    stub='''from nemotron_lite import NemotronConfig


def cache_bytes(config, kv_bytes=2, conv_bytes=2, state_bytes=4) -> tuple[int, int]:
    """Bytes that one sequence keeps, over all layers: per token, and constant.

    Args:
        config: the pattern; j num_key_value_heads and p head_dim of attention; h mamba_num_heads,
            p mamba_head_dim, n ssm_state_size, k conv_kernel and hp + 2gn conv_dim of Mamba-2.
        kv_bytes: bytes of one number in keys and values; 2 for BF16.
        conv_bytes: of one input of the convolution.
        state_bytes: of one number in a state; 4 for float32.

    Returns:
        (per_token, constant).
    """
    raise NotImplementedError
''',
    solution='''from nemotron_lite import NemotronConfig


def cache_bytes(config, kv_bytes=2, conv_bytes=2, state_bytes=4) -> tuple[int, int]:
    """Bytes that one sequence keeps, over all layers: per token, and constant."""
    places = read_pattern(config.pattern)
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim
    state = config.mamba_inner_size * config.ssm_state_size
    inputs = (config.conv_kernel - 1) * config.conv_dim
    layer = state * state_bytes + inputs * conv_bytes
    return len(places["attention"]) * keys_and_values * kv_bytes, len(places["mamba"]) * layer
''',
    hints=(
        "Per token: two things are kept, a key and a value, in attention layers only: "
        '`len(read_pattern(config.pattern)["attention"])` of them.',
        "A query is used once and not kept. What is kept has `num_key_value_heads` heads, each of "
        "`config.head_dim` numbers. Do not compute that as `hidden_size // num_attention_heads`: "
        "it happens to agree for Super and does not for Nano.",
        "Constant, for each Mamba layer: the state `h*p*n * state_bytes` and the inputs of the "
        "convolution `(conv_kernel - 1) * conv_dim * conv_bytes`. A convolution of k taps sees the "
        "new input and k - 1 old ones.",
    ),
    checks=(
        Check("keys and values, attention layers only", checks.keys_and_values, hint=1, points=1),
        Check("shared heads", checks.shared_heads, hint=2, points=1),
        Check("heads of their own width", checks.own_head_width, hint=2, points=1),
        Check("states and inputs of the convolution", checks.constant_bytes, hint=3, points=1),
        Check("other precisions", checks.other_bytes, hint=3, points=1),
        Check("Nano and Super", checks.published_caches, hint=3, points=1),
    ),
)


DECODE_FLOPS = Exercise(
    id="00.decode_flops",
    title="What the next token costs",
    objective="O4: price the arithmetic of the next token.",
    minutes=12,
    difficulty=3,
    points=5,
    needs=("00.read_pattern", "00.layer_parameters"),
    task="""How many FLOPs does one more token take, after `context` tokens? A multiply-add counts
as two. Three terms come within two percent of `ledger.flops`:

1. every number that the token reads takes part in one multiply-add: those of all layers, and the
   head of v×d numbers. The embedding is only looked up;
2. every attention layer compares the query with `context+1` keys and adds up as many values. Each
   of its h query heads does both, with p numbers per key and per value;
3. every Mamba layer takes 5 operations for each of the h·p·n numbers of its state.

`read_pattern` and `layer_parameters` may be called.""",
    stub='''from nemotron_lite import NemotronConfig


def decode_flops(config: NemotronConfig, context: int) -> float:
    """FLOPs of the token after `context` others, to within two percent.

    Args:
        config: sizes. Attention has num_attention_heads query heads of head_dim; a Mamba layer's
            state has mamba_inner_size (h*p) times ssm_state_size (n) numbers.
        context: tokens already read. The new one attends to them and to itself.
    """
    raise NotImplementedError
''',
    solution='''from nemotron_lite import NemotronConfig


def decode_flops(config: NemotronConfig, context: int) -> float:
    """FLOPs of the token after `context` others, to within two percent."""
    places = read_pattern(config.pattern)
    read = config.vocab_size * config.hidden_size
    read += sum(layer_parameters(config, letter)[1] for letter in config.pattern)
    queries = config.num_attention_heads * config.head_dim
    attention = len(places["attention"]) * 2 * 2 * queries * (context + 1)
    scan = len(places["mamba"]) * 5 * config.mamba_inner_size * config.ssm_state_size
    return 2 * read + attention + scan
''',
    hints=(
        "First term: `sum(layer_parameters(config, letter)[1] for letter in config.pattern)`, plus "
        "the head `vocab_size * hidden_size`, and all of it times two. Entry 1 is what a token "
        "reads, entry 0 what is stored.",
        "Looking up a row of the embedding table is no arithmetic: count one matrix of "
        "vocabulary × width, not two.",
        "Second term, for each attention layer: scores and weighted sum are two products, each of "
        "h·p multiply-adds for each of context + 1 tokens. That is `2 * 2 * num_attention_heads * "
        "head_dim * (context + 1)`: sharing key-value heads does not reduce it. Third term, for "
        "each Mamba layer: `5 * mamba_inner_size * ssm_state_size`.",
    ),
    checks=(
        Check("the numbers that are read", checks.weights_that_are_read, hint=1, points=1),
        Check("no arithmetic in a lookup", checks.no_arithmetic_in_a_lookup, hint=2, points=1),
        Check("the scan", checks.the_scan, hint=3, points=1),
        Check("every query head, over the context", checks.every_query_head, hint=3, points=1),
        Check("Super, short and long", checks.published_prices, hint=3, points=1),
    ),
)


TOY_MODEL = Exercise(
    id="00.toy_model",
    title="A model of three layers",
    objective="O5: build a model from its pattern, and train it.",
    minutes=25,
    difficulty=3,
    points=8,
    needs=("00.normalize",),
    task=r"""Put the parts together, for any pattern of `M`, `E` and `*`, as in the equations above:
embedding, residual layers, final norm, head. `ToyLayer` is one residual layer, `ToyModel` the
model. The mixers are the package's: `layers.Mamba2(config)`, `layers.MoE(config)` and
`layers.Attention(config)`. Called with `b t d`, each returns `b t d`. The norm, in both classes, is
your `normalize` with `config.norm_eps`.

The names matter, because the package's weights have to load. The given lines make
`backbone.layers.0.norm.weight` and `backbone.norm_f.weight`. Add `mixer` to a layer, `embeddings`
(an `nn.Embedding`) and `layers` (an `nn.ModuleList`) to `self.backbone`, and `lm_head` (an
`nn.Linear` without bias) to the model. The mixers' weights are uninitialized until you load
some.""",
    stub='''import torch
from torch import nn

from nemotron_lite import layers


class ToyLayer(nn.Module):
    """One residual layer: x + mixer(norm(x))."""

    def __init__(self, config, letter):
        """Args: config, the sizes; letter, "M", "E" or "*"."""
        super().__init__()
        self.eps = config.norm_eps
        self.norm = nn.ParameterDict({"weight": torch.ones(config.hidden_size)})
        raise NotImplementedError

    def forward(self, x):
        """x: b t d. Returns b t d."""
        raise NotImplementedError


class ToyModel(nn.Module):
    """Token ids to logits; the names of its weights are those of `nemotron_lite.Nemotron`."""

    def __init__(self, config):
        """Args: config, the sizes; its pattern has one letter a layer."""
        super().__init__()
        self.eps = config.norm_eps
        self.backbone = nn.Module()
        self.backbone.norm_f = nn.ParameterDict({"weight": torch.ones(config.hidden_size)})
        raise NotImplementedError

    def forward(self, tokens):
        """tokens: ids, b t. Returns logits, b t v."""
        raise NotImplementedError
''',
    solution='''import torch
from torch import nn

from nemotron_lite import layers


class ToyLayer(nn.Module):
    """One residual layer: x + mixer(norm(x))."""

    def __init__(self, config, letter):
        super().__init__()
        self.eps = config.norm_eps
        self.norm = nn.ParameterDict({"weight": torch.ones(config.hidden_size)})
        kinds = {"M": layers.Mamba2, "E": layers.MoE, "*": layers.Attention}
        self.mixer = kinds[letter](config)

    def forward(self, x):
        return x + self.mixer(normalize(x, self.norm["weight"], self.eps))


class ToyModel(nn.Module):
    """Token ids to logits; the names of its weights are those of `nemotron_lite.Nemotron`."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.norm_eps
        self.backbone = nn.Module()
        self.backbone.norm_f = nn.ParameterDict({"weight": torch.ones(config.hidden_size)})
        self.backbone.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.backbone.layers = nn.ModuleList(ToyLayer(config, kind) for kind in config.pattern)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens):
        x = self.backbone.embeddings(tokens)
        for layer in self.backbone.layers:
            x = layer(x)
        return self.lm_head(normalize(x, self.backbone.norm_f["weight"], self.eps))
''',
    hints=(
        "`ToyLayer.__init__`: a dict from letter to class, and `self.mixer = kinds[letter]"
        "(config)`. `ToyModel.__init__`: `self.backbone.layers = nn.ModuleList(ToyLayer(config, "
        "letter) for letter in config.pattern)`; embedding and head are two separate matrices. "
        "Compare the names with `Nemotron(config).state_dict()`.",
        "`ToyLayer.forward` adds to the x that came in, not to the normalized one: "
        '`x + self.mixer(normalize(x, self.norm["weight"], self.eps))`. `self.eps` is that of the '
        "config.",
        "A layer whose mixer returns zeros must leave x as it is: look at the `x + …` of "
        "`ToyLayer`. `ToyModel.forward`: look the tokens up, apply the layers in order, then "
        '`normalize(x, self.backbone.norm_f["weight"], self.eps)`, then `self.lm_head`. The final '
        "norm is easily forgotten.",
    ),
    checks=(
        Check("the package's weights load", checks.weights_load, hint=1, points=1),
        Check("embedding, final norm and head", checks.final_norm, hint=3, points=1),
        Check("one layer adds to its input", checks.one_layer, hint=2, points=2),
        Check("eps of the config", checks.own_eps, hint=2, points=1),
        Check("several layers, in order", checks.layers_in_order, hint=3, points=1),
        Check("one token, and rows apart", checks.single_tokens, hint=3, points=1),
        Check("gradients of all weights", checks.model_gradients, hint=3, points=1),
    ),
)


TRITON_NORM = Exercise(
    id="00.triton_norm",
    title="RMSNorm as a kernel",
    objective="O2: write RMSNorm as a Triton kernel of one program per row.",
    minutes=20,
    difficulty=3,
    points=3,
    kind="optional",
    task="""A Triton kernel is a function that runs many times at once; each run is called a
program. Here each program normalizes one row. Complete the body:

1. load the row of x and the weight with `tl.load(pointers, mask=inside, other=0.0)`, and convert
   both to float32 with `.to(tl.float32)`;
2. sum the squares (`tl.sum(…, axis=0)`) and divide by `size`, the real width of the row;
3. multiply by `tl.rsqrt(… + eps)` and by the weight;
4. store the result with `tl.store(pointers, values, mask=inside)`.

A pointer plus a block of offsets is a block of pointers: `x_row` points at the numbers of this
row, `out_row` at the places of the result. `BLOCK` is a power of two, as Triton requires; the mask
switches off the places behind the end of the row. Without a GPU, Triton runs the kernel in its
interpreter.""",
    stub='''import math

import torch
import triton
import triton.language as tl


@triton.jit
def norm_kernel(x_ptr, weight_ptr, out_ptr, size, eps, BLOCK: tl.constexpr):
    """One program: RMSNorm of one row of `size` numbers."""
    row = tl.program_id(0)  # the row of this program
    channel = tl.arange(0, BLOCK)  # 0, 1, … BLOCK - 1, all at once
    inside = channel < size
    x_row, out_row = x_ptr + row * size + channel, out_ptr + row * size + channel
    raise NotImplementedError


def triton_norm(x, weight, eps=1e-5):
    """RMSNorm of each row by `norm_kernel`. x: rows d, contiguous; weight: d."""
    rows, size = x.shape
    out = x.new_ones(rows + 1, size)  # one row more, which no program may write into
    norm_kernel[(rows,)](x, weight, out, size, eps, BLOCK=triton.next_power_of_2(size))
    untouched = (out[rows] == 1).all()
    return out[:rows] if untouched else torch.full_like(x, math.nan)
''',
    solution='''import math

import torch
import triton
import triton.language as tl


@triton.jit
def norm_kernel(x_ptr, weight_ptr, out_ptr, size, eps, BLOCK: tl.constexpr):
    """One program: RMSNorm of one row of `size` numbers."""
    row = tl.program_id(0)
    channel = tl.arange(0, BLOCK)
    inside = channel < size
    x_row, out_row = x_ptr + row * size + channel, out_ptr + row * size + channel
    x = tl.load(x_row, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    mean_square = tl.sum(x * x, axis=0) / size
    normed = x * tl.rsqrt(mean_square + eps) * weight
    tl.store(out_row, normed.to(out_ptr.dtype.element_ty), mask=inside)


def triton_norm(x, weight, eps=1e-5):
    """RMSNorm of each row by `norm_kernel`. x: rows d, contiguous; weight: d."""
    rows, size = x.shape
    out = x.new_ones(rows + 1, size)  # one row more, which no program may write into
    norm_kernel[(rows,)](x, weight, out, size, eps, BLOCK=triton.next_power_of_2(size))
    untouched = (out[rows] == 1).all()
    return out[:rows] if untouched else torch.full_like(x, math.nan)
''',
    hints=(
        "`x = tl.load(x_row, mask=inside, other=0.0).to(tl.float32)`. The weight is the same for "
        "every row: its pointers are `weight_ptr + channel`.",
        "`BLOCK` may be larger than the row. Zeros behind the end do not change the sum of "
        "squares, but divide by `size`, not by `BLOCK`. Convert to float32 before you square. "
        "Without `mask=inside` the store overwrites the next row; then all values become NaN.",
        "`tl.store(out_row, normed.to(out_ptr.dtype.element_ty), mask=inside)` is the last line; "
        "`normed = x * tl.rsqrt(mean_square + eps) * weight` the one above it.",
    ),
    checks=(
        Check("rows of eight", checks.kernel_rows, hint=1, points=1),
        Check("widths that are no power of two", checks.kernel_ragged, hint=2, points=1),
        Check("eps, and half precision", checks.kernel_half, hint=3, points=1),
    ),
)


LONGEST_CONTEXT = Exercise(
    id="00.longest_context",
    title="The longest context that fits",
    objective="O4: plan the memory of a model.",
    minutes=12,
    difficulty=3,
    points=5,
    kind="stretch",
    needs=("00.layer_parameters", "00.cache_bytes"),
    task="""A machine has `memory` bytes. All weights must be in it (layers, embedding, head and the
final norm; no MTP module), and the rest is for the caches of `batch` sequences of equal length.
How many tokens can each sequence have?

Three cases are easily forgotten: the weights alone, or the weights and the constant part of the
caches, may not fit: return -1 (not even an empty sequence fits). A model without attention has no
limit once these fit: return `None`. Activations are left out.""",
    stub='''from nemotron_lite import NemotronConfig


def longest_context(config, memory, weight_bytes=2, batch=1) -> int | None:
    """Tokens of each sequence that fit into `memory` bytes.

    Args:
        config: its sizes.
        memory: bytes.
        weight_bytes: bytes of one parameter.
        batch: sequences of equal length; each has its own cache, in the default precisions of
            `cache_bytes`.

    Returns:
        Tokens per sequence; -1 if not even empty sequences fit, None if there is no limit.
    """
    raise NotImplementedError
''',
    solution='''from nemotron_lite import NemotronConfig


def longest_context(config, memory, weight_bytes=2, batch=1) -> int | None:
    """Tokens of each sequence that fit into `memory` bytes."""
    weights = 2 * config.vocab_size * config.hidden_size + config.hidden_size
    weights += sum(layer_parameters(config, letter)[0] for letter in config.pattern)
    per_token, constant = cache_bytes(config)
    left = memory - weights * weight_bytes - batch * constant
    if left < 0:
        return -1
    return left // (batch * per_token) if per_token else None
''',
    hints=(
        "First the weights: `sum(layer_parameters(config, letter)[0] for letter in config.pattern)`"
        " plus embedding and head, 2·v·d, and the final norm d; all times `weight_bytes`. All "
        "experts must be in memory, although a token reads few of them.",
        "`per_token, constant = cache_bytes(config)`. Every sequence of the batch has its own "
        "constant part and its own keys and values.",
        "With `left = memory - weights - batch * constant`: below 0 nothing fits; if `per_token` "
        "is 0 there is no limit; else `left // (batch * per_token)`, a whole number of tokens.",
    ),
    checks=(
        Check("one sequence", checks.one_sequence, hint=1, points=1),
        Check("all weights are stored", checks.all_weights, hint=1, points=1),
        Check("several sequences", checks.several_sequences, hint=2, points=1),
        Check("nothing fits", checks.nothing_fits, hint=3, points=1),
        Check("no attention, no limit", checks.no_limit, hint=3, points=1),
    ),
)


EXERCISES = (
    READ_PATTERN,
    NORMALIZE,
    LAYER_PARAMETERS,
    CACHE_BYTES,
    DECODE_FLOPS,
    TOY_MODEL,
    TRITON_NORM,
    LONGEST_CONTEXT,
)
