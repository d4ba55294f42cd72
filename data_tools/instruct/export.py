"""Training files of kept samples, which the trainer reads as they are, and their receipts."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Final, Protocol

from data_tools.digests import file_digest, hashed
from data_tools.instruct.config import ExportConfig, InstructConfig
from data_tools.instruct.lines import read_lines
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Sample
from data_tools.records import IMAGE_MARK, JsonList, json_line, llava_record
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.owned_files import owned_open, remove_owned, write_owned_json
from vlm_sft.utils.progress import track
from vlm_sft.utils.reading import read_json

FILES: Final = {"llava": "llava.json", "messages": "messages.jsonl", "parquet": "train.parquet"}
RECEIPTS: Final = "receipts.jsonl"

LICENSES: Final = {
    1: "CC BY-NC-SA 2.0",
    2: "CC BY-NC 2.0",
    3: "CC BY-NC-ND 2.0",
    4: "CC BY 2.0",
    5: "CC BY-SA 2.0",
    6: "CC BY-ND 2.0",
    7: "no known copyright restrictions",
    8: "United States Government work",
}
"""COCO's numbers, for annotations that do not name them."""

_ROWS_AT_ONCE: Final = 1000


def command(config: InstructConfig) -> None:
    """Read `kept.jsonl`, write the folder `export`: training files, receipts, `export.json`.

    Every file holds the same conversations under the same ids, in the same order.

    Raises:
        UserError: `clean` has not run, or an id appears twice.
    """
    folder = RunFolder(Path(config.output_dir))
    counts = _Counts()
    before = _recorded(folder.exports / "export.json")
    with ExitStack() as files:
        writers: list[_Writer] = []
        for name in config.export.formats:
            file = files.enter_context(owned_open(folder.exports / FILES[name]))
            writers.append(_WRITERS[name](file))
            files.callback(writers[-1].finish)  # before the file takes its place
        receipts = files.enter_context(owned_open(folder.exports / RECEIPTS))
        samples = track(read_lines(folder.kept, Sample), description="exporting samples")
        for sample, turns in _exportable(samples, counts):
            for writer in writers:
                writer.write(sample.id, config.export.image_prefix + sample.image.file_name, turns)
            receipts.write(json_line(receipt(sample)))
    for old in FILES.keys() - set(config.export.formats):  # of an earlier export
        path = folder.exports / FILES[old]
        if not remove_owned(path) and path.is_file() and file_digest(path) == before.get(path.name):
            path.unlink()
    names = [*(FILES[name] for name in config.export.formats), RECEIPTS]
    summary = counts.as_dict(config.export, _license_names(folder))
    summary["files"] = _digests(folder.exports, names)
    write_owned_json(folder.exports / "export.json", summary)
    echo(counts.summary(folder.exports, names), file=sys.stdout)


def _recorded(path: Path) -> dict[str, str]:
    """Return the digests by file name that an earlier export wrote down."""
    try:
        files = read_json(path)["files"]
    except (OSError, UserError, KeyError, TypeError):
        return {}
    return files if isinstance(files, dict) else {}


def receipt(sample: Sample) -> dict[str, Any]:
    """What a sample came from and cost, without its text: a line of `receipts.jsonl`."""
    return {
        "id": sample.id,
        "type": sample.type,
        "origin": sample.origin,
        "kinds": [turn.kind for turn in sample.turns],
        "image": sample.image.id,
        "license": sample.image.license,
        "request": sample.request,
        "template": sample.template,
        "template_sha256": sample.template_sha256,
        "model": sample.model,
        "fingerprint": sample.fingerprint,
        "parameters": sample.parameters,
        "cost": sample.cost.model_dump(mode="json"),
        "checks": dict(sorted(Counter(check.verdict for check in sample.checks).items())),
        "judge": sample.judgment.verdict if sample.judgment else None,
        "evidence": sorted({number for check in sample.checks for number in check.evidence}),
        "tool": sample.tool,
    }


Turns = list[tuple[str, str]]
"""Questions with their answers."""


def _exportable(samples: Iterator[Sample], counts: "_Counts") -> Iterator[tuple[Sample, Turns]]:
    """Yield the samples that can be written, with their texts."""
    seen: set[int] = set()
    for sample in samples:
        digest = hashed(sample.id)
        if digest in seen:
            raise UserError(f"export: the id {sample.id!r} appears twice; run `clean` again")
        seen.add(digest)
        turns = [(turn.question, turn.answer) for turn in sample.turns]
        if any(IMAGE_MARK in question for question, _ in turns):
            counts.left_out.append(sample.id)
            continue
        counts.add(sample)
        yield sample, turns


