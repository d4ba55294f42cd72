"""Grade samples of a model against COCO's boxes and captions, for `vlm-sft sample`."""

from collections.abc import Sequence
from pathlib import Path

from data_tools.coco import read_coco
from data_tools.instruct.config import VerifyConfig
from data_tools.instruct.schema import Shown, Turn
from data_tools.instruct.verify import Policy, check_sample, reasons
from data_tools.instruct.verify.llava_records import ImageFinder, kind_of, type_of
from vlm_sft.best_of.graders import Candidate, Grade, Grader
from vlm_sft.utils.progress import track


def verifier(instances: Path, captions: Path) -> Grader:
    """Return a grader that rejects samples with a claim that the annotations contradict.

    A sample of which the annotations support nothing is not acceptable either: text without any
    claim contradicts nothing, and a model at a high temperature writes such text. The grade is the
    number of supported claims minus that of unknown ones. A sample whose image has no annotations
    cannot be checked and is not acceptable.

    Args:
        instances: COCO's `instances_*.json`.
        captions: COCO's `captions_*.json`.

    Raises:
        UserError: A file cannot be read.
    """
    index = read_coco(instances, captions)
    policy = Policy(VerifyConfig(), index.categories)
    finder = ImageFinder(index.images)

    def grade_one(candidate: Candidate) -> Grade:
        images = candidate.question.prompt.images
        name = images[0].name if len(images) == 1 and isinstance(images[0], Path) else ""
        image = finder.find(name)
        if image is None:
            return Grade(0.0, False, "IMAGE_NOT_ANNOTATED")
        turns = _turns(candidate)
        checks = [
            check
            for check in check_sample(turns, type_of(turns), image, Shown(), policy)
            if check.turn in (None, len(turns) - 1)
        ]
        verdicts = [check.verdict for check in checks if check.part != "question"]
        value = verdicts.count("supported") - verdicts.count("unknown")
        codes = list(reasons(checks))
        # The claim of "Yes." is that of its question.
        if not any(check.verdict == "supported" for check in checks):
            codes.append("NOTHING_SUPPORTED")
        return Grade(float(value), not codes, codes[0] if codes else "")

    def grade(candidates: Sequence[Candidate]) -> list[Grade]:
        return [grade_one(one) for one in track(candidates, None, "verifying samples")]

    return grade


def _turns(candidate: Candidate) -> tuple[Turn, ...]:
    """Return the exchanges up to the sample, which is the last answer."""
    said = [turn.text.strip() for turn in candidate.question.prompt.turns if turn.role != "system"]
    said.append(candidate.text)
    return tuple(
        Turn(question=question, answer=answer, kind=kind_of(question))
        for question, answer in zip(said[::2], said[1::2], strict=True)
    )
