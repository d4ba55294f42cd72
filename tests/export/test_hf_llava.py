import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    GenerationConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from tests.model.tiny import CLIP, GEMMA2, LLAMA, OPEN_CLIP, VIT, images, rows, tiny_model
from vlm_sft.config.schema import LoraConfig
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.data.images import to_pixels
from vlm_sft.errors import UserError
from vlm_sft.export import hf_llava
from vlm_sft.export.hf_llava import ExportReport, export_hf_llava
from vlm_sft.export.verify import Reloaded, reload_here, reload_in_new_process
from vlm_sft.model.hashing import named_state, tensors_digest
from vlm_sft.model.parts import parameters_by_part
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.constants import IMAGE_TOKEN_ID

SIGLIP: dict[str, Any] = {
    "library": "transformers",
    "config": {"model_type": "siglip_vision_model", **VIT},
}
DINO: dict[str, Any] = {"library": "transformers", "config": {"model_type": "dinov2", **VIT}}
QUICK: dict[str, Any] = {**OPEN_CLIP, "config": {**OPEN_CLIP["config"], "quick_gelu": True}}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


def export(
    model: VisionLanguageModel, tokenizer: PreTrainedTokenizerBase, out: Path, **keys: Any
) -> ExportReport:
    keys = {"image_aspect": "pad", "chat_template": None, "reload": reload_here, **keys}
    return export_hf_llava(model, tokenizer, out, **keys)


