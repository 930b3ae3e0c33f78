"""Start a JupyterLab, open a notebook in a browser, run it, and drag its sliders.

The server has its own home folder, listens on this machine only, and does not check for news. Pages
may only load from it: a request to any other address is refused and recorded.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Locator, Page, Route

TOKEN = "only-for-this-test"
RUN_SECONDS = 300  # Run All; a chapter takes far less on a quiet machine
SETTINGS = {
    "apputils-extension/notification": {
        "fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True,
    },
    "notebook-extension/tracker": {"windowingMode": "none"},  # draw invisible cells too
    "apputils-extension/themes": {"theme": "JupyterLab Light"},
}  # fmt: skip

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
_CELLS = "() => jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON().cells"


@contextmanager
def serve(root: Path, home: Path) -> Iterator[str]:
    """JupyterLab in the folder `root`, with its settings below `home`; yields its address."""
    for name, content in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    places = ["JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "HOME"]
    environment = {**os.environ, **{name: str(home / name.lower()) for name in places}}
    environment["JUPYTERLAB_SETTINGS_DIR"] = str(home / "settings")
    environment["JUPYTERLAB_WORKSPACES_DIR"] = str(home / "workspaces")
    for name in places:
        Path(environment[name]).mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}",
        f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
    ]  # fmt: skip
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=log
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(address, server, home / "server.log")
            yield address
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path, seconds: int = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=5).close()
        except (urllib.error.URLError, OSError):
            if server.poll() is not None:
                raise RuntimeError(f"JupyterLab ended:\n{log.read_text()[-2000:]}") from None
            time.sleep(0.3)
        else:
            return
    raise RuntimeError(f"JupyterLab was not up after {seconds} s:\n{log.read_text()[-2000:]}")


@dataclass
class Visit:
    """What the browser showed for one notebook."""

    broken_at_rest: list[str] = field(default_factory=list)
    figures_at_rest: int = 0
    cut_at_rest: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    not_run: list[int] = field(default_factory=list)
    sliders: int = 0
    idle_sliders: list[str] = field(default_factory=list)  # nothing changed when they were dragged
    moved_figures: int = 0  # sliders that changed a figure's data
    answers: dict[str, float] = field(default_factory=dict, compare=False)  # key to picture, s
    outside: list[str] = field(default_factory=list)  # each address once: pages may ask again


def visit(browser: Browser, address: str, name: str) -> Visit:
    """Open the notebook `name`, check its stored outputs, Run All, drag every slider."""
    seen = Visit()
    with opened(browser, address, name, seen) as page:
        seen.broken_at_rest = _texts(page.get_by_text("Error displaying widget"))
        seen.figures_at_rest = page.locator(
            ".jp-OutputArea-output .js-plotly-plot, .jp-OutputArea-output img"
        ).count()
        seen.cut_at_rest = page.evaluate(_CUT)
        ended = page.evaluate(_RUN, RUN_SECONDS)
        cells: list[dict[str, Any]] = page.evaluate(_CELLS)
        seen.errors = [] if ended == "done" else [f"not finished after {RUN_SECONDS} s"]
        for index, cell in enumerate(cells):
            for output in cell.get("outputs", ()):
                if output["output_type"] == "error":
                    seen.errors.append(f"cell {index}: {output['ename']}: {output['evalue']}")
            if cell["cell_type"] == "code" and "".join(cell["source"]).strip():
                seen.not_run += [] if cell["execution_count"] else [index]
        seen.errors += _texts(page.get_by_text("Error displaying widget"))
        _drag_all(page, seen)
    return seen


@contextmanager
def opened(browser: Browser, address: str, name: str, seen: Visit, **view: Any) -> Iterator[Page]:
    """A page with the notebook open and its kernel idle; other addresses are refused."""
    context = browser.new_context(viewport=view.pop("viewport", {"width": 1280, "height": 900}))

    def guard(route: Route) -> None:
        url = route.request.url
        if urlsplit(url).hostname in (None, "127.0.0.1") or url.startswith(("data:", "blob:")):
            route.continue_()
        else:
            _note_outside(url, seen)
            route.abort()

    context.route("**/*", guard)
    page = context.new_page()
    page.on("websocket", lambda socket: _note_socket(socket.url, seen))
    try:
        page.goto(f"{address}/lab/tree/{name}?token={TOKEN}&reset", timeout=90_000)
        page.wait_for_function(_IDLE, timeout=90_000)
        yield page
        page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    finally:
        context.close()


def _note_socket(url: str, seen: Visit) -> None:
    if urlsplit(url).hostname != "127.0.0.1":
        _note_outside(url, seen)


def _note_outside(url: str, seen: Visit) -> None:
    if url not in seen.outside:
        seen.outside.append(url)


def _texts(found: Locator) -> list[str]:
    return [text.strip()[:120] for text in found.all_inner_texts()]


def _drag_all(page: Page, seen: Visit) -> None:
    page.wait_for_timeout(500)  # the last widgets draw after the last cell has ended
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
    """Seconds from a key press on the slider to the changed picture, the median of three."""
    slider.locator(".noUi-handle").first.focus()
    times = []
    for key in ("ArrowLeft", "ArrowRight", "ArrowLeft"):
        page.evaluate(_WATCH)
        page.keyboard.press(key)
        times.append(page.evaluate("() => window.answered"))
        page.wait_for_timeout(100)
    return statistics.median(times)


def _wait_for_change(page: Page, before: list[str], words: list[str], seconds: float = 8.0) -> str:
    """ "figure" once a plot's data differ, "words" if only a text does, "" if nothing does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if page.evaluate(_DRAWN) != before:
            return "figure"
        if page.evaluate(_WORDS) != words and time.monotonic() > end - seconds + 3:
            return "words"  # with three seconds for a figure to follow; the slider's own readout
        page.wait_for_timeout(100)  # is not among these words
    return ""
