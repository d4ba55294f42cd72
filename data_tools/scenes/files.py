"""Write a set of scenes: images, COCO annotations, attribution, and the settings that made them."""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from data_tools.scenes import art
from data_tools.scenes import captions as scene_captions
from data_tools.scenes.backgrounds import KINDS
from data_tools.scenes.compose import Scene, SceneSettings, compose, scene_rng
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.filesystem import naming
from vlm_sft.utils.owned_files import OwnedFiles, own_output, write_owned, write_owned_json
from vlm_sft.utils.ownership import read_marker
from vlm_sft.utils.progress import track
from vlm_sft.utils.reading import read_json

FORMAT: Final = 1
"""Raised when the same settings would give other images."""

KIND: Final = "scene set"
"""What the marker of an output folder says that it holds."""

MAX_OBJECTS: Final = 4
"""Most categories in an image, by default."""

_TEMPORARY: Final = re.compile(r"\.(?P<image>[0-9]{12}\.jpg)\.(?P<process>[0-9]{1,20})\.part")


def make_scenes(arguments: argparse.Namespace) -> None:
    """Write the scenes that the arguments ask for, unless the folder has them already."""
    settings, count, out = _settings(arguments), arguments.count, Path(arguments.out)
    recipe = {"format": FORMAT, "count": count, **asdict(settings)}
    recipe = json.loads(json.dumps(recipe))
    if _is_done(out, recipe):
        echo(f"{out}: done already, {count} images with these settings", file=sys.stdout)
        return
    artist = art.ARTISTS[settings.artist]
    art.check_drawings(artist, settings.categories)
    _own(out, artist.name, arguments)
    (out / "images").mkdir(parents=True, exist_ok=True)
    recorded = {"sha256": _hash(recipe), "complete": False, **recipe}
    write_owned_json(out / "settings.json", recorded)
    instances, captions, digest = _write_images(
        out, settings, count, arguments.workers, overwrite=arguments.overwrite
    )
    head = _head(settings)
    annotations = out / "annotations"
    write_owned_json(annotations / f"instances_{artist.name}.json", head | instances, indent=None)
    write_owned_json(annotations / f"captions_{artist.name}.json", head | captions, indent=None)
    write_owned(out / "ATTRIBUTION.md", art.attribution(artist).encode())
    write_owned_json(out / "settings.json", recorded | {"complete": True, "images_sha256": digest})
    crowds = sum(entry["iscrowd"] for entry in instances["annotations"])
    echo(
        f"{out}: {count} images, {len(instances['annotations'])} objects "
        f"({crowds} of them crowds), {len(settings.categories)} categories by {artist.name}, "
        f"{len(captions['annotations'])} captions",
        file=sys.stdout,
    )


def _settings(arguments: argparse.Namespace) -> SceneSettings:
    categories = art.load_categories(arguments.categories)
    least, most = arguments.min_objects, arguments.max_objects
    if most is None:
        most = min(max(MAX_OBJECTS, least), len(categories))
    smallest, largest = arguments.scale
    for name, value, low, high in (
        ("--min-objects", least, 1, len(categories)),
        ("--max-objects", most, least, len(categories)),
        ("--scale MAX", largest, smallest, 0.9),
    ):
        if not low <= value <= high:
            raise UserError(f"{name} {value}: expected {low} to {high}")
    backgrounds = [n.strip() for n in (arguments.backgrounds or "").split(",") if n.strip()]
    for name in backgrounds:
        if name not in KINDS:
            raise UserError(f"--backgrounds {name}: expected some of {', '.join(sorted(KINDS))}")
    return SceneSettings(
        artist=arguments.artist,
        seed=arguments.seed,
        categories=categories,
        min_objects=least,
        max_objects=most,
        max_instances=arguments.max_instances,
        min_scale=smallest,
        max_scale=largest,
        max_side=arguments.max_side,
        augment=arguments.augment,
        crowd_share=arguments.crowd_share,
        visible_share=arguments.visible_share,
        backgrounds=tuple(backgrounds),
    )


def _own(out: Path, artist: str, arguments: argparse.Namespace) -> None:
    """Check that the folder's files may be written; images are compared when they are made."""
    is_old = read_marker(out) is None and (out / "settings.json").exists()
    inputs = [name for name in [arguments.categories] if name and name.endswith(".json")]
    names = [f"annotations/{kind}_{artist}.json" for kind in ("instances", "captions")]
    names += ["ATTRIBUTION.md", "settings.json"]
    # If there is no marker, `_is_done` has read the settings: an older version made the folder.
    own_output(out, KIND, names, inputs=inputs, adopt=is_old, overwrite=arguments.overwrite)


