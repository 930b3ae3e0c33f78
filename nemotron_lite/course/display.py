"""`show` and `progress`: outputs that are live while the kernel runs and still readable afterwards.

A widget exists only while its kernel runs, so a committed notebook needs more than the widget.
`show(widget, figure)` stores three forms in one output: the live view, the figure as plotly's JSON,
and the alt text of the figure. JupyterLab shows the first form that it can. When a chapter is
published, a picture is added and the live view is removed.

A figure without alt text is refused: a reader who cannot see it must still learn what it shows.
JupyterLab shows only the richest form, and its plotly pictures have no `alt`, so a screen reader
would find an image without a name. So the alt text is shown once more below the figure, folded: a
click opens it.
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

from nemotron_lite.course import output

WIDGET = "application/vnd.jupyter.widget-view+json"
PLOTLY = "application/vnd.plotly.v1+json"
SHORTEST_ALT = 40  # characters of alt text
IN_WORDS = "The figure in words"

T = TypeVar("T")


def show(*parts: Any) -> None:
    """Show a figure, or a widget and the figure that replaces it when no kernel runs.

        show(figure)
        show(widget, figure)

    Args:
        parts: a plotly figure with alt text (functions that draw end in `described(figure, "…")`).
            Before it, if there is one, the ipywidget to show while the kernel runs. A FigureWidget
            can be passed alone: it is both.

    Raises:
        TypeError: something else was passed.
        ValueError: the figure has no alt text, or one that is too short to describe it.
    """
    if len(parts) not in (1, 2):
        raise TypeError(f"show got {len(parts)} arguments; expected (figure) or (widget, figure).")
    figure, widget = parts[-1], parts[0] if len(parts) == 2 else None
    if not _is_figure(figure):
        raise TypeError(
            f"show's last argument is a {type(figure).__name__}; expected a plotly figure, which "
            "is what a reader sees when no kernel runs."
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
    output.show_output(words, more=forms)
    if output.ipython_shell() is not None:  # a terminal has just shown the text
        folded = f"<details><summary>{IN_WORDS}</summary>{html.escape(words)}</details>"
        output.show_output(IN_WORDS, folded)


def alt_text(figure: Any) -> str:
    """The alt text that `plotting.described` stored in a figure.

    Raises:
        ValueError: there is none, or it is shorter than 40 characters.
    """
    meta = figure.layout.meta
    words = str(meta.get("alt") or "").strip() if isinstance(meta, dict) else ""
    if len(words) < SHORTEST_ALT:
        raise ValueError(
            f"The figure's alt text is {words!r}; expected at least {SHORTEST_ALT} characters "
            'that say what the figure shows. Make the figure with described(figure, "…").'
        )
    return words


def widget_view(widget: Any) -> dict[str, Any]:
    """The data from which a front end shows the live widget."""
    return {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}


def progress(iterable: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield from `iterable` and show a progress bar; the stored text is "label: 300 steps".

    Args:
        iterable: the items.
        label: what is being done, such as "training".
        total: the number of steps, if `len(iterable)` does not give it.
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
    """tqdm's notebook bar as an output of ours, or tqdm's plain bar in a terminal."""
    stored_text = label if total is None else f"{label}: {total:,} step{'' if total == 1 else 's'}"
    if not output.in_notebook():
        from tqdm import tqdm

        return tqdm(total=total, desc=label, file=sys.stderr)
    output.import_lab("ipywidgets")
    from tqdm.notebook import tqdm as notebook_tqdm

    # With display=True the text in the notebook would be "0%| | 0/300".
    bar = notebook_tqdm(total=total, desc=label, display=False)
    output.show_output(stored_text, more={WIDGET: widget_view(bar.container)})
    bar.displayed = True
    return bar


def _is_figure(candidate: Any) -> bool:
    base = output.import_lab("plotly.basedatatypes").BaseFigure
    return isinstance(candidate, base)


def _plotly_json(figure: Any) -> dict[str, Any]:
    """The figure as plain JSON; through text, because numpy arrays are not JSON."""
    return dict(json.loads(figure.to_json()))
