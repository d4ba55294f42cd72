"""Ask questions with known answers, and compare the model's predictions with them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image
from torch import Tensor

from vlm_sft.data.image_layout import ImageLayout
from vlm_sft.data.images import ImageCrops, to_crops
from vlm_sft.errors import ImageError, UserError
from vlm_sft.evaluation.conditions import (
    CLOSED_SETS,
    IMAGE_CONDITIONS,
    ImageCondition,
    derangement,
)
from vlm_sft.evaluation.intervals import balanced_accuracy_interval, interval_of_shares
from vlm_sft.evaluation.question_files import read_rows
from vlm_sft.evaluation.scoring import Candidates, score_answers
from vlm_sft.inference.generate import generate_greedy
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.inference.prompts import user_message
from vlm_sft.utils.escape import shortened
from vlm_sft.utils.image_paths import image_path

MAX_ANSWER_TOKENS: Final = 64
"""Length of free-form answers."""


@dataclass(frozen=True)
class Question:
    """A question about an image, its true answer, and all possible answers."""

    id: str
    image: str
    question: str
    answer: str
    kind: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """The model's answer to a question.

    Attributes:
        question: The question.
        log_probabilities: Of the question's choices, in their order; empty for a free-form answer.
        free_form: Text that the model generated; None if its choices were scored.
    """

    question: Question
    log_probabilities: tuple[float, ...] = ()
    free_form: str | None = None

    @property
    def choice(self) -> str:
        """The chosen answer: the most likely one, or the one in the text; "" for neither."""
        if self.free_form is not None:
            return last_choice(self.free_form, self.question.choices) or ""
        return self.question.choices[int(np.argmax(self.log_probabilities))]

    @property
    def correct(self) -> bool:
        """Whether the chosen answer is the true one."""
        return self.choice == self.question.answer


@dataclass(frozen=True)
class EvalItem:
    """A question to be asked with an image that need not be its own.

    Attributes:
        question: The question.
        condition: How the image was chosen.
        shown: File name of the image; None is the blank image.
        measure: Group of the question in the results, e.g. the name of its file.
    """

    question: Question
    condition: ImageCondition
    shown: str | None
    measure: str = ""


def read_questions(path: Path) -> list[Question]:
    """Read a file of questions (formats: `question_files`).

    The choices of yes/no, left/right and top/bottom questions are these two. Those of any other
    question are all answers in the file to questions of its kind.

    Raises:
        UserError: The file is missing or malformed; the message names the row.
    """
    rows = read_rows(path)
    answers_of_kind: dict[str, set[str]] = {}
    for row in rows:
        answers_of_kind.setdefault(row["kind"], set()).add(row["answer"])
    return [Question(**row, choices=_choices(row, answers_of_kind)) for row in rows]


def require_images_inside(
    path: Path, questions: Sequence[Question], images_dir: Path, *, follow_symlinks: bool = False
) -> None:
    """Refuse questions of the file `path` whose image is outside of `images_dir`.

    Raises:
        UserError: The message has the question's id.
    """
    for asked in questions:
        try:
            image_path(images_dir, asked.image, follow_symlinks=follow_symlinks)
        except ImageError as error:
            shown = shortened(asked.id, 100)
            raise UserError(f"{path}: question {shown!r}: {error}", code=error.reason) from None


def _choices(row: Mapping[str, str], answers_of_kind: Mapping[str, set[str]]) -> tuple[str, ...]:
    closed = closed_set(row["answer"])
    return closed if len(closed) > 1 else tuple(sorted(answers_of_kind[row["kind"]]))


def closed_set(answer: str) -> tuple[str, ...]:
    """Return the answer's closed set, e.g. `yes` and `no`; an answer without one alone."""
    return next((closed for closed in CLOSED_SETS if answer in closed), (answer.lower(),))


def answer_text(answer: str) -> str:
    """Return an answer in the form of the short training answers: `Yes.` for `yes`."""
    return answer[:1].upper() + answer[1:] + "."


def last_choice(text: str, choices: Sequence[str]) -> str | None:
    """Return the last of `choices` that occurs as a word in `text`; None if there is none.

    The last one counts, because a model may give its evidence first: `I see no cat, so no.`
    """
    words = re.findall(r"\w+", text.lower())
    found = [word for word in words if word in choices]
    return found[-1] if found else None


def blank_image(loaded: LoadedModel) -> ImageCrops:
    """Return a square image of the tower's mean color."""
    size = loaded.image_spec.size
    red, green, blue = (int(255 * value) for value in loaded.image_spec.mean)
    image = Image.new("RGB", (size, size), (red, green, blue))
    return to_crops(image, loaded.model.layout_rule, loaded.image_spec, loaded.image_aspect)


def make_items(
    questions: Sequence[Question],
    conditions: Sequence[ImageCondition] = IMAGE_CONDITIONS,
    *,
    measure: str = "",
    seed: int = 0,
) -> list[EvalItem]:
    """Return every question under every condition, with the image to show.

    Raises:
        UserError: `shuffled` is a condition, but all questions are about one image.
    """
    names = [asked.image for asked in questions]
    shown: dict[ImageCondition, Mapping[str, str | None]] = {
        "right": {name: name for name in names},
        "blank": dict.fromkeys(names),
        "shuffled": derangement(names, seed=seed) if "shuffled" in conditions else {},
    }
    return [
        EvalItem(asked, condition, shown[condition][asked.image], measure)
        for condition in conditions
        for asked in questions
    ]


