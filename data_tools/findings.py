"""Faults and remarks about annotations, counted by kind with the first examples."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from vlm_sft.errors import UserError

MAX_EXAMPLES: Final = 5
MAX_FAULTY: Final = 0.01
"""Share of the annotations or images that may be dropped for one kind of fault. If there are more,
the file is probably the wrong one, or boxes are stored as corners instead of width and height."""


class Finding(NamedTuple):
    """A kind of finding: its meaning, in the plural, and what happens to annotation or image."""

    meaning: str
    consequence: Literal["annotation dropped", "image dropped", "renamed", "reported"]


KINDS: Final[Mapping[str, Finding]] = {
    "category_spoken": Finding("category names that sentences spell otherwise", "renamed"),
    "box_without_area": Finding("boxes without area", "annotation dropped"),
    "box_outside": Finding("boxes leaving their image by over a pixel", "annotation dropped"),
    "box_repeated": Finding("boxes repeating one of their image", "annotation dropped"),
    "box_rounded": Finding("boxes leaving their image by up to a pixel, kept", "reported"),
    "box_crowd": Finding("boxes of crowds, never counted", "reported"),
    "box_scored": Finding(
        "boxes with a detector's score, used whatever it is: leave uncertain ones out of the file",
        "reported",
    ),
    "caption_empty": Finding("captions without a word", "annotation dropped"),
    "caption_long": Finding("captions of over 5,000 characters", "annotation dropped"),
    "caption_unreadable": Finding("captions that are not Unicode text", "annotation dropped"),
    "caption_repeated": Finding("captions repeating one of their image, kept", "reported"),
    "image_without_captions": Finding("images without captions", "reported"),
    "image_without_boxes": Finding("images without boxes: absence unknown", "reported"),
    "image_missing": Finding("images without a file", "image dropped"),
    "image_unreadable": Finding("images that cannot be opened", "image dropped"),
    "image_size": Finding("images of another size than annotated", "image dropped"),
    "image_turned": Finding(
        "images turned by their EXIF data, unlike their boxes", "image dropped"
    ),
}


@dataclass
class Findings:
    """Counts and first examples by kind."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        """Count one finding, and keep its sentence if it is among the first."""
        assert kind in KINDS, kind
        self.counts[kind] += 1
        kept = self.examples.setdefault(kind, [])
        if len(kept) < MAX_EXAMPLES:
            kept.append(example)

    def require_few(self, totals: Mapping[str, int], share: float, remedy: str = "") -> None:
        """Refuse annotations of which too many would be dropped.

        Args:
            totals: How many boxes, captions or images there are, by the first word of the kinds
                (`box`, `caption`, `image`) to be checked.
            share: The largest share that may be dropped for one kind of fault.
            remedy: What else the user can do, for the end of the sentence.

        Raises:
            UserError: There are more of one kind; the sentence has the first example.
        """
        for kind, count in self.counts.items():
            total = totals.get(kind.partition("_")[0])
            if total is None or KINDS[kind].consequence == "reported" or count <= share * total:
                continue
            raise UserError(
                f"{self.examples[kind][0]} ({KINDS[kind].meaning}: {count:,} of {total:,}, and at "
                f"most {100 * share:.3g}% of them may be dropped){remedy}",
                code="image_missing" if kind == "image_missing" else None,
            )

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return the kinds that were found, in the order of `KINDS`."""
        return {
            kind: {"count": self.counts[kind], **finding._asdict(), "examples": self.examples[kind]}
            for kind, finding in KINDS.items()
            if self.counts[kind]
        }


def finding_lines(findings: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each kind of `Findings.as_dict`, with an example if it changes something."""
    for found in findings:
        changes = found["consequence"] != "reported"
        example = f": {found['consequence']}, e.g. {found['examples'][0]}" if changes else ""
        yield f"{found['count']:>9,}  {found['meaning']}{example}"
