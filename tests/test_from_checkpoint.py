"""`model.from_checkpoint`: from the folder of a finished model to a trained one, and back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.checkpoint.test_finished import logits
from tests.finished_models import (
    SMALL_LLAMA,
    OriginalParts,
    change_image_processor,
    released_folder,
)
from tests.model.tiny import CLIP, tiny_model
from tests.train.tiny import reset_accelerate
from vlm_sft import chat, evaluate, stage1, stage2
from vlm_sft.checkpoint.base_models import parse_bases
from vlm_sft.commands.inputs import read_config
from vlm_sft.config.finished import resolve
from vlm_sft.config.schema import load_config
from vlm_sft.errors import ConfigError, UserError
from vlm_sft.export.__main__ import main as export
from vlm_sft.inference.loaded_model import load_checkpoint

ROOT = Path(__file__).parent.parent
DATA = ROOT / "configs" / "tiny" / "data"
IMAGE = DATA / "images" / "red-circle-0.png"

LORA = ["lora={r: 4}"]
FAST = ["train.max_steps=4", "train.save_every_steps=2"]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "llava"
    released_folder(folder, tiny_model(language_model=SMALL_LLAMA), template="chatml")
    return folder


def config_of(folder: Path, out: Path, **keys: Any) -> Path:
    """A configuration as a user writes it: the model's folder, data, optimizer, training."""
    tree = {
        "output_dir": str(out),
        "model": {"from_checkpoint": str(folder), **keys},
        "data": {
            "train": [{"path": str(DATA / "instructions.json")}],
            "max_length": 256,
            "num_workers": 0,
        },
        "optim": {"learning_rate": {"projector": 1e-3, "language_model": 1e-2}},
        "train": {
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "precision": "fp32",
            "trackers": [],
        },
    }
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(config: Path, *overrides: str, stage: Any = stage2) -> int:
    reset_accelerate()
    try:
        return int(stage.main([str(config), *FAST, *overrides]))
    finally:
        reset_accelerate()


