"""Exercises of chapter 02: a Mamba-2 layer, built of functions that the learner writes.

    02.decay_mask       what is left of token r when token l reads: a lower triangle of products
    02.scan_by_matrix   the scan as one masked matrix: y = M (dt x)
    02.chunked_scan     chunks, and the state between them
    02.causal_conv      the convolution, with the inputs that it has to remember
    02.gate_and_norm    the gate, then one norm per group
    02.mamba2           the layer as a module, with the package's parameter names
    02.decoding         one token at a time, from the layer's cache
    02.step_kernel      optional: the update of the state for one token, in Triton
    02.chunk_gradients  stretch: the gradient of one chunk by hand

The layer returns its cache instead of changing one in place, as `nn.GRU` does. So it can be tested
by calls alone, and an old cache stays valid.

The checks are in `checks.py`; the mistakes that they have to catch are in
`tests/course/chapters/ch02_mamba2/mutants.py`.
"""

from __future__ import annotations

from nemotron_lite.course.chapters.ch02_mamba2 import checks
from nemotron_lite.course.exercises import Check, Exercise

DECAY_MASK = Exercise(
    id="02.decay_mask",
    title="The decay mask",
    objective="O1: write the recurrence of a head as a masked matrix.",
    minutes=10,
    difficulty=2,
    points=5,
    task=r"""
For each head, build the matrix $L$ with

$$L_{lr} = \exp(a_{r+1} + \dots + a_l) \quad (r \le l), \qquad a_t = dt_t A, \qquad
L_{lr} = 0 \quad (r > l)$$

Row $l$ is the token that reads, column $r$ the token that wrote. The
result and its gradient must stay finite when a head forgets everything at each token.
""".strip(),
    stub='''
import torch


def decay_mask(dt, A):
    """How much of what token r wrote is left when token l reads.

    Args:
        dt: step sizes, b t h, not negative.
        A: decay rates, h, negative.

    Returns:
        b h t t, entry [l, r] in the last two axes.
    """
    raise NotImplementedError
'''.strip(),
    solution='''
import torch


def decay_mask(dt, A):
    """How much of what token r wrote is left when token l reads."""
    total = (dt * A).cumsum(1).transpose(1, 2)  # b h t
    exponent = total.unsqueeze(-1) - total.unsqueeze(-2)  # b h l r
    t = dt.shape[1]
    seen = torch.ones(t, t, dtype=torch.bool, device=dt.device).tril()
    return exponent.masked_fill(~seen, -torch.inf).exp()
'''.strip(),
    hints=(
        "The sum from r+1 to l is a difference of two running sums: `s_l - s_r`, with s the "
        "`cumsum` of dt * A along **time**. On the diagonal it is 0: a token reads what it has "
        "just written, without decay.",
        "dt is `b t h`, the mask `b h t t`: move the head axis forward, then subtract with "
        "`s.unsqueeze(-1) - s.unsqueeze(-2)`. Rows are readers l, columns are writers r.",
        "Above the diagonal the difference is **positive**, and its exponential can be infinite. "
        "Multiplying by 0 afterwards gives NaN, at the latest in the gradient. Fill those places "
        "with -inf *before* the exponential. Do not divide exp(s_l) by exp(s_r) either.",
    ),
    checks=(
        Check("three tokens by hand", checks.mask_by_hand, hint=1, points=1),
        Check("as part of the matrix", checks.mask_in_the_matrix, hint=2, points=1),
        Check("strong decay", checks.mask_under_strong_decay, hint=3, points=2),
        Check("gradients", checks.mask_gradients, hint=3, points=1),
    ),
)

