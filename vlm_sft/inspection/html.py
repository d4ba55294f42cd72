"""One HTML page of records: images, turns, trained tokens, figures; to search and to filter."""

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Final

from vlm_sft.data.conversation import Conversation, ImagePart, ImageSource, TextPart, Turn
from vlm_sft.data.images import open_image
from vlm_sft.errors import ImageError
from vlm_sft.inspection.records import NO_LIMIT, Inspected, Inspection
from vlm_sft.inspection.statistics import (
    BUCKETS,
    FREE_TEXT,
    OUTCOME_TITLES,
    FigureTable,
    SourceStatistics,
    Statistics,
    lengths_png,
    shares_png,
    spread,
)
from vlm_sft.inspection.terminal import message
from vlm_sft.inspection.tokens import Spelled, Stretch, Token, spell
from vlm_sft.utils.atomic_files import write_text
from vlm_sft.utils.escape import escape_control
from vlm_sft.utils.html import embedded_image, page

THUMBNAIL: Final = 256
"""Longest side of an embedded image."""

_STYLE: Final = """
:root{--trained:#d3f2de;--trained-ink:#0b4a28;--rule:#1a7f4b;--chip:#e6e9f0;--warn:#fdeccf}
@media(prefers-color-scheme:dark){:root{--trained:#123d27;--trained-ink:#b9f2d0;--rule:#5fce94;
--chip:#2b3443;--warn:#4a3510}}
.plots{margin-bottom:1rem}.figures table{font-size:.87rem}.figures td{white-space:nowrap}
.figures th{vertical-align:bottom}.figures summary{margin-top:1rem}
.figures h3{font-size:1rem;margin:1.2rem 0 .2rem}.figures h3:first-child{margin-top:0}
.figures td.r,.figures th.r{text-align:right}.figures .free{white-space:normal;min-width:12rem}
.figures td:first-child{max-width:22rem;overflow:hidden;text-overflow:ellipsis}
.tools{position:sticky;top:0;z-index:1;background:var(--paper);padding:.7rem 0 .5rem;
border-bottom:1px solid var(--line);margin-bottom:1rem}
.tools input{width:100%;font:inherit;padding:.5rem .8rem;border:1px solid var(--line);
border-radius:8px;background:var(--card);color:var(--ink)}
.tools div{display:flex;flex-wrap:wrap;gap:.4rem;margin-top:.5rem;align-items:center}
.tools button{font:inherit;font-size:.86rem;padding:.2rem .7rem;border:1px solid var(--line);
border-radius:99px;background:var(--card);color:var(--ink);cursor:pointer;max-width:100%;
overflow-wrap:anywhere}
.tools button[aria-pressed=true]{background:var(--accent);border-color:var(--accent);
color:var(--paper);font-weight:600}
.tools output{color:var(--soft);font-size:.86rem;margin-left:auto}
.rec{margin-bottom:1rem;content-visibility:auto;contain-intrinsic-size:auto 18rem}
.rec h3{margin:0;font-size:1.05rem;display:inline;overflow-wrap:anywhere}
.rec .where{color:var(--soft);font-size:.83rem;overflow-wrap:anywhere}
.rec p{margin:.25rem 0}.rec .counts{color:var(--soft);font-size:.87rem}
.badge{font-size:.78rem;font-weight:600;border-radius:99px;padding:.1rem .6rem;margin:0 .5rem;
background:var(--chip);white-space:nowrap}
.badge.bad{color:var(--bad);border:1px solid var(--bad);background:none}
.why{background:var(--warn);border-radius:8px;padding:.4rem .7rem;overflow-wrap:anywhere}
.both{display:flex;gap:1rem;margin-top:.6rem;align-items:flex-start}
.pics{flex:none;display:flex;flex-direction:column;gap:.5rem;max-width:13rem}
.pics img{border:1px solid var(--line)}
.pics figcaption{color:var(--soft);font-size:.78rem;overflow-wrap:anywhere}
.gone{border:2px dashed var(--bad);color:var(--bad);border-radius:8px;padding:.6rem;
font-size:.83rem;overflow-wrap:anywhere;width:13rem;max-width:100%}
.text{flex:1;min-width:0;font-size:.93rem}
.ex{white-space:pre-wrap;overflow-wrap:anywhere;padding:.35rem 0 .35rem .8rem;
border-left:3px solid var(--line);margin-bottom:.5rem;color:var(--soft);unicode-bidi:isolate}
.ex i{font-style:normal}.ex:hover i{box-shadow:inset -1px 0 0 var(--line)}
mark{background:var(--trained);color:var(--trained-ink);font-weight:600;border-radius:3px;
border-bottom:2px solid var(--rule);-webkit-box-decoration-break:clone;
box-decoration-break:clone}
mark:before{content:"\\27E6"}mark:after{content:"\\27E7"}
.ex:hover mark i{box-shadow:inset -1px 0 0 var(--rule)}
u{text-decoration:underline dotted;text-underline-offset:.2em}
.ex b{font:600 .82em ui-monospace,monospace;background:var(--chip);color:var(--ink);
border-radius:4px;padding:0 .25em}
.ex b.im{border:1px solid var(--accent);background:none;color:var(--accent)}
.role{font-weight:600}details{margin-top:.4rem}
details .ex{margin-top:.4rem;border-left-style:dashed}
.legend{color:var(--soft);font-size:.87rem}
.legend .ex{display:inline;border:0;padding:0;margin:0 1rem 0 0}
@media(max-width:40rem){main{padding:1rem .7rem 3rem}.both{flex-direction:column}
.pics{flex-direction:row;flex-wrap:wrap;max-width:100%}.pics figure{max-width:9rem}
.tools output{margin-left:0}.rec{padding:.7rem}}
@media print{.tools{display:none}.rec{break-inside:avoid}}
"""

