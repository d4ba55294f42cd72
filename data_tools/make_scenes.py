"""Compose pictures from emoji art and write them with COCO's own annotations."""

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools import art, masks, scene_captions
from data_tools.backgrounds import KINDS
from data_tools.scenes import COCO_MAX_SIDE, Scene, SceneSettings, compose, scene_rng
from vlm_sft.atomic import write_json, write_text
from vlm_sft.command_line import CommandParser
from vlm_sft.errors import UserError, run_command
from vlm_sft.filesystem import naming
from vlm_sft.progress import track

FORMAT = 1
"""Raised when the same settings would give other pictures."""

MAX_OBJECTS = 4
"""Most categories in a picture, where not told."""

EXAMPLES = """examples:
  python -m data_tools.make_scenes --out scenes/train --artist openmoji --count 2000 --seed 1
  python -m data_tools.make_scenes --out scenes/unseen --artist twemoji --count 300 --seed 2 \\
      --max-side 320
  python -m data_tools.make_scenes --out scenes/pets --artist twemoji --count 50 --seed 3 \\
      --categories dog,cat,bird --min-objects 1 --max-objects 3
"""


def main(argv: Sequence[str]) -> int:
    """Make the scenes `argv` asks for; returns the exit code."""
    arguments = parser().read(argv)
    settings = _settings(arguments)
    out = Path(arguments.out)
    receipt = {"format": FORMAT, "count": arguments.count, **asdict(settings)}
    receipt = json.loads(json.dumps(receipt))
    if _is_done(out, receipt):
        print(f"{out}: done already, {arguments.count} pictures with these settings")
        return 0
    artist = art.ARTISTS[settings.artist]
    art.check_drawings(artist, settings.categories)
    (out / "images").mkdir(parents=True, exist_ok=True)
    write_json(out / "settings.json", {"sha256": _hash(receipt), "complete": False, **receipt})
    instances, captions = _write_pictures(out, settings, arguments.count, arguments.workers)
    head = _head(settings)
    annotations = out / "annotations"
    write_json(annotations / f"instances_{artist.name}.json", head | instances, indent=None)
    write_json(annotations / f"captions_{artist.name}.json", head | captions, indent=None)
    write_text(out / "ATTRIBUTION.md", art.attribution(artist))
    write_json(out / "settings.json", {"sha256": _hash(receipt), "complete": True, **receipt})
    crowds = sum(entry["iscrowd"] for entry in instances["annotations"])
    print(
        f"{out}: {arguments.count} pictures, {len(instances['annotations'])} objects "
        f"({crowds} of them crowds), {len(settings.categories)} categories by {artist.name}, "
        f"{len(captions['annotations'])} captions"
    )
    return 0


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("python -m data_tools.make_scenes", __doc__, EXAMPLES)
    parser.add_argument("--out", required=True, help="folder to write: images/, annotations/")
    parser.add_argument(
        "--artist", required=True, choices=sorted(art.ARTISTS), help="whose drawings"
    )
    parser.add_argument("--count", required=True, type=int, help="number of pictures")
    parser.add_argument("--seed", required=True, type=int, help="0 or more")
    parser.add_argument("--categories", help="names (dog,cat,...) or a JSON file; default: all")
    parser.add_argument("--min-objects", type=int, default=1, help="fewest categories (1)")
    parser.add_argument("--max-objects", type=int, help="most categories (4, or all if fewer)")
    parser.add_argument("--max-instances", type=int, default=3, help="most of a category (3)")
    parser.add_argument(
        "--scale",
        type=float,
        nargs=2,
        default=(0.2, 0.55),
        metavar=("MIN", "MAX"),
        help="objects' longer side as a share of the picture's shorter side (0.2 0.55)",
    )
    parser.add_argument(
        "--max-side",
        type=int,
        default=COCO_MAX_SIDE,
        help="longer side in pixels (640, as COCO)",
    )
    parser.add_argument(
        "--augment", type=float, default=0.5, help="0..1: how much drawings are varied (0.5)"
    )
    parser.add_argument(
        "--crowd-share", type=float, default=0.05, help="0..1: pictures with a crowd (0.05)"
    )
    parser.add_argument(
        "--visible-share",
        type=float,
        default=0.6,
        help="0.1..1: least part of an object that others leave visible (0.6)",
    )
    parser.add_argument("--backgrounds", help=f"of {','.join(sorted(KINDS))}; default: all")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes; no effect on results",
    )
    return parser


