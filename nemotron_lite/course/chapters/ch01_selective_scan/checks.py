"""Checks of chapter 01's exercises.

Values are compared with `ops.selective_scan`, with autograd, with the layer of `lesson.py`, or with
a property that every correct answer has: a step cut in two, a text cut in two, spans grouped
differently. Inputs are made when a check runs, and have the strides that a projection gives. The
last checks of an exercise are the cases in which published programs failed: a step below the clamp
of another library, a state of the caller that is overwritten, groups in the wrong order, lengths
that are not a power of two, the indices of a backward pass.

An answer is only called, and a layer only constructed, loaded and called: so it may run in another
process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_lite import ops
from nemotron_lite.course.chapters.ch01_selective_scan.lesson import ScanLayer
from nemotron_lite.course.exercises import close, gradients

Answer = Callable[..., Any]
Span = tuple[Tensor, Tensor]
RULES = ("zoh", "euler")
tensor = partial(torch.tensor, dtype=torch.float64)


def steps_by_hand(function: Answer) -> None:
    dt = tensor([[0.5, 1.0], [0.25, 2.0]])
    A = tensor([-2.0, -1.0])
    exponents = tensor([[-1.0, -1.0], [-0.5, -2.0]])
    for rule in RULES:
        fade, gain = function(dt, A, rule)
        close(fade, exponents.exp(), what=f"the fade of rule {rule!r}")
        if rule == "euler":
            close(gain, dt, what="the gain of rule 'euler'")


def half_a_step_twice(function: Answer) -> None:
    dt, A = tensor([[0.3, 1.7], [2.5, 0.01]]), tensor([-0.7, -3.0])
    _, gain = function(dt, A, "zoh")
    half_fade, half_gain = function(dt / 2, A, "zoh")
    twice = half_gain * (1 + half_fade)
    close(twice, gain, what="two steps of dt/2 against one of dt, gains of rule 'zoh'")
    _, rest = function(100 * torch.ones_like(dt), A, "zoh")
    close(rest, (-1 / A).expand(2, 2), what="a very long step, which ends where A S + B x = 0")


def small_steps(function: Answer) -> None:
    dt, A = tensor([1e-4, 5e-4, 1e-6]), tensor([-1.0, -0.1, -8.0])
    for rule in RULES:
        fade, gain = function(dt, A, rule)
        what = f"with dt = 0.0001, 0.0005 and 0.000001, rule {rule!r}"
        close(gain, dt, what=f"the gain {what}", rtol=1e-4, atol=0.0)
        close(1 - fade, -dt * A, what=f"1 - fade {what}", rtol=1e-3, atol=0.0)
        fade, gain = function(torch.zeros_like(dt), A, rule)
        close(gain, torch.zeros_like(dt), what=f"the gain with dt = 0, rule {rule!r}", atol=0.0)


def tiny_steps(function: Answer) -> None:
    dt = torch.tensor([1e-5, 3e-3, 1e-9])
    A = torch.tensor([-1e-3, -1e-5, -1.0])
    _, gain = function(dt, A, "zoh")
    what = "the gain of rule 'zoh' in float32, for exponents near -1e-8"
    close(gain, dt, what=what, rtol=1e-5, atol=0.0)


def no_fading(function: Answer) -> None:
    dt, A = tensor([[0.5, 0.2], [0.0, 1.3]]), tensor([0.0, -1.5])
    fade, gain = function(dt, A, "zoh")
    close(fade[:, 0], tensor([1.0, 1.0]), what="the fade for A = 0")
    close(gain[:, 0], dt[:, 0], what="the gain of rule 'zoh' for A = 0")
    for rule in RULES:
        leaf = dt.clone().requires_grad_()
        torch.cat(function(leaf, A, rule)).sum().backward()
        assert leaf.grad is not None, f"no gradient reaches dt, rule {rule!r}."
        slope = A * (dt * A).exp() + (1.0 if rule == "euler" else (dt * A).exp())
        close(leaf.grad, slope, what=f"the gradient of fade + gain in dt, rule {rule!r}")


def scan_inputs(
    t: int, *, b: int = 2, h: int = 4, p: int = 3, g: int = 1, n: int = 5, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs of a scan in float64; x and dt are slices of one tensor, as after a projection."""
    random = torch.Generator().manual_seed(1000 * t + seed)
    normal = partial(torch.randn, generator=random, dtype=torch.float64)
    wide = normal(b, t, h * (p + 1))
    return {
        "x": wide[..., h:].unflatten(-1, (h, p)),
        "dt": F.softplus(wide[..., :h]),
        "A": -torch.linspace(0.2, 2.0, h, dtype=torch.float64),
        "B": normal(b, t, g, n),
        "C": normal(b, t, g, n),
        "D": normal(h),
        "state": normal(b, h, p, n),
    }