_SCRIPT: Final = """
"use strict";
const records = [...document.querySelectorAll("article.rec")];
const tools = document.querySelector(".tools");
const box = tools.querySelector("input"), said = tools.querySelector("output");
const texts = new Map();
function textOf(record) {
  if (!texts.has(record)) texts.set(record, record.textContent.toLowerCase());
  return texts.get(record);
}
function chosen(kind) {
  const pressed = tools.querySelector(`button[data-kind=${kind}][aria-pressed=true]`);
  return pressed === null ? "" : pressed.dataset.value;
}
function update() {
  const wanted = box.value.toLowerCase(), source = chosen("source"), outcome = chosen("outcome");
  let shown = 0;
  for (const record of records) {
    const fits = (source === "" || record.dataset.source === source)
      && (outcome === "" || record.dataset.outcome === outcome)
      && (wanted === "" || textOf(record).includes(wanted));
    record.hidden = !fits;
    shown += fits;
  }
  said.textContent = `${shown} of ${records.length} records`;
}
box.addEventListener("input", update);
for (const button of tools.querySelectorAll("button")) {
  button.addEventListener("click", () => {
    const before = button.getAttribute("aria-pressed") === "true";
    for (const other of tools.querySelectorAll(`button[data-kind=${button.dataset.kind}]`)) {
      other.setAttribute("aria-pressed", "false");
    }
    button.setAttribute("aria-pressed", String(!before));
    update();
  });
}
tools.hidden = false;
update();
"""

_LEGEND: Final = (
    '<p class="legend"><span class="ex"><mark>trained</mark></span>'
    '<span class="ex">read, not trained</span>'
    '<span class="ex"><u>an answer that is not trained</u></span>'
    '<span class="ex"><b>control token</b></span>'
    '<span class="ex"><b class="im">image</b></span>'
    "Point at a text to see its tokens' borders.</p>"
)