def _is_done(out: Path, recipe: dict[str, Any]) -> bool:
    """Return whether `out` holds exactly these scenes, unchanged since they were written.

    Raises:
        UserError: It holds scenes of other settings, or a `settings.json` of others.
    """
    path = out / "settings.json"
    if not path.exists():
        return False
    try:
        found = read_json(path)
        same = found["sha256"] == _hash(recipe)
        complete = found["complete"] is True
    except (UserError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is damaged or was not written by this command, so the folder's settings are "
            "unknown; nothing was changed. Give --out a new folder",
            code="not_ours",
        ) from error
    if not same:
        changed = [key for key in recipe if found.get(key) != recipe[key]]
        raise UserError(
            f"{out}: holds scenes of other settings ({', '.join(changed) or 'unknown'} differ); "
            "nothing was changed. Give --out a new folder"
        )
    return complete and _is_unchanged(out, recipe, found.get("images_sha256"))


def _is_unchanged(out: Path, recipe: dict[str, Any], images_sha256: Any) -> bool:
    """Return whether annotations and images have the content that was recorded of them."""
    names = [f"annotations/{kind}_{recipe['artist']}.json" for kind in ("instances", "captions")]
    files = OwnedFiles(out)
    if not all(_has_content(out / name) and files.is_ours(name) for name in names):
        return False
    digest = hashlib.sha256()
    for index in range(1, recipe["count"] + 1):
        path = out / "images" / _file_name(index)
        if not _has_content(path):
            return False
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest() == images_sha256


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _hash(recipe: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _write_images(
    out: Path, settings: SceneSettings, count: int, workers: int, *, overwrite: bool
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Write every image.

    Returns:
        The content of `instances` and `captions` next to the common head, and one digest of the
        images' digests.
    """
    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    digest = hashlib.sha256()
    leftovers = _leftovers(out / "images")
    tasks = (
        (str(out / "images"), settings, index, overwrite, leftovers.get(_file_name(index), ()))
        for index in range(1, count + 1)
    )
    description = f"composing {settings.artist} scenes"
    for image, objects, sentences, sha256 in track(_in_order(tasks, workers), count, description):
        digest.update(sha256)
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
        digest.hexdigest(),
    )


def _leftovers(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return, by image, the temporary files of processes that have ended."""
    found: dict[str, tuple[str, ...]] = {}
    for name in sorted(os.listdir(folder)):
        match = _TEMPORARY.fullmatch(name)
        if match and not _is_running(int(match["process"])):
            found[match["image"]] = (*found.get(match["image"], ()), name)
    return found


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return process != os.getpid()


_Task = tuple[str, SceneSettings, int, bool, tuple[str, ...]]
_Entry = tuple[dict[str, Any], list[dict[str, Any]], list[str], bytes]


def _in_order(tasks: Iterable[_Task], workers: int) -> Iterator[_Entry]:
    if workers == 1:
        yield from map(_make_one, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _leave_ctrl_c_to_parent) as pool:
        yield from pool.imap(_make_one, tasks, chunksize=8)


def _leave_ctrl_c_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _make_one(task: _Task) -> _Entry:
    """Compose one scene, write its image, and return its annotations and the image's SHA-256."""
    folder, settings, index, overwrite, leftovers = task
    scene = compose(settings, index)
    path = Path(folder) / _file_name(index)
    for name in leftovers:
        _remove_leftover(path.with_name(name), scene.jpeg)
    _write_image(path, scene.jpeg, overwrite=overwrite)
    image = {
        "license": art.ARTISTS[settings.artist].license_id,
        "file_name": path.name,
        "height": scene.height,
        "width": scene.width,
        "id": index,
    }
    sentences = scene_captions.describe(scene, scene_rng(settings.seed, index, purpose=1))
    return image, _objects(scene), sentences, hashlib.sha256(scene.jpeg).digest()


def _remove_leftover(path: Path, jpeg: bytes) -> None:
    """Delete a temporary file if its content is a beginning of the image, and thus ours."""
    small = path.is_file() and not path.is_symlink() and path.stat().st_size <= len(jpeg)
    if small and jpeg.startswith(path.read_bytes()):
        path.unlink(missing_ok=True)


def _write_image(path: Path, jpeg: bytes, *, overwrite: bool) -> None:
    """Write an image unless it is there; a scene has the same bytes in every run.

    Raises:
        UserError: Another file, a directory or a link has its name.
        OSError: The disk is full or fails; no temporary file is left.
    """
    if path.is_dir() and not path.is_symlink():
        raise UserError(
            f"{path}: is a directory, but this command writes an image there; move it away",
            code="not_ours",
        )
    if path.is_file() and path.stat().st_size == len(jpeg) and path.read_bytes() == jpeg:
        return
    if not overwrite and os.path.lexists(path) and not _is_empty(path):
        raise UserError(
            f"{path}: exists and is not the image that these settings give; it was changed or "
            "made by another version. Move it away, or replace it with --overwrite",
            code="not_ours",
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with naming(path):
            temporary.write_bytes(jpeg)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_empty(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == 0


def _objects(scene: Scene) -> list[dict[str, Any]]:
    return [
        {
            "image_id": scene.index,
            "category_id": instance.category.id,
            "bbox": list(instance.box()),
            "area": float(instance.mask.sum()),
            "iscrowd": int(instance.crowd),
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
