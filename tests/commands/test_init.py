"""`init` writes configurations that load, fit the device and train; it replaces nothing."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from vlm_sft import init
from vlm_sft.commands import init as work
from vlm_sft.commands.init_files import Chosen, Project, _steps_between, stage1_file, stage2_file
from vlm_sft.config.method import training_method
from vlm_sft.config.schema import RunConfig, load_config
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.records import read_records
from vlm_sft.errors import UserError
from vlm_sft.evaluation.suites.config import load_suite
from vlm_sft.evaluation.suites.tasks import read_task
from vlm_sft.utils.cores import available_cores

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny" / "data"
ASSUMED = ["--assume", "20000,900,300"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower, a language model, images, and a table of questions and one of captions."""
    root = tmp_path_factory.mktemp("init")
    sizes = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower = CLIPVisionConfig(hidden_size=32, image_size=48, patch_size=16, **sizes)
    CLIPVisionModel(tower).save_pretrained(root / "tower")
    LlamaForCausalLM(
        LlamaConfig(vocab_size=261, hidden_size=64, bos_token_id=257, eos_token_id=258, **sizes)
    ).save_pretrained(root / "llm")
    # Two layers of a 7B model. Planning needs no weights.
    wide = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    LlamaConfig(vocab_size=1024, num_hidden_layers=2, **wide).save_pretrained(root / "wide")
    shutil.copytree(TINY / "images", root / "images")
    for name, header in (("instructions", "question,answer"), ("captions", "caption")):
        with open(root / f"{name}.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", *header.split(",")])
            for record in json.loads((TINY / f"{name}.json").read_text()):
                question, answer = (turn["value"] for turn in record["conversations"][:2])
                texts = [question.replace("<image>", "").strip(), answer]
                table.writerow([record["image"], *texts[-header.count(",") - 1 :]])
    return root


def run(folder: Path, out: Path, *options: str) -> dict[str, RunConfig]:
    """The configurations that `init` writes, by stage."""
    models = ["--tower", str(folder / "tower"), "--llm", str(folder / "llm")]
    given = [*models, "--tokenizer", "bytes", "--gpu", "cpu", *options]
    data = ["--data", str(folder / "instructions.csv"), "--out", str(out), "--yes"]
    assert init.main([*data, *given]) == 0
    paths = {name: out / f"{name}.yaml" for name in ("stage1", "stage2")}
    return {name: load_config(path) for name, path in paths.items() if path.exists()}


def test_one_file_of_questions_gives_both_stages_and_a_suite(folder, tmp_path, capsys):
    configs = run(folder, tmp_path / "my")
    stage1, stage2 = configs["stage1"], configs["stage2"]
    assert stage1.data.train == stage2.data.train and stage1.data.template == "chatml"
    assert (training_method(stage1), training_method(stage2)) == ("stage1", "full")
    assert stage2.projector == f"{stage1.output_dir}/final"
    rates = stage2.optim.learning_rate  # of a small language model
    assert (rates.projector, rates.language_model) == (2e-4, 1e-4)
    assert stage2.train.precision == "fp32" and stage2.train.global_batch_size == 8
    # 24 records: a new projector sees them twenty times, the language model three times.
    assert (stage1.train.epochs, stage2.train.epochs) == (20, 3)
    suite = load_suite(tmp_path / "my" / "suite.yaml")
    assert suite.tasks[0].kind == "gqa"
    assert len(read_task(suite.tasks[0], seed=suite.seed).questions) == 24
    printed = capsys.readouterr().err
    assert "there are no captions, so stage 1 trains the projector on the questions" in printed
    assert f"  vlm-sft stage2 {tmp_path / 'my' / 'stage2.yaml'}" in printed
    with pytest.raises(UserError, match=r"stage1\.yaml exists, and init replaces nothing") as error:
        run(folder, tmp_path / "my")
    assert error.value.reason == "not_ours"


