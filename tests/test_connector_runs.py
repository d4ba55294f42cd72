"""Runs with connectors that change the number of tokens: trained, resumed, asked, measured."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.tiny_runs import FAST, ROOT, rows
from tests.train.tiny import reset_accelerate
from vlm_sft import chat, evaluate, stage1, stage2
from vlm_sft.checkpoint.format import verify
from vlm_sft.errors import CheckpointError, UserError
from vlm_sft.export.__main__ import main as export
from vlm_sft.inference.loaded_model import load_checkpoint

CONFIGS = ROOT / "configs" / "tiny-resampler"
RED = ROOT / "configs" / "tiny" / "data" / "images" / "red-circle-0.png"
SHUFFLE = ["model.projector_type=pixel_shuffle_mlp", "model.num_queries=null"]
KINDS = {"resampler": [], "pixel_shuffle_mlp": SHUFFLE}
PACKED = ["train.micro_batch_size=null", "train.packing.max_tokens=256"]
PACKED += ["train.share_image_prefix=true"]


def run(stage: str, out: Path, *overrides: str) -> None:
    reset_accelerate()
    main = {"stage1": stage1.main, "stage2": stage2.main}[stage]
    assert main([str(CONFIGS / f"{stage}.yaml"), f"output_dir={out}", *FAST, *overrides]) == 0


@pytest.fixture(scope="module", params=KINDS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stage 1, and stage 2 with LoRA on packed records that share their images."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = KINDS[request.param]
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        run("stage1", folder / "stage1", *changes)
        projector = f"projector={folder}/stage1/final"
        run("stage2", folder / "stage2", projector, "lora.r=4", *PACKED, *changes)
        reset_accelerate()
    return folder


@pytest.mark.usefixtures("in_the_repository")
def test_stage_2_starts_from_the_connector_of_stage_1_and_resumes_bit_for_bit(
    runs: Path, tmp_path: Path
) -> None:
    first, second = (
        load_file(runs / s / "final/projector.safetensors") for s in ("stage1", "stage2")
    )
    assert first.keys() == second.keys()
    assert set(verify(runs / "stage1" / "final").manifest["frozen"]) == {
        "vision_tower",
        "language_model",
    }
    shutil.copytree(runs / "stage2", tmp_path / "cut")
    for lost in ("final", "checkpoints/step-00000004"):
        shutil.rmtree(tmp_path / "cut" / lost)
    config = tmp_path / "cut" / "config.yaml"
    assert stage2.main([str(config), f"output_dir={tmp_path / 'cut'}"]) == 0
    whole = verify(runs / "stage2" / "final").manifest["files"]
    resumed = verify(tmp_path / "cut" / "final").manifest["files"]
    tensors = [name for name in whole if name.endswith(".safetensors")]
    assert len(tensors) == 3
    assert {name: whole[name] for name in tensors} == {name: resumed[name] for name in tensors}
    losses = [
        [row["loss"] for row in rows(folder / "metrics.jsonl") if "loss" in row]
        for folder in (runs / "stage2", tmp_path / "cut")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_checkpoint_answers_is_measured_and_is_not_exported(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(runs / "stage2" / "final")
    loaded = load_checkpoint(runs / "stage2", device="cpu")
    processor = json.loads((runs / "stage2/final/processor.json").read_text())
    assert processor["num_image_tokens"] == loaded.model.layout_rule.crop_tokens == 9
    assert loaded.model.vision_tower.num_tokens == 36
    asked = ["--image", str(RED), "--prompt", "Which color?", "--device", "cpu"]
    assert chat.main([folder, *asked]) == 0
    assert capsys.readouterr().out.strip()
    captions = str(ROOT / "configs/tiny/data/captions_eval.json")
    measured = [folder, "--captions", captions, "--images", str(RED.parent.parent)]
    out = tmp_path / "results.json"
    assert evaluate.main([*measured, "--out", str(out), "--device", "cpu"]) == 0
    assert json.loads(out.read_text())["captions"]["records"] > 0
    with pytest.raises(UserError, match=r"train with mlp2x_gelu or linear to export"):
        export([folder, str(tmp_path / "hf"), "--image", str(RED)])
    assert not (tmp_path / "hf").exists()


@pytest.mark.usefixtures("in_the_repository")
def test_the_connector_of_another_kind_is_refused(runs: Path, tmp_path: Path) -> None:
    other = ["model.projector_type=mlp2x_gelu", "model.num_queries=null"]
    with pytest.raises(CheckpointError, match="it was made for another model"):
        run("stage2", tmp_path / "out", f"projector={runs}/stage1/final", *other)


@pytest.mark.usefixtures("in_the_repository")
def test_a_resampler_reads_tiles_packed_as_padded(tmp_path: Path) -> None:
    tiles = ["model.image_tiling={layout: dynamic, max_tiles: 4}", "projector=null"]
    tiles += ["data.train.0.path=configs/tiny-anyres/data/instructions.json", "data.eval=[]"]
    tiles += ["data.max_length=256", "train.max_steps=2"]
    packed = ["train.micro_batch_size=null", "train.packing.max_tokens=512"]
    losses = []
    for name, changes in (("padded", []), ("packed", packed)):
        run("stage2", tmp_path / name, *tiles, *changes)
        losses.append([row["loss"] for row in rows(tmp_path / name / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2
    processor = json.loads((tmp_path / "packed/final/processor.json").read_text())
    assert processor["num_image_tokens"] == 9
