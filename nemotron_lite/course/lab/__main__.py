"""The command behind `make lab`: bring the copies in work/ up to date, then start JupyterLab."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_lite.course import output

if TYPE_CHECKING:
    from nemotron_lite.course.lab.copies import Outcome

ROOT = Path(__file__).resolve().parents[3]  # the checkout


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The command; returns 0, or 2 if the chapters cannot be copied."""
    try:
        output.import_lab("jupyterlab")
    except output.LabMissingError as error:
        print(error, file=sys.stderr)
        return 2
    from nemotron_lite.course.lab import copies, server

    parser = argparse.ArgumentParser(
        prog="python -m nemotron_lite.course.lab",
        description="Copy the chapters to work/ or update the copies there, then open JupyterLab. "
        "Other arguments go to JupyterLab, such as --port 8899 or --no-browser.",
    )
    parser.add_argument("--update-only", action="store_true", help="do not open JupyterLab")
    chosen, for_jupyter = parser.parse_known_args(arguments)
    if chosen.update_only and for_jupyter:
        parser.error(f"--update-only starts no JupyterLab that could take {for_jupyter[0]}")
    work = root / "work"
    try:
        outcomes = copies.update(root / "notebooks", work)
    except copies.CopyError as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(outcomes), flush=True)
    if not chosen.update_only:
        server.start(root, work, for_jupyter)
    return 0


def summary(outcomes: Sequence[Outcome]) -> str:
    """What happened to the copies: a line for each that was updated or left alone."""
    copied = sum(outcome.what == "copied" for outcome in outcomes)
    current = sum(outcome.what == "current" for outcome in outcomes)
    lines = [o.line for o in outcomes if o.what not in ("copied", "current")]
    if copied:
        lines.insert(0, f"Copied {copied} notebook{'s' if copied > 1 else ''} to work/.")
    if current and not lines:
        lines = ["The notebooks in work/ are up to date."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
