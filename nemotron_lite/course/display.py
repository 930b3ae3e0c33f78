"""`show` and `progress`: outputs that are live while the kernel runs and still readable afterwards.

A widget exists only while its kernel runs. JupyterLab shows "Error displaying widget" in its place
when a saved notebook is opened again, even if the same output has other forms. So what a reader
must see then is an output of its own, below the widget:

    live          what the reader sees
    1. the view   the widget
    2. at rest    nothing: the style that `setup` sends hides it below a live view
    3. in words   "The figure in words", folded

    reopened, from `make lab`   a line of text in place of the view, then 2 and 3
    reopened, another server    "Error displaying widget", then 2 and 3
    a committed chapter         as from `make lab`, with a picture for other viewers

`show(widget, figure)` makes these three of a figure; `show_live` makes the first two of anything.
A front end other than JupyterLab shows 1 and 2 together. A bar is not a widget but a line of HTML
that is replaced, so it needs no second form.

A figure without alt text is refused: a reader who cannot see it must still learn what it shows.
JupyterLab shows only the richest form, and its plotly pictures have no `alt`, so a screen reader
would find an image without a name. So the alt text is shown once more below the figure, folded: a
click opens it.
"""

from __future__ import annotations

import html
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, TypeVar

from nemotron_lite.course import output

WIDGET = "application/vnd.jupyter.widget-view+json"
PLOTLY = "application/vnd.plotly.v1+json"
DEFAULT_HEIGHT = 450  # pixels of a plotly figure that has none
SHORTEST_ALT = 40  # characters of alt text
IN_WORDS = "The figure in words"
RUN_TO_MOVE = "Run this cell to move the figure."
CUT_SHORT = (
    "<b>Cut short after {}.</b> What the text says about the result may not hold for this one: the "
    "machine may be slow or busy, or the cell was stopped. Run the cell once more."
)
LIVE_CLASS = "nl-live"  # marks a live view; the style of `setup` hides the output below it

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
    words = alt_text(figure)
    forms: dict[str, Any] = {PLOTLY: _plotly_json(figure)}
    if widget is not None:
        if not hasattr(widget, "model_id"):
            raise TypeError(
                f"show's first argument is a {type(widget).__name__}; expected an ipywidget "
                "such as a VBox of sliders and a FigureWidget."
            )
        show_live(widget, RUN_TO_MOVE, words, more=forms)
    else:
        output.show_output(words, more=forms)
    _show_words(words)


def show_updating(figure: Any) -> Callable[[Any], None]:
    """Show a figure that is replaced while a cell runs, such as the plot of a training run.

    It is no widget: a notebook that is opened again shows the last figure. Each update sends the
    whole figure, so make one or two in a second, of at most some ten thousand values.

    JupyterLab's renderer of plotly figures keeps the first figure that it has drawn and ignores
    others. So an update first replaces the figure by an empty box of its height, which ends that
    renderer, and then the box by the new figure.

    Returns:
        A function that takes the next figure. All figures have the alt text of the first one,
        because the tests of the chapters compare it.

    Raises:
        TypeError: something else than a figure.
        ValueError: the figure has no alt text, or one that is too short to describe it.
    """
    if not _is_figure(figure):
        raise TypeError(f"show_updating got {type(figure).__name__}; expected a plotly figure.")
    words = alt_text(figure)
    handle = output.show_output(words, more={PLOTLY: _plotly_json(figure)}, updatable=True)
    _show_words(words)

    def replace(new: Any) -> None:
        height = int(new.layout.height or DEFAULT_HEIGHT)
        output.update_output(handle, words, f'<div style="height: {height}px"></div>')
        output.update_output(handle, words, more={PLOTLY: _plotly_json(new)})

    return replace


def _show_words(words: str) -> None:
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


