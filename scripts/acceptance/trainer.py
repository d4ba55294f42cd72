"""transformers' own Trainer with its own LLaVA class, on the same rows and flags."""

import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import (
    AutoConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from acceptance.models import Records
from vlm_sft.config.schema import RunConfig
from vlm_sft.planning.estimate import Method
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID

IMAGE_ID = 2
"""A token that no row holds stands for the image."""


class _Rows(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, records: Records) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.records[index]
        ids = example.input_ids.masked_fill(example.input_ids == IMAGE_TOKEN_ID, IMAGE_ID)
        return {"input_ids": ids, "labels": example.labels, "pixels": example.pixel_values}


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> torch.Tensor:
        fill = torch.nn.functional.pad
        return torch.stack([fill(r[key], (0, longest - len(r[key])), value=value) for r in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch = {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", IGNORE_INDEX),
        "attention_mask": (torch.arange(longest)[None] < lengths[:, None]).long(),
    }
    pixels = torch.cat([row["pixels"] for row in rows])
    if len(pixels):
        batch["pixel_values"] = pixels.float() / 127.5 - 1
    return batch


class _Clock(TrainerCallback):
    def __init__(self, device: str) -> None:
        self.device, self.times = device, [0.0]

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._mark(first=True)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._mark()

    def _mark(self, *, first: bool = False) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times = [now] if first else [*self.times, now]


def trainer_rate(
    config: RunConfig,
    method: Method,
    records: Records,
    device: str,
    batch: int,
    micro: int,
    steps: int,
    recompute: bool,
) -> float:
    """Return samples a second of the Trainer: the median of its steps but the first."""
    model = _model(config, method, device)
    clock = _Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=batch // micro,
            learning_rate=1e-4,
            max_grad_norm=0.0,
            gradient_checkpointing=recompute,
            gradient_checkpointing_kwargs={"use_reentrant": False} if recompute else None,
            bf16=True,
            use_cpu=device == "cpu",
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=_Rows(records),
            data_collator=_collate,
            callbacks=[clock],
        )
        trainer.train()
    seconds = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return batch / statistics.median(seconds[1:])


def _model(config: RunConfig, method: Method, device: str) -> Any:
    parts = []
    for part in (config.model.vision_tower.config, config.model.language_model.config):
        tree = dict(part or {})
        parts.append(AutoConfig.for_model(tree.pop("model_type"), **tree))
    llava = LlavaConfig(
        vision_config=parts[0],
        text_config=parts[1],
        image_token_id=IMAGE_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlavaForConditionalGeneration(llava)
    model.requires_grad_(False)
    if method == "full":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    else:
        model.model.language_model.to(torch.bfloat16)
        model.lm_head.to(torch.bfloat16)
    model.model.vision_tower.to(torch.bfloat16)
    model.model.multi_modal_projector.requires_grad_(True)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        lora = LoraConfig(r=128, lora_alpha=256, lora_dropout=0.0, target_modules=targets)
        model = get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            if "lora_" in name or "multi_modal_projector" in name:
                parameter.requires_grad_(True)
                parameter.data = parameter.data.float()
    return model