def exact(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The package's definition, with the arguments of the exercise."""
    return ops.selective_scan(x, dt, A, B, C, D=D, initial_state=state)


def compare_scans(function: Answer, inputs: dict[str, Tensor], what: str) -> None:
    """Outputs and last state against the definition."""
    expected_y, expected_state = exact(**inputs)
    y, state = function(**inputs)
    close(y, expected_y, what=f"y, {what}")
    close(state, expected_state, what=f"the last state, {what}")


def one_token_by_hand(function: Answer) -> None:
    one = {"x": tensor([3.0]).view(1, 1, 1, 1), "dt": tensor([2.0]).view(1, 1, 1)}
    halving = -torch.log(tensor([2.0])) / 2
    B, C = tensor([1.0, 10.0]).view(1, 1, 1, 2), tensor([1.0, 1.0]).view(1, 1, 1, 2)
    empty = torch.zeros_like(B).view(1, 1, 1, 2)
    y, last = function(**one, A=halving, B=B, C=C, D=tensor([0.5]), state=empty)
    close(last.flatten(), tensor([6.0, 60.0]), what="the state: dt x B with dt = 2, x = 3")
    close(y.flatten(), tensor([67.5]), what="y: S C + D x with D = 1/2")


def recurrence_values(function: Answer) -> None:
    for inputs, what in (
        (scan_inputs(9), "9 tokens from a zero state"),
        (scan_inputs(1, b=1, h=1, p=1, n=1), "one token, all sizes 1"),
    ):
        compare_scans(function, {**inputs, "state": torch.zeros_like(inputs["state"])}, what)


def cut_in_two(function: Answer) -> None:
    inputs = scan_inputs(8)
    y, last = exact(**inputs)
    for cut in (1, 5):
        pieces = []
        state = inputs["state"].clone()
        for piece in (slice(None, cut), slice(cut, None)):
            part = {name: inputs[name][:, piece] for name in ("x", "dt", "B", "C")}
            answer, state = function(**part, A=inputs["A"], D=inputs["D"], state=state)
            pieces.append(answer)
        close(torch.cat(pieces, 1), y, what=f"y of a text of 8 tokens cut after {cut}")
        close(state, last, what=f"the last state of a text of 8 tokens cut after {cut}")


def state_left_alone(function: Answer) -> None:
    inputs = scan_inputs(3)
    before = {name: value.clone() for name, value in inputs.items()}
    function(**inputs)
    for name, value in before.items():
        close(inputs[name], value, what=f"the caller's `{name}` after the call")


def small_step_head(function: Answer) -> None:
    inputs = scan_inputs(200, b=1, p=2, n=3)
    inputs["dt"] = torch.full_like(inputs["dt"], 1e-5)
    compare_scans(function, inputs, "200 tokens with dt = 0.00001")


def recurrence_gradients(function: Answer) -> None:
    gradients(function, exact, scan_inputs(5, b=1, h=2, p=2, n=3), what="5 tokens")


def groups(function: Answer) -> None:
    compare_scans(function, scan_inputs(4, h=4, g=2), "4 heads in 2 groups")
    compare_scans(function, scan_inputs(4, h=6, g=3), "6 heads in 3 groups")


def fresh(spans: list[Span]) -> list[Span]:
    """Copies, so that an answer that writes into its arguments spoils only its own."""
    return [(fade.clone(), write.clone()) for fade, write in spans]


def random_spans(count: int, seed: int = 0) -> list[Span]:
    """Fades `h 1` between 0 and 1, writes `h s`."""
    random = torch.Generator().manual_seed(seed)
    fade = torch.rand(count, 2, 1, generator=random, dtype=torch.float64)
    write = torch.randn(count, 2, 3, generator=random, dtype=torch.float64)
    return list(zip(fade, write, strict=True))


def compare_spans(actual: Span, expected: Span, what: str) -> None:
    for name, one, other in zip(("fade", "write"), actual, expected, strict=True):
        close(one, other, what=f"the {name} of {what}")


def spans_by_hand(function: Answer) -> None:
    token = (tensor(0.5), tensor(4.0))
    both = function(*fresh([token, token]))
    compare_spans(both, (tensor(0.25), tensor(6.0)), "`S / 2 + 4`, twice")


def spans_in_order(function: Answer) -> None:
    first, second = (tensor(0.5), tensor(4.0)), (tensor(3.0), tensor(1.0))
    both = function(*fresh([first, second]))
    compare_spans(both, (tensor(1.5), tensor(13.0)), "`S / 2 + 4`, then `3 S + 1`")
    both = function(*fresh([second, first]))
    compare_spans(both, (tensor(1.5), tensor(4.5)), "`3 S + 1`, then `S / 2 + 4`")


def spans_regrouped(function: Answer) -> None:
    spans = random_spans(3)
    a, b, c = fresh(spans)
    left = function(function(a, b), c)
    a, b, c = fresh(spans)
    right = function(a, function(b, c))
    compare_spans(left, right, "(a b) c against a (b c)")
    nothing = (torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64))
    compare_spans(function(*fresh([nothing, spans[0]])), spans[0], "the empty span, then a")
    compare_spans(function(*fresh([spans[0], nothing])), spans[0], "a, then the empty span")