class _Counts:
    def __init__(self) -> None:
        self.samples = self.turns = 0
        self.left_out: list[str] = []
        self._types: Counter[str] = Counter()
        self._origins: Counter[str] = Counter()
        self._models: Counter[str] = Counter()
        self._licenses: Counter[int] = Counter()
        self._license_of: dict[int, int] = {}

    def add(self, sample: Sample) -> None:
        self.samples += 1
        self.turns += len(sample.turns)
        self._types[sample.type] += 1
        self._origins[sample.origin] += 1
        self._models[sample.model] += 1
        self._license_of[sample.image.id] = sample.image.license or 0

    def as_dict(self, config: ExportConfig, names: Mapping[str, str]) -> dict[str, Any]:
        licenses = Counter(self._license_of.values())
        return {
            "samples": self.samples,
            "turns": self.turns,
            "images": len(self._license_of),
            "types": dict(sorted(self._types.items())),
            "origins": dict(sorted(self._origins.items())),
            "models": dict(sorted(self._models.items())),
            "image_licenses": {
                names.get(str(number)) or LICENSES.get(number, "unknown"): count
                for number, count in sorted(licenses.items())
            },
            "left_out": {"IMAGE_MARK_IN_QUESTION": self.left_out},
            "image_prefix": config.image_prefix,
        }

    def summary(self, folder: Path, names: Sequence[str]) -> str:
        text = f"{folder}: {self.samples:,} samples with {self.turns:,} turns on "
        text += f"{len(self._license_of):,} images in {', '.join(names)}"
        if self.left_out:
            text += f"\nleft out: {len(self.left_out):,} samples whose question contains "
            text += f"{IMAGE_MARK!r}, which readers take for an image (listed in export.json)"
        return text


# --- the forms


class _Writer(Protocol):
    def __init__(self, file: IO[bytes]) -> None: ...

    def write(self, record_id: str, image: str, turns: Turns) -> None:
        """One record."""

    def finish(self) -> None:
        """Write the end of the file, after the last record."""


class _Llava:
    """One JSON list of LLaVA's records."""

    def __init__(self, file: IO[bytes]) -> None:
        self._list = JsonList(file)

    def write(self, record_id: str, image: str, turns: Turns) -> None:
        self._list.add(llava_record(record_id, image, turns))

    def finish(self) -> None:
        self._list.finish()


class _Messages:
    """One object of messages a line, their content in parts.

    The first text begins with the line end that LLaVA puts after `<image>`, so that training sees
    the same tokens whichever file it reads.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, record_id: str, image: str, turns: Turns) -> None:
        messages: list[dict[str, Any]] = []
        for number, (question, answer) in enumerate(turns):
            parts: list[dict[str, str]] = [{"type": "text", "text": question}]
            if number == 0:
                parts = [
                    {"type": "image", "image": image},
                    {"type": "text", "text": "\n" + question},
                ]
            messages.append({"role": "user", "content": parts})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        self._file.write(json_line({"id": record_id, "messages": messages}))

    def finish(self) -> None:
        """Nothing."""


class _Parquet:
    """LLaVA's records as columns: id, image (a name), conversations."""

    def __init__(self, file: IO[bytes]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        turn = pa.struct([("from", pa.string()), ("value", pa.string())])
        self._schema = pa.schema(
            [("id", pa.string()), ("image", pa.string()), ("conversations", pa.list_(turn))]
        )
        self._table = parquet.ParquetWriter(file, self._schema)
        self._rows: list[dict[str, Any]] = []

    def write(self, record_id: str, image: str, turns: Turns) -> None:
        self._rows.append(llava_record(record_id, image, turns))
        if len(self._rows) == _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        self._table.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows = []

    def finish(self) -> None:
        self._flush()
        self._table.close()


_WRITERS: Final[dict[str, type[_Writer]]] = {
    "llava": _Llava,
    "messages": _Messages,
    "parquet": _Parquet,
}


def _license_names(folder: RunFolder) -> dict[str, str]:
    """The licences' names by number, as the annotations give them; none without an index."""
    if not folder.index.exists():
        return {}
    index = read_json(folder.index)
    licenses = index.get("licenses") if isinstance(index, dict) else None
    names = {
        number: license.get("name")
        for number, license in (licenses if isinstance(licenses, dict) else {}).items()
        if isinstance(license, dict)
    }
    return {number: name for number, name in names.items() if isinstance(name, str)}


def _digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    return {name: file_digest(folder / name) for name in names}
