"""Conversations about several images: which image each sentence speaks of."""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from data_tools.instruct.grow.checks import fault
from data_tools.instruct.schema import Check, Turn

MOST: Final = 4
"""Images of a conversation, at most."""
ORDINALS: Final = ("first", "second", "third", "fourth")

_IMAGE: Final = r"(?:image|picture|photo|photograph)"
_NAMED: Final = re.compile(
    rf"\b(?:(?P<before>{'|'.join(ORDINALS)})(?= {_IMAGE}\b)|{_IMAGE} (?P<number>[1-4])\b"
    rf"|the (?P<alone>{'|'.join(ORDINALS)})(?: one)?(?= (?:shows?|has|is|does|do|contains?)\b"
    r"|[,;.?!]|$))",
    re.IGNORECASE,
)
_SEVERAL: Final = re.compile(
    rf"\b(?:both|all|either|neither|each|any|which|these|two|three|four|other)(?: of)?(?: the)?"
    rf"(?: two| three| four)? {_IMAGE}s?\b|\b{_IMAGE}s\b",
    re.IGNORECASE,
)
_PIECE: Final = re.compile(
    rf"(?<=[.!?;])\s+|,?\s+(?=(?:and|but|while|whereas) (?:in )?the (?:{'|'.join(ORDINALS)})\b)",
    re.IGNORECASE,
)


def by_image(turns: Sequence[Turn], number: int) -> tuple[list[list[Turn | None]], list[Check]]:
    """Return for each image what the turns say of it, and what cannot be assigned.

    A question names one image, or several; a piece of an answer (a sentence, or a clause that
    begins with another image) is about the one that it names, else about that of the question. In
    the turns that are returned, text about other images and the words that number the images are
    blank, so that all else stays in its place.

    Args:
        turns: Questions with answers.
        number: How many images there are.
    """
    parts: list[list[Turn | None]] = [[None] * len(turns) for _ in range(number)]
    found: list[Check] = []
    for index, turn in enumerate(turns):
        asked = _named(turn.question)
        several = len(asked) > 1 or (not asked and _SEVERAL.search(turn.question) is not None)
        if not asked and not several:
            found.append(fault("IMAGE_NOT_NAMED", turn.question, index, "question"))
            continue
        if any(image >= number for image in {*asked, *_named(turn.answer)}):
            found.append(fault("IMAGE_NOT_NAMED", f"there are {number} images", index, "question"))
            continue
        answers = [list(" " * len(turn.answer)) for _ in range(number)]
        for begin, end in _pieces(turn.answer):
            named = _named(turn.answer[begin:end])
            about = named or (asked if not several else set())
            if len(about) != 1:
                found.append(fault("IMAGES_MIXED", turn.answer[begin:end], index, "answer"))
                continue
            answers[next(iter(about))][begin:end] = turn.answer[begin:end]
        for image, letters in enumerate(answers):
            answer = _without_numbers("".join(letters))
            if answer.strip():
                is_asked = several or image in asked
                question = _without_numbers(turn.question) if is_asked else " "
                parts[image][index] = turn.model_copy(
                    update={"question": question, "answer": answer}
                )
    for image, said in enumerate(parts):
        if not any(said):
            found.append(
                fault("IMAGE_UNUSED", f"nothing is said about the {ORDINALS[image]} image")
            )
    return parts, found


def _named(text: str) -> set[int]:
    """Return the images that a text names, from 0."""
    found = set()
    for match in _NAMED.finditer(text):
        word = match["before"] or match["alone"]
        found.add(int(match["number"]) - 1 if match["number"] else ORDINALS.index(word.lower()))
    return found


def _pieces(answer: str) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each sentence, or clause about another image."""
    begin = 0
    for match in _PIECE.finditer(answer):
        yield begin, match.start()
        begin = match.end()
    if answer[begin:].strip():
        yield begin, len(answer)


def _without_numbers(text: str) -> str:
    """Return the text with blanks in place of the words that number images."""
    return _NAMED.sub(lambda match: " " * len(match[0]), text)
