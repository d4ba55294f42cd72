"""The public Python API: lazily imported, documented, and equal to the commands."""

import os
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlm_sft
from tests.train.tiny import reset_accelerate
from vlm_sft.config.reference import select_settings
from vlm_sft.data.conversation import Conversation, ImagePart, TextPart
from vlm_sft.errors import ConfigError, ImageError, RecordError, UserError
from vlm_sft.inference.loaded_model import LoadedModel, load_checkpoint
from vlm_sft.inference.prompts import as_conversation, image_source

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "configs" / "tiny" / "data" / "images"
RED, BLUE = IMAGES / "red-circle-1.png", IMAGES / "blue-square-1.png"


@pytest.fixture(scope="module")
def model(full_run: Path) -> LoadedModel:
    return load_checkpoint(full_run, device="cpu")


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, vlm_sft\n"
        "assert set(vlm_sft.__all__) <= set(dir(vlm_sft))\n"
        "assert not {'torch', 'transformers', 'pydantic', 'rich'} & set(sys.modules)\n"
        "vlm_sft.load_config\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_public_name_can_be_imported_and_other_names_cannot() -> None:
    for name in vlm_sft.__all__:
        assert getattr(vlm_sft, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'load_chekpoint'"):
        vlm_sft.load_chekpoint  # type: ignore[attr-defined]  # noqa: B018
    assert vlm_sft.__all__ == sorted(vlm_sft.__all__)
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    documented = {"LoadedModel", "RunConfig", "TokenView", "TrainResult"}  # as results
    for name in set(vlm_sft.__all__) - documented:
        assert name in page, name


def test_the_examples_of_the_page_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) > 8
    code = "\n".join(examples).replace("runs/api", str(tmp_path / "run"))
    here = Path.cwd()
    os.chdir(ROOT)
    reset_accelerate()
    try:
        exec(compile(code, "docs/python-api.md", "exec"), {"__name__": "example"})
    finally:
        os.chdir(here)
    printed = capsys.readouterr().out
    assert "⟦Red." in printed and "trainable weights" in printed


def test_a_batch_gives_the_answers_of_one_by_one(model: LoadedModel) -> None:
    prompts: list[Any] = [
        "Which color?",
        "Say something that is quite a bit longer than the other questions.",
        [{"role": "user", "content": [{"type": "text", "text": "A?"}, {"type": "image"}]}],
        "No image here?",
        "Compare them.",
    ]
    images: list[list[Any]] = [[RED], [BLUE], [RED], [], [RED, BLUE]]
    alone = [
        model.generate(prompt, shown, max_new_tokens=12)
        for prompt, shown in zip(prompts, images, strict=True)
    ]
    for batch_size in (2, 16):
        found = model.generate_batch(prompts, images, max_new_tokens=12, batch_size=batch_size)
        assert found == alone
    assert model.generate_batch(["Who?"], max_new_tokens=3) == [
        model.generate("Who?", max_new_tokens=3)
    ]
    assert model.generate_batch([]) == []


def test_near_the_end_of_the_positions_a_batch_is_cut_as_one_by_one(model: LoadedModel) -> None:
    prompts = ["x" * length for length in (440, 470, 470, 3)]
    alone = [model.generate(prompt) for prompt in prompts]
    assert model.generate_batch(prompts) == alone
    with pytest.raises(UserError, match="the model has only 512 positions"):
        model.generate_batch(["Who?", "x" * 600])


def test_a_batch_needs_images_for_every_prompt(model: LoadedModel) -> None:
    with pytest.raises(UserError, match="one sequence for each of the 2 prompts, found 1"):
        model.generate_batch(["a", "b"], [[RED]])


def test_a_path_bytes_and_a_pil_image_are_the_same_image(model: LoadedModel) -> None:
    expected = model.load_image(RED).pixels
    for image in (str(RED), RED, RED.read_bytes(), Image.open(RED)):
        assert (model.load_image(image_source(image)).pixels == expected).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "YCbCr"])
def test_pil_images_of_every_mode_are_accepted(model: LoadedModel, mode: str) -> None:
    if mode == "I;16":
        image = Image.new(mode, (20, 10), 40_000)
    else:
        image = Image.new("RGB", (20, 10), (200, 30, 60)).convert("L" if mode == "F" else mode)
        image = image.convert(mode)
    assert model.load_image(image_source(image)).pixels.shape[1] == 3


