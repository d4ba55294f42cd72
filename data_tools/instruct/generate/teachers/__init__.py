"""Who writes the answers: a server, its batches, or rules.

chat.py      an OpenAI-compatible server, one request at a time
batch.py     the same servers' batches
rules/       sentences read off the annotations, without any model
"""

from typing import Protocol, runtime_checkable

from data_tools.instruct.schema import Answer, Failure, Request


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
