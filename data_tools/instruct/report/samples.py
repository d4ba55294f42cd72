"""Prepare one sample for a page: the image with its boxes, the text with its claims, the checks."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from data_tools.coco import AnnotatedImage
from data_tools.instruct.report.draw import (
    SYMBOLS,
    BoxLabel,
    DrawnBox,
    drawn_boxes,
    place_labels,
    worst_verdict,
)
from data_tools.instruct.schema import Check, Sample, Shown
from vlm_sft.errors import ImageError
from vlm_sft.utils.html import data_uri

if TYPE_CHECKING:
    from PIL import Image

    from vlm_sft.data.conversation import ImageSource

BRIEF_TEXT: Final = 500
"""Characters of one text in brief."""
BRIEF_TURNS: Final = 3
BRIEF_CHECKS: Final = 4
BRIEF_CLAIM: Final = 200
"""Characters of one claim in brief."""


def annotation_labels(image: AnnotatedImage | None, shown: Shown) -> dict[int, str]:
    """Return the label of each annotation id in the prompt: `c2`, `b1 dog`, `#7 cup (counted)`."""
    category = {box.id: box.category for box in image.boxes} if image else {}
    labels = {number: f"c{i}" for i, number in enumerate(shown.captions, 1)}
    for i, number in enumerate(shown.boxes, 1):
        labels[number] = f"b{i} {category.get(number, '')}".rstrip()
    for name, numbers in shown.summarised.items():
        labels.update({number: f"#{number} {name} (counted)" for number in numbers})
    return labels


def cited_labels(check: Check, labels: Mapping[int, str]) -> str:
    """Return the check's evidence, such as `c2, b1 b3 dog`; other ids as `#id`."""
    groups: dict[str, list[str]] = {}
    for number in check.evidence:
        label, _, category = labels.get(number, f"#{number}").partition(" ")
        groups.setdefault(category, []).append(label)
    return ", ".join(" ".join([*found, category]).rstrip() for category, found in groups.items())


def deciding_checks(sample: Sample) -> tuple[Check, ...]:
    """Return the checks that rejected a sample; all checks of an accepted one."""
    if sample.status == "accepted":
        return sample.checks
    return tuple(check for check in sample.checks if check.code is not None)


@dataclass(frozen=True)
class Piece:
    """A part of a text that is covered by the same claims.

    Attributes:
        claims: Indices of the claims that cover it.
        opening, closing: Those of them that begin and end with it.
    """

    text: str
    claims: tuple[int, ...] = ()
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()


def split_at_claims(text: str, spans: Mapping[int, tuple[int, int]]) -> list[Piece]:
    """Split `text` wherever a claim begins or ends.

    Args:
        text: The text.
        spans: Start and end of each claim by its index; parts outside the text are ignored.
    """
    inside = {
        index: (max(start, 0), min(end, len(text)))
        for index, (start, end) in spans.items()
        if max(start, 0) < min(end, len(text))
    }
    cuts = sorted({0, len(text), *(place for span in inside.values() for place in span)})
    return [
        Piece(
            text[start:end],
            tuple(i for i, (a, b) in inside.items() if a <= start and end <= b),
            tuple(i for i, (a, _) in inside.items() if a == start),
            tuple(i for i, (_, b) in inside.items() if b == end),
        )
        for start, end in pairwise(cuts)
    ]


def claim_spans(checks: Sequence[Check], turn: int, part: str) -> dict[int, tuple[int, int]]:
    """Return the spans of the claims in one text of one turn, by their index in `checks`."""
    return {
        index: check.span
        for index, check in enumerate(checks)
        if check.turn == turn and check.part == part and check.span is not None
    }


@dataclass(frozen=True)
class ImageView:
    """An image with its boxes.

    Attributes:
        uri: The embedded JPEG; "" if the image cannot be opened.
        error: Why it cannot be opened.
        letter: Height of the labels' letters in pixels.
    """

    uri: str
    error: str
    width: int
    height: int
    boxes: Sequence[DrawnBox]
    labels: Sequence[BoxLabel]
    letter: float


@dataclass(frozen=True)
class SampleView:
    """A sample for the macros of `sample.html`.

    Attributes:
        turns: Question and answer of the shown turns, each as a mapping of the text's pieces and
            the characters cut off before and after.
        raw: The answer's text in the same form if it could not be parsed.
        num_turns_hidden: Turns that are not shown.
        checks: The listed checks.
        num_checks_hidden: Checks that are not listed.
    """

    sample: Sample
    image: ImageView | None
    badges: Sequence[tuple[str, str]]
    turns: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
    raw: Mapping[str, Any]
    num_turns_hidden: int
    checks: Sequence[Mapping[str, Any]]
    num_checks_hidden: int


