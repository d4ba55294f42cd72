"""Runs on images in crops: trained, resumed, cached, checked, asked, measured, exported."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.export.test_tiled import processor_of
from tests.tiny_runs import FAST, ROOT, rows
from tests.train.tiny import reset_accelerate
from vlm_sft import chat, check, evaluate, plan, show, stage1, stage2
from vlm_sft.checkpoint.format import verify
from vlm_sft.config.schema import load_config
from vlm_sft.data.images import open_image
from vlm_sft.errors import ConfigError
from vlm_sft.export.__main__ import main as export
from vlm_sft.export.hf_llava import export_hf_llava
from vlm_sft.export.verify import reload_here
from vlm_sft.inference.loaded_model import LoadedModel, load_checkpoint
from vlm_sft.inference.prompts import user_message
from vlm_sft.model.quantization import is_quantized

TWINS = ("tiny-anyres", "tiny-onevision", "tiny-internvl")
DATA = ROOT / "configs" / "tiny-anyres" / "data"
WIDE = DATA / "images" / "red-circle-1.png"


def run(twin: str, stage: str, out: Path, *overrides: str) -> None:
    reset_accelerate()
    main = {"stage1": stage1.main, "stage2": stage2.main}[stage]
    config = str(ROOT / "configs" / twin / f"{stage}.yaml")
    assert main([config, f"output_dir={out}", *FAST, *overrides]) == 0


@pytest.fixture(scope="module", params=TWINS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, named by its configuration, with stage 1 and stage 2 of packed records."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        run(request.param, "stage1", folder / "stage1")
        projector = f"projector={folder}/stage1/final"
        run(request.param, "stage2", folder / "stage2", projector)
        reset_accelerate()
    return folder


@pytest.mark.usefixtures("in_the_repository")
def test_a_tiled_run_trains_its_newline_and_resumes_bit_for_bit(runs: Path, tmp_path: Path) -> None:
    first, second = (
        load_file(runs / s / "final/projector.safetensors") for s in ("stage1", "stage2")
    )
    has_newline = runs.name != "tiny-internvl"
    assert ("image_newline" in first) == has_newline
    if has_newline:
        assert not torch.equal(first["image_newline"], second["image_newline"])
    shutil.copytree(runs / "stage2", tmp_path / "cut")
    for lost in ("final", "checkpoints/step-00000004"):
        shutil.rmtree(tmp_path / "cut" / lost)
    cut = [str(tmp_path / "cut" / "config.yaml"), f"output_dir={tmp_path / 'cut'}"]
    with pytest.raises(ConfigError, match=r"model\.image_tiling\.layout"):
        stage2.main([*cut, "model.image_tiling={layout: none}"])
    assert stage2.main(cut) == 0
    whole = verify(runs / "stage2" / "final").manifest["files"]
    resumed = verify(tmp_path / "cut" / "final").manifest["files"]
    tensors = [name for name in whole if name.endswith(".safetensors")]
    assert {name: whole[name] for name in tensors} == {name: resumed[name] for name in tensors}


@pytest.mark.usefixtures("in_the_repository")
def test_a_tiled_checkpoint_answers_is_measured_and_is_exported(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(runs / "stage2" / "final")
    loaded = load_checkpoint(folder, device="cpu")
    config = load_config(ROOT / "configs" / runs.name / "stage2.yaml")
    processor = json.loads((runs / "stage2/final/processor.json").read_text())
    assert processor["image_tiling"]["tiling"] == config.model.image_tiling.layout.split("_")[0]
    one = loaded.generate("Which color?", images=[WIDE], max_new_tokens=4)
    two = ["Which colors?", [WIDE, DATA / "images" / "red-circle-2.png"]]
    several = loaded.generate(two[0], images=two[1], max_new_tokens=4)
    batch = loaded.generate_batch(["Which color?", two[0]], [[WIDE], two[1]], max_new_tokens=4)
    assert batch == [one, several]
    asked = ["--image", str(WIDE), "--prompt", "Which color?", "--device", "cpu"]
    assert chat.main([folder, *asked]) == 0
    capsys.readouterr()
    out = tmp_path / "results.json"
    measured = [folder, "--captions", str(DATA / "captions_eval.json"), "--images", str(DATA)]
    assert evaluate.main([*measured, "--out", str(out), "--device", "cpu"]) == 0
    assert json.loads(out.read_text())["captions"]["records"] > 0
    hf = [folder, str(tmp_path / "hf"), "--image", str(WIDE)]
    assert export(hf) == 0
    require_same_answers(loaded, tmp_path / "hf")


def require_same_answers(loaded: LoadedModel, folder: Path) -> None:
    """Ask the stock class and the checkpoint about 20 images of 20 aspect ratios, greedily."""
    stock = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = processor_of(folder)
    exact = replace(loaded, image_processing="exact")
    parts = [{"type": "image"}, {"type": "text", "text": "Which color?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    paths = sorted((DATA / "images").glob("*-square-*.png"))
    for number in range(20):
        source = open_image(paths[number % len(paths)])
        image = source.resize((40 + 11 * number, 250 - 10 * number))
        inputs = processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)
        asked = user_message("Which color?", [image])
        prompt = exact.prompt_ids(asked, [crops.layout for crops in exact.load_images(asked)])
        image_id = processor.image_token_id
        assert inputs["input_ids"][0].tolist() == [i if i >= 0 else image_id for i in prompt]
        found = stock.generate(**inputs, max_new_tokens=8, do_sample=False)
        answer = found[0, inputs["input_ids"].shape[1] :]
        said = processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
        assert said == exact.generate("Which color?", images=[image], max_new_tokens=8)


@pytest.mark.usefixtures("in_the_repository")
def test_qlora_on_tiles_trains_resumes_answers_and_is_exported_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = ["projector=null", "lora={r: 4}", "model.language_model.quantization=nf4"]
    run("tiny-anyres", "stage2", tmp_path / "whole", *packed)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for lost in ("final", "checkpoints/step-00000004"):
        shutil.rmtree(tmp_path / "cut" / lost)
    run("tiny-anyres", "stage2", tmp_path / "cut", *packed)
    whole, cut = (verify(tmp_path / name / "final").manifest for name in ("whole", "cut"))
    tensors = {name for name in whole["files"] if name.endswith(".safetensors")}
    assert {"projector.safetensors", "adapter/adapter_model.safetensors"} <= tensors
    assert not any("language_model" in name for name in whole["files"])
    assert all(whole["files"][name] == cut["files"][name] for name in tensors)
    assert set(whole["frozen"]) == {"vision_tower", "language_model"}
    assert whole["frozen"] == cut["frozen"]
    loaded = load_checkpoint(tmp_path / "whole", device="cpu")
    assert any(map(is_quantized, loaded.model.language_model.parameters()))
    answer = loaded.generate("Which color?", images=[WIDE], max_new_tokens=4)
    asked = ["--image", str(WIDE), "--prompt", "Which color?", "--device", "cpu"]
    assert chat.main([str(tmp_path / "whole"), *asked, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip() == answer
    report = export_hf_llava(
        loaded.model,
        loaded.tokenizer,
        tmp_path / "hf",
        image_aspect=loaded.image_aspect,
        image_processing=loaded.image_processing,
        chat_template=loaded.chat_tokenizer.to_jinja(),
        reload=reload_here,
    )
    assert report.model_class == "LlavaNextForConditionalGeneration"
    assert report.max_abs_logit_difference <= 1e-4
    assert not any("lora" in name for name in load_file(tmp_path / "hf" / "model.safetensors"))


@pytest.mark.usefixtures("in_the_repository")
def test_cached_features_give_the_losses_of_images(runs: Path, tmp_path: Path) -> None:
    projector = f"projector={runs}/stage1/final"
    cache = f"data.feature_cache={tmp_path / 'cache'}"
    for name in ("filling", "filled"):
        run(runs.name, "stage2", tmp_path / name, projector, cache)
    losses = [
        [row["loss"] for row in rows(folder / "metrics.jsonl") if "loss" in row]
        for folder in (runs / "stage2", tmp_path / "filling", tmp_path / "filled")
    ]
    assert losses[1] == losses[2]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.usefixtures("in_the_repository")
@pytest.mark.parametrize("twin", TWINS)
def test_check_show_and_plan_know_the_tokens_of_every_image(
    twin: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(ROOT / "configs" / twin / "stage1.yaml")
    reset_accelerate()
    assert check.main([config, f"output_dir={tmp_path / 'run'}"]) == 0
    assert "tokens per crop" in " ".join(capsys.readouterr().out.split())
    assert show.main([config, "--statistics", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["image_tokens_per_image"] is None
    lengths = shown["total"]["length_with_image_tokens"]
    assert lengths["shortest"] < lengths["longest"]
    assert plan.main([config, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["data"]["longest"] == lengths["longest"]
