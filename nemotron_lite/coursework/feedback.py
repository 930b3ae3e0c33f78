"""The feedback page of a submission: the executed notebook with points, checks and comments.

The page is one file that needs no network and runs no script. Formulas are MathML, which browsers
draw themselves; it is made here from the LaTeX of the tasks. Pictures are part of the page.

What a learner wrote or displayed is not trusted, since an instructor opens the page. Text is
escaped. HTML, and what Markdown becomes, loses everything but harmless tags (bleach). SVG becomes a
picture, in which no script runs. Formulas are built from a list of known elements. A content
security policy in the page forbids scripts and connections besides (`pages`), should something have
been overlooked.

How much is shown of one submission is limited, and `plain_page` shows its sources as plain text if
the page cannot be made.
"""

from __future__ import annotations

import base64
import binascii
import functools
import html
import re
from typing import Any
from xml.etree import ElementTree

from nemotron_lite.coursework.clean_copy import grade_id, text_of
from nemotron_lite.coursework.pages import page

MOST_SHOWN = 8_000_000  # characters of all outputs of one submission
STYLE = """
body { max-width: 60rem; }
pre { overflow-x: auto; padding: .6rem .8rem; margin: .4rem 0; white-space: pre-wrap;
  font: 13px/1.45 ui-monospace, monospace; }
pre.code { background: rgba(128, 128, 128, .12); border-radius: 4px; }
pre.error, pre.stderr { background: rgba(220, 80, 60, .12); }
table { border-collapse: collapse; } td, th { padding: .2rem .7rem; text-align: left;
  border-bottom: 1px solid rgba(128, 128, 128, .4); }
.result { border-left: 4px solid #b8860b; padding: .4rem .9rem; margin: .5rem 0 1.5rem;
  background: rgba(128, 128, 128, .08); }
.result.passed { border-color: #2e8b57; } .result.failed { border-color: #c0392b; }
.result ul { list-style: none; padding-left: .4rem; margin: .3rem 0; }
.message { white-space: pre-line; }
img { max-width: 100%; }
.k, .kn, .kc, .ow { color: #8250df; font-weight: 600; } .c1, .c, .sd { color: #808a80; }
.s1, .s2, .sa, .si, .mi, .mf { color: #1a7f5a; } .nf, .nc { color: #0969da; }
"""
MATH = re.compile(r"\$\$(?P<block>.+?)\$\$|\$(?!\s)(?P<inline>[^$\n]+?)(?<!\s)\$(?!\d)", re.S)
CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.S)
TEXT_COMMANDS = re.compile(r"\\(?:mathrm|operatorname|textrm)\*?\{([^{}\\]*)\}")
CODE_TAG = re.compile(r"(?i)<(script|style)\b")
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
MATH_TAGS = {
    "math", "mrow", "mi", "mn", "mo", "mtext", "mspace", "msup", "msub", "msubsup", "mfrac",
    "msqrt", "mroot", "mover", "munder", "munderover", "mtable", "mtr", "mtd", "mstyle", "mpadded",
    "mphantom", "menclose", "mfenced",
}  # fmt: skip
MATH_ATTRIBUTES = {
    "display", "mathvariant", "stretchy", "fence", "form", "separator", "accent", "width", "lspace",
    "rspace", "minsize", "maxsize", "columnalign", "rowspacing", "columnspacing", "linethickness",
    "displaystyle", "scriptlevel", "movablelimits", "linebreak", "symmetric",
}  # fmt: skip
TAGS = {
    "a", "b", "br", "code", "dd", "div", "dl", "dt", "em", "h1", "h2", "h3", "h4", "hr", "i",
    "del", "li", "ol", "p", "pre", "s", "small", "span", "strong", "sub", "sup", "table", "tbody",
    "td", "tfoot", "th", "thead", "tr", "ul",
}  # fmt: skip


def _absolute_link(tag: str, name: str, value: str) -> bool:
    return name == "href" and re.match(r"(?i)https?://", value) is not None


ATTRIBUTES = {"a": _absolute_link, "td": ["colspan", "rowspan"], "th": ["colspan", "rowspan"]}