def _settings(arguments: argparse.Namespace) -> SceneSettings:
    categories = art.load_categories(arguments.categories)
    max_objects = arguments.max_objects
    if max_objects is None:
        max_objects = min(max(MAX_OBJECTS, arguments.min_objects), len(categories))
    limits = (
        ("--count", arguments.count, 1, 999_999_999_999),
        ("--seed", arguments.seed, 0, 2**63),
        ("--min-objects", arguments.min_objects, 1, len(categories)),
        ("--max-objects", max_objects, arguments.min_objects, len(categories)),
        ("--max-instances", arguments.max_instances, 1, 20),
        ("--scale MIN", arguments.scale[0], 0.05, 0.9),
        ("--scale MAX", arguments.scale[1], arguments.scale[0], 0.9),
        ("--max-side", arguments.max_side, 96, 4096),
        ("--augment", arguments.augment, 0, 1),
        ("--crowd-share", arguments.crowd_share, 0, 1),
        ("--visible-share", arguments.visible_share, 0.1, 1),
        ("--workers", arguments.workers, 1, 1024),
    )
    for name, value, low, high in limits:
        if not low <= value <= high:
            raise UserError(f"{name}: found {value}, expected {low} to {high}")
    return SceneSettings(
        artist=arguments.artist,
        seed=arguments.seed,
        categories=categories,
        min_objects=arguments.min_objects,
        max_objects=max_objects,
        max_instances=arguments.max_instances,
        min_scale=arguments.scale[0],
        max_scale=arguments.scale[1],
        max_side=arguments.max_side,
        augment=arguments.augment,
        crowd_share=arguments.crowd_share,
        visible_share=arguments.visible_share,
        backgrounds=_backgrounds(arguments.backgrounds),
    )


def _backgrounds(text: str | None) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    for name in names:
        if name not in KINDS:
            raise UserError(f"--backgrounds: found {name!r}, expected some of {sorted(KINDS)}")
    return names


def _is_done(out: Path, receipt: dict[str, Any]) -> bool:
    """Whether `out` holds exactly these scenes; refuses a folder of other settings."""
    path = out / "settings.json"
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise UserError(
                f"{out}: the folder is not empty and was not made by this command; "
                "give --out a new folder"
            )
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        same = found["sha256"] == _hash(receipt)
        complete = found["complete"] is True
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged; delete the folder and run again") from error
    if not same:
        changed = [key for key in receipt if found.get(key) != receipt[key]]
        raise UserError(
            f"{out}: holds scenes of other settings ({', '.join(changed) or 'unknown'} differ); "
            "give --out a new folder or delete this one"
        )
    artist, count = receipt["artist"], receipt["count"]
    names = [out / "annotations" / f"{kind}_{artist}.json" for kind in ("instances", "captions")]
    pictures = (out / "images" / _file_name(index) for index in range(1, count + 1))
    return complete and all(name.is_file() for name in (*names, *pictures))


def _hash(receipt: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(receipt, sort_keys=True).encode()).hexdigest()


def _write_pictures(
    out: Path, settings: SceneSettings, count: int, workers: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write every picture; return what `instances` and `captions` say beside the common head."""
    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    tasks = ((str(out / "images"), settings, index) for index in range(1, count + 1))
    description = f"composing {settings.artist} scenes"
    for image, objects, sentences in track(_in_order(tasks, workers), count, description):
        images.append(image)
        for entry in objects:
            instances.append({"id": len(instances) + 1, **entry})
        for sentence in sentences:
            entry = {"id": len(captions) + 1, "image_id": image["id"], "caption": sentence}
            captions.append(entry)
    categories = [
        {"supercategory": category.supercategory, "id": category.id, "name": category.name}
        for category in settings.categories
    ]
    return (
        {"images": images, "annotations": instances, "categories": categories},
        {"images": images, "annotations": captions},
    )


_Task = tuple[str, SceneSettings, int]
_Entry = tuple[dict[str, Any], list[dict[str, Any]], list[str]]


def _in_order(tasks: Iterable[_Task], workers: int) -> Iterator[_Entry]:
    if workers == 1:
        yield from map(_make_one, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _leave_ctrl_c_to_parent) as pool:
        yield from pool.imap(_make_one, tasks, chunksize=8)


def _leave_ctrl_c_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _make_one(task: _Task) -> _Entry:
    """Compose one scene, write its picture, and return its entries for the annotation files."""
    folder, settings, index = task
    scene = compose(settings, index)
    path = Path(folder) / _file_name(index)
    temporary = path.with_suffix(".part")
    with naming(path):
        temporary.write_bytes(scene.jpeg)
    temporary.replace(path)
    image = {
        "license": art.ARTISTS[settings.artist].license_id,
        "file_name": path.name,
        "height": scene.height,
        "width": scene.width,
        "id": index,
    }
    sentences = scene_captions.describe(scene, scene_rng(settings.seed, index, purpose=1))
    return image, _objects(scene), sentences


def _objects(scene: Scene) -> list[dict[str, Any]]:
    return [
        {
            "image_id": scene.index,
            "category_id": instance.category.id,
            "bbox": list(masks.box(instance.mask)),
            "area": float(instance.mask.sum()),
            "iscrowd": int(instance.crowd),
            "segmentation": (
                masks.run_lengths(instance.mask)
                if instance.crowd
                else masks.polygons(instance.mask)
            ),
        }
        for instance in scene.instances
    ]


def _file_name(index: int) -> str:
    return f"{index:012d}.jpg"


def _head(settings: SceneSettings) -> dict[str, Any]:
    artist = art.ARTISTS[settings.artist]
    return {
        "info": {
            "description": f"Scenes composed of {artist.name} drawings, with exact truth",
            "version": str(FORMAT),
            "year": 2026,
            "contributor": artist.credit,
            "url": artist.license_url,
        },
        "licenses": [
            {"id": artist.license_id, "name": artist.license_name, "url": artist.license_url}
        ],
    }


if __name__ == "__main__":
    run_command(main)
