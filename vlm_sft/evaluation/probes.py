"""Questions with a known answer: which of the possible answers is likeliest, or is given."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vlm_sft.data.images import to_pixels
from vlm_sft.errors import ImageError, UserError
from vlm_sft.evaluation.branches import Branch, score_branches
from vlm_sft.evaluation.conditions import CONDITIONS, Condition
from vlm_sft.evaluation.probe_files import read_rows
from vlm_sft.evaluation.statistics import balanced_accuracy_interval, interval_of_shares
from vlm_sft.inference.loaded_model import VlmRun, question
from vlm_sft.utils.escape import shortened
from vlm_sft.utils.image_paths import image_path

CLOSED_SETS = (("yes", "no"), ("left", "right"), ("top", "bottom"))


@dataclass(frozen=True)
class Probe:
    """A question about an image, its answer, and the answers that it is chosen among."""

    id: str
    image: str
    question: str
    answer: str
    kind: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What the model chose.

    Attributes:
        log_probabilities: Of the probe's choices, in their order; empty where it spoke freely.
        spoken: The answer that it gave; None where it was only asked how likely the choices are.
    """

    probe: Probe
    log_probabilities: tuple[float, ...] = ()
    spoken: str | None = None

    @property
    def choice(self) -> str:
        """The likeliest answer, of equals the first; or the one it gave, `""` for none of them."""
        if self.spoken is not None:
            return spoken_choice(self.spoken, self.probe.choices) or ""
        return self.probe.choices[int(np.argmax(self.log_probabilities))]

    @property
    def correct(self) -> bool:
        """Whether it is the true one."""
        return self.choice == self.probe.answer


@dataclass(frozen=True)
class Task:
    """A probe to be asked about an image that need not be its own.

    Attributes:
        shown: The image's file name; None is the blank image.
        measure: What the probe belongs to, e.g. the name of its file.
    """

    probe: Probe
    condition: Condition
    shown: str | None
    measure: str = ""


def read_probes(path: Path) -> list[Probe]:
    """Read a file of probes; see `probe_files` for its forms.

    Yes/no, left/right and top/bottom are chosen between the two; any other answer among all
    answers of the file of its kind.

    Raises:
        UserError: The file is missing or of no such form; the record is named.
    """
    rows = read_rows(path)
    open_sets: dict[str, set[str]] = {}
    for row in rows:
        open_sets.setdefault(row["kind"], set()).add(row["answer"])
    return [Probe(**row, choices=_choices(row, open_sets)) for row in rows]


def require_images_inside(
    path: Path, probes: Sequence[Probe], images_dir: Path, *, follow_symlinks: bool = False
) -> None:
    """Refuse probes of the file `path` whose image lies outside of `images_dir`.

    Raises:
        UserError: With the probe's id.
    """
    for probe in probes:
        try:
            image_path(images_dir, probe.image, follow_symlinks=follow_symlinks)
        except ImageError as error:
            shown = shortened(probe.id, 100)
            raise UserError(f"{path}: probe {shown!r}: {error}", code=error.reason) from None


def _choices(row: Mapping[str, str], open_sets: Mapping[str, set[str]]) -> tuple[str, ...]:
    closed = closed_set(row["answer"])
    return closed if len(closed) > 1 else tuple(sorted(open_sets[row["kind"]]))


def closed_set(answer: str) -> tuple[str, ...]:
    """`yes` and `no` for either of them, likewise the sides; any other answer alone."""
    return next((closed for closed in CLOSED_SETS if answer in closed), (answer.lower(),))


def spell(answer: str) -> str:
    """As the short training answers are spelled: `Yes.` for `yes`."""
    return answer[:1].upper() + answer[1:] + "."


def spoken_choice(answer: str, choices: Sequence[str]) -> str | None:
    """The last of `choices` that stands in `answer` as a word; None if there is none.

    The last one counts, since an answer may give its evidence first: `I see no cat, so no.`
    """
    words = re.findall(r"\w+", answer.lower())
    found = [word for word in words if word in choices]
    return found[-1] if found else None


def derangement(names: Iterable[str], *, seed: int) -> dict[str, str]:
    """Another image for each image, never itself: one cycle through all of them.

    Raises:
        UserError: There are fewer than two.
    """
    unique = sorted(set(names))
    if len(unique) < 2:
        raise UserError("the shuffled condition needs at least two images; leave it out")
    order = [unique[i] for i in np.random.default_rng(seed).permutation(len(unique))]
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def blank_pixels(run: VlmRun) -> Tensor:
    """An image of the tower's mean color, uint8 `[3, size, size]`."""
    size = run.image_spec.size
    red, green, blue = (int(255 * value) for value in run.image_spec.mean)
    image = Image.new("RGB", (size, size), (red, green, blue))
    return to_pixels(image, run.image_spec, run.aspect)


def tasks_of(
    probes: Sequence[Probe],
    conditions: Sequence[Condition] = CONDITIONS,
    *,
    measure: str = "",
    seed: int = 0,
) -> list[Task]:
    """Every probe under every condition, with the image that is shown for it.

    Raises:
        UserError: `shuffled` is asked for, but all probes are about one image.
    """
    names = [probe.image for probe in probes]
    shown: dict[Condition, Mapping[str, str | None]] = {
        "right": {name: name for name in names},
        "blank": dict.fromkeys(names),
        "shuffled": derangement(names, seed=seed) if "shuffled" in conditions else {},
    }
    return [
        Task(probe, condition, shown[condition][probe.image], measure)
        for condition in conditions
        for probe in probes
    ]


