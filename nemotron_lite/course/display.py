"""`show` and `progress`: outputs that live in a running chapter and still say something at rest.

A widget exists only while its kernel runs. A committed notebook therefore needs more than the
widget: `show(widget, figure)` puts three forms of the same thing into one bundle, the live view,
the figure as plotly's JSON, and the figure in words. JupyterLab shows the first it can. When a
chapter is published, a picture is added and the live view is taken out.

The words are the figure's alt text. A figure without them is refused: a reader who cannot see it
must still learn what it shows. JupyterLab draws the bundle's richest form and hides the others, its
plotly pictures carry no `alt`, and a screen reader would find an unnamed image. So the words follow
the figure once more, folded away behind a line that anybody can open.
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

from nemotron_lite.course import _output

WIDGET = "application/vnd.jupyter.widget-view+json"
PLOTLY = "application/vnd.plotly.v1+json"
FEWEST_WORDS = 40  # characters of alt text
IN_WORDS = "The figure in words"

T = TypeVar("T")


def show(*parts: Any) -> None:
    """Show a figure, or a widget with the figure that stands for it at rest.

        show(figure)
        show(widget, figure)

    Args:
        parts: a plotly figure with alt text (`viz` functions end in `described(figure, "…")`), and
            before it, if there is one, the ipywidget to use while the kernel runs. A FigureWidget
            may come alone: it is both.

    Raises:
        TypeError: something else was passed.
        ValueError: the figure has no alt text, or one that is too short to describe it.
    """
    if len(parts) not in (1, 2):
        raise TypeError(f"show takes (figure) or (widget, figure), not {len(parts)} things.")
    figure, widget = parts[-1], parts[0] if len(parts) == 2 else None
    if not _is_figure(figure):
        raise TypeError(
            f"show's last argument is a {type(figure).__name__}; expected a plotly figure, which "
            "is what a reader sees when the widget is not alive."
        )
    if widget is None and hasattr(figure, "model_id"):
        widget = figure
    forms: dict[str, Any] = {PLOTLY: _plotly_json(figure)}
    if widget is not None:
        if not hasattr(widget, "model_id"):
            raise TypeError(
                f"show's first argument is a {type(widget).__name__}; expected an ipywidget "
                "such as a VBox of sliders and a FigureWidget."
            )
        forms[WIDGET] = widget_view(widget)
    words = alt_text(figure)
    _output.emit(words, more=forms)
    if _output.shell() is not None:  # a terminal has just shown them
        folded = f"<details><summary>{IN_WORDS}</summary>{html.escape(words)}</details>"
        _output.emit(IN_WORDS, folded)


def alt_text(figure: Any) -> str:
    """The description that `viz.described` stored in a figure.

    Raises:
        ValueError: there is none, or it is shorter than 40 characters.
    """
    meta = figure.layout.meta
    words = str(meta.get("alt") or "").strip() if isinstance(meta, dict) else ""
    if len(words) < FEWEST_WORDS:
        raise ValueError(
            f"The figure's alt text is {words!r}; expected at least {FEWEST_WORDS} characters "
            'that say what is to be seen. Make the figure with described(figure, "…").'
        )
    return words


def widget_view(widget: Any) -> dict[str, Any]:
    """The form of a widget that a front end turns into the live thing."""
    return {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}


def progress(iterable: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield from `iterable` behind a bar; at rest the bar reads "label: 300 steps".

    Args:
        iterable: what to go through.
        label: what is being done, such as "training".
        total: how many steps, where `len(iterable)` does not say.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    bar = _bar(label, total)
    try:
        for item in iterable:
            yield item
            bar.update()
    finally:
        bar.close()


def progress_hook(
    label: str = "training", total: int | None = None
) -> Callable[[dict[str, Any]], None]:
    """A bar for `nemotron_lite.train.train(..., on_step=progress_hook(total=300))`.

    The bar moves on with each log record, shows its loss, and closes when `total` is reached.
    """
    bar = _bar(label, total)

    def on_step(record: dict[str, Any]) -> None:
        if "ce" in record:
            bar.set_postfix_str(f"loss {record['ce']:.3f}", refresh=False)
        bar.update()
        if total is not None and bar.n >= total:
            bar.close()

    return on_step


def _bar(label: str, total: int | None) -> Any:
    """tqdm's notebook bar in a bundle of our own, or tqdm's plain bar in a terminal."""
    at_rest = label if total is None else f"{label}: {total:,} step{'' if total == 1 else 's'}"
    if not _output.in_notebook():
        from tqdm import tqdm

        return tqdm(total=total, desc=label, file=sys.stderr)
    _output.lab("ipywidgets")
    from tqdm.notebook import tqdm as notebook_tqdm

    # Its own display would leave "0%| | 0/300" in the file.
    bar = notebook_tqdm(total=total, desc=label, display=False)
    _output.emit(at_rest, more={WIDGET: widget_view(bar.container)})
    bar.displayed = True
    return bar


def _is_figure(candidate: Any) -> bool:
    base = _output.lab("plotly.basedatatypes").BaseFigure
    return isinstance(candidate, base)


def _plotly_json(figure: Any) -> dict[str, Any]:
    """The figure as plain JSON; through text, because numpy arrays are not JSON."""
    return dict(json.loads(figure.to_json()))
