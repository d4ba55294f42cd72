"""The chat template of a finished model is recognized by what it writes, or used as it is."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from tests.tokenizers_for_tests import load
from vlm_sft.config.finished_files import FinishedModel
from vlm_sft.config.schema import DataConfig, DataFile
from vlm_sft.data.chat_template import JinjaTemplate
from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.data.finished_template import finished_chat_tokenizer
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import TemplateError

IMAGES = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
)
TEXTS = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}"
)
LLAVA_1_5 = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    + IMAGES
    + TEXTS
    + "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""What the released folders of LLaVA-1.5 write: no system text, and no stop token."""

OWN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' says: ' }}"
    + IMAGES
    + TEXTS.replace(" + ' '", "")
    + "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant says: ' }}{% endif %}"
)


def finished(folder: Path, template: str | None, file: str = "chat_template.json") -> FinishedModel:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    if template is not None and file.endswith(".jinja"):
        (folder / file).write_text(template)
    elif template is not None:
        (folder / file).write_text(json.dumps({"chat_template": template}))
    return FinishedModel(
        str(folder), folder, "transformers", "full", {}, frozenset(), image_aspect="pad"
    )


def with_image_token(name: str) -> PreTrainedTokenizerBase:
    tokenizer: Any = byte_tokenizer() if name == "bytes" else copy.deepcopy(load(name))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def written(chat_tokenizer: ChatTokenizer) -> str:
    turns = (
        Turn("user", (ImagePart(0), TextPart("Q")), image_separator=None),
        Turn("assistant", (TextPart("A"),)),
    )
    tokenized = chat_tokenizer.tokenize(Conversation("r", turns))
    ids = [token for token in tokenized.input_ids if token >= 0]
    return str(chat_tokenizer.tokenizer.decode(ids))


@pytest.mark.parametrize("name", ["sentencepiece", "llama_2_file"])
def test_the_template_of_llava_1_5_is_vicunas_without_a_system_text(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = finished(tmp_path, LLAVA_1_5)
    by = finished_chat_tokenizer(found, with_image_token(name))
    assert by.template.name == "vicuna_v1"
    assert (by.describe()["default_system"], by.image_separator) == ("", "\n")
    said = capsys.readouterr().err
    assert "vicuna_v1, recognized by what it writes, without a system text" in said
    assert "it writes no stop token after an answer, but the model is trained to end" in said


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("chatml", "bytes"),
        ("chatml", "bytes-img"),
        ("internvl2_5", "bytes-img"),
        ("llava_v1", "sentencepiece"),
        ("vicuna_v1", "sentencepiece"),
        ("smollm2", "bytes"),
        ("llama_3", "llama_3"),
        ("llava_onevision", "bytes"),
    ],
)
def test_every_template_that_this_project_exports_is_recognized(
    template: str, name: str, tmp_path: Path
) -> None:
    tokenizer = with_image_token(name)
    ours = ChatTokenizer.from_name(template, tokenizer)
    found = finished(tmp_path, ours.to_jinja(), "chat_template.jinja")
    by = finished_chat_tokenizer(found, tokenizer)
    assert by.template.name == template
    assert by.describe() == ours.describe()


ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + part['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""What the released folders of LLaVA-OneVision write: images first, then text on a new line."""


@pytest.mark.parametrize(
    ("own", "name"), [(ONEVISION, "qwen"), (ONEVISION, "bytes"), ("exported", "bytes")]
)
def test_the_template_of_llava_onevision_is_found_and_gives_its_ids(
    own: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer: Any = with_image_token(name)
    tokenizer.add_bos_token = False
    if own == "exported":
        own = ChatTokenizer.from_name("llava_onevision", tokenizer).to_jinja()
    by = finished_chat_tokenizer(finished(tmp_path, own), tokenizer)
    assert by.template.name == "llava_onevision"
    said = "; it writes '<|im_end|><|im_start|>assistant \\n' between a question and an answer"
    assert (said in capsys.readouterr().err) == (own == ONEVISION)
    image, text = {"type": "image"}, {"type": "text", "text": "What is it?"}
    prompts: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": content}]
        for content in ([image, text], [image, image, text], [text], [image])
    ]
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "It."}]}
    prompts += [[system, *prompts[0]], [*prompts[0], answer, *prompts[2]]]
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    for messages in prompts:
        written = tokenizer.apply_chat_template(
            messages, chat_template=own, tokenize=False, add_generation_prompt=True
        )
        # The one difference: in training a past answer follows what it is generated after.
        expected = tokenizer(written.replace("assistant \n", "assistant\n"))["input_ids"]
        turns = tuple(
            Turn(
                message["role"],
                tuple(
                    ImagePart(0) if part is image else TextPart(part["text"])
                    for part in message["content"]
                ),
                image_separator=None,
            )
            for message in messages
        )
        ids = by.prompt(Conversation("r", turns))
        assert [image_id if token < 0 else token for token in ids] == expected


def test_a_system_text_of_its_own_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = with_image_token("sentencepiece")
    ours = ChatTokenizer.from_name("vicuna_v1", tokenizer, default_system="Be brief.")
    by = finished_chat_tokenizer(finished(tmp_path, ours.to_jinja()), tokenizer)
    assert by.describe() == ours.describe()
    assert "with the system text 'Be brief.'" in capsys.readouterr().err
    file = DataFile(path="x.json")
    given = finished_chat_tokenizer(
        finished(tmp_path, ours.to_jinja()), tokenizer, DataConfig(train=[file], system="Other.")
    )
    assert given.describe()["default_system"] == "Other."


def test_another_template_is_used_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = with_image_token("bytes")
    by = finished_chat_tokenizer(finished(tmp_path, OWN), tokenizer)
    assert isinstance(by.template, JinjaTemplate)
    assert written(by) == (
        "<|im_start|>user says: \nQ<|im_end|><|im_start|>assistant says: A<|im_end|>"
    )
    assert "its own, which is none of the built-in ones" in capsys.readouterr().err
    restored = ChatTokenizer.from_description(by.describe(), with_image_token("bytes"))
    assert written(restored) == written(by)
    exported = finished(tmp_path / "exported", by.to_jinja())
    again = finished_chat_tokenizer(exported, with_image_token("bytes"))
    assert written(again) == written(by)


@pytest.mark.parametrize(
    "around",
    [
        OWN.replace("'<image>\n'", "'before ' + '<image>\n'"),
        OWN.replace("'<image>\n'", "'<image>'").replace(
            "content['text']", "'\n' + content['text']"
        ),
    ],
)
def test_a_template_whose_text_depends_on_images_cannot_be_reproduced(
    around: str, tmp_path: Path
) -> None:
    with pytest.raises(TemplateError, match="training cannot reproduce the chat template of"):
        finished_chat_tokenizer(finished(tmp_path, around), with_image_token("bytes"))


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "constant"])
def test_a_template_that_is_missing_or_fails_names_the_setting(
    template: str | None, tmp_path: Path
) -> None:
    tokenizer = with_image_token("sentencepiece")
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match=r"set data\.template \(--template\) to"):
        finished_chat_tokenizer(finished(tmp_path, template), tokenizer)
