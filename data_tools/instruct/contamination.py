"""The split guard: images that evaluations use are found by their numeric id and not trained on.

train2017 is train2014 and 35,504 of the 40,504 images of val2014, so an image of POPE,
LLaVA-Bench (COCO) or Karpathy's test split, all from val2014, most likely lies in train2017.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Final, Literal

from data_tools.coco import AnnotatedImage
from data_tools.instruct.config import GuardConfig
from data_tools.json_lists import read_lists
from vlm_sft.errors import UserError
from vlm_sft.utils.reading import StrictJsonError, open_regular, parse_json, read_text

KNOWN: Final[Mapping[str, str | None]] = {
    "pope": "val2014",
    "llava_bench_coco": "val2014",
    "karpathy_test": "val2014",
    "val2014": None,
    "val2017": None,
}
"""Evaluations on COCO's images, and the part of COCO that holds all of their images."""

CANNOT_MEET: Final[Mapping[str, frozenset[str]]] = {
    "train2014": frozenset(KNOWN),
    "train2017": frozenset({"val2017"}),
}
"""By part of COCO, the evaluations without an image of it: COCO's splits say so, and val2017 is
from val2014."""

REFUSED: Final = "refused; guard.allow_evaluation_images=true keeps them"
"""What messages say of images that evaluations use, with the setting that allows them."""

Status = Literal["checked", "by split", "covered", "split only", "not checked"]

_HEAD: Final = 1 << 16
MAX_LIST_BYTES: Final = 1 << 30
"""Largest JSON list of ids that is read as a whole."""
_ID_KEYS: Final = ("image_id", "cocoid", "image", "id", "file_name", "filename")
"""Where an entry of a list names its image, the first that it has."""
_COCO_NAME: Final = re.compile(r"(?:.*/)?(?:COCO_[a-z]+20\d\d_)?0*(\d{1,12})(?:\.[A-Za-z]{3,4})?")


@dataclass(frozen=True)
class ListFigures:
    """What was found about one evaluation.

    Attributes:
        name: As in `guard.lists`, or a known one without a file.
        status: `checked` by a file; `by split`: known of every image by COCO's own splits;
            `covered` by another list that holds all of its images; `split only`: no file, but
            some images say themselves that they are of it; `not checked`.
        listed: Ids in its files.
        overlap: Images of ours among them.
    """

    name: str
    status: Status
    listed: int
    overlap: int


@dataclass(frozen=True)
class Guard:
    """Which images evaluations use, and the figures behind that."""

    evaluations: Mapping[int, tuple[str, ...]]
    figures: tuple[ListFigures, ...]
    allowed: bool

    def refuses(self, image_id: int) -> bool:
        """Whether the image may not be trained on."""
        return not self.allowed and image_id in self.evaluations

    def told(self) -> dict[str, Any]:
        """For `plan.json`."""
        return {
            "allow_evaluation_images": self.allowed,
            "evaluation_images": len(self.evaluations),
            "lists": {
                f.name: {"status": f.status, "listed": f.listed, "overlap": f.overlap}
                for f in self.figures
            },
        }

    def lines(self) -> Iterator[str]:
        """For a terminal: what is refused, and plainly what nobody looked at."""
        verdict = ", kept (guard.allow_evaluation_images)" if self.allowed else f", {REFUSED}"
        found = len(self.evaluations)
        yield f"{found:>9,}  images of evaluations found{verdict if found else ''}"
        for f in self.figures:
            match f.status:
                case "checked":
                    said = f"{f.listed:,} ids in its files, {f.overlap:,} of our images among them"
                case "split only":
                    said = (
                        f"{f.overlap:,} of our images say that they are of it; what else of "
                        f"it is here is NOT CHECKED: give its ids as guard.lists.{f.name}"
                    )
                case "covered":
                    said = f"its images are all among {KNOWN[f.name]}'s, which were checked"
                case "by split":
                    said = f"{f.overlap:,} of our images, by COCO's own splits"
                case _:
                    within = KNOWN[f.name]
                    said = f"NOT CHECKED: give its ids as guard.lists.{f.name}" + (
                        f", or {within}'s, which hold them" if within else ""
                    )
            yield f"           {f.name}: {said}"


