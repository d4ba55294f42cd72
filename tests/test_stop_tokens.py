"""A model that has learnt its records by heart says each answer and then stops, by itself."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken

from vlm_sft.config.schema import (
    DataConfig,
    DataFile,
    LanguageModelConfig,
    LearningRates,
    ModelConfig,
    OptimConfig,
    VisionTowerConfig,
)
from vlm_sft.data.batch import pad_examples
from vlm_sft.data.chat_template import builtin_templates
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.dataset import SupervisedDataset
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.data.image_layout import LayoutRule
from vlm_sft.data.ledger import Ledger
from vlm_sft.data.tokenize import ChatTokenizer, expand
from vlm_sft.model.build import build_model
from vlm_sft.model.parts import parameters_by_part, set_trainable
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.optimizer import build_optimizer
from vlm_sft.utils.constants import IMAGE_TOKEN_ID

CONFIG = ModelConfig(
    vision_tower=VisionTowerConfig(
        library="transformers",
        config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
        },
    ),
    language_model=LanguageModelConfig(
        config={
            "model_type": "llama",
            "vocab_size": 274,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        },
        tokenizer="bytes",
    ),
)
MAX_NEW_TOKENS = 40
# Of unequal lengths; one is the beginning of another, so that stopping at the right place is
# part of being right.
IMAGES = {
    "red": "a red sheet",
    "lime": "green",
    "blue": "blue",
    "yellow": "Yellow, two\nlines.",
    "white": "white",
    "black": "a red sheet at night",
    "cyan": "türkis",
    "magenta": "pink!",
}
TEXTS = {"2+2?": "4", "3+3?": "6, I think", "Who?": "me", "Why?": "</s> is no stop here"}


def records(template: str, folder: Path) -> Path:
    """Eight records: images alone for `plain`, which has no questions; else half of them text."""
    rows = []
    images = IMAGES if template == "plain" else dict(list(IMAGES.items())[:4])
    for color, answer in images.items():
        Image.new("RGB", (16, 16), color).save(folder / f"{color}.png")
        rows.append((f"{color}.png", "<image>\nWhat is it?", answer))
    if template != "plain":
        rows += [(None, question, answer) for question, answer in TEXTS.items()]
    path = folder / "records.json"
    path.write_text(
        json.dumps(
            [
                {
                    "id": str(number),
                    **({"image": image} if image else {}),
                    "conversations": [
                        {"from": "human", "value": question},
                        {"from": "gpt", "value": answer},
                    ],
                }
                for number, (image, question, answer) in enumerate(rows)
            ]
        )
    )
    return path


def overfitted(data: SupervisedDataset) -> VisionLanguageModel:
    model = build_model(CONFIG, dtype=torch.float32, seed=1)
    set_trainable(model, {"projector", "language_model"})
    rates = LearningRates(projector=3e-3, language_model=3e-3)
    optimizer = build_optimizer(parameters_by_part(model), OptimConfig(learning_rate=rates))
    batch = pad_examples([data[index] for index in range(len(data))], 0)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"]
    for _ in range(300):
        output = model(batch)
        loss = output.loss_sum / output.num_targets
        if loss < 5e-3:
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


CONTROL = [
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),  # llama_3
    *("<start_of_turn>", "<end_of_turn>"),  # gemma
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),  # phi_3
    *("<img>", "</img>"),  # internvl2_5
]


def speaker(template: str) -> ChatTokenizer:
    """Single bytes, and the control tokens of every template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in CONTROL])
    return ChatTokenizer.from_name(template, tokenizer)


# `llava_plain` has no stop token by its nature.
@pytest.mark.parametrize("template", sorted({"auto", *builtin_templates()} - {"llava_plain"}))
def test_all_eight_answers_are_right_and_end_by_themselves(template: str, tmp_path: Path) -> None:
    chat_tokenizer = speaker(template)
    tower = build_model(CONFIG, dtype=torch.float32, seed=1).vision_tower
    file = DataFile(path=str(records(template, tmp_path)))
    data = SupervisedDataset(
        [file],
        chat_tokenizer,
        tower.image_spec,
        layout_rule=LayoutRule(tower.num_tokens),
        config=DataConfig(train=[file]),
        ledger=Ledger(),
    )
    assert len(data) == 8
    model = overfitted(data)
    for index in range(8):
        conversation = data.conversation(index)
        *asked, answer = conversation.turns
        prompt = chat_tokenizer.prompt(Conversation("", tuple(asked), conversation.images))
        tokens = [tower.num_tokens] * prompt.count(IMAGE_TOKEN_ID)
        ids = torch.tensor([expand(prompt, tokens)])
        pixels = data[index].pixel_values
        assert (IMAGE_TOKEN_ID in prompt) == bool(len(pixels))
        (said,) = model.generate(
            ids,
            torch.ones_like(ids),
            pixels,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=list(chat_tokenizer.eot_token_ids),
            pad_token_id=chat_tokenizer.tokenizer.pad_token_id,
        ).tolist()
        assert said[-1] in chat_tokenizer.eot_token_ids and len(said) < MAX_NEW_TOKENS
        assert said == chat_tokenizer.answer_ids(answer.text)
        assert (
            chat_tokenizer.tokenizer.decode(said, skip_special_tokens=True).strip() == answer.text
        )
