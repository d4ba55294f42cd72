"""`start_from`: a full run that begins with the weights of another one, in its own schedule."""

import shutil
from pathlib import Path

import pytest
import torch

import vlm_sft
from tests.tiny_runs import FAST, ROOT
from tests.train.tiny import reset_accelerate
from vlm_sft import stage1, stage2
from vlm_sft.checkpoint.format import verify
from vlm_sft.errors import CheckpointError, ConfigError
from vlm_sft.inference.loaded_model import load_checkpoint
from vlm_sft.model.vlm import VisionLanguageModel

CONFIG = str(ROOT / "configs" / "tiny-onevision" / "stage2.yaml")


def run(out: Path, *overrides: str) -> Path:
    reset_accelerate()
    alone = ["projector=null"] if any("start_from" in text for text in overrides) else []
    assert stage2.main([CONFIG, f"output_dir={out}", *FAST, *alone, *overrides]) == 0
    reset_accelerate()
    return out / "final"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        return run(tmp_path_factory.mktemp("runs") / "first", "projector=null")


def logits(model: VisionLanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().logits(torch.arange(9)[None])


def tensors(final: Path) -> dict[str, str]:
    files = verify(final).manifest["files"]
    return {name: digest for name, digest in files.items() if name.endswith(".safetensors")}


@pytest.mark.usefixtures("in_the_repository")
def test_a_full_run_continues_a_full_run_and_is_resumed_bit_for_bit(
    first: Path, tmp_path: Path
) -> None:
    start = f"start_from={first}"
    begun = vlm_sft.build_model(CONFIG, "projector=null", start)
    before = load_checkpoint(first, device="cpu").model
    assert torch.equal(logits(begun), logits(before))
    projectors = (begun.projector_state(), before.projector_state())
    assert projectors[0].keys() == projectors[1].keys()
    assert all(torch.equal(value, projectors[1][name]) for name, value in projectors[0].items())
    whole = run(tmp_path / "whole", start)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for lost in ("final", "checkpoints/step-00000004"):
        shutil.rmtree(tmp_path / "cut" / lost)
    with pytest.raises(ConfigError, match="to resume with the new start_from"):
        run(tmp_path / "cut", f"start_from={tmp_path / 'whole' / 'final'}")
    cut = run(tmp_path / "cut", start)
    assert tensors(cut) == tensors(whole)
    assert not torch.equal(logits(load_checkpoint(cut, device="cpu").model), logits(before))
    manifests = [verify(final).manifest for final in (first, whole, cut)]
    assert manifests[0]["frozen"] == manifests[1]["frozen"] == manifests[2]["frozen"]
    assert set(manifests[0]["frozen"]) == {"vision_tower"}
    assert manifests[0]["base_model"] == manifests[1]["base_model"]


@pytest.mark.usefixtures("in_the_repository")
def test_a_checkpoint_without_the_weights_of_a_full_run_is_refused(
    first: Path, tmp_path: Path
) -> None:
    reset_accelerate()
    adapters = run(tmp_path / "lora", "projector=null", "lora={r: 2}")
    for final, message in (
        (adapters, "no language model, because that run trained adapters.*set model.from_checkpoi"),
        (tmp_path, "no manifest.json"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(tmp_path / "run", f"start_from={final}")
    with pytest.raises(CheckpointError, match=r"start_from=.*it was trained with another"):
        run(tmp_path / "run", f"start_from={first}", "seed=7")
    damaged = tmp_path / "damaged"
    shutil.copytree(first, damaged)
    (damaged / "language_model" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"language_model/config\.json"):
        run(tmp_path / "run", f"start_from={damaged}")


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        (stage2, ["lora={r: 2}", "projector=null"], "start_from` is for full fine-tuning"),
        (stage2, [], "`projector` and `start_from` each name a projector"),
        (stage1, ["projector=null", "optim.learning_rate={projector: 1}"], "start_from: stage 1"),
        (stage2, ["model.from_checkpoint={first}", "start_from=null"], "checkpoint of vlm_sft; na"),
    ],
)
def test_settings_that_start_from_excludes_are_named(
    stage: object, overrides: list[str], message: str, tmp_path: Path, first: Path
) -> None:
    out = f"output_dir={tmp_path / 'run'}"
    filled = [text.replace("{first}", str(first)) for text in overrides]
    if "from_checkpoint" in str(overrides):
        filled += ["projector=null"]
    with pytest.raises((ConfigError, vlm_sft.UserError), match=message):
        stage.main([CONFIG, out, f"start_from={first}", *filled])  # type: ignore[attr-defined]
