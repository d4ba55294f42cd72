"""Create the teacher that a configuration names."""

from typing import TYPE_CHECKING

from data_tools.instruct.config import InstructConfig
from data_tools.instruct.generate.teachers import Teacher
from data_tools.instruct.generate.teachers.cancellation import Cancellation
from data_tools.instruct.generate.teachers.spending import Spending
from data_tools.instruct.index import read_images
from data_tools.instruct.plan.command import read_templates
from data_tools.instruct.run_folder import RunFolder

if TYPE_CHECKING:
    from data_tools.instruct.generate.teachers.batch import BatchTeacher


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
    if config.teacher.kind == "batch":
        from data_tools.instruct.generate.teachers.batch import BatchTeacher

        return BatchTeacher(
            config.teacher, read_templates(folder), spending, cancellation, seed=config.seed,
            found=folder.teacher, batches=folder.batches,
        )  # fmt: skip
    from data_tools.instruct.generate.teachers.chat import ChatTeacher

    return ChatTeacher(
        config.teacher, read_templates(folder), spending, cancellation, seed=config.seed,
        found=folder.teacher,
    )  # fmt: skip
