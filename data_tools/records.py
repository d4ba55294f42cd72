"""What a backend makes and a file holds: questions with answers, conversations, probes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

IMAGE_MARK = "<image>"
"""Where an image stands in a text (LLaVA's data form)."""

IMAGE_LINE = f"{IMAGE_MARK}\n"
"""Opens the first human turn of a record with an image (LLaVA's data form)."""

AnswerStyle = Literal["short", "sentence", "evidence"]
"""`Yes.`; a sentence; or, for existence, what is seen and then the verdict (others stay short)."""

CONVERSATION_FAMILIES = ("description", "existence", "counting", "halves", "relation")
"""What a conversation can ask about."""


@dataclass(frozen=True)
class Exchange:
    """One question with its answer.

    Attributes:
        family: `existence`, `counting`, `halves`, `relation`, `description` or `caption`.
        question: As the human asks it.
        reply: As the model should say it.
        answer: The bare answer a probe compares with, e.g. `yes`, `two`, `left`.
        category: What is asked about; empty for captions and descriptions.
        kind: Existence: `positive`, `random`, `popular` or `adversarial`; else as `family`.
    """

    family: str
    question: str
    reply: str
    answer: str = ""
    category: str = ""
    kind: str = ""


def conversation(record_id: str, image: str, exchanges: Sequence[Exchange]) -> dict[str, Any]:
    """A record of LLaVA's form; the image stands in the first human turn."""
    turns: list[dict[str, str]] = []
    for exchange in exchanges:
        opening = "" if turns else IMAGE_LINE
        turns.append({"from": "human", "value": opening + exchange.question})
        turns.append({"from": "gpt", "value": exchange.reply})
    return {"id": record_id, "image": image, "conversations": turns}


def probe(record_id: str, image: str, exchange: Exchange) -> dict[str, str]:
    """A single question for measuring, with the bare answer."""
    return {
        "id": record_id,
        "image": image,
        "question": exchange.question,
        "answer": exchange.answer,
        "category": exchange.category,
        "kind": exchange.kind,
    }
