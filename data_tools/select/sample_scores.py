"""Scores of records from samples that models have drawn: consistency, solved, agreement."""

import json
from collections import Counter
from pathlib import Path

from vlm_sft.best_of.graders import final_answer, is_right
from vlm_sft.best_of.questions import questions_of
from vlm_sft.data.conversation import Conversation
from vlm_sft.errors import UserError
from vlm_sft.utils.reading import open_regular


def read_samples(path: str) -> dict[str, list[str]]:
    """Return the texts of samples by question id, without those that were cut or not asked.

    Raises:
        UserError: The file is missing or not one of `vlm-sft sample`.
    """
    texts: dict[str, list[str]] = {}
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file of samples", code="data_file_missing")
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if row["ended"]:
                    texts.setdefault(row["id"], []).append(row["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}:{number}: not a sample of `vlm-sft sample` ({error})",
                    code="data_file_unreadable",
                ) from None
    return texts


def agreement(record: Conversation, samples: dict[str, list[str]]) -> tuple[float, float] | None:
    """Return how consistent the samples of a record are, and how many give its answer.

    Args:
        record: The record.
        samples: Texts by question id.

    Returns:
        Means over the record's questions: the share of samples with the most frequent final answer,
        and the share with the record's answer. None if a question has no sample.
    """
    consistent, right = [], []
    for question in questions_of(record):
        texts = samples.get(question.id)
        if not texts:
            return None
        answers = Counter(map(final_answer, texts))
        consistent.append(answers.most_common(1)[0][1] / len(texts))
        right.append(sum(is_right(text, question.reference) for text in texts) / len(texts))
    return (sum(consistent) / len(consistent), sum(right) / len(right)) if right else None