SCAN_BY_MATRIX = Exercise(
    id="02.scan_by_matrix",
    title="The scan as one matrix",
    objective="O1: write the recurrence of a head as a masked matrix.",
    minutes=10,
    difficulty=2,
    points=5,
    task=r"""
Compute the whole scan from a state of zero with one matrix for each head:

$$y = M\,(dt \circ x), \qquad M = L \circ (C B^\top), \qquad \text{so} \quad
y_l = \sum_{r \le l} L_{lr}\,(C_l \cdot B_r)\; dt_r\, x_r$$

The factor $dt_r$ scales what token $r$ writes; it is not part of $M$. Call your `decay_mask`. Head
$i$ reads group `i // (h // g)` of $B$ and $C$. There is no $D$ here.
""".strip(),
    stub='''
import torch


def scan_by_matrix(x, dt, A, B, C):
    """The selective scan from a zero state, as a masked matrix.

    Args:
        x: b t h p.
        dt: step sizes, b t h.
        A: decay rates, h, negative.
        B, C: b t g n.

    Returns:
        y, b t h p.
    """
    raise NotImplementedError
'''.strip(),
    solution='''
import torch


def scan_by_matrix(x, dt, A, B, C):
    """The selective scan from a zero state, as a masked matrix."""
    scores = torch.einsum("blgn,brgn->bglr", C, B)
    scores = scores.repeat_interleave(x.shape[2] // B.shape[2], dim=1)  # b h l r
    return torch.einsum("bhlr,brhp->blhp", decay_mask(dt, A) * scores, dt.unsqueeze(-1) * x)
'''.strip(),
    hints=(
        "Scores are products of a reader's C with a writer's B: "
        '`torch.einsum("blgn,brgn->bglr", C, B)`. Multiply them by the decay mask, then by what '
        "was written, `dt.unsqueeze(-1) * x`.",
        "There is one score matrix per **group**. Copy it to the heads of the group with "
        "`repeat_interleave(h // g, dim=1)`: neighbouring heads share a group, 0 0 1 1. `repeat` "
        "would give 0 1 0 1, which has the right shape and the wrong heads.",
        "dt stands at the writer r: multiply x by it before the product with M. Multiplied into y "
        "afterwards it would be the reader's dt_l.",
    ),
    checks=(
        Check("one token by hand", checks.matrix_by_hand, hint=1, points=1),
        Check("one group", checks.matrix_one_group, hint=3, points=1),
        Check("groups", checks.matrix_groups, hint=2, points=1),
        Check("strong decay", checks.matrix_under_strong_decay, hint=1, points=1),
        Check("gradients", checks.matrix_gradients, hint=1, points=1),
    ),
    needs=("02.decay_mask",),
)

