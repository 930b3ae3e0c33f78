"""The frame of the pages that are written: one file, no network, no script.

A content security policy in the page tells the browser to run no script, to load nothing but
pictures that are part of the page, to send no form, and to use only the style sheet whose hash it
names. It is the second wall: what stands in the page has been escaped or cleaned before.
"""

from __future__ import annotations

import base64
import hashlib
import html

STYLE = ":root { color-scheme: light dark; } "
STYLE += "body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; } "


def page(title: str, style: str, body: str) -> str:
    """A page of HTML.

    Args:
        title: plain text.
        style: rules of CSS.
        body: HTML that is harmless.
    """
    rules = STYLE + style
    digest = base64.b64encode(hashlib.sha256(rules.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta http-equiv="x-dns-prefetch-control" content="off">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{html.escape(title)}</title><style>{rules}</style></head>\n"
        f"<body>{body}</body></html>\n"
    )
