"""The configuration of an evaluation suite: its tasks and how each is asked and scored."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from vlm_sft.config import loading
from vlm_sft.config.fields import Count, Fraction, NonEmptyText
from vlm_sft.config.loading import Section
from vlm_sft.evaluation.conditions import SuiteCondition
from vlm_sft.evaluation.scores.registry import KINDS
from vlm_sft.evaluation.scores.results import DEFAULT_READING, Reading, Verdict


class ScoringConfig(Section):
    """How the answers to a task are read."""

    reading: Reading = DEFAULT_READING
    """`pope`: the reading of yes and no that decides whether an answer is right. The results have
    the scores of all readings."""
    verdict: Verdict = "first"
    """`counting`, `multiple_choice`: which number or option of an answer counts; `last` is for
    models that say what they see first (`I see two cats and a boat, so two.`)."""
    iou: Fraction = 0.5
    """`grounding`: the smallest IoU of a box that counts as right."""


class TaskConfig(Section):
    """Questions of one kind with known answers."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    """Name of the task in the results: letters, digits, `-` and `_`."""
    kind: NonEmptyText
    """What the answers are and how they are scored: a kind of `vlm-sft score`."""
    files: list[NonEmptyText] = Field(min_length=1)
    """Files of questions; with their true answers, unless `truth` has them."""
    truth: list[NonEmptyText] = Field(default=[])
    """Files of true answers by question id, such as VQAv2's annotations. Empty: those in
    `files`."""
    images: NonEmptyText | None = None
    """Directory that image names start from. Null: the questions have no images."""
    image_name: NonEmptyText | None = None
    """Name of an image whose question has only an `image_id`, e.g.
    `COCO_val2014_{image_id:012d}.jpg`. Null: COCO's list of `images` in the file has it."""
    follow_symlinks: bool = False
    """Allow symbolic links below `images` to lead out of it."""
    prompt: NonEmptyText | None = None
    """Question to ask where a row has none, e.g. for captions."""
    suffix: str = ""
    """Text after every question, on a line of its own. LLaVA: `Answer the question using a single
    word or phrase.`"""
    choices: Literal["given", "shuffled", "hidden"] = "given"
    """`multiple_choice`: show the options in the order of the file, or in a random one per
    question, which exposes a preference for a position; or do not show them (`hidden`). Without
    `choices`, a question has those of its closed set (yes/no, left/right, top/bottom)."""
    scoring: ScoringConfig = ScoringConfig()
    conditions: list[SuiteCondition] = Field(default=["right"], min_length=1)
    """Images to ask with: the `right` one, a `blank` one, that of another question (`shuffled`),
    the right one `blurred`, or `cropped`: without its middle or the question's box."""
    max_tokens: Annotated[int, Field(gt=0, le=65_536)] = 64
    """Longest answer in tokens."""
    max_images: Count | None = None
    """Use only the questions about the first images. Null: all."""

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        known = [name for name in KINDS if name not in NOT_ASKED]
        if kind not in known:
            raise ValueError(f"expected one of {', '.join(known)} (found {kind!r})")
        return kind

    @model_validator(mode="after")
    def _conditions_fit(self) -> "TaskConfig":
        twice = [name for name, count in Counter(self.conditions).items() if count > 1]
        if twice:
            raise ValueError(f"conditions: {twice[0]} is there twice; remove one")
        if self.images is None and self.conditions != ["right"]:
            raise ValueError("conditions: a task without `images` has only `right`; remove others")
        if self.kind == "refusal" and not {"right", "blank"}.issuperset(self.conditions):
            raise ValueError(
                "conditions: `refusal` has only right and blank, because nobody knows what can be "
                "answered with other images"
            )
        return self


NOT_ASKED = frozenset({"mt-bench", "alpaca", "arena"})
"""Kinds of scores that compare models or conversations; suites do not ask such questions."""


class SuiteConfig(Section):
    """The configuration of a suite: the whole YAML file."""

    tasks: list[TaskConfig] = Field(min_length=1)
    """The tasks, in the order of the results."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the shuffled images, of the order of options and of the bootstrap intervals."""

    @model_validator(mode="after")
    def _names_differ(self) -> "SuiteConfig":
        for name, count in Counter(task.name for task in self.tasks).items():
            if count > 1:
                raise ValueError(f"tasks: two tasks are named {name}; rename one")
        return self

    def input_paths(self) -> list[Path]:
        """Return the files of questions and true answers."""
        return [Path(name) for task in self.tasks for name in (*task.files, *task.truth)]

    def image_roots(self) -> list[Path]:
        """Return the directories of images."""
        return [Path(task.images) for task in self.tasks if task.images is not None]


def load_suite(path: str | Path) -> SuiteConfig:
    """Read a suite. Paths in it are relative to the current directory, as in all configurations.

    Raises:
        ConfigError: One sentence with the file, the key, the value and what was expected.
    """
    return loading.load(SuiteConfig, path)
