"""The prompts: the fixed beginning of every request of a type, and the messages of a request."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError

from data_tools.coco import AnnotatedImage, Box
from data_tools.instruct.plan.context import describe
from data_tools.instruct.schema import (
    ConversationForm,
    DetailForm,
    Line,
    Request,
    SampleType,
    Shown,
    answer_form,
)
from vlm_sft.errors import UserError
from vlm_sft.utils.reading import read_text

TYPES: Final[tuple[SampleType, ...]] = get_args(SampleType)

_WITH_QUESTION: Final = ("detail", "constraints")
"""Templates whose question is ours, in place of `{question}`; the teacher writes the answer."""
_ASK: Final = "\n---\n"
"""In a type's file, between the system text and the end of the last message."""


@dataclass(frozen=True)
class Seed:
    """A made-up image with a correct answer about it, used as an example."""

    image: AnnotatedImage
    context: str
    shown: Shown
    answer: ConversationForm | DetailForm


def messages(request: Request, templates: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the messages to send: system text, examples as earlier turns, then the context.

    All but the last message are the same for every request of a template, so that servers can
    cache them.
    """
    fixed: list[dict[str, str]] = templates[request.template]["messages"]
    return [*fixed, {"role": "user", "content": request.context}]


def make_templates(
    categories: Sequence[str], decimals: int = 2, folder: str | None = None
) -> dict[str, dict[str, Any]]:
    """Return the templates by name (a sample type), the content of `templates.json`.

    Each has `messages` (the fixed beginning), `ask` (the end of the last message), `questions`
    (ours, for `detail`), `answer_schema`, and `sha256`, the digest of all of that.

    Args:
        categories: Categories of the annotations, so that answers can say what is absent.
        decimals: Decimals of box coordinates in the examples.
        folder: The user's files, with the same names as ours.

    Raises:
        UserError: A file is missing or has another form, or an example cites an unknown label.
    """
    common = _text(folder, "common.txt").replace("{categories}", ", ".join(categories) or "nothing")
    templates: dict[str, dict[str, Any]] = {}
    for name in TYPES:
        system, ask = _task(folder, name)
        fixed = [{"role": "system", "content": f"{common}\n\n{system}"}]
        questions = description_requests(folder) if name == "detail" else []
        for number, seed in enumerate(seeds(name, folder, decimals)):
            question = questions[number % len(questions)] if questions else ""
            content = closing(seed.context, ask, question)
            fixed.append({"role": "user", "content": content})
            fixed.append({"role": "assistant", "content": _json(seed.answer.model_dump())})
        template = {
            "messages": fixed,
            "ask": ask,
            "questions": questions,
            "answer_schema": answer_form(name).model_json_schema(),
        }
        templates[name] = {**template, "sha256": digest(template)}
    return templates


def operator_template(
    name: str,
    categories: Sequence[str],
    folder: str | None = None,
    *,
    language: str = "",
    questions: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the template of an operator of `grow`, of the same form as those of types.

    Args:
        name: The operator; its file is `grow/NAME.txt`.
        categories: Categories of the annotations.
        folder: The user's files, which replace ours as far as they are there.
        language: For `{language}` in a translator's prompt, which needs no image.
        questions: Seed tasks, which new questions must not be like.

    Raises:
        UserError: A file of the user has another form.
    """
    names = {file: folder for file in ("common.txt", f"grow/{name}.txt")}
    own = {f: d for f, d in names.items() if d is not None and (Path(d) / f).is_file()}
    common = _text(own.get("common.txt"), "common.txt")
    common = common.replace("{categories}", ", ".join(categories) or "nothing")
    system, ask = _task(own.get(f"grow/{name}.txt"), f"grow/{name}")
    if language:
        system, ask = (text.replace("{language}", language) for text in (system, ask))
    else:
        # The task comes last, so that all operators' requests about a sample begin alike.
        system, ask = common, f"{system}\n\n{ask}"
    form = DetailForm if name in _WITH_QUESTION else ConversationForm
    template = {
        "messages": [{"role": "system", "content": system}],
        "ask": ask,
        "questions": list(questions),
        "answer_schema": form.model_json_schema(),
    }
    return {**template, "sha256": digest(template)}


def closing(context: str, ask: str, question: str) -> str:
    """Return the last message of a request: the context of the image and the task."""
    return f"{context}\n\n{ask.replace('{question}', question)}"


def digest(value: Any) -> str:
    """Return the SHA-256 of the value as canonical JSON: sorted keys, no spaces, UTF-8."""
    return hashlib.sha256(_json(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, **options)


def _place(folder: str | None) -> Traversable:
    return files("data_tools.instruct").joinpath("prompts") if folder is None else Path(folder)


def _text(folder: str | None, name: str) -> str:
    """Return the text of a prompt file without surrounding white space."""
    file = _place(folder).joinpath(name)
    try:
        text = read_text(file) if isinstance(file, Path) else file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"requests.prompts: {file}: there is no such file; a folder of prompts has common.txt, "
            "a file for each type, questions.txt and seeds.json",
            code="data_file_missing",
        ) from None
    except UserError as error:
        raise UserError(f"requests.prompts: {error}", code=error.reason) from None
    return text.strip()


def _task(folder: str | None, name: str) -> tuple[str, str]:
    """Return a task's part of the system text, and the end of its last message."""
    system, line, ask = _text(folder, f"{name}.txt").partition(_ASK)
    wants = name.removeprefix("grow/") in _WITH_QUESTION
    if not line or ("{question}" in ask) != wants:
        raise UserError(
            f"requests.prompts: {_place(folder)}/{name}.txt: expected the system text, a line "
            f"'---' and the end of a request, {'with' if wants else 'without'} {{question}} in it"
        )
    return system.strip(), ask.strip()


def description_requests(folder: str | None) -> list[str]:
    """Return the questions that ask for a description."""
    text = _text(folder, "questions.txt")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or len(set(lines)) < len(lines):
        raise UserError(
            f"requests.prompts: {_place(folder)}/questions.txt: expected one question a line, "
            f"each once, found {len(lines)} lines, {len(set(lines))} of them different"
        )
    return lines


class _SeedBox(Line):
    """A box as in COCO: left, top, width, height in pixels."""

    category: str
    box: tuple[float, float, float, float]
    crowd: bool = False


class _Scene(Line):
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    captions: tuple[str, ...]
    boxes: tuple[_SeedBox, ...]

    def image(self) -> AnnotatedImage:
        boxes = tuple(
            Box(one.category, *one.box, one.crowd, number)
            for number, one in enumerate(self.boxes, 1)
        )
        ids = tuple(range(1, len(self.captions) + 1))
        return AnnotatedImage(0, "seed", self.width, self.height, self.captions, boxes, ids)


class _SeedAnswer(Line):
    scene: str
    answer: dict[str, Any]


class _Seeds(Line):
    scenes: dict[str, _Scene]
    conversation: tuple[_SeedAnswer, ...] = Field(min_length=1)
    detail: tuple[_SeedAnswer, ...] = Field(min_length=1)
    reasoning: tuple[_SeedAnswer, ...] = Field(min_length=1)


def seeds(
    sample_type: SampleType, folder: str | None = None, decimals: int = 2
) -> tuple[Seed, ...]:
    """Return the examples of a type.

    Raises:
        UserError: The file has another form, or an answer cites a label that is not shown.
    """
    path = f"requests.prompts: {_place(folder)}/seeds.json"
    known = _parsed(_Seeds, _text(folder, "seeds.json"), path)
    found = []
    for number, entry in enumerate(getattr(known, sample_type)):
        where = f"{path}: {sample_type}[{number}]"
        if entry.scene not in known.scenes:
            raise UserError(f"{where}: scene {entry.scene!r} is not among the file's scenes")
        image = known.scenes[entry.scene].image()
        context = describe(image, decimals)
        answer = _parsed(answer_form(sample_type), json.dumps(entry.answer), where)
        turns = (answer,) if isinstance(answer, DetailForm) else answer.turns
        labels = {f"c{i + 1}" for i in range(len(context.shown.captions))}
        labels |= {f"b{i + 1}" for i in range(len(context.shown.boxes))}
        for label in (label for turn in turns for label in turn.evidence):
            if label not in labels:
                raise UserError(f"{where}: cites {label!r}, which its scene does not show")
        found.append(Seed(image, context.text, context.shown, answer))
    return tuple(found)


ModelT = TypeVar("ModelT", bound=BaseModel)


def _parsed(form: type[ModelT], text: str, where: str) -> ModelT:
    try:
        return form.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{where}: {place + ': ' if place else ''}{first['msg']}", code="json_syntax"
        ) from None