CHUNKED_SCAN = Exercise(
    id="02.chunked_scan",
    title="Chunks, and the state between them",
    objective="O2: compute the scan in chunks, in four numbered steps.",
    minutes=25,
    difficulty=4,
    points=8,
    task=r"""
Cut the text into chunks of `chunk_size` tokens; the last one may be shorter. For each chunk of $q$
tokens, with $S$ the state before it and $s$ the running sum of $a = dt\,A$ **inside the chunk**:

1. inside: $y_l = \sum_{r \le l} L_{lr}\,(C_l \cdot B_r)\, dt_r x_r$, your `scan_by_matrix`
2. from the chunk into the state: $U = \sum_r e^{s_q - s_r}\, dt_r\, x_r \otimes B_r$
3. from state to state: $S' = e^{s_q} S + U$
4. from the state to the outputs: $y_l \mathrel{+}= e^{s_l}\, S\, C_l$

Loop over chunks, not over tokens. There is no $D$ here.
""".strip(),
    stub='''
import torch


def chunked_scan(x, dt, A, B, C, state, chunk_size):
    """The selective scan in chunks.

    Args:
        x: b t h p, t of 1 or more.
        dt: step sizes, b t h.
        A: decay rates, h, negative.
        B, C: b t g n. Head i reads group i // (h // g).
        state: S before the first token, b h p n. It belongs to the caller: leave it alone.
        chunk_size: tokens in a chunk, 1 or more.

    Returns:
        (y, state): b t h p, and S after the last token, b h p n.
    """
    raise NotImplementedError
'''.strip(),
    solution='''
import torch


def chunked_scan(x, dt, A, B, C, state, chunk_size):
    """The selective scan in chunks."""
    shared = x.shape[2] // B.shape[2]
    outputs = []
    for parts in zip(*(v.split(chunk_size, dim=1) for v in (x, dt, B, C))):
        X, step, keys, queries = parts
        y = scan_by_matrix(X, step, A, keys, queries)  # 1
        keys, queries = (v.repeat_interleave(shared, dim=2) for v in (keys, queries))
        s = (step * A).cumsum(1).unsqueeze(-1)  # b q h 1
        read = torch.einsum("blhn,bhpn->blhp", queries, state)
        outputs.append(y + s.exp() * read)  # 4
        written = (s[:, -1:] - s).exp() * step.unsqueeze(-1) * X
        added = torch.einsum("brhp,brhn->bhpn", written, keys)  # 2
        state = s[:, -1].exp().unsqueeze(-1) * state + added  # 3
    return torch.cat(outputs, dim=1), state
'''.strip(),
    hints=(
        "`v.split(chunk_size, dim=1)` cuts x, dt, B and C into chunks; the last one is shorter by "
        "itself. Step 1 is one call of `scan_by_matrix` on the chunk. For the other steps copy B "
        "and C to the heads with `repeat_interleave(h // g, dim=2)`.",
        "Step 4 before step 3: the tokens of a chunk read the state **before** it, decayed by "
        "everything since the chunk began, their own step included: `exp(s_l)`. "
        '`torch.einsum("blhn,bhpn->blhp", C, S)` is S C for every token and head.',
        "Steps 2 and 3: the old state decays over the whole chunk, `exp(s_q)`. What token r wrote "
        "decays only by what comes **after** it, `exp(s_q - s_r)`; for the last token the factor "
        "is 1. Form the difference before the exponential: the ratio of two exponentials is 0/0 "
        "under strong decay.",
    ),
    checks=(
        Check("one chunk from a zero state", checks.scan_one_chunk, hint=1, points=1),
        Check("reading the state before", checks.scan_reads_state, hint=2, points=1),
        Check("the state after the text", checks.scan_hands_on, hint=3, points=1),
        Check("every chunk length", checks.scan_every_chunk_length, hint=3, points=1),
        Check("chunk_size is used", checks.scan_uses_chunk_size, hint=1, points=1),
        Check("the caller's state", checks.scan_leaves_state_alone, hint=3, points=1),
        Check("strong decay", checks.scan_under_strong_decay, hint=3, points=1),
        Check("gradients", checks.scan_gradients, hint=3, points=1),
    ),
    needs=("02.scan_by_matrix",),
)

CAUSAL_CONV = Exercise(
    id="02.causal_conv",
    title="The convolution and its memory",
    objective="O3: build the layer around the scan, and say what each part is for.",
    minutes=10,
    difficulty=2,
    points=6,
    task=r"""
Each channel is convolved along time with its own $k$ taps, and may look back only:

$$y_t = \mathrm{silu}\Big(\mathrm{bias} + \sum_{j=0}^{k-1} w_j\, x_{t-k+1+j}\Big)$$

The last tap, $w_{k-1}$, belongs to the present token. The first tokens look back at the $k - 1$
**inputs** before the text, which come in as `state`. Return the last $k - 1$ inputs as the state
for the text that follows, also when the text is shorter than $k - 1$.
""".strip(),
    stub='''
import torch
import torch.nn.functional as F


def causal_conv(x, weight, bias, state):
    """A causal depthwise convolution with SiLU.

    Args:
        x: the inputs, b t c.
        weight: taps, oldest first, c k.
        bias: c.
        state: the k-1 inputs before x, oldest first, b k-1 c.

    Returns:
        (y, state): b t c, and the last k-1 inputs, b k-1 c.
    """
    raise NotImplementedError
'''.strip(),
    solution='''
import torch
import torch.nn.functional as F


def causal_conv(x, weight, bias, state):
    """A causal depthwise convolution with SiLU."""
    window = torch.cat([state, x], dim=1)
    y = (window.unfold(1, weight.shape[1], 1) * weight).sum(-1) + bias  # windows: b t c k
    return F.silu(y), window[:, x.shape[1] :]
'''.strip(),
    hints=(
        "Put the state in front of the inputs: `torch.cat([state, x], dim=1)`. "
        "`window.unfold(1, k, 1)` is `b t c k`, all windows of k neighbouring inputs, oldest "
        "first. Multiply by the taps, sum over k, add the bias, then SiLU.",
        "The state is made of **inputs**, before convolution and SiLU, and ends with the newest "
        "one. It is the end of the joined tensor, not the end of x: a text of one token still "
        "needs k-2 inputs from before.",
        "`torch.cat` makes a new tensor. Writing into `state` would change what the caller may "
        "still need, and would break the gradient.",
    ),
    checks=(
        Check("four tokens by hand", checks.conv_by_hand, hint=1, points=1),
        Check("values", checks.conv_values, hint=1, points=1),
        Check("a text in pieces", checks.conv_in_pieces, hint=2, points=2),
        Check("the caller's state", checks.conv_leaves_state_alone, hint=3, points=1),
        Check("gradients", checks.conv_gradients, hint=3, points=1),
    ),
)

