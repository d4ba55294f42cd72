"""Read the records of a selection: a few numbers and a digest of each."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_tools.select.config import SelectConfig
from data_tools.select.sample_scores import (
    Samples,
    agreement,
    read_samples,
    require_same_questions,
)
from vlm_sft.best_of.questions import Question, numbered_id, question_content, questions_of
from vlm_sft.data.content_digest import content_digest
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.record_formats import RawRecord
from vlm_sft.data.records import open_raw_records, open_records
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.progress import track
from vlm_sft.utils.tar_index import file_size

if TYPE_CHECKING:
    from data_tools.review.records import Reviews


@dataclass
class RecordTable:
    """All records of a file, one row each.

    Attributes:
        ids: The records' ids; `#2` is appended to one that repeats.
        categories: Values of the category's key; "" without.
        problems: Why a record cannot be used; "" if it can.
        digests: Of the content; "" for a record that cannot be read.
        columns: Numbers by metric, NaN where there is none.
    """

    ids: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    columns: dict[str, NDArray[np.float64]] = field(default_factory=dict)


@dataclass(frozen=True)
class Read:
    """A record of the file.

    Attributes:
        record: With a reviewer's text, if it was edited.
        category: Value of the category's key; "" without.
        problem: Why a reviewer's decision leaves it out; "" otherwise.
    """

    record: Conversation | RecordError
    category: str
    problem: str = ""


def conversations(config: SelectConfig, reviews: "Reviews | None" = None) -> Iterator[Read]:
    """Yield every record in the order of the file.

    Args:
        config: The configuration.
        reviews: Decisions of reviewers; None: there are none.
    """
    file = config.data_file()
    # Categories are keys of the record as it is in the file, which a conversation does not keep.
    raw_records = open_raw_records(Path(config.path), file).records
    times: Counter[str] = Counter()
    for record, raw in zip(open_records(file).conversations, raw_records, strict=True):
        value: Any = raw.value if isinstance(raw, RawRecord) else None
        named = value.get(config.category_key) if isinstance(value, dict) else None
        category = str(named) if isinstance(named, str | int) else ""
        if reviews is None:
            yield Read(record, category)
        elif isinstance(record, Conversation):
            record, problem = reviews.applied(record, numbered_id(record.id, times))
            yield Read(record, category, problem)
        else:
            numbered_id(record.record_id, times)
            yield Read(record, category)


def read_reviews(config: SelectConfig) -> "Reviews | None":
    """Return the decisions that the configuration names; None if it names none.

    Raises:
        UserError: There are none in the folder, or annotations cannot be read.
    """
    if config.decisions is None:
        return None
    from data_tools.review.decisions import Verdicts, read_decisions
    from data_tools.review.records import Reviews
    from data_tools.review.sources import Annotations

    files = [None if name is None else Path(name) for name in (config.instances, config.captions)]
    return Reviews(Verdicts(read_decisions(config.decisions)), Annotations(*files))


def read_table(config: SelectConfig, reviews: "Reviews | None" = None) -> RecordTable:
    """Read every record once, and compute what needs no model.

    Of records with the same content only the first is usable.

    Args:
        config: The configuration.
        reviews: Decisions of reviewers; None: there are none.

    Raises:
        UserError: A file as a whole cannot be read, samples are of other questions, two records
            would get the same id, or none has the category's key that was set.
    """
    samples = None if config.samples is None else read_samples(config.samples)
    teacher = None if config.teacher_samples is None else read_samples(config.teacher_samples)
    table, seen = RecordTable(), {""}
    names = ("answer_words", "turns", "consistency", "solved", "teacher")
    rows: dict[str, list[float]] = {name: [] for name in names}
    times: Counter[str] = Counter()
    asked = hashlib.sha256()
    total = open_records(config.data_file()).total
    read = conversations(config, reviews)
    for one in track(read, total, f"reading {config.path}"):
        record, category = one.record, one.category
        identifier = record.id if isinstance(record, Conversation) else record.record_id
        table.ids.append(numbered_id(identifier, times))
        table.categories.append(category)
        digest = content_digest(record) if isinstance(record, Conversation) else ""
        problem = _image_problem(record) if isinstance(record, Conversation) else record.reason
        problem = one.problem or problem
        table.problems.append(problem or ("same as an earlier one" if digest in seen else ""))
        table.digests.append(digest)
        if not one.problem:  # the same record may be there again, and not be rejected
            seen.add(digest)
        values = dict.fromkeys(names, np.nan)
        if isinstance(record, Conversation):
            questions = questions_of(replace(record, id=table.ids[-1]))
            for question in questions:
                asked.update(question_content(question))
            values |= _measured(record, questions, samples, teacher)
        for name, value in values.items():
            rows[name].append(value)
    if "category_key" in config.model_fields_set and table.ids and not any(table.categories):
        raise UserError(
            f"{config.path}: no record has a text or a whole number at category_key = "
            f"{config.category_key!r}; name a key of the records, or remove the setting"
        )
    for drawn in filter(None, (samples, teacher)):
        require_same_questions(drawn, config.path, asked.hexdigest())
    twice = Counter(table.ids).most_common(1)
    if twice and twice[0][1] > 1:
        raise UserError(
            f"{config.path}: two records would get the id {twice[0][0]!r}: an id ends in the "
            "suffix #2 that a repeated id gets; change that id"
        )
    table.columns = {name: np.array(values, np.float64) for name, values in rows.items()}
    return table


def _image_problem(record: Conversation) -> str:
    """Return `image_missing` if an image file, or member of a tar file, is not there; else ""."""
    for image in record.images:
        if isinstance(image, Path):
            try:
                file_size(image)
            except FileNotFoundError:
                return "image_missing"
            except (OSError, UserError):
                return "image_unreadable"
    return ""


def _measured(
    record: Conversation,
    questions: Sequence[Question],
    samples: Samples | None,
    teacher: Samples | None,
) -> dict[str, float]:
    answers = [turn.text for turn in record.turns if turn.role == "assistant" and turn.supervised]
    found: dict[str, float] = {
        "answer_words": float(sum(len(text.split()) for text in answers)),
        "turns": float(len(answers)),
    }
    if samples is not None and (agreed := agreement(questions, samples)) is not None:
        found["consistency"], found["solved"] = agreed
    if teacher is not None and (agreed := agreement(questions, teacher)) is not None:
        found["teacher"] = agreed[1]
    return found
