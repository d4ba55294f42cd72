"""The studies of selection and of best-of-N: their configurations are valid, their data as said."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import study_best_of_n
import study_model
import study_selection
import yaml
from pyarrow import parquet
from study_label_noise import spoil
from study_model import StudyModel, make_tokenizer

from data_tools.select.config import SelectConfig
from vlm_sft.config.schema import load_config
from vlm_sft.errors import UserError

RECORD: dict[str, Any] = {
    "id": "1",
    "image": "a.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nIs there a cat?"},
        {"from": "gpt", "value": "I see a dog and a cat, so yes."},
    ],
}


def test_compared_runs_differ_in_the_records_alone(tmp_path: Path) -> None:
    model = StudyModel(tmp_path)
    found = []
    for name in ("few", "verdicts"):
        path = tmp_path / f"{name}.yaml"
        files = [tmp_path / f"{name}.json"]
        model.write_config(path, files, steps=7, start_from=tmp_path / "base/final")
        found.append(load_config(path).model_dump())
    differing = {key for key in found[0] if found[0][key] != found[1][key]}
    assert differing == {"output_dir", "data"}
    assert found[0]["data"]["eval"] == found[1]["data"]["eval"]
    assert found[0]["train"]["max_steps"] == 7 and found[0]["lora"] is None


@pytest.mark.parametrize("name", study_selection.SELECTIONS)
def test_every_selection_is_a_valid_one_with_a_name_on_the_page(name: str) -> None:
    settings = {
        "output_dir": "out", "path": "data.json", "model": "final", "samples": "samples.jsonl",
        **study_selection.SELECTIONS[name],
    }  # fmt: skip
    config = SelectConfig.model_validate(settings)
    assert config.rank_by in study_selection.SHOWN[name] or config.preset is not None


def test_a_verdict_alone_is_what_the_answer_ends_in() -> None:
    cut = study_best_of_n.only_verdict(RECORD)
    assert cut["conversations"][1]["value"] == "Yes."
    assert cut["conversations"][0] == RECORD["conversations"][0] and cut["id"] == "1"
    assert RECORD["conversations"][1]["value"].startswith("I see")


def test_wrong_answers_are_as_many_as_asked_for_and_known() -> None:
    records = [{**RECORD, "id": str(number)} for number in range(20)]
    truth = {"a.jpg": {"dog", "cat"}, "": {"dog", "cat", "bus", "boat"}}
    found = spoil(records, truth, 0.3, seed=1)
    changed = {n for n, row in enumerate(found.records) if row != records[n]}
    assert changed == found.wrong and len(changed) == 6


def test_the_tokenizer_gives_back_what_it_was_trained_on() -> None:
    texts = ["<image>\nIs there a cat in the image?", "I see two cats and a boat, so yes."] * 5
    tokenizer = make_tokenizer(texts, 512)
    assert tokenizer.decode(tokenizer.encode(texts[1])) == texts[1]
    turn = "<|im_start|>user\nIs there a cat?<|im_end|>"
    ids = tokenizer.encode(turn)
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == turn


def test_the_mean_over_seeds_has_no_interval() -> None:
    rows = [
        {"selection": "ifd", "seed": seed, "records": 10, "wrong": 0.5, "random_wrong": 0.3,
         "selected": 0.6, "random": 0.7 + seed / 10,
         "difference": {"estimate": -seed / 10, "low": -0.5, "high": 0.1}}
        for seed in (1, 2)
    ]  # fmt: skip
    mean = study_selection.shown(study_selection.mean_row("ifd", rows))
    assert mean["difference"] == "-0.150" and mean["random"] == "85.0%"
    first = study_selection.shown(rows[0])
    assert first["difference"] == "-0.100 (-0.500 to +0.100)" and first["wrong"] == "50.0%"


def test_categories_are_those_of_the_annotations(tmp_path: Path) -> None:
    folder = tmp_path / "train/scenes/annotations"
    folder.mkdir(parents=True)
    document = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "categories": [{"id": 5, "name": "cat"}],
        "annotations": [{"image_id": 2, "category_id": 5}],
    }
    (folder / "instances_openmoji.json").write_text(json.dumps(document))
    assert StudyModel(tmp_path).categories("train") == {
        "a.jpg": set(),
        "b.jpg": {"cat"},
        "": {"cat"},
    }


def test_the_suite_reads_the_verdict_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = StudyModel(tmp_path)
    for split in ("train", "val", "test"):
        (tmp_path / split / "questions").mkdir(parents=True)
        (tmp_path / split / "questions/build.json").write_text("{}")
    for stage in ("stage1", "stage2"):
        model.records("train", stage).write_text(json.dumps([RECORD]))
    ran: list[str] = []
    monkeypatch.setattr("study_model.run_python", lambda *_: None)
    monkeypatch.setattr("study_model.run_module", lambda name, _arguments: ran.append(name))
    model.make()
    (task,) = yaml.safe_load(model.suite.read_text())["tasks"]
    assert task["scoring"] == {"reading": "verdict_last"} and task["kind"] == "pope"
    assert ran == ["vlm_sft.stage2", "vlm_sft.stage2"]  # to describe, and to answer


def test_lessons_are_about_other_scenes_than_the_questions_of_a_study(tmp_path: Path) -> None:
    model = StudyModel(tmp_path, taught=2)
    (tmp_path / "train/questions").mkdir(parents=True)
    records = [{**RECORD, "image": f"{number // 2}.jpg"} for number in range(10)]
    model.records("train").write_text(json.dumps(records))
    lessons, others = (model.questions(taught=taught) for taught in (True, False))
    assert {row["image"] for row in lessons} == {"3.jpg", "4.jpg"}
    assert len(lessons) == 4 and len(others) == 6


def test_a_command_runs_in_a_copy_of_the_process_and_its_failure_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("study_model.import_heavy", lambda: None)
    with pytest.raises(UserError, match="ended with code 2"):
        study_model.run_module("data_tools.mix.__main__", ["nowhere.yaml"])
    assert "nowhere.yaml" in capfd.readouterr().err


def lesson_model(folder: Path) -> StudyModel:
    """A model of which two scenes are taught and three are left to a study, two questions each."""
    model = StudyModel(folder, taught=2)
    (folder / "train/questions").mkdir(parents=True)
    records = [{**RECORD, "id": str(n), "image": f"{n // 2}.jpg"} for n in range(10)]
    model.records("train").write_text(json.dumps(records))
    model.lessons.write_text(json.dumps(model.questions(taught=True)))
    return model


def results(folder: Path, right: list[int]) -> None:
    """Write the results of a suite as `evaluate` does, with these answers right."""
    folder.mkdir(parents=True)
    questions = [
        {"id": str(n), "image": str(n), "scores": {"right": float(n in right)}} for n in range(4)
    ]
    share = len(right) / 4
    scores = {"accuracy": share, "accuracy_interval": [share / 2, share]}
    task = {"kind": "pope", "conditions": {"right": scores}, "questions": questions}
    document = {"model": str(folder), "tasks": {"existence": task}}
    (folder / "results.json").write_text(json.dumps(document))


def test_rows_of_best_of_n_compare_with_both_other_models(tmp_path: Path) -> None:
    model = lesson_model(tmp_path)
    study = study_best_of_n.Study(model, 1, many=4, number=2)
    folder = tmp_path / "best-of-n/seed1"
    for name, right in (("early", [0]), ("few", [0, 1])):
        results(folder / f"{name}-evaluation", right)
    results(folder / "rounds/round-1/evaluation", [0, 1, 2])
    samples = folder / "rounds/round-1/samples"
    samples.mkdir()
    many = json.loads((folder / "many.json").read_text())
    assert [row["conversations"][1]["value"] for row in many] == ["Yes."] * 4
    said = ["I see a dog and a cat, so yes.", "I see a bus and a cat, so yes."]
    kept = [
        {"id": row["id"], "messages": [{"role": "assistant", "content": text}]}
        for row, text in zip(many, said, strict=False)
    ]
    (samples / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    counts = {"questions": 4, "acceptable_share": 0.5, "kept_share": 0.5, "pairs": 1}
    (samples / "results.json").write_text(json.dumps(counts))

    row = study.row("round-1")
    assert row["accuracy"] == "75.0% (37.5% to 75.0%)" and row["records"] == 4 + 2
    assert row["gain"].startswith("+0.500") and row["minus_few"].startswith("+0.250")
    assert "gain" not in study.row("early") and study.row("few")["records"] == 4
    assert study.round(1)["true"] == "50.0%"


def test_a_selection_s_row_counts_the_wrong_answers_of_both_parts(tmp_path: Path) -> None:
    model = lesson_model(tmp_path)
    annotations = tmp_path / "train/scenes/annotations"
    annotations.mkdir(parents=True)
    names = ["dog", "cat", "bus", "boat"]
    document = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(5)],
        "categories": [{"id": n, "name": name} for n, name in enumerate(names)],
        "annotations": [{"image_id": n, "category_id": c} for n in range(5) for c in (0, 1)]
        + [{"image_id": 4, "category_id": c} for c in (2, 3)],
    }
    (annotations / "instances_openmoji.json").write_text(json.dumps(document))
    study = study_selection.Study(model, 1, 0.5)
    folder = tmp_path / "selection/seed1"
    rows = json.loads((folder / "data.json").read_text())
    wrong = [row["conversations"][1] != RECORD["conversations"][1] for row in rows]
    assert len(rows) == 6 and sum(wrong) == 3
    parts = folder / "parts"
    parts.mkdir()
    columns = {name: [0.0 if is_wrong else 1.0 for is_wrong in wrong]
               for name in ("loss", "ifd", "necessity", "solved", "consistency")}  # fmt: skip
    table = pa.table({**columns, "selected": wrong, "random": [True, False] * 3})
    parquet.write_table(table, parts / "scores.parquet")
    difference = {"estimate": -0.1, "low": -0.2, "high": 0.0}
    compared = {"first": 0.7, "other": 0.6, "difference": difference}
    control = {"steps": 50, "comparisons": [compared]}
    (parts / "selection.json").write_text(json.dumps({"control": control}))
    row = study.read("ifd")
    assert (
        row["wrong"] == 1.0 and row["records"] == 3 and row["random_wrong"] == sum(wrong[::2]) / 3
    )
    assert (row["random"], row["selected"], row["steps"]) == (0.7, 0.6, 50)
    assert all(found["auc"] == 1.0 for found in study.scores())
