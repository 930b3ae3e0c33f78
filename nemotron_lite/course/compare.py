"""Comparisons for the checks of an exercise; their messages tell the learner what to change.

"Tensors are not close" does not help a learner. Each helper here names the thing that was compared,
then the first problem that it finds: no result, the wrong type or shape, a value that is not
finite, and only then the largest difference with its position and both values. Numbers are printed
with four digits, so that the same mistake gives the same message on every machine, and with nine,
enough for any float32, where four do not tell the two apart.

Gradients are those of one randomly weighted sum of all outputs. A wrong gradient could pass only if
its error cancelled in that sum, which does not happen by accident.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Number = float | int
RTOL = 1e-4
ATOL = 1e-5


def close(
    actual: Any,
    expected: Any,
    *,
    what: str = "the result",
    rtol: Number = RTOL,
    atol: Number = ATOL,
    dtype: bool = False,
) -> None:
    """Assert that two results agree: tensors, numbers, or tuples and lists of them.

    Args:
        actual: what the learner's function gave.
        expected: what it should have given.
        what: its name in the message, such as "the state after the last token".
        rtol, atol: |actual - expected| <= atol + rtol * |expected|.
        dtype: also compare the dtype.

    Raises:
        AssertionError: the message says what differs.
    """
    if actual is None or actual is Ellipsis:
        raise AssertionError(f"{what} is {actual}: is a `return` missing?")
    if isinstance(expected, tuple | list):
        _close_items(actual, expected, what, rtol, atol, dtype)
    elif isinstance(expected, Tensor):
        if not isinstance(actual, Tensor):
            raise AssertionError(f"{what} is {_kind(actual)}; expected a tensor.")
        _close_tensors(actual, expected, what, rtol, atol, dtype)
    elif isinstance(expected, int | float) and not isinstance(expected, bool):
        _close_numbers(actual, expected, what, rtol, atol)
    elif actual != expected:
        raise AssertionError(f"{what} is {actual!r}; expected {expected!r}.")


def gradients(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Any] | Mapping[str, Any],
    *,
    what: str = "",
    rtol: Number = 1e-3,
    atol: Number = 1e-5,
) -> None:
    """Assert that both functions give the same result and the same gradient of each input.

    Args:
        function: the learner's.
        reference: called with the same arguments.
        inputs: arguments in order, or by name. Floating-point tensors are differentiated, the rest
            is passed on.
        what: the case, such as "5 tokens"; the message begins with it.
        rtol, atol: of the gradients.

    Raises:
        AssertionError: the message says which gradient differs or does not exist.
    """
    before = f"{what}: " if what else ""
    mine, mine_out = _differentiated(function, inputs)
    theirs, theirs_out = _differentiated(reference, inputs)
    close(mine_out, theirs_out, what=f"{before}the result")
    for (name, got), expected in zip(mine.items(), theirs.values(), strict=True):
        if expected is None:
            continue
        if got is None:
            raise AssertionError(
                f"{before}the gradient of {name} does not exist: as far as autograd can see, the "
                f"result does not depend on {name}. Look for .detach(), .item(), .data or "
                "torch.tensor(...)."
            )
        close(got, expected, what=f"{before}the gradient of {name}", rtol=rtol, atol=atol)


def raises(
    function: Callable[..., Any],
    *args: Any,
    error: type[Exception] = ValueError,
    what: str = "bad input",
    match: str = "",
    **kwargs: Any,
) -> None:
    """Assert that the call raises `error`, with `match` in its message.

    Raises:
        AssertionError: nothing was raised, or something else.
    """
    try:
        function(*args, **kwargs)
    except error as raised:
        if match not in str(raised):
            raise AssertionError(
                f"{what}: the {error.__name__} says {str(raised)!r}; it should name {match!r}."
            ) from raised
        return
    except NotImplementedError:
        raise
    except Exception as raised:
        raise AssertionError(
            f"{what}: raised {type(raised).__name__}; expected {error.__name__}."
        ) from raised
    raise AssertionError(f"{what}: nothing was raised; expected {error.__name__}.")


def keeps_inputs(function: Callable[..., Any], *args: Any, what: str = "the function") -> Any:
    """Call the function, assert that it left its tensors as they were, and return its result.

    Raises:
        AssertionError: the message names the argument that was changed in place.
    """
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    result = function(*args)
    for position, (was, now) in enumerate(zip(before, args, strict=True), 1):
        if isinstance(was, Tensor) and not torch.equal(was, now):
            raise AssertionError(
                f"{what} changed its argument {position} in place (`+=`, `x[...] = `, `.mul_`); "
                "work on a new tensor."
            )
    return result


def strided(tensor: Tensor) -> Tensor:
    """The same values in memory that is not contiguous, as after a transpose or a slice."""
    wide = tensor.new_zeros((*tensor.shape, 2))
    wide[..., 0] = tensor
    return wide[..., 0]


def _close_items(
    actual: Any, expected: Sequence[Any], what: str, rtol: Number, atol: Number, dtype: bool
) -> None:
    if not isinstance(actual, tuple | list):
        raise AssertionError(f"{what} is {_kind(actual)}; expected {len(expected)} results.")
    if len(actual) != len(expected):
        raise AssertionError(f"{what} has {len(actual)} parts; expected {len(expected)}.")
    for position, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
        if theirs is None and mine is None:
            continue
        close(mine, theirs, what=f"{what}, part {position}", rtol=rtol, atol=atol, dtype=dtype)


def _close_numbers(actual: Any, expected: Number, what: str, rtol: Number, atol: Number) -> None:
    if isinstance(actual, Tensor) and actual.numel() == 1:
        actual = actual.item()
    if isinstance(actual, bool) or not isinstance(actual, int | float):
        raise AssertionError(f"{what} is {_kind(actual)}; expected a number.")
    if not abs(actual - expected) <= atol + rtol * abs(expected):
        raise AssertionError(f"{what} is {_digits(actual)}; expected {_digits(expected)}.")


def _close_tensors(
    actual: Tensor, expected: Tensor, what: str, rtol: Number, atol: Number, dtype: bool
) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(
            f"{what} has shape {list(actual.shape)}; expected {list(expected.shape)}."
        )
    if dtype and actual.dtype != expected.dtype:
        raise AssertionError(f"{what} has dtype {actual.dtype}; expected {expected.dtype}.")
    if actual.numel() == 0:
        return
    mine, theirs = actual.detach().double(), expected.detach().double()
    not_finite = ~torch.isfinite(mine) & torch.isfinite(theirs)
    if not_finite.any():
        place = not_finite.nonzero()[0].tolist()
        raise AssertionError(
            f"{what} has {int(not_finite.sum())} values that are not finite, the first at {place}."
        )
    wrong = ~torch.isclose(mine, theirs, rtol=rtol, atol=atol, equal_nan=True)
    if not wrong.any():
        return
    if wrong.numel() == 1:
        found, wanted = _two(mine.item(), theirs.item())
        raise AssertionError(f"{what} is {found}; expected {wanted}.")
    gap = torch.where(wrong, (mine - theirs).abs(), -1.0).nan_to_num(posinf=1e300)
    place = list(torch.unravel_index(gap.argmax(), gap.shape))
    at = tuple(int(i) for i in place)
    share = int(wrong.sum())
    found, wanted = _two(mine[at].item(), theirs[at].item())
    raise AssertionError(
        f"{what} differs in {share} of {wrong.numel()} values. The largest difference is at "
        f"{list(at)}: yours {found}, expected {wanted}."
    )


def _differentiated(
    function: Callable[..., Any], inputs: Sequence[Any] | Mapping[str, Any]
) -> tuple[dict[str, Tensor | None], Any]:
    """Gradients of a sum of the outputs with fixed random weights, by input; and the outputs."""
    by_name = isinstance(inputs, Mapping)
    named = dict(inputs) if by_name else {f"argument {i}": v for i, v in enumerate(inputs, 1)}
    leaves = {}
    for name, value in named.items():
        floating = isinstance(value, Tensor) and value.is_floating_point()
        # detach, not clone: a clone of a strided tensor is contiguous
        leaves[name] = value.detach().requires_grad_() if floating else value
    result = function(**leaves) if by_name else function(*leaves.values())
    outputs = result if isinstance(result, tuple | list) else [result]
    generator = torch.Generator().manual_seed(0)
    total = None
    for output in outputs:
        if not isinstance(output, Tensor):
            continue
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        if output.requires_grad:
            part = (output * weight.to(output)).sum()
            total = part if total is None else total + part
    inputs_with_gradient = {
        n: v for n, v in leaves.items() if isinstance(v, Tensor) and v.requires_grad
    }
    if total is None:
        return dict.fromkeys(inputs_with_gradient), result
    found = torch.autograd.grad(total, list(inputs_with_gradient.values()), allow_unused=True)
    return dict(zip(inputs_with_gradient, found, strict=True)), result


def _kind(value: Any) -> str:
    """`a tuple of 2`, `a float`, `a tensor of shape [3]`."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _two(found: Number, expected: Number) -> tuple[str, str]:
    """Both numbers with four digits, or with nine where four are the same."""
    short = _digits(found), _digits(expected)
    return short if short[0] != short[1] else (f"{found:.9g}", f"{expected:.9g}")


def _digits(value: Number) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
