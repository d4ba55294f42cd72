"""Three training files that the trainer reads to the same conversations, receipts beside them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.instruct import export as exporting
from data_tools.instruct.config import InstructConfig
from data_tools.instruct.lines import write_lines
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Sample
from tests.data_tools.instruct_samples import run_folder, sample
from vlm_sft.config.loading import parse
from vlm_sft.config.schema import DataFile
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.records import read_records
from vlm_sft.errors import UserError

TALK: list[Any] = [
    ("Is there a dog?", 'Yes – a "brown" one.\nIt\'s here: <image>.'),
    ("Ähm?", "冬"),
]


def exported(folder: Path, samples: list[Sample], **settings_of: Any) -> Path:
    """The folder of the export."""
    config = run_folder(folder, samples)
    values = config.model_dump(mode="json") | {"export": settings_of}
    run = RunFolder(Path(config.output_dir))
    write_lines(run.kept, samples)
    exporting.command(parse(InstructConfig, values, "test"))
    return run.exports


def read(path: Path, image_root: Path) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for record in read_records(DataFile(path=str(path), image_root=str(image_root))):
        assert isinstance(record, Conversation), record
        # Parts of a list get the template's separator, which these spell out as strings do.
        turns = tuple(replace(turn, image_separator=None) for turn in record.turns)
        found.append((record.id, turns, record.images))
    return found


def test_the_trainer_reads_all_three_files_to_the_same_conversations(tmp_path: Path) -> None:
    samples = [sample("a", 1, TALK), sample("b", 1, [("What?", "A dog.")], sample_type="detail")]
    folder = exported(tmp_path, samples)
    names = ("llava.json", "messages.jsonl", "train.parquet")
    first, *others = [read(folder / name, tmp_path / "images") for name in names]
    assert first == others[0] == others[1]
    assert [record_id for record_id, _, _ in first] == ["a", "b"]
    turns, images = first[0][1:]
    assert [turn.text for turn in turns] == ["\nIs there a dog?", TALK[0][1], "Ähm?", "冬"]
    assert images == (tmp_path / "images" / "000000000001.png",)
    assert json.loads((folder / "llava.json").read_text())[1] == {
        "id": "b",
        "image": "000000000001.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A dog."},
        ],
        "type": "detail",
    }


def test_datasets_reads_the_parquet_file(tmp_path: Path) -> None:
    from pyarrow import parquet

    folder = exported(tmp_path, [sample("a", 1, [("What?", "A dog.")])])
    table = parquet.read_table(folder / "train.parquet")
    assert table.column_names == ["id", "image", "conversations", "type"]
    assert table.to_pylist() == json.loads((folder / "llava.json").read_text())


def test_an_empty_export_is_three_readable_files(tmp_path: Path) -> None:
    folder = exported(tmp_path, [])
    for name in ("llava.json", "messages.jsonl", "train.parquet"):
        assert read(folder / name, tmp_path) == []


def test_the_receipt_names_request_model_cost_and_checks(tmp_path: Path) -> None:
    samples = [sample("a", 1, TALK), sample("b", 2, [("What?", "A dog.")], license=2)]
    folder = exported(tmp_path, samples, image_prefix="coco/")
    receipts = [json.loads(line) for line in (folder / "receipts.jsonl").read_text().splitlines()]
    assert [receipt["id"] for receipt in receipts] == ["a", "b"]
    assert receipts[0]["request"] == "request-a"
    assert receipts[0]["template_sha256"] == "0" * 64
    assert receipts[0]["model"] == "a-model"
    assert receipts[0]["cost"]["tokens_in"] == 100
    assert receipts[0]["checks"] == {"supported": 2}
    told = json.loads((folder / "export.json").read_text())
    assert (told["samples"], told["turns"], told["images"]) == (2, 3, 2)
    assert told["image_licenses"] == {
        "Attribution-NonCommercial License": 1,
        "CC BY 2.0": 1,
    }
    assert sorted(told["files"]) == [
        "llava.json",
        "messages.jsonl",
        "receipts.jsonl",
        "train.parquet",
    ]
    assert '"image": "coco/000000000001.png"' in (folder / "llava.json").read_text()


def test_a_format_that_is_no_longer_wanted_leaves_no_old_file(tmp_path: Path) -> None:
    samples = [sample("a", 1, [("What?", "A dog.")])]
    exported(tmp_path, samples)
    folder = exported(tmp_path, samples, formats=["messages"])
    assert sorted(path.name for path in folder.iterdir()) == [
        "export.json",
        "messages.jsonl",
        "receipts.jsonl",
    ]


def test_a_question_with_the_image_mark_is_left_out_of_all_files_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [sample("a", 1, [("What does <image> mean?", "x")]), sample("b", 1, TALK)]
    folder = exported(tmp_path, samples)
    assert [record[0] for record in read(folder / "llava.json", tmp_path)] == ["b"]
    told = json.loads((folder / "export.json").read_text())
    assert told["left_out"] == {"IMAGE_MARK_IN_QUESTION": ["a"]}
    assert "left out: 1 samples" in capsys.readouterr().out


def test_two_samples_of_one_id_are_refused_and_the_old_export_stays(tmp_path: Path) -> None:
    one = sample("a", 1, [("What?", "A dog.")])
    folder = exported(tmp_path, [one])
    before = (folder / "llava.json").read_bytes()
    with pytest.raises(UserError, match="the id 'a' appears twice"):
        exported(tmp_path, [one, one])
    assert (folder / "llava.json").read_bytes() == before
    assert not list(folder.glob(".*"))


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(
    lambda text: bool(text.strip()) and "<image>" not in text
)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), min_size=1, max_size=4))
def test_any_words_come_back_from_every_file(
    tmp_path_factory: pytest.TempPathFactory, talks: list[list[tuple[str, str]]]
) -> None:
    folder = tmp_path_factory.mktemp("words")
    samples = [sample(f"s{i}", 1, talk) for i, talk in enumerate(talks)]
    files = exported(folder, samples)
    for name in ("llava.json", "messages.jsonl", "train.parquet"):
        found = read(files / name, folder / "images")
        words = [[turn.text for turn in turns] for _, turns, _ in found]
        expected = [["\n" + talk[0][0], *[w for t in talk for w in t][1:]] for talk in talks]
        assert words == expected


@pytest.mark.slow
def test_check_passes_on_every_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_sft import check

    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    folder = exported(tmp_path, [sample(f"s{i}", i, [("What?", "A dog.")]) for i in range(1, 4)])
    for name in ("llava.json", "messages.jsonl", "train.parquet"):
        data = f"data.train=[{{path: {folder / name}, image_root: {tmp_path / 'images'}}}]"
        arguments = [str(root / "configs/tiny/stage2.yaml"), "--no-model", data, "data.eval=[]"]
        assert check.main(arguments) == 0
        assert "3 of 3 records can be used" in capsys.readouterr().out


def test_a_damaged_line_of_kept_samples_is_named(tmp_path: Path) -> None:
    config = run_folder(tmp_path, [])
    RunFolder(Path(config.output_dir)).kept.write_text("{}\n")
    with pytest.raises(UserError, match=r"kept\.jsonl:1"):
        exporting.command(config)
