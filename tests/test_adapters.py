"""Whole runs with adapters of every kind: trained, resumed, asked, measured, exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import trained
from tests.rounding import assert_near, terms_of
from tests.tiny_runs import ROOT, rows, run
from vlm_sft import chat, evaluate
from vlm_sft.checkpoint.components import load_adapter
from vlm_sft.checkpoint.format import read_manifest, verify
from vlm_sft.config.schema import load_config, parse_config
from vlm_sft.errors import CheckpointError, ConfigError, UserError
from vlm_sft.export.__main__ import main as export
from vlm_sft.inference.loaded_model import load_checkpoint
from vlm_sft.model.lora import merged_language_model
from vlm_sft.model.quantization import is_quantized
from vlm_sft.utils import libraries

RED = ROOT / "configs" / "tiny" / "data" / "images" / "red-circle-0.png"
NEW = ["projector=null", "data.eval=[]", "train.eval_samples=0"]


@pytest.fixture(scope="module")
def qlora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qlora") / "run"
    return trained(folder, "stage2_qlora", "train.max_steps=2", "optim.warmup_ratio=0")


@pytest.mark.usefixtures("in_the_repository")
@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("stage2_qlora", ["train.neftune_alpha=5"]),
        ("stage2_qlora", ["lora.use_dora=true", "train.precision=bf16"]),
        ("stage2_lora", ["lora.use_dora=true", "lora.use_rslora=true"]),
    ],
)
def test_a_run_that_was_cut_off_ends_in_the_same_bits(
    config: str, changes: list[str], tmp_path: Path
) -> None:
    changes = [*NEW, "train.max_steps=2", "train.save_every_steps=1", *changes]
    assert run("stage2", tmp_path / "whole", *changes, config=config) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for lost in ("final", "checkpoints/step-00000002"):
        shutil.rmtree(tmp_path / "cut" / lost)
    assert run("stage2", tmp_path / "cut", *changes, config=config) == 0
    whole, cut = (verify(tmp_path / name / "final").manifest for name in ("whole", "cut"))
    saved = {name: digest for name, digest in whole["files"].items() if "safetensors" in name}
    assert len(saved) == 3 and saved.items() <= cut["files"].items()
    assert whole["frozen"] == cut["frozen"] and set(whole["frozen"]) == {
        "vision_tower",
        "language_model",
    }
    losses = [
        [row["loss"] for row in rows(tmp_path / d / "metrics.jsonl")] for d in ("whole", "cut")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.usefixtures("in_the_repository")
def test_noise_on_embeddings_is_another_training_but_not_another_evaluation(tmp_path: Path) -> None:
    changes = ["projector=null", "train.max_steps=1", "train.eval_samples=0"]
    changes += ["optim.learning_rate.projector=0", "optim.learning_rate.language_model=0"]
    found = []
    for name, alpha in (("plain", "null"), ("noisy", "5")):
        out = tmp_path / name
        assert (
            run("stage2", out, *changes, f"train.neftune_alpha={alpha}", config="stage2_lora") == 0
        )
        both = rows(out / "metrics.jsonl")
        found.append({key: row[key] for row in both for key in ("loss", "eval_loss") if key in row})
    assert found[0]["loss"] != found[1]["loss"]
    assert found[0]["eval_loss"] == found[1]["eval_loss"]


@pytest.mark.usefixtures("in_the_repository")
def test_a_projector_goes_between_a_4_bit_language_model_and_the_same_in_full(
    tmp_path: Path,
) -> None:
    packed = "model.language_model.quantization=nf4"
    plain = "model.language_model.quantization=null"
    short = [*NEW, "train.max_steps=1"]
    assert run("stage1", tmp_path / "packed", packed, *short) == 0
    assert run("stage1", tmp_path / "plain", *short) == 0
    frozen = [read_manifest(tmp_path / d / "final")["frozen"] for d in ("packed", "plain")]
    assert frozen[0]["language_model"] != frozen[1]["language_model"]
    for start, held in (("packed", plain), ("plain", packed)):
        out, first = tmp_path / f"from-{start}", f"projector={tmp_path / start}/final"
        assert run("stage2", out, *short, first, held, config="stage2_lora") == 0


def test_a_qlora_checkpoint_holds_projector_and_adapter_and_not_the_base(qlora_run: Path) -> None:
    files = read_manifest(qlora_run / "final")["files"]
    assert {"projector.safetensors", "adapter/adapter_model.safetensors"} <= files.keys()
    assert not any(name.startswith("language_model") for name in files)
    assert "bitsandbytes" in read_manifest(qlora_run / "final")["software"]


@pytest.mark.usefixtures("in_the_repository")
def test_a_qlora_checkpoint_is_asked_measured_and_exported(
    qlora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(qlora_run / "final")
    asked = ["--image", str(RED), "--prompt", "Which color?", "--device", "cpu"]
    assert chat.main([folder, *asked]) == 0
    assert capsys.readouterr().out.strip()
    captions = str(ROOT / "configs/tiny/data/captions_eval.json")
    out = tmp_path / "results.json"
    measured = [folder, "--captions", captions, "--images", str(RED.parent.parent)]
    assert evaluate.main([*measured, "--out", str(out), "--device", "cpu"]) == 0
    assert json.loads(out.read_text())["captions"]["records"] > 0
    assert export([folder, str(tmp_path / "hf"), "--image", str(RED)]) == 0
    report = json.loads((tmp_path / "hf" / "export.json").read_text())
    assert report["max_abs_logit"] > 0.1
    assert report["max_abs_logit_difference"] < report["max_abs_logit"] / 500


def test_what_is_exported_is_the_trained_base_and_not_the_one_before(qlora_run: Path) -> None:
    model = load_checkpoint(qlora_run, device="cpu").model
    assert any(map(is_quantized, model.parameters()))
    merged = merged_language_model(model)
    original = _merged_into_the_original(qlora_run)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        expected = model.language_model(ids).logits
        assert_near(merged(ids).logits, expected, terms_of(model.language_model, length=20))
        assert (original(ids).logits - expected).abs().max() > 1e-3


def _merged_into_the_original(folder: Path) -> torch.nn.Module:
    from vlm_sft.model.build import build_model

    config = load_config(folder / "final" / "config.yaml", ["model.language_model.quantization="])
    model = build_model(config.model, dtype=torch.float32, seed=config.seed, lora=config.lora)
    load_adapter(model, folder / "final")
    return merged_language_model(model)


@pytest.mark.parametrize("trained_with", ["dora", "plain"])
def test_adapters_of_another_kind_are_refused_by_their_tensors(
    trained_with: str, qlora_run: Path, tmp_path: Path
) -> None:
    from vlm_sft.model.build import build_model

    config = load_config(qlora_run / "final" / "config.yaml")
    assert config.lora is not None
    dora = config.lora.model_copy(update={"use_dora": True})
    build = [dora, config.lora] if trained_with == "dora" else [config.lora, dora]
    first, second = (
        build_model(config.model, dtype=torch.float32, seed=1, lora=lora) for lora in build
    )
    from vlm_sft.checkpoint.components import _write_adapter, adapter_tensors

    _write_adapter(first, tmp_path, adapter_tensors(first))
    load_adapter(first, tmp_path)
    with pytest.raises(CheckpointError, match="lora_magnitude_vector"):
        load_adapter(second, tmp_path)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert any("magnitude" in name for name in names) == (trained_with == "dora")


@pytest.mark.usefixtures("in_the_repository")
def test_quantised_training_in_full_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "unread.json").write_text("no JSON")
    changes = ["projector=null", "lora=null", f"data.train.0.path={tmp_path / 'unread.json'}"]
    with pytest.raises(ConfigError, match="stage 2 would train them"):
        run("stage2", tmp_path / "out", *changes, config="stage2_qlora")


@pytest.mark.usefixtures("in_the_repository")
def test_a_missing_bitsandbytes_is_told_before_the_data_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "unread.json").write_text("no JSON")
    changes = ["projector=null", f"data.train.0.path={tmp_path / 'unread.json'}"]
    monkeypatch.setattr(libraries, "is_installed", lambda name: name != "bitsandbytes")
    with pytest.raises(UserError, match=r"pip install 'vlm-sft\[qlora\]'"):
        run("stage2", tmp_path / "out", *changes, config="stage2_qlora")


def test_the_recipe_for_7b_is_loras_with_the_language_model_in_4_bits() -> None:
    folder = ROOT / "configs" / "llava-1.5"
    lora, qlora = (load_config(folder / f"stage2_{name}.yaml") for name in ("lora", "qlora"))
    assert qlora.model.language_model.quantization == "nf4"
    assert (qlora.lora, qlora.optim, qlora.data) == (lora.lora, lora.optim, lora.data)


def test_an_unknown_number_format_is_told() -> None:
    tree = load_config(ROOT / "configs/tiny/stage2_qlora.yaml").model_dump()
    tree["model"]["language_model"]["quantization"] = "nf5"
    with pytest.raises(ConfigError, match=r"quantization: .*'nf4' or 'fp4'"):
        parse_config(tree, "x.yaml")
