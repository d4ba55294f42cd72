"""Whole runs: both stages, resumed, refused, and what they leave behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.rounding import rounding, terms_of_a_run
from tests.tiny_runs import FAST, ROOT, TINY, rows, run
from tests.train.tiny import reset_accelerate
from vlm_sft import check, stage1, stage2
from vlm_sft.checkpoint.components import unused_parts
from vlm_sft.checkpoint.format import read_manifest, verify
from vlm_sft.commands.run_command import run_command
from vlm_sft.commands.train import log_result
from vlm_sft.config.schema import load_config
from vlm_sft.errors import CheckpointError, ConfigError, RecordError, UserError
from vlm_sft.train.trainer import RunResult
from vlm_sft.utils.logs import configure_logging
from vlm_sft.utils.ownership import own_directory


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(ROOT)
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture(scope="module")
def stage1_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "stage1"
    here = Path.cwd()
    os.chdir(ROOT)
    assert run("stage1", out) == 0
    os.chdir(here)
    return out


def test_stage_1_leaves_a_complete_run_folder(stage1_run: Path) -> None:
    names = {path.name for path in stage1_run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "ledger.jsonl", "checkpoints", "final"} <= names
    manifest = verify(stage1_run / "final").manifest
    assert (manifest["step"], manifest["stage"]) == (4, "stage1")
    assert set(manifest["frozen"]) == {"vision_tower", "language_model"}
    files = {p.suffix for p in (stage1_run / "final").rglob("*") if p.is_file()}
    assert files <= {".safetensors", ".json", ".yaml", ".jinja"}
    assert sorted(load_file(stage1_run / "final" / "projector.safetensors")) == [
        "linear_1.bias",
        "linear_1.weight",
        "linear_2.bias",
        "linear_2.weight",
    ]
    steps = [row for row in rows(stage1_run / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert set(steps[0]) == {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "samples_per_second",
        "target_tokens_per_second",
        "num_targets",
        "memory_bytes",
        "seconds",
    }
    evaluations = [row for row in rows(stage1_run / "metrics.jsonl") if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [4]
    answers = rows(stage1_run / "samples.jsonl")
    assert len(answers) == 2
    for name in (name for row in answers for name in row["images"]):
        assert (stage1_run / "sample_images" / name).read_bytes().startswith(b"\xff\xd8")
    assert (stage1_run / "report.html").read_text().count("data:image/jpeg;base64,") == 2


def test_a_run_logs_its_start_its_saves_and_its_end_with_the_time_of_each_phase(
    stage1_run: Path,
) -> None:
    started, *saved, ended = rows(stage1_run / "starts.jsonl")
    assert (started["event"], started["step"], started["total_steps"]) == ("started", 0, 4)
    assert started["settings"]["train.max_steps"] == 4 and started["stage"] == "stage1"
    assert [(row["event"], row["step"]) for row in saved] == [("saved", 2), ("saved", 4)]
    assert (ended["step"], ended["how"]) == (4, "finished")
    assert set(ended["seconds"]) == {"setup", "training", "evaluation", "saving"}
    assert all(seconds > 0 for seconds in ended["seconds"].values())


def test_a_finished_run_says_so_and_does_nothing(
    stage1_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (stage1_run / "metrics.jsonl").read_bytes()
    assert run("stage1", stage1_run) == 0
    assert "already finished: " in capsys.readouterr().err
    assert (stage1_run / "metrics.jsonl").read_bytes() == before


def test_a_changed_configuration_is_refused_with_the_difference(stage1_run: Path) -> None:
    with pytest.raises(ConfigError, match=r"- optim.learning_rate.projector: 0.001\n .*: 0\.5"):
        run("stage1", stage1_run, "optim.learning_rate.projector=0.5")


@pytest.mark.parametrize(
    ("config", "folder"), [("stage2", "language_model"), ("stage2_lora", "adapter")]
)
def test_stage_2_learns_from_stage_1s_projector_and_resumes_bit_for_bit(
    config: str,
    folder: str,
    stage1_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    projector = f"projector={stage1_run}/final"
    assert run("stage2", tmp_path / "whole", projector, config=config) == 0
    ask = f"ask it: vlm-sft chat {tmp_path / 'whole' / 'final'} --image IMAGE"
    assert capsys.readouterr().err.splitlines()[-1] == ask
    # The other run loses all that came after its first checkpoint, as after a kill.
    assert run("stage2", tmp_path / "cut", projector, config=config) == 0
    for lost in ("final", "checkpoints/step-00000004"):
        os.rename(tmp_path / "cut" / lost, tmp_path / Path(lost).name)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert run("stage2", tmp_path / "cut", projector, config=config) == 0
    whole, cut = verify(tmp_path / "whole" / "final"), verify(tmp_path / "cut" / "final")
    assert any(name.startswith(folder) for name in whole.manifest["files"])
    tensors = [name for name in whole.manifest["files"] if name.endswith(".safetensors")]
    assert len(tensors) == 3
    for name in tensors:
        assert whole.manifest["files"][name] == cut.manifest["files"][name]
    losses = [
        [r["loss"] for r in rows(tmp_path / d / "metrics.jsonl") if "loss" in r]
        for d in ("whole", "cut")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    assert unused_parts(f"{stage1_run}/final") is None
    unused = unused_parts(f"{tmp_path}/whole/final")
    assert unused is not None and f"its trained {folder.strip('/').replace('_', ' ')}" in unused


@pytest.mark.parametrize("stopped_by", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_ends_with_one_line_that_says_how_to_resume(
    stopped_by: signal.Signals, stage1_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = verify(stage1_run / "final")

    def main(argv: Sequence[str]) -> int:
        result = RunResult(step=4, checkpoint=saved, stopped_by=stopped_by)
        log_result(result, "stage1")
        return result.exit_code

    configure_logging()
    with pytest.raises(SystemExit) as ended:
        run_command(main, [])
    assert ended.value.code == 128 + stopped_by
    line = f"stopped by {stopped_by.name} after step 4; saved in {saved.folder}; "
    assert capsys.readouterr().err == f"{line}run the same command to resume\n"


def test_a_projector_of_another_shape_is_refused_with_both_shapes(
    stage1_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"'linear_1.weight' is 64x32, but .* is 64x64"):
        run(
            "stage2",
            tmp_path,
            f"projector={stage1_run}/final",
            "model.vision_tower.feature_layers=[-2,-1]",
        )


def test_a_damaged_projector_is_refused(stage1_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stage1_run / "final", copy)
    content = bytearray((copy / "projector.safetensors").read_bytes())
    content[-3] ^= 4
    (copy / "projector.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"projector\.safetensors differs from the sha256"):
        run("stage2", tmp_path / "run", f"projector={copy}")


def test_a_projector_of_another_tower_is_refused(stage1_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="trained with another vision tower"):
        run("stage2", tmp_path, f"projector={stage1_run}/final", "seed=7")


def test_a_projector_of_other_features_is_refused(stage1_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="another choice of vision features"):
        run(
            "stage2",
            tmp_path,
            f"projector={stage1_run}/final",
            "model.vision_tower.feature_layers=[-1]",
        )


def test_stage_1_refuses_adapters(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora: stage 1 trains only the projector"):
        run("stage1", tmp_path, "lora.r=4")


def test_stage_2_asks_for_the_language_models_rate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"learning_rate\.language_model is missing"):
        run("stage2", tmp_path, config="stage1")


def test_a_missing_image_stops_before_the_model_is_built(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    record = {"id": "r1", "image": "gone.png", "conversations": turns}
    data = tmp_path / "data.json"
    data.write_text(json.dumps([record]))
    with pytest.raises(RecordError, match=r"record 'r1'.*gone.png"):
        run(
            "stage1",
            tmp_path / "run",
            f"data.train.0.path={data}",
            "model.language_model.config.model_type=none",
        )


def test_a_second_run_in_one_folder_is_refused(tmp_path: Path) -> None:
    import fcntl

    own_directory(tmp_path / "run", "training run")
    with (tmp_path / "run" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="locked by another run"):
            run("stage1", tmp_path / "run")


def test_infinite_losses_stop_before_the_update(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step \d+: .* \(records '.*weights are those before"):
        run(
            "stage1",
            tmp_path,
            "optim.learning_rate.projector=1e6",
            "optim.weight_decay=1e6",  # each update multiplies the weights by about -1e12
            "optim.schedule=constant",
            "optim.max_grad_norm=null",
            "train.max_steps=30",
        )


def test_worker_processes_change_nothing(stage1_run: Path, tmp_path: Path) -> None:
    assert run("stage1", tmp_path / "run", "data.num_workers=2") == 0
    name = "projector.safetensors"
    files = [read_manifest(d / "final")["files"] for d in (stage1_run, tmp_path / "run")]
    assert files[0][name] == files[1][name]


def test_a_run_that_was_stopped_before_its_last_folder_was_named_only_names_it(
    stage1_run: Path, tmp_path: Path
) -> None:
    assert run("stage1", tmp_path / "run") == 0
    os.rename(tmp_path / "run" / "final", tmp_path / "gone")
    assert run("stage1", tmp_path / "run") == 0
    assert verify(tmp_path / "run" / "final").step == 4


def test_bf16_and_recomputed_layers_train_with_fp32_weights(
    stage1_run: Path, tmp_path: Path
) -> None:
    options = ["train.precision=bf16", "train.activation_checkpointing=full"]
    assert run("stage2", tmp_path, "projector=null", *options, config="stage2_lora") == 0
    tensors = load_file(tmp_path / "final" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    losses = [row["loss"] for row in rows(tmp_path / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 4


def test_the_published_recipes_are_read_as_published() -> None:
    stage_1, full, lora = (
        load_config(ROOT / "configs" / "llava-1.5" / f"{name}.yaml")
        for name in ("stage1", "stage2", "stage2_lora")
    )
    assert (stage_1.optim.learning_rate.projector, stage_1.train.global_batch_size) == (1e-3, 256)
    assert (stage_1.data.template, stage_1.data.image_aspect) == ("plain", "crop")
    assert (full.optim.learning_rate.language_model, full.train.global_batch_size) == (2e-5, 128)
    assert (full.data.template, full.data.image_aspect) == ("vicuna_v1", "pad")
    assert lora.optim.learning_rate.model_dump() == {"projector": 2e-5, "language_model": 2e-4}
    assert lora.lora is not None and (lora.lora.r, lora.lora.alpha) == (128, 256)
    for config in (stage_1, full, lora):
        assert (config.optim.schedule, config.optim.warmup_ratio) == ("cosine", 0.03)
        assert config.optim.max_grad_norm is None and config.data.max_length == 2048


@pytest.mark.parametrize("main", [stage1.main, stage2.main, check.main])
def test_help_has_examples(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "examples:\n  vlm-sft " in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(stage1_run: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = [f"output_dir={tmp_path}", *FAST, "train.micro_batch_size=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*launch, "-m", "vlm_sft.stage1", str(TINY / "stage1.yaml"), *options],
        env=environment,
        check=True,
        capture_output=True,
    )
    for ours, theirs in zip(
        rows(tmp_path / "metrics.jsonl"), rows(stage1_run / "metrics.jsonl"), strict=True
    ):
        key = "loss" if "loss" in ours else "eval_loss"
        assert ours[key] == pytest.approx(theirs[key], rel=rounding(terms_of_a_run()))


def command(out: Path, steps: int) -> list[str]:
    fast = ["train.trackers=[]", "train.save_every_steps=5", f"train.max_steps={steps}"]
    config = ["configs/tiny/stage1.yaml", f"output_dir={out}", "train.epochs=1000"]
    return [sys.executable, "-m", "vlm_sft.stage1", *config, *fast, "train.eval_samples=0"]


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_run_and_a_terminated_one_end_with_the_weights_of_an_untouched_one(
    tmp_path: Path,
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    steps = 150

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command(tmp_path / "hurt", steps), env=environment, stderr=subprocess.PIPE, text=True
        )

    killed = start()
    wait_for(tmp_path / "hurt/checkpoints/step-00000005/manifest.json", killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    first = max(int(f.name[5:]) for f in (tmp_path / "hurt/checkpoints").glob("step-*"))
    assert first < steps
    terminated = start()
    wait_for(tmp_path / f"hurt/checkpoints/step-{first + 5:08d}/manifest.json", terminated)
    terminated.send_signal(signal.SIGTERM)
    ended = terminated.communicate()[1]
    assert "run the same command to resume" in ended and "stopped by Ctrl-C" not in ended
    assert terminated.returncode == 143
    for name in ("hurt", "whole"):
        reset_accelerate()
        assert stage1.main(command(tmp_path / name, steps)[3:]) == 0
    for name in ("projector.safetensors", "optimizer.safetensors"):
        files = [verify(tmp_path / d / "final").manifest["files"] for d in ("hurt", "whole")]
        assert files[0][name] == files[1][name]


@pytest.mark.slow
def test_a_signal_to_the_whole_process_group_leaves_the_workers_to_the_run(tmp_path: Path) -> None:
    words = [*command(tmp_path / "run", 1000), "data.num_workers=2"]
    run = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(tmp_path / "run/checkpoints/step-00000005/manifest.json", run)
    os.killpg(run.pid, signal.SIGTERM)  # as `timeout` does, and a terminal with Ctrl-C
    said = run.communicate()[1]
    assert "stopped by SIGTERM" in said and "killed by signal" not in said
    assert run.returncode == 143


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("train.tracking.dir={file}", "train.tracking.dir: {file} cannot be written"),
        ("train.tracking.dir={file}/below", "train.tracking.dir: {file}/below cannot be written"),
        ("data.feature_cache={file}", "data.feature_cache {file}: is not a directory"),
        ("data.feature_cache={file}/below", "data.feature_cache"),
        ("data.feature_cache={folder}", "data.feature_cache {folder}: the directory is not empty"),
    ],
)
def test_a_directory_that_a_run_cannot_use_is_refused_before_the_data_is_read(
    setting: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"file": tmp_path / "folder" / "notes.txt", "folder": tmp_path / "folder"}
    names["folder"].mkdir()
    names["file"].write_text("mine")
    with pytest.raises(UserError, match=re.escape(sentence.format(**names))):
        run("stage1", tmp_path / "o", setting.format(**names), "train.trackers=[tensorboard]")
    assert "train" not in capsys.readouterr().err
    assert names["file"].read_text() == "mine"