def test_a_full_run_is_resumed_and_its_checkpoint_needs_no_other_folder(
    released: Path, tmp_path: Path
) -> None:
    folder, whole, cut = (tmp_path / name for name in ("llava", "whole", "cut"))
    shutil.copytree(released, folder)
    assert train(config_of(folder, whole)) == 0
    assert train(config_of(folder, cut), "train.max_steps=2") == 0
    shutil.rmtree(cut / "final")
    longer = ["--allow-change", "train.max_steps"]
    assert train(config_of(folder, cut), *longer) == 0
    shutil.rmtree(folder)
    assert train(config_of(folder, whole)) == 0  # already finished
    with pytest.raises(UserError, match="no such folder"):
        train(config_of(folder, whole), "train.max_steps=6", "--allow-change", "train.max_steps")
    with pytest.raises(UserError, match="from_checkpoint: no such folder"):
        train(config_of(folder, tmp_path / "new"))
    models = [load_checkpoint(run / "final", device="cpu") for run in (whole, cut)]
    assert torch.equal(logits(models[0].model), logits(models[1].model))
    before = load_checkpoint(released, device="cpu")
    assert not torch.equal(logits(before.model), logits(models[0].model))
    assert models[0].image_spec == before.image_spec
    assert export([str(whole / "final"), str(tmp_path / "exported"), "--to", "hf"]) == 0
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "| finished model | llava |" in card
    assert "vision tower |" not in card and "language model |" not in card
    assert models[0].chat_tokenizer.template.name == "chatml"
    step = load_checkpoint(whole / "checkpoints" / "step-00000002", device="cpu")
    assert step.generate("Which color?", [IMAGE], max_new_tokens=3) is not None


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_lora_run_is_resumed_and_finds_its_base_after_a_move(
    quantization: str | None, released: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "llava", tmp_path / "run"
    shutil.copytree(released, folder)
    keys = {"language_model": {"quantization": quantization}} if quantization else {}
    config = config_of(folder, out, **keys)
    assert train(config, *LORA, "train.max_steps=2") == 0
    assert train(config, *LORA, "--allow-change", "train.max_steps") == 0
    assert json.loads((out / "final" / "manifest.json").read_text())["step"] == 4
    assert not (out / "final" / "vision_tower").exists()
    loaded = load_checkpoint(out / "final", device="cpu")
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    with pytest.raises(UserError, match=r"--base model\.from_checkpoint=PATH"):
        load_checkpoint(out / "final", device="cpu")
    bases = parse_bases([f"model.from_checkpoint={moved}"])
    again = load_checkpoint(out / "final", device="cpu", bases=bases)
    assert torch.equal(logits(again.model), logits(loaded.model))


def test_a_relative_folder_does_not_look_like_a_hub_name_in_the_card(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(released, tmp_path / "models" / "llava")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    assert train(config_of(Path("models/llava"), out), *LORA, "train.max_steps=1") == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert export([str(out / "final"), "exported", "--to", "hf"]) == 0
    card = Path("exported/README.md").read_text()
    assert "| finished model | llava |" in card
    assert "models/llava" not in card and "base_model" not in card


def test_another_model_in_the_same_folder_is_not_the_base_of_a_run(
    released: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "llava", tmp_path / "run"
    shutil.copytree(released, folder)
    assert train(config_of(folder, out), *LORA) == 0
    shutil.rmtree(folder)
    released_folder(folder, tiny_model(language_model=SMALL_LLAMA, seed=9), template="chatml")
    with pytest.raises(UserError, match="is not the one that it was trained with"):
        load_checkpoint(out / "final", device="cpu")


def test_stage_1_trains_the_projector_of_the_folder_further(released: Path, tmp_path: Path) -> None:
    config = config_of(released, tmp_path / "run")
    assert train(config, "optim.learning_rate={projector: 0}", stage=stage1) == 0
    loaded = load_checkpoint(tmp_path / "run" / "final", device="cpu")
    before = load_checkpoint(released, device="cpu")
    assert torch.equal(logits(loaded.model), logits(before.model))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_exporter_converts_original_folders(kind: str, tmp_path: Path) -> None:
    parts = OriginalParts(tmp_path)
    source = parts.full(tmp_path / "llava") if kind == "full" else parts.lora(tmp_path / "llava")
    arguments = ["--to", "hf", "--template", "vicuna_v1"]
    assert export([str(source), str(tmp_path / "out"), *arguments]) == 0
    found = load_checkpoint(tmp_path / "out", device="cpu")
    assert torch.equal(logits(found.model), logits(parts.model))
    assert found.chat_tokenizer.template.name == "vicuna_v1"


def test_answers_are_those_of_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "llava"
    released_folder(folder, tiny_model(language_model=SMALL_LLAMA, seed=5))
    stock = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    for index, size in enumerate([(40, 40), (90, 30), (20, 77), (161, 184)]):
        path = tmp_path / f"{index}.png"
        Image.effect_noise(size, 90).convert("RGB").save(path)
        asked = ["--image", str(path), "--prompt", "What is it?", "--max-new-tokens", "12"]
        assert chat.main([str(folder), *asked, "--device", "cpu"]) == 0
        content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(images=Image.open(path), text=text, return_tensors="pt")
        generated = stock.generate(**inputs, max_new_tokens=12, do_sample=False)
        answer = processor.decode(
            generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert capsys.readouterr().out.strip() == answer.strip()


def test_a_finished_model_is_evaluated(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = {"id": "1", "image": IMAGE.name, "question": "Is it red?", "answer": "yes"}
    (tmp_path / "probes.json").write_text(json.dumps([question]))
    out = tmp_path / "results.json"
    arguments = ["--probes", str(tmp_path / "probes.json"), "--images", str(IMAGE.parent)]
    arguments += ["--conditions", "right"]
    assert evaluate.main([str(released), *arguments, "--out", str(out), "--device", "cpu"]) == 0
    results = json.loads(out.read_text())
    assert (results["step"], results["checkpoint"]) == (None, str(released))


# --- the configuration


def test_the_folder_determines_the_settings_of_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "llava"
    model = tiny_model(
        tower={**CLIP, "feature_layers": [-1, 1], "feature_select": "cls_patch"},
        projector_type="linear",
        language_model=SMALL_LLAMA,
    )
    released_folder(folder, model, aspect="crop")
    config = read_config(str(config_of(folder, tmp_path / "run")), [])
    tower = config.model.vision_tower
    assert (tower.library, tower.name) == ("transformers", str(folder))
    assert (tower.feature_layers, tower.feature_select) == ([-1, 1], "cls_patch")
    assert (config.model.projector_type, config.data.image_aspect) == ("linear", "crop")
    assert resolve(config) == config
    chosen = read_config(str(config_of(folder, tmp_path / "run")), ["data.image_aspect=pad"])
    assert chosen.data.image_aspect == "pad"
    assert "image_aspect is pad, but the image processor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.projector_type=linear", "'linear', but model.from_checkpoint .* 'mlp2x_gelu'"),
        (
            "model.vision_tower.feature_layers=[-1]",
            r"model\.vision_tower\.feature_layers is \[-1\], but .* has \[-2\]; remove",
        ),
        ("model.vision_tower.image_size=56", r"image_size is 56, .* determines the model"),
        ("model.vision_tower.library=timm", "library is 'timm', but .* has 'transformers'"),
        ("model.language_model.name=other/llm", r"model\.language_model\.name is 'other/llm', but"),
        ("model.language_model.tokenizer=bytes", r"tokenizer is 'bytes', but model\.from_check"),
        ("projector=runs/x/final", r"projector and model\.from_checkpoint each name a projector"),
    ],
)
def test_a_setting_that_contradicts_the_folder_is_refused_with_both(
    override: str, message: str, released: Path, tmp_path: Path
) -> None:
    path = config_of(released, tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        resolve(load_config(path, [override]))


def test_a_setting_that_agrees_with_the_folder_is_accepted(released: Path, tmp_path: Path) -> None:
    path = config_of(released, tmp_path / "run")
    same = ["model.projector_type=mlp2x_gelu", "model.vision_tower.feature_layers=[-2]"]
    assert resolve(load_config(path, same)) == resolve(load_config(path))


def test_a_folder_that_is_none_or_another_model_is_refused(tmp_path: Path) -> None:
    path = config_of(tmp_path / "gone", tmp_path / "run")
    with pytest.raises(UserError, match=r"from_checkpoint: no such folder .*gone"):
        resolve(load_config(path))
    (tmp_path / "gone").mkdir()
    with pytest.raises(UserError, match="'gone' exists, which differs in spelling"):
        resolve(load_config(path, [f"model.from_checkpoint={tmp_path}/gonne"]))
    with pytest.raises(UserError, match=r"has no config\.json that can be read"):
        resolve(load_config(path))
    (tmp_path / "gone" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="is a 'llama' model, expected one of LlavaForCond"):
        resolve(load_config(path))


def test_an_image_processor_that_training_cannot_reproduce_asks_for_a_choice(
    released: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(released, folder)
    size = {"height": 28, "width": 28}
    change_image_processor(folder, size=size, do_pad=False, do_center_crop=False)
    config = config_of(folder, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"say what to do instead with data\.image_aspect"):
        resolve(load_config(config))
    assert resolve(load_config(config, ["data.image_aspect=crop"])).data.image_aspect == "crop"
