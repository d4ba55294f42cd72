"""Which image goes with a question."""

from typing import Literal

Condition = Literal["right", "blank", "shuffled"]
CONDITIONS: tuple[Condition, ...] = ("right", "blank", "shuffled")
