"""One sample as HTML: the image under its boxes, the turns with their claims, what was found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

from data_tools.coco import AnnotatedImage
from data_tools.instruct.report import drawing
from data_tools.instruct.report.evidence import (
    SYMBOLS,
    deciding,
    evidence,
    labels,
    pieces,
    spans_of,
    verdict_of,
)
from data_tools.instruct.schema import Check, Sample, Shown, Turn
from vlm_sft.utils.escape import escape_control
from vlm_sft.utils.html import embedded_image as embedded

STYLE: Final = """
:root{--supported:#0066a8;--contradicted:#b8480a;--unknown:#7a5f00;--plain:#4a5261;
--supported-soft:#dcecf7;--contradicted-soft:#fbe3d3;--unknown-soft:#f5edcd;--chip:#e9ecf2}
@media(prefers-color-scheme:dark){:root{--supported:#6cb8f0;--contradicted:#ff9a5c;
--unknown:#e6c65c;--supported-soft:#10324a;--contradicted-soft:#4a2510;--unknown-soft:#3d340f;
--chip:#2b3443}}
.pic{position:relative;line-height:0;border-radius:8px;overflow:hidden;background:var(--chip);
align-self:stretch}.pic img,.pic .blank{width:100%;border-radius:0}
.pic svg{position:absolute;inset:0;width:100%;height:100%}.pic figure{line-height:0}
.pic rect{fill:none;vector-effect:non-scaling-stroke;pointer-events:all}
.pic .under{stroke:#fff;stroke-width:3px;opacity:.75;pointer-events:none}
.pic .line{stroke:#4a5261;stroke-width:1.5px}
.pic .told .line{stroke-dasharray:1.5 3}.pic .told .under{opacity:.35}
.pic .crowd .line{stroke-dasharray:9 5}
.pic .supported .line{stroke:#0072b2;stroke-width:3px}
.pic .contradicted .line{stroke:#d55e00;stroke-width:3.5px}
.pic .unknown .line{stroke:#8a6d00;stroke-width:3px}
.pic .supported .under,.pic .contradicted .under,.pic .unknown .under{stroke-width:6px;opacity:1}
.pic .tag rect{fill:#4a5261;stroke:none}.pic .tag text{fill:#fff;font-family:system-ui,sans-serif;
font-weight:600}.pic .tag.supported rect{fill:#0072b2}.pic .tag.contradicted rect{fill:#b8480a}
.pic .tag.unknown rect{fill:#7a5f00}
.pic .hot .line{stroke:#e0007a!important;stroke-width:5px!important;stroke-dasharray:none}
.pic .tag.hot rect{fill:#e0007a!important}
.gone{border:2px dashed var(--contradicted);border-radius:8px;padding:.6rem;font-size:.83rem;
overflow-wrap:anywhere;line-height:1.4}
.sample{min-width:0}.sample h4{margin:0 0 .35rem;line-height:1.5;font-size:.92rem;
overflow-wrap:anywhere}
.sample .id{display:block;font-family:ui-monospace,monospace;font-size:.74rem;font-weight:500}
.sample .turn{margin:.45rem 0;font-size:.93rem;overflow-wrap:anywhere;unicode-bidi:isolate}
.turn p{margin:.1rem 0;white-space:pre-wrap;unicode-bidi:isolate}
.turn .q{color:var(--soft)}.turn b{font-weight:700;margin-right:.35rem}
.cut{color:var(--soft);font-size:.82rem;font-style:italic}
.badge{display:inline-block;font-size:.76rem;font-weight:600;border-radius:99px;
padding:.05rem .55rem;background:var(--chip);white-space:nowrap}
.badge.contradicted,.badge.supported,.badge.unknown{background:none;border:1px solid}
.claim{border-radius:3px;text-decoration-thickness:2px;text-underline-offset:.22em;cursor:default}
.claim.supported{text-decoration:underline solid var(--supported)}
.claim.contradicted{text-decoration:underline wavy var(--contradicted);
background:var(--contradicted-soft);font-weight:600}
.claim.unknown{text-decoration:underline dotted var(--unknown);background:var(--unknown-soft)}
sup{font-size:.7em;font-weight:700;line-height:0;margin:0 .1em}
sup.supported,li.supported .sy,td.supported,.badge.supported{color:var(--supported)}
sup.contradicted,li.contradicted .sy,td.contradicted,.badge.contradicted{
color:var(--contradicted)}
sup.unknown,li.unknown .sy,td.unknown,.badge.unknown{color:var(--unknown)}
.found{list-style:none;margin:.5rem 0 0;padding:.45rem 0 0;border-top:1px solid var(--line);
font-size:.86rem}.found li{margin:.2rem 0;overflow-wrap:anywhere}.sy{font-weight:700}
.found code,code{font-size:.92em;font-weight:600}.rests{color:var(--soft)}
.raw{background:var(--chip);border-radius:8px;padding:.6rem;max-height:11rem;overflow:auto;
unicode-bidi:isolate}
"""
"""Of every page with samples."""

SCRIPT: Final = """
"use strict";
function mark(event, on) {
  const claim = event.target.closest("[data-rests]");
  if (claim === null) return;
  const scope = claim.closest("[data-scope]");
  if (scope === null) return;
  for (const label of claim.dataset.rests.split(" ")) {
    for (const box of scope.querySelectorAll(`[data-b="${label}"]`)) {
      box.classList.toggle("hot", on);
    }
  }
}
for (const [kind, on] of [["pointerover", true], ["pointerout", false], ["focusin", true],
  ["focusout", false]]) {
  document.addEventListener(kind, event => mark(event, on));
}
"""
"""Pointing at a claim lights up the boxes it rests on."""

LEGEND: Final = (
    '<p class="note"><span class="claim supported">supported</span><sup class="supported">✓</sup> '
    '&ensp;<span class="claim contradicted">contradicted</span><sup class="contradicted">✗</sup> '
    '&ensp;<span class="claim unknown">unknown: the annotations do not say</span>'
    '<sup class="unknown">?</sup> &ensp;Boxes: solid as shown to the teacher, dashed for crowds, '
    "dotted for those it was told of as a number; thick ones decided. "
    "Point at a claim to see its boxes.</p>"
)


@dataclass(frozen=True)
class Extent:
    """How much of a sample is shown.

    Attributes:
        characters: Of one text; None: all.
        turns: At most so many; None: all.
        every: All checks are numbered and listed; else those that decided.
        longest: Side of the image, pixels.
        quality: Of its JPEG.
        letter: Height of the letters on an image that is `longest` wide, pixels.
    """

    characters: int | None = None
    turns: int | None = None
    every: bool = True
    longest: int = 900
    quality: int = 85
    letter: float = 15


FINDINGS: Final = 4
"""Of a sample that is shown in brief."""
LONGEST_CLAIM: Final = 200
"""Characters, in brief."""

WHOLE: Final = Extent()
BRIEF: Final = Extent(characters=500, turns=3, every=False, longest=360, quality=72, letter=16)


def figure(
    image_dir: Path, image: AnnotatedImage, shown: Shown, sample: Sample | None, to: Extent
) -> str:
    """The image under the boxes that were shown; where it cannot be opened, why."""
    drawn = drawing.marks(image, shown, deciding(sample) if sample else ())
    opened = drawing.open_image(image_dir, image)
    text = f"image {image.id} with {len(drawn)} boxes"
    if isinstance(opened, str):
        gone = f'<p class="gone">{escaped(opened)}</p>'
        size = (to.longest, max(1, round(to.longest * image.height / image.width)))
        return gone + _blank(size, drawn, to)
    data, size = drawing.jpeg(opened, to.longest, to.quality)
    over = _over(drawn, size, to)
    return f'<div class="pic">{embedded(data, "", text, "jpeg")}{over}</div>'


def _over(drawn: Sequence[drawing.Mark], size: tuple[int, int], to: Extent) -> str:
    """The boxes; pages show wide and high images in one width, so letters go by the width."""
    letter = round(to.letter * size[0] / to.longest, 1)
    return drawing.svg(drawn, size, letter=letter, all_=to.every)


def _blank(size: tuple[int, int], drawn: Sequence[drawing.Mark], to: Extent) -> str:
    over = _over(drawn, size, to)
    blank = f'<div class="blank" style="aspect-ratio:{size[0]}/{size[1]}"></div>'
    return f'<div class="pic">{blank}{over}</div>'


def turns(sample: Sample, names: Mapping[int, str], to: Extent) -> str:
    """The turns with their claims marked; the raw answer where it could not be read."""
    if not sample.turns:
        raw = sample.raw or ""
        return f'<pre class="raw">{_cut(raw, {}, sample.checks, names, to)}</pre>'
    chosen = _chosen_turns(sample, to)
    parts = [_turn(sample, index, names, to) for index in chosen]
    if left := len(sample.turns) - len(chosen):
        parts.append(f'<p class="cut">{left:,} more turn{"" if left == 1 else "s"}</p>')
    return "".join(parts)


def _chosen_turns(sample: Sample, to: Extent) -> list[int]:
    """Those that decided, and then the first ones."""
    everything = list(range(len(sample.turns)))
    if to.turns is None or len(everything) <= to.turns:
        return everything
    decided = {check.turn for check in deciding(sample) if check.code is not None}
    order = sorted(everything, key=lambda index: (index not in decided, index))
    return sorted(order[: to.turns])


def _turn(sample: Sample, index: int, names: Mapping[int, str], to: Extent) -> str:
    turn: Turn = sample.turns[index]
    question, answer = (
        _cut(text, spans_of(sample.checks, index, part), sample.checks, names, to)
        for part, text in (("question", turn.question), ("answer", turn.answer))
    )
    return (
        f'<div class="turn"><p class="q"><b>Q</b>{question}</p><p class="a"><b>A</b>{answer}</p>'
        "</div>"
    )


def _cut(
    text: str,
    spans: Mapping[int, tuple[int, int]],
    checks: Sequence[Check],
    names: Mapping[int, str],
    to: Extent,
) -> str:
    """The text with its claims, around the first that decided where it is too long."""
    start, end = 0, len(text)
    if to.characters is not None and end > to.characters:
        decided = [span[0] for i, span in spans.items() if checks[i].code is not None]
        start = max(0, min(min(decided, default=0) - to.characters // 3, end - to.characters))
        end = start + to.characters
    moved = {i: (a - start, b - start) for i, (a, b) in spans.items()}
    return (
        _left_out(start, "before")
        + "".join(
            _piece(piece.text, piece.covering, piece.closing, checks, names, to)
            for piece in pieces(text[start:end], moved)
        )
        + _left_out(len(text) - end, "after")
    )


def _left_out(count: int, where: str) -> str:
    return f'<span class="cut"> … {count:,} characters {where} … </span>' if count else ""


def _piece(
    text: str,
    covering: Sequence[int],
    closing: Sequence[int],
    checks: Sequence[Check],
    names: Mapping[int, str],
    to: Extent,
) -> str:
    if not covering:
        return escaped(text)
    verdict = verdict_of([checks[i] for i in covering])
    rests = " ".join(dict.fromkeys(word for i in covering for word in _rests(checks[i], names)))
    ends = "".join(
        f'<sup class="{checks[i].verdict}">{SYMBOLS[checks[i].verdict]}'
        f"{i + 1 if to.every else ''}</sup>"
        for i in closing
        if to.every or checks[i].verdict != "supported"
    )
    return f'<span class="claim {verdict}" data-rests="{rests}">{escaped(text)}</span>{ends}'


def _rests(check: Check, names: Mapping[int, str]) -> list[str]:
    """Labels of the boxes and captions a check rests on, without categories."""
    found = (names.get(number, "").split(" ")[0] for number in check.evidence)
    return [label for label in found if label[:1] in "bc" and label[1:].isdigit()]


def findings(sample: Sample, names: Mapping[int, str], to: Extent) -> str:
    """The list of what was found: all checks, or those that rejected the sample."""
    if to.every:
        items = [_check(check, number, names) for number, check in enumerate(sample.checks, 1)]
    else:
        coded = (check for check in sample.checks if check.code is not None)
        items = list(dict.fromkeys(_check(check, None, names) for check in coded))
        items[FINDINGS:] = [f"<li>{n:,} more</li>"] if (n := len(items) - FINDINGS) > 0 else []
    return f'<ol class="found">{"".join(items)}</ol>' if items else ""


def _check(check: Check, number: int | None, names: Mapping[int, str]) -> str:
    code = f" <code>{escaped(check.code)}</code>" if check.code else ""
    rests = evidence(check, names)
    rests = f' <span class="rests">— rests on {escaped(rests)}</span>' if rests else ""
    is_long = number is None and len(check.claim) > LONGEST_CLAIM
    claim = check.claim[:LONGEST_CLAIM] + " …" if is_long else check.claim
    claim = f" “{escaped(claim)}”" if claim else ""
    verdict: str = "set aside" if check.rule == "clean" and check.code else check.verdict
    said = f"{number} {verdict}" if number else verdict if check.rule == "clean" else ""
    return (
        f'<li class="{check.verdict}" data-rests="{" ".join(_rests(check, names))}">'
        f'<span class="sy">{SYMBOLS[check.verdict]}{said}</span>'
        f"{code}{claim}{rests}</li>"
    )


def card(
    image_dir: Path, image: AnnotatedImage | None, sample: Sample, badges: Sequence[str], to: Extent
) -> str:
    """A sample with all of this, in a card of a grid.

    Args:
        image_dir: The folder of the images.
        image: Of the sample; None where the index has none of this id.
        sample: With its checks.
        badges: Finished HTML behind its id.
        to: How much of it.
    """
    names = labels(image, sample.shown)
    drawn = (
        figure(image_dir, image, sample.shown, sample, to)
        if image
        else f'<p class="gone">image {sample.image.id} is not in the index</p>'
    )
    return (
        f'<article class="card sample" data-scope>{drawn}'
        f'<h4><span class="id">{escaped(sample.id)}</span> {" ".join(badges)}</h4>'
        f"{turns(sample, names, to)}{findings(sample, names, to)}</article>"
    )


def badge(text: str, verdict: str = "") -> str:
    """A word in a rounded frame."""
    return f'<span class="badge {verdict}">{escaped(text)}</span>'


def escaped(text: str) -> str:
    """Foreign text for a page: nothing in it is markup, commands, or reorders a line."""
    return escape(escape_control(text))
