"""Read the questions of a suite's tasks, and plan which are asked with which image."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from vlm_sft.errors import ConfigError, ImageError, UserError
from vlm_sft.evaluation.conditions import CLOSED_SETS, SuiteCondition, derangement
from vlm_sft.evaluation.scores.files import Row, read_rows
from vlm_sft.evaluation.scores.registry import LIST_KEYS, read_truth
from vlm_sft.evaluation.suites.config import TaskConfig
from vlm_sft.utils.image_paths import image_path, nearest_existing
from vlm_sft.utils.reading import parse_json, read_text

_IDS: Final = ("question_id", "id")
_IDS_OF_KIND: Final[Mapping[str, tuple[str, ...]]] = {
    "caption": ("image_id", "image", "id"),
    "chair": ("image_id", "id", "image"),
    "constraints": ("key", *_IDS),
}
"""Keys of a row's id, in the order in which each kind of score looks for them."""

_ABOUT_IMAGES: Final = frozenset({"caption", "chair"})
"""Kinds with one question per image, whose id is that of the image."""
_MAX_BYTES: Final = 2**30


@dataclass(frozen=True)
class SuiteQuestion:
    """A question of a task.

    Attributes:
        id: Unique in the task.
        image: Name of its image below the task's `images`; None without images.
        prompt: What the model is asked, with options and suffix.
        box: `[left, top, right, bottom]` of what the question is about, in pixels, if known.
    """

    id: str
    image: str | None
    prompt: str
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Task:
    """A task with its questions, and the rows of true answers that score them."""

    config: TaskConfig
    questions: list[SuiteQuestion]
    truth: list[Row]


@dataclass(frozen=True, order=True)
class Key:
    """What an answer belongs to."""

    task: str
    condition: str
    id: str


@dataclass(frozen=True)
class Shown:
    """An image to ask with.

    Attributes:
        path: The file; None: the blank image, or no image.
        change: What is done with it: one of the conditions.
        box: What `cropped` removes; None: the middle.
    """

    path: Path | None
    change: SuiteCondition | None
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Ask:
    """A prompt that is answered once, for every question that it occurs in.

    Attributes:
        prompt: Text of the user.
        max_tokens: Longest answer.
        keys: The questions.
    """

    prompt: str
    max_tokens: int
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class ImageAsks:
    """All that is asked about one image, as shown under one condition.

    Attributes:
        shown: The image.
        name: Its name in `answers.jsonl`; None: no image file.
        asks: The prompts.
    """

    shown: Shown
    name: str | None
    asks: tuple[Ask, ...]


def read_task(config: TaskConfig, *, seed: int) -> Task:
    """Read a task's questions and true answers.

    Raises:
        UserError: A file is missing or malformed, a question has no image or no text, or an id
            appears twice.
        ImageError: An image name leads out of the task's `images`.
    """
    files = [Path(name) for name in config.files]
    rows = [row for path in files for row in read_rows(path, (*LIST_KEYS, "images"))]
    truth = read_truth(config.kind, [Path(name) for name in config.truth or config.files])
    if config.kind == "multiple_choice":
        rows = [_with_options(row, config, seed) for row in rows]
        truth = rows if not config.truth else truth
    names = _file_names(files) if config.images is not None else {}
    questions: dict[str, SuiteQuestion] = {}
    for number, row in enumerate(rows):
        question = _question(row, number, config, names)
        if question.id not in questions:
            questions[question.id] = question
        elif config.kind not in _ABOUT_IMAGES:
            raise row.refusal(f"the id {question.id} appears twice; give each file its own task")
    chosen = _first_images(list(questions.values()), config.max_images)
    kept = {question.id for question in chosen}
    truth = [
        _with_id(row, name, config.kind)
        for number, row in enumerate(truth)
        if (name := row_id(row, config.kind, number)) in kept
    ]
    if not truth:
        raise UserError(
            f"{', '.join(map(str, config.truth or config.files))}: no true answer belongs to a "
            f"question of task {config.name}; compare the ids",
            code="data_file_unreadable",
        )
    return Task(config, chosen, truth)


def plan(tasks: Sequence[Task], *, seed: int, batch_size: int) -> list[list[ImageAsks]]:
    """Return what is asked, in batches of about `batch_size` prompts.

    The plan depends on nothing but its arguments, so that an evaluation that goes on answers the
    same batches. Everything about one image is together; a prompt that occurs several times with
    the same image and limit is asked once.
    """
    by_image: dict[Shown, dict[tuple[str, int], list[Key]]] = {}
    names: dict[Shown, str | None] = {}
    for task in tasks:
        others = _other_images(task, seed)
        for condition in task.config.conditions:
            for question in task.questions:
                shown, name = _shown(task.config, question, condition, others)
                names.setdefault(shown, name)
                prompts = by_image.setdefault(shown, {})
                key = Key(task.config.name, condition, question.id)
                prompts.setdefault((question.prompt, task.config.max_tokens), []).append(key)
    groups = [
        ImageAsks(shown, names[shown], tuple(asks[start : start + batch_size]))
        for shown, prompts in by_image.items()
        for asks in [[Ask(text, limit, tuple(keys)) for (text, limit), keys in prompts.items()]]
        for start in range(0, len(asks), batch_size)
    ]
    batches: list[list[ImageAsks]] = []
    room = 0
    for group in groups:
        if len(group.asks) > room:
            batches.append([])
            room = batch_size
        batches[-1].append(group)
        room -= len(group.asks)
    return batches


def options_text(choices: Iterable[str]) -> str:
    """Return options with letters, one per line."""
    return "\n".join(f"{chr(ord('A') + n)}. {choice}" for n, choice in enumerate(choices))