def formula(latex: str, *, block: bool = False) -> str:
    """LaTeX as MathML; as code if it cannot be converted."""
    as_code = f"<code>{html.escape(latex)}</code>"
    if len(latex) > 5000:
        return as_code
    from latex2mathml.converter import convert

    plain = TEXT_COMMANDS.sub(r"\\text{\1}", latex)
    for name in ("aligned", "align", "gathered"):
        plain = plain.replace(f"{{{name}}}", "{align*}")
    try:
        tree = ElementTree.fromstring(convert(plain, display="block" if block else "inline"))
    except Exception:  # any error of the converter, and XML that is not well formed
        return as_code
    for node in tree.iter():
        node.tag = node.tag.rpartition("}")[2]
        if node.tag not in MATH_TAGS:
            return as_code
        for name in set(node.attrib) - MATH_ATTRIBUTES:
            del node.attrib[name]
    return ElementTree.tostring(tree, encoding="unicode")


@functools.lru_cache(1)
def _markdown_parser() -> Any:
    import mistune

    return mistune.create_markdown(escape=True, plugins=["table", "strikethrough"])


def markdown(text: str) -> str:
    """Markdown as HTML: formulas as MathML, HTML in the text shown as text."""
    formulas: list[str] = []

    def keep(found: re.Match[str]) -> str:
        latex = found["block"] or found["inline"]
        formulas.append(formula(latex.strip(), block=found["block"] is not None))
        return f"\ue000{len(formulas) - 1}\ue001"

    text = text.replace("\ue000", "").replace("\ue001", "")
    pieces = CODE.split(text)
    pieces[::2] = [MATH.sub(keep, piece) for piece in pieces[::2]]
    made: str = _markdown_parser()("".join(pieces))
    return re.sub(
        "\ue000(\\d{1,9})\ue001",
        lambda found: formulas[int(found[1])] if int(found[1]) < len(formulas) else "",
        _cleaner().clean(made),
    )


@functools.lru_cache(1)
def _cleaner() -> Any:
    from bleach.sanitizer import Cleaner

    return Cleaner(TAGS, ATTRIBUTES, protocols={"http", "https"}, strip=True, strip_comments=True)


def harmless(markup: str) -> str:
    """HTML without scripts, styles, forms, frames, pictures and event handlers."""
    cleaned: str = _cleaner().clean(_without_code(markup))
    return cleaned


def _without_code(markup: str) -> str:
    """HTML without the text of scripts and style sheets, which bleach would show as text."""
    kept, start = [], 0
    for begin in CODE_TAG.finditer(markup):
        if begin.start() < start:
            continue
        end = re.compile(rf"(?i)</{begin[1]}\s*>").search(markup, begin.end())
        if end is None:  # bleach removes the tag; what follows is shown
            break
        kept.append(markup[start : begin.start()])
        start = end.end()
    return "".join(kept) + markup[start:]


def _code(source: str) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    coloured: str = highlight(source, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True))
    return f'<pre class="code">{coloured}</pre>'


def _picture(kind: str, data: str) -> str:
    if kind == "image/svg+xml":
        encoded = base64.b64encode(data.encode()).decode()
    else:
        try:
            encoded = base64.b64encode(base64.b64decode(data)).decode()
        except (binascii.Error, ValueError):
            return "<p>(a picture that cannot be read)</p>"
    return f'<img alt="a picture that the cell displayed" src="data:{kind};base64,{encoded}">'


def _text(text: str, kind: str = "") -> str:
    return f'<pre class="{kind}">{html.escape(ANSI.sub("", text))}</pre>'


def output_html(output: dict[str, Any]) -> str:
    """One output of a cell as HTML."""
    if output["output_type"] == "stream":
        return _text(output["text"], output["name"])
    if output["output_type"] == "error":
        lines = [*output["traceback"], f"{output['ename']}: {output['evalue']}"]
        return _text("\n".join(lines), "error")
    data = output["data"]
    for kind in ("image/svg+xml", "image/png", "image/jpeg"):
        if kind in data:
            return _picture(kind, data[kind])
    if "text/html" in data:
        return f"<div>{harmless(data['text/html'])}</div>"
    if "text/markdown" in data:
        return f"<div>{markdown(data['text/markdown'])}</div>"
    if "text/latex" in data:
        return f"<p>{formula(data['text/latex'].strip().strip('$'), block=True)}</p>"
    return _text(data.get("text/plain", ""))