@dataclass
class RecordsPage:
    """Collects records and writes them as a page.

    Args:
        inspection: Where the records come from.
        limit: Records that are shown at most; the others are counted.
        chosen: What was chosen, in the command line's words; "" for all.
    """

    inspection: Inspection
    limit: int
    chosen: str = ""
    num_matching: int = 0
    _articles: list[str] = field(default_factory=list)
    _sources: Counter[int] = field(default_factory=Counter)
    _outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def num_shown(self) -> int:
        """Records on the page."""
        return len(self._articles)

    def add(self, found: Inspected) -> None:
        """Show a record, as long as the limit allows, and count it."""
        self.num_matching += 1
        if self.num_shown >= self.limit:
            return
        self._sources[found.source] += 1
        self._outcomes[found.bucket] += 1
        inspection = self.inspection
        spelled = spell(found, inspection.renderer, inspection.num_image_tokens)
        name = inspection.files[found.source].path
        self._articles.append(_article(found, spelled, name, inspection.num_image_tokens))

    def write(self, path: str | Path, statistics: Statistics) -> None:
        """Write the page; equal records and figures give equal bytes.

        Raises:
            OSError: The place cannot be written; an old file there is untouched.
        """
        names = ", ".join(self.inspection.names())
        body = [
            _warning(self._notes(statistics)),
            _headline(statistics.total),
            _plots(statistics),
            _figures(statistics.tables()),
            "<h2>Records</h2>",
            f'<p class="lead">{_escaped(self._shown_words())}</p>',
            _LEGEND,
            self._tools(),
            *self._articles,
        ]
        made = page(
            escape_control(f"Records of {names}"),
            escape_control(self._lead()),
            body,
            command="show",
            **_LOOK,
        )
        write_text(path, made)

    def _lead(self) -> str:
        inspection = self.inspection
        config = inspection.config
        words = [f"Template {inspection.renderer.template.name}"]
        words.append(f"{inspection.num_image_tokens:,} image tokens an image")
        if config.max_length == NO_LIMIT:
            words.append("no length limit")
        else:
            words.append(f"max_length {config.max_length:,}, length_policy {config.length_policy}")
        return "; ".join(words) + "."

    def _notes(self, statistics: Statistics) -> str:
        faulty = statistics.total.count("quarantined")
        if not faulty or not self.inspection.look_for_images:
            return ""
        if self.inspection.config.on_error == "quarantine":
            return ""
        return (
            f"data.on_error is stop: training would end at the first of the {faulty:,} "
            "quarantined records."
        )

    def _shown_words(self) -> str:
        chosen = f" chosen by {self.chosen}" if self.chosen else ""
        return f"{self.num_shown:,} of {self.num_matching:,} records{chosen} are shown."

    def _tools(self) -> str:
        names = self.inspection.names()
        sources = [(str(i), names[i], n) for i, n in sorted(self._sources.items())]
        outcomes = [(b, words, self._outcomes[b]) for b, words in BUCKETS.items()]
        groups = _buttons("source", sources) + _buttons(
            "outcome", [found for found in outcomes if found[2]]
        )
        return (
            '<div class="tools" hidden><input type="search" aria-label="search" '
            'placeholder="Search ids, texts, files" autocomplete="off">'
            f'<div>{groups}<output aria-live="polite"></output></div></div>'
        )


_LOOK: Final = {"style": _STYLE, "script": _SCRIPT}


def _buttons(kind: str, values: Sequence[tuple[str, str, int]]) -> str:
    if len(values) < 2:
        return ""
    return "".join(
        f'<button type="button" data-kind="{kind}" data-value="{value}" aria-pressed="false">'
        f"{_escaped(words)} ({count:,})</button>"
        for value, words, count in values
    )