def _question(row: Row, number: int, config: TaskConfig, names: Mapping[str, str]) -> SuiteQuestion:
    # `text` is the question in POPE's and LLaVA's files, and the caption in those of captions.
    keys = (
        ("prompt", "question") if config.kind in _ABOUT_IMAGES else ("prompt", "question", "text")
    )
    text = row.get(*keys)
    text = config.prompt if text is None else text
    if not isinstance(text, str) or not text.strip():
        raise row.refusal("has no text under question, prompt or text; or set the task's `prompt`")
    text = text.replace("<image>", "").strip()
    if config.kind == "multiple_choice" and config.choices != "hidden":
        text = f"{text}\n{options_text(row.values['choices'])}"
    if config.suffix:
        text = f"{text}\n{config.suffix}"
    box = row.get("box")
    is_box = isinstance(box, list) and len(box) == 4
    return SuiteQuestion(
        row_id(row, config.kind, number),
        None if config.images is None else _image(row, config, names),
        text,
        tuple(map(float, box)) if is_box else None,  # type: ignore[arg-type]
    )


def row_id(row: Row, kind: str, number: int = 0) -> str:
    """Return the id of a row of questions or true answers; its position if it has none."""
    keys = _IDS_OF_KIND.get(kind, _IDS)
    value = row.get(*keys)
    return str(number if value is None else value)


def _with_id(row: Row, name: str, kind: str) -> Row:
    """Return a row with its id, which may be its position among rows that are not used."""
    if kind in _ABOUT_IMAGES or row.get("key", *_IDS) is not None:
        return row
    return replace(row, values={**row.values, "question_id": name})


def _image(row: Row, config: TaskConfig, names: Mapping[str, str]) -> str:
    assert config.images is not None
    name = row.get("image", "file_name")
    if name is None:
        identifier = (
            row.get("image_id", "id") if config.kind in _ABOUT_IMAGES else row.get("image_id")
        )
        if config.image_name is not None and identifier is not None:
            try:
                number = int(identifier) if str(identifier).isdigit() else identifier
                name = config.image_name.format(image_id=number)
            except (ValueError, KeyError, IndexError) as error:
                raise ConfigError(f"task {config.name}: image_name: {error}") from None
        else:
            name = names.get(str(identifier))
    if not isinstance(name, str):
        raise row.refusal("names no image; set the task's `image_name`, or add `image` to the rows")
    try:
        path = image_path(config.images, name, follow_symlinks=config.follow_symlinks)
    except ImageError as error:
        raise UserError(f"{row.place}: {error}", code=error.reason) from None
    if not path.exists():
        raise UserError(
            f"{row.place}: no such image {path}{nearest_existing(path)}", code="image_missing"
        )
    return name


def _file_names(paths: Sequence[Path]) -> dict[str, str]:
    """Return image file names by id, from COCO's list of `images` in the files, if any."""
    names: dict[str, str] = {}
    for path in paths:
        if path.suffix != ".json":
            continue
        value: Any = parse_json(read_text(path, _MAX_BYTES))
        images = value.get("images") if isinstance(value, dict) else None
        for image in images if isinstance(images, list) else []:
            if isinstance(image, dict) and isinstance(image.get("file_name"), str):
                names[str(image.get("id"))] = image["file_name"]
    return names


def _with_options(row: Row, config: TaskConfig, seed: int) -> Row:
    """Return a row whose `choices` are in the order that is shown, and whose answer is a number."""
    from vlm_sft.evaluation.scores.exact import choices_of, true_choice

    row = _with_closed_set(row)
    choices = choices_of(row)
    order = list(range(len(choices)))
    if config.choices == "shuffled":
        random.Random(f"{seed} {row.place}").shuffle(order)
    answer = order.index(true_choice(row, choices))
    changed = {"choices": [choices[number] for number in order], "answer": answer}
    values = {key: value for key, value in row.values.items() if key not in ("options", "label")}
    return replace(row, values={**values, **changed})


def _with_closed_set(row: Row) -> Row:
    """Return a row with `choices`; those of its answer's closed set if it has none."""
    answer = row.get("answer", "label")
    if row.get("choices", "options") is not None or not isinstance(answer, str):
        return row
    closed = next((closed for closed in CLOSED_SETS if answer.lower() in closed), None)
    return row if closed is None else replace(row, values={**row.values, "choices": list(closed)})


def _first_images(questions: list[SuiteQuestion], count: int | None) -> list[SuiteQuestion]:
    if count is None:
        return questions
    images = set(
        list(dict.fromkeys(question.image or question.id for question in questions))[:count]
    )
    return [question for question in questions if (question.image or question.id) in images]


def _other_images(task: Task, seed: int) -> Mapping[str, str]:
    if "shuffled" not in task.config.conditions:
        return {}
    return derangement((question.image or "" for question in task.questions), seed=seed)


def _shown(
    config: TaskConfig,
    question: SuiteQuestion,
    condition: SuiteCondition,
    others: Mapping[str, str],
) -> tuple[Shown, str | None]:
    """Return the image to show, and its name for `answers.jsonl`."""
    if config.images is None or question.image is None:
        return Shown(None, None), None
    if condition == "blank":
        return Shown(None, "blank"), None
    name = others[question.image] if condition == "shuffled" else question.image
    # Whether links may leave the directory was decided when the task was read.
    path = image_path(config.images, name, follow_symlinks=True)
    if condition == "cropped":
        return Shown(path, condition, question.box), name
    return Shown(path, condition if condition == "blurred" else "right"), name
