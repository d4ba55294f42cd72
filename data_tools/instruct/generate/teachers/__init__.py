"""Who writes the answers: a server, its batches, or rules.

chat.py      an OpenAI-compatible server, one request at a time
batch.py     the same servers' batches
rules/       sentences read off the annotations, without any model
"""

from typing import Protocol, runtime_checkable

from data_tools.instruct.schema import Answer, Failure, Request


@runtime_checkable
class Teacher(Protocol):
    """Answers one request, or says why it cannot."""

    async def ask(self, request: Request) -> Answer | Failure:
        """The answer, or a failure that ended its attempts.

        Raises:
            UserError: No request would be answered: wrong key, model, address.
            LimitReached: The answer might cost more than the run may still spend.
            Cancelled: The run is ending, and nothing has been sent.
        """

    async def close(self) -> None:
        """Let go of connections and files."""
