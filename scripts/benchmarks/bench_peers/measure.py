"""What every peer measures alike; without vlm_sft, since peers have packages of their own."""

import json
import platform
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "ms-swift", "vlm-sft")


@dataclass(frozen=True)
class Job:
    """What one peer is to do once; read from the JSON file that is its only argument.

    Attributes:
        model: Folder of `bench_model.make_model`.
        rows: JSON lines in LLaVA's form, in the order to train in.
        images: Folder that the rows' images start from.
        result: JSON file to write.
        work: Empty folder for all other output.
        steps: Optimizer steps.
        batch_size: Records per step.
        micro_batch_size: Records per forward pass; gradients are accumulated over `batch_size`.
        learning_rate: Constant learning rate of all trainable parameters.
        mode: `full` (projector and language model), `lora`, `qlora` or `stage1` (projector).
        device: `cpu` or `cuda`; `cuda` uses bf16, with fp32 trainable parameters.
        options: Settings that distinguish this row from other rows of the peer.
    """

    model: str
    rows: str
    images: str
    result: str
    work: str
    steps: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float = 1e-4
    mode: str = "full"
    device: str = "cpu"
    max_length: int = 2048
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_command_line(cls) -> "Job":
        """Read the file that is named as the only argument."""
        return cls(**json.loads(Path(sys.argv[1]).read_text()))

    def records(self) -> list[dict[str, Any]]:
        """All rows."""
        return [json.loads(line) for line in Path(self.rows).read_text().splitlines()]

    def messages(self) -> list[tuple[list[dict[str, str]], list[str]]]:
        """Each row as `role` and `content`, without `<image>`, and its images' paths."""
        roles = {"human": "user", "gpt": "assistant"}
        return [
            (
                [
                    {
                        "role": roles[turn["from"]],
                        "content": turn["value"].removeprefix("<image>\n"),
                    }
                    for turn in row["conversations"]
                ],
                [str(Path(self.images, row["image"]))] if "image" in row else [],
            )
            for row in self.records()
        ]


@dataclass
class Meter:
    """Process CPU-seconds, wall seconds and losses at the end of every step."""

    device: str
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    peak_rss: int = 0

    def start(self) -> None:
        """Training begins: what came before is start-up."""
        self._mark()

    def step(self, loss: float, *, tokens: int | None = None, targets: int | None = None) -> None:
        """A step is done."""
        self._mark()
        self.losses.append(loss)
        if tokens is not None:
            self.tokens.append(tokens)
        if targets is not None:
            self.targets.append(targets)
        self.peak_rss = peak_resident()

    def write(self, job: Job) -> None:
        """Everything measured, with versions, as `job.result`."""
        found = {
            **{key: value for key, value in asdict(self).items() if key != "device"},
            "job": asdict(job),
            "cpu_total": time.process_time(),
            "peak_device_bytes": self._peak_device_bytes(),
            "versions": {"python": platform.python_version()} | _versions(),
        }
        Path(job.result).write_text(json.dumps(found))

    def _mark(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())

    def _peak_device_bytes(self) -> int | None:
        if self.device != "cuda":
            return None
        import torch

        return int(torch.cuda.max_memory_allocated())


def measure_trainer(trainer: Any, meter: Meter) -> None:
    """Have a transformers Trainer, or a subclass, tell the meter of its steps."""
    from transformers import TrainerCallback

    running = {"loss": 0.0, "tokens": 0, "targets": 0}
    train_micro_batch = trainer.training_step

    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        running["tokens"] += int(inputs["attention_mask"].sum())
        running["targets"] += int((inputs["labels"] != -100).sum())
        loss = train_micro_batch(model, inputs, *args, **kwargs)
        running["loss"] += float(loss)
        return loss

    class Steps(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            meter.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.step(running["loss"], tokens=running["tokens"], targets=running["targets"])
            running.update(loss=0.0, tokens=0, targets=0)

    trainer.training_step = training_step
    trainer.add_callback(Steps())


def peak_resident() -> int:
    """Most memory that this process has had resident, in bytes.

    Where there is /proc from there: `ru_maxrss` begins with what the parent had when it started us.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
