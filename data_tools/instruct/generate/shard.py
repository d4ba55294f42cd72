"""One of several parts of the requests, for several machines."""

import argparse
import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `count` parts of the requests."""

    number: int = 1
    count: int = 1

    def holds(self, request_id: str) -> bool:
        """Return whether the request is in this part, which depends on its id alone."""
        return sum(request_id.encode()) % self.count == self.number - 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Return the shard that `i/n` names: `2/8` is the second of eight."""
        number, _, count = text.partition("/")
        digits = re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}", text)
        if not (digits and 1 <= int(number) <= int(count)):
            raise argparse.ArgumentTypeError("expected i/n, with i from 1 to n")
        return cls(int(number), int(count))


ALL_REQUESTS: Final = Shard()
"""The only part of one."""
