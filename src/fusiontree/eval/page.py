"""The frame of the HTML pages: one file each, which needs no network, follows the reader's light or dark theme and
fits a phone. What comes from elsewhere is escaped, and the page forbids itself to load or run anything.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path


def page(title: str, body: str, style: str = "") -> str:
    """A whole page.

    Args:
        title: text.
        body: HTML.
        style: CSS beside that of all pages.
    """
    return _PAGE.format(title=escape(title), style=_STYLE + style, body=body)


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def picture(path: Path, title: str, measured: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{data}">'
        f"<figcaption><b>{escape(title)}.</b> {escape(measured)}</figcaption></figure>"
    )


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table class=pairs>{cells}</table>"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --page: #f6f7f9; --card: #ffffff; --line: #dfe3e8;
  --accent: #2563a8; --mark: #fff0c2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --page: #12161c; --card: #1b212a;
  --line: #303945; --accent: #7fb2ea; --mark: #4d421c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin: 0 0 .8rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
header p, .note, figcaption { color: var(--soft); }
header p { margin: 0 0 1.2rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .7rem; padding: 1.1rem;
  margin: 0 0 1rem; }
.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem; }
@media (max-width: 32rem) { main { padding: 1rem .6rem 2rem; } section { padding: .9rem .7rem; }
  .tiles { grid-template-columns: repeat(2, 1fr); } }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.3; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.tiles span { display: block; font-size: .85rem; line-height: 1.35; color: var(--soft); }
figure { margin: 0 0 1.2rem; }
figure img { display: block; width: 100%; height: auto; padding: .4rem; background: #fff;
  border-radius: .4rem; }
figcaption { font-size: .88rem; margin-top: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
.numbers th, .numbers td { text-align: right; font-variant-numeric: tabular-nums; }
.pairs th { width: 35%; font-weight: 500; color: var(--soft); }
.pairs td { overflow-wrap: anywhere; }
pre { background: var(--page); border: 1px solid var(--line); border-radius: .4rem; padding: .8rem; margin: 0 0 .8rem;
  overflow-x: auto; font: .85rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: var(--mark); color: inherit; border-radius: .2rem; }
details { margin-top: .6rem; }
summary { cursor: pointer; padding: .2rem 0; }
dl { margin: 0; }
dt { overflow-wrap: anywhere; }
dd { margin: 0 0 .7rem; color: var(--soft); font-size: .92rem; }
code { font: .9rem ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
"""
