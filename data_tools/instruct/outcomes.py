"""Outcomes of the images and requests of a run: in the training files, or why not."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from data_tools.findings import KINDS
from data_tools.instruct.run_folder import RunFolder
from vlm_sft.errors import UserError
from vlm_sft.utils.reading import open_regular, read_json

KEPT: Final = "in the training files"
DROPPED: Final = "all samples dropped by clean"
REJECTED: Final = "all answers rejected by verify"
UNANSWERED: Final = "no answer"

LEFT_OUT: Final = {
    "of_evaluations": (
        "evaluation images",
        "refused, guard.allow_evaluation_images=true keeps them",
    ),
    "without_annotations": ("without boxes and captions", "there is nothing to ask about"),
    "not_chosen": ("not chosen", "images.count is smaller"),
    "chosen_without_a_type": (
        "without a request",
        "no type was drawn for them, see requests.shares",
    ),
}
"""Reasons of `plan` for asking nothing about images, by name in plan.json, and explanations."""

FILES: Final = {
    DROPPED: "dropped.jsonl",
    REJECTED: "rejected.jsonl",
    UNANSWERED: "failures.jsonl",
}
"""Where the samples or requests of an outcome are listed."""

_MOST_DETAILS: Final = 4


class _Image(msgspec.Struct):
    id: int


class _Sample(msgspec.Struct):
    """What is needed of a line of samples.jsonl, rejected.jsonl, kept.jsonl or dropped.jsonl."""

    id: str
    image: _Image
    request: str
    reasons: list[str] = []


class _Request(msgspec.Struct):
    id: str
    image: int


class _Failure(msgspec.Struct):
    request: str
    reason: str


class Row(NamedTuple):
    """An outcome with its numbers; `details` says why, with counts or with the setting."""

    outcome: str
    images: int
    requests: int
    details: str


@dataclass
class Outcomes:
    """Counts by outcome. An image counts where the request that got furthest ended.

    Attributes:
        annotated: Images in the annotation files.
        images: Images by outcome.
        requests: Requests by outcome.
        details: Reasons by outcome: of requests, or of images that nothing was asked about.
    """

    annotated: int = 0
    images: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    details: dict[str, Counter[str]] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """Return the outcomes that occur, from the training files back to the annotations."""
        asked = (KEPT, DROPPED, REJECTED, UNANSWERED)
        hints = dict(LEFT_OUT.values())
        found = [name for name in asked if self.images[name] or self.requests[name]]
        found += [name for name in self.images if name not in asked and self.images[name]]
        rows = []
        for name in found:
            counted = self.details.get(name, Counter[str]()).most_common()
            more = f", {len(counted) - _MOST_DETAILS} more" if len(counted) > _MOST_DETAILS else ""
            reasons = ", ".join(f"{reason} {n:,}" for reason, n in counted[:_MOST_DETAILS])
            details = "; ".join(filter(None, (reasons + more, hints.get(name))))
            details += f" ({FILES[name]})" if name in FILES and details else ""
            rows.append(Row(name, self.images[name], self.requests[name], details))
        return rows

    def lines(self) -> Iterator[str]:
        """Yield the table for a terminal."""
        yield f"{'images':>8} {'requests':>9}  what became of them"
        for row in self.rows():
            requests = f"{row.requests:,}" if row.requests else "-"
            details = f": {row.details}" if row.details else ""
            yield f"{row.images:>8,} {requests:>9}  {row.outcome}{details}"


def outcomes(folder: RunFolder) -> Outcomes:
    """Count the outcomes of all annotated images and all requests, after `clean`.

    Raises:
        UserError: A stage has not run, or its file was changed.
    """
    found = Outcomes(annotated=_get(folder.index, "images", "annotated"))
    reached: dict[int, str] = {}
    failures = {
        failure.request: failure.reason
        for failure in _lines(folder.failures, _Failure, missing_is_empty=True)
    }

    def count(outcome: str, sample: _Sample) -> None:
        reached.setdefault(sample.image.id, outcome)
        failures.pop(sample.request, None)
        found.requests[outcome] += 1
        found.details.setdefault(outcome, Counter()).update(sample.reasons)

    for sample in _lines(folder.kept, _Sample):
        count(KEPT, sample)
    for sample in _lines(folder.dropped, _Sample):
        if "-turn-" not in sample.id:  # a dropped turn of a sample that is kept
            count(DROPPED, sample)
    for sample in _lines(folder.rejected, _Sample):
        count(REJECTED, sample)
    total = 0
    unanswered: Counter[str] = Counter()
    for request in _lines(folder.requests, _Request):
        total += 1
        reached.setdefault(request.image, UNANSWERED)
        if reason := failures.pop(request.id, None):
            silent = reason == "nothing_to_say"
            unanswered["rules find nothing certain to say" if silent else f"failed: {reason}"] += 1
    found.requests[UNANSWERED] = total - found.requests.total()
    if not_asked := found.requests[UNANSWERED] - unanswered.total():
        unanswered["not asked yet"] = not_asked
    found.details[UNANSWERED] = unanswered
    found.images.update(reached.values())
    for key, (name, _) in LEFT_OUT.items():
        found.images[name] += _get(folder.plan, "left_out", key)
    met = {name: of["overlap"] for name, of in _get(folder.plan, "guard", "lists").items()}
    found.details[LEFT_OUT["of_evaluations"][0]] = +Counter(met)
    for kind, finding in _get(folder.index, "findings").items():
        if kind in KINDS and KINDS[kind].consequence == "image dropped":
            found.images[KINDS[kind].meaning] += finding["count"]
    return found


LineT = TypeVar("LineT", bound=msgspec.Struct)


def _lines(path: Path, form: type[LineT], *, missing_is_empty: bool = False) -> Iterator[LineT]:
    decoder = msgspec.json.Decoder(form)
    try:
        file = open_regular(path)
    except FileNotFoundError:
        if missing_is_empty:
            return
        raise UserError(
            f"{path}: no such file; run the stages up to `clean` first", code="data_file_missing"
        ) from None
    with file:
        for number, line in enumerate(file, 1):
            try:
                yield decoder.decode(line)
            except msgspec.DecodeError as error:
                raise UserError(
                    f"{path}:{number}: {error}; run the stage that writes it again",
                    code="json_syntax",
                ) from None


def _get(path: Path, *keys: str) -> Any:
    """Return a value of a JSON file that a stage wrote."""
    value = read_json(path)
    try:
        for key in keys:
            value = value[key]
    except (LookupError, TypeError):
        raise UserError(
            f"{path}: has no {'.'.join(keys)}; run the stage that writes it again",
            code="json_syntax",
        ) from None
    return value