def require_questions_in_prompt(loaded: LoadedModel) -> None:
    """Check that the chat template writes the user's text into the prompt.

    Raises:
        UserError: It does not, as `plain` of LLaVA's stage 1.
    """
    prompt = loaded.chat_tokenizer.prompt
    one, other = (prompt(user_message(text, [b""])) for text in ("One?", "Other?"))
    if one == other:
        name = loaded.chat_tokenizer.template.name
        raise UserError(
            f"the checkpoint's template {name!r} leaves questions out, so "
            "none can be asked; evaluate a stage 2 checkpoint, or use only --captions"
        )


def generate_predictions(
    loaded: LoadedModel, items: Sequence[EvalItem], images_dir: Path, *, batch_size: int = 96
) -> Iterator[tuple[EvalItem, Prediction]]:
    """Yield every item with the answer that the model generates greedily.

    A question that is asked several times with the same image (mostly the blank one) is answered
    once.

    Raises:
        ImageError: An image is missing or broken.
    """
    same: dict[tuple[str, str | None], list[EvalItem]] = {}
    for item in items:
        same.setdefault((item.question.question, item.shown), []).append(item)
    # Questions of similar length share a batch, so little of it is padding.
    pairs = sorted(same, key=lambda pair: len(pair[0]))
    # Every image goes through the tower once.
    layouts: dict[str | None, ImageLayout] = {}
    embeds: dict[str | None, Tensor] = {}
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        new = list(dict.fromkeys(shown for _, shown in batch if shown not in embeds))
        if new:
            images = [_load(loaded, shown, images_dir) for shown in new]
            layouts |= zip(new, [image.layout for image in images], strict=True)
            embeds |= zip(new, loaded.encode_images(images), strict=True)
        prompts = [
            loaded.prompt_ids(user_message(text, [b""]), [layouts[shown]]) for text, shown in batch
        ]
        answers = generate_greedy(
            loaded.model,
            loaded.chat_tokenizer,
            prompts,
            image_embeds=[embeds[shown] for _, shown in batch],
            max_new_tokens=MAX_ANSWER_TOKENS,
        )
        for pair, answer in zip(batch, answers, strict=True):
            for item in same[pair]:
                yield item, Prediction(item.question, free_form=answer)


def score_predictions(
    loaded: LoadedModel, items: Sequence[EvalItem], images_dir: Path
) -> Iterator[tuple[EvalItem, Prediction]]:
    """Yield every item with the log-probabilities of its choices, grouped by image.

    All questions with one image, of all files and conditions, are scored together, so an image
    goes through the tower and the language model once.

    Raises:
        ImageError: An image is missing or broken.
    """
    by_image: dict[str | None, list[EvalItem]] = {}
    for item in items:
        by_image.setdefault(item.shown, []).append(item)
    for shown, group in by_image.items():
        image = _load(loaded, shown, images_dir)
        predictions = score_image(loaded, [item.question for item in group], image)
        yield from zip(group, predictions, strict=True)


def _load(loaded: LoadedModel, shown: str | None, images_dir: Path) -> ImageCrops:
    if shown is None:
        return blank_image(loaded)
    # Whether links may leave the directory was decided by `require_images_inside`.
    return loaded.load_image(image_path(images_dir, shown, follow_symlinks=True))


def score_image(
    loaded: LoadedModel, questions: Sequence[Question], image: ImageCrops
) -> list[Prediction]:
    """Return the predictions of questions about one image, in their order.

    Args:
        loaded: The model.
        questions: Questions to score.
        image: The image.
    """
    choices = {choice for asked in questions for choice in asked.choices}
    ids = {choice: loaded.chat_tokenizer.answer_ids(answer_text(choice)) for choice in choices}
    candidates = [
        Candidates(
            loaded.prompt_ids(user_message(asked.question, [b""]), [image.layout]),
            [ids[choice] for choice in asked.choices],
        )
        for asked in questions
    ]
    scores = score_answers(loaded, candidates, image)
    return [Prediction(asked, found) for asked, found in zip(questions, scores, strict=True)]


def summarize(predictions: Sequence[Prediction], *, seed: int = 0) -> dict[str, Any]:
    """Return accuracy, balanced accuracy and the share of each choice, in total and by kind.

    Intervals are 95 % percentile bootstraps over images; if all answers are right, or all wrong,
    they are Wilson intervals over images.
    """
    kinds = sorted({prediction.question.kind for prediction in predictions})
    summary = _summary(predictions, seed)
    summary["by_kind"] = {
        kind: _summary([p for p in predictions if p.question.kind == kind], seed) for kind in kinds
    }
    return summary


def _summary(predictions: Sequence[Prediction], seed: int) -> dict[str, Any]:
    correct = [prediction.correct for prediction in predictions]
    images = [prediction.question.image for prediction in predictions]
    truths = [prediction.question.answer for prediction in predictions]
    chosen = [prediction.choice for prediction in predictions]
    return {
        "questions": len(predictions),
        "images": len(set(images)),
        "accuracy": interval_of_shares(correct, images, seed=seed).as_dict(),
        "balanced_accuracy": balanced_accuracy_interval(
            correct, truths, images, seed=seed
        ).as_dict(),
        "chosen": {name: chosen.count(name) / len(chosen) for name in sorted(set(chosen))},
        "chance": sum(1 / len(p.question.choices) for p in predictions) / len(predictions),
    }
