"""No image is both held out and trained on, whatever its name, format or order."""

import hashlib
import json
import random
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from data_tools.overlap import main as overlap
from data_tools.split import main
from vlm_sft.commands.parser import _table_columns
from vlm_sft.config.schema import DataFile
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.images import read_bytes
from vlm_sft.data.records import read_records
from vlm_sft.errors import UserError

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]


def make_records(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Return records on 12 images with random copies under other names, and four of text alone."""
    numbers = random.Random(seed)
    folder.mkdir()
    names = []
    for original in range(12):
        noise = Image.effect_noise((20, 10), 100).convert("RGB").resize((200, 100))
        noise.save(folder / f"{original}.jpg")
        names.append((f"{original}.jpg", original))
    for copy in range(12):
        original = numbers.randrange(12)
        name = f"copy-{copy}" + numbers.choice([".jpg", ".png"])
        if name.endswith("jpg"):
            shutil.copy(folder / f"{original}.jpg", folder / name)
        else:
            with Image.open(folder / f"{original}.jpg") as image:
                image.save(folder / name)
        names.append((name, original))
    records: list[dict[str, Any]] = [
        {"id": f"{name}-{n}", "image": name, "conversations": TURNS, "original": original}
        for name, original in names
        for n in range(numbers.randint(1, 2))
    ]
    for number in range(4):
        turns = [{"from": "human", "value": f"{number}?"}, {"from": "gpt", "value": "Yes."}]
        records.append({"id": f"text-{number}", "conversations": turns})
    return records


def split(path: Path, images: Path, out: Path, *options: str) -> tuple[list[Any], list[Any]]:
    words = ["--records", str(path), "--images", str(images), "--out", str(out)]
    assert main([*words, "--held-out", "0.3", *options]) == 0
    train, held_out = (json.loads((out / f"{n}.json").read_text()) for n in ("train", "held_out"))
    return train, held_out


def test_image_names_start_in_the_folder_of_the_records(tmp_path: Path) -> None:
    records = make_records(tmp_path / "images", 0)
    for record in records:
        if "image" in record:
            record["image"] = f"images/{record['image']}"
    given, out = tmp_path / "records.json", tmp_path / "out"
    given.write_text(json.dumps(records))
    assert main(["--records", str(given), "--out", str(out), "--held-out", "0.3"]) == 0
    images = json.loads((out / "split.json").read_text())["images"]
    assert images["images"] > images["missing"] == 0
    (tmp_path / "b").mkdir()
    other = shutil.copy(given, tmp_path / "b")
    for names, message in (
        ([str(given), str(other)], "--images: missing, and the records are in several folders"),
        (["hf://datasets/a/b"], "--images: missing, and the records are on a hub"),
        ([str(tmp_path / "none" / "a.json")], "--records .*a.json: no such data file"),
        ([""], "--records: an empty name"),
    ):
        with pytest.raises(UserError, match=message):
            main(["--records", *names, "--out", str(tmp_path / "no"), "--held-out", "0.3"])
    link = tmp_path / "link"
    link.symlink_to(tmp_path, target_is_directory=True)
    same = ["--records", str(given), str(link / "records.json"), "--held-out", "0.3"]
    assert main([*same, "--out", str(tmp_path / "same")]) == 0


@pytest.mark.parametrize("seed", range(3))
def test_duplicates_never_straddle_and_the_order_does_not_matter(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    records = make_records(images, seed)
    given = tmp_path / "records.json"
    given.write_text(json.dumps(records))
    train, held_out = split(given, images, tmp_path / "out")
    assert 0 < len(held_out) <= round(0.3 * len(records))
    assert sorted(r["id"] for r in train + held_out) == sorted(r["id"] for r in records)
    assert [r for r in records if r in train] == train  # unchanged and in their order
    sides = [{r["original"] for r in side if "image" in r} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    before = (tmp_path / "out/train.json").read_bytes(), (tmp_path / "out/split.json").read_bytes()
    split(given, images, tmp_path / "out")
    after = (tmp_path / "out/train.json").read_bytes(), (tmp_path / "out/split.json").read_bytes()
    assert before == after

    random.Random(seed).shuffle(records)
    given.write_text("\n".join(map(json.dumps, records)))
    _, shuffled = split(given, images, tmp_path / "other")
    assert {r["id"] for r in shuffled} == {r["id"] for r in held_out}

    if any("image" in r for r in held_out):
        capsys.readouterr()
        questions = tmp_path / "questions.json"
        questions.write_text(json.dumps([r for r in held_out if "image" in r]))
        words = ["--images", str(images), "--questions", str(questions)]
        trained = ["--training", str(tmp_path / "out/train.json")]
        assert overlap([*words, *trained, "--training-images", str(images)]) == 0
        assert ", 0 of them trained on" in capsys.readouterr().out


def test_bad_records_are_refused_or_counted_and_edits_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, given, out = tmp_path / "images", tmp_path / "records.json", tmp_path / "out"
    records = make_records(images, 0)
    given.write_text(json.dumps([{"id": "bad"}, *records]))
    with pytest.raises(UserError, match="--bad-records leave_out"):
        split(given, images, out)
    (images / "0.jpg").unlink()
    (images / "1.jpg").write_bytes(b"no image")
    split(given, images, out, "--bad-records", "leave_out")
    shown = capsys.readouterr().out
    assert "records in neither file: format 1; first: " in shown
    assert f"1 of 24 images do not exist, e.g. {images / '0.jpg'}" in shown
    assert f"1 of 24 images cannot be opened, e.g. {images / '1.jpg'}" in shown
    (out / "train.json").write_text("[]")
    with pytest.raises(UserError, match="the file was changed after vlm_sft wrote it"):
        split(given, images, out, "--bad-records", "leave_out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not one of the 24 images"):
        split(given, tmp_path / "empty", tmp_path / "b", "--bad-records", "leave_out")
    with pytest.raises(UserError, match="expected a share between 0 and 1"):
        split(given, images, out, "--held-out", "1.5")
    with pytest.raises(UserError, match="cannot hold out 1,000 of"):
        words = ["--held-out", "1000", "--bad-records", "leave_out"]
        split(given, images, tmp_path / "c", *words)


def tables(folder: Path) -> dict[str, DataFile]:
    """Six questions, or captions, about six images, in formats that are not records."""
    folder.mkdir()
    for number in range(6):
        noise = Image.effect_noise((20, 10), 100).convert("RGB").resize((200, 100))
        noise.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"Image {number}.")
    rows = "".join(f"{n}.png,What is {n}?,Image {n}.\n" for n in range(6))
    questions = [{"question_id": n, "image": f"{n}.png", "question": "What?"} for n in range(6)]
    answers = [{"question_id": n, "multiple_choice_answer": f"Image {n}."} for n in range(6)]
    (folder / "questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "answers.json").write_text(json.dumps({"annotations": answers}))
    images = [(folder / f"{n}.png").read_bytes() for n in range(6)]
    table = pyarrow.table({"image": images, "text": [f"Image {n}." for n in range(6)]})
    parquet.write_table(table, folder / "rows.parquet")
    (folder / "rows.csv").write_text(f"image,question,answer\n{rows}")
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "0.tar", "w") as archive:
        for number in range(6):
            for ending in ("png", "txt"):
                archive.add(folder / f"{number}.{ending}", f"{number}.{ending}")
    file = {"annotations": str(folder / "answers.json")}
    return {
        "csv": DataFile(path=str(folder / "rows.csv")),
        "parquet": DataFile(path=str(folder / "rows.parquet")),
        "vqa": DataFile(path=str(folder / "questions.json"), **file),
        "captions": DataFile(path=str(folder)),
        "shards": DataFile(path=str(folder / "shards")),
    }


def said(file: DataFile) -> list[Any]:
    records = list(read_records(file))
    assert all(isinstance(record, Conversation) for record in records), records
    return sorted(
        (str(r.turns), str([hashlib.sha256(read_bytes(i)).hexdigest() for i in r.images]))
        for r in records
        if isinstance(r, Conversation)
    )


@pytest.mark.parametrize("kind", ["csv", "parquet", "vqa", "captions", "shards"])
def test_tables_captions_questions_and_shards_are_divided_into_records(
    kind: str, tmp_path: Path
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    file = tables(images)[kind]
    options = ["--annotations", file.annotations] if file.annotations else []
    root = images / "shards" if kind == "shards" else images
    train, held_out = split(Path(file.path), root, out, *options)
    assert len(train) in (4, 5) and len(train) + len(held_out) == 6
    names = [str(out / "train.json"), str(out / "held_out.json")]
    parts = [DataFile(path=name, image_root=str(root)) for name in names]
    assert sorted(said(parts[0]) + said(parts[1])) == said(file)


def test_a_table_with_other_columns_is_split_by_their_names(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    tables(photos)
    table, rows = photos / "own.csv", (photos / "rows.csv").read_text().split("\n", 1)[1]
    table.write_text(f"file,q,a\n{rows}")
    with pytest.raises(UserError, match="no column for text"):
        split(table, photos, tmp_path / "out")
    columns = ["--columns", "image=file,question=q,answer=a"]
    train, held_out = split(table, photos, tmp_path / "out", *columns)
    ids = [f"own.csv:{line}" for line in range(2, 8)]
    assert held_out and sorted(record["id"] for record in [*train, *held_out]) == ids
    (photos / "b").mkdir()
    shutil.copy(table, photos / "b")
    both = ["--records", str(table), str(photos / "b" / "own.csv")]
    train, held_out = split(table, photos, tmp_path / "two", *columns, *both)
    assert len({record["id"] for record in [*train, *held_out]}) == 12
    strange = photos / "own\udcff\n.csv"
    shutil.copy(table, strange)
    train, held_out = split(strange, photos, tmp_path / "strange", *columns)
    assert "own\\udcff\u240a.csv:2" in {record["id"] for record in [*train, *held_out]}
    assert _table_columns("image=f, caption=c") == {"image": "f", "text": "c"}
    for wrong, message in (("file", "expected PART=COLUMN"), ("photo=file", "photo is no part")):
        with pytest.raises(UserError, match=message):
            split(table, photos, tmp_path / "out", "--columns", wrong)
