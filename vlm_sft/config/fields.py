"""Types of the configuration's fields: bounded numbers, choices, and the resume policy."""

from typing import Annotated, Final, Literal, TypeVar, get_args

from pydantic import AfterValidator, Field


def _require_text(text: str) -> str:
    if not text.strip():
        raise ValueError(f"expected text that is not empty (found {text!r})")
    return text


NonEmptyText = Annotated[str, AfterValidator(_require_text)]
"""A name or a path: text with at least one character that is not white space."""

Positive = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""A number from 0 to 1."""
Count = Annotated[int, Field(gt=0, le=10**9)]
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]

ImageAspect = Literal["pad", "crop"]
"""How an image becomes square: padded to a square, or cropped to its center."""
ImageProcessing = Literal["fast", "exact"]
"""How exactly an image is resized: fast within 2 of 255 levels of Pillow, or by Pillow itself."""

ResumePolicy = Literal["free", "explicit", "forbidden"]
"""Whether a resumed run may have another value of a setting than the run was started with.

`free`: yes, the setting has no influence on the trained weights. `explicit`: only if the user
names the setting with `--allow-change`. `forbidden`: no, it would be a different run.
"""

RESUME_POLICIES: Final[tuple[ResumePolicy, ...]] = get_args(ResumePolicy)
"""All policies, the most permissive one first."""

T = TypeVar("T")
Free = Annotated[T, Field(json_schema_extra={"on_resume": "free"})]
"""`Free[T]` is a field of type T that a resumed run may change freely."""
Explicit = Annotated[T, Field(json_schema_extra={"on_resume": "explicit"})]
"""`Explicit[T]` is a field of type T that a resumed run may change with `--allow-change`."""
Forbidden = Annotated[T, Field(json_schema_extra={"on_resume": "forbidden"})]
"""`Forbidden[T]` is a field of type T that a resumed run cannot change."""