def _article(found: Inspected, spelled: Spelled | None, source: str, num_image_tokens: int) -> str:
    entry, conversation = found.entry, found.conversation
    bad = "" if found.bucket == "trained" else " bad"
    parts = [
        f'<article class="card rec" data-source="{found.source}" data-outcome="{found.bucket}">',
        f"<h3>{_escaped(entry.record_id)}</h3>"
        f'<span class="badge{bad}">{BUCKETS[found.bucket]}</span>\n',
        f'<span class="where">{_escaped(_where(entry.where, source))}</span>\n',
    ]
    if entry.reason:
        parts.append(f'<p class="why"><strong>{_escaped(entry.reason)}</strong>: ')
        parts.append(f"{_escaped(message(found))}</p>\n")
    if spelled is not None and conversation is not None:
        parts.append(f'<p class="counts">{_counts(spelled, conversation)}</p>\n')
    if conversation is not None:
        images = "".join(
            _thumbnail(source, number) for number, source in enumerate(conversation.images, 1)
        )
        images = f'<div class="pics">{images}</div>' if images else ""
        text = _exchanges(spelled, num_image_tokens) if spelled else _turns(conversation.turns)
        parts.append(f'<div class="both">{images}<div class="text">{text}')
        parts.append(f"{_dropped(found)}</div></div>")
    return "".join(parts) + "</article>\n"


def _where(where: str, source: str) -> str:
    return where if source in where else f"{where} of {source}"


def _counts(spelled: Spelled, conversation: Conversation) -> str:
    turns, images, trained = len(conversation.turns), spelled.num_images, spelled.num_trained
    share = f" ({100 * trained / spelled.num_text_tokens:.0f} %)" if trained else ""
    return (
        f"{spelled.num_text_tokens:,} tokens, {spelled.length:,} with image tokens · "
        f"{trained:,} trained{share} · {images} image{'' if images == 1 else 's'} · "
        f"{turns} turn{'' if turns == 1 else 's'}"
    )


def _exchanges(spelled: Spelled, num_image_tokens: int) -> str:
    """A block for each answer with what comes before it, and what closes it."""
    blocks = [""]
    images = iter(range(1, spelled.num_images + 1))
    after_answer = False
    last = len(spelled.stretches) - 1
    for number, stretch in enumerate(spelled.stretches):
        if after_answer and number < last:
            closing, stretch = _split_line_end(stretch)
            blocks[-1] += _stretch(closing, images, num_image_tokens)
            blocks.append("")
        blocks[-1] += _stretch(stretch, images, num_image_tokens)
        after_answer = stretch.fate != "context"
    return "".join(f'<div class="ex">{block}</div>' for block in blocks)


def _split_line_end(stretch: Stretch) -> tuple[Stretch, Stretch]:
    """The line end that a stretch begins with, and the rest; the first may be empty."""
    is_end = bool(stretch.tokens) and not stretch.tokens[0].text.strip()
    cut = int(is_end and stretch.fate == "context")
    head, rest = stretch.tokens[:cut], stretch.tokens[cut:]
    return Stretch(stretch.fate, head), Stretch(stretch.fate, rest)


def _stretch(stretch: Stretch, images: Iterator[int], num_image_tokens: int) -> str:
    if not stretch.tokens:
        return ""
    inner = "".join(_token(token, images, num_image_tokens) for token in stretch.tokens)
    element = {"trained": "mark", "untrained": "u", "context": "span"}[stretch.fate]
    return f"<{element}>{inner}</{element}>"


def _token(token: Token, images: Iterator[int], num_image_tokens: int) -> str:
    if token.is_image:
        title = f"image {next(images)}, {num_image_tokens:,} image tokens"
        return f'<b class="im" title="{title}">{_escaped(token.text)}</b>'
    element = "b" if token.is_control else "i"
    return f"<{element}>{_escaped(token.text)}</{element}>"


def _turns(turns: Sequence[Turn]) -> str:
    """Turns as read, for records that cannot be rendered and turns that are dropped."""
    return "".join(
        f'<div class="ex"><span class="role">{turn.role}</span>: '
        + "".join(
            f"<span>{_escaped(part.text)}</span>"
            if isinstance(part, TextPart)
            else '<b class="im">&lt;image&gt;</b>'
            for part in turn.parts
        )
        + "</div>"
        for turn in turns
    )


