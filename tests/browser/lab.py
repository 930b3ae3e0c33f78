"""Open a notebook in a browser, look at it, run it, drag its sliders, save it and open it again.

One page with JupyterLab serves all notebooks: to open it anew for each takes longer than to look at
a chapter. The page may only load from the server of the test: a request to any other address is
refused and recorded.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image, ImageStat
from playwright.sync_api import Browser, Locator, Page, Route, TimeoutError, WebSocket

from nemotron_lite.course.plotting.widgets import BUDGET
from tests.course.lab.serving import TOKEN

RUN_SECONDS = 300  # Run All; a chapter takes far less on a quiet machine
THEMES = ("JupyterLab Light", "JupyterLab Dark")
# A stored figure is a picture until the mouse is above it, and a plot afterwards; its frame stays.
FIGURES = ".jp-RenderedPlotly, .nl-live .js-plotly-plot, .jp-OutputArea-output img:not(.plot-img)"
BROKEN = "Error displaying widget"

# The drawn data of every plot as one string each; _WORDS gives the text of every widget.
_DRAWN = """() => {
  const list = v => ArrayBuffer.isView(v) ? Array.from(v) : v;
  const parts = t => [t.x, t.y, t.z, t.base, t.text, t.visible, t.marker && t.marker.color];
  const plots = [...document.querySelectorAll('.js-plotly-plot')];
  return plots.map(p => JSON.stringify([
    (p._fullData || []).map(t => parts(t).map(list)),
    p.layout.shapes, p.layout.annotations, p.layout.title && p.layout.title.text]));
}"""
_WORDS = "() => [...document.querySelectorAll('.widget-html, .widget-label')].map(e => e.innerText)"
_RUN = """async seconds => {
  const late = new Promise(done => setTimeout(() => done('late'), seconds * 1000));
  const run = async () => {
    await jupyterapp.commands.execute('notebook:clear-all-cell-outputs');
    await jupyterapp.commands.execute('notebook:run-all-cells');
    return 'done';
  };
  return Promise.race([run(), late]);
}"""
_IDLE = """() => {
  const shown = window.jupyterapp && jupyterapp.shell.currentWidget;
  const session = shown && shown.sessionContext && shown.sessionContext.session;
  return !!session && !!session.kernel && session.kernel.status === 'idle';
}"""
# Stored figures and texts that are wider than the area they are shown in.
_CUT = """() => {
  const outputs = document.querySelectorAll('.jp-OutputArea-output, .jp-RenderedMarkdown');
  return [...outputs].filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 2).map(
    e => `${e.scrollWidth} px in ${e.clientWidth}: ${e.innerText.slice(0, 60)}`);
}"""
# Seconds from the next key to the first frame in which the data of a plot differ; -1 if none do.
_WATCH = f"""() => {{ const drawn = {_DRAWN}; window.answered = new Promise(done => {{
  const before = JSON.stringify(drawn());
  addEventListener('keydown', () => {{
    const start = performance.now();
    const look = () => {{
      const gone = (performance.now() - start) / 1000;
      if (JSON.stringify(drawn()) !== before) done(gone);
      else if (gone > 5) done(-1);
      else requestAnimationFrame(look);
    }};
    requestAnimationFrame(look);
  }}, {{once: true, capture: true}});
}}); }}"""
# The number of figures stored in the notebook in front, once each visible one is drawn. A cell
# whose output is folded, until a click opens it, does not count.
_FIGURES_DRAWN = """async () => {
  const shown = jupyterapp.shell.currentWidget;
  await Promise.all(shown.content.widgets.map(cell => cell.ready));
  const cells = shown.content.model.sharedModel.toJSON().cells;
  const open = cells.filter(c => !(c.metadata.jupyter && c.metadata.jupyter.outputs_hidden));
  const outputs = open.flatMap(c => c.outputs || []);
  const stored = outputs.filter(o => o.data && o.data['application/vnd.plotly.v1+json']).length;
  const frames = [...shown.node.querySelectorAll('.jp-RenderedPlotly')];
  const seen = frames.filter(e => e.checkVisibility({visibilityProperty: true}));
  const plot = e => e.querySelector('.main-svg');
  const picture = e => [...e.querySelectorAll('img')].some(i => i.complete && i.naturalWidth);
  const drawn = seen.every(e => e.offsetHeight > 50 && (plot(e) || picture(e)));
  return frames.length === stored && drawn && {stored};
}"""
_OPEN = "path => { jupyterapp.commands.execute('docmanager:open', {path}); }"
# Whether the page has asked the kernel for the widgets that it has. Only the parts that show
# widgets know the widget manager.
_WIDGETS_KNOWN = """async () => {
  const shown = jupyterapp.shell.currentWidget.content;
  const type = 'application/vnd.jupyter.widget-view+json';
  const renderer = shown.rendermime.createRenderer(type);
  const late = new Promise(done => setTimeout(done, 50));
  const manager = await Promise.race([renderer._manager.promise, late]);
  return !!manager && manager.restoredStatus;
}"""
_IN_FRONT = "path => jupyterapp.shell.currentWidget?.context?.path === path"
_CLOSE = """async () => {
  const shown = jupyterapp.shell.currentWidget;
  const late = new Promise(done => setTimeout(done, 20000));
  await Promise.race([shown.sessionContext.shutdown(), late]);
  shown.context.model.dirty = false;
  shown.close();
}"""
_UNFOLD = "() => jupyterapp.commands.execute('notebook:show-all-cell-outputs')"
_SAVE = "() => jupyterapp.shell.currentWidget.context.save()"
_THEME = "theme => jupyterapp.commands.execute('apputils:change-theme', {theme})"
_CELLS = "() => jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON().cells"


@dataclass
class Visit:
    """What the browser showed while one notebook ran."""

    errors: list[str] = field(default_factory=list)
    not_run: list[int] = field(default_factory=list)
    sliders: int = 0
    idle_sliders: list[str] = field(default_factory=list)  # nothing changed when they were dragged
    steppers: int = 0
    idle_steppers: list[str] = field(default_factory=list)  # no figure changed: which button
    guesses: int = 0
    lost_guesses: list[str] = field(default_factory=list)  # not said to be saved
    moved_figures: int = 0  # sliders that changed a figure's data
    answers: dict[str, float] = field(default_factory=dict, compare=False)  # key to picture, s
    waited: float = field(default=1.0, compare=False)  # of that time, processes had no processor
    outside: list[str] = field(default_factory=list)  # addresses that were refused


@dataclass
class OpenLab:
    """A page with JupyterLab, and the addresses other than the server that it asked for."""

    page: Page
    outside: list[str] = field(default_factory=list)

    def note(self, url: str) -> None:
        """Record an address, once: pages may ask again."""
        if url not in self.outside:
            self.outside.append(url)


@dataclass
class Look:
    """What a page shows of one notebook without running it."""

    broken: list[str]
    stored: int  # figures in outputs that are not folded; some may be hidden below a live view
    figures: int  # that a reader sees
    cut: list[str]
    brightness: list[float]  # of each figure, from 0 (black) to 255


def look(page: Page, theme: str = THEMES[0]) -> Look:
    """What the notebook in front shows now, in one of the themes."""
    page.evaluate(_THEME, theme)
    page.wait_for_function(
        "dark => document.body.dataset.jpThemeLight === String(!dark)", arg=theme == THEMES[1]
    )
    page.mouse.move(0, 0)  # away from the figures
    # Whether a widget is found is known once the page has asked the kernel for all of them.
    page.wait_for_function("() => !document.body.innerText.includes('Loading widget')")
    stored = _until(page, _FIGURES_DRAWN)["stored"]
    figures = [found for found in page.locator(FIGURES).all() if found.is_visible()]
    return Look(
        _texts(page.get_by_text(BROKEN)),
        stored,
        len(figures),
        page.evaluate(_CUT),
        [_brightness(found) for found in figures],
    )


def _brightness(figure: Locator) -> float:
    picture = Image.open(io.BytesIO(figure.screenshot())).convert("L")
    return ImageStat.Stat(picture).mean[0]


@contextmanager
def notebook(page: Page, name: str) -> Iterator[None]:
    """Another notebook in front of a page that is open; it is closed afterwards, not saved."""
    page.evaluate(_OPEN, name)
    page.wait_for_function(_IN_FRONT, arg=name, timeout=60_000)
    page.wait_for_function(_IDLE, timeout=60_000)
    # A widget that a cell makes before this is created twice, and one of the two is deaf.
    _until(page, _WIDGETS_KNOWN)
    try:
        yield
    finally:
        page.evaluate(_CLOSE)
        page.wait_for_function(f"path => !({_IN_FRONT})(path)", arg=name, timeout=60_000)


def run_all(page: Page) -> list[str]:
    """Run the notebook in front; returns the errors of its cells and of its widgets."""
    ended = page.evaluate(_RUN, RUN_SECONDS)
    errors = [] if ended == "done" else [f"not finished after {RUN_SECONDS} s"]
    for index, cell in enumerate(page.evaluate(_CELLS)):
        for output in cell.get("outputs", ()):
            if output["output_type"] == "error":
                errors.append(f"cell {index}: {output['ename']}: {output['evalue']}")
    return errors + _texts(page.get_by_text(BROKEN))


def drawn(page: Page, values: str, seconds: float = 15.0) -> bool:
    """Whether the first traces of all plots have these y, in JSON, or get them in this time."""
    first = "JSON.stringify([...document.querySelectorAll('.js-plotly-plot')].map("
    with suppress(TimeoutError):
        page.wait_for_function(
            f"values => {first}p => p._fullData && [...p._fullData[0].y])) === values",
            arg=values,
            timeout=1000 * seconds,
        )
        return True
    return False


def save(page: Page) -> None:
    """Save the notebook in front."""
    page.evaluate(_SAVE)


def visit(lab: OpenLab, name: str) -> Visit:
    """Open the notebook `name`, Run All, unfold its outputs, use every control, and save it."""
    seen, page, before = Visit(), lab.page, len(lab.outside)
    with notebook(page, name):
        seen.errors = run_all(page)
        page.evaluate(_UNFOLD)  # some controls are in outputs that a chapter folds
        for index, cell in enumerate(page.evaluate(_CELLS)):
            if cell["cell_type"] == "code" and "".join(cell["source"]).strip():
                seen.not_run += [] if cell["execution_count"] else [index]
        _drag_all(page, seen)
        _press_all(page, seen)
        _guess_all(page, seen)
        save(page)
    seen.outside = lab.outside[before:]
    return seen


@contextmanager
def opened(browser: Browser, address: str) -> Iterator[OpenLab]:
    """JupyterLab in a page, with the page of the progress in front; other addresses are refused."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    lab = OpenLab(page)

    def guard(route: Route) -> None:
        url = route.request.url
        if urlsplit(url).hostname in (None, "127.0.0.1") or url.startswith(("data:", "blob:")):
            route.continue_()
        else:
            lab.note(url)
            route.abort()

    def guard_socket(socket: WebSocket) -> None:
        if urlsplit(socket.url).hostname != "127.0.0.1":
            lab.note(socket.url)

    context.route("**/*", guard)
    page.on("websocket", guard_socket)
    try:
        page.goto(f"{address}/lab/tree/work/progress.ipynb?token={TOKEN}&reset", timeout=90_000)
        page.wait_for_function(_IDLE, timeout=90_000)
        yield lab
    finally:
        context.close()


