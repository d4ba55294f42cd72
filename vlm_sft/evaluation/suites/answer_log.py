"""The answers in the folder of an evaluation."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from vlm_sft.evaluation.suites.tasks import Key
from vlm_sft.utils.keyed_log import LineFormat


@dataclass(frozen=True)
class Answer:
    """A line of `answers.jsonl`.

    Attributes:
        task: Name of the task.
        condition: The image condition.
        id: The question's id.
        image: Name of the image that was shown; None: blank, or none.
        prompt: What was asked.
        answer: The model's text.
        tokens: Its length in tokens; None if a server does not say.
        problem: Why there is no answer, e.g. a server's refusal; None if there is one.
    """

    task: str
    condition: str
    id: str
    image: str | None
    prompt: str
    answer: str
    tokens: int | None
    problem: str | None = None

    @property
    def key(self) -> Key:
        """The question and condition that it answers."""
        return Key(self.task, self.condition, self.id)


def _written(answer: Answer) -> Mapping[str, Any]:
    return {key: value for key, value in asdict(answer).items() if key != "problem" or value}


ANSWERS: Final = LineFormat[Key, Answer](
    command="evaluate", kind="evaluation", file="answers.jsonl", noun="an answer",
    about="question", key=lambda answer: answer.key, write=_written,
    read=lambda values: Answer(**values),
)  # fmt: skip
"""The format of `answers.jsonl`."""