def test_a_rotated_jpeg_is_upright_as_a_pil_image_too(model: LoadedModel) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = BytesIO()
    Image.open(RED).convert("RGB").resize((64, 32)).save(buffer, "JPEG", exif=exif)
    opened = Image.open(BytesIO(buffer.getvalue()))
    upright = model.load_image(buffer.getvalue()).pixels
    assert (model.load_image(image_source(opened)).pixels == upright).all()


def test_something_else_is_not_an_image() -> None:
    with pytest.raises(ImageError, match="a path, bytes or a PIL image, found int"):
        as_conversation("What?", [3])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": "a.png"}, "images: expected a list of images, found a single one"),
        ({"images": Image.new("RGB", (8, 8))}, "images: expected a list of images"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, found 0"),
        ({"temperature": float("nan")}, "temperature: expected 0, or 0.01 to 100, found nan"),
        ({"temperature": -1.0}, "temperature: expected 0, or 0.01 to 100, found -1.0"),
    ],
)
def test_wrong_arguments_of_generate_are_one_sentence(
    model: LoadedModel, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        model.generate("What?", **arguments)


def test_a_single_override_is_not_read_letter_by_letter() -> None:
    with pytest.raises(ConfigError, match="overrides: expected a list"):
        vlm_sft.load_config("configs/tiny/stage1.yaml", "output_dir=x")


def test_the_reference_knows_the_old_names_of_settings() -> None:
    with pytest.raises(ConfigError, match=r"data\.recipe: .* it is now 'data\.llava_quirks'"):
        select_settings(["data.recipe"])


def test_messages_with_image_parts_take_the_images_in_order() -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "this and"},
                {"type": "image", "image": BLUE},
                {"type": "image"},
            ],
        },
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]
    found = as_conversation(messages, [RED, b"third"])
    assert found.images == (RED, BLUE, b"third")
    assert [turn.role for turn in found.turns] == ["system", "user", "assistant", "user"]
    assert found.turns[1].parts == (
        ImagePart(0),
        TextPart("this and"),
        ImagePart(1),
        ImagePart(2),
    )


def test_images_without_places_come_before_the_last_message() -> None:
    messages = [{"role": "user", "content": "What is it?"}]
    found, asked = as_conversation(messages, [RED]), as_conversation("What is it?", [RED])
    assert (found.turns, found.images) == (asked.turns, asked.images)
    marked = as_conversation([{"role": "user", "content": "What is <image> here?"}], [RED])
    assert marked.turns[0].parts == (TextPart("What is "), ImagePart(0), TextPart(" here?"))


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ([], [], "prompt: expected text, or a list of messages"),
        (["Hi"], [], "prompt: expected text, or a list of messages"),
        (b"Hi", [], "prompt: expected text, or a list of messages"),
        ([{"role": "assistant", "content": "Hi"}], [], "the last message must be the user's"),
        ([{"role": "user", "content": 3}], [], "expected text or a list of parts, found"),
        ([{"role": "usr", "content": "a"}, {"role": "user", "content": "b"}], [], "unknown role"),
        ([{"role": "user", "content": [{"type": "image"}]}], [], "places for 1 images"),
        ([{"role": "user", "content": [{"type": "image"}]}], [RED, RED], "places for 1 images"),
    ],
)
def test_wrong_messages_are_refused(prompt: Any, images: list[Path], message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_conversation(prompt, images)
    with pytest.raises(UserError, match="contains its images"):
        as_conversation(Conversation("c", ()), [RED])


def test_a_broken_record_is_a_record_error() -> None:
    config = vlm_sft.load_config(ROOT / "configs/tiny/stage1.yaml")
    with pytest.raises(RecordError, match="record: record 'x': "):
        vlm_sft.tokenize_record(config, {"id": "x", "conversations": []})


def test_the_stage_and_its_settings_are_checked() -> None:
    with pytest.raises(UserError, match="stage 'stage3': expected 'stage1' or 'stage2'"):
        vlm_sft.train_stage("stage3", "configs/tiny/stage1.yaml")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="lora: stage 1 trains only the projector"):
        vlm_sft.train_stage("stage1", ROOT / "configs/tiny/stage2_lora.yaml")
    config = vlm_sft.load_config(ROOT / "configs/tiny/stage1.yaml")
    with pytest.raises(UserError, match="overrides are for configuration files"):
        vlm_sft.train_stage("stage1", config, "train.max_steps=1")
