"""Read records from tar shards in WebDataset's layout: `KEY.json` or `KEY.txt` beside `KEY.jpg`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vlm_sft.data.columns import IMAGE_SUFFIXES
from vlm_sft.data.record_formats import MAX_RECORD_BYTES, RawRecord, RawRecords
from vlm_sft.errors import ImageError, RecordError
from vlm_sft.utils.reading import StrictJsonError, parse_json
from vlm_sft.utils.tar_index import Member, TarIndex, open_index

_TEXTS: Final = (".json", ".txt")


def open_shards(tars: Sequence[Path]) -> RawRecords:
    """Open shards; their images stay inside them and are read by offset.

    Members that follow each other and have the same name up to the first dot are a record. Its
    `.json` is a record in any format, whose images are the members beside it; its `.txt` is a
    caption. An image has the name `SHARD.tar/MEMBER` relative to the folder of the shards.

    Raises:
        UserError: A shard is no tar file, compressed, or cut short.
    """
    indices = [open_index(tar) for tar in tars]
    return RawRecords(sum(map(len, indices)) // 2, _read(indices))


def _read(indices: Sequence[TarIndex]) -> Iterator[RawRecord | RecordError]:
    for index in indices:
        for key, members in _samples(index):
            where = f"{index.path}[{key}]"
            try:
                yield RawRecord(_record(index, key, members), where, key)
            except (StrictJsonError, ImageError) as error:
                yield RecordError(error.reason, str(error), record_id=key, where=where)
            except _Unpaired as error:
                yield RecordError("unpaired", str(error), record_id=key, where=where)


def _samples(index: TarIndex) -> Iterator[tuple[str, list[Member]]]:
    """Yield the key and the members of each sample."""
    key, members = "", list[Member]()
    for member in index:
        folder, slash, name = member.name.rpartition("/")
        found = folder + slash + name.partition(".")[0]
        if members and found != key:
            yield key, members
            members = []
        key = found
        members.append(member)
    if members:
        yield key, members


class _Unpaired(Exception):
    """A sample has no text, two, or no image."""


def _record(index: TarIndex, key: str, members: Sequence[Member]) -> Any:
    texts = [m for m in members if m.name.lower().endswith(_TEXTS)]
    images = [
        f"{index.path.name}/{m.name}" for m in members if m.name.lower().endswith(IMAGE_SUFFIXES)
    ]
    if len(texts) != 1:
        found = ", ".join(member.name for member in members)
        raise _Unpaired(f"expected one {key}.json or {key}.txt, found {found}"[:300])
    (text,) = texts
    if text.size > MAX_RECORD_BYTES:
        message = f"the record is larger than {MAX_RECORD_BYTES:,} bytes"
        raise StrictJsonError("line_too_long", message)
    try:
        content = index.read(text).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{text.name}: not UTF-8 (byte {error.start}); write it as UTF-8"
        raise StrictJsonError("not_utf8", message) from None
    if text.name.lower().endswith(".txt"):
        if not images:
            raise _Unpaired(f"{text.name} is a caption without its image")
        return {"id": key, "image": images, "text": content.strip()}
    value = parse_json(content)
    if not isinstance(value, Mapping):
        return value  # reported with the record's place, as in other files
    record = {"id": key, **value}
    if images:
        # The name that the record had before it was packed is of no use any more.
        record.pop("images", None)
        record["image"] = images
    return record