def spans_folded(function: Answer) -> None:
    spans = random_spans(7)
    _, state = reduce(function, fresh(spans))
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for fade, write in spans:
        expected = fade * expected + write
    close(state, expected, what="7 tokens folded into one, from a zero state")


def spans_left_alone(function: Answer) -> None:
    spans = random_spans(2)
    before = fresh(spans)
    function(*spans)
    for name, span, copy in zip(("earlier", "later"), spans, before, strict=True):
        compare_spans(span, copy, f"the argument `{name}` after the call")


def spans_of(fade: Tensor, write: Tensor) -> Span:
    """The spans of tokens 0 to i, token by token."""
    fades, writes = [fade[0]], [write[0]]
    for i in range(1, len(write)):
        writes.append(fade[i] * writes[-1] + write[i])
        fades.append(fade[i] * fades[-1])
    return torch.stack(fades), torch.stack(writes)


def prefixes_by_hand(function: Answer) -> None:
    fade, write = tensor([2.0, 1.0, 0.5, 3.0]), tensor([1.0, 2.0, 3.0, 4.0])
    found = function(fade.view(4, 1), write.view(4, 1))
    expected = tensor([2.0, 2.0, 1.0, 3.0]), tensor([1.0, 3.0, 4.5, 17.5])
    compare_spans(found, (expected[0].view(4, 1), expected[1].view(4, 1)), "4 tokens by hand")


def token_inputs(t: int) -> Span:
    """Fades `t 2 1` between 0 and 1 and writes `t 2 3`, with strides as after a transpose."""
    fade = torch.rand(2, t, 1, dtype=torch.float64).transpose(0, 1)
    return fade, torch.randn(2, t, 3, dtype=torch.float64).transpose(0, 1)


def prefixes_of_any_length(function: Answer) -> None:
    for t in (8, 7, 13, 2, 1):
        fade, write = token_inputs(t)
        fade = fade.expand_as(write)
        count = f"{t} token" if t == 1 else f"{t} tokens"
        found = function(fade.clone(), write.clone())
        compare_spans(found, spans_of(fade, write), f"{count} from the first")


def prefixes_broadcast(function: Answer) -> None:
    fade, write = token_inputs(6)
    found = function(fade.clone(), write.clone())
    compare_spans(found, spans_of(fade, write), "6 tokens, one fade for 3 numbers")


def prefixes_of_long_rows(function: Answer) -> None:
    fade, write = token_inputs(3000)
    before = fade.clone(), write.clone()
    found = function(fade, write)
    compare_spans((fade, write), before, "the caller's tokens after the call")
    compare_spans(found, spans_of(fade, write), "3000 tokens")


def prefix_gradients(function: Answer) -> None:
    gradients(function, spans_of, token_inputs(5), what="5 tokens")


def gradients_by_hand(function: Answer) -> None:
    fade = tensor([[0.5], [0.5]])
    write = tensor([[[2.0]], [[1.0]]])
    grad = tensor([[[3.0]], [[10.0]]])
    _, grad_write, _ = function(fade, write, tensor([[4.0]]), grad)
    # the first write is read at once, and half of it one token later
    close(grad_write.flatten(), tensor([8.0, 10.0]), what="the gradient of two writes")


