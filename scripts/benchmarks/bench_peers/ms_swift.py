"""`swift sft` with the benchmark's template; packing and padding-free need flash-attn there."""

import json
import os
from pathlib import Path
from typing import Any

from measure import Job, Meter, measure_trainer

os.environ.setdefault("USE_HF", "1")  # no other hub is asked

from swift.pipelines.train.sft import SwiftSft
from swift.template import TemplateMeta, register_template
from swift.template.templates.llava import LlavaHfTemplate


def main() -> None:
    """Train the job's steps and write what they cost."""
    job = Job.from_command_line()
    _register_template(job)
    meter = Meter(job.device)

    class Measured(SwiftSft):
        def train(self, trainer: Any) -> Any:
            measure_trainer(trainer, meter)
            return super().train(trainer)

    Measured(_arguments(job, _dataset(job))).main()
    meter.write(job)


def _register_template(job: Job) -> None:
    """`vicuna_v1`: one space between turns, the answer's space in front of the answer."""
    system = json.loads(Path(job.model, "system.json").read_text())
    register_template(
        TemplateMeta(
            "bench_vicuna_v1",
            prefix=["<s>"],
            system_prefix=["<s>{{SYSTEM}} "],
            default_system=system,
            prompt=["USER: {{QUERY}} ASSISTANT:"],
            chat_sep=["</s>"],
            suffix=["</s>"],
            template_cls=LlavaHfTemplate,
        )
    )


def _dataset(job: Job) -> Path:
    """The rows in ms-swift's own form; its template puts the newline behind an image."""
    path = Path(job.work, "rows.jsonl")
    lines = []
    for messages, images in job.messages():
        turns = [dict(message) for message in messages]
        if images:
            turns[0]["content"] = "<image>" + turns[0]["content"]
        for turn in turns:
            if turn["role"] == "assistant":
                turn["content"] = " " + turn["content"]
        lines.append(json.dumps({"messages": turns, "images": images}) + "\n")
    path.write_text("".join(lines))
    return path


def _arguments(job: Job, dataset: Path) -> list[str]:
    settings = {
        "model": f"{job.model}/llava",
        "model_type": "llava1_5_hf",
        "template": "bench_vicuna_v1",
        "dataset": dataset,
        "tuner_type": "full",
        "freeze_vit": "true",
        "freeze_aligner": "false",
        "freeze_llm": "false",
        "torch_dtype": "float32",
        "attn_impl": "sdpa",
        "max_length": job.max_length,
        "max_steps": job.steps,
        "per_device_train_batch_size": job.micro_batch_size,
        "gradient_accumulation_steps": job.batch_size // job.micro_batch_size,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "max_grad_norm": 0,
        "weight_decay": 0,
        "adam_beta2": 0.999,
        "gradient_checkpointing": "false",
        "dataset_shuffle": "false",
        "train_dataloader_shuffle": "false",
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "split_dataset_ratio": 0,
        "load_from_cache_file": "false",
        "check_model": "false",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": job.work,
    }
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


if __name__ == "__main__":
    main()
