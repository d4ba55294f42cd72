"""The split guard: find images that evaluations use by their numeric id, and refuse them.

train2017 is train2014 and 35,504 of the 40,504 images of val2014, so an image of POPE,
LLaVA-Bench (COCO) or Karpathy's test split, all from val2014, most likely is in train2017.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from data_tools.coco import AnnotatedImage
from data_tools.instruct.config import GuardConfig
from data_tools.json_lists import read_lists
from vlm_sft.errors import UserError
from vlm_sft.utils.image_paths import looked_for
from vlm_sft.utils.reading import StrictJsonError, open_regular, parse_json, read_text

KNOWN: Final[Mapping[str, str | None]] = {
    "pope": "val2014",
    "llava_bench_coco": "val2014",
    "karpathy_test": "val2014",
    "val2014": None,
    "val2017": None,
}
"""Evaluations on COCO's images, and the part of COCO that has all of their images."""

CANNOT_MEET: Final[Mapping[str, frozenset[str]]] = {
    "train2014": frozenset(KNOWN),
    "train2017": frozenset({"val2017"}),
}
"""By part of COCO, the evaluations without an image of it, by the definition of COCO's splits."""

Status = Literal["checked", "by split", "covered", "split only", "not checked"]

_HEAD: Final = 1 << 16
MAX_LIST_BYTES: Final = 1 << 30
"""Largest JSON list of ids that is read as a whole."""
_ID_KEYS: Final = ("image_id", "cocoid", "image", "id", "file_name", "filename")
"""Keys of an entry that may name its image; the first one that exists counts."""
_COCO_FILE: Final = re.compile(r"(?:COCO_[a-z]+20\d\d_)?(\d{12})")
_COCO_NAME: Final = re.compile(r"(?:.*/)?(?:COCO_[a-z]+20\d\d_)?0*(\d{1,12})(?:\.[A-Za-z]{3,4})?")


@dataclass(frozen=True)
class ListFigures:
    """How one evaluation was checked.

    Attributes:
        status: `checked` with a file; `by split`: decided for every image by COCO's own splits;
            `covered` by another list, which has all of its images; `split only`: no file, but
            some images name it as their split; `not checked`.
        listed: Ids in its files.
        overlap: Images of ours among them.
    """

    status: Status
    listed: int
    overlap: int


@dataclass(frozen=True)
class Guard:
    """The evaluations of each image that evaluations use, and how each evaluation was checked."""

    evaluations: Mapping[int, tuple[str, ...]]
    figures: Mapping[str, ListFigures]
    allowed: bool

    def refuses(self, image_id: int) -> bool:
        """Return whether the image may not be trained on."""
        return not self.allowed and image_id in self.evaluations

    def as_dict(self) -> dict[str, Any]:
        """Return the part of `plan.json` about this."""
        return {
            "allow_evaluation_images": self.allowed,
            "evaluation_images": len(self.evaluations),
            "lists": {name: asdict(figures) for name, figures in self.figures.items()},
        }

    def lines(self) -> Iterator[str]:
        """Yield lines for a terminal: images that are refused, and evaluations not checked."""
        if self.allowed:
            verdict = ", kept (guard.allow_evaluation_images)"
        else:
            verdict = ", refused; guard.allow_evaluation_images=true keeps them"
        found = len(self.evaluations)
        yield f"{found:>9,}  images of evaluations found{verdict if found else ''}"
        for name, f in self.figures.items():
            texts: dict[Status, str] = {
                "checked": f"{f.listed:,} ids in its files, {f.overlap:,} of them ours",
                "by split": f"{f.overlap:,} of our images, by COCO's own splits",
                "covered": f"all of its images are in {KNOWN.get(name)}, which was checked",
                "split only": f"{f.overlap:,} of our images name it as their split; for the "
                f"others it is NOT CHECKED: give its ids as guard.lists.{name}",
            }
            if f.status in texts:
                yield f"           {name}: {texts[f.status]}"
        if unknown := [name for name, f in self.figures.items() if f.status == "not checked"]:
            includes = " (val2014 includes the others)" if {"val2014", "pope"} <= {*unknown} else ""
            yield f"           {', '.join(unknown)}: NOT CHECKED: their images may be among these."
            yield (
                "           Photos of your own need no check; for COCO's give the ids as "
                f"guard.lists.NAME{includes}"
            )


