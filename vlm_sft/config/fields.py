"""Types of the configuration's fields: bounded numbers, choices, and the resume policy."""

import re
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

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

_MAX_LAYERS: Final = 1000
_LAYER_COUNT = re.compile(r"(^|_)(layers?|depths?|blocks)$")
"""Keys of other libraries' configurations that count layers."""
_DROPOUT = re.compile(r"drop")
"""Keys of other libraries' configurations that are dropout probabilities."""


def _check_architecture(tree: dict[str, Any]) -> dict[str, Any]:
    """Refuse values that the other library would only notice late.

    A layer count with a typing error builds layers until memory is full; a wrong dropout
    probability fails in the first step.
    """
    pending: list[tuple[str, Any]] = list(tree.items())
    while pending:
        key, value = pending.pop()
        last = key.rpartition(".")[2]
        if isinstance(value, dict):
            pending += [(f"{key}.{name}", child) for name, child in value.items()]
        elif isinstance(value, list):
            pending += [(key, child) for child in value]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if _LAYER_COUNT.search(last) and value > _MAX_LAYERS:
                raise ValueError(f"{key}: expected at most {_MAX_LAYERS:,} layers (found {value})")
            if _DROPOUT.search(last) and not 0 <= value <= 1:
                raise ValueError(f"{key}: expected a number from 0 to 1 (found {value})")
    return tree


Architecture = Annotated[dict[str, Any], AfterValidator(_check_architecture)]
"""A model configuration of another library; the model is built from it with random weights."""

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
