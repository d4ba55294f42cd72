"""Why something is set aside."""

from typing import Final

MEANINGS: Final = {
    "IMAGE_UNREADABLE": "The image cannot be opened.",
    "IMAGE_DUPLICATE": "The image looks the same as an earlier one.",
    "EXACT_DUPLICATE": "An earlier sample has the same text.",
    "NEAR_DUPLICATE": "An earlier sample says it in nearly the same words.",
    "SAME_QUESTION": "The question was asked of the same image before.",
    "IMAGE_CAP": "The image has as many samples as it may have.",
    "CATEGORY_CAP": "All categories of the image have as many samples as they may have.",
    "TYPE_SHARE": "The type would have more than its share.",
    "OPENING_CAP": "Too many answers begin with the same words.",
    "ANSWER_BALANCE": "The answer is commoner than its alternatives, so that guessing would pay.",
}
"""Every code, and what it means in a sentence."""

CODES: Final = ("", *MEANINGS)
"""A number in a column is a place in this list, 0 is kept."""

CODE: Final = {name: number for number, name in enumerate(CODES)}
