"""Conversations of LLaVA's form, as others made them, checked like our own."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from data_tools.coco import AnnotatedImage
from data_tools.instruct.plan.prompts import description_requests
from data_tools.instruct.schema import (
    Check,
    Cost,
    ImageSource,
    Kind,
    Sample,
    SampleType,
    Shown,
    Turn,
)
from data_tools.instruct.verify import Policy, check_sample, reasons
from data_tools.records import IMAGE_MARK
from vlm_sft.data.records import open_raw_records
from vlm_sft.errors import RecordError
from vlm_sft.utils.progress import track

LONG_ANSWER: Final = 60
"""A single answer of this many words, not to a request for a description, counts as reasoning."""
SHORT_REASONING: Final = 20
"""The same where the question asks for a reason or a guess (`why`, `what might`)."""


def imported_samples(
    path: Path, images: Mapping[int, AnnotatedImage], policy: Policy, left_out: Counter[str]
) -> Iterator[Sample]:
    """Yield the file's records as checked samples, in the file's order.

    Args:
        path: A file of records, as training reads them.
        images: By id.
        policy: How strict.
        left_out: Counts what cannot be checked: text only, images without annotations, records
            that are not of the form.

    Raises:
        UserError: The file as a whole cannot be read.
    """
    from data_tools.instruct.verify.command import image_source

    records, finder = open_raw_records(path), ImageFinder(images.values())
    for position, raw in enumerate(track(records.records, records.total, f"checking {path.name}")):
        if isinstance(raw, RecordError):
            left_out["records that cannot be read"] += 1
            continue
        record = raw.value
        turns = turns_of(record)
        if turns is None:
            left_out["records that are not of LLaVA's form"] += 1
            continue
        if not record.get("image"):
            left_out["records without an image"] += 1
            continue
        image = finder.find(str(record["image"]))
        if image is None:
            left_out["records whose image is not indexed"] += 1
            continue
        sample_type = type_of(turns)
        checks = check_sample(turns, sample_type, image, Shown(), policy)
        sample_id = f"{record.get('id', 'record')}-{position}"
        yield imported_sample(sample_id, sample_type, image_source(image), turns, checks)


def imported_sample(
    sample_id: str,
    sample_type: SampleType,
    image: ImageSource,
    turns: tuple[Turn, ...],
    checks: tuple[Check, ...],
    shown: Shown | None = None,
) -> Sample:
    """Return a sample that no request of ours made; its status follows from its checks."""
    from data_tools.instruct.verify.command import TOOL

    codes = reasons(checks)
    return Sample(
        id=sample_id, type=sample_type, origin="imported", image=image, turns=turns,
        shown=shown or Shown(), request="", template="", template_sha256="", model="",
        parameters={}, cost=Cost(), tool=TOOL, checks=checks,
        status="rejected" if codes else "accepted", reasons=codes,
    )  # fmt: skip


def type_of(turns: tuple[Turn, ...]) -> SampleType:
    """Return which type a conversation is, as far as its form shows."""
    if len(turns) > 1:
        return "conversation"
    if turns[0].kind == "description":
        return "detail"
    least = SHORT_REASONING if turns[0].kind == "reasoning" else LONG_ANSWER
    return "reasoning" if len(turns[0].answer.split()) >= least else "conversation"


def kind_of(question: str) -> Kind:
    """Return what a question is about: by its first words, or as one that `plan` asks."""
    if question in _own_requests():
        return "description"
    words = question.lower().split()
    text = " ".join(words[:12])
    for kind, cues in _KINDS.items():
        if any(text.startswith(cue) or f" {cue} " in f" {text} " for cue in cues):
            return kind
    return "object"


def is_unicode(value: Any) -> bool:
    """Return whether all texts of a JSON value can be written: none has half a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def turns_of(record: Any) -> tuple[Turn, ...] | None:
    """Return a record's questions and answers; None where it is not of LLaVA's form or Unicode."""
    if not is_unicode(record):
        return None
    try:
        said = [(part["from"], str(part["value"])) for part in record["conversations"]]
    except (KeyError, TypeError):
        return None
    said = [part for part in said if part[0] != "system"]
    roles = [role for role, _ in said]
    if not said or roles != ["human", "gpt"] * (len(said) // 2):
        return None
    turns: list[Turn] = []
    for (_, question), (_, answer) in zip(said[::2], said[1::2], strict=True):
        if not turns:
            question = question.replace(IMAGE_MARK, "", 1)
        question = question.strip()
        turns.append(Turn(question=question, answer=answer.strip(), kind=kind_of(question)))
    return tuple(turns)


@cache
def _own_requests() -> frozenset[str]:
    return frozenset(description_requests(None))


class ImageFinder:
    """Finds the annotated image that a record names.

    The name is looked up as a path as the annotations have it, then as a file name that one image
    alone has, and then by COCO's ids: `COCO_train2014_000000000009.jpg` is image 9, whose file is
    `000000000009.jpg` in the annotations of 2017. An image whose own file name has other digits
    than its id is never found by digits.

    Args:
        images: The images of the annotation files.
    """

    def __init__(self, images: Iterable[AnnotatedImage]) -> None:
        self._by_path: dict[str, AnnotatedImage] = {}
        self._by_name: dict[str, AnnotatedImage | None] = {}
        self._by_digits: dict[int, AnnotatedImage] = {}
        for image in images:
            name = Path(image.file_name).name
            self._by_path[image.file_name] = image
            self._by_name[name] = None if name in self._by_name else image
            if _digits(name) == image.id:
                self._by_digits[image.id] = image

    def find(self, name: str) -> AnnotatedImage | None:
        """Return the image that a path or file name stands for; None if it is not known."""
        file_name = Path(name).name
        found = self._by_path.get(name) or self._by_name.get(file_name)
        digits = _digits(file_name)
        if found is None and file_name not in self._by_name and digits is not None:
            found = self._by_digits.get(digits)
        return found


def _digits(file_name: str) -> int | None:
    """Return the number at the end of a file name like COCO's."""
    digits = Path(file_name).stem.rpartition("_")[2]
    return int(digits) if re.fullmatch(r"[0-9]{1,19}", digits) else None


_KINDS: Final[dict[Kind, tuple[str, ...]]] = {
    "count": ("how many", "number of"),
    "reasoning": (
        "why", "how might", "how could", "what could", "what might", "what can be inferred",
        "what may", "what can", "what would", "how would", "what does this", "could be the reason",
        "might", "likely", "suggest", "suggests", "indicate", "indicates", "reveal", "infer",
    ),
    "description": (
        "describe", "what is this", "write a", "explain the visual", "can you describe",
        "analyze the image", "what do you see", "what's happening", "explain the various",
        "characterize", "description", "what is happening in", "explain the scene", "tell me about",
    ),
    "existence": ("is there", "are there", "does the picture", "does the image", "can you see"),
    "place": ("where", "left", "right", "which side"),
    "attribute": ("what color", "what colour", "what type", "what kind"),
    "action": ("doing", "what activity"),
}  # fmt: skip
