"""Who writes the answers: a server (`chat.py`), its batches (`batch.py`), or rules (`rules.py`)."""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from data_tools.instruct.config import InstructConfig
from data_tools.instruct.generate.teachers.cancellation import Cancellation
from data_tools.instruct.generate.teachers.spending import Spending
from data_tools.instruct.index import read_images
from data_tools.instruct.plan.command import read_templates
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Answer, Failure, Request

if TYPE_CHECKING:
    from data_tools.instruct.generate.teachers.batch import BatchTeacher


@runtime_checkable
class Teacher(Protocol):
    """Answers one request, or returns why it cannot."""

    async def ask(self, request: Request) -> Answer | Failure:
        """Return the answer, or the failure of the last attempt.

        Raises:
            UserError: Every request would fail: wrong key, model or address.
            LimitReached: The answer might cost more than the run may still spend.
            Cancelled: The run was asked to stop, and nothing was sent.
        """

    async def close(self) -> None:
        """Close connections and files."""


def make_teacher(
    config: InstructConfig, folder: RunFolder, spending: Spending, cancellation: Cancellation
) -> "Teacher | BatchTeacher":
    """Return the teacher of a configuration.

    Raises:
        UserError: Its settings, its key or the files it needs are invalid.
    """
    if config.teacher.kind == "rules":
        from data_tools.instruct.generate.teachers.rules import RulesTeacher

        return RulesTeacher(read_images(folder))
    given = config.teacher, read_templates(folder), spending, cancellation
    if config.teacher.kind == "batch":
        from data_tools.instruct.generate.teachers.batch import BatchTeacher

        return BatchTeacher(*given, seed=config.seed, found=folder.teacher, batches=folder.batches)
    from data_tools.instruct.generate.teachers.chat import ChatTeacher

    return ChatTeacher(*given, seed=config.seed, found=folder.teacher)
