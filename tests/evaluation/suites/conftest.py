"""A small suite on tiny images."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "gray": (90, 90, 90)}


@pytest.fixture
def suite_tree(tmp_path: Path) -> dict[str, Any]:
    """Write images and question files; return the suite as plain values."""
    images = tmp_path / "images"
    images.mkdir()
    pope: list[dict[str, Any]] = []
    counts: list[dict[str, Any]] = []
    choices: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    listed = []
    for number, (name, color) in enumerate(COLORS.items(), 1):
        Image.new("RGB", (40, 32), color).save(images / f"{name}.png")
        listed.append({"id": number, "file_name": f"{name}.png"})
        for asked in ("red", "green", "blue"):
            pope.append(
                {
                    "question_id": len(pope), "image": f"{name}.png", "text": f"Is it {asked}?",
                    "label": "yes" if asked == name else "no", "category": asked,
                }
            )  # fmt: skip
        counts.append({"id": name, "image": f"{name}.png", "question": "How many?", "answer": 1})
        choices.append(
            {
                "id": name, "image": f"{name}.png", "question": "Which color?",
                "choices": list(COLORS), "answer": name,
            }
        )  # fmt: skip
        captions += [
            {"id": 10 * number + n, "image_id": number, "caption": text}
            for n, text in enumerate((f"a {name} wall", f"everything is {name}"))
        ]
    write = {
        "pope.jsonl": "".join(json.dumps(row) + "\n" for row in pope),
        "counts.json": json.dumps(counts),
        "choices.json": json.dumps(choices),
        "captions.json": json.dumps({"images": listed, "annotations": captions}),
    }
    for name, text in write.items():
        (tmp_path / name).write_text(text)

    def task(name: str, kind: str, file: str, **more: Any) -> dict[str, Any]:
        files = [str(tmp_path / file)]
        shared = {"files": files, "images": str(images), "max_tokens": 4}
        return {"name": name, "kind": kind, **shared, **more}

    three = ["right", "blank", "shuffled"]
    return {
        "tasks": [
            task("exists", "pope", "pope.jsonl", suffix="One word.", conditions=three),
            task("counting", "counting", "counts.json", conditions=["right", "blurred", "cropped"]),
            task("color", "multiple_choice", "choices.json", choices="shuffled"),
            task("captions", "caption", "captions.json", prompt="Describe it.", conditions=three),
        ]
    }


@pytest.fixture
def suite_file(suite_tree: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(suite_tree))
    return path
