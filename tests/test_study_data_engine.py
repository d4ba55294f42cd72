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
from study_model import StudyModel, make_tokenizer
from study_selection import exchanged

from data_tools.select.config import SelectConfig
from vlm_sft.config.schema import load_config
from vlm_sft.errors import UserError
from vlm_sft.evaluation.scores.constraints import score_constraints
from vlm_sft.evaluation.scores.files import Answers, read_rows
from vlm_sft.evaluation.scores.results import Options

RECORD: dict[str, Any] = {
    "id": "1",
    "image": "a.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nIs there a cat?"},
        {"from": "gpt", "value": "I see a dog and a cat, so yes."},
    ],
}
"""A question of existence with evidence, which the descriptions are made of."""

DESCRIBED: dict[str, Any] = {
    "id": "a",
    "image": "a.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat does the image show?"},
        {"from": "gpt", "value": "I see a dog and a cat."},
    ],
}


def test_compared_runs_differ_in_the_records_alone(tmp_path: Path) -> None:
    model = StudyModel(tmp_path)
    found = []
    for name in ("few", "all"):
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


def test_wrong_descriptions_are_as_many_as_asked_for_and_known() -> None:
    records = [{**DESCRIBED, "id": str(number)} for number in range(20)]
    truth = {"a.jpg": {"dog", "cat"}, "": {"dog", "cat", "bus", "boat"}}
    made, wrong = exchanged(records, truth, 0.3, seed=1)
    changed = {n for n, row in enumerate(made) if row != records[n]}
    assert changed == wrong and len(changed) == 6
    for place in wrong:
        said = study_best_of_n.things(made[place]["conversations"][1]["value"])
        assert len(said) == 2
        assert len(said & {"a dog", "a cat"}) == 1 and len(said & {"a bus", "a boat"}) == 1


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


def lesson_model(folder: Path) -> StudyModel:
    """A model of which two scenes are taught and three are left to a study, two questions each."""
    model = StudyModel(folder, taught=2)
    for split in ("train", "val", "test"):
        (folder / split / "questions").mkdir(parents=True)
        (folder / split / "questions/build.json").write_text("{}")
        records = [{**RECORD, "id": str(n), "image": f"{n // 2}.jpg"} for n in range(10)]
        (folder / split / "questions/stage2.json").write_text(json.dumps(records))
    model.lessons.write_text(json.dumps(model.taught_descriptions()))
    return model


def test_the_suite_looks_for_objects_in_descriptions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lesson_model(tmp_path)
    probes = [
        {"id": "1", "image": "0.jpg", "category": "cat", "answer": "yes"},
        {"id": "2", "image": "0.jpg", "category": "bus", "answer": "no"},
    ]
    (tmp_path / "test/questions/existence.json").write_text(json.dumps(probes))
    ran: list[str] = []
    monkeypatch.setattr("study_model.run_python", lambda *_: None)
    monkeypatch.setattr("study_model.run_module", lambda name, _arguments: ran.append(name))
    model.make()
    assert ran == ["vlm_sft.stage2"]  # the base model
    (task,) = yaml.safe_load(model.suite.read_text())["tasks"]
    truth = read_rows(Path(task["files"][0]))
    for text, right in {
        "I see two cats.": [1.0, 1.0],
        "I see a bus.": [0.0, 0.0],
        "I see a cat and two buses.": [1.0, 0.0],
    }.items():
        answers = Answers(tmp_path, {"1": text, "2": text})
        scored = score_constraints(answers, truth, Options())
        assert [row["score"] for row in scored.rows] == right


def test_lessons_are_about_other_scenes_than_those_of_a_study(tmp_path: Path) -> None:
    model = lesson_model(tmp_path)
    lessons, others = model.taught_descriptions(), model.other_descriptions()
    assert [row["image"] for row in lessons] == ["3.jpg", "4.jpg"]
    assert [row["image"] for row in others] == ["0.jpg", "1.jpg", "2.jpg"]
    assert lessons[0]["conversations"][1]["value"] == "I see a dog and a cat."


def test_a_command_runs_in_a_copy_of_the_process_and_its_failure_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("study_model.import_heavy", lambda: None)
    with pytest.raises(UserError, match="ended with code 2"):
        study_model.run_module("data_tools.mix.__main__", ["nowhere.yaml"])
    assert "nowhere.yaml" in capfd.readouterr().err


def results(folder: Path, right: list[int]) -> None:
    """Write the results of a suite as `evaluate` does, with these answers right."""
    folder.mkdir(parents=True)
    questions = [
        {"id": str(n), "image": str(n), "scores": {"right": float(n in right)}} for n in range(4)
    ]
    share = len(right) / 4
    scores = {"prompt_strict": share, "prompt_strict_interval": [share / 2, share]}
    task = {"kind": "constraints", "conditions": {"right": scores}, "questions": questions}
    document = {"model": str(folder), "tasks": {"existence": task}}
    (folder / "results.json").write_text(json.dumps(document))


def test_rows_of_best_of_n_compare_with_both_other_models(tmp_path: Path) -> None:
    model = lesson_model(tmp_path)
    study = study_best_of_n.Study(model, 1, many=4, number=2)
    folder = tmp_path / "best-of-n/seed1"
    for name, right in (("before", [0]), ("few", [0, 1])):
        results(folder / f"{name}-evaluation", right)
    results(folder / "rounds/round-1/evaluation", [0, 1, 2])
    samples = folder / "rounds/round-1/samples"
    samples.mkdir()
    many = json.loads((folder / "many.json").read_text())
    assert len(many) == 3
    said = ["I see a cat and a dog.", "I see a bus and a cat."]
    kept = [
        {
            "id": row["id"],
            "messages": [{"role": "assistant", "content": [{"type": "text", "text": text}]}],
        }
        for row, text in zip(many, said, strict=False)
    ]
    (samples / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    counts = {"questions": 4, "acceptable_share": 0.5, "kept_share": 0.5, "pairs": 1}
    (samples / "results.json").write_text(json.dumps(counts))

    row = study.row("round-1")
    assert row["accuracy"] == "75.0% (37.5% to 75.0%)" and row["records"] == 2 + 2
    assert row["gain"].startswith("+0.500") and row["minus_few"].startswith("+0.250")
    assert "gain" not in study.row("before") and study.row("few")["records"] == 2
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
    wrong = [row["conversations"][1] != DESCRIBED["conversations"][1] for row in rows]
    assert len(rows) == 3 and sum(wrong) == 2
    parts = folder / "parts"
    parts.mkdir()
    columns = {name: [0.0 if is_wrong else 1.0 for is_wrong in wrong]
               for name in ("loss", "ifd", "necessity", "solved", "consistency")}  # fmt: skip
    table = pa.table({**columns, "selected": wrong, "random": [True, False, True]})
    parquet.write_table(table, parts / "scores.parquet")
    difference = {"estimate": -0.1, "low": -0.2, "high": 0.0}
    compared = {"first": 0.7, "other": 0.6, "difference": difference}
    control = {"steps": 50, "comparisons": [compared]}
    (parts / "selection.json").write_text(json.dumps({"control": control}))
    row = study.read("ifd")
    assert (
        row["wrong"] == 1.0 and row["records"] == 2 and row["random_wrong"] == sum(wrong[::2]) / 2
    )
    assert (row["random"], row["selected"], row["steps"]) == (0.7, 0.6, 50)
    assert all(found["auc"] == 1.0 for found in study.scores())
