"""Files of the size and shape of COCO's train2017, with made-up content, for measuring `index`.

    python scripts/benchmarks/make_coco_sized.py FOLDER [--images 118287]

Writes instances.json (860,001 annotations with polygons, about 450 MB), captions.json (591,753
captions, about 92 MB) and images/ (gray JPEGs of the right sizes). Counts go with --images.
"""

import argparse
import io
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from PIL import Image

FULL = 118_287
ANNOTATIONS = 860_001
CAPTIONS = 591_753
SIDES = ((640, 480), (480, 640), (640, 427), (427, 640), (500, 375), (640, 426), (612, 612))
LINKS = 30_000
"""Names of one file; file systems allow no more than some ten thousand."""
WORDS = ("a man", "a dog", "on", "in", "with", "near", "the street", "two people", "a table", "and")


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=FULL)
    arguments = parser.parse_args()
    folder, count = arguments.folder, arguments.images
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    ids = sorted(rng.sample(range(1, 600_000), count))
    images = [_image(image_id, rng) for image_id in ids]
    boxes = _annotations(images, ANNOTATIONS * count // FULL, rng)
    sentences = _captions(images, CAPTIONS * count // FULL, rng)
    _write(folder / "instances.json", images, boxes, _categories())
    _write(folder / "captions.json", images, sentences, None)
    _write_images(folder / "images", images)


def _image(image_id: int, rng: random.Random) -> dict[str, Any]:
    width, height = rng.choice(SIDES)
    name = f"{image_id:012d}.jpg"
    return {
        "license": rng.randint(1, 8),
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/train2017/{name}",
        "height": height,
        "width": width,
        "date_captured": "2013-11-14 11:18:45",
        "flickr_url": f"http://farm9.staticflickr.com/8186/{image_id:010d}_9e8bd6e3f4_z.jpg",
        "id": image_id,
    }


def _annotations(
    images: list[dict[str, Any]], count: int, rng: random.Random
) -> Iterator[dict[str, Any]]:
    for number in range(count):
        image = rng.choice(images)
        width = round(rng.uniform(4, image["width"] - 1), 2)
        height = round(rng.uniform(4, image["height"] - 1), 2)
        left = round(rng.uniform(0, image["width"] - width), 2)
        top = round(rng.uniform(0, image["height"] - height), 2)
        crowd = number % 85 == 0
        points = rng.choice((20, 30, 40, 70, 120))
        polygon = [round(left + width * rng.random(), 2) for _ in range(points)]
        rle = {"counts": [rng.randint(1, 400) for _ in range(300)], "size": [480, 640]}
        yield {
            "segmentation": rle if crowd else [polygon],
            "area": round(width * height / 2, 4),
            "iscrowd": int(crowd),
            "image_id": image["id"],
            "bbox": [left, top, width, 0 if number in (5, 500_000) else height],
            "category_id": rng.randint(1, 80),
            "id": number + 1,
        }


def _captions(
    images: list[dict[str, Any]], count: int, rng: random.Random
) -> Iterator[dict[str, Any]]:
    for number in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randint(7, 13))).capitalize() + "."
        image = images[number % len(images)]
        yield {"image_id": image["id"], "id": number + 1, "caption": text}


def _categories() -> list[dict[str, Any]]:
    return [{"supercategory": "thing", "id": i, "name": f"thing {i}"} for i in range(1, 81)]


def _write(path: Path, images: list[Any], annotations: Iterator[Any], categories: Any) -> None:
    licenses = [{"url": "http://example.org/", "id": i, "name": f"No {i}"} for i in range(1, 9)]
    with path.open("w", encoding="utf-8") as file:
        file.write('{"info": {"year": 2017}, "licenses": ' + json.dumps(licenses))
        file.write(', "images": ')
        _write_list(file, iter(images))
        file.write(', "annotations": ')
        _write_list(file, annotations)
        if categories is not None:  # the real files have them last
            file.write(', "categories": ' + json.dumps(categories))
        file.write("}")


def _write_list(file: IO[str], values: Iterator[Any]) -> None:
    file.write("[")
    for number, value in enumerate(values):
        file.write((", " if number else "") + json.dumps(value))
    file.write("]")


def _write_images(folder: Path, images: list[dict[str, Any]]) -> None:
    """One file for some ten thousand images of a size, under all of their names."""
    first: dict[tuple[int, int], tuple[Path, int]] = {}
    for image in images:
        size = image["width"], image["height"]
        path = folder / image["file_name"]
        path.unlink(missing_ok=True)
        source, links = first.get(size, (path, LINKS))
        if links == LINKS:
            data = io.BytesIO()
            Image.new("RGB", size, "gray").save(data, "JPEG")
            path.write_bytes(data.getvalue())
            first[size] = path, 1
        else:
            os.link(source, path)
            first[size] = source, links + 1


if __name__ == "__main__":
    main()
