"""Reading Python source as a tree, also from several threads at once.

CPython 3.11 counts the depth of the tree that `ast.parse` returns in one place for all threads. The
garbage collector can run another thread in between, which then counts in the same place, and
`ast.parse` fails with "SystemError: AST constructor recursion depth mismatch" although the source
is right. Here one thread parses at a time. Later versions of Python do not need that.
"""

from __future__ import annotations

import ast
import threading

_one_at_a_time = threading.RLock()  # a destructor that the collector runs may parse, too


def parse(source: str) -> ast.Module:
    """The tree of a source.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: as `ast.parse` does.
    """
    with _one_at_a_time:
        return ast.parse(source)
