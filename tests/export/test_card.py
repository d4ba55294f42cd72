"""The model card of an export: a valid header, the recipe, and code that runs."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from vlm_sft.config.schema import load_config
from vlm_sft.errors import UserError
from vlm_sft.export.__main__ import main
from vlm_sft.export.card import CardFields, card_data, require_results, write_card
from vlm_sft.export.formats import ExportResult
from vlm_sft.inference.loaded_model import load_checkpoint

pytestmark = pytest.mark.usefixtures("in_the_repository")

RESULT = ExportResult(summary="equal", consumers=[], usage='load("FOLDER")')
RED = Path("configs/tiny/data/images/red-circle-0.png")


def test_the_card_describes_the_run_and_its_code_answers_about_an_image(
    lora_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "exported"
    assert main([str(lora_run / "final"), str(out), "--license", "My own"]) == 0
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict() == {
        "license": "other",
        "license_name": "My own",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vlm_sft", "vision-language-model"],
    }
    text = card.text
    for row in ("| stage | stage2 |", "| steps | 4 |", "LoRA, r 8, alpha 16", "| trained | "):
        assert row in text, row
    assert "`instructions.json`" in text and "No results were given" in text
    assert "| transformers >= 5.6 | loads | tried here |" in text
    assert str(lora_run) not in text and str(tmp_path) not in text
    assert "\n The ledger" not in text

    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) == 1 and len(code[0].strip().splitlines()) <= 8
    (tmp_path / "image.jpg").write_bytes(RED.read_bytes())
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code[0], {})
    assert capsys.readouterr().out


def test_names_of_the_hub_are_base_models_and_local_folders_lose_their_path(
    lora_run: Path, tmp_path: Path
) -> None:
    loaded = load_checkpoint(lora_run / "final", device="cpu")
    assert loaded.config is not None
    config = load_config(
        "configs/tiny/stage2_lora.yaml",
        [
            "model.vision_tower.config=null",
            "model.vision_tower.name=openai/clip-vit-large-patch14-336",
            "model.language_model.config=null",
            "model.language_model.name=/home/me/models/vicuna-7b",
        ],
    )
    named = dataclasses.replace(loaded, config=config, trained_config=config)
    fields = CardFields("mine", license="Apache-2.0")
    data = card_data(named, RESULT, fields).to_dict()
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == ["openai/clip-vit-large-patch14-336"]
    write_card(tmp_path, named, lora_run / "final", RESULT, fields)
    text = (tmp_path / "README.md").read_text()
    assert "language model vicuna-7b" in text and "/home/me" not in text


def test_a_command_is_marked_as_one(lora_run: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(lora_run / "final", device="cpu")
    result = dataclasses.replace(RESULT, usage="llama-server -m FOLDER/a", library="gguf")
    write_card(tmp_path, loaded, lora_run / "final", result, CardFields("mine"))
    assert "```bash\nllama-server -m mine/a\n```" in (tmp_path / "README.md").read_text()


def test_results_that_are_no_object_are_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="is not an object"):
        require_results(tmp_path / "list.json")
    with pytest.raises(UserError, match="cannot be read"):
        require_results(tmp_path / "gone.json")