def trained_adapters() -> VisionLanguageModel:
    model = tiny_model(tower=QUICK, lora=LoraConfig(r=2))
    for name, parameter in parameters_by_part(model)["adapter"]:
        if ".lora_B." in name:
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
@pytest.mark.parametrize(
    "tower",
    [
        CLIP,
        OPEN_CLIP,
        QUICK,
        {**CLIP, "feature_layers": [-2, 1], "feature_select": "cls_patch"},
        {**CLIP, "image_size": 42},
        SIGLIP,
        DINO,
    ],
)
def test_stock_llava_loads_the_export_and_gives_the_same_logits(
    tower: dict[str, Any], projector: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = tiny_model(tower=tower, projector_type=projector)
    report = export(model, tokenizer, tmp_path / "out")
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    assert report.max_abs_logit_difference <= 1e-5
    assert report.max_pixel_difference <= 1.01
    stock, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert stock.config.image_seq_length == model.vision_tower.num_tokens


def test_every_phase_of_an_export_says_that_it_runs(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = []

    @contextmanager
    def noted(description: str) -> Iterator[None]:
        phases.append(description)
        yield

    monkeypatch.setattr(hf_llava, "waiting", noted)
    export(trained_adapters(), tokenizer, tmp_path / "out")
    assert phases == [
        "computing the logits of the checkpoint",
        "merging adapters",
        "building the exported model",
        "writing the folder",
        "loading the folder again, and computing its logits",
    ]


def test_adapters_are_merged_and_the_model_itself_is_left_alone(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = trained_adapters()
    before = tensors_digest(named_state(model))
    report = export(model, tokenizer, tmp_path / "out")
    assert report.max_abs_logit_difference < report.max_abs_logit / 500
    assert tensors_digest(named_state(model)) == before
    assert model.language_model.config.vocab_size == 300


@pytest.mark.parametrize("tied", [True, False])
def test_a_full_vocabulary_grows_by_rows_that_are_never_the_likeliest(
    tied: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    language_model = {**LLAMA, "vocab_size": len(tokenizer), "tie_word_embeddings": tied}
    model = tiny_model(language_model=language_model)
    report = export(model, tokenizer, tmp_path / "out")
    assert report.image_token_id == len(tokenizer)
    assert report.max_abs_logit_difference <= 1e-5
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert stock.config.text_config.vocab_size == 320
    assert (stock.lm_head.weight is stock.get_input_embeddings().weight) == tied
    logits = stock(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert logits[..., len(tokenizer) :].amax() < logits[..., : len(tokenizer)].amax()
    assert model.language_model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_the_processor_and_the_stock_model_answer_as_the_trained_one(
    aspect: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = tiny_model().eval()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    out = tmp_path / "out"
    export(
        model,
        tokenizer,
        out,
        image_aspect=aspect,
        chat_template=template,
        eot_token_ids=[260, 258],
    )
    processor = AutoProcessor.from_pretrained(out)
    stock = LlavaForConditionalGeneration.from_pretrained(out)
    assert stock.generation_config.eos_token_id == [260, 258]
    assert processor.tokenizer.eos_token_id == 260
    assert processor.chat_template == template
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    inputs = processor(images=image, text="ab<image>cd", return_tensors="pt")
    text = tokenizer("ab", add_special_tokens=False)["input_ids"]
    after = tokenizer("cd", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*text, *[IMAGE_TOKEN_ID] * 4, *after]])
    assert inputs["input_ids"][0, -len(ids[0]) :].tolist() == [
        stock.config.image_token_id if i == IMAGE_TOKEN_ID else i for i in ids[0].tolist()
    ]
    pixels = to_pixels(image, model.vision_tower.image_spec, aspect).unsqueeze(0)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ours = model.generate(ids, torch.ones_like(ids), pixels, **settings)
    inputs["input_ids"] = inputs["input_ids"][:, -len(ids[0]) :]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    theirs = stock.generate(**inputs, **settings)
    assert torch.equal(theirs[:, ids.shape[1] :], ours)


def test_the_callers_image_and_prompt_are_compared(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    ids, _, _ = rows([5, -1, 6, -1, 100])
    report = export(tiny_model(), tokenizer, tmp_path / "out", sample=(images(2), ids))
    assert report.max_abs_logit_difference <= 1e-5


def test_the_folder_tells_what_was_proven(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = export(tiny_model(), tokenizer, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "export.json").read_text())
    assert written["max_abs_logit_difference"] == report.max_abs_logit_difference
    assert written["missing_keys"] == []
    assert set(written["versions"]) == {"torch", "transformers", "vlm-sft"}
    assert capsys.readouterr().out == ""


def test_a_bfloat16_model_is_exported_in_bfloat16(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    report = export(tiny_model(dtype=torch.bfloat16), tokenizer, tmp_path / "out")
    assert report.dtype == "bfloat16"
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert stock.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tower": {**CLIP, "grid_pool": 1}}, "averages the feature grid"),
        (
            {"projector_type": "mlp3x_gelu"},
            r"projector_type: mlp3x_gelu\) has 3",
        ),
        ({"language_model": GEMMA2}, "final_logit_softcapping = 0.05"),
    ],
)
def test_what_stock_llava_cannot_hold_is_refused_and_nothing_is_written(
    keys: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        export(tiny_model(**keys), tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("theirs", [False, True])
def test_a_failed_export_removes_the_empty_directories_that_it_created(
    theirs: bool, tmp_path: Path
) -> None:
    (tmp_path / "before").mkdir()
    out = tmp_path / "before" / "a" / "b" / "out"

    def broken(folder: Path, inputs: dict[str, torch.Tensor]) -> Reloaded:
        if theirs:
            (tmp_path / "before" / "a" / "notes.txt").write_text("put there meanwhile")
        raise UserError("the comparison failed")

    with pytest.raises(UserError, match="the comparison failed"):
        export_hf_llava(
            tiny_model(),
            byte_tokenizer(),
            out,
            image_aspect="pad",
            chat_template=None,
            reload=broken,
        )
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"before"} | ({"before/a", "before/a/notes.txt"} if theirs else set())


def test_a_folder_with_something_in_it_is_never_touched(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an empty directory"):
        export(tiny_model(), tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_older_programs_find_the_image_processor_and_the_rotary_base(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rope = {"rope_type": "linear", "rope_theta": 50000.0, "factor": 2.0}
    model = tiny_model(language_model={**LLAMA, "rope_parameters": rope})
    export(model, tokenizer, tmp_path / "out")
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == 50000.0
    assert text["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert text["rope_parameters"] == rope
    image = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    both = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert image.pop("processor_class") == "LlavaProcessor"
    assert image == both["image_processor"]


def test_sampling_settings_without_sampling_do_not_stop_the_export(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = tiny_model()
    settings = GenerationConfig(temperature=0.9, top_p=0.6, pad_token_id=0)
    model.language_model.generation_config = settings
    export(model, tokenizer, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert "temperature" not in written and written["pad_token_id"] == 0
    assert settings.temperature == 0.9


def test_the_comparison_is_made_in_a_new_process(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What this process has patched must not be seen by the comparison.
    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", None)
    report = export(tiny_model(), tokenizer, tmp_path / "out", reload=reload_in_new_process)
    assert report.model_class == "LlavaForConditionalGeneration"
    assert report.max_abs_logit_difference <= 1e-5
