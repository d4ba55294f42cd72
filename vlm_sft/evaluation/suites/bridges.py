"""Write a suite's questions for other evaluation libraries: lmms-eval and VLMEvalKit."""

import base64
import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vlm_sft.data.images import open_image
from vlm_sft.errors import UserError
from vlm_sft.evaluation.scores.files import Row
from vlm_sft.evaluation.suites.shown_images import png
from vlm_sft.evaluation.suites.tasks import SuiteQuestion, Task, options_text, row_id
from vlm_sft.train.validation import LOWER_IS_BETTER
from vlm_sft.utils.atomic_files import write_bytes, write_text
from vlm_sft.utils.image_paths import image_path
from vlm_sft.utils.ownership import own_directory
from vlm_sft.utils.reading import read_bytes

LMMS_KIND: Final = "lmms-eval task folder"
VLMEVALKIT_KIND: Final = "VLMEvalKit data folder"

METRICS: Final[Mapping[str, tuple[str, ...]]] = {
    "pope": ("accuracy", "precision", "recall", "f1"),
    "caption": ("cider_d", "bleu_4", "rouge_l"),
    "chair": ("chair_i", "chair_s", "recall"),
    "counting": ("accuracy", "mean_absolute_error"),
    "grounding": ("accuracy", "mean_iou"),
    "constraints": ("prompt_strict", "instruction_strict", "prompt_loose"),
    "refusal": ("over_refusal", "wrong_confidence"),
}
"""Scores that lmms-eval prints, by kind; `accuracy` for the others."""

_ANSWERS: Final = ("label", "answer", "caption", "answers", "box", "bbox", "objects")


def export_lmms_eval(tasks: Sequence[Task], out: Path, *, inputs: Iterable[Path]) -> Iterator[str]:
    """Write a folder for lmms-eval's `--include_path`; yield lines for the user.

    Every task becomes a YAML file, a Parquet file with questions and images, and a file of true
    answers. `utils.py` scores with `vlm_sft`, which lmms-eval's environment needs, so that both
    print the same figures. Only the questions with their own images are written.

    Raises:
        UserError: A task has no images, or the folder is not ours.
        ImageError: An image is missing or broken.
    """
    _require_images(tasks)
    own_directory(out, LMMS_KIND, inputs=inputs, setting="--out")
    names = sorted({name for task in tasks for name in _metrics(task)})
    for task in tasks:
        stem = f"suite_{task.config.name}"
        write_bytes(out / f"{stem}.parquet", _parquet(task))
        truth = (json.dumps(dict(row.values), ensure_ascii=False) + "\n" for row in task.truth)
        write_text(out / f"{stem}.truth.jsonl", "".join(truth))
        write_text(out / f"{stem}.yaml", _lmms_yaml(task, out.absolute() / f"{stem}.parquet"))
    write_text(out / "utils.py", _lmms_utils(tasks, names))
    stems = ",".join(f"suite_{task.config.name}" for task in tasks)
    yield f"wrote {out}; in lmms-eval's environment, with vlm_sft installed there:"
    yield (
        f"  python -m lmms_eval --model llava_hf --model_args pretrained=EXPORTED --include_path "
        f"{out} --tasks {stems} --batch_size 1 --log_samples --output_path lmms_results"
    )


def export_vlmevalkit(tasks: Sequence[Task], out: Path, *, inputs: Iterable[Path]) -> Iterator[str]:
    """Write a TSV file per task for VLMEvalKit's `LMUData` folder; yield lines for the user.

    Multiple choice has the options in columns A, B, ...; VLMEvalKit evaluates it. Of other kinds it
    only writes the answers, which `vlm-sft score` then scores.

    Raises:
        UserError: A task has no images, or the folder is not ours.
        ImageError: An image is missing or broken.
    """
    _require_images(tasks)
    own_directory(out, VLMEVALKIT_KIND, inputs=inputs, setting="--out")
    for task in tasks:
        write_text(out / f"suite_{task.config.name}.tsv", _tsv(task))
    stems = " ".join(f"suite_{task.config.name}" for task in tasks)
    yield f"wrote {out}; in VLMEvalKit's folder, with a server of the model:"
    yield (
        f"  LMUData={out.absolute()} python run.py --data {stems} --model NAME --base-url "
        "http://127.0.0.1:8000/v1 --key x --mode infer"
    )


def _require_images(tasks: Sequence[Task]) -> None:
    for task in tasks:
        if task.config.images is None:
            raise UserError(f"task {task.config.name}: has no images; remove it from the suite")


def _metrics(task: Task) -> tuple[str, ...]:
    return METRICS.get(task.config.kind, ("accuracy",))


