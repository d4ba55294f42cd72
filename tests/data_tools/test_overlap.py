"""Evaluation images that were trained on are found by name, content and look."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from data_tools.overlap import main
from vlm_sft.config.schema import load_config
from vlm_sft.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Return five evaluation images, and training records with three of them."""
    images, training = tmp_path / "images", tmp_path / "training"
    images.mkdir()
    training.mkdir()
    for number in range(5):
        noise = Image.effect_noise((20, 10), 100).convert("RGB").resize((200, 100))
        noise.save(images / f"COCO_val2014_{number:012d}.jpg")
    shutil.copy(images / "COCO_val2014_000000000001.jpg", training / "renamed.jpg")
    with Image.open(images / "COCO_val2014_000000000002.jpg") as image:
        image.save(training / "again.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    names = ["000000000000.jpg", "renamed.jpg", "again.png"]  # the first is not there
    records = [{"id": name, "image": name, "conversations": turns} for name in names]
    (training / "train.json").write_text(json.dumps(records))
    return images, training


def test_each_image_that_was_trained_on_is_listed_with_the_reason(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, training = folders
    out = tmp_path / "overlap.json"
    options = ["--images", str(images), "--training", str(training / "train.json")]
    assert main([*options, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["overlap"] == {
        "COCO_val2014_000000000000.jpg": "same COCO id",
        "COCO_val2014_000000000001.jpg": "same file",
        "COCO_val2014_000000000002.jpg": "similar image",
    }
    assert (found["images"], found["overlapping"]) == (5, 3)
    shown = capsys.readouterr().out
    assert "5 evaluation images, 3 of them trained on" in shown
    assert "1 training images were not found" in shown
    assert main([*options, "--out", str(out)]) == 0  # its own file is replaced


def test_only_the_images_of_the_questions_are_compared(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, training = folders
    questions = tmp_path / "questions.jsonl"
    names = ["COCO_val2014_000000000001.jpg", "COCO_val2014_000000000003.jpg", "gone.jpg"]
    questions.write_text("".join(json.dumps({"image": name, "text": "?"}) + "\n" for name in names))
    options = ["--images", str(images), "--training", str(training / "train.json")]
    assert main([*options, "--questions", str(questions)]) == 0
    shown = capsys.readouterr().out
    assert "2 evaluation images, 1 of them trained on" in shown
    assert "1 images are not in --images: NOT COMPARED" in shown
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="none of the 0 images is there"):
        main(["--images", str(empty), "--training", str(training / "train.json")])


def test_only_the_records_that_a_run_has_used_count(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, training = folders
    run = tmp_path / "run"
    run.mkdir()
    words = ["--images", str(images), "--run", str(run)]
    with pytest.raises(UserError, match=r"no config\.yaml there; give the output_dir of a run"):
        main(words)
    config = load_config(ROOT / "configs/tiny/stage2.yaml", [])
    tree = config.model_dump(mode="json")
    tree["data"]["train"] = [{"path": str(training / "train.json")}]
    (run / "config.yaml").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"no trained\.jsonl there"):
        main(words)
    log = run / "trained.jsonl"
    skipped = {"step": 1, "records": ["again.png"], "update_left_out": "the loss is NaN"}
    log.write_text(json.dumps(skipped) + "\n")
    with pytest.raises(UserError, match="no update was made"):
        main(words)
    row = {"step": 2, "records": ["renamed.jpg"]}
    log.write_text(f'{json.dumps(skipped)}\n{json.dumps(row)}\n{{"step": 3, "rec')
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "5 evaluation images, 1 of them trained on" in shown
    assert "2 training records were not used in training" in shown
    log.write_text(json.dumps({"step": 1, "records": ["gone"]}) + "\n")
    with pytest.raises(UserError, match="1 records that were trained on are not in"):
        main(words)
    log.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"trained\.jsonl:1: damaged"):
        main(words)
    with pytest.raises(UserError, match="give --training FILES or --run DIR"):
        main(words[:2])
