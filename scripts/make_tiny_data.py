"""Draw the images of configs/tiny/data and write the records about them.

    python scripts/make_tiny_data.py [OUT_DIR]
    python scripts/make_tiny_data.py configs/tiny-anyres/data --aspect-ratios

With --aspect-ratios the images are square, wide, tall and small, and some records have two of them.
The files are committed; this makes the same ones again.
"""

import argparse
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (208, 40, 40),
    "green": (40, 150, 60),
    "blue": (50, 80, 200),
    "yellow": (235, 200, 50),
}
SHAPES = ("circle", "square", "triangle")
SQUARES = ((48, 48), (48, 48), (48, 48))
"""Width and height of the images of each color and shape; the last one is held out."""
ASPECT_RATIOS = ((48, 48), (132, 44), (40, 100), (28, 36), (96, 60))
"""The same, for configurations that divide images into crops."""


def main(out_dir: Path, sizes: Sequence[tuple[int, int]] = SQUARES) -> None:
    """Write `images/*.png`, `captions.json`, `instructions.json` and their held-out twins."""
    records: dict[str, list[dict[str, object]]] = {
        name: [] for name in ("captions", "captions_eval", "instructions", "instructions_eval")
    }
    (out_dir / "images").mkdir(parents=True, exist_ok=True)
    kinds = list(itertools.product(COLOURS, SHAPES))
    for (color, shape), (look, size) in itertools.product(kinds, enumerate(sizes)):
        name = f"{color}-{shape}-{look}"
        image = draw_shape(color, shape, random.Random(name), size)
        image.save(out_dir / "images" / f"{name}.png")
        suffix = "_eval" if look == len(sizes) - 1 else ""
        records["captions" + suffix].append(caption(name, color, shape))
        records["instructions" + suffix].append(instruction(name, color, shape))
    if sizes != SQUARES:
        for number, ((one, shape), (other, _)) in enumerate(itertools.pairwise(kinds)):
            names = [f"{one}-{shape}-{number % 4}", f"{other}-circle-{(number + 1) % 4}"]
            records["instructions"].append(two_images(names, one, other))
    for file, rows in records.items():
        text = json.dumps(rows, indent=1) + "\n"
        (out_dir / f"{file}.json").write_text(text, encoding="utf-8")


def draw_shape(color: str, shape: str, rng: random.Random, sides: tuple[int, int]) -> Image.Image:
    """A shape of about half the shorter side, at a place of its own, on a light ground."""
    ground = tuple(rng.randint(215, 245) for _ in range(3))
    image = Image.new("RGB", sides, ground)
    shorter = min(sides)
    size = rng.randint(20 * shorter // 48, 28 * shorter // 48)
    left, top = (rng.randint(2, side - size - 2) for side in sides)
    box = (left, top, left + size, top + size)
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse(box, fill=COLOURS[color])
    elif shape == "square":
        draw.rectangle(box, fill=COLOURS[color])
    else:
        corners = [(left + size // 2, top), (left, top + size), (left + size, top + size)]
        draw.polygon(corners, fill=COLOURS[color])
    return image


def caption(name: str, color: str, shape: str) -> dict[str, object]:
    """A stage-1 pair: a request that the plain template drops, and a caption."""
    return record(name, [("<image>\nWhat is this?", f"a {color} {shape}")])


def instruction(name: str, color: str, shape: str) -> dict[str, object]:
    """A stage-2 conversation of two turns."""
    return record(
        name,
        [("<image>\nWhich color?", color), ("Which shape?", shape)],
    )


def two_images(names: Sequence[str], one: str, other: str) -> dict[str, object]:
    """A stage-2 record about two images."""
    question = "<image>\n<image>\nWhich colors?"
    made = record("+".join(names), [(question, f"{one} and {other}")])
    return {**made, "image": [f"images/{name}.png" for name in names]}


def record(name: str, exchanges: list[tuple[str, str]]) -> dict[str, object]:
    """A record of the LLaVA form."""
    turns = []
    for question, answer in exchanges:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": f"images/{name}.png", "conversations": turns}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parent.parent / "configs" / "tiny" / "data"
    parser.add_argument("folder", type=Path, nargs="?", default=default, help="output directory")
    parser.add_argument("--aspect-ratios", action="store_true", help="images of several shapes")
    arguments = parser.parse_args()
    main(arguments.folder, ASPECT_RATIOS if arguments.aspect_ratios else SQUARES)
