"""Why `clean` drops something."""

from typing import Final

REVIEW_REJECTED: Final = "REVIEW_REJECTED"
REVIEW_EDIT: Final = "REVIEW_EDIT"

MEANINGS: Final = {
    REVIEW_REJECTED: "A reviewer has rejected it.",
    REVIEW_EDIT: "The text of a reviewer was rejected when it was verified.",
    "IMAGE_UNREADABLE": "The image cannot be opened.",
    "IMAGE_DUPLICATE": "The image looks the same as an earlier one.",
    "EXACT_DUPLICATE": "An earlier sample has the same text.",
    "NEAR_DUPLICATE": "An earlier sample has nearly the same text.",
    "SAME_QUESTION": "The question was asked before about the same image.",
    "IMAGE_CAP": "The image has the maximum number of samples.",
    "CATEGORY_CAP": "All categories of the image have the maximum number of samples.",
    "TYPE_SHARE": "The type would have more than its share.",
    "OPENING_CAP": "Too many answers begin with the same words.",
    "ANSWER_BALANCE": "The answer is more frequent than its alternatives, so guessing pays.",
}
"""Meaning of every code."""

KEPT: Final = ""
"""In place of a code: not dropped."""
