"""Why something is set aside."""

from typing import Final

CODES: Final = (
    "",
    "PICTURE_UNREADABLE",
    "PICTURE_DUPLICATE",
    "EXACT_DUPLICATE",
    "NEAR_DUPLICATE",
    "SAME_QUESTION",
    "PICTURE_CAP",
    "CATEGORY_CAP",
    "TYPE_SHARE",
    "OPENING_CAP",
    "ANSWER_BALANCE",
)
"""Why something is set aside; a number in a column is a place in this list, 0 is kept."""

CODE: Final = {name: number for number, name in enumerate(CODES)}
