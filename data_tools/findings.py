"""What was found in annotations: counted by kind, with the first examples, and never silent."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from vlm_sft.errors import UserError

Consequence = Literal["annotation dropped", "image dropped", "reported"]

MAX_EXAMPLES: Final = 5
MAX_FAULTY: Final = 0.01
"""Share of all annotations or images that may have one fault and be set aside; a larger one
speaks of a wrong file (or of corners in place of sizes), not of a slip of its makers."""


@dataclass(frozen=True)
class Finding:
    """A kind of thing that annotations may show.

    Attributes:
        meaning: In the plural, for use after a count.
        consequence: What happens to the annotation or the image.
    """

    meaning: str
    consequence: Consequence

    @property
    def drops_images(self) -> bool:
        """Whether images with this fault are left out."""
        return self.consequence == "image dropped"


KINDS: Final[Mapping[str, Finding]] = {
    "box_without_area": Finding("boxes without area", "annotation dropped"),
    "box_outside": Finding("boxes leaving their image by over a pixel", "annotation dropped"),
    "box_repeated": Finding("boxes repeating one of their image", "annotation dropped"),
    "box_rounded": Finding("boxes leaving their image by up to a pixel, kept", "reported"),
    "box_crowd": Finding("boxes of crowds, never counted", "reported"),
    "caption_empty": Finding("captions without a word", "annotation dropped"),
    "caption_long": Finding("captions of over 5,000 characters", "annotation dropped"),
    "caption_unreadable": Finding("captions that are no Unicode text", "annotation dropped"),
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
        """Count one finding; its sentence is kept while few are."""
        assert kind in KINDS, kind
        self.counts[kind] += 1
        kept = self.examples.setdefault(kind, [])
        if len(kept) < MAX_EXAMPLES:
            kept.append(example)

    def require_few(self, totals: Mapping[str, int], share: float, remedy: str = "") -> None:
        """Refuse faults that set too large a part aside.

        Args:
            totals: How many there are of what kinds begin with (`box`, `caption`, `image`);
                kinds of others are not looked at.
            share: The largest part that may be set aside for one fault.
            remedy: What else can be done, told at the sentence's end.

        Raises:
            UserError: One kind of fault has more; the first example is told.
        """
        for kind, count in self.counts.items():
            total = totals.get(kind.partition("_")[0])
            if total is None or KINDS[kind].consequence == "reported" or count <= share * total:
                continue
            raise UserError(
                f"{self.examples[kind][0]} ({KINDS[kind].meaning}: {count:,} of {total:,}, and up "
                f"to {share:.3g} of them would be set aside){remedy}",
                code="image_missing" if kind == "image_missing" else None,
            )

    def told(self) -> dict[str, dict[str, Any]]:
        """All kinds found, in the order of `KINDS`."""
        return {
            kind: {
                "count": self.counts[kind],
                "meaning": finding.meaning,
                "consequence": finding.consequence,
                "examples": self.examples[kind],
            }
            for kind, finding in KINDS.items()
            if self.counts[kind]
        }

    def lines(self) -> Iterator[str]:
        """The same for a terminal; an example only where something is set aside."""
        for kind, told in self.told().items():
            lost = told["consequence"] != "reported"
            yield (
                f"{told['count']:>9,}  {told['meaning']}"
                + (f": {told['consequence']}, e.g. {self.examples[kind][0]}" if lost else "")
            )
