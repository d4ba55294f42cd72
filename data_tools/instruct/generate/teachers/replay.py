"""Answers that another run recorded, given again."""

from pathlib import Path

from data_tools.instruct.config import TeacherConfig
from data_tools.instruct.generate.answers import read_answers
from data_tools.instruct.schema import Answer, Failure, Request
from vlm_sft.errors import UserError


class ReplayTeacher:
    """Looks requests up in a folder of recorded answers; sends nothing, costs nothing.

    Tokens and dollars stay those of the recorded answer: what it took to make it.
    """

    def __init__(self, config: TeacherConfig) -> None:
        """Open the folder.

        Raises:
            UserError: None is named, or it is not there.
        """
        if config.replay_from is None:
            raise UserError("teacher.replay_from is not set; name a folder of recorded answers")
        folder = Path(config.replay_from)
        if not folder.is_dir():
            raise UserError(
                f"teacher.replay_from: {folder} is no folder; name one of recorded answers",
                code="data_file_missing",
            )
        self._recorded = read_answers(folder)

    async def ask(self, request: Request) -> Answer | Failure:
        recorded = self._recorded.get(request.id)
        if recorded is None:
            return Failure(
                request=request.id,
                sample_id=request.sample_id,
                reason="not_recorded",
                message=f"{self._recorded.folder} holds no answer to this request",
            )
        return recorded.model_copy(update={"teacher": "replay"})

    async def close(self) -> None:
        self._recorded.close()
