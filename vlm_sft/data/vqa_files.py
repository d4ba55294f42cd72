"""Read VQA files: a JSON object of questions, and one of annotations with their answers."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from vlm_sft.data.record_formats import Columns, RawRecord, RawRecords
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.json_items import RawJson, map_file, split_list, split_object
from vlm_sft.utils.reading import StrictJsonError, parse_json

KEYS: Final = ("questions", "annotations")
"""A JSON object with one of these keys is a VQA file."""

_COLUMNS: Final = Columns(id="question_id", image="image", question="question", answer="answer")
CATEGORIES: Final = ("question_type", "answer_type", "type")
"""Keys of questions and annotations that name a category; training ignores them."""

_IMAGE_KEYS: Final = ("image", "file_name", "image_name", "image_path")


def open_vqa(path: Path, annotations: Path | None, image_name: str | None) -> RawRecords:
    """Open questions with their answers, as VQA v2 and OK-VQA publish them.

    The answer is `multiple_choice_answer`, `answer`, or the most frequent one of `answers`, the
    first of those that are equally frequent. Questions without an answer, answers without a
    question, and repeated ids are each the error of one record.

    Args:
        path: An object with `questions`, and with `annotations` unless those have their own file.
        annotations: The file with `annotations`; None: they are in `path`, or the questions have
            their answers themselves.
        image_name: Name of the image of an `image_id`, e.g. `COCO_train2014_{image_id:012d}.jpg`;
            None: the questions name it, or it is that of COCO for the file's `data_subtype`.

    Raises:
        UserError: A file has neither questions nor annotations, or nothing names the images.
    """
    table = _object(path)
    if "questions" not in table:
        if "images" in table:
            raise UserError(
                f"{path}: holds no record but COCO's annotations; make records of them with "
                "`vlm-sft data build_coco`"
            )
        raise UserError(
            f"{path}: has annotations without questions; give the file of questions as `path` and "
            "this one as `annotations`",
            code="missing_column",
        )
    questions = split_list(path, bytes(table["questions"]))
    place = path if annotations is None else annotations
    answers = table if annotations is None else _object(annotations)
    if annotations is not None and "annotations" not in answers:
        raise UserError(f"{annotations}: no `annotations` in it", code="missing_column")
    entries = split_list(place, bytes(answers["annotations"])) if "annotations" in answers else None
    if entries is None and questions and not _has_answer(_value(bytes(questions[0]))):
        likely = path.with_name(path.name.replace("questions", "annotations"))
        hint = f", e.g. {likely}" if likely != path and likely.exists() else ""
        raise UserError(
            f"{path}: its questions have no answers; name their file as `annotations` (--answers "
            f"of `vlm-sft sample`){hint}",
            code="missing_column",
        )
    subtype = _value(bytes(table.get("data_subtype", b"null")))
    name = image_name or _coco_name(subtype)
    total = len(questions)
    return RawRecords(total, _read(path, questions, place, entries, name), columns=_COLUMNS)


def _object(path: Path) -> dict[str, RawJson]:
    try:
        return split_object(map_file(path))
    except StrictJsonError as error:
        raise UserError(f"{path}: {error}", code=error.reason) from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of annotations", code="data_file_missing") from None


def _value(data: bytes) -> Any:
    try:
        return parse_json(data.decode("utf-8"))
    except StrictJsonError:
        return None


def _coco_name(subtype: object) -> str | None:
    if not isinstance(subtype, str) or not subtype.isalnum():
        return None
    return f"COCO_{subtype}_{{image_id:012d}}.jpg" if subtype.endswith("2014") else None


def _read(
    path: Path,
    questions: list[RawJson],
    place: Path,
    entries: list[RawJson] | None,
    image_name: str | None,
) -> Iterator[RawRecord | RecordError]:
    answers, errors = _answers(place, entries or [])
    yield from errors
    seen: set[Any] = set()
    for index, item in enumerate(questions):
        where, fallback_id = f"{path}[questions][{index}]", f"index-{index}"
        question = _value(bytes(item))
        if not isinstance(question, Mapping):
            message = "expected a question as an object of strict JSON"
            yield RecordError("format", message, record_id=fallback_id, where=where)
            continue
        key = question.get("question_id")
        record_id = fallback_id if key is None else str(key)
        if not isinstance(key, (int, str, type(None))):
            message = f"`question_id` must be text or a whole number, found {key!r}"[:200]
            yield RecordError("bad_id", message, record_id=fallback_id, where=where)
            continue
        if key is not None and key in seen:
            message = f"question_id {key!r} appears a second time; keep one question"
            yield RecordError("repeated_row", message, record_id=record_id, where=where)
            continue
        seen.add(key)
        answer, categories = _best_answer(question), _categories(question)
        if entries is not None:
            answer, found = answers.pop(key, (None, {}))
            categories |= found
        if answer is None:
            message = "a question without an answer; add its annotation or remove it"
            yield RecordError("unpaired", message, record_id=record_id, where=where)
            continue
        try:
            image = _image_of(question, image_name)
        except ValueError as error:
            yield RecordError("image_field", str(error), record_id=record_id, where=where)
            continue
        row = {**categories, "question_id": key, "image": image, "answer": answer}
        yield RawRecord({**row, "question": question.get("question")}, where, record_id)
    for key in answers:
        message = f"an annotation for question_id {key!r}, which has no question; remove it"
        yield RecordError("unpaired", message, record_id=str(key), where=f"{place}[annotations]")


def _answers(
    place: Path, entries: list[RawJson]
) -> tuple[dict[Any, tuple[str | None, dict[str, Any]]], list[RecordError]]:
    """Return the answer and the categories of each question id, and the errors of annotations."""
    answers: dict[Any, tuple[str | None, dict[str, Any]]] = {}
    errors = []
    for index, item in enumerate(entries):
        where, record_id = f"{place}[annotations][{index}]", f"annotation-{index}"
        entry = _value(bytes(item))
        key = entry.get("question_id") if isinstance(entry, Mapping) else None
        if not isinstance(key, (int, str)):
            message = "expected an annotation with a `question_id`"
            errors.append(RecordError("format", message, record_id=record_id, where=where))
        elif key in answers:
            message = f"question_id {key!r} has a second annotation; keep one"
            errors.append(RecordError("repeated_row", message, record_id=str(key), where=where))
        else:
            answers[key] = _best_answer(entry), _categories(entry)
    return answers, errors


def _categories(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in CATEGORIES if isinstance(entry.get(key), str)}


def _has_answer(question: Any) -> bool:
    return isinstance(question, Mapping) and _best_answer(question) is not None


def _best_answer(entry: Mapping[str, Any]) -> str | None:
    """Return the answer to train on, or None."""
    for key in ("multiple_choice_answer", "answer"):
        if isinstance(entry.get(key), str):
            return str(entry[key])
    given = entry.get("answers")
    texts = [
        answer.get("answer") if isinstance(answer, Mapping) else answer
        for answer in (given if isinstance(given, list) else [])
    ]
    counts = Counter(text for text in texts if isinstance(text, str))
    return counts.most_common(1)[0][0] if counts else None


def _image_of(question: Mapping[str, Any], image_name: str | None) -> Any:
    """Return the image's name.

    Raises:
        ValueError: Nothing names it.
    """
    for key in _IMAGE_KEYS:
        if question.get(key):
            return question[key]
    image_id = question.get("image_id")
    if image_id is None or image_name is None:
        raise ValueError(
            f"names no image ({', '.join(_IMAGE_KEYS)}); set `image_name` next to `path` to the "
            "name of an image_id, e.g. {image_id}.jpg or COCO_train2014_{image_id:012d}.jpg"
        )
    try:
        return image_name.format(image_id=image_id)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`image_name` {image_name!r} does not fit image_id {image_id!r} ({error})"
        ) from None
