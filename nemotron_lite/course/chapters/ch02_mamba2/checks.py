"""Checks of chapter 02's exercises.

Every check compares with the definition in `ops`, or with the package's layer, on random inputs
made when it runs: several groups, and x and dt with the strides that a projection gives. The last
checks of an exercise are the cases in which published programs failed: heads that forget everything
at each token, a state from an earlier piece of text, an old cache that is used again, channels near
zero and channels too large for half precision.

Answers are only called, with tensors and configs, so they may run in another process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_lite import layers, ops
from nemotron_lite.config import NemotronConfig
from nemotron_lite.course.exercises import close, gradients, keeps_inputs

Answer = Callable[..., Any]

# A layer small enough to check in milliseconds: two heads in each of two groups, every width
# different, and an eps that is large enough to matter.
LAYER = NemotronConfig(
    pattern="M",
    vocab_size=16,
    hidden_size=7,
    mamba_num_heads=4,
    mamba_head_dim=3,
    ssm_state_size=5,
    n_groups=2,
    norm_eps=0.1,
)


def scan_inputs(
    t: int, *, b: int = 2, h: int = 4, p: int = 3, g: int = 2, n: int = 5
) -> dict[str, Tensor]:
    """Inputs of a scan in float64, with x and dt strided as a projection leaves them."""
    wide = torch.randn(b, t, h * (p + 1), dtype=torch.float64)
    return {
        "x": wide[..., h:].unflatten(-1, (h, p)),
        "dt": F.softplus(wide[..., :h]),
        "A": -torch.linspace(0.2, 2.0, h, dtype=torch.float64),
        "B": torch.randn(b, t, g, n, dtype=torch.float64),
        "C": torch.randn(b, t, g, n, dtype=torch.float64),
        "state": torch.randn(b, h, p, n, dtype=torch.float64),
    }


def copies(v: dict[str, Tensor]) -> list[Tensor]:
    """The values for a call that may overwrite them; only the last check is about that."""
    return [value.clone() for value in v.values()]


def without_state(v: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in v.items() if name != "state"}


# 02.decay_mask


def mask_by_hand(function: Answer) -> None:
    dt = torch.tensor([1.0, 2.0, 1.0]).view(1, 3, 1)
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.25, 1.0, 0.0], [0.125, 0.5, 1.0]])
    halving = -torch.log(torch.tensor([2.0]))
    close(function(dt, halving), expected[None, None], what="three tokens that halve the state")


def mask_in_the_matrix(function: Answer) -> None:
    v = scan_inputs(11)
    mask = function(v["dt"], v["A"])
    scores = torch.einsum("blgn,brgn->bglr", v["C"], v["B"]).repeat_interleave(2, dim=1)
    close(mask.shape, (2, 4, 11, 11), what="the shape of the mask")
    written = v["dt"].unsqueeze(-1) * v["x"]
    y = torch.einsum("bhlr,brhp->blhp", mask * scores, written)
    exact, _ = ops.selective_scan(**without_state(v))
    close(y, exact, what="mask * scores against the recurrence, 4 heads and 11 tokens")


def reference_mask(dt: Tensor, A: Tensor) -> Tensor:
    total = (dt * A).cumsum(1).transpose(1, 2)
    exponent = total.unsqueeze(-1) - total.unsqueeze(-2)
    seen = torch.ones(exponent.shape[-2:], dtype=torch.bool).tril()
    return exponent.masked_fill(~seen, -torch.inf).exp()


def mask_under_strong_decay(function: Answer) -> None:
    dt = torch.full((1, 12, 1), 40.0, requires_grad=True)
    A = torch.tensor([-5.0], requires_grad=True)
    mask = function(dt, A)
    close(mask, torch.eye(12)[None, None], what="a head that forgets everything at each token")
    mask.sum().backward()
    for name, leaf in (("dt", dt), ("A", A)):
        assert leaf.grad is not None, f"no gradient reaches {name}"
        assert leaf.grad.isfinite().all(), (
            f"under strong decay the gradient of {name} contains {leaf.grad.flatten()[0].item()}"
        )


def mask_gradients(function: Answer) -> None:
    v = scan_inputs(6)
    inputs = {"dt": v["dt"], "A": v["A"]}
    gradients(by_position(function), reference_mask, inputs)


# 02.scan_by_matrix


def reference_scan(**v: Tensor) -> tuple[Tensor, Tensor]:
    state = v.pop("state", None)
    return ops.selective_scan(**v, initial_state=state)


def by_position(function: Answer) -> Answer:
    """Call with the values only: a learner may have renamed the arguments."""
    return lambda **named: function(*named.values())


def matrix_by_hand(function: Answer) -> None:
    x, dt = torch.full((1, 1, 1, 2), 3.0), torch.full((1, 1, 1), 0.5)
    B, C = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2), torch.tensor([4.0, 1.0]).view(1, 1, 1, 2)
    y = function(x, dt, torch.tensor([-7.0]), B, C)
    close(y, torch.full((1, 1, 1, 2), 9.0), what="dt x (C · B) of one token, 0.5 · 3 · 6")


def same_scan(function: Answer, v: dict[str, Tensor], what: str) -> None:
    exact, _ = reference_scan(**v)
    close(function(*v.values()), exact, what=what)


def matrix_one_group(function: Answer) -> None:
    same_scan(function, without_state(scan_inputs(7, h=2, g=1)), "7 tokens, 2 heads, one group")


def matrix_groups(function: Answer) -> None:
    same_scan(function, without_state(scan_inputs(6)), "6 tokens, 4 heads in 2 groups")
    same_scan(function, without_state(scan_inputs(1, h=3, g=3)), "one token, 3 groups")


def matrix_under_strong_decay(function: Answer) -> None:
    v = without_state(scan_inputs(8))
    v["dt"] = torch.full_like(v["dt"], 500.0)
    same_scan(function, v, "outputs of heads that forget everything at each token")


def matrix_gradients(function: Answer) -> None:
    v = without_state(scan_inputs(5))
    gradients(by_position(function), lambda **named: reference_scan(**named)[0], v)


# 02.chunked_scan


def scan_one_chunk(function: Answer) -> None:
    v = scan_inputs(6)
    v["state"] = torch.zeros_like(v["state"])
    exact, _ = reference_scan(**v)
    y, _ = function(*v.values(), 8)
    close(y, exact, what="outputs of 6 tokens in one chunk, from a zero state")


def scan_reads_state(function: Answer) -> None:
    v = scan_inputs(6)
    exact, _ = reference_scan(**v)
    y, _ = function(*v.values(), 6)
    close(y, exact, what="outputs of 6 tokens in one chunk, after a state")


def scan_hands_on(function: Answer) -> None:
    v = scan_inputs(6)
    _, last = reference_scan(**v)
    close(function(*v.values(), 6)[1], last, what="the state after 6 tokens")


def scan_every_chunk_length(function: Answer) -> None:
    v = scan_inputs(11)
    exact, last = reference_scan(**v)
    for q in (1, 4, 10, 11, 64):
        y, state = function(*copies(v), q)
        close(y, exact, what=f"11 tokens in chunks of {q}")
        close(state, last, what=f"the state after 11 tokens in chunks of {q}")


def scan_leaves_state_alone(function: Answer) -> None:
    v = scan_inputs(5)
    keeps_inputs(function, *v.values(), 2, what="chunked_scan")


def scan_under_strong_decay(function: Answer) -> None:
    v = scan_inputs(8)
    v["dt"] = torch.full_like(v["dt"], 500.0)
    exact, last = reference_scan(**v)
    y, state = function(*v.values(), 4)
    close(y, exact, what="outputs of heads that forget everything at each token")
    close(state, last, what="the state of heads that forget everything at each token")


def scan_gradients(function: Answer) -> None:
    v = scan_inputs(5)
    gradients(lambda **named: function(*named.values(), 2), reference_scan, v)


# 02.causal_conv


def conv_inputs(t: int, *, b: int = 2, c: int = 5, k: int = 4) -> dict[str, Tensor]:
    wide = torch.randn(b, t, 2 * c, dtype=torch.float64)
    return {
        "x": wide[..., c:],
        "weight": torch.randn(c, k, dtype=torch.float64),
        "bias": torch.randn(c, dtype=torch.float64),
        "state": torch.randn(b, k - 1, c, dtype=torch.float64),
    }


def reference_conv(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return ops.causal_conv1d(x, weight, bias, initial_state=state, impl="naive")


def conv_by_hand(function: Answer) -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1)
    taps, bias = torch.tensor([[100.0, 10.0, 1.0]]), torch.tensor([0.5])
    y, _ = function(x, taps, bias, torch.tensor([8.0, 9.0]).view(1, 2, 1))
    expected = torch.tensor([891.5, 912.5, 123.5, 234.5]).view(1, 4, 1)
    close(y, expected, what="tokens 1 2 3 4 after 8 9, with the taps 100 10 1 and a bias of 0.5")


def conv_values(function: Answer) -> None:
    v = conv_inputs(9)
    exact, _ = reference_conv(**v)
    close(function(*v.values())[0], exact, what="9 tokens of 5 channels")


def conv_in_pieces(function: Answer) -> None:
    v = conv_inputs(9)
    exact, last = reference_conv(**v)
    for lengths in ((9,), (5, 4), (1,) * 9, (2, 1, 6)):
        state, outputs = v["state"].clone(), []
        for part in v["x"].split(lengths, dim=1):
            y, state = function(part, v["weight"], v["bias"], state)
            outputs.append(y)
        pieces = " + ".join(map(str, lengths))
        close(state, last, what=f"the state after {pieces} tokens")
        close(torch.cat(outputs, dim=1), exact, what=f"{pieces} tokens in pieces")


def conv_leaves_state_alone(function: Answer) -> None:
    for t in (1, 5):
        keeps_inputs(function, *conv_inputs(t).values(), what="causal_conv")


def conv_gradients(function: Answer) -> None:
    gradients(by_position(function), reference_conv, conv_inputs(2))


# 02.gate_and_norm


def norm_inputs(channels: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    y, z = torch.randn(2, 3, 5, channels, dtype=torch.float64)
    # So large that eps does not matter.
    scale = torch.linspace(10.0, 100.0, channels, dtype=torch.float64)
    weight = 1 + 0.3 * torch.randn(channels, dtype=torch.float64)
    return {"y": (y * scale).to(dtype), "z": z.to(dtype), "weight": weight.to(dtype)}


def same_norm(
    function: Answer, v: dict[str, Tensor], groups: int, what: str, eps: float = 1e-5
) -> None:
    exact = ops.gated_rms_norm(v["y"], v["z"], v["weight"], groups, eps, impl="naive")
    close(function(*v.values(), groups, eps), exact, what=what)


def norm_one_group(function: Answer) -> None:
    same_norm(function, norm_inputs(6), 1, "one group of 6 channels")


def norm_groups(function: Answer) -> None:
    same_norm(function, norm_inputs(12), 3, "three groups of 4 channels")
    v = norm_inputs(12)
    before = function(*v.values(), 3, 1e-5)
    v["y"] = v["y"].clone()
    v["y"][..., 8:] *= 100
    close(
        function(*v.values(), 3, 1e-5)[..., :8],
        before[..., :8],
        what="the first two groups, when the third becomes 100 times larger",
    )


def norm_small(function: Answer) -> None:
    v = norm_inputs(8)
    v["y"] = 3e-5 * v["y"]
    same_norm(function, v, 2, "channels near zero, where eps decides")
    same_norm(function, v, 2, "channels near zero, with an eps of 0.01", eps=0.01)


def norm_half(function: Answer) -> None:
    v = norm_inputs(8, torch.float16)
    v["y"] = 60 * v["y"]
    exact = ops.gated_rms_norm(v["y"], v["z"], v["weight"], 2, 1e-5, impl="naive")
    result, what = function(*v.values(), 2, 1e-5), "the result for large float16 channels"
    close(result, exact, what=what, rtol=5e-3, atol=5e-3, dtype=True)


def norm_gradients(function: Answer) -> None:
    gradients(
        lambda **named: function(*named.values(), 2, 1e-5),
        lambda y, z, weight: ops.gated_rms_norm(y, z, weight, 2, 1e-5, impl="naive"),
        norm_inputs(8),
    )


# 02.mamba2 and 02.decoding


def package_layer() -> layers.Mamba2:
    """The package's layer with random weights, none of which can be left out unnoticed."""
    layer = layers.Mamba2(LAYER)
    with torch.no_grad():
        layer.init_weights(0.6, 1.0)
        layer.dt_bias.uniform_(-2, 1)
        layer.A_log.uniform_(-1, 1)
        layer.D.normal_()
        layer.norm.weight.uniform_(0.5, 2)
    return layer