def _dropped(found: Inspected) -> str:
    if found.bucket != "turns_dropped" or not isinstance(found.record, Conversation):
        return ""
    assert found.outcome.kept is not None
    turns = found.record.turns[len(found.outcome.kept.turns) :]
    images = sum(isinstance(part, ImagePart) for turn in turns for part in turn.parts)
    words = f"{len(turns)} turns dropped" + (f", {images} images with them" if images else "")
    return f"<details><summary>{words}</summary>{_turns(turns)}</details>"


def _thumbnail(source: ImageSource, number: int) -> str:
    name = "embedded in the record" if isinstance(source, bytes) else source.name
    try:
        image = open_image(source)
    except ImageError as error:
        return f'<div class="gone">image {number}: {_escaped(str(error))}</div>'
    width, height = image.size
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82)
    uri = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="image {number}" src="data:image/jpeg;base64,{uri}" '
        f'width="{image.width}" height="{image.height}">'
        f"<figcaption>{number}: {_escaped(name)}, {width} x {height}</figcaption></figure>"
    )


def _warning(note: str) -> str:
    return f'<p class="why">{_escaped(note)}</p>' if note else ""


def _headline(total: SourceStatistics) -> str:
    """The figures that a reader wants first, in large type."""
    trained = total.count("trained") + total.count("turns_dropped")
    cells = [(f"{trained:,} of {total.records:,}", "records are trained on")]
    if total.text_tokens:
        share = 100 * total.trained_tokens / total.text_tokens
        cells.append(
            (f"{share:.1f} %", f"of their text tokens are trained: {total.trained_tokens:,}")
        )
    if total.lengths:
        lengths = spread(total.lengths)
        words = f"tokens is the median length with image tokens, the longest {lengths['longest']:,}"
        cells.append((f"{lengths['median']:,}", words))
    inner = "".join(
        f'<div class="card"><div class="big">{_escaped(figure)}</div>{_escaped(words)}</div>'
        for figure, words in cells
    )
    return f'<div class="grid headline">{inner}</div>'


def _figures(tables: Sequence[FigureTable]) -> str:
    """What becomes of the records, and why; the rest to be opened."""
    shown = [table for table in tables if table.title in OUTCOME_TITLES]
    rest = [table for table in tables if table.title not in OUTCOME_TITLES]
    titles = ", ".join(table.title.lower() for table in rest)
    return (
        f'<div class="card figures">{"".join(map(_figure_table, shown))}'
        f"<details><summary>More figures: {_escaped(titles)}</summary>"
        f"{''.join(map(_figure_table, rest))}</details></div>"
    )


def _figure_table(figures: FigureTable) -> str:
    def cell(tag: str, text: str, column: int) -> str:
        css = ' class="r"' if figures.is_number(column) else ""
        if figures.columns[column] == FREE_TEXT:
            css = ' class="free"'
        return f"<{tag}{css}>{_escaped(text)}</{tag}>"

    head = "".join(cell("th", name, i) for i, name in enumerate(figures.columns))
    rows = "".join(
        "<tr>" + "".join(cell("td", text, i) for i, text in enumerate(row)) + "</tr>"
        for row in figures.rows
    )
    note = f'<p class="note">{_escaped(figures.note)}</p>' if figures.note else ""
    return (
        f"<h3>{_escaped(figures.title)}</h3><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table>{note}"
    )


def _plots(statistics: Statistics) -> str:
    total = statistics.total
    lengths = lengths_png(total, statistics.inspection.config.max_length)
    plots = embedded_image(lengths, "curve", "histogram of tokens a record")
    plots += embedded_image(shares_png(total), "curve", "histogram of the supervised share")
    return f'<h2>Figures</h2><div class="grid plots">{plots}</div>'


def _escaped(text: str) -> str:
    return escape(escape_control(text))