def backward_case(t: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Arguments of `scan_gradients`, and what autograd says."""
    random = torch.Generator().manual_seed(t)
    normal = partial(torch.randn, generator=random, dtype=torch.float64)
    fade = torch.rand(t, 2, generator=random, dtype=torch.float64)
    write, state, grad = normal(t, 2, 3), normal(2, 3), normal(2, t, 3).transpose(0, 1)
    leaves = tuple(v.clone().requires_grad_() for v in (fade, write, state))
    now, loss = leaves[2], torch.zeros((), dtype=torch.float64)
    for i in range(t):
        now = leaves[0][i].unsqueeze(-1) * now + leaves[1][i]
        loss = loss + (grad[i] * now).sum()
    return (fade, write, state, grad), torch.autograd.grad(loss, leaves)


def _compare_gradient(function: Answer, which: int, name: str) -> None:
    for t in (6, 1):
        arguments, expected = backward_case(t)
        what = (
            f"the gradient of {name}, {t} tokens" if t > 1 else f"the gradient of {name}, 1 token"
        )
        close(function(*(v.clone() for v in arguments))[which], expected[which], what=what)


def fade_gradient(function: Answer) -> None:
    _compare_gradient(function, 0, "the fades")


def write_gradient(function: Answer) -> None:
    _compare_gradient(function, 1, "the writes")


def state_gradient(function: Answer) -> None:
    _compare_gradient(function, 2, "the first state")


SIZES = {"d": 6, "h": 2, "p": 3, "n": 4}


def layers(function: Answer, *, selective: bool = True) -> tuple[Any, ScanLayer]:
    """The learner's layer and the package's, with the same random weights."""
    reference = ScanLayer(**SIZES, selective=selective)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.normal_()
    layer = function(*SIZES.values(), selective=selective)
    layer.load_state_dict(reference.state_dict())
    return layer, reference


def token_rows(t: int) -> Tensor:
    """Rows `b t d` with the strides of a slice."""
    return torch.randn(2, t, 2 * SIZES["d"])[..., ::2]


def layer_weights(function: Answer) -> None:
    for selective in (True, False):
        layer = function(*SIZES.values(), selective=selective)
        expected = ScanLayer(**SIZES, selective=selective).state_dict()
        found = layer.state_dict()
        missing = sorted(set(expected) - set(found))
        more = sorted(set(found) - set(expected))
        assert not missing, f"the layer has no weights {', '.join(missing)}."
        assert not more, f"the layer has weights that nobody asked for: {', '.join(more)}."
        for name, weight in expected.items():
            shape = list(found[name].shape)
            assert shape == list(weight.shape), (
                f"{name} has shape {shape}; expected {list(weight.shape)}."
            )
        count = len(list(layer.parameters()))
        assert count == len(expected), (
            f"{count} of the {len(expected)} weights are trained: make A_log and D `nn.Parameter`."
        )


def layer_start(function: Answer) -> None:
    for h in (5, 1):
        weights = function(3, h, 2, 2).state_dict()
        spread = torch.linspace(0.0, 1.0, h)
        close(weights["A_log"].exp(), 0.1 ** (1 - spread), what=f"|A| at the start, {h} heads")
        steps = F.softplus(weights["dt_proj.bias"])
        close(steps, 0.05 ** (1 - spread), what=f"softplus(dt_proj.bias) at the start, {h} heads")
        close(weights["D"], torch.ones(h), what=f"D at the start, {h} heads")


def layer_controls(function: Answer) -> None:
    layer, reference = layers(function)
    for t in (5, 1):
        u = token_rows(t)
        found = layer.controls(u)
        for name, one, other in zip(("dt", "B", "C"), found, reference.controls(u), strict=True):
            close(one, other, what=f"{name} of {t} tokens")


def layer_time_invariant(function: Answer) -> None:
    layer, reference = layers(function, selective=False)
    u = token_rows(4)
    found = layer.controls(u)
    for name, one, other in zip(("dt", "B", "C"), found, reference.controls(u), strict=True):
        close(one, other, what=f"{name} with selective=False")
    apart = (layer(u)[0] - layer(2 * u)[0]).abs().max()
    assert apart > 1e-3, "with selective=False the output ignores the token: x comes from it."


def layer_output(function: Answer) -> None:
    for t, selective in ((7, True), (1, True), (6, False)):
        layer, reference = layers(function, selective=selective)
        u = token_rows(t)
        before = u.clone()
        output, state = layer(u)
        expected, expected_state = reference(u)
        close(output, expected, what=f"the output of {t} tokens", rtol=1e-3, atol=1e-4)
        close(state, expected_state, what=f"the state after {t} tokens", rtol=1e-3, atol=1e-4)
        close(u, before, what="the caller's u after the call")


def layer_cut_in_two(function: Answer) -> None:
    layer, reference = layers(function)
    u = token_rows(6)
    expected, expected_state = reference(u)
    for cut in (1, 4):
        first, state = layer(u[:, :cut])
        second, state = layer(u[:, cut:], state)
        what = f"of a text of 6 tokens cut after {cut}"
        close(torch.cat([first, second], 1), expected, what=f"output {what}", rtol=1e-3, atol=1e-4)
        close(state, expected_state, what=f"last state {what}", rtol=1e-3, atol=1e-4)


def layer_gradients(function: Answer) -> None:
    layer, reference = layers(function)
    u = token_rows(5)
    state = torch.randn(2, SIZES["h"], SIZES["p"], SIZES["n"])
    gradients(layer, reference, {"u": u, "state": state}, what="5 tokens after a state")
    found = []
    for one in (layer, reference):
        output, last = one(u)
        loss = output.square().sum() + last.sum()
        weights = list(one.parameters())
        slopes = torch.autograd.grad(loss, weights, allow_unused=True)
        found.append(dict(zip(one.state_dict(), slopes, strict=True)))
    for name, expected in found[1].items():
        slope = found[0][name]
        assert slope is not None, f"no gradient reaches {name}: look for .detach() and .data."
        close(slope, expected, what=f"the gradient of {name}", rtol=1e-3, atol=1e-3)


def kernel_inputs(t: int, **sizes: int) -> dict[str, Tensor]:
    """Inputs of a scan in float32, p and n powers of two."""
    return {name: v.float() for name, v in scan_inputs(t, **{"p": 2, "n": 4, **sizes}).items()}


def compare_kernel(function: Answer, inputs: dict[str, Tensor], what: str) -> None:
    """Outputs and last state against the definition, with the tolerance of float32."""
    expected_y, expected_state = exact(**inputs)
    y, state = function(**inputs)
    close(y, expected_y, what=f"y, {what}", rtol=1e-3, atol=1e-4)
    close(state, expected_state, what=f"the last state, {what}", rtol=1e-3, atol=1e-4)


def kernel_by_hand(function: Answer) -> None:
    one = {"x": torch.tensor([3.0]).view(1, 1, 1, 1), "dt": torch.tensor([2.0]).view(1, 1, 1)}
    A, empty = -torch.log(torch.tensor([2.0])) / 2, torch.zeros(1, 1, 1, 2)
    B, C = (torch.tensor(v).view(1, 1, 1, 2) for v in ([1.0, 10.0], [1.0, 1.0]))
    y, last = function(**one, A=A, B=B, C=C, D=torch.tensor([0.5]), state=empty)
    close(last.flatten(), torch.tensor([6.0, 60.0]), what="the state: dt x B with dt = 2, x = 3")
    close(y.flatten(), torch.tensor([67.5]), what="y: S C + D x with D = 1/2")


def kernel_values(function: Answer) -> None:
    inputs = kernel_inputs(5, b=2, h=2)
    compare_kernel(function, inputs, "5 tokens, 2 rows of 2 heads")


def kernel_groups(function: Answer) -> None:
    compare_kernel(function, kernel_inputs(3, b=1, h=4, g=2, p=4, n=2), "4 heads in 2 groups")
    compare_kernel(function, kernel_inputs(1, b=1, h=1, p=1, n=1), "one token, all sizes 1")


def kernel_cut_in_two(function: Answer) -> None:
    inputs = kernel_inputs(4, b=1, h=2)
    expected_y, expected_state = exact(**inputs)
    pieces, state = [], inputs["state"]
    for piece in (slice(None, 1), slice(1, None)):
        part = {name: inputs[name][:, piece] for name in ("x", "dt", "B", "C")}
        y, state = function(**part, A=inputs["A"], D=inputs["D"], state=state)
        pieces.append(y)
    what = "of a text of 4 tokens cut after 1"
    close(torch.cat(pieces, 1), expected_y, what=f"y {what}", rtol=1e-3, atol=1e-4)
    close(state, expected_state, what=f"the last state {what}", rtol=1e-3, atol=1e-4)
