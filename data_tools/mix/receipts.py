"""The receipts of an export: which model wrote a record, and whether it is a refusal."""

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.instruct.clean.texts import digest
from vlm_sft.errors import UserError
from vlm_sft.utils.reading import open_regular


class Receipts:
    """Looked up by record id; 11 bytes a receipt."""

    def __init__(self, path: Path) -> None:
        ids, models, unsure = array("Q"), array("H"), array("B")
        self._models: dict[str, int] = {}
        for receipt in _read(path):
            ids.append(digest(receipt["id"]))
            models.append(self._models.setdefault(str(receipt["model"]), len(self._models)))
            unsure.append("cannot_tell" in receipt["kinds"])
        order = np.argsort(np.array(ids, np.uint64), kind="stable")
        self._ids = np.array(ids, np.uint64)[order]
        self._of_model = np.array(models, np.uint16)[order]
        self._unsure = np.array(unsure, np.bool_)[order]

    def find(self, record_id: str) -> tuple[str, bool] | None:
        """Return the model that wrote the record, and whether it is a refusal; None: no receipt."""
        wanted = digest(record_id)
        place = int(np.searchsorted(self._ids, np.uint64(wanted)))
        if place == len(self._ids) or int(self._ids[place]) != wanted:
            return None
        return list(self._models)[self._of_model[place]], bool(self._unsure[place])


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            try:
                receipt = json.loads(line)
                if not isinstance(receipt["id"], str) or not isinstance(receipt["kinds"], list):
                    raise TypeError
                _ = receipt["model"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(
                    f"{path}:{number}: expected a receipt with `id`, `model` and `kinds`; give the "
                    "receipts.jsonl that `export` wrote",
                    code="json_syntax",
                ) from None
            yield receipt
