"""Records and images inside tar files are those of the same files unpacked."""

import io
import json
import os
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.data.test_data_formats import asked, content, good, read, reasons, refusal
from tests.data.test_dataset import CHAT_TOKENIZER, SPEC
from vlm_sft.config.schema import DataConfig, DataFile
from vlm_sft.data.dataset import SupervisedDataset
from vlm_sft.data.image_layout import LayoutRule
from vlm_sft.data.images import open_image, read_bytes
from vlm_sft.data.ledger import Ledger
from vlm_sft.data.records import open_records
from vlm_sft.errors import ImageError, RecordError
from vlm_sft.utils import tar_index
from vlm_sft.utils.image_paths import missing_image
from vlm_sft.utils.tar_index import file_size, open_index


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    tar_index._open_index.cache_clear()
    return folder / "vlm_sft" / "tar-index"


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path: Path, members: Mapping[str, bytes | str], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


LONG = "a/" + "long" * 60
CHAT = [{"role": "user", "content": "<image>Q?"}, {"role": "assistant", "content": "A."}]
TURNS = json.dumps({"messages": CHAT, "image": "gone.jpg"})
ROW = json.dumps({"id": 5, "question": "What?", "answer": "A cat."})


def test_samples_become_records_in_order_with_their_images_inside(tmp_path):
    pack(tmp_path / "1.tar", {f"{LONG}.png": png("blue"), f"{LONG}.txt": "Three."})
    pack(
        tmp_path / "0.tar",
        {"./b.png": png("red"), "./b.txt": "Two.\n", "a.txt": "1", "a.jpg": b"x"},
    )
    records = good(tmp_path)
    assert [record.id for record in records] == ["b", "a", LONG]
    inside = tmp_path / "1.tar" / f"{LONG}.png"
    assert content(records[0]) == asked("", "Two.", tmp_path / "0.tar" / "b.png")
    assert records[0].where == f"{tmp_path / '0.tar'}[b]"
    assert read_bytes(inside) == png("blue") and file_size(inside) == len(png("blue"))
    assert open_image(inside).getpixel((0, 0)) == (0, 0, 255)
    assert open_records(DataFile(path=str(tmp_path))).total >= 3
    (row,) = good(pack(tmp_path / "r.tar", {"k.jpeg": png("red"), "k.json": ROW}))
    assert content(row) == asked("What?", "A cat.", tmp_path / "r.tar" / "k.jpeg")
    assert row.id == "5"
    turns = good(pack(tmp_path / "t.tar", {"k.json": TURNS, "k.png": png("red")}))
    assert turns[0].images == (tmp_path / "t.tar" / "k.png",)


def test_every_sample_that_cannot_be_used_is_an_error(tmp_path):
    members = {"one.png": png("red"), "two.txt": "no image", "three.json": "{", "three.png": b"",
               "four.json": ROW, "four.txt": "x", "five.json": b"\xff"}  # fmt: skip
    found = read(pack(tmp_path / "a.tar", members))
    assert reasons(found) == {
        "one": "unpaired", "two": "unpaired", "three": "json_syntax", "four": "unpaired",
        "five": "not_utf8",
    }  # fmt: skip


def test_records_of_a_json_file_may_name_images_inside_tar_files(tmp_path):
    pack(tmp_path / "images.tar", {"x/1.png": png("red")})
    rows = [{"image": f"images.tar/x/{n}.png", "caption": "A cat."} for n in (1, 2)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    first, second = good(tmp_path / "rows.json")
    assert open_image(first.images[0]).size == (6, 4)
    with pytest.raises(ImageError, match=r"no image file 'x/2.png' in the tar file .*images\.tar"):
        open_image(second.images[0])
    assert "in the tar file" in missing_image(second.images[0])


def test_an_index_is_built_once_and_again_only_for_another_file(tmp_path, cache, monkeypatch):
    tar = pack(tmp_path / "a.tar", {"1.txt": "one", "2.txt": "two"})
    assert [(m.name, m.size) for m in open_index(tar)] == [("1.txt", 3), ("2.txt", 3)]
    built = []
    build = tar_index._build
    monkeypatch.setattr(tar_index, "_build", lambda path: built.append(path) or build(path))
    tar_index._open_index.cache_clear()
    index = open_index(tar)
    member = index.find("2.txt")
    assert built == [] and member is not None and index.read(member) == b"two"
    pack(tar, {"2.txt": "TWO", "1.txt": "one"})
    os.utime(tar, (1, 1))
    with pytest.raises(ImageError, match="has changed since its members were indexed"):
        index.read(index.find("1.txt"))  # type: ignore[arg-type]
    assert [m.name for m in open_index(tar)] == ["2.txt", "1.txt"] and built == [tar]
    for damaged in cache.glob("*.arrow"):
        damaged.write_bytes(b"ARROW1")
    tar_index._open_index.cache_clear()
    assert len(open_index(tar)) == 2 and len(built) == 2


def test_tar_files_without_random_access_or_end_are_refused(tmp_path):
    members = {"1.txt": "one", "1.png": png("red"), "2.txt": "two", "2.png": png("red")}
    whole = pack(tmp_path / "a.tar", members).read_bytes()
    cut = [whole[:size] for size in (700, 1536, len(whole.rstrip(b"\0")) // 512 * 512 + 512)]
    for data in [*cut, b"text", b""]:
        (tmp_path / "b.tar").write_bytes(data)
        assert refusal(tmp_path / "b.tar").reason == "data_file_unreadable", len(data)
    pack(tmp_path / "b.tar", members, "w:gz")
    assert "uncompressed tar file" in str(refusal(tmp_path / "b.tar"))
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("1.txt"))
    assert "has two members '1.txt'" in str(refusal(tmp_path / "b.tar"))
    moved = {"image_root": str(tmp_path)}
    assert "image_root" in str(refusal(pack(tmp_path / "c.tar", members), **moved))


def test_a_tar_file_gives_the_examples_of_the_same_files_in_a_folder(tmp_path):
    colors = ("red", "lime", "blue")
    (tmp_path / "files").mkdir()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    records = [{"id": c, "image": f"{c}.png", "conversations": turns} for c in colors]
    (tmp_path / "files" / "rows.json").write_text(json.dumps(records))
    members: dict[str, bytes | str] = {}
    for record in records:
        name = str(record["image"])
        (tmp_path / "files" / name).write_bytes(png(name[:-4]))
        members |= {f"{record['id']}.json": json.dumps(record), name: png(name[:-4])}
    tar = pack(tmp_path / "a.tar", members)

    def dataset(path: Path) -> SupervisedDataset:
        file, ledger = DataFile(path=str(path)), Ledger()
        config = DataConfig(train=[file])
        return SupervisedDataset(
            [file], CHAT_TOKENIZER, SPEC, layout_rule=LayoutRule(4), config=config, ledger=ledger
        )

    unpacked, packed = dataset(tmp_path / "files" / "rows.json"), dataset(tar)
    copy = pickle.loads(pickle.dumps(packed))  # what a process of the loader has
    for index in (2, 0, 1):
        expected = unpacked[index]
        for found in (packed[index], copy[index]):
            assert found.record_id == expected.record_id
            assert torch.equal(found.input_ids, expected.input_ids)
            assert torch.equal(found.labels, expected.labels)
            assert torch.equal(found.pixel_values, expected.pixel_values)
    assert dataset(tar).contents == packed.contents
    pack(tar, {**members, "blue.png": png("red") + b"!"})
    with pytest.raises(RecordError) as caught:
        packed[2]
    assert caught.value.reason == "image_changed"
