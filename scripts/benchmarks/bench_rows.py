"""Rows and images for the benchmarks, generated with the shape of LLaVA-1.5's 665K mixture.

The share of each component, its number of questions, the lengths of its questions and answers, and
the number of records per image follow what is published about the mixture. Lengths within a
component are drawn at random, so the figures describe this shape and not LLaVA's own text.
"""

import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

IMAGE_SIZE = (640, 480)
MAX_IMAGE_WORDS, MAX_TEXT_WORDS = 950, 1400
"""Longest conversations in words: none passes 2,048 tokens, its image's 576 included."""

LONG_ANSWER = 85
"""Words of each of ten answers that, with their questions and an image, come near 2,048 tokens."""


@dataclass(frozen=True)
class Component:
    """One data set of the mixture.

    Attributes:
        thousands: Its records in LLaVA-1.5's table (paper, appendix A), in thousands.
        exchanges: Least and most questions a record, drawn evenly.
        question, answer: Least and most words.
        images: The pool it draws from: `coco` is shared by several components (3.08 records an
            image), `own` has one record an image, None is text alone.
    """

    thousands: int
    exchanges: tuple[int, int]
    question: tuple[int, int]
    answer: tuple[int, int]
    images: str | None


MIXTURE = (
    Component(58, (2, 5), (8, 14), (15, 60), "coco"),  # LLaVA conversation
    Component(23, (1, 1), (8, 16), (80, 140), "coco"),  # LLaVA detailed description
    Component(77, (1, 1), (12, 24), (100, 190), "coco"),  # LLaVA complex reasoning
    Component(40, (1, 8), (10, 70), (90, 320), None),  # ShareGPT
    Component(83, (3, 8), (6, 12), (1, 2), "coco"),  # VQAv2
    Component(72, (6, 19), (8, 14), (1, 2), "own"),  # GQA
    Component(9, (1, 1), (12, 20), (1, 2), "coco"),  # OKVQA
    Component(80, (3, 6), (8, 14), (1, 8), "own"),  # OCR-VQA
    Component(66, (1, 1), (30, 50), (1, 2), "coco"),  # A-OKVQA
    Component(22, (1, 1), (20, 60), (8, 14), "own"),  # TextCaps
    Component(48, (3, 10), (10, 18), (6, 12), "coco"),  # RefCOCO
    Component(86, (5, 20), (8, 16), (4, 12), "own"),  # Visual Genome
)
COCO_RECORDS_PER_IMAGE = 364_100 / 118_287
"""Of the mixture's records with a COCO image; all others have an image of their own."""

Row = dict[str, Any]


def make_rows(count: int, *, seed: int) -> list[Row]:
    """`count` records in LLaVA's form, in a drawn order; `image` is `images/NUMBER.jpg`.

    The components' shares hold for any count, and so do the records an image has.
    """
    draw = random.Random(seed)
    words = _words()
    components = _spread(count)
    numbers = _image_numbers(components, draw)
    rows = [
        _row(place, component, number, words, draw)
        for place, (component, number) in enumerate(zip(components, numbers, strict=True))
    ]
    draw.shuffle(rows)
    return rows


def make_captions(count: int, *, seed: int) -> list[Row]:
    """Rows of stage 1: one image each and a caption of about 22 tokens."""
    draw, words = random.Random(seed), _words()
    caption = Component(1, (1, 1), (3, 8), (10, 24), "own")
    return [_row(place, caption, place, words, draw) for place in range(count)]


def make_long_rows(count: int, *, seed: int) -> list[Row]:
    """Rows with one image and about 2,000 tokens, to see how much memory those take."""
    draw, words = random.Random(seed), _words()
    long = Component(1, (10, 10), (20, 20), (LONG_ANSWER, LONG_ANSWER), "own")
    return [_row(place, long, place, words, draw, limit=10**6) for place in range(count)]


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file that `write_rows` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_images(rows: Sequence[Row], folder: Path, *, distinct: int | None = None) -> None:
    """Write a JPEG of 640x480 and about 100 KB for every image of the rows.

    Args:
        rows: Their `image` is a path inside `folder`.
        folder: Folder of the images.
        distinct: Number of different images, which are repeated; None for all different.
    """
    names = sorted({row["image"] for row in rows if "image" in row})
    drawn: list[bytes] = []
    for place, name in enumerate(names):
        if distinct is None or place < distinct:
            drawn.append(image_bytes(place))
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawn[place % len(drawn)])


def image_bytes(seed: int) -> bytes:
    """A JPEG with broad shapes and fine grain, as compressible as a photograph."""
    noise = np.random.default_rng(seed)
    width, height = IMAGE_SIZE
    image = np.zeros((height, width, 3))
    for cells, strength in ((4, 90), (16, 45), (64, 22), (160, 14)):
        coarse = noise.normal(128, strength, (cells * 3 // 4, cells, 3)).clip(0, 255)
        grown = Image.fromarray(coarse.astype(np.uint8)).resize(
            IMAGE_SIZE, Image.Resampling.BICUBIC
        )
        image += np.asarray(grown, dtype=np.float64) - 128
    image += noise.normal(128, 6, image.shape)
    buffer = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _spread(count: int) -> list[Component]:
    """`count` components, each as often as its share says, the rounding spread over all."""
    total = sum(component.thousands for component in MIXTURE)
    chosen, reached = [], 0.0
    bounds = []
    for component in MIXTURE:
        reached += component.thousands / total
        bounds.append(reached)
    for place in range(count):
        point = (place + 0.5) / count
        index = next(i for i, bound in enumerate(bounds) if point < bound or i == len(bounds) - 1)
        chosen.append(MIXTURE[index])
    return chosen


def _image_numbers(components: Sequence[Component], draw: random.Random) -> list[int | None]:
    coco = [place for place, one in enumerate(components) if one.images == "coco"]
    draw.shuffle(coco)
    pool = max(1, round(len(coco) / COCO_RECORDS_PER_IMAGE))
    numbers: list[int | None] = [None] * len(components)
    for order, place in enumerate(coco):
        numbers[place] = order % pool
    following = pool
    for place, one in enumerate(components):
        if one.images == "own":
            numbers[place] = following
            following += 1
    return numbers


def _row(
    place: int,
    component: Component,
    number: int | None,
    words: Sequence[str],
    draw: random.Random,
    *,
    limit: int | None = None,
) -> Row:
    def text(length: tuple[int, int]) -> str:
        size = draw.randint(*length)
        start = draw.randrange(len(words) - size)
        return " ".join(words[start : start + size])

    conversations: list[dict[str, str]] = []
    left = limit or (MAX_TEXT_WORDS if number is None else MAX_IMAGE_WORDS)
    for _ in range(draw.randint(*component.exchanges)):
        asked, answered = text(component.question), text(component.answer)
        left -= len(asked.split()) + len(answered.split())
        if conversations and left < 0:
            break
        if not conversations and number is not None:
            asked = f"<image>\n{asked}"
        conversations.append({"from": "human", "value": asked})
        conversations.append({"from": "gpt", "value": answered})
    row: Row = {"id": f"record-{place}", "conversations": conversations}
    if number is not None:
        row["image"] = f"images/{number}.jpg"
    return row


def _words() -> list[str]:
    """English words: those of this repository's license, letters alone."""
    text = Path(__file__).parent.parent.parent.joinpath("LICENSE").read_text(encoding="utf-8")
    return [word for word in text.lower().split() if word.isalpha()]
