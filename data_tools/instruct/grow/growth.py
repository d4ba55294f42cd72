"""The parents of a grown run, and what its samples are compared with."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from data_tools.instruct.grow.operators import OPERATORS, GrowthChecks, parent_of
from data_tools.instruct.lines import read_lines
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Check, Request, Sample, Turn
from vlm_sft.errors import UserError


@dataclass(frozen=True)
class Growth:
    """The parents by id, and the questions that were grown before."""

    parents: Mapping[str, Sample]
    checks: GrowthChecks = field(default_factory=GrowthChecks)

    def judged(
        self, request: Request, turns: tuple[Turn, ...]
    ) -> tuple[tuple[Turn, ...], tuple[Check, ...]]:
        """Return all turns of a grown sample, and what is wrong in comparison with its parent.

        Raises:
            UserError: The parent is not in the run's `parents.jsonl`.
        """
        origin = parent_of(request.sample_id)
        if origin is None or origin[0] not in self.parents:
            raise UserError(
                f"request {request.sample_id}: its parent is not in parents.jsonl; run `grow` again"
            )
        parent, operator = self.parents[origin[0]], OPERATORS[origin[1]]
        found = self.checks.check(operator, turns, parent)
        return ((*parent.turns, *turns) if operator.continues else turns), tuple(found)


def read_parents(folder: RunFolder) -> dict[str, Sample]:
    """Return the parents of a grown run by id; none for another run."""
    if not folder.parents.exists():
        return {}
    return {sample.id: sample for sample in read_lines(folder.parents, Sample)}