def test_long_answers_are_scored_as_descriptions_and_every_question_is_asked(folder, tmp_path):
    turns = [("Name it.", "A cat."), ("What is there?", "A small " + "very " * 9 + "old cat.")]
    said = [{"from": who, "value": text} for pair in turns
            for who, text in zip(("human", "gpt"), pair, strict=True)]  # fmt: skip
    said[0]["value"] = f"<image>\n{said[0]['value']}"
    record = {"id": "a", "image": "images/red-circle-0.png", "conversations": said}
    (folder / "talk.json").write_text(json.dumps([record]))
    run(folder, tmp_path / "my", "--data", str(folder / "talk.json"))
    answer, describe = load_suite(tmp_path / "my" / "suite.yaml").tasks
    assert (answer.kind, describe.kind) == ("gqa", "caption")
    asked = [[q.prompt for q in read_task(t, seed=0).questions] for t in (answer, describe)]
    assert asked == [["Name it."], ["What is there?"]]


def test_a_short_answer_among_long_ones_is_a_description(folder, tmp_path):
    records = [
        {"id": str(n), "image": "images/red-circle-0.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat is there?"}, {"from": "gpt", "value": text}]}
        for n, text in enumerate(["A cat.", *["A very " + "old " * 8 + "cat."] * 4])
    ]  # fmt: skip
    (folder / "alike.json").write_text(json.dumps(records))
    run(folder, tmp_path / "my", "--data", str(folder / "alike.json"))
    (task,) = load_suite(tmp_path / "my" / "suite.yaml").tasks
    assert task.kind == "caption" and len(read_task(task, seed=0).questions) == 5
    (folder / "alike.json").write_text(json.dumps(records[:3]))
    run(folder, tmp_path / "other", "--data", str(folder / "alike.json"))
    kinds = [task.kind for task in load_suite(tmp_path / "other" / "suite.yaml").tasks]
    assert kinds == ["gqa", "caption"]


def test_captions_are_asked_for_with_the_same_words_in_stage_2_and_in_the_suite(folder, tmp_path):
    said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A red circle."}]
    bare = {"id": "a", "image": "images/red-circle-0.png", "conversations": said}
    (folder / "bare.json").write_text(json.dumps([bare]))
    captions, eval_file = str(folder / "captions.csv"), str(folder / "bare.json")
    configs = run(folder, tmp_path / "my", "--data", captions, "--eval", eval_file)
    (task,) = load_suite(tmp_path / "my" / "suite.yaml").tasks
    (question, *_) = read_task(task, seed=0).questions
    assert question.prompt == "Describe the image."
    data = configs["stage2"].data
    for file in (*data.train, *data.eval):
        (first, *_) = read_records(file)
        assert isinstance(first, Conversation) and first.turns[0].text == question.prompt
    assert configs["stage1"].data.template == "plain"  # which drops questions


def test_a_column_may_be_named_as_caption(folder, tmp_path):
    given = ("--data", str(folder / "captions.csv"), "--columns", "image=image,caption=caption")
    (file,) = run(folder, tmp_path / "my", *given)["stage2"].data.train
    assert (file.columns.image, file.columns.text) == ("image", "caption")


@pytest.mark.parametrize(
    ("steps", "between"), [(3, 10), (24, 10), (240, 20), (1500, 100), (5_000, 500), (90_000, 500)]
)
def test_a_run_is_saved_about_ten_times(steps: int, between: int) -> None:
    assert _steps_between(steps) == between


def test_a_short_run_is_saved_and_evaluated_before_it_ends(folder, tmp_path):
    eval_file = str(folder / "instructions.csv")
    stage2 = run(folder, tmp_path / "my", "--eval", eval_file)["stage2"]
    assert (stage2.train.save_every_steps, stage2.train.eval_every_steps) == (10, 10)


def test_names_and_the_folder_are_checked_before_any_record_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "_read_head", lambda file: pytest.fail("records were read"))
    (tmp_path / "file").write_text("")
    for given, message in (
        (["--tower", str(tmp_path / "none")], "--tower: no such folder"),
        (["--llm", "./none"], "--llm: no such folder"),
        (["--template", "chatm"], "--template: no template 'chatm'; did you mean 'chatml'"),
        (["--out", str(tmp_path / "file")], "--out .*file: .*file is a file; give another"),
        (["--out", str(tmp_path / "file" / "a")], "file is a file; give another"),
    ):
        with pytest.raises(UserError, match=message):
            run(folder, tmp_path / "my", *given)


