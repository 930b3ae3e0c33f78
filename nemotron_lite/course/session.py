"""`setup`: one call at the top of a chapter, so that two runs of it see the same numbers.

It seeds torch, numpy and random, settles how many threads torch uses, picks the device, and asks
Triton for its interpreter where there is no GPU, which has to happen before anybody imports
triton. What it found (device, versions) is shown in HTML only: it differs between machines, and the
line that stays in the file must not.

It does not promise the same bits on two machines: sums run in another order there. Chapters print
rounded numbers, or compare within bounds.
"""

from __future__ import annotations

import os
import platform
import random
import re
import sys
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from nemotron_lite.course import _output

if TYPE_CHECKING:
    import torch

# JupyterLab breaks long lines of code in mid-word; with this they scroll. And it shows the picture
# of a plotly figure at its full size, cut off where the window is narrower; with this it shrinks.
LOOK = (
    "<style>.jp-RenderedMarkdown pre, .jp-RenderedMarkdown pre code "
    "{ white-space: pre; overflow-x: auto; } "
    ".jp-RenderedPlotly img { max-width: 100%; height: auto; }</style>"
)


@dataclass(frozen=True)
class Session:
    """What `setup` settled.

    device: "cuda" where torch sees a GPU, else "cpu".
    generator: a seeded generator on the CPU. Draw there and move the tensor, then a GPU run
        starts from the same numbers as a laptop.
    """

    chapter: str
    seed: int
    threads: int
    device: torch.device
    generator: torch.Generator = field(repr=False)
    shown_at: int | None = field(default=None, repr=False, compare=False)

    def _ipython_display_(self) -> None:
        """`setup` has spoken already, so a cell that ends in it adds nothing."""
        if _output.moment() != self.shown_at:
            _output.emit(repr(self))


def setup(chapter: str, *, seed: int = 0, threads: int | None = None) -> Session:
    """Open a chapter: seeds, threads, device, plot theme; forget guesses and hints of before.

    Args:
        chapter: its two digits, such as "01".
        seed: for torch, numpy, random and the session's generator.
        threads: for torch; None keeps what torch or OMP_NUM_THREADS chose.

    Raises:
        ValueError: a chapter that is not two digits, or threads below one.
    """
    if not re.fullmatch(r"\d\d", chapter):
        raise ValueError(f"chapter is {chapter!r}; expected two digits, such as '01'.")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; expected 1 or more, or None for torch's choice.")
    note = _settle_triton()
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if threads is not None:
        torch.set_num_threads(threads)
    _forget()
    _plot_theme()
    session = Session(
        chapter=chapter,
        seed=seed,
        threads=torch.get_num_threads(),
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        generator=torch.Generator().manual_seed(seed),
        shown_at=_output.moment(),
    )
    _output.emit(f"Chapter {chapter} · ready", _described(session, note))
    return session


def _settle_triton() -> str:
    """Ask for Triton's interpreter where there is no GPU. Triton reads this once, at its import."""
    import torch

    if find_spec("triton") is None:
        return "Triton is not installed: kernel cells need it"
    if torch.cuda.is_available():
        return "Triton compiles for the GPU"
    if "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton in its interpreter, on the CPU"
    return "Triton was imported before setup: restart the kernel to run kernels on the CPU"


def _forget() -> None:
    from nemotron_lite.course import exercises, predictions

    predictions.forget()
    exercises.forget()


def _plot_theme() -> None:
    """Make the course's plot theme the default, where plotly is installed."""
    if find_spec("plotly") is None or find_spec("nemotron_lite.course.plotting") is None:
        return
    from nemotron_lite.course.plotting import theme

    use: Any = getattr(theme, "use", None)
    if use is not None:
        use()


def _described(session: Session, note: str) -> str:
    import torch

    where = "CPU"
    if session.device.type == "cuda":
        where = torch.cuda.get_device_name(session.device)
    threads = f"{session.threads} thread{'s' if session.threads > 1 else ''}"
    parts = [f"<b>Chapter {session.chapter}</b> · ready", where, threads, note]
    parts.append(f"seed {session.seed}")
    versions = ["Python " + platform.python_version(), "torch " + torch.__version__]
    for name in ("nemotron-lite", "triton", "numpy", "plotly"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    faint = f'<br><span style="color: {_output.FAINT}">{" · ".join(versions)}</span>'
    return _output.card(" · ".join(parts) + faint) + LOOK
