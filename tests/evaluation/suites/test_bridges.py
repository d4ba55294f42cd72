"""Suites are written in the formats of lmms-eval and VLMEvalKit."""

import base64
import csv
import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from vlm_sft import evaluate
from vlm_sft.errors import UserError


class _Loader(yaml.SafeLoader):
    """Reads `!function utils.name` as lmms-eval does: as the name of a function."""


_Loader.add_constructor("!function", lambda loader, node: ("function", node.value))


def test_a_folder_for_lmms_eval_has_tasks_data_and_functions(
    suite_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import load_dataset

    out = tmp_path / "lmms"
    assert evaluate.main(["export", str(suite_file), "--to", "lmms-eval", "--out", str(out)]) == 0
    assert "--include_path" in capsys.readouterr().out
    spec = importlib.util.spec_from_file_location("exported_utils", out / "utils.py")
    assert spec is not None and spec.loader is not None
    utils: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    names = {"exists": "accuracy", "counting": "accuracy", "color": "accuracy",
             "captions": "cider_d"}  # fmt: skip
    for name, metric in names.items():
        task = yaml.load((out / f"suite_{name}.yaml").read_text(), Loader=_Loader)
        assert task["task"] == f"suite_{name}" and task["output_type"] == "generate_until"
        assert task["dataset_path"] == "parquet" and task["test_split"] == "test"
        assert task["generation_kwargs"]["max_new_tokens"] == 4
        functions = [task[key] for key in ("doc_to_visual", "doc_to_text", "process_results")]
        functions += [row["aggregation"] for row in task["metric_list"]]
        for kind, function in functions:
            assert kind == "function" and callable(getattr(utils, function.partition(".")[2]))
        assert task["metric_list"][0]["metric"] == metric
        assert all(isinstance(row["higher_is_better"], bool) for row in task["metric_list"])
        files = task["dataset_kwargs"]["data_files"]
        cache = str(tmp_path / "cache")
        docs = load_dataset("parquet", data_files=files, split="test", cache_dir=cache)
        assert docs[0][task["doc_to_target"]] != ""
        (image,) = utils.doc_to_visual(docs[0])
        assert image.mode == "RGB" and image.size == (40, 32)
        assert utils.doc_to_text(docs[0])
        items = [utils.process_results(doc, [f" {doc['answer']}\n"])[metric] for doc in docs]
        found = getattr(utils, f"aggregate_{metric}")(items)
        assert found > 0.5 if metric == "cider_d" else found == 1.0


def test_files_for_vlmevalkit_have_base64_images_and_options(
    suite_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "LMUData"
    assert evaluate.main(["export", str(suite_file), "--to", "vlmevalkit", "--out", str(out)]) == 0
    csv.field_size_limit(10**7)
    tables = {}
    for path in sorted(out.glob("*.tsv")):
        rows = list(csv.DictReader(io.StringIO(path.read_text()), delimiter="\t"))
        tables[path.stem] = rows
        assert [row["index"] for row in rows] == [str(n) for n in range(1, len(rows) + 1)]
        images = {row["index"]: row["image"] for row in rows}
        for row in rows:
            # VLMEvalKit takes up to 64 characters for the index of the row with the image.
            data = row["image"] if len(row["image"]) > 64 else images[row["image"]]
            with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
                assert image.size == (40, 32)
    assert [row["answer"] for row in tables["suite_exists"]][:3] == ["yes", "no", "no"]
    for row in tables["suite_color"]:
        assert row["question"] == "Which color?"
        assert row[row["answer"]] == row["question_id"]
    assert tables["suite_captions"][0]["answer"] == str(["a red wall", "everything is red"])


def test_a_folder_with_other_files_is_not_written(suite_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "utils.py").write_text("# mine\n")
    command = ["export", str(suite_file), "--to", "lmms-eval", "--out", str(tmp_path / "mine")]
    with pytest.raises(UserError, match="not empty"):
        evaluate.main(command)
    assert (tmp_path / "mine" / "utils.py").read_text() == "# mine\n"
