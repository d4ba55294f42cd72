"""The questions of training records, each with what is said before it and the answer known."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from vlm_sft.config.schema import DataFile
from vlm_sft.data.content_digest import image_content, turns_content
from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.data.records import open_records
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.progress import track


@dataclass(frozen=True)
class Question:
    """A question of a record.

    Attributes:
        id: The record's id; `ID/2` for the second question of a record with several, and with a
            suffix `#2` where ids of records repeat.
        prompt: The record up to the question. Earlier answers are not supervised.
        reference: The record's answer.
    """

    id: str
    prompt: Conversation
    reference: str


def read_questions(file: DataFile) -> tuple[list[Question], Counter[str]]:
    """Return the questions of a file of records in order, and how many records are left out why.

    Every answer that the record trains on is a question of its own.

    Raises:
        UserError: The file cannot be read, or has no usable record.
    """
    questions: list[Question] = []
    left_out: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    records = open_records(file)
    for record in track(records.conversations, records.total, f"reading {file.path}"):
        if isinstance(record, RecordError):
            left_out[record.reason] += 1
            numbered_id(record.record_id, seen)
            continue
        name = numbered_id(record.id, seen)
        questions += questions_of(replace(record, id=name))
    twice = Counter(question.id for question in questions).most_common(1)
    if twice and twice[0][1] > 1:
        raise UserError(
            f"{file.path}: two questions would get the id {twice[0][0]!r}: an id of a record ends "
            "in a suffix that questions get (/2, #2); change that id"
        )
    if not questions:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in left_out.items())
        raise UserError(
            f"{file.path}: has no record with an answer to train on ({reasons or 'it is empty'})",
            code="no_records",
        )
    return questions, left_out


def numbered_id(identifier: str, seen: Counter[str]) -> str:
    """Return a record's id, with the suffix `#2` at its second time; `seen` counts them."""
    seen[identifier] += 1
    return identifier if seen[identifier] == 1 else f"{identifier}#{seen[identifier]}"


def questions_of(record: Conversation) -> list[Question]:
    """Return the supervised questions of a record."""
    places = [i for i, t in enumerate(record.turns) if t.role == "assistant" and t.supervised]
    questions = []
    for number, place in enumerate(places, 1):
        before = tuple(
            replace(turn, supervised=False) if turn.role == "assistant" else turn
            for turn in record.turns[:place]
        )
        shown = sum(isinstance(part, ImagePart) for turn in before for part in turn.parts)
        name = record.id if len(places) == 1 else f"{record.id}/{number}"
        prompt = replace(record, id=name, turns=before, images=record.images[:shown])
        questions.append(Question(name, prompt, record.turns[place].text))
    return questions


def question_content(question: Question) -> bytes:
    """Return a digest of a question's id, what is said before it, and the record's answer."""
    digest = hashlib.sha256(turns_content(question.prompt))
    named = json.dumps([question.id, question.reference])
    digest.update(named.encode("utf-8", "surrogatepass"))
    return digest.digest()


def questions_digest(questions: Iterable[Question]) -> str:
    """Return a digest of questions and their answers in order, without their images."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(question_content(question))
    return digest.hexdigest()


def images_digest(questions: Sequence[Question]) -> str:
    """Return a digest of the images of questions; of a file, of its name, size and time."""
    images = list(dict.fromkeys(image for one in questions for image in one.prompt.images))
    digest = hashlib.sha256()
    for image in track(images, description="looking for changed images"):
        digest.update(image_content(image))
    return digest.hexdigest()


def answered(question: Question, answer: str) -> Conversation:
    """Return the question with an answer, as a training record."""
    turn = Turn("assistant", (TextPart(answer),))
    return replace(question.prompt, turns=(*question.prompt.turns, turn))


def last_text(question: Question) -> str:
    """Return the text of the question itself."""
    return question.prompt.turns[-1].text.strip()


def plan(
    questions: Sequence[Question], num_samples: int, batch_size: int
) -> list[list[tuple[Question, int]]]:
    """Return the samples to draw, in batches of at most `batch_size`.

    Questions with the same images are together. The plan depends on nothing but its arguments, so
    that a run that goes on draws the same batches.

    Args:
        questions: The questions.
        num_samples: Samples per question.
        batch_size: Samples that go through the model together.
    """
    by_images: dict[object, list[Question]] = {}
    for question in questions:
        by_images.setdefault(question.prompt.images, []).append(question)
    samples = [
        (question, number)
        for group in by_images.values()
        for question in group
        for number in range(num_samples)
    ]
    return [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