GATE_AND_NORM = Exercise(
    id="02.gate_and_norm",
    title="Gate, then norm by groups",
    objective="O3: build the layer around the scan, and say what each part is for.",
    minutes=10,
    difficulty=2,
    points=5,
    task=r"""
The last step before the output projection. Gate first, $v = y \cdot \mathrm{silu}(z)$. Then divide
each of the $g$ groups of neighbouring channels by **its own** root mean square,
$\sqrt{\mathrm{mean}(v^2) + \epsilon}$, and scale each channel by its weight.

Compute in float32 when y is a half type, and give the result back in the dtype of y.
""".strip(),
    stub='''
import torch
import torch.nn.functional as F


def gate_and_norm(y, z, weight, groups, eps):
    """Gate y by z, then normalize each group of channels.

    Args:
        y, z: any leading axes, then c channels.
        weight: scale of each channel, c.
        groups: how many equal runs of channels have a norm of their own.
        eps: added to the mean of the squares.
    """
    raise NotImplementedError
'''.strip(),
    solution='''
import torch
import torch.nn.functional as F


def gate_and_norm(y, z, weight, groups, eps):
    """Gate y by z, then normalize each group of channels."""
    wide = torch.promote_types(y.dtype, torch.float32)
    gated = y.to(wide) * F.silu(z.to(wide))
    split = gated.unflatten(-1, (groups, -1))
    normed = split * torch.rsqrt(split.square().mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight.to(wide)).to(y.dtype)
'''.strip(),
    hints=(
        "Order and function: `y * F.silu(z)` comes first, the norm sees the gated values. No mean "
        "is subtracted; this is a root mean square, not a layer norm.",
        "`unflatten(-1, (groups, -1))` splits the channels; take the mean of the squares over the "
        "last axis only, with `keepdim=True`, and flatten the two axes again.",
        "eps is **inside** the root, added to the mean of squares. Squares of float16 overflow "
        "beyond 255: widen with `torch.promote_types(y.dtype, torch.float32)` before squaring.",
    ),
    checks=(
        Check("one group", checks.norm_one_group, hint=1, points=1),
        Check("groups do not see each other", checks.norm_groups, hint=2, points=1),
        Check("near zero", checks.norm_small, hint=3, points=1),
        Check("half precision", checks.norm_half, hint=3, points=1),
        Check("gradients", checks.norm_gradients, hint=3, points=1),
    ),
)

_CLASS_HEAD = '''
import torch
import torch.nn.functional as F
from torch import nn


class Mamba2(nn.Module):
    """A Mamba-2 layer. Its parameters have the names of the package's."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        inner, heads = config.mamba_inner_size, config.mamba_num_heads
        self.in_proj = nn.Linear(config.hidden_size, config.mamba_in_proj_size, bias=False)
        # The next module and `norm` only hold their weights; your functions compute.
        self.conv1d = nn.Conv1d(
            config.conv_dim, config.conv_dim, config.conv_kernel, groups=config.conv_dim
        )
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.norm = nn.RMSNorm(inner)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def empty_cache(self, batch):
        """(conv, ssm): the inputs of the convolution, b k-1 c, and the state, b h p n."""
        c = self.config
        return (
            self.D.new_zeros(batch, c.conv_kernel - 1, c.conv_dim),
            self.D.new_zeros(batch, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size),
        )
'''.strip()

