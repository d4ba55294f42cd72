"""LLaVA as transformers has it, and batches made with its processor, right-padded.

What a user of transformers writes: the chat template marks the answers, everything else is -100.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import Job
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoProcessor, LlavaForConditionalGeneration

Item = tuple[list[dict[str, str]], list[str]]


class Rows(Dataset[Item]):
    """The rows in order; images are opened by the collator."""

    def __init__(self, job: Job) -> None:
        self.items = job.messages()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


class Collator:
    """Rows to padded tensors."""

    def __init__(self, job: Job) -> None:
        self.processor = AutoProcessor.from_pretrained(Path(job.model, "llava"))
        self.chat_template = job.options.get("chat_template")  # None: the processor's own
        self.max_length = job.max_length

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        batch = self.processor.apply_chat_template(
            [self._conversation(*item) for item in items],
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={
                "padding": True,
                "padding_side": "right",
                "truncation": True,
                "max_length": self.max_length,
                "add_special_tokens": False,
            },
        )
        answers = batch.pop("assistant_masks")
        batch["labels"] = batch["input_ids"].masked_fill(answers == 0, -100)
        return dict(batch)

    @staticmethod
    def _conversation(messages: list[dict[str, str]], images: list[str]) -> list[dict[str, Any]]:
        result = []
        for place, message in enumerate(messages):
            parts: list[dict[str, Any]] = [{"type": "text", "text": message["content"]}]
            if place == 0:
                parts = [{"type": "image", "image": Image.open(path)} for path in images] + parts
            result.append({"role": message["role"], "content": parts})
        return result


def load_model(job: Job) -> Any:
    """The model in what `job.mode` and `job.device` ask for, its trainable parts thawed."""
    kwargs: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    if job.device == "cuda" and job.mode != "full":
        kwargs["dtype"] = torch.bfloat16
    if job.mode == "qlora":
        from transformers import BitsAndBytesConfig

        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=kwargs["dtype"],
            llm_int8_skip_modules=[".*vision_tower", ".*multi_modal_projector", "lm_head"],
        )
    model = LlavaForConditionalGeneration.from_pretrained(Path(job.model, "llava"), **kwargs)
    model.requires_grad_(False)
    if job.mode in ("lora", "qlora"):
        return _adapted(model, job)
    thawed = [model.model.multi_modal_projector]
    if job.mode == "full":
        thawed += [model.model.language_model, model.lm_head]
    for part in thawed:
        part.float().requires_grad_(True)
    return model


def _adapted(model: Any, job: Job) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=job.options["lora_r"],
        lora_alpha=job.options["lora_alpha"],
        lora_dropout=0.0,
        target_modules=r".*language_model\.layers.*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=["multi_modal_projector"],
    )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # the projector's copy too
    return adapted