def test_a_table_with_other_columns_is_named_by_part(folder, tmp_path):
    rows = (folder / "instructions.csv").read_text().split("\n", 1)[1]
    table = folder / "own.csv"
    table.write_text("file,q,the answer\n" + rows)
    named = ["--data", str(table), "--columns", "image=file,question=q,answer=the answer"]
    configs = run(folder, tmp_path / "my", *named)
    for config in configs.values():
        (file,) = config.data.train
        names = file.columns
        assert (names.image, names.question, names.answer) == ("file", "q", "the answer")
    row = json.loads((tmp_path / "my" / "suite.jsonl").read_text().splitlines()[0])
    assert row["question"] == "Which colour?"
    run(folder, tmp_path / "same", *named, "--eval", str(table))
    assert "also trained on" in (tmp_path / "same" / "suite.yaml").read_text()
    for wrong, message in (
        ("file", "expected PART=COLUMN"),
        ("photo=file", "photo is no part"),
    ):
        with pytest.raises(UserError, match=message):
            run(folder, tmp_path / "other", *named[:3], wrong)


def test_a_tower_of_timm_is_recognized_by_its_folder(folder, tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_efficientnet", pretrained=False)
    timm.models.save_for_hf(model, str(tmp_path / "tower"), safe_serialization=True)
    config = run(folder, tmp_path / "my", "--tower", str(tmp_path / "tower"))["stage1"]
    tower = config.model.vision_tower
    assert (tower.library, tower.feature_layers) == ("timm", [-1])
    assert tower.grid_pool == model.default_cfg["pool_size"][0] // 2 > 1


def test_a_cpu_gets_few_image_tokens_and_the_tower_runs_once(tmp_path):
    project = {
        "out": "my", "data": "d.json", "captions": None, "eval": None, "columns": {},
        "images": None, "tower": "t", "tower_is_timm": True, "llm": "l", "tokenizer": None,
        "template": "auto", "from_checkpoint": None, "projector": None, "start_from": None,
        "precision": "fp32", "data_are_captions": False, "prompted": frozenset(), "gpus": 1,
        "suite_images": ".",
    }  # fmt: skip
    chosen = Chosen("stage1", "none", 8, 8, 3, 128, 30)
    on_cpu = yaml.safe_load(stage1_file(Project(**project, grid_pool=3, device="cpu"), chosen))
    on_gpu = yaml.safe_load(stage1_file(Project(**project, grid_pool=None, device="h100"), chosen))
    assert on_cpu["model"]["vision_tower"].pop("grid_pool") == 3
    assert on_cpu["data"].pop("feature_cache") == "my/runs/features"
    assert on_cpu["data"].pop("num_workers") == min(2, available_cores())
    assert on_gpu["data"].pop("num_workers") == 2
    assert on_cpu == on_gpu
    for parameters, rate in ((7_000_000_000, 2e-5), (135_000_000, 1e-4)):
        chosen = Chosen("full", "none", 8, 8, 3, 128, 30, parameters=parameters)
        text = stage2_file(Project(**project, grid_pool=None, device="h100"), chosen)
        rates = yaml.safe_load(text)["optim"]["learning_rate"]
        assert float(rates["language_model"]) == rate


def test_captions_and_other_starts_decide_about_stage_1(folder, tmp_path):
    captions = ("--captions", str(folder / "captions.csv"))
    stage1 = run(folder, tmp_path / "a", *captions)["stage1"]
    assert (stage1.data.template, stage1.data.train[0].path) == ("plain", captions[1])
    configs = run(folder, tmp_path / "b", "--projector", "runs/x/final")
    assert "stage1" not in configs and configs["stage2"].projector == "runs/x/final"
    configs = run(folder, tmp_path / "c", "--start-from", "runs/x/final", "--eval", captions[1])
    assert configs["stage2"].start_from == "runs/x/final"
    assert configs["stage2"].data.eval[0].path == captions[1]
    for options, words in (
        ((*captions, "--projector", "x"), "--projector and --captions"),
        (("--from-checkpoint", "x"), "--tower: --from-checkpoint names all parts"),
        (("--gpu-memory", "8"), "--gpu and --gpu-memory"),
    ):
        with pytest.raises(UserError, match=words):
            run(folder, tmp_path / "d", *options)


def options(folder: Path, out: Path) -> list[str]:
    """For the two wide layers, and records that are not tokenized."""
    models = ["--tower", str(folder / "tower"), "--llm", str(folder / "wide")]
    data = ["--data", str(folder / "instructions.csv"), "--out", str(out), "--yes"]
    return [*data, *models, "--tokenizer", "bytes", *ASSUMED]


@pytest.mark.parametrize(("gib", "method"), [("12", "full"), ("4", "lora"), ("2.3", "qlora")])
def test_the_method_is_the_first_that_fits_the_device(folder, tmp_path, gib, method):
    out = tmp_path / "my"
    assert init.main([*options(folder, out), "--gpu-memory", gib]) == 0
    configs = {name: load_config(out / f"{name}.yaml") for name in ("stage1", "stage2")}
    assert training_method(configs["stage2"]) == method
    for name, config in configs.items():
        assert (config.model.language_model.quantization == "nf4") == (method == "qlora")
        assert config.train.precision == "bf16" and config.data.max_length >= 900
        planned = (out / f"{name}.yaml").read_text().partition("Planned: ")[2]
        assert 0.5 < float(planned.partition(" GiB")[0]) <= float(gib)


def test_nothing_that_fits_is_one_sentence(folder, tmp_path):
    with pytest.raises(UserError, match=r"does not fit GPU with 1 GiB \(1\.0 GiB\)"):
        init.main([*options(folder, tmp_path / "my"), "--gpu-memory", "1"])
    assert not (tmp_path / "my").exists()


def test_a_terminal_is_asked_for_what_is_missing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked = []

    def ask(question: str) -> str:
        asked.append(question)
        answers = {"File": "instructions.csv", "Vision": "tower", "Language": "llm"}
        return str(folder / next(a for word, a in answers.items() if question.startswith(word)))

    given = ["--tokenizer", "bytes", "--gpu", "cpu", "--out", str(tmp_path / "my")]
    assert work.run(init.parser().read(given), ask) == 0
    assert len(asked) == 3 and "[openai/clip-vit-large-patch14-336]: " in asked[1]
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    with pytest.raises(UserError, match="missing: --data PATH"):
        work.run(init.parser().read(["--out", str(tmp_path / "other")]))


@pytest.mark.slow
def test_a_table_becomes_a_model_that_answers(folder, tmp_path, capsys):
    from tests.train.tiny import reset_accelerate
    from vlm_sft import chat, check, evaluate, stage1, stage2

    run(folder, tmp_path / "my")
    one, two = (str(tmp_path / "my" / f"{name}.yaml") for name in ("stage1", "stage2"))
    for main, arguments in (
        (check.main, [one]),
        (stage1.main, [one]),
        (check.main, [two]),
        (stage2.main, [two, "optim.learning_rate.language_model=3e-3", "train.epochs=40"]),
        (evaluate.main, [str(tmp_path / "my" / "runs" / "stage2" / "final"),
                         str(tmp_path / "my" / "suite.yaml"), "--out", str(tmp_path / "results")]),
    ):  # fmt: skip
        reset_accelerate()
        assert main(arguments) == 0, arguments
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results
    capsys.readouterr()
    image = str(TINY / "images" / "red-circle-0.png")
    final = str(tmp_path / "my" / "runs" / "stage2" / "final")
    assert chat.main([final, "--image", image, "--prompt", "Which colour?"]) == 0
    assert "red" in capsys.readouterr().out
