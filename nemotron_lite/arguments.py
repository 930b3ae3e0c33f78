"""Numbers that a caller gives: what counts as an integer or as a number, in one place.

A seed may come from NumPy, a length from a tensor, a limit from a file. What stands for an integer
(`operator.index` decides) becomes a Python int. What does not, such as 3.0, "3" or True, is refused
with the name of the argument. So nothing is rounded or counted silently.

    seed = integer("seed", numpy.int64(3), low=0)          3
    integer("top_k", 2.5, low=1)                           TypeError: top_k=2.5 (float): expected …

Source: PEP 357 for `__index__`.
"""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from typing import Any, cast

_SHOWN = 60  # characters of a wrong value in a message


def integer(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> int:
    """`value` as a Python int.

    Accepts Python and NumPy integers and tensors with one element of an integer dtype.

    Args:
        name: of the argument, for the message.
        low, high: smallest and largest allowed value; None is no limit.

    Raises:
        TypeError: not an integer; booleans and floats are none.
        ValueError: out of range.
    """
    expected = f"an integer{_range(low, high)}"
    if _is_boolean(value):
        raise TypeError(_message(name, value, expected))
    try:
        found = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(_message(name, value, expected)) from None
    if (low is not None and found < low) or (high is not None and found > high):
        raise ValueError(_message(name, value, expected))
    return int(found)


def number(
    name: str,
    value: Any,
    *,
    low: int | float | None = None,
    high: int | float | None = None,
    above: int | float | None = None,
) -> float:
    """`value` as a Python float that is finite.

    Accepts Python and NumPy numbers and tensors with one real element.

    Args:
        name: of the argument, for the message.
        low, high: smallest and largest allowed value; None is no limit.
        above: the value must be larger than this; None is no limit.

    Raises:
        TypeError: not a real number; booleans and texts are none.
        ValueError: out of range, NaN or infinite.
    """
    expected = f"a number{_range(low, high)}"
    if above is not None:
        expected = f"a number above {above:g}{'' if high is None else f' and at most {high:g}'}"
    # A NumPy scalar and a tensor with one element both have `item`.
    plain = value.item() if hasattr(value, "item") and _has_one_element(value) else value
    if _is_boolean(plain) or not isinstance(plain, numbers.Real):
        raise TypeError(_message(name, value, expected))
    try:
        found = float(plain)
    except OverflowError:  # an integer of more than 308 digits
        found = math.inf
    outside = (
        not math.isfinite(found)
        or (low is not None and found < low)
        or (high is not None and found > high)
        or (above is not None and found <= above)
    )
    if outside:
        raise ValueError(_message(name, value, expected))
    return found


def flag(name: str, value: Any) -> bool:
    """`value` as a Python bool; NumPy's are accepted, numbers and texts are not.

    Raises:
        TypeError: not a boolean.
    """
    if not _is_boolean(value):
        raise TypeError(_message(name, value, "True or False"))
    return bool(value)


def _is_boolean(value: object) -> bool:
    dtype = str(getattr(value, "dtype", ""))
    return isinstance(value, bool) or (dtype in ("bool", "torch.bool") and _has_one_element(value))


def _has_one_element(value: object) -> bool:
    shape = cast("Any", getattr(value, "shape", ()))
    return math.prod(shape) == 1


def _range(low: int | float | None, high: int | float | None) -> str:
    if low is None and high is None:
        return ""
    if high is None:
        return f" of at least {low:,}"
    return f" of at most {high:,}" if low is None else f" from {low:,} to {high:,}"


def shown(value: object, limit: int = _SHOWN) -> str:
    """The repr of any value for a message: short, in characters that UTF-8 has, never failing."""
    if isinstance(value, str | bytes):
        value = value[: limit + 1]  # the repr of a long text would take as long as it is
    short = reprlib.Repr()  # the same for lists and dicts, inside too
    short.maxstring = short.maxother = short.maxlong = 4 * limit + 10
    try:
        text = short.repr(value)
    except Exception:  # an object whose repr fails, or an int of more digits than Python prints
        text = "…"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _message(name: str, value: object, expected: str) -> str:
    return f"{name}={shown(value)} ({type(value).__name__}): expected {expected}."