MAMBA2 = Exercise(
    id="02.mamba2",
    title="The layer",
    objective="O3: build the layer around the scan, and say what each part is for.",
    minutes=25,
    difficulty=3,
    points=9,
    task=r"""
Put your functions together. Three methods are left to write:

- `project`: one projection gives $z \mid xBC \mid dt$, in this order, of widths
  `mamba_inner_size`, `conv_dim` and `mamba_num_heads`. `causal_conv` runs over $xBC$ as a whole.
  Its result is $x \mid B \mid C$; reshape them to heads and groups. $dt$ gets its bias and a
  softplus.
- `finish`: add $D\,x$ to $y$, then gate, norm (`norm_eps` of the config), and output projection.
- `forward`: `project`, `chunked_scan` with $A = -e^{A_{log}}$ and chunks of 64, `finish`. It
  returns the output and the new cache, as `nn.GRU` does. Do not change the cache that was passed
  in.
""".strip(),
    stub=f'''
{_CLASS_HEAD}

    def project(self, u, conv):
        """Everything before the scan.

        Args:
            u: b t d.
            conv: the inputs of the convolution before u, b k-1 c.

        Returns:
            (z, x, dt, B, C, conv): b t hp, b t h p, b t h, b t g n, b t g n, b k-1 c.
        """
        raise NotImplementedError

    def finish(self, y, x, z):
        """Everything after the scan: b t h p, b t h p, b t hp to b t d."""
        raise NotImplementedError

    def forward(self, u, cache=None):
        """Read t tokens after a cache; None is the empty cache.

        Returns:
            (out, cache): b t d, and (conv, ssm) after the last token.
        """
        raise NotImplementedError
'''.strip(),
    solution=f'''
{_CLASS_HEAD}

    def project(self, u, conv):
        """Everything before the scan."""
        c = self.config
        inner, shared = c.mamba_inner_size, c.n_groups * c.ssm_state_size
        z, xBC, dt = self.in_proj(u).split([inner, c.conv_dim, c.mamba_num_heads], dim=-1)
        xBC, conv = causal_conv(xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, conv)
        x, B, C = xBC.split([inner, shared, shared], dim=-1)
        x = x.unflatten(-1, (c.mamba_num_heads, c.mamba_head_dim))
        B, C = (v.unflatten(-1, (c.n_groups, c.ssm_state_size)) for v in (B, C))
        return z, x, F.softplus(dt + self.dt_bias), B, C, conv

    def finish(self, y, x, z):
        """Everything after the scan."""
        y = (y + self.D.unsqueeze(-1) * x).flatten(-2)
        c = self.config
        return self.out_proj(gate_and_norm(y, z, self.norm.weight, c.n_groups, c.norm_eps))

    def forward(self, u, cache=None):
        """Read t tokens after a cache; None is the empty cache."""
        conv, ssm = self.empty_cache(len(u)) if cache is None else cache
        z, x, dt, B, C, conv = self.project(u, conv)
        y, ssm = chunked_scan(x, dt, -self.A_log.exp(), B, C, ssm, 64)
        return self.finish(y, x, z), (conv, ssm)
'''.strip(),
    hints=(
        "`project`: `self.in_proj(u).split([inner, conv_dim, heads], dim=-1)` gives z, xBC and dt. "
        "`self.conv1d.weight` is `c 1 k`: squeeze its second axis. After the convolution split "
        "again, `[inner, g*n, g*n]`, and reshape with `unflatten(-1, (heads, head_dim))`. The "
        "bias of dt comes before the softplus.",
        "`finish`: D is one number per head, `self.D.unsqueeze(-1) * x`; x here is what went into "
        "the scan, after the convolution. Then `flatten(-2)`, and gate_and_norm with "
        "`self.norm.weight`, `config.n_groups` and `config.norm_eps`.",
        "`forward`: start from `self.empty_cache(len(u))` if there is no cache. Both parts go "
        "on: conv into `project`, ssm into `chunked_scan`, and the new ones are returned as a "
        "pair. A_log is a logarithm, and the rate is negative: `-self.A_log.exp()`.",
    ),
    checks=(
        Check("before the scan", checks.layer_project, hint=1, points=2),
        Check("after the scan", checks.layer_finish, hint=2, points=1),
        Check("a whole text", checks.layer_text, hint=3, points=1),
        Check("a text of 70 tokens, and of one", checks.layer_lengths, hint=3, points=1),
        Check("a text in pieces", checks.layer_in_pieces, hint=3, points=2),
        Check("the caller's cache", checks.layer_leaves_cache_alone, hint=3, points=1),
        Check("gradients", checks.layer_gradients, hint=3, points=1),
    ),
    needs=("02.causal_conv", "02.chunked_scan", "02.gate_and_norm"),
)

