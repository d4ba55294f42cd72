"""Scores of records by models, cached by the records' content in Parquet files."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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

_DIGEST: Final = [("digest", pa.string()), ("problem", pa.string())]
_MODEL_SCHEMA: Final = pa.schema(
    [
        *_DIGEST,
        ("num_tokens", pa.int32()),
        ("loss", pa.float64()),
        ("loss_blank", pa.float64()),
        ("loss_alone", pa.float64()),
        ("embedding", pa.list_(pa.float16())),
    ]
)
_CLIP_SCHEMA: Final = pa.schema([*_DIGEST, ("clip", pa.float64()), ("truncated", pa.float64())])

Score = Callable[[Sequence[Conversation]], Sequence[Any]]
"""Returns an object with the columns' values as attributes, or an error, for each record."""


class ScoreCache:
    """The cached scores of one model, and the computation of those that are missing.

    Scores are written every half minute, each time as a new file of the cache, so that a kill
    costs little and memory stays bounded.

    Args:
        output_dir: The directory of the selection.
        model: The model, for the progress bar.
        identity: What the scores depend on besides the record, as values for JSON.
        schema: Columns of the files.
        load: Loads the model, if a score is missing.
    """

    def __init__(
        self,
        output_dir: Path,
        model: str,
        identity: Any,
        schema: pa.Schema,
        load: Callable[[], Score],
    ) -> None:
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        self._folder, self._model = output_dir / CACHE / name, model
        self._schema, self._load = schema, load
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
        score = self._load()
        names = self._schema.names[len(_DIGEST) :]
        rows: list[dict[str, Any]] = []
        flushed = time.monotonic()
        left = max(total - len(self._known) + 1, 1)
        tracked = track(itertools.chain([first], missing), left, f"scoring with {self._model}")
        while chunk := list(itertools.islice(tracked, _AT_ONCE)):
            for (digest, _), found in zip(chunk, score([one for _, one in chunk]), strict=True):
                values: dict[str, Any] = {"problem": getattr(found, "reason", "wrong_input")}
                if not isinstance(found, Exception):
                    values = {name: getattr(found, name) for name in names}
                rows.append({"digest": digest, **values})
            if len(rows) >= _FLUSH_RECORDS or time.monotonic() - flushed > _FLUSH_SECONDS:
                self._flush(rows)
                rows, flushed = [], time.monotonic()
        if rows:
            self._flush(rows)

    def read(
        self, digests: list[str], *, with_embeddings: bool = False
    ) -> tuple[dict[str, NDArray[np.float64]], dict[str, str], NDArray[np.float32] | None]:
        """Return the scores of records by their digests.

        Returns:
            The numbers by column, `[records]` each, NaN where there is none; problems by digest;
            and embeddings `[records, D]` of length 1 or 0.
        """
        names = [name for name in self._schema.names[len(_DIGEST) :] if name != "embedding"]
        read = ["digest", "problem", *names, *(["embedding"] if with_embeddings else [])]
        places: dict[str, list[int]] = {}
        for place, digest in enumerate(digests):
            places.setdefault(digest, []).append(place)
        columns = {name: np.full(len(digests), np.nan) for name in names}
        problems: dict[str, str] = {}
        embeddings: NDArray[np.float32] | None = None
        for part in self._parts():
            table = parquet.read_table(part, columns=read)
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
        table = pa.Table.from_pylist(rows, schema=self._schema)
        with owned_open(self._folder / f"part-{len(self._parts()):06d}.parquet") as file:
            parquet.write_table(table, file)


def model_scores(
    output_dir: Path, model: str, config: SelectConfig, *, only_loss: bool = False
) -> ScoreCache:
    """Return the cache of losses and embeddings by a checkpoint or finished model.

    Args:
        output_dir: The directory of the selection.
        model: The checkpoint or finished model.
        config: The configuration.
        only_loss: Neither IFD nor visual necessity is wanted.
    """
    from vlm_sft.evaluation.suites.answering import model_identity

    def load() -> Score:
        from vlm_sft.evaluation.record_scores import RecordScorer
        from vlm_sft.inference.loaded_model import load_checkpoint

        return RecordScorer(
            load_checkpoint(model, device=config.device),
            max_tokens=config.max_tokens,
            packed=config.batching == "packed",
            only_loss=only_loss,
        ).score

    identity = [model_identity(model), only_loss]
    return ScoreCache(output_dir, model, identity, _MODEL_SCHEMA, load)


def clip_scores(output_dir: Path, model: str, config: SelectConfig) -> ScoreCache:
    """Return the cache of image-text agreement by a CLIP or SigLIP model."""
    from vlm_sft.evaluation.suites.answering import model_identity

    def load() -> Score:
        from vlm_sft.evaluation.clip_scores import ClipScorer

        return ClipScorer(model, device=config.device).score

    identity = [model_identity(model), "clip"]
    return ScoreCache(output_dir, model, identity, _CLIP_SCHEMA, load)
