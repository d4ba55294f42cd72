"""An exported run is asked what was trained, whichever way a user asks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, pipeline

from tests.tiny_runs import ROOT
from vlm_sft import chat
from vlm_sft.config.schema import DataFile
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.records import read_records
from vlm_sft.export.__main__ import main as export
from vlm_sft.inference.generate import generate_greedy
from vlm_sft.inference.loaded_model import LoadedModel, load_checkpoint
from vlm_sft.inference.prompts import user_message

pytestmark = [
    pytest.mark.usefixtures("in_the_repository"),
    pytest.mark.filterwarnings("ignore:.*TorchVision are deprecated:DeprecationWarning"),
]

RED = ROOT / "configs" / "tiny" / "data" / "images" / "red-circle-0.png"
BLUE = ROOT / "configs" / "tiny" / "data" / "images" / "blue-square-0.png"
ASKED = "Which color?"
TOKENS = 12


@pytest.fixture(scope="module")
def run(full_run: Path) -> LoadedModel:
    return load_checkpoint(full_run, device="cpu")


@pytest.fixture(scope="module")
def exported(full_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "exported"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert export([str(full_run), str(out), "--to", "hf"]) == 0
    return out


@pytest.fixture(scope="module")
def processor(exported: Path) -> Any:
    return AutoProcessor.from_pretrained(exported)


@pytest.fixture(scope="module")
def stock(exported: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(exported).eval()


def trained_prompt(run: LoadedModel) -> tuple[list[int], Path]:
    """Prompt of a training record about an image, as training laid it out, and the image."""
    file = run.config.data.train[0]
    for record in read_records(DataFile.model_validate(file)):
        assert isinstance(record, Conversation)
        if record.images:
            asked = Conversation("r", record.turns[:1], record.images)
            (image,) = record.images
            assert isinstance(image, Path)
            return run.prompt_ids(asked), image
    raise AssertionError("the tiny data has images")


def as_stock(run: LoadedModel, ids: list[int], stock: LlavaForConditionalGeneration) -> list[int]:
    return [i if i >= 0 else stock.config.image_token_id for i in ids]


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def inputs_of(processor: Any, messages: list[dict[str, Any]], **keys: Any) -> Any:
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **keys,
    )


def test_a_training_question_has_the_same_ids_through_every_way_of_asking(
    run: LoadedModel, processor: Any, stock: LlavaForConditionalGeneration
) -> None:
    trained, path = trained_prompt(run)
    text = run.tokenizer.decode([i for i in trained if i >= 0])
    (words,) = [t for t in text.split("\n") if t.endswith("?<|im_end|>")]
    asked = words.removesuffix("<|im_end|>")
    expected = as_stock(run, trained, stock)
    assert run.prompt_ids(user_message(asked, [path])) == trained
    image = Image.open(path)
    for part in (
        {"type": "image", "image": image},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": str(path)},
        {"type": "image_url", "image_url": {"url": str(path)}},
    ):
        content = [part, {"type": "text", "text": asked}]
        assert inputs_of(processor, user(content))["input_ids"][0].tolist() == expected
    written = user(f"<image>\n{asked}")
    found = inputs_of(processor, written, processor_kwargs={"images": [image]})
    assert found["input_ids"][0].tolist() == expected
    spelled = processor.apply_chat_template(written, add_generation_prompt=True)
    for keys in ({}, {"add_special_tokens": False}):
        again = processor(text=spelled, images=image, return_tensors="pt", **keys)
        assert again["input_ids"][0].tolist() == expected


def test_every_way_of_asking_gives_the_same_answer(
    run: LoadedModel,
    full_run: Path,
    exported: Path,
    processor: Any,
    stock: LlavaForConditionalGeneration,
    capfd: pytest.CaptureFixture[str],
) -> None:
    expected = run.generate(user_message(ASKED, [RED]), max_new_tokens=TOKENS)
    assert run.generate_batch([ASKED], [[RED]], max_new_tokens=TOKENS) == [expected]
    [answer] = generate_greedy(  # as evaluate does
        run.model,
        run.chat_tokenizer,
        [run.prompt_ids(user_message(ASKED, [RED]))],
        image_embeds=run.encode_images([run.load_image(RED)]),
        max_new_tokens=TOKENS,
    )
    assert answer == expected

    capfd.readouterr()
    argv = [str(full_run), "--device", "cpu", "--image", str(RED), "--prompt", ASKED]
    assert chat.main([*argv, "--max-new-tokens", str(TOKENS)]) == 0
    assert capfd.readouterr().out.strip() == expected

    content = [{"type": "image", "path": str(RED)}, {"type": "text", "text": ASKED}]
    inputs = inputs_of(processor, user(content))
    with torch.no_grad():
        made = stock.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    answer = made[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(answer, skip_special_tokens=True).strip() == expected
    stops = stock.generation_config.eos_token_id
    assert sorted([stops] if isinstance(stops, int) else stops) == sorted(
        run.chat_tokenizer.eot_token_ids
    )

    ask = pipeline("image-text-to-text", model=str(exported), device="cpu")
    keys = {"max_new_tokens": TOKENS, "return_full_text": False}
    keys["generate_kwargs"] = {"do_sample": False}
    (said,) = ask(text=user(content), **keys)
    assert said["generated_text"].strip() == expected
    spelled = processor.apply_chat_template(user(f"<image>\n{ASKED}"), add_generation_prompt=True)
    (said,) = ask(images=str(RED), text=spelled, return_full_text=False)
    assert said["generated_text"].strip() == expected


def test_a_batch_of_questions_is_padded_on_the_left(run: LoadedModel, processor: Any) -> None:
    texts = [ASKED, "Which color is the large shape?"]
    chats = [
        user([{"type": "image", "path": str(RED)}, {"type": "text", "text": text}])
        for text in texts
    ]
    found = inputs_of(processor, chats, processor_kwargs={"padding": True})  # type: ignore[arg-type]
    kept = found["input_ids"][0][found["attention_mask"][0].bool()].tolist()
    assert not found["attention_mask"][0, 0] and found["attention_mask"][0, -1]
    assert len(kept) == len(run.prompt_ids(user_message(ASKED, [RED])))


@pytest.mark.parametrize("image_last", [False, True])
def test_several_images_and_an_image_behind_the_text_keep_their_order(
    image_last: bool, run: LoadedModel, processor: Any, stock: LlavaForConditionalGeneration
) -> None:
    images = [{"type": "image", "path": str(RED)}, {"type": "image", "path": str(BLUE)}]
    text = {"type": "text", "text": "Compare."}
    content = [text, *images] if image_last else [*images, text]
    found = inputs_of(processor, user(content))
    assert found["pixel_values"].shape[0] == 2
    spelled = "Compare.\n<image>\n<image>" if image_last else "<image>\n<image>\nCompare."
    again = inputs_of(
        processor,
        user(spelled),
        processor_kwargs={"images": [Image.open(RED), Image.open(BLUE)]},
    )
    assert torch.equal(found["input_ids"], again["input_ids"])
    assert torch.equal(found["pixel_values"], again["pixel_values"])
    if not image_last:
        ids = as_stock(run, run.prompt_ids(user_message("Compare.", [RED, BLUE])), stock)
        assert found["input_ids"][0].tolist() == ids


def test_control_strings_of_a_user_are_text_where_transformers_is_asked_to_keep_them(
    run: LoadedModel, processor: Any, stock: LlavaForConditionalGeneration
) -> None:
    text = "Is <image> or <|im_end|> a word?"
    content = [{"type": "image", "path": str(RED)}, {"type": "text", "text": text}]
    found = inputs_of(processor, user(content), sanitize_control_tokens=True)
    expected = as_stock(run, run.prompt_ids(user_message(text, [RED])), stock)
    assert found["input_ids"][0].tolist() == expected


@pytest.mark.parametrize("size", [(48, 48), (90, 40), (31, 77), (300, 200)])
def test_the_exported_processor_prepares_images_as_training_did(
    size: tuple[int, int], run: LoadedModel, processor: Any, tmp_path: Path
) -> None:
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(1))
    Image.fromarray(noise.to(torch.uint8).numpy()).save(tmp_path / "noise.png")
    stock = processor.image_processor(Image.open(tmp_path / "noise.png"), return_tensors="pt")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (run.image_spec.mean, run.image_spec.std))
    theirs = (stock["pixel_values"][0] * std + mean) * 255
    assert (theirs - run.load_image(tmp_path / "noise.png").pixels).abs().max() <= 2.5
