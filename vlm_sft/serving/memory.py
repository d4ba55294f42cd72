"""Bound the memory that requests hold before and while they are answered."""

from types import TracebackType

from vlm_sft.serving.errors import RequestError


class Memory:
    """Counts the bytes of all requests; used in the thread of the event loop only.

    Args:
        most: Bytes of all requests together.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.used = 0

    def hold(self) -> "Held":
        """Return the share of a request, which is given back when the block ends."""
        return Held(self)

    def change(self, size: int) -> None:
        """Add a number of bytes, or give them back if negative.

        Raises:
            RequestError: There is no room for them now.
        """
        if size > 0 and self.used + size > self._most:
            raise RequestError(429, "server_busy", "too many large requests at once; try again")
        self.used += size


class Held:
    """The share of one request."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._size = 0

    def __enter__(self) -> "Held":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.resize(0)

    def resize(self, size: int) -> None:
        """Hold this number of bytes from now on.

        Raises:
            RequestError: There is no room for them now; as many as before are held.
        """
        self._memory.change(size - self._size)
        self._size = size
