"""Record submitted batches and their results, so that a restart finds them again."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_tools.instruct.generate.append_only import SharedLog
from data_tools.instruct.generate.teachers.spending import Usage
from vlm_sft.errors import UserError


@dataclass
class OpenBatch:
    """A batch whose results have not been fetched.

    Attributes:
        key: Sent to the server as `metadata.key`, so that the batch can be found there.
        samples: Sample ids by request id.
        most: The most it can cost, as recorded in `spending.jsonl`.
        name: The server's id; None if it is unknown whether the batch was created.
    """

    key: str
    samples: dict[str, str]
    most: Usage
    name: str | None = field(default=None)


class BatchLog:
    """The file `batches.jsonl` of a run.

    Attributes:
        open: Batches by key.
    """

    def __init__(self, path: Path) -> None:
        self._log = SharedLog(path, b'{"event": "')
        self.open: dict[str, OpenBatch] = {}
        self.number = 0
        for number, line in enumerate(self._log.news(), 1):
            try:
                self._take_in(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"{path}:{number}: is not a line of this file ({type(error).__name__}); it was "
                    "damaged or edited. Restore it, or move it away after the batches of this run "
                    "have ended at the server",
                    code="json_syntax",
                ) from None

    def _take_in(self, values: dict[str, Any]) -> None:
        if values["event"] == "planned":
            self.number += 1
            most = Usage.of(values["most"])
            self.open[str(values["key"])] = OpenBatch(
                str(values["key"]), dict(values["samples"]), most
            )
        elif values["event"] == "created":
            self.open[values["key"]].name = values["batch"]
        else:
            del self.open[values["key"]]

    def planned(self, batch: OpenBatch) -> None:
        """Record that the batch is about to be submitted."""
        self.number += 1
        self.open[batch.key] = batch
        most = asdict(batch.most)
        self._append(event="planned", key=batch.key, samples=batch.samples, most=most)

    def created(self, batch: OpenBatch, name: str) -> None:
        """Record the server's id of the batch."""
        batch.name = name
        self._append(event="created", key=batch.key, batch=name)

    def finished(self, batch: OpenBatch, status: str) -> None:
        """Record that the results were fetched, or that there are none."""
        del self.open[batch.key]
        self._append(event="finished", key=batch.key, status=status)

    def close(self) -> None:
        """Sync and close the file."""
        self._log.close()

    def _append(self, **values: object) -> None:
        with self._log.locked():
            self._log.append(json.dumps(values))
