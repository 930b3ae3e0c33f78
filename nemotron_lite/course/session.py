"""`setup`: one call at the top of a chapter, so that two runs of it use the same random numbers.

It seeds torch, numpy and random, sets the number of threads, and chooses the device. Without a GPU
it also switches on Triton's interpreter, which has to happen before triton is imported. Device and
versions are shown in HTML only, because they differ between machines and the plain text in the
committed notebook must not. The output also has the style of the chapters (`style/custom.css`).

Two machines need not give the same bits, because they add numbers in different orders. So chapters
print rounded numbers, or compare within bounds.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_lite import openmp
from nemotron_lite.course import output, predictions, progress_store

if TYPE_CHECKING:
    import torch

STYLE = Path(__file__).with_name("style") / "custom.css"


@dataclass(frozen=True)
class Session:
    """The settings that `setup` made.

    device: "cuda" where torch sees a GPU, else "cpu".
    generator: a seeded generator on the CPU. Draw random numbers there and move the tensor to the
        device: then a run on a GPU starts from the same numbers as a laptop.
    """

    chapter: str
    seed: int
    threads: int
    device: torch.device
    generator: torch.Generator = field(repr=False)
    shown_in_cell: int | None = field(default=None, repr=False, compare=False)

    def _ipython_display_(self) -> None:
        """Show nothing in the cell that ran `setup`: `setup` has shown its line there."""
        if output.cell_number() != self.shown_in_cell:
            output.show_output(repr(self))


def setup(chapter: str, *, seed: int = 0, threads: int | None = None) -> Session:
    """Start a chapter: set seeds, threads, device and plot theme.

    What the learner stored in earlier sessions (guesses, answers, hints read) stays.

    Args:
        chapter: its two digits, such as "01".
        seed: for torch, numpy, random and the session's generator.
        threads: for torch; None keeps the number that torch or OMP_NUM_THREADS chose.

    Raises:
        ValueError: a chapter that is not two digits, or threads below one.
    """
    if not re.fullmatch(r"\d\d", chapter):
        raise ValueError(f"chapter is {chapter!r}; expected two digits, such as '01'.")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; expected 1 or more, or None for torch's choice.")
    line = output.show_output(
        f"Chapter {chapter} · ready",
        output.box(f"<b>Chapter {chapter}</b> · loading torch and the plots …"),
        updatable=True,
    )
    note = _choose_triton_mode()
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if threads is not None:
        torch.set_num_threads(threads)
    openmp.watch_until_exit()
    predictions.begin(chapter)
    progress_store.begin()
    _plot_theme()
    session = Session(
        chapter=chapter,
        seed=seed,
        threads=torch.get_num_threads(),
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        generator=torch.Generator().manual_seed(seed),
        shown_in_cell=output.cell_number(),
    )
    output.update_output(line, f"Chapter {chapter} · ready", _session_html(session, note))
    return session


def _choose_triton_mode() -> str:
    """Without a GPU, switch on Triton's interpreter; Triton reads the variable at its import."""
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


def _plot_theme() -> None:
    """Make the course's plot theme the default, where plotly is installed."""
    if find_spec("plotly") is None or find_spec("nemotron_lite.course.plotting") is None:
        return
    from nemotron_lite.course.plotting import theme

    use: Any = getattr(theme, "use", None)
    if use is not None:
        use()


def _session_html(session: Session, note: str) -> str:
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
    faint = f'<br><span style="color: {output.FAINT}">{" · ".join(versions)}</span>'
    return output.box(" · ".join(parts) + faint) + f"<style>{STYLE.read_text()}</style>"