def show_live(
    widget: Any,
    at_its_place: str,
    plain: str,
    rich: str | None = None,
    *,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Show a widget, and below it what a reader sees when no kernel runs.

    Args:
        widget: an ipywidget.
        at_its_place: the text that stands in the place of the widget then.
        plain, rich, more: the output below, as in `show_output`; hidden while the widget is live.
    """
    if not output.in_notebook():
        output.show_output(plain, rich, more=more)
        return
    widget.add_class(LIVE_CLASS)
    output.show_output(at_its_place, more={WIDGET: widget_view(widget)})
    output.show_output(plain, rich, more=more)


def widget_view(widget: Any) -> dict[str, Any]:
    """The data from which a front end shows the live widget."""
    return {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}


def progress(
    iterable: Iterable[T], label: str, total: int | None = None, *, timed: bool = True
) -> Iterator[T]:
    """Yield from `iterable` and show a progress bar; the stored text is "label: 300 steps".

    Args:
        iterable: the items.
        label: what is being done, such as "training".
        total: the number of steps, if `len(iterable)` does not give it.
        timed: show the time. False where a later question asks for it.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    bar = _bar(label, total)
    bar.timed = timed  # tqdm ignores it
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


class Bar:
    """A progress bar as one line of HTML that is replaced at most five times a second.

    The plain text is the same at every step, because the tests of the chapters compare it. A bar
    that is still open at the end of its cell is closed. When it was closed before its last step,
    a line below says so, because what the text says about the result may then not hold.
    """

    def __init__(self, label: str, total: int | None) -> None:
        self.label, self.total, self.n, self.note = label, total, 0, ""
        self.closed, self.timed = False, True
        _at_end_of_cell(self.close)
        self._started = self._drawn = time.perf_counter()
        self._handle = output.show_output(self._plain, self._html(), updatable=True)

    def update(self, n: int = 1) -> None:
        """Count `n` more steps."""
        self.n += n
        self.closed = False
        if time.perf_counter() - self._drawn > 0.2:
            self._draw()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Show `text` behind the bar."""
        self.note = text
        if refresh:
            self._draw()

    def close(self) -> None:
        """Draw the last state; later calls do nothing."""
        if not self.closed:
            self.closed = True
            self._draw()

    @property
    def _plain(self) -> str:
        return self.label if self.total is None else f"{self.label}: {_steps(self.total)}"

    def _draw(self) -> None:
        self._drawn = time.perf_counter()
        output.update_output(self._handle, self._plain, self._html())

    def _html(self) -> str:
        seconds = time.perf_counter() - self._started
        of = "" if self.total is None else f" of {self.total:,}"
        count = f"{self.n:,}{of} step{'' if (self.total or self.n) == 1 else 's'}"
        state = count
        early = self.closed and self.total is not None and self.n < self.total
        if self.closed and not early:
            state = f"{_steps(self.n)}, done"
        elif not early and self.total and self.n and self.timed:
            left = seconds / self.n * (self.total - self.n)
            state += f", about {_duration(left)} left"
        value = f' value="{self.n}" max="{self.total}"' if self.total else ""
        if self.closed and not self.total:
            value = ' value="1" max="1"'
        label = html.escape(self.label)
        notes = " · ".join(
            filter(None, [state, _duration(seconds) if self.timed else "", html.escape(self.note)])
        )
        warning = output.box(CUT_SHORT.format(count), edge=output.WRONG) if early else ""
        return (
            f'<div>{label} <progress aria-label="{label}"{value} '
            f'style="width: 200px; vertical-align: middle"></progress> {notes}</div>{warning}'
        )


def _at_end_of_cell(call: Callable[[], None]) -> None:
    """Call something once, when the cell that is running has ended."""
    events = output.ipython_shell().events

    def once(_: Any) -> None:
        events.unregister("post_run_cell", once)
        call()

    events.register("post_run_cell", once)


def _bar(label: str, total: int | None) -> Any:
    """Our bar in a notebook, tqdm's in a terminal."""
    if not output.in_notebook():
        from tqdm import tqdm

        return tqdm(total=total, desc=label, file=sys.stderr)
    return Bar(label, total)


def _steps(count: int) -> str:
    return f"{count:,} step{'' if count == 1 else 's'}"


def _duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _is_figure(candidate: Any) -> bool:
    base = output.import_lab("plotly.basedatatypes").BaseFigure
    return isinstance(candidate, base)


def _plotly_json(figure: Any) -> dict[str, Any]:
    """The figure as plain JSON; through text, because numpy arrays are not JSON."""
    return dict(json.loads(figure.to_json()))
