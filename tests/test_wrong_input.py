"""Wrong input ends every command with one clear sentence and exit code 2."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_sft import check, stage1, stage2
from vlm_sft.commands.run_command import run_command
from vlm_sft.config.schema import means_folder

pytestmark = pytest.mark.usefixtures("in_the_repository")

TINY = Path("configs") / "tiny"
Main = Callable[[Sequence[str]], int]
HUMAN = {"from": "human", "value": "<image>\nWhat?"}
GPT = {"from": "gpt", "value": "a dog"}


def refusal(main: Main, argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_command(main, argv)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error VS") and err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def record(**changes: Any) -> dict[str, Any]:
    return {"id": "r7", "image": "dog.png", "conversations": [HUMAN, GPT], **changes}


def data(tmp_path: Path, *records: dict[str, Any]) -> str:
    Image.new("RGB", (20, 30), "brown").save(tmp_path / "dog.png")
    path = tmp_path / "records.json"
    path.write_text(json.dumps(list(records)))
    return f"data.train.0.path={path}"


def half_a_jpeg(path: Path) -> None:
    Image.effect_noise((200, 200), 90).convert("RGB").save(path, quality=90)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


BAD_RECORDS = {
    "missing image": (
        record(image="gone.png"),
        ["VS201: ", "no image file 'gone.png' in the folder "],
    ),
    "broken JPEG": (
        record(image="half.jpg"),
        ["VS204: ", "half.jpg: truncated or corrupt image", "get it again"],
    ),
    "too many places": (
        record(conversations=[{"from": "human", "value": "<image><image>\nWhat?"}, GPT]),
        ["VS313: ", "has places for 2 images", "the record lists 1"],
    ),
    "too few places": (
        record(conversations=[{"from": "human", "value": "What?"}, GPT]),
        ["VS313: ", "has places for 0 images", "the record lists 1"],
    ),
    "unknown role": (
        record(conversations=[{**HUMAN, "from": "humann"}, GPT]),
        ["VS314: ", "turn 0: unknown role 'humann'; did you mean 'human'?"],
    ),
    "empty answer": (
        record(conversations=[HUMAN, {"from": "gpt", "value": " "}]),
        ["VS311: ", "turn 1: the answer is empty; write one"],
    ),
}


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_a_bad_record_stops_a_run_before_any_model_is_built(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, words = BAD_RECORDS[kind]
    half_a_jpeg(tmp_path / "half.jpg")
    overrides = [data(tmp_path, record(id="good"), bad), f"output_dir={tmp_path}/run"]
    # A model that cannot be built: the record is told first.
    overrides.append("model.language_model.config.model_type=none")
    line = refusal(stage1.main, [str(TINY / "stage1.yaml"), *overrides], capsys)
    assert "records.json[1]: record 'r7': " in line
    assert all(word in line for word in words), line


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_check_finds_a_bad_record_wherever_it_stands(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, words = BAD_RECORDS[kind]
    half_a_jpeg(tmp_path / "half.jpg")
    good = [record(id=f"good-{i}") for i in range(30)]
    argv = [str(TINY / "stage1.yaml"), "--no-model", data(tmp_path, *good, bad, *good)]
    assert check.main(argv) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("bad record: ")]
    assert "records.json[30]: record 'r7': " in line
    assert all(word in line for word in words), line
    assert "60 of 61 records can be used" in out
    assert "check failed" in out


def test_a_broken_image_deep_in_the_data_stops_the_run_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half_a_jpeg(tmp_path / "half.jpg")
    good = [record(id=f"good-{i}") for i in range(20)]
    options = [data(tmp_path, *good, record(image="half.jpg")), f"output_dir={tmp_path}/run"]
    options += ["data.eval=[]", "train.trackers=[]", "train.global_batch_size=21"]
    with pytest.raises(SystemExit) as stopped:
        run_command(stage1.main, [str(TINY / "stage1.yaml"), *options])
    assert stopped.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error VS")]
    assert "records.json[20]: record 'r7': " in line and "half.jpg" in line


@pytest.mark.parametrize("main", [stage1.main, stage2.main, check.main])
@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("train.global_batchsize=8", "did you mean 'train.global_batch_size'?"),
        ("optim.learning_rate.projektor=1", "did you mean 'optim.learning_rate.projector'?"),
        ("model.vision_tower.feature_layer=[-2]", "did you mean 'model.vision_tower.feature_lay"),
    ],
)
def test_a_misspelt_key_names_the_nearest_one(
    main: Main, override: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(main, [str(TINY / "stage1.yaml"), override], capsys)
    assert f"unknown key '{override.partition('=')[0]}'; {hint}" in line


def test_a_misspelt_key_in_the_file_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    text = (TINY / "stage1.yaml").read_text()
    path.write_text(text.replace("image_aspect: crop", "image_aspec: crop"))
    line = refusal(check.main, [str(path)], capsys)
    assert f"{path}: unknown key 'data.image_aspec'; did you mean 'data.image_aspect'?" in line


@pytest.mark.parametrize("main", [stage2.main, check.main])
def test_a_projector_of_another_shape_is_refused_with_both_shapes(
    main: Main, lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"projector={lora_run}/final", "model.vision_tower.config.hidden_size=40"]
    argv = [str(TINY / "stage2.yaml"), *options, f"output_dir={tmp_path}/run"]
    with pytest.raises(SystemExit) as stopped:
        run_command(main, argv)
    assert stopped.value.code == 2
    streams = capsys.readouterr()
    if main is check.main:  # a line of its table
        line = " ".join(streams.out.replace("│", " ").split())
    else:
        (line,) = [x for x in streams.err.splitlines() if x.startswith("error VS403: ")]
    assert "'linear_1.weight' is 64x32" in line and "64x40" in line


@pytest.mark.parametrize("main", [stage1.main, check.main])
@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("language_model.name", ["model.language_model.tokenizer=null"]),
        ("language_model.name", []),
        ("language_model.tokenizer", []),
        ("vision_tower.name", []),
    ],
)
def test_a_missing_folder_of_a_base_model_is_named(
    main: Main,
    part: str,
    options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = tmp_path / "models" / "gone"
    argv = [str(TINY / "stage1.yaml"), f"model.{part}={missing}"]
    if part.endswith(".name"):
        argv.append(f"model.{part.removesuffix('name')}config=null")
    argv += [*options, f"output_dir={tmp_path}/run", "train.trackers=[]"]
    line = refusal(main, argv, capsys)
    assert f"error VS002: model.{part}: no such folder '{missing}'" in line
    assert "; give a" in line


@pytest.mark.parametrize(
    ("name", "is_folder"),
    [
        ("models/gone", True),
        ("./gone", True),
        ("~/gone", True),
        ("/a", True),
        ("a/b/c", True),
        ("gpt2", False),
        ("lmsys/vicuna-7b-v1.5", False),
    ],
)
def test_a_name_of_a_model_is_a_folders_or_the_hubs(
    name: str, is_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert means_folder(name) is is_folder


@pytest.mark.parametrize("main", [stage1.main, stage2.main, check.main])
def test_a_configuration_that_is_not_there_is_named(
    main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "gone.yaml: no such configuration file" in refusal(main, ["gone.yaml"], capsys)