def both_layers(function: Answer) -> tuple[layers.Mamba2, Any]:
    """The package's layer, and the learner's with the same weights."""
    theirs = package_layer()
    mine = function(LAYER)
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine


def parts_of(result: Any, count: int, expected: str) -> Any:
    """The parts of a result that has to be a tuple."""
    found = f"{len(result)} parts" if isinstance(result, tuple | list) else type(result).__name__
    assert found == f"{count} parts", f"{expected}; yours returned {found}"
    return result


def a_cache(b: int = 2) -> tuple[Tensor, Tensor]:
    """Random inputs of the convolution, and a random state."""
    inputs = torch.randn(b, LAYER.conv_kernel - 1, LAYER.conv_dim)
    return inputs, torch.randn(b, 4, 3, 5)


def package_read(
    layer: layers.Mamba2, u: Tensor, cache: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Output and new cache of the package's layer."""
    if cache is None:
        cache = torch.zeros_like(a_cache(len(u))[0]), torch.zeros_like(a_cache(len(u))[1])
    held = layers.mamba2.MambaCache(*cache)
    # A padded token at the end: the layer's own one-token path cannot be differentiated.
    padded = F.pad(u, (0, 0, 0, 1))
    lengths = torch.full((len(u),), u.shape[1])
    out: Tensor = layer(padded, held, layers.ForwardContext(lengths=lengths))[:, :-1]
    return out, (held.conv, held.ssm)


def reference_project(layer: layers.Mamba2, u: Tensor, conv: Tensor) -> tuple[Tensor, ...]:
    inner, shared = LAYER.mamba_inner_size, LAYER.n_groups * LAYER.ssm_state_size
    z, xBC, dt = F.linear(u, layer.in_proj.weight).split_with_sizes(layer.splits, dim=-1)
    taps = layer.conv1d.weight.squeeze(1)
    xBC, conv = ops.causal_conv1d(xBC, taps, layer.conv1d.bias, initial_state=conv, impl="naive")
    x, B, C = xBC.split_with_sizes((inner, shared, shared), dim=-1)
    B, C = (v.unflatten(-1, (LAYER.n_groups, -1)) for v in (B, C))
    x = x.unflatten(-1, (LAYER.mamba_num_heads, -1))
    return z, x, F.softplus(dt + layer.dt_bias), B, C, conv


def layer_project(function: Answer) -> None:
    theirs, mine = both_layers(function)
    u, (conv, _) = torch.randn(2, 6, LAYER.hidden_size), a_cache()
    parts = parts_of(mine.project(u, conv), 6, "project returns z, x, dt, B, C and conv")
    expected = reference_project(theirs, u, conv)
    for name, part, right in zip(("z", "x", "dt", "B", "C", "conv"), parts, expected, strict=True):
        close(part, right, what=f"project: {name}")


def layer_finish(function: Answer) -> None:
    theirs, mine = both_layers(function)
    y, x = torch.randn(2, 2, 5, LAYER.mamba_num_heads, LAYER.mamba_head_dim)
    z = torch.randn(2, 5, LAYER.mamba_inner_size)
    path = theirs.D.unsqueeze(-1) * x
    normed = ops.gated_rms_norm(
        (y + path).flatten(2), z, theirs.norm.weight, LAYER.n_groups, LAYER.norm_eps, impl="naive"
    )
    exact = F.linear(normed, theirs.out_proj.weight)
    close(mine.finish(y, x, z), exact, what="finish: D x, gate, norm and output projection")


def same_reading(
    theirs: layers.Mamba2, mine: Any, t: int, cache: tuple[Tensor, Tensor] | None, what: str
) -> None:
    u = torch.randn(2, t, LAYER.hidden_size)
    exact, exact_cache = package_read(theirs, u, cache)
    result = mine(u) if cache is None else mine(u, cache)
    result = parts_of(result, 2, "the layer returns a pair, the output and the cache")
    close(result[0], exact, what=f"the output of {what}", rtol=1e-3, atol=1e-4)
    close(result[1], exact_cache, what=f"the cache after {what}", rtol=1e-3, atol=1e-4)


def layer_text(function: Answer) -> None:
    same_reading(*both_layers(function), 9, None, "9 tokens")


def layer_lengths(function: Answer) -> None:
    theirs, mine = both_layers(function)
    same_reading(theirs, mine, 70, None, "70 tokens")
    same_reading(theirs, mine, 1, None, "one token")


def layer_in_pieces(function: Answer) -> None:
    theirs, mine = both_layers(function)
    same_reading(theirs, mine, 5, a_cache(), "5 tokens after a cache")
    u = torch.randn(2, 9, LAYER.hidden_size)
    exact, exact_cache = package_read(theirs, u, None)
    cache, outputs = None, []
    for part in u.split((2, 1, 6), dim=1):
        out, cache = mine(part, cache)
        outputs.append(out)
    close(torch.cat(outputs, dim=1), exact, what="the output of 2 + 1 + 6 tokens")
    close(cache, exact_cache, what="the cache after 2 + 1 + 6 tokens")


def layer_leaves_cache_alone(function: Answer) -> None:
    _, mine = both_layers(function)
    u, cache = torch.randn(2, 3, LAYER.hidden_size), a_cache()
    keeps_inputs(lambda *parts: mine(u, parts), *cache, what="the layer, called with a cache,")


def layer_gradients(function: Answer) -> None:
    theirs, mine = both_layers(function)
    u, (conv, ssm) = torch.randn(2, 5, LAYER.hidden_size), a_cache()
    gradients(
        lambda u, conv, ssm: mine(u, (conv, ssm))[0],
        lambda u, conv, ssm: package_read(theirs, u, (conv, ssm))[0],
        {"u": u, "conv": conv, "ssm": ssm},
    )
    for layer in (theirs, mine):
        layer.zero_grad()
    package_read(theirs, u, (conv, ssm))[0].square().sum().backward()
    mine(u, (conv, ssm))[0].square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in mine.named_parameters():
        right = expected[name].grad
        assert right is not None
        assert parameter.grad is not None, (
            f"no gradient reaches {name}: look for .data or .detach()"
        )
        close(parameter.grad, right, what=f"the gradient of {name}", rtol=1e-3, atol=1e-4)


def step_inputs() -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return torch.randn(2, LAYER.hidden_size), a_cache()


def step_one_token(function: Answer) -> None:
    theirs, mine = both_layers(function)
    u, cache = step_inputs()
    exact, _ = package_read(theirs, u.unsqueeze(1), cache)
    close(mine.step(u, cache)[0], exact[:, 0], what="the output of one token after a cache")


def step_cache(function: Answer) -> None:
    theirs, mine = both_layers(function)
    u, cache = step_inputs()
    _, after = package_read(theirs, u.unsqueeze(1), cache)
    close(mine.step(u, cache)[1], after, what="the cache after one token")


def steps_equal_prefill(function: Answer) -> None:
    theirs, mine = both_layers(function)
    u = torch.randn(2, 8, LAYER.hidden_size)
    exact, exact_cache = package_read(theirs, u, None)
    out, cache = mine(u[:, :3])
    outputs = [out]
    for token in u[:, 3:].split(1, dim=1):
        out, cache = mine(token, cache)
        outputs.append(out)
    close(torch.cat(outputs, dim=1), exact, what="3 tokens at once and then 5 single ones")
    close(cache, exact_cache, what="the cache after 3 tokens at once and then 5 single ones")


def step_leaves_cache_alone(function: Answer) -> None:
    _, mine = both_layers(function)
    u, cache = step_inputs()
    keeps_inputs(lambda *parts: mine.step(u, parts), *cache, what="step")


def step_gradients(function: Answer) -> None:
    theirs, mine = both_layers(function)
    u, (conv, ssm) = step_inputs()
    gradients(
        lambda u, conv, ssm: mine.step(u, (conv, ssm))[0],
        lambda u, conv, ssm: package_read(theirs, u.unsqueeze(1), (conv, ssm))[0][:, 0],
        {"u": u, "conv": conv, "ssm": ssm},
    )


# 02.step_kernel


def kernel_device() -> str:
    """Where a Triton kernel runs: on the GPU, unless the interpreter is switched on."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "cuda" if torch.cuda.is_available() and not interpreted else "cpu"


def kernel_inputs(b: int, h: int, g: int, p: int = 4, n: int = 8) -> dict[str, Tensor]:
    inputs = {
        "state": torch.randn(b, h, p, n),
        "x": torch.randn(b, h, p),
        "dt": torch.rand(b, h),
        "A": -torch.rand(h) - 0.1,
        "B": torch.randn(b, g, n),
        "C": torch.randn(b, g, n),
        "D": torch.randn(h),
    }
    return {name: value.to(kernel_device()) for name, value in inputs.items()}


def reference_step(v: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    scan: dict[str, Any] = dict(v)
    return ops.ssd_step(**scan, impl="torch")


def kernel_one_head(function: Answer) -> None:
    v = kernel_inputs(1, 1, 1)
    y, _ = reference_step(v)
    close(function(*v.values())[0], y, what="y of one head")


def kernel_groups(function: Answer) -> None:
    for sizes in ((3, 2, 1), (2, 4, 2), (1, 3, 3)):
        v = kernel_inputs(*sizes)
        y, _ = reference_step(v)
        what = "y of {} rows, {} heads, {} groups".format(*sizes)
        close(function(*v.values())[0], y, what=what)


def kernel_state(function: Answer) -> None:
    for sizes in ((1, 1, 1), (2, 4, 2)):
        v = kernel_inputs(*sizes)
        _, state = reference_step(v)
        what = "the new state of {} rows, {} heads, {} groups".format(*sizes)
        close(function(*v.values())[1], state, what=what)


def kernel_leaves_state_alone(function: Answer) -> None:
    keeps_inputs(function, *kernel_inputs(2, 2, 1).values(), what="step_by_kernel")


# 02.chunk_gradients


def chunk_inputs(q: int = 6, p: int = 3, n: int = 4) -> list[Tensor]:
    """w, s, B, C, state, grad_y, grad_state."""
    steps = torch.rand(q, dtype=torch.float64)
    shapes = [(q, n), (q, n), (p, n), (q, p), (p, n)]
    rest = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    return [torch.randn(q, p, dtype=torch.float64), -steps.cumsum(0), *rest]


def expected_gradients(v: list[Tensor]) -> tuple[Tensor, ...]:
    """By autograd, from the equations."""
    w, s, B, C, state = leaves = [part.detach().clone().requires_grad_() for part in v[:5]]
    future = torch.ones(len(s), len(s), dtype=torch.bool).triu(1)
    L = (s[:, None] - s[None, :]).masked_fill(future, -torch.inf).exp()
    y = (L * (C @ B.T)) @ w + s.exp()[:, None] * (C @ state.T)
    after = s[-1].exp() * state + ((s[-1] - s).exp()[:, None] * w).T @ B
    return torch.autograd.grad((y * v[5]).sum() + (after * v[6]).sum(), leaves)


def same_gradients(function: Answer, v: list[Tensor], which: dict[int, str], case: str) -> None:
    right = expected_gradients(v)
    found = parts_of(function(*v), 5, "chunk_gradients returns the gradients of w, s, B, C and S")
    for place, name in which.items():
        close(found[place], right[place], what=f"the gradient of {name}{case}")


def chunk_gradient_w(function: Answer) -> None:
    same_gradients(function, chunk_inputs(), {0: "w"}, "")


def chunk_gradient_directions(function: Answer) -> None:
    same_gradients(function, chunk_inputs(), {2: "B", 3: "C"}, "")


def chunk_gradient_state(function: Answer) -> None:
    same_gradients(function, chunk_inputs(), {4: "the state"}, "")


def chunk_gradient_s(function: Answer) -> None:
    same_gradients(function, chunk_inputs(), {1: "s"}, "")
    same_gradients(function, chunk_inputs(q=1), {1: "s"}, " of a single token")


def chunk_gradient_strong(function: Answer) -> None:
    v = chunk_inputs()
    v[1] = 800 * v[1] - torch.arange(1, 7, dtype=torch.float64)
    names = dict(enumerate(("w", "s", "B", "C", "the state")))
    same_gradients(function, v, names, " under strong decay")