def _parquet(task: Task) -> bytes:
    from datasets import Dataset, Features, Image, Value

    texts = ("question_id", "task", "question", "answer")
    features = Features({**{name: Value("string") for name in texts}, "image": Image()})
    truth = _truth_by_id(task)
    columns: dict[str, list[Any]] = {name: [] for name in (*texts, "image")}
    for question in task.questions:
        columns["question_id"].append(question.id)
        columns["task"].append(task.config.name)
        columns["question"].append(question.prompt)
        columns["answer"].append(str(_answer(truth.get(question.id))))
        columns["image"].append({"bytes": _image_bytes(task, question), "path": question.image})
    buffer = io.BytesIO()
    Dataset.from_dict(columns, features=features).to_parquet(buffer)
    return buffer.getvalue()


def _lmms_yaml(task: Task, parquet: Path) -> str:
    metrics = "\n".join(
        f"  - metric: {name}\n    aggregation: !function utils.aggregate_{name}\n"
        f"    higher_is_better: {str(name not in LOWER_IS_BETTER).lower()}"
        for name in _metrics(task)
    )
    return f"""task: suite_{task.config.name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {json.dumps(str(parquet))}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {task.config.max_tokens}
  temperature: 0
  do_sample: false
process_results: !function utils.process_results
metric_list:
{metrics}
metadata:
  - version: 0.0
"""


_UTILS = '''"""Score the tasks of this folder; written by `vlm-sft evaluate export`."""

import json
from pathlib import Path

from vlm_sft.evaluation.scores.files import Answers, Row
from vlm_sft.evaluation.scores.registry import score
from vlm_sft.evaluation.scores.results import Options

TASKS = @TASKS@
"""Kind and options of each task."""


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    answer = {"task": doc["task"], "id": doc["question_id"], "answer": results[0]}
    return {name: answer for name in TASKS[doc["task"]]["metrics"]}


def _score(name, items):
    task = items[0]["task"]
    path = Path(__file__).parent / f"suite_{task}.truth.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    truth = [Row(f"{path}:{number}", row) for number, row in enumerate(rows, 1)]
    answers = Answers(path, {item["id"]: item["answer"].strip() for item in items})
    settings = TASKS[task]
    found = score(settings["kind"], answers, truth, Options(**settings["options"])).scores
    if "readings" in found:
        found = found["readings"][settings["options"]["reading"]]
    return found[name]
'''


def _lmms_utils(tasks: Sequence[Task], names: Sequence[str]) -> str:
    settings = {
        task.config.name: {
            "kind": task.config.kind,
            "options": task.config.scoring.model_dump(),
            "metrics": list(_metrics(task)),
        }
        for task in tasks
    }
    functions = "".join(
        f'\n\ndef aggregate_{name}(items):\n    return _score("{name}", items)\n' for name in names
    )
    return _UTILS.replace("@TASKS@", repr(settings)) + functions


def _tsv(task: Task) -> str:
    truth = _truth_by_id(task)
    is_choice = task.config.kind == "multiple_choice"
    letters: list[str] = []
    if is_choice:
        most = max(len(row.values["choices"]) for row in task.truth)
        letters = [chr(ord("A") + number) for number in range(most)]
    buffer = io.StringIO()
    columns = ["index", "image", "question", *letters, "answer", "category", "question_id"]
    writer = csv.DictWriter(buffer, columns, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    first: dict[str | None, int] = {}
    for index, question in enumerate(task.questions, 1):
        row = truth.get(question.id)
        # An image that an earlier row has is given by the index of that row.
        if question.image in first:
            image = str(first[question.image])
        else:
            first[question.image] = index
            image = base64.b64encode(_image_bytes(task, question)).decode()
        values: dict[str, Any] = {
            "index": index,
            "image": image,
            "question": question.prompt,
            "answer": _answer(row),
            "category": "" if row is None else row.get("category", "type") or "",
            "question_id": question.id,
        }
        if is_choice and row is not None:
            choices = row.values["choices"]
            values["question"] = question.prompt.split(f"\n{options_text(choices)}")[0]
            values |= dict(zip(letters, choices, strict=False))
        writer.writerow(values)
    return buffer.getvalue()


def _truth_by_id(task: Task) -> dict[str, Row]:
    """Return the true answers by question id; of captions, the first one, with all `answers`."""
    found: dict[str, Row] = {}
    captions: dict[str, list[str]] = {}
    for row in task.truth:
        name = row_id(row, task.config.kind)
        found.setdefault(name, row)
        if task.config.kind == "caption":
            captions.setdefault(name, []).append(row.text("caption", "text", "answer"))
    return {
        name: Row(row.place, {"answer": captions[name]}) if name in captions else row
        for name, row in found.items()
    }


def _answer(row: Row | None) -> Any:
    value = None if row is None else row.get(*_ANSWERS)
    if row is not None and isinstance(value, int) and "choices" in row.values:
        return chr(ord("A") + value)
    return "" if value is None else value


def _image_bytes(task: Task, question: SuiteQuestion) -> bytes:
    assert task.config.images is not None and question.image is not None
    path = image_path(task.config.images, question.image, follow_symlinks=True)
    image = open_image(path)  # refuses broken files
    data = read_bytes(path)
    return data if data.startswith((b"\xff\xd8\xff", b"\x89PNG")) else png(image)