def require_questions(run: VlmRun) -> None:
    """Make sure that the model gets to see what it is asked.

    Raises:
        UserError: Its template leaves the user's words out, as LLaVA's `plain` of stage 1 does.
    """
    one, other = (run.prompt_ids(question(text, [b""])) for text in ("One?", "Other?"))
    if one == other:
        raise UserError(
            f"the checkpoint's template {run.config.data.template!r} leaves questions out, so it "
            "cannot be probed; measure a stage 2 checkpoint, or this one by --captions alone"
        )


def ask(
    run: VlmRun, tasks: Sequence[Task], images_dir: Path, *, batch_size: int = 96
) -> Iterator[tuple[Task, Verdict]]:
    """Every task with the answer that the model gives freely and greedily.

    What is asked twice about one image (the blank one, mostly) is answered once.

    Raises:
        ImageError: An image is missing or broken.
    """
    alike: dict[tuple[str, str | None], list[Task]] = {}
    for task in tasks:
        alike.setdefault((task.probe.question, task.shown), []).append(task)
    asked = sorted(alike, key=lambda pair: len(pair[0]))  # little padding in a batch
    embeds: dict[str | None, Tensor] = {}  # every image goes through the tower once
    for start in range(0, len(asked), batch_size):
        group = asked[start : start + batch_size]
        new = list(dict.fromkeys(shown for _, shown in group if shown not in embeds))
        if new:
            pixels = [_pixels(run, shown, images_dir) for shown in new]
            embeds |= zip(new, run.image_embeds(pixels), strict=True)
        prompts = [run.prompt_ids(question(text, [b""])) for text, _ in group]
        answers = run.answers(prompts, [embeds[shown] for _, shown in group])
        for pair, answer in zip(group, answers, strict=True):
            for task in alike[pair]:
                yield task, Verdict(task.probe, spoken=answer)


def judge(run: VlmRun, tasks: Sequence[Task], images_dir: Path) -> Iterator[tuple[Task, Verdict]]:
    """Every task with its verdict, in the order of the images shown.

    Whatever is asked about one image, in whichever file and condition, is asked together, so an
    image (the blank one too) goes through the tower and the language model once.

    Raises:
        ImageError: An image is missing or broken.
    """
    by_image: dict[str | None, list[Task]] = {}
    for task in tasks:
        by_image.setdefault(task.shown, []).append(task)
    for shown, asked in by_image.items():
        pixels = _pixels(run, shown, images_dir)
        verdicts = judge_image(run, [task.probe for task in asked], pixels)
        yield from zip(asked, verdicts, strict=True)


def _pixels(run: VlmRun, shown: str | None, images_dir: Path) -> Tensor:
    if shown is None:
        return blank_pixels(run)
    # Symbolic links are the caller's decision: `require_images_inside`.
    return run.pixels(image_path(images_dir, shown, follow_symlinks=True))


def judge_image(run: VlmRun, probes: Sequence[Probe], pixels: Tensor) -> list[Verdict]:
    """Verdicts of questions about one image, in their order."""
    spelled = {choice for probe in probes for choice in probe.choices}
    answers = {choice: run.chat_tokenizer.answer_ids(spell(choice)) for choice in spelled}
    branches = [
        Branch(
            run.prompt_ids(question(probe.question, [b""])),
            [answers[choice] for choice in probe.choices],
        )
        for probe in probes
    ]
    scores = score_branches(run, branches, pixels)
    return [Verdict(p, found) for p, found in zip(probes, scores, strict=True)]


def summarize(verdicts: Sequence[Verdict], *, seed: int = 0) -> dict[str, Any]:
    """Accuracy, balanced accuracy, share of each choice, in all and by kind.

    Intervals are 95 % percentile bootstraps over images (Wilson's over images where all
    answers are alike right or wrong).
    """
    kinds = sorted({verdict.probe.kind for verdict in verdicts})
    summary = _summary(verdicts, seed)
    summary["by_kind"] = {
        k: _summary([v for v in verdicts if v.probe.kind == k], seed) for k in kinds
    }
    return summary


def _summary(verdicts: Sequence[Verdict], seed: int) -> dict[str, Any]:
    correct = [verdict.correct for verdict in verdicts]
    images = [verdict.probe.image for verdict in verdicts]
    truths = [verdict.probe.answer for verdict in verdicts]
    chosen = [verdict.choice for verdict in verdicts]
    return {
        "questions": len(verdicts),
        "images": len(set(images)),
        "accuracy": interval_of_shares(correct, images, seed=seed).as_dict(),
        "balanced_accuracy": balanced_accuracy_interval(
            correct, truths, images, seed=seed
        ).as_dict(),
        "chosen": {name: chosen.count(name) / len(chosen) for name in sorted(set(chosen))},
        "chance": sum(1 / len(v.probe.choices) for v in verdicts) / len(verdicts),
    }
