"""Small COCO files made on the spot."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

CATEGORIES = ("dog", "cat", "car", "bus", "apple", "cup")


def write_coco(
    folder: Path,
    images: dict[int, list[tuple[str, list[float], int]]],
    captions: dict[int, list[str]] | None = None,
) -> dict[str, Path]:
    """Images of 200 x 100 pixels with (category, bbox, iscrowd) each."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    listed = []
    boxes: list[dict[str, Any]] = []
    sentences: list[dict[str, Any]] = []
    for image_id, objects in images.items():
        name = f"{image_id:012d}.jpg"
        Image.new("RGB", (200, 100), "grey").save(folder / "images" / name)
        listed.append({"id": image_id, "file_name": name, "width": 200, "height": 100})
        for category, bbox, crowd in objects:
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORIES.index(category) + 1,
                    "bbox": bbox,
                    "area": bbox[2] * bbox[3],
                    "iscrowd": crowd,
                }
            )
        for text in (captions or {}).get(image_id, ["A picture."]):
            sentences.append({"id": len(sentences) + 1, "image_id": image_id, "caption": text})
    categories = [{"id": i + 1, "name": n, "supercategory": "x"} for i, n in enumerate(CATEGORIES)]
    files = {"instances": folder / "instances.json", "captions": folder / "captions.json"}
    files["instances"].write_text(
        json.dumps({"images": listed, "annotations": boxes, "categories": categories})
    )
    files["captions"].write_text(json.dumps({"images": listed, "annotations": sentences}))
    return files | {"images": folder / "images", "out": folder / "out"}


def arguments(files: dict[str, Path], *extra: str) -> list[str]:
    """The command line for these files."""
    named = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    return [*named, "--seed", "0", *extra]