def check(images: Iterable[AnnotatedImage], config: GuardConfig) -> Guard:
    """Compare the images with the ids of evaluations.

    Raises:
        UserError: A list cannot be read, names no image, or one that has no numeric id.
    """
    images = list(images)
    evaluations: dict[int, list[str]] = {}
    figures: dict[str, ListFigures] = {}
    parts_last = sorted(KNOWN, key=lambda name: KNOWN[name] or "")
    for name in dict.fromkeys([*config.lists, *parts_last]):
        files = config.lists.get(name, [])
        files = [files] if isinstance(files, str) else files
        ids = frozenset().union(*(read_ids(Path(path), name) for path in files))
        met = [image for image in images if image.id in ids or image.split == name]
        for image in met:
            evaluations.setdefault(image.id, []).append(name)
        status = "checked" if files else _status(name, figures, images, bool(met))
        figures[name] = ListFigures(status, len(ids), len(met))
    used = {image_id: tuple(names) for image_id, names in sorted(evaluations.items())}
    return Guard(used, figures, config.allow_evaluation_images)


def _status(
    name: str, figures: Mapping[str, ListFigures], images: Iterable[AnnotatedImage], met: bool
) -> Status:
    """Return the status of an evaluation without a file; val2014 has been looked at before."""
    if all(p.split == name or name in CANNOT_MEET.get(p.split or "", ()) for p in images):
        return "by split"
    within = KNOWN[name]
    if within is not None and figures[within].status in ("checked", "by split"):
        return "covered"
    return "split only" if met else "not checked"


def coco_id(path: Path) -> int | None:
    """Return the image id in a file name of COCO's form, of twelve digits; None for other names."""
    match = _COCO_FILE.fullmatch(path.stem)
    return int(match[1]) if match else None


def read_ids(path: Path, name: str = "") -> frozenset[int]:
    """Return the ids of the images that a file lists.

    The file is a COCO annotation file or Karpathy's `dataset_coco.json` (an object with `images`;
    for a `name` like `karpathy_test` only entries whose `split` is `test`); a JSON list or JSON
    lines of ids, file names, or objects with `image_id`, `cocoid`, `image`, `file_name` or `id`; or
    plain text with one id or file name a line.

    Raises:
        UserError: The file does not exist, has another form, is empty, or an entry has no COCO id.
    """
    split = name.removeprefix("karpathy_") if name.startswith("karpathy_") else None
    ids = set()
    for entry, where in _entries(path):
        if split is None or not isinstance(entry, dict) or entry.get("split", split) == split:
            ids.add(_id_of(entry, where))
    if not ids:
        raise UserError(
            f"{path}: lists no image; guard.lists takes files with ids of images",
            code="no_records",
        )
    return frozenset(ids)


def _entries(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield the entries of a list with their places, for messages."""
    try:
        with open_regular(path) as file:
            head = file.read(_HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file{looked_for(path)}", code="data_file_missing"
        ) from None
    if head.startswith(b"{") and not _is_json_line(head):
        for _, position, value in read_lists(path, {"images": Any}):
            yield value, f"{path}: images[{position}]"
    elif head.startswith(b"["):
        entries = _parse(read_text(path, MAX_LIST_BYTES), str(path))
        yield from ((entry, f"{path}[{position}]") for position, entry in enumerate(entries))
    else:
        for number, line in enumerate(read_text(path, MAX_LIST_BYTES).split("\n"), 1):
            if text := line.strip():
                where = f"{path}:{number}"
                yield _parse(text, where) if text.startswith("{") else text, where


def _is_json_line(head: bytes) -> bool:
    """Return whether a text begins with a line that is an object, but not one with `images`."""
    try:
        first = json.loads(head.split(b"\n", 1)[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and "images" not in first


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except StrictJsonError as error:
        raise UserError(f"{where}: is not valid JSON ({error})", code=error.reason) from None


def _id_of(entry: Any, where: str) -> int:
    value = entry
    if isinstance(entry, dict):
        value = next((entry[key] for key in _ID_KEYS if key in entry), None)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return value
    match = _COCO_NAME.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise UserError(
            f"{where}: found {str(entry)[:80]!r}, expected COCO's numeric id of an image, a file "
            f"name with it (COCO_val2014_000000033471.jpg), or an object with one of "
            f"{', '.join(_ID_KEYS)}"
        )
    return int(match[1])
