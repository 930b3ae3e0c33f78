"""CheckpointError: one error for all that is wrong with a folder, in a message that stays short.

A folder has thousands of tensors, and its files may come from anybody. So one fault may concern
every expert of a model, and a name may have a million characters. Problems are therefore sentences
about a *kind* of fault, with a count and the first few names (`count_and_names`). Names are shown
without control characters and shortened, each sentence is shortened, and what does not fit into
the message is counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

LONGEST_NAME = 160  # characters of a name that are shown
LONGEST_PROBLEM = 1200
LONGEST_MESSAGE = 2000  # of all problems together


class CheckpointError(ValueError):
    """A folder that cannot be loaded, or a model that cannot be saved.

    Attributes:
        problems: what is wrong, one sentence for each kind of fault. Long sentences are shortened.
    """

    def __init__(self, folder: Path, problems: Iterable[str]) -> None:
        self.folder = folder
        self.problems = [printable(problem, LONGEST_PROBLEM, keep="\n") for problem in problems]
        count = len(self.problems)
        lines = [f"{printable(str(folder), 300)}: {count} problem{'s' if count > 1 else ''}"]
        length = len(lines[0])
        for number, problem in enumerate(self.problems):
            line = problem.replace("\n", "\n    ")
            length += len(line) + 5
            if number and length > LONGEST_MESSAGE:
                lines.append(f"and {count - number} more problems")
                break
            lines.append(line)
        super().__init__("\n  - ".join(lines))

    def __reduce__(self) -> tuple[type[CheckpointError], tuple[Path, list[str]]]:
        return type(self), (self.folder, self.problems)


def printable(text: str, limit: int = LONGEST_NAME, keep: str = "") -> str:
    """A text as it can be printed: at most `limit` characters, the middle left out.

    Characters that a terminal would act on, or that cannot be encoded, are escaped.

    Args:
        keep: characters that stay as they are.
    """
    if len(text) > limit:
        half = (limit - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def shorten(names: Iterable[str], limit: int = 8) -> str:
    """The first few names of a list that may have thousands."""
    names = list(names)
    some = ", ".join(printable(name) for name in names[:limit])
    return some if len(names) <= limit else f"{some} and {len(names) - limit:,} more"


def count_and_names(names: Iterable[str], what: str = "tensor") -> str:
    """How many there are, and the first few: "72 tensors, a, b and 70 more"."""
    names = list(names)
    return f"{len(names):,} {what}{'s' if len(names) != 1 else ''}, {shorten(names)}"