_DECODING_HEAD = '''
import torch


class DecodingMamba2(Mamba2):
    """Your layer, with a faster path for one token after a cache."""

    def forward(self, u, cache=None):
        """Read t tokens after a cache: one by `step`, several by chunks."""
        if cache is None or u.shape[1] > 1:
            return super().forward(u, cache)
        out, cache = self.step(u[:, 0], cache)
        return out.unsqueeze(1), cache
'''.strip()

DECODING = Exercise(
    id="02.decoding",
    title="One token at a time",
    objective="O4: continue from a cache, and show that single steps equal the prefill.",
    minutes=15,
    difficulty=3,
    points=6,
    task=r"""
While a model writes, the layer gets one token at a time. Then there is nothing to put into chunks,
and the recurrence itself is the shortest program:

$$S_t = e^{dt_t A} S_{t-1} + dt_t\, x_t \otimes B_t, \qquad y_t = S_t\, C_t$$

Write `step` with `project` and `finish` of your layer, and this recurrence between them. Do not
change the cache that was passed in. (The checks would accept `forward` too.)
""".strip(),
    stub=f'''
{_DECODING_HEAD}

    def step(self, u, cache):
        """Read one token of each row after a cache.

        Args:
            u: b d.
            cache: (conv, ssm), b k-1 c and b h p n. It belongs to the caller: leave it alone.

        Returns:
            (out, cache): b d, and (conv, ssm) after this token.
        """
        raise NotImplementedError
'''.strip(),
    solution=f'''
{_DECODING_HEAD}

    def step(self, u, cache):
        """Read one token of each row after a cache."""
        z, x, dt, B, C, conv = self.project(u.unsqueeze(1), cache[0])
        shared = x.shape[2] // B.shape[2]
        B, C = (v[:, 0].repeat_interleave(shared, dim=1) for v in (B, C))  # b h n
        decay = (dt[:, 0] * -self.A_log.exp())[..., None, None].exp()  # b h 1 1
        write = (dt[:, 0].unsqueeze(-1) * x[:, 0]).unsqueeze(-1) * B.unsqueeze(-2)
        ssm = decay * cache[1] + write
        y = (ssm * C.unsqueeze(-2)).sum(-1)  # b h p
        return self.finish(y.unsqueeze(1), x, z)[:, 0], (conv, ssm)
'''.strip(),
    hints=(
        "`project` wants a time axis: give it `u.unsqueeze(1)`, and take token 0 of what comes "
        "back. `finish` wants one too. Decay and write first, then read: a token reads what it "
        "has just written.",
        "B and C have g groups: `repeat_interleave(h // g, dim=1)` copies them to the heads. The "
        "cache after the token has both parts: the inputs that `project` returned, and the new "
        "state.",
        "Make a new state, `ssm = decay * ssm + write`. `ssm.mul_(decay)` writes into the cache "
        "of the caller, who may want to continue from it twice.",
    ),
    checks=(
        Check("one token", checks.step_one_token, hint=1, points=1),
        Check("the cache after it", checks.step_cache, hint=2, points=1),
        Check("steps equal the prefill", checks.steps_equal_prefill, hint=2, points=2),
        Check("the caller's cache", checks.step_leaves_cache_alone, hint=3, points=1),
        Check("gradients", checks.step_gradients, hint=3, points=1),
    ),
    needs=("02.mamba2",),
)

