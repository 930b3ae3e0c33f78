"""Checks of arguments that several data functions have: lists of documents and of texts, tokens.

One text in place of a list of texts is the usual mistake. Python would read it as a list of
characters, so it has to be refused by its type. Integers are checked by `nemotron_lite.arguments`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def several(name: str, value: Any, what: str) -> list[Any]:
    """The entries of a list, a tuple, an array or a generator.

    Args:
        name: of the argument, for the message.
        what: what the entries have to be, for the message.

    Raises:
        TypeError: one text or one bytes object, or nothing that can be iterated.
    """
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray):
        try:
            return list(value)
        except TypeError:  # an array or a tensor without axes, a class
            pass
    raise TypeError(f"{name} is {type(value).__name__}: expected {what}, in a list or a tuple.")


def byte_documents(name: str, documents: Any) -> list[bytes]:
    """Documents of bytes as a list.

    Raises:
        TypeError: no list of bytes.
    """
    found = several(name, documents, "documents as bytes (text.encode() makes them)")
    for i, document in enumerate(found):
        if not isinstance(document, bytes):
            raise TypeError(
                f"{name}[{i}] is {type(document).__name__}: expected bytes (text.encode() makes "
                "them)."
            )
    return found


def token_documents(name: str, documents: Any) -> list[np.ndarray]:
    """Documents of token ids as a list.

    Raises:
        TypeError: no list of arrays of integers.
        ValueError: an array with several axes.
    """
    found = several(name, documents, "arrays of token ids")
    for i, document in enumerate(found):
        check_tokens(f"{name}[{i}]", document)
    return found


def check_tokens(name: str, tokens: object) -> None:
    """Check that something is an array of integers with one axis.

    Raises:
        TypeError: no NumPy array, or one of another dtype.
        ValueError: several axes.
    """
    if not isinstance(tokens, np.ndarray) or tokens.dtype.kind not in "iu":
        found = getattr(tokens, "dtype", type(tokens).__name__)
        raise TypeError(f"{name} is {found}: expected a NumPy array of integers.")
    if tokens.ndim != 1:
        raise ValueError(f"{name} has shape {list(tokens.shape)}: expected one axis.")