def _until(page: Page, question: str, seconds: float = 60.0) -> Any:
    """The first answer that is not false.

    Playwright's own `wait_for_function` does not wait for the answer of an async function.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := page.evaluate(question):
            return answer
        page.wait_for_timeout(100)
    raise TimeoutError(f"after {seconds} s, this is still false: {question}")


def _texts(found: Locator) -> list[str]:
    return [text.strip()[:120] for text in found.all_inner_texts()]


def _waited() -> float:
    """Seconds, since some start, in which a process waited for a processor.

    Where nobody counts them, it is as if one waited all the time.
    """
    try:
        some = Path("/proc/pressure/cpu").read_text().splitlines()[0]
    except OSError:
        return time.monotonic()
    return int(some.rpartition("total=")[2]) / 1e6


def _drag_all(page: Page, seen: Visit) -> None:
    page.wait_for_timeout(1000)  # the last widgets draw after the last cell has ended
    started, waited = time.monotonic(), _waited()
    sliders = page.locator(".widget-slider")
    seen.sliders = sliders.count()
    for index in range(seen.sliders):
        slider = sliders.nth(index)
        before, words = page.evaluate(_DRAWN), page.evaluate(_WORDS)
        drag(page, slider)
        moved = _wait_for_change(page, before, words)
        label = slider.inner_text().replace("\n", " ")
        if moved == "figure":
            seen.moved_figures += 1
            seen.answers[label] = _answer(page, slider)
        if not moved:
            seen.idle_sliders.append(label)
    seen.waited = (_waited() - waited) / (time.monotonic() - started)


def _press_all(page: Page, seen: Visit) -> None:
    """Press Back, Next and Play of every stepper; Back first, because the slider was dragged."""
    rows = page.locator(".widget-hbox", has=page.get_by_role("button", name="Next"))
    seen.steppers = rows.count()
    for index in range(seen.steppers):
        row = rows.nth(index)
        for name in ("Back", "Next", "Play"):
            before = page.evaluate(_DRAWN)
            row.get_by_role("button", name=name).click()
            if _wait_for_change(page, before, []) != "figure":
                seen.idle_steppers.append(f"{row.inner_text()[:40]!r}: {name}")
            if name == "Play":
                with suppress(TimeoutError):  # it has played the last step
                    row.get_by_role("button", name="Pause").click(timeout=2_000)


def _guess_all(page: Page, seen: Visit) -> None:
    """Type a guess into every box, press Enter, and wait for the line that says it is saved."""
    boxes = page.locator(".widget-text:has-text('Your guess')")
    seen.guesses = boxes.count()
    for index in range(seen.guesses):
        box = boxes.nth(index)
        form = box.locator("xpath=ancestor::*[contains(@class, 'nl-live')]")
        box.locator("input").fill("3")
        box.locator("input").press("Enter")
        try:
            form.get_by_text("Saved: 3").wait_for(timeout=8_000)
        except TimeoutError:
            seen.lost_guesses.append(form.inner_text()[:120])


def drag(page: Page, slider: Locator) -> None:
    """Drag the slider's handle to the other side of its track with the mouse."""
    handle, track = slider.locator(".noUi-handle").first, slider.locator(".noUi-target")
    handle.scroll_into_view_if_needed()
    grip, rail = handle.bounding_box(), track.bounding_box()
    assert grip is not None
    assert rail is not None
    x, y = grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2
    middle = rail["x"] + rail["width"] / 2
    target = rail["x"] + rail["width"] * (0.8 if x < middle else 0.2)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(target, y, steps=8)
    page.mouse.up()