def result_html(score: dict[str, Any]) -> str:
    """What an exercise earned: points, each check with ✓ or ✗, and the message."""
    lines = [
        line for line in score["message"].splitlines() if not line.startswith(("  ✓ ", "  ✗ "))
    ]
    kind = "passed" if score["status"] == "passed" else "partial" if score["points"] else "failed"
    checks = "".join(
        f"<li>{'✓' if passed else '✗'} {html.escape(name)}</li>" for name, passed in score["checks"]
    )
    title = f"{score['id']}: {score['points']:g} of {score['max_points']:g} points"
    return (
        f'<div class="result {kind}"><b>{html.escape(title)}</b><ul>{checks}</ul>'
        f'<div class="message">{html.escape(chr(10).join(lines))}</div></div>'
    )


def _summary(result: dict[str, Any]) -> str:
    most = "?" if result["max_points"] is None else f"{result['max_points']:g}"
    title = f"{result['student']} · {result['assignment'] or 'no assignment'}"
    extra = ""
    if result["max_optional_points"]:
        optional = f"{result['optional_points']:g} of {result['max_optional_points']:g}"
        extra = f", and {optional} optional points"
    notes = "".join(
        f"<li>{html.escape(line)}</li>"
        for line in (f"{result['status']}: {result['message']}", *result["notes"])
    )
    rows = "".join(
        f"<tr><td>{html.escape(e['id'])}</td><td>{html.escape(e['kind'])}</td>"
        f"<td>{e['points']:g} of {e['max_points']:g}</td><td>{html.escape(e['status'])}</td></tr>"
        for e in result["exercises"]
    )
    table = f"<table><tr><th>Exercise<th>Kind<th>Points<th>Status</tr>{rows}</table>"
    return (
        f"<h1>{html.escape(title)}: {result['points']:g} of {most} points{extra}</h1>"
        f"<ul>{notes}</ul>{table if rows else ''}"
    )


def feedback_page(
    result: dict[str, Any],
    notebook: dict[str, Any] | None = None,
    outputs: dict[int, list[dict[str, Any]]] | None = None,
) -> str:
    """The page of one submission; only the summary if its notebook could not be read.

    Args:
        result: of the submission, as scores.json has it.
        notebook: the clean copy that was executed.
        outputs: of each cell, by its place.
    """
    scores = {e["id"].replace(".", "-") + "-check": e for e in result["exercises"]}
    parts, left = [_summary(result)], MOST_SHOWN
    for place, cell in enumerate(notebook["cells"] if notebook else ()):
        text, name = text_of(cell), grade_id(cell)
        if cell["cell_type"] == "markdown":
            parts.append(markdown(text))
        elif cell["cell_type"] == "raw":
            parts.append(_text(text))
        elif name in scores:
            parts.append(result_html(scores[name]))
        else:
            parts.append(_code(text))
            for output in (outputs or {}).get(place, []):
                made = output_html(output) if left > 0 else ""
                left -= len(made)
                parts.append(made if left > 0 else "<p>(more output, which is not shown)</p>")
                if left <= 0:
                    break
    return page(_title(result), STYLE, "\n".join(parts))


def plain_page(result: dict[str, Any], notebook: dict[str, Any] | None, reason: str) -> str:
    """The page without colours, formulas and outputs, for what cannot be shown with them."""
    why = f"<p>The cells are shown as plain text: {html.escape(reason)}</p>"
    cells = "".join(_text(text_of(cell)) for cell in (notebook["cells"] if notebook else ()))
    results = "".join(map(result_html, result["exercises"]))
    return page(_title(result), STYLE, _summary(result) + results + why + cells)


def _title(result: dict[str, Any]) -> str:
    return f"{result['student']} · {result['assignment']}"