def view_sample(
    sample: Sample,
    image: AnnotatedImage | None,
    image_dir: Path,
    *,
    badges: Sequence[tuple[str, str]] = (),
    brief: bool,
    with_image: bool = True,
) -> SampleView:
    """Prepare a sample.

    Args:
        sample: The sample with its checks.
        image: Its image; None if it is not in the index.
        image_dir: Directory of the images.
        badges: Text and CSS class of the words next to the id.
        brief: Cut long texts around what decided, and list only the checks that decided.
        with_image: Whether to open the image.
    """
    labels = annotation_labels(image, sample.shown)
    turns = _chosen_turns(sample) if brief else list(range(len(sample.turns)))
    checks = list(enumerate(sample.checks, 1))
    views = [_view_check(check, 0 if brief else number, labels) for number, check in checks]
    if brief:
        views = [view for view, (_, check) in zip(views, checks, strict=True) if check.code]
        views = [view for i, view in enumerate(views) if view not in views[:i]]
    most = BRIEF_CHECKS if brief else len(views)
    return SampleView(
        sample=sample,
        image=view_image(image, sample.shown, deciding_checks(sample), image_dir, brief=brief)
        if image and with_image
        else None,
        badges=badges,
        turns=[
            (
                _view_text(turn.question, sample, i, "question", labels, brief),
                _view_text(turn.answer, sample, i, "answer", labels, brief),
            )
            for i in turns
            for turn in [sample.turns[i]]
        ],
        raw=_view_text(sample.raw or "", sample, -1, "answer", labels, brief),
        num_turns_hidden=len(sample.turns) - len(turns),
        checks=views[:most],
        num_checks_hidden=max(0, len(views) - most),
    )


def view_image(
    image: AnnotatedImage,
    shown: Shown,
    checks: Sequence[Check],
    image_dir: Path,
    *,
    brief: bool,
    source: "ImageSource | None" = None,
) -> ImageView:
    """Prepare the image with the boxes that the teacher saw; `checks` emphasize their evidence.

    `source` is opened in place of the image's file in `image_dir`.
    """
    side, quality, letter = (360, 72, 16) if brief else (900, 85, 15)
    uri, error = "", ""
    size = (side, max(1, round(side * image.height / image.width)))
    try:
        small = open_image(image_dir, image, source).convert("RGB")
        small.thumbnail((side, side))
        size, buffer = small.size, io.BytesIO()
        small.save(buffer, format="JPEG", quality=quality, optimize=True)
        uri = data_uri(buffer.getvalue(), "jpeg")
    except ImageError as failure:
        error = str(failure)
    boxes = drawn_boxes(image, shown, checks)
    height = round(letter * size[0] / side, 1)  # pages show images of any shape in one width
    labels = place_labels(boxes, size, height, brief=brief)
    return ImageView(uri, error, *size, boxes, labels, height)


def open_image(
    image_dir: Path, image: AnnotatedImage, source: "ImageSource | None" = None
) -> "Image.Image":
    """Open an image, or `source` in its place, as training does.

    Raises:
        ImageError: It cannot be opened.
    """
    from vlm_sft.data import images

    return images.open_image(image_dir / image.file_name if source is None else source)


def _chosen_turns(sample: Sample) -> list[int]:
    """Return the turns to show in brief: those that decided, then the first ones."""
    decided = {check.turn for check in deciding_checks(sample) if check.code is not None}
    order = sorted(range(len(sample.turns)), key=lambda index: (index not in decided, index))
    return sorted(order[:BRIEF_TURNS])


def _view_text(
    text: str, sample: Sample, turn: int, part: str, labels: Mapping[int, str], brief: bool
) -> Mapping[str, Any]:
    checks = sample.checks
    spans = claim_spans(checks, turn, part)
    start, end = 0, len(text)
    if brief and end > BRIEF_TEXT:
        decided = [span[0] for i, span in spans.items() if checks[i].code is not None]
        start = max(0, min(min(decided, default=0) - BRIEF_TEXT // 3, end - BRIEF_TEXT))
        end = start + BRIEF_TEXT
    moved = {i: (a - start, b - start) for i, (a, b) in spans.items()}
    pieces = [
        {
            "text": piece.text,
            "verdict": worst_verdict([checks[i] for i in piece.claims]),
            "labels": " ".join(
                dict.fromkeys(
                    label for i in piece.claims for label in _box_labels(checks[i], labels)
                )
            ),
            "ends": [
                (checks[i].verdict, SYMBOLS[checks[i].verdict], "" if brief else i + 1)
                for i in piece.closing
                if not brief or checks[i].verdict != "supported"
            ],
        }
        for piece in split_at_claims(text[start:end], moved)
    ]
    return {"pieces": pieces, "before": start, "after": len(text) - end}


def _box_labels(check: Check, labels: Mapping[int, str]) -> list[str]:
    """Return the labels of the boxes and captions that a check cites, without categories."""
    found = (labels.get(number, "").split(" ")[0] for number in check.evidence)
    return [label for label in found if label[:1] in "bc" and label[1:].isdigit()]


def _view_check(check: Check, number: int, labels: Mapping[int, str]) -> Mapping[str, Any]:
    """Return a line of the list of checks; `number` is 0 in brief."""
    is_long = number == 0 and len(check.claim) > BRIEF_CLAIM
    is_cleaning = check.rule == "clean" and check.code
    verdict = "dropped" if is_cleaning else check.verdict
    return {
        "verdict": check.verdict,
        "symbol": SYMBOLS[check.verdict],
        "words": f"{number} {verdict}" if number else verdict if is_cleaning else "",
        "code": check.code,
        "claim": check.claim[:BRIEF_CLAIM] + " …" if is_long else check.claim,
        "cited": cited_labels(check, labels),
        "labels": " ".join(_box_labels(check, labels)),
    }
