"""The lines of `samples.jsonl`: several answers of a model to each question."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from vlm_sft.utils.keyed_log import LineFormat

SampleKey = tuple[str, int]
"""A question's id and the number of one of its samples, from 0."""


@dataclass(frozen=True)
class Sample:
    """A line of `samples.jsonl`.

    Attributes:
        id: The question's id.
        sample: Number of the sample, from 0.
        text: The answer.
        tokens: Its length in tokens, with the stop token.
        ended: Whether the model ended it; a cut answer is never acceptable.
        problem: Why the question could not be asked, e.g. `image_missing`; None if it was.
    """

    id: str
    sample: int
    text: str
    tokens: int
    ended: bool
    problem: str | None = None

    @property
    def key(self) -> SampleKey:
        """What the sample belongs to."""
        return self.id, self.sample


def _written(sample: Sample) -> Mapping[str, Any]:
    return {key: value for key, value in asdict(sample).items() if key != "problem" or value}


def _read(values: Any) -> Sample:
    sample = Sample(**values)
    types = {"id": str, "sample": int, "text": str, "tokens": int, "ended": bool}
    for name, kind in types.items():
        if type(getattr(sample, name)) is not kind:
            raise TypeError(f"{name!r} is not of the type {kind.__name__}")
    return sample


SAMPLES: Final = LineFormat[SampleKey, Sample](
    command="sample", kind="samples", file="samples.jsonl", noun="a sample", about="question",
    key=lambda sample: sample.key, write=_written, read=_read,
)  # fmt: skip
"""The format of `samples.jsonl`."""
