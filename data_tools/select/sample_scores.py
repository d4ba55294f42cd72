"""Scores of records from samples that models have drawn: consistency, solved, agreement."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_sft.best_of.graders import final_answer, is_right
from vlm_sft.best_of.questions import Question
from vlm_sft.best_of.sample_lines import SAMPLES
from vlm_sft.errors import UserError
from vlm_sft.utils.keyed_log import SETTINGS
from vlm_sft.utils.reading import open_regular, parse_json, read_json


@dataclass
class Samples:
    """The samples of a `samples.jsonl`, without those that were cut or not asked.

    Attributes:
        path: The file.
        texts: By question id.
        unmatched: Ids of questions that no record has had yet.
        data: The file that the questions were read from.
        questions: Digest of those questions, of `questions_digest`.
    """

    path: str
    texts: dict[str, list[str]]
    unmatched: set[str]
    data: str
    questions: str


def read_samples(path: str) -> Samples:
    """Read samples, and which questions they were drawn for.

    Raises:
        UserError: The file or the `settings.json` next to it is missing or not of `vlm-sft sample`,
            or a sample is there twice.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file of samples", code="data_file_missing")
    settings = Path(path).parent / SETTINGS
    try:
        data = read_json(settings)["data"]
        named, questions = str(data["path"]), str(data["questions"])
    except (OSError, UserError, KeyError, TypeError):
        raise UserError(
            f"{path}: there is no {SETTINGS} of `vlm-sft sample` next to it, which says what "
            "questions the samples answer; name the file in the folder that the command wrote",
            code="data_file_missing",
        ) from None
    texts: dict[str, list[str]] = {}
    seen: set[tuple[str, int]] = set()
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            try:
                row = SAMPLES.read(parse_json(line.decode()))
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{path}:{number}: not a sample of `vlm-sft sample` ({error})",
                    code="data_file_unreadable",
                ) from None
            if row.key in seen:
                raise UserError(
                    f"{path}:{number}: sample {row.sample} of question {row.id!r} is there twice; "
                    "the file was edited or damaged: remove that line",
                    code="data_file_unreadable",
                )
            seen.add(row.key)
            if row.ended:
                texts.setdefault(row.id, []).append(row.text)
    return Samples(path, texts, {name for name, _ in seen}, named, questions)


def require_same_questions(samples: Samples, path: str, questions: str) -> None:
    """Refuse samples of other questions.

    Args:
        samples: The samples, after `agreement` of all records.
        path: The file of records.
        questions: Digest of its questions, of `questions_digest`.

    Raises:
        UserError: The samples were drawn for other questions, or have an unknown id.
    """
    if samples.questions != questions:
        raise UserError(
            f"{samples.path}: samples of {samples.data}, whose questions and answers differ from "
            f"those of {path}; draw samples of this file with `vlm-sft sample`"
        )
    if samples.unmatched:
        raise UserError(
            f"{samples.path}: a sample to an unknown question {min(samples.unmatched)!r}; the file "
            "was edited or damaged: remove that line",
            code="data_file_unreadable",
        )


def agreement(questions: Sequence[Question], samples: Samples) -> tuple[float, float] | None:
    """Return how consistent the samples of a record are, and how many give its answer.

    Args:
        questions: The questions of the record.
        samples: The samples; the questions' ids are removed from `unmatched`.

    Returns:
        Means over the record's questions: the share of samples with the most frequent final answer,
        and the share with the record's answer. None if a question has no sample.
    """
    consistent, right = [], []
    samples.unmatched.difference_update(question.id for question in questions)
    for question in questions:
        texts = samples.texts.get(question.id)
        if not texts:
            return None
        answers = Counter(map(final_answer, texts))
        consistent.append(answers.most_common(1)[0][1] / len(texts))
        right.append(sum(is_right(text, question.reference) for text in texts) / len(texts))
    return (sum(consistent) / len(consistent), sum(right) / len(right)) if right else None
