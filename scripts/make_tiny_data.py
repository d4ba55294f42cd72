"""Draw the images of configs/tiny/data and write the records about them.

    python scripts/make_tiny_data.py [OUT_DIR]

The files are committed; this makes the same ones again.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (208, 40, 40),
    "green": (40, 150, 60),
    "blue": (50, 80, 200),
    "yellow": (235, 200, 50),
}
SHAPES = ("circle", "square", "triangle")
SIDE = 48
LOOKS = 3
"""Images of each color and shape; the last one is held out."""


def main(out_dir: Path) -> None:
    """Write `images/*.png`, `captions.json`, `instructions.json` and their held-out twins."""
    records: dict[str, list[dict[str, object]]] = {
        name: [] for name in ("captions", "captions_eval", "instructions", "instructions_eval")
    }
    (out_dir / "images").mkdir(parents=True, exist_ok=True)
    for (color, shape), look in itertools.product(itertools.product(COLOURS, SHAPES), range(LOOKS)):
        name = f"{color}-{shape}-{look}"
        draw_shape(color, shape, random.Random(name)).save(out_dir / "images" / f"{name}.png")
        suffix = "_eval" if look == LOOKS - 1 else ""
        records["captions" + suffix].append(caption(name, color, shape))
        records["instructions" + suffix].append(instruction(name, color, shape))
    for file, rows in records.items():
        text = json.dumps(rows, indent=1) + "\n"
        (out_dir / f"{file}.json").write_text(text, encoding="utf-8")


def draw_shape(color: str, shape: str, rng: random.Random) -> Image.Image:
    """A shape of about half the side, at a place of its own, on a light ground."""
    ground = tuple(rng.randint(215, 245) for _ in range(3))
    image = Image.new("RGB", (SIDE, SIDE), ground)
    size = rng.randint(20, 28)
    left, top = rng.randint(2, SIDE - size - 2), rng.randint(2, SIDE - size - 2)
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
    main(parser.parse_args().folder)