def check(images: Iterable[AnnotatedImage], config: GuardConfig) -> Guard:
    """Hold the images against the evaluations' ids.

    Raises:
        UserError: A list cannot be read, names no image, or one that has no numeric id.
    """
    images = list(images)
    listed = {
        name: frozenset().union(*(read_ids(Path(path), name) for path in _paths(files)))
        for name, files in config.lists.items()
    }
    evaluations: dict[int, list[str]] = {}
    figures: dict[str, ListFigures] = {}
    for name in dict.fromkeys([*listed, *sorted(KNOWN, key=lambda name: KNOWN[name] or "")]):
        met = [p for p in images if p.id in listed.get(name, ()) or p.split == name]
        for image in met:
            evaluations.setdefault(image.id, []).append(name)
        status = "checked" if name in listed else _status(name, figures, images, bool(met))
        figures[name] = ListFigures(name, status, len(listed.get(name, ())), len(met))
    return Guard(
        {image_id: tuple(names) for image_id, names in sorted(evaluations.items())},
        tuple(figures.values()),
        config.allow_evaluation_images,
    )


def _status(
    name: str, figures: Mapping[str, ListFigures], images: Iterable[AnnotatedImage], met: bool
) -> Status:
    """What is known of an evaluation without a file; the part that holds it has been looked at."""
    if all(p.split == name or name in CANNOT_MEET.get(p.split or "", ()) for p in images):
        return "by split"
    within = KNOWN[name]
    if within is not None and figures[within].status in ("checked", "by split"):
        return "covered"
    return "split only" if met else "not checked"


def _paths(files: str | list[str]) -> list[str]:
    return [files] if isinstance(files, str) else files


def read_ids(path: Path, name: str = "") -> frozenset[int]:
    """The ids of the images that a file lists.

    A COCO annotation file or Karpathy's `dataset_coco.json` (an object with `images`; for a `name`
    like `karpathy_test` only entries whose `split` is `test`); a JSON list or JSON lines of ids,
    file names, or objects with `image_id`, `cocoid`, `image`, `file_name` or `id`; plain text with
    one id or file name a line.

    Raises:
        UserError: The file is not there, is none of these, is empty, or an entry has no COCO id.
    """
    ids = frozenset(_id_of(entry, where) for entry, where in _entries(path) if _wanted(entry, name))
    if not ids:
        raise UserError(
            f"{path}: lists no image; guard.lists is to name files with ids of images",
            code="no_records",
        )
    return ids


def _wanted(entry: Any, name: str) -> bool:
    if not (isinstance(entry, dict) and "split" in entry and name.startswith("karpathy_")):
        return True
    return bool(entry["split"] == name.removeprefix("karpathy_"))


def _entries(path: Path) -> Iterator[tuple[Any, str]]:
    """What the file lists, with the place for messages."""
    try:
        with _opened(path) as file:
            head = file.read(_HEAD).lstrip()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file", code="data_file_missing") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason})", code="json_syntax") from None
    if head.startswith("["):
        entries = _parse(read_text(path, MAX_LIST_BYTES), str(path))
        yield from ((entry, f"{path}[{position}]") for position, entry in enumerate(entries))
    elif head.startswith("{") and not _is_json_line(head):
        for _, position, value in read_lists(path, {"images": Any}):
            yield value, f"{path}: images[{position}]"
    else:
        yield from _lines(path)


def _lines(path: Path) -> Iterator[tuple[Any, str]]:
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield _parse(line, where) if line.lstrip()[0] == "{" else line.strip(), where
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}:{number + 1}: not UTF-8 ({error.reason}) here or behind", code="json_syntax"
        ) from None


def _opened(path: Path) -> TextIOWrapper:
    return TextIOWrapper(open_regular(path), encoding="utf-8-sig")


def _is_json_line(head: str) -> bool:
    """Whether a text begins with a line that is an object of its own, not one with `images`."""
    try:
        first = json.loads(head.split("\n", 1)[0])
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
    return int(match.group(1))
