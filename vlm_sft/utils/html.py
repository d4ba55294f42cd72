"""The look of every HTML page: one file that carries all of its own, and loads nothing."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vlm_sft.utils.ownership import html_mark

STYLE = """
:root{color-scheme:light dark;--ink:#1c2330;--soft:#5d6778;--paper:#f6f7f9;--card:#fff;
--line:#e1e5ec;--accent:#2f6fde;--good:#1a7f4b;--bad:#c03434}
@media(prefers-color-scheme:dark){:root{--ink:#e8ebf1;--soft:#9aa5b8;--paper:#12161d;
--card:#1a2029;--line:#2c3542;--accent:#7fb0ff;--good:#5fce94;--bad:#ff8a84}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:66rem;margin:auto;padding:2rem 1rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .3rem}h2{font-size:1.2rem;margin:2.2rem 0 .7rem}
.lead{color:var(--soft);margin:0 0 1rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1rem;
overflow-x:auto}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr))}
table{border-collapse:collapse;width:100%;font-size:.93rem}
th{color:var(--soft);font-weight:600}
th,td{text-align:left;padding:.4rem .7rem;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}td{font-variant-numeric:tabular-nums}
img{max-width:100%;height:auto;border-radius:8px;display:block}
figure{margin:0}.curve{background:#fff;padding:.3rem}
dt{color:var(--soft);margin-top:.6rem}dd{margin:0;font-weight:550;overflow-wrap:anywhere}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.84rem;margin:0}
.headline{margin-bottom:1rem}.big{font-size:2.1rem;line-height:1.2;font-weight:700;
color:var(--accent)}.note{color:var(--soft);font-size:.87rem;margin:.6rem 0 0}
.right,.wrong{font-size:.85rem;white-space:nowrap}.right{color:var(--good)}.wrong{color:var(--bad)}
summary{cursor:pointer;color:var(--accent)}
"""


def page(
    title: str,
    lead: str,
    body: Sequence[str],
    *,
    style: str = "",
    script: str = "",
    command: str = "page",
) -> str:
    """A whole page.

    A content policy lets nothing but its own styles, embedded images and this one script run.

    Args:
        title: Plain text, as is `lead`.
        lead: A sentence under the title.
        body: Finished HTML.
        style: CSS behind that of every page.
        script: JavaScript; holds no data.
        command: Name of the command that writes the page, for the mark in its head.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"; script-src 'sha256-{digest}'" if script else ""
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'{scripts}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"{html_mark(command)}"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
        f"{''.join(body)}</main>{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def section(title: str, content: str) -> str:
    """A titled card around finished HTML."""
    return f'<section><h2>{escape(title)}</h2><div class="card">{content}</div></section>'


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of plain values under their columns' names."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{escape(str(row.get(name, '')))}</td>" for name in columns)
        lines.append(f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def embedded_image(data: bytes, css: str, text: str, kind: str = "png") -> str:
    """An embedded image of class `css`; `text` is its description."""
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img class="{css}" alt="{escape(text)}" src="{uri}"></figure>'
