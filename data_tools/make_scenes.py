"""Compose pictures from emoji art and write them with COCO's own annotations."""

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools import art, masks, scene_captions
from data_tools.backgrounds import KINDS
from data_tools.scenes import COCO_MAX_SIDE, Scene, SceneSettings, compose, scene_rng
from vlm_sft.command_line import CommandParser
from vlm_sft.console import say
from vlm_sft.errors import UserError, run_command
from vlm_sft.filesystem import naming
from vlm_sft.ownership import (
    own_output,
    read_marker,
    write_owned,
    write_owned_json,
)
from vlm_sft.progress import track

FORMAT = 1
"""Raised when the same settings would give other pictures."""

KIND = "scene set"
"""What the marker of an output folder says that it holds."""

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
        say(f"{out}: done already, {arguments.count} pictures with these settings", file=sys.stdout)
        return 0
    artist = art.ARTISTS[settings.artist]
    art.check_drawings(artist, settings.categories)
    _own(out, artist.name, arguments)
    (out / "images").mkdir(parents=True, exist_ok=True)
    told = {"sha256": _hash(receipt), "complete": False, **receipt}
    write_owned_json(out / "settings.json", told)
    instances, captions = _write_pictures(
        out, settings, arguments.count, arguments.workers, overwrite=arguments.overwrite
    )
    head = _head(settings)
    annotations = out / "annotations"
    write_owned_json(annotations / f"instances_{artist.name}.json", head | instances, indent=None)
    write_owned_json(annotations / f"captions_{artist.name}.json", head | captions, indent=None)
    write_owned(out / "ATTRIBUTION.md", art.attribution(artist).encode())
    write_owned_json(out / "settings.json", told | {"complete": True})
    crowds = sum(entry["iscrowd"] for entry in instances["annotations"])
    say(
        f"{out}: {arguments.count} pictures, {len(instances['annotations'])} objects "
        f"({crowds} of them crowds), {len(settings.categories)} categories by {artist.name}, "
        f"{len(captions['annotations'])} captions",
        file=sys.stdout,
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
        "--overwrite",
        action="store_true",
        help="replace files in the folder that were edited or that this command did not write",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes; no effect on results",
    )
    return parser


def _own(out: Path, artist: str, arguments: argparse.Namespace) -> None:
    """Check that the folder's files may be written; images are compared when they are made."""
    is_old = read_marker(out) is None and (out / "settings.json").exists()
    inputs = [name for name in [arguments.categories] if name and name.endswith(".json")]
    names = [f"annotations/{kind}_{artist}.json" for kind in ("instances", "captions")]
    names += ["ATTRIBUTION.md", "settings.json"]
    # If there is no marker, `_is_done` has read the settings: an older version made the folder.
    own_output(out, KIND, names, inputs=inputs, adopt=is_old, overwrite=arguments.overwrite)


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
    """Return whether `out` holds exactly these scenes; refuse a folder of other settings."""
    path = out / "settings.json"
    if not path.exists():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        same = found["sha256"] == _hash(receipt)
        complete = found["complete"] is True
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is damaged or was not written by this command, so the folder's settings are "
            "unknown; nothing was changed. Give --out a new folder",
            code="not_ours",
        ) from error
    if not same:
        changed = [key for key in receipt if found.get(key) != receipt[key]]
        raise UserError(
            f"{out}: holds scenes of other settings ({', '.join(changed) or 'unknown'} differ); "
            "nothing was changed. Give --out a new folder"
        )
    artist, count = receipt["artist"], receipt["count"]
    names = [out / "annotations" / f"{kind}_{artist}.json" for kind in ("instances", "captions")]
    pictures = (out / "images" / _file_name(index) for index in range(1, count + 1))
    return complete and all(name.is_file() for name in (*names, *pictures))


def _hash(receipt: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(receipt, sort_keys=True).encode()).hexdigest()


def _write_pictures(
    out: Path, settings: SceneSettings, count: int, workers: int, *, overwrite: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write every picture; return what `instances` and `captions` say beside the common head."""
    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    tasks = ((str(out / "images"), settings, index, overwrite) for index in range(1, count + 1))
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


_Task = tuple[str, SceneSettings, int, bool]
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
    folder, settings, index, overwrite = task
    scene = compose(settings, index)
    path = Path(folder) / _file_name(index)
    _write_image(path, scene.jpeg, overwrite=overwrite)
    image = {
        "license": art.ARTISTS[settings.artist].license_id,
        "file_name": path.name,
        "height": scene.height,
        "width": scene.width,
        "id": index,
    }
    sentences = scene_captions.describe(scene, scene_rng(settings.seed, index, purpose=1))
    return image, _objects(scene), sentences


def _write_image(path: Path, jpeg: bytes, *, overwrite: bool) -> None:
    """Write an image unless it is there; a scene has the same bytes in every run.

    Raises:
        UserError: Another file has its name.
    """
    if path.exists() and not overwrite:
        if path.is_file() and path.read_bytes() == jpeg:
            return
        raise UserError(
            f"{path}: exists and is not the image that these settings give; it was changed or "
            "made by another version. Move it away, or replace it with --overwrite",
            code="not_ours",
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with naming(path):
        temporary.write_bytes(jpeg)
    temporary.replace(path)


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