STEP_KERNEL = Exercise(
    id="02.step_kernel",
    title="One token in Triton",
    objective="O4: continue from a cache, and show that single steps equal the prefill.",
    minutes=20,
    difficulty=4,
    points=5,
    kind="optional",
    task=r"""
In PyTorch the update of the state reads and writes $S$ several times: once for the decay, once for
the sum, once for the product with $C$. A kernel loads it once. One program does one head of one
row: it loads its $p \times n$ numbers, computes

$$S \leftarrow e^{dt\,A} S + dt\, x \otimes B, \qquad y = S\,C + D\,x$$

and stores both. All tensors are contiguous, and all widths are powers of two, so no mask is needed.
Without a GPU the kernel runs in Triton's interpreter. Save the notebook first: a store to a wrong
address can end the kernel of the notebook. The checks see only the results of `step_by_kernel`:
they cannot tell a kernel from plain PyTorch in its place.
""".strip(),
    stub='''
import torch
import triton
import triton.language as tl


@triton.jit
def step_kernel(S, x, dt, A, B, C, D, y, new, H, G, P: tl.constexpr, N: tl.constexpr):
    """One token of one head: S, new are b h p n; x, y b h p; dt b h; A, D h; B, C b g n."""
    row, head = tl.program_id(0), tl.program_id(1)
    group = row * G + head // (H // G)  # which n numbers of B and C
    unit = row * H + head  # which numbers of S, x, dt and y
    p, n = tl.arange(0, P), tl.arange(0, N)
    places = unit * P * N + p[:, None] * N + n[None, :]  # which numbers of S and new
    raise NotImplementedError


def step_by_kernel(state, x, dt, A, B, C, D):
    """One token of the scan: (y, state), b h p and b h p n."""
    (b, h, p, n), g = state.shape, B.shape[1]
    y, new = torch.empty_like(x), torch.empty_like(state)
    step_kernel[(b, h)](state, x, dt, A, B, C, D, y, new, h, g, p, n)
    return y, new
'''.strip(),
    solution='''
import torch
import triton
import triton.language as tl


@triton.jit
def step_kernel(S, x, dt, A, B, C, D, y, new, H, G, P: tl.constexpr, N: tl.constexpr):
    """One token of one head: S, new are b h p n; x, y b h p; dt b h; A, D h; B, C b g n."""
    row, head = tl.program_id(0), tl.program_id(1)
    group = row * G + head // (H // G)  # which n numbers of B and C
    unit = row * H + head  # which numbers of S, x, dt and y
    p, n = tl.arange(0, P), tl.arange(0, N)
    places = unit * P * N + p[:, None] * N + n[None, :]  # which numbers of S and new
    step = tl.load(dt + unit)
    inputs = tl.load(x + unit * P + p)
    keys = tl.load(B + group * N + n)
    queries = tl.load(C + group * N + n)
    state = tl.load(S + places)
    decay = tl.exp(step * tl.load(A + head))
    state = decay * state + (step * inputs)[:, None] * keys[None, :]
    tl.store(new + places, state)
    read = tl.sum(state * queries[None, :], axis=1)
    tl.store(y + unit * P + p, read + tl.load(D + head) * inputs)


def step_by_kernel(state, x, dt, A, B, C, D):
    """One token of the scan: (y, state), b h p and b h p n."""
    (b, h, p, n), g = state.shape, B.shape[1]
    y, new = torch.empty_like(x), torch.empty_like(state)
    step_kernel[(b, h)](state, x, dt, A, B, C, D, y, new, h, g, p, n)
    return y, new
'''.strip(),
    hints=(
        "`tl.load(dt + unit)` is one number, `tl.load(x + unit * P + p)` a vector of P, and "
        "`tl.load(S + places)` a matrix of P x N. A and D have one number per head: `A + head`.",
        "The outer product of two vectors is `v[:, None] * w[None, :]`, the product with C is "
        "`tl.sum(state * c[None, :], axis=1)`. B and C start at `group * N`.",
        "Read after the write: y comes from the new state. Store the new state to "
        "`new + places`, and y to `y + unit * P + p`. S stays as it is.",
    ),
    checks=(
        Check("one head", checks.kernel_one_head, hint=1, points=1),
        Check("rows, heads and groups", checks.kernel_groups, hint=2, points=2),
        Check("the new state", checks.kernel_state, hint=3, points=1),
        Check("the old state", checks.kernel_leaves_state_alone, hint=3, points=1),
    ),
)

