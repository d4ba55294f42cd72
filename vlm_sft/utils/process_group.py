"""Run an action on rank 0 or on all ranks, and raise its error on every rank.

Without this, an error on one rank leaves the others waiting in their next collective until the
process group times out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from vlm_sft.errors import UserError

Value = TypeVar("Value")


@dataclass(frozen=True)
class ProcessGroup:
    """The ranks that act together. The default is a single process.

    Attributes:
        rank: The rank of this process.
        all_gather: A collective that takes any picklable value of each rank and returns the values
            of all ranks, ordered by rank.
    """

    rank: int = 0
    all_gather: Callable[[Any], list[Any]] = lambda value: [value]

    def rank0_then_broadcast(self, action: Callable[[], Value]) -> Value:
        """Call `action` on rank 0 and return its result, or raise its error, on every rank."""
        result: Value | None = None
        error = None
        if self.rank == 0:
            result, error = _result_or_error(action)
        result, error = self.all_gather((result, error))[0]
        if error is not None:
            raise error
        return cast(Value, result)

    def all_ranks(self, action: Callable[[], None]) -> None:
        """Call `action` on every rank; an error of any rank is raised on all of them."""
        _, own_error = _result_or_error(action)
        for error in self.all_gather(own_error):
            if error is not None:
                raise error


def _result_or_error(action: Callable[[], Value]) -> tuple[Value | None, Exception | None]:
    # Only expected errors travel between ranks. A bug ends this process with its own traceback.
    try:
        return action(), None
    except (UserError, OSError) as error:
        return None, error