def _answer(page: Page, slider: Locator) -> float:
    """Seconds from a key press on the slider to the changed picture, the median of three.

    Above the budget it is measured again, up to five times: another process may have been in the
    way, and a slow slider is slow each time. The smallest median counts.
    """
    slider.locator(".noUi-handle").first.focus()
    best = float("inf")
    keys = ("ArrowLeft", "ArrowRight", "ArrowLeft"), ("ArrowRight", "ArrowLeft", "ArrowRight")
    for round in range(5):
        times = []
        for key in keys[round % 2]:  # the slider stays where it is, give or take one
            page.evaluate(_WATCH)
            page.keyboard.press(key)
            times.append(page.evaluate("() => window.answered"))
            page.wait_for_timeout(100)
        best = min(best, statistics.median(times))
        if best < BUDGET:
            break
        page.wait_for_timeout(1000)
    return best


def _wait_for_change(page: Page, before: list[str], words: list[str], seconds: float = 15.0) -> str:
    """ "figure" once a plot's data differ, "words" if only a text does, "" if nothing does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if page.evaluate(_DRAWN) != before:
            return "figure"
        if words and page.evaluate(_WORDS) != words and time.monotonic() > end - seconds + 3:
            return "words"  # with three seconds for a figure to follow; the slider's own readout
        page.wait_for_timeout(100)  # is not among these words
    return ""
