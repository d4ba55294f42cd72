"""Log every start of a run, what it changed, and where its time went: `starts.jsonl`."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from vlm_sft.utils.filesystem import naming

Phase = Literal["setup", "training", "evaluation", "saving"]


class RunHistory:
    """Measure the phases of one start of a run, and append its events to `starts.jsonl`.

    A row has the time (`at`), the `step`, and an `event`: `started` (with the settings, the
    software and the machine), `saved` or `ended`, both with the `seconds` of each phase since the
    start. A killed process leaves the seconds up to its last save.

    Phases do not overlap: what is saved during an evaluation counts as `saving` alone.

    Args:
        path: The file; None measures and writes nothing, as on ranks other than 0.
        clock: Seconds that only grow.
    """

    def __init__(self, path: Path | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._phases: list[Phase] = ["setup"]
        self._since = clock()
        self._started = False

    def start(self, step: int, total_steps: int, **about: Any) -> None:
        """Log that training starts.

        Args:
            step: Steps done before; 0 for a new run.
            total_steps: Steps of the run.
            about: What else the row has, as JSON values.
        """
        self._started = True
        self._write("started", step, {"total_steps": total_steps, **about})

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count the time of the block as `name`, except for phases inside it."""
        self._count()
        self._phases.append(name)
        try:
            yield
        finally:
            self._count()
            self._phases.pop()

    def saved(self, step: int) -> None:
        """Log that the run is saved."""
        self._write("saved", step, {"seconds": self.seconds})

    def end(self, step: int | None, how: str) -> None:
        """Log how this start ended, unless training did not start.

        Args:
            step: Steps done; None if that is not known.
            how: `finished`, `stopped by SIGTERM`, or the message of an error.
        """
        if self._started:
            self._write("ended", step, {"how": how, "seconds": self.seconds})

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far."""
        self._count()
        return {name: round(value, 3) for name, value in self._seconds.items()}

    def _count(self) -> None:
        now, phase = self._clock(), self._phases[-1]
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def _write(self, event: str, step: int | None, values: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        at = datetime.now(UTC).isoformat(timespec="seconds")
        row = {"at": at, "event": event, "step": step, **values}
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