CHUNK_GRADIENTS = Exercise(
    id="02.chunk_gradients",
    title="The gradient of one chunk",
    objective="O2: compute the scan in chunks, in four numbered steps.",
    minutes=40,
    difficulty=5,
    points=6,
    kind="stretch",
    task=r"""
One head, one chunk, with $w_r = dt_r x_r$ and the running sum $s$:

$$y = (L \circ C B^\top)\, w + e^{s} \circ (C S^\top), \qquad
S' = e^{s_q} S + \sum_r e^{s_q - s_r}\, w_r \otimes B_r$$

Given the gradients of the loss with respect to $y$ and $S'$, compute those with respect to $w$,
$s$, $B$, $C$ and $S$, without autograd and without a loop. The last entry of $s$ is $s_q$.
""".strip(),
    stub='''
import torch


def chunk_gradients(w, s, B, C, state, grad_y, grad_state):
    """The gradient of one chunk of one head.

    Args:
        w: dt x, q p.
        s: running sum of dt A, q.
        B, C: q n.
        state: S before the chunk, p n.
        grad_y: gradient of the loss with respect to y, q p.
        grad_state: gradient with respect to the state after the chunk, p n.

    Returns:
        (grad_w, grad_s, grad_B, grad_C, grad_S): q p, q, q n, q n, p n.
    """
    raise NotImplementedError
'''.strip(),
    solution='''
import torch


def chunk_gradients(w, s, B, C, state, grad_y, grad_state):
    """The gradient of one chunk of one head."""
    future = torch.ones(len(s), len(s), dtype=torch.bool, device=s.device).triu(1)
    L = (s[:, None] - s[None, :]).masked_fill(future, -torch.inf).exp()
    into, left = s.exp()[:, None], (s[-1] - s).exp()[:, None]  # q 1
    grad_scores = L * (grad_y @ w.T)  # l r
    grad_w = (L * (C @ B.T)).T @ grad_y + left * (B @ grad_state.T)
    grad_B = grad_scores.T @ C + left * (w @ grad_state)
    grad_C = grad_scores @ B + into * (grad_y @ state)
    grad_S = s[-1].exp() * grad_state + (into * grad_y).T @ C
    inside = grad_scores * (C @ B.T)
    kept = (left * w * (B @ grad_state.T)).sum(1)
    grad_s = inside.sum(1) - inside.sum(0) + (into * grad_y * (C @ state.T)).sum(1) - kept
    grad_s[-1] += kept.sum() + s[-1].exp() * (grad_state * state).sum()
    return grad_w, grad_s, grad_B, grad_C, grad_S
'''.strip(),
    hints=(
        "Start with w: it enters y through the matrix M = L * (C B^T), and S' through the second "
        "sum. Its gradient is `M.T @ grad_y` plus, for token r, `exp(s_q - s_r)` times "
        "`grad_state @ B_r`.",
        "C B^T is multiplied by L and by w: its gradient is `G = L * (grad_y @ w.T)`. So the "
        "gradient of C has `G @ B`, that of B has `G.T @ C`. Both get a second term, C from "
        "reading S and B from S'. S is read by every token and decays into S'.",
        "s_l raises row l of L and lowers column l: with `E = G * (C @ B.T)` it gets "
        "`E.sum(1) - E.sum(0)`. It also scales what token l reads from S, and it lowers what is "
        "left of w_l in S'. The last entry, s_q, raises everything in S'.",
    ),
    checks=(
        Check("gradient of w", checks.chunk_gradient_w, hint=1, points=1),
        Check("gradients of B and C", checks.chunk_gradient_directions, hint=2, points=2),
        Check("gradient of the state", checks.chunk_gradient_state, hint=2, points=1),
        Check("gradient of s", checks.chunk_gradient_s, hint=3, points=1),
        Check("strong decay", checks.chunk_gradient_strong, hint=3, points=1),
    ),
)

EXERCISES: tuple[Exercise, ...] = (
    DECAY_MASK,
    SCAN_BY_MATRIX,
    CHUNKED_SCAN,
    CAUSAL_CONV,
    GATE_AND_NORM,
    MAMBA2,
    DECODING,
    STEP_KERNEL,
    CHUNK_GRADIENTS,
)
