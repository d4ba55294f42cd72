"""The kinds of scores: one entry each, for `score` and for evaluation suites."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vlm_sft.evaluation.scores.files import Answers, Row, read_rows
from vlm_sft.evaluation.scores.results import Options, Results

LIST_KEYS: Final = ("annotations", "questions", "data")
"""Keys of an object that hold the rows, e.g. in COCO's and VQAv2's files."""

Score = Callable[[Answers, Sequence[Row], Options], Results]


@dataclass(frozen=True)
class Kind:
    """A kind of score.

    Attributes:
        summary: What it compares, for `--help`.
        truth: The keys of a truth row, for `--help`.
        judged: It needs a judge model.
    """

    summary: str
    truth: str
    judged: bool = False


KINDS: Final[Mapping[str, Kind]] = {
    "pope": Kind(
        "yes/no answers: accuracy, precision, recall, F1, share of yes, under five readings",
        '"label": "yes" or "no"; optionally "image"',
    ),
    "caption": Kind(
        "captions: CIDEr-D, BLEU-1 to BLEU-4, ROUGE-L against COCO's reference captions",
        '"image_id" and "caption", several rows per image (COCO\'s captions_*.json)',
    ),
    "chair": Kind(
        "objects in descriptions that are not in the image: CHAIRi, CHAIRs, recall",
        'COCO\'s instances_*.json and captions_*.json, or rows with "objects" or "captions"',
    ),
    "vqa": Kind(
        "VQAv2's accuracy against ten human answers",
        '"answers": the human answers (VQAv2\'s annotations)',
    ),
    "gqa": Kind("equality with the true answer, without case and final period", '"answer"'),
    "multiple_choice": Kind(
        "letters or option texts, with the share of each position",
        '"choices": ["a dog", ...] and "answer": a letter, a text, or a number from 0',
    ),
    "counting": Kind("exact counts, mean absolute error", '"answer": 3'),
    "grounding": Kind(
        "boxes by intersection over union (IoU)",
        '"box": [left, top, right, bottom], or COCO\'s "bbox"',
    ),
    "constraints": Kind(
        "instructions that a program can check (IFEval), strict and loose",
        '"instruction_id_list" and "kwargs" (IFEval\'s files)',
    ),
    "refusal": Kind(
        "refusals of answerable, confident answers to unanswerable questions, by image condition",
        '"answerable": true or false; optionally "image" and "condition"',
    ),
    "mt-bench": Kind(
        "conversations graded from 1 to 10 by a judge model (MT-Bench)",
        '"turns": [questions]; optionally "category" and "reference": [right answers]',
        judged=True,
    ),
    "alpaca": Kind(
        "win rate against a baseline, plain and length-controlled (AlpacaEval)",
        '"instruction" (or "question", "prompt")',
        judged=True,
    ),
    "arena": Kind(
        "Bradley-Terry and Elo ratings of several models, by a judge model",
        '"instruction" (or "question", "prompt")',
        judged=True,
    ),
}
"""Every kind of score, by the name that `score` and suites know it by."""


def read_truth(kind: str, paths: Sequence[Path]) -> list[Row]:
    """Return the rows of the true answers of a kind, of all files together.

    Raises:
        UserError: A file is missing or malformed.
    """
    if kind == "chair":
        from vlm_sft.evaluation.scores.chair import read_chair_truth

        return read_chair_truth(paths)
    return [row for path in paths for row in read_rows(path, LIST_KEYS)]


def score(
    kind: str, answers: Answers, truth: Sequence[Row], options: Options | None = None
) -> Results:
    """Return the scores of one kind.

    Args:
        kind: A name of `KINDS`.
        answers: Texts by question id.
        truth: Rows of `read_truth`.
        options: Settings; None for the defaults.

    Raises:
        UserError: A row is malformed, or no answer belongs to a question.
    """
    return _scorer(kind)(answers, truth, options or Options())


def _scorer(kind: str) -> Score:
    if KINDS[kind].judged:
        from vlm_sft.evaluation.scores import judged

        return {
            "mt-bench": judged.score_mt_bench,
            "alpaca": judged.score_alpaca,
            "arena": judged.score_arena,
        }[kind]
    from vlm_sft.evaluation.scores import captions, chair, constraints, exact, pope, refusal, vqa

    scorers: dict[str, Score] = {
        "pope": pope.score_pope,
        "caption": captions.score_caption,
        "chair": chair.score_chair,
        "vqa": vqa.score_vqa,
        "gqa": exact.score_gqa,
        "multiple_choice": exact.score_multiple_choice,
        "counting": exact.score_counting,
        "grounding": exact.score_grounding,
        "constraints": constraints.score_constraints,
        "refusal": refusal.score_refusal,
    }
    return scorers[kind]
