"""The export command leaves a folder that stock classes load, or nothing."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vlm_sft.commands.run_command import run_command
from vlm_sft.export.__main__ import main
from vlm_sft.inference.loaded_model import load_checkpoint
from vlm_sft.inference.prompts import user_message

pytestmark = pytest.mark.usefixtures("in_the_repository")

RED = Path("configs/tiny/data/images/red-circle-0.png")


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        run_command(main, argv)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("error VS") and err.count("\n") == 1 and out == ""
    return err


def test_a_lora_run_is_exported_to_a_folder_that_stock_classes_load(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exported"
    assert main([str(lora_run / "final"), str(out), "--to", "hf"]) == 0
    printed = capsys.readouterr().out
    assert "0 missing and 0 unexpected keys" in printed
    difference = re.search(r"largest logit difference (\d\.\d\de[+-]\d\d)", printed)
    assert difference is not None and float(difference.group(1)) <= 1e-3

    stock, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(out)
    content = [
        {"type": "image", "image": Image.open(RED)},
        {"type": "text", "text": "\nWhich color?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    run = load_checkpoint(lora_run, device="cpu")
    message = user_message("Which color?", [RED])
    ids = run.prompt_ids(message)
    image = stock.config.image_token_id
    assert inputs["input_ids"][0].tolist() == [i if i >= 0 else image for i in ids]
    with torch.no_grad():
        theirs = stock(**inputs).logits[0, -1, :261]
        row = torch.tensor([ids])
        ours = run.model.logits(row, pixel_values=run.load_image(RED).pixels)[0, -1]
    # The two see the same image but for the rounding of its pixels.
    assert torch.allclose(ours, theirs, atol=1e-2)
    assert ours.argmax() == theirs.argmax()


def test_the_difference_is_taken_on_the_callers_image(
    full_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(full_run), str(tmp_path / "out"), "--image", str(RED), "--prompt", "Which shape?"]
    assert main(argv) == 0
    assert "largest logit difference" in capsys.readouterr().out


def test_a_run_that_stock_llava_cannot_hold_is_refused_and_nothing_is_written(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.conftest import trained

    run = trained(
        tmp_path / "pooled",
        "stage2_lora",
        "train.max_steps=1",
        "model.vision_tower.grid_pool=1",
    )
    capsys.readouterr()
    line = error_of([str(run), str(tmp_path / "out")], capsys)
    assert "averages the feature grid" in line
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_end_with_one_sentence_and_2(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such folder" in error_of([str(tmp_path / "gone"), str(tmp_path / "o")], capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    line = error_of([str(lora_run), str(tmp_path / "full")], capsys)
    assert "is not an empty directory" in line
    line = error_of([str(lora_run), str(tmp_path / "o"), "--image", "gone.png"], capsys)
    assert "gone.png" in line
    assert not (tmp_path / "o").exists()
