"""Who writes the conversations: rules today, other teachers beside them.

A backend is given an index of images and yields exchanges; files, ids and checks are not its own.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, cast, get_args

from data_tools.coco import AnnotatedImage, CocoIndex
from data_tools.records import AnswerStyle, Exchange


class Backend(Protocol):
    """What `build_coco` asks of a backend. Every answer must follow from the annotations."""

    def captions(self, image: AnnotatedImage, limit: int | None) -> Sequence[Exchange]:
        """Caption pairs for stage 1, at most `limit`."""

    def conversation(self, image: AnnotatedImage, turns: int) -> Sequence[Exchange]:
        """One conversation for stage 2, about `turns` questions; empty if nothing is known."""

    def probes(
        self, images: Sequence[AnnotatedImage], family: str, per_image: int
    ) -> Mapping[int, Sequence[Exchange]]:
        """Balanced single questions of one family, by image id."""


def make_backend(
    name: str,
    index: CocoIndex,
    seed: int,
    answers: str,
    families: Collection[str],
    captions_from: str = "captions",
) -> Backend:
    """The backend of that name; `name` has been checked by the command line."""
    from data_tools.backends.rules import RulesBackend

    assert name == "rules" and answers in get_args(AnswerStyle)
    return RulesBackend(index, seed, cast(AnswerStyle, answers), families, captions_from)
