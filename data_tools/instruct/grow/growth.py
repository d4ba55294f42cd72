"""Verify the samples of a grown run: against what they were grown from, and against the images."""

from collections.abc import Mapping, Sequence
from typing import Final

from data_tools.coco import AnnotatedImage
from data_tools.instruct.grow.checks import GrowthChecks, fault
from data_tools.instruct.grow.constraints import broken, describe
from data_tools.instruct.grow.operators import OPERATORS
from data_tools.instruct.grow.refusals import check_answers
from data_tools.instruct.grow.several_images import by_image
from data_tools.instruct.grow.translation import ENGLISH, check_translation, claims_of_parent
from data_tools.instruct.lines import read_lines
from data_tools.instruct.plan.command import read_templates
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Check, Grown, Request, Sample, Turn
from data_tools.instruct.verify import Policy, check_sample, check_several
from vlm_sft.errors import UserError

_OF_ANY_LANGUAGE: Final = frozenset({"IMAGE_MARK", "ROLE_MARK", "INJECTION"})
"""Codes of checks that need no English."""

Judged = tuple[tuple[Turn, ...], tuple[Check, ...]]
"""All turns of a sample, and everything that was found about them."""


class Growth:
    """What the samples of a grown run are compared with.

    Args:
        parents: The samples that they were grown from, by id.
        images: The index.
        tasks: Questions of seed tasks.
    """

    def __init__(
        self,
        parents: Mapping[str, Sample],
        images: Mapping[int, AnnotatedImage],
        tasks: Sequence[str] = (),
    ) -> None:
        self._parents, self._images = parents, images
        known = (turn.question for parent in parents.values() for turn in parent.turns)
        self._checks = GrowthChecks([*tasks, *known])

    def judged(self, request: Request, turns: tuple[Turn, ...], policy: Policy) -> Judged:
        """Return all turns of a sample, and everything found about them.

        Raises:
            UserError: The request does not say what it was grown from, or that is missing.
        """
        grown = request.grown
        if grown is None or grown.operator not in OPERATORS:
            raise UserError(
                f"request {request.sample_id}: does not say what it was grown from; run `grow` "
                "again (recorded answers are kept)"
            )
        image = self._images[request.image]

        def claims(said: tuple[Turn, ...]) -> tuple[Check, ...]:
            return check_sample(said, request.type, image, request.shown, policy)

        match grown.operator:
            case "translate":
                return self._translated(grown, turns, claims(turns), policy)
            case "multi-image":
                images = [image, *(self._image(one.id) for one in grown.images)]
                parts, faults = by_image(turns, len(images))
                checks = check_several(turns, parts, images, request.shown, policy)
                return turns, (*faults, *checks)
            case "refuse":
                # Which questions have no answer is known here, whatever the teacher says.
                kinds = [task.kind for task in grown.tasks]
                kinds += [turn.kind for turn in turns[len(kinds) :]]
                turns = tuple(
                    turn.model_copy(update={"kind": kind})
                    for turn, kind in zip(turns, kinds, strict=False)
                )
                checks = claims(turns)
                return turns, (*check_answers(grown.tasks, turns, checks), *checks)
            case "constraints":
                faults = [
                    fault("CONSTRAINT_BROKEN", describe(one), 0, "answer")
                    for one in broken(turns[0].answer, grown.constraints)
                ]
                return turns, (*faults, *claims(turns))
            case "self-instruct":
                return turns, (*self._checks.check_new_tasks(turns), *claims(turns))
            case name:
                operator, parent = OPERATORS[name], self._parent(grown)
                found = self._checks.check(operator, turns, parent)
                if operator.continues:
                    turns = (*parent.turns, *turns)
                return turns, (*found, *claims(turns))

    def keep(self, request: Request, turns: Sequence[Turn]) -> None:
        """Remember the questions of an accepted sample; later ones must differ from them."""
        if request.grown is None or request.grown.operator != "translate":
            self._checks.keep(request.image, turns)

    def _translated(
        self, grown: Grown, turns: tuple[Turn, ...], claims: tuple[Check, ...], policy: Policy
    ) -> Judged:
        parent, language = self._parent(grown), grown.language or ""
        faults = tuple(check_translation(parent.turns, turns, language))
        if len(turns) == len(parent.turns):
            turns = tuple(
                new.model_copy(update={"kind": old.kind, "evidence": old.evidence})
                for old, new in zip(parent.turns, turns, strict=True)
            )
        if language == ENGLISH:
            return turns, (*faults, *claims)
        marks = tuple(check for check in claims if check.code in _OF_ANY_LANGUAGE)
        image = self._image(parent.image.id)
        of_parent = check_sample(parent.turns, parent.type, image, parent.shown, policy)
        return turns, (*faults, *marks, *claims_of_parent(of_parent, language))

    def _parent(self, grown: Grown) -> Sample:
        found = self._parents.get(grown.parents[0]) if grown.parents else None
        if found is None:
            raise UserError(
                f"the parent {', '.join(grown.parents)} is not in parents.jsonl; run `grow` again"
            )
        return found

    def _image(self, number: int) -> AnnotatedImage:
        if number not in self._images:
            raise UserError(f"image {number} is not in the run's images.jsonl; run `grow` again")
        return self._images[number]


def read_growth(folder: RunFolder, images: Mapping[int, AnnotatedImage]) -> Growth | None:
    """Return what the samples of a grown run are compared with; None for another run."""
    if not folder.parents.exists():
        return None
    parents = {sample.id: sample for sample in read_lines(folder.parents, Sample)}
    tasks = read_templates(folder).get("self-instruct", {}).get("questions", ())
    return Growth(parents, images, tasks)
