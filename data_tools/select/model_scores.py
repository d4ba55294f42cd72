"""Losses and embeddings of records by a model, cached by content in Parquet files."""

import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from data_tools.select.config import SelectConfig
from vlm_sft.data.content_digest import content_digest
from vlm_sft.data.conversation import Conversation
from vlm_sft.utils.owned_files import owned_open
from vlm_sft.utils.progress import track

CACHE: Final = "cache"
_AT_ONCE: Final = 64
"""Records whose variants are sorted into batches together."""
_FLUSH_SECONDS: Final = 30.0
_FLUSH_RECORDS: Final = 4096

_SCHEMA: Final = pa.schema(
    [
        ("digest", pa.string()),
        ("problem", pa.string()),
        ("num_tokens", pa.int32()),
        ("loss", pa.float64()),
        ("loss_blank", pa.float64()),
        ("loss_alone", pa.float64()),
        ("embedding", pa.list_(pa.float16())),
    ]
)


class ModelScores:
    """The cached scores of one model, and the computation of those that are missing.

    Scores are written every half minute, each time as a new file of the cache, so that a kill
    costs little and memory stays bounded.

    Args:
        output_dir: The directory of the selection.
        model: Checkpoint or finished model.
        config: The configuration.
        only_loss: Neither IFD nor visual necessity is wanted.
    """

    def __init__(
        self, output_dir: Path, model: str, config: SelectConfig, *, only_loss: bool = False
    ) -> None:
        from vlm_sft.evaluation.suites.answering import model_identity

        identity = json.dumps([model_identity(model), only_loss], sort_keys=True)
        name = hashlib.sha256(identity.encode()).hexdigest()[:12]
        self._folder, self._model = output_dir / CACHE / name, model
        self._config, self._only_loss = config, only_loss
        self._known: set[str] = set()
        for part in self._parts():
            self._known.update(parquet.read_table(part, columns=["digest"])["digest"].to_pylist())

    def compute(self, records: Iterable[Conversation], total: int) -> None:
        """Score the records that are not in the cache.

        Raises:
            UserError: The model cannot be loaded.
        """
        missing = self._missing(records)
        first = next(missing, None)
        if first is None:
            return
        from vlm_sft.evaluation.record_scores import RecordScorer
        from vlm_sft.inference.loaded_model import load_checkpoint

        loaded = load_checkpoint(self._model, device=self._config.device)
        scorer = RecordScorer(
            loaded,
            max_tokens=self._config.max_tokens,
            packed=self._config.batching == "packed",
            only_loss=self._only_loss,
        )
        rows: list[dict[str, Any]] = []
        flushed = time.monotonic()
        left = max(total - len(self._known) + 1, 1)
        tracked = track(itertools.chain([first], missing), left, f"scoring with {self._model}")
        while chunk := list(itertools.islice(tracked, _AT_ONCE)):
            found = scorer.score([record for _, record in chunk])
            for (digest, _), scores in zip(chunk, found, strict=True):
                rows.append({"digest": digest, **_row(scores)})
            if len(rows) >= _FLUSH_RECORDS or time.monotonic() - flushed > _FLUSH_SECONDS:
                self._flush(rows)
                rows, flushed = [], time.monotonic()
        if rows:
            self._flush(rows)

    def read(
        self, digests: list[str], *, with_embeddings: bool
    ) -> tuple[dict[str, NDArray[np.float64]], dict[str, str], NDArray[np.float32] | None]:
        """Return the scores of records by their digests.

        Returns:
            Columns `num_tokens`, `loss`, `loss_blank` and `loss_alone`, `[records]` each, NaN where
            there is none; problems by digest; and embeddings `[records, D]` of length 1 or 0.
        """
        names = ("num_tokens", "loss", "loss_blank", "loss_alone")
        places: dict[str, list[int]] = {}
        for place, digest in enumerate(digests):
            places.setdefault(digest, []).append(place)
        columns = {name: np.full(len(digests), np.nan) for name in names}
        problems: dict[str, str] = {}
        embeddings: NDArray[np.float32] | None = None
        for part in self._parts():
            table = parquet.read_table(part)
            wanted = [i for i, d in enumerate(table["digest"].to_pylist()) if d in places]
            for row in table.take(wanted).to_pylist():
                at = places[row["digest"]]
                if row["problem"]:
                    problems[row["digest"]] = row["problem"]
                    continue
                for name in names:
                    columns[name][at] = np.nan if row[name] is None else row[name]
                if with_embeddings:
                    if embeddings is None:
                        width = len(row["embedding"])
                        embeddings = np.zeros((len(digests), width), np.float32)
                    embeddings[at] = row["embedding"]
        return columns, problems, embeddings

    def _missing(self, records: Iterable[Conversation]) -> Iterator[tuple[str, Conversation]]:
        for record in records:
            digest = content_digest(record)
            if digest not in self._known:
                self._known.add(digest)
                yield digest, record

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob("part-*.parquet"))

    def _flush(self, rows: list[dict[str, Any]]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(rows, schema=_SCHEMA)
        with owned_open(self._folder / f"part-{len(self._parts()):06d}.parquet") as file:
            parquet.write_table(table, file)


def _row(scores: Any) -> dict[str, Any]:
    if isinstance(scores, Exception):
        return {"problem": getattr(scores, "reason", "wrong_input")}
    return {
        "num_tokens": scores.num_tokens,
        "loss": scores.loss,
        "loss_blank": scores.loss_blank,
        "loss_alone": scores.loss_alone,
        "embedding": scores.embedding,
    }
