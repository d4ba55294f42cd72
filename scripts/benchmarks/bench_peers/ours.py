"""vlm_sft's own commands, `vlm_sft.stage2` or `vlm_sft.stage1`, on the job's rows.

The run is the one a user starts; what is measured comes from its `metrics.jsonl` and, for CPU time,
from reading the process's clock whenever a row is written there.
"""

import json
import os
from pathlib import Path
from typing import Any

import yaml
from measure import Job, Meter

from vlm_sft import stage1, stage2
from vlm_sft.train.metrics import MetricsFile


def main() -> None:
    """Train the job's steps and write what they cost."""
    job = Job.from_command_line()
    meter = Meter(job.device)
    _read_clock_with_rows(meter)
    config = Path(job.work, "config.yaml")
    config.write_text(yaml.safe_dump(_config(job), sort_keys=False))
    code = (stage1 if job.mode == "stage1" else stage2).main([str(config)])
    assert code == 0
    if os.environ.get("RANK", "0") == "0":
        meter.write(job)


def _read_clock_with_rows(meter: Meter) -> None:
    open_file, write = MetricsFile.__init__, MetricsFile.write

    def opened(self: MetricsFile, path: Path, *, last_step: int) -> None:
        open_file(self, path, last_step=last_step)
        if path.name == "metrics.jsonl":
            meter.start()

    def written(self: MetricsFile, row: Any) -> None:
        write(self, row)
        if self.path.name == "metrics.jsonl" and "loss" in row:
            meter.step(row["loss"], targets=row["num_targets"])

    MetricsFile.__init__, MetricsFile.write = opened, written  # type: ignore[method-assign]


def _config(job: Job) -> dict[str, Any]:
    rates = {"projector": job.learning_rate, "language_model": job.learning_rate}
    if job.mode == "stage1":
        del rates["language_model"]
    config: dict[str, Any] = {
        "output_dir": str(Path(job.work, "run")),
        "seed": json.loads(Path(job.model, "seed.json").read_text()),
        "model": json.loads(Path(job.model, "model_section.json").read_text()),
        "data": {
            "train": [{"path": job.rows, "image_root": job.images}],
            "template": job.options.get("template", "vicuna_v1"),
            "max_length": job.max_length,
            "image_aspect": "crop",
            "num_workers": int(job.options.get("workers", 0)),
        },
        "optim": {
            "learning_rate": rates,
            "weight_decay": 0.0,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "max_grad_norm": None,
        },
        "train": {
            "max_steps": job.steps,
            "global_batch_size": job.batch_size,
            "micro_batch_size": job.micro_batch_size,
            "precision": "bf16" if job.device == "cuda" else "fp32",
            "save_every_steps": 10**9,
            "eval_samples": 0,
            "trackers": [],
        },
    }
    if job.mode in ("lora", "qlora"):
        config["lora"] = {
            "r": job.options["lora_r"],
            "alpha": job.options["lora_alpha"],
            "dropout": 0.0,
        }
    return _merged(config, job.options.get("config", {}))


def _merged(tree: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`tree` with the values of `more` in their places."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merged(tree[key], value)
        else:
            tree[key] = value
    return tree


if __name__ == "__main__":
    main()
