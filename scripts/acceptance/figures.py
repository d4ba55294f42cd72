"""The figures that an acceptance run measures, their targets, and the file that keeps them.

Imports nothing but the standard library, so that the driver starts at once on any machine.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

Comparison = Literal[">=", "<=", "=="]


@dataclass(frozen=True)
class Figure:
    """One figure of the report.

    Attributes:
        part: The part that measures it; see `PARTS`.
        key: Unique name in the JSON file.
        title: What is measured, for people.
        unit: Unit of the value; empty for counts and ratios.
        compare: How the value is compared with `target`; None for a figure that is only recorded.
        target: The value that passes.
    """

    part: str
    key: str
    title: str
    unit: str = ""
    compare: Comparison | None = None
    target: float | None = None

    def passes(self, value: float) -> bool | None:
        """Return whether `value` reaches the target; None for a figure without one."""
        if self.compare is None or self.target is None:
            return None
        return {
            ">=": value >= self.target,
            "<=": value <= self.target,
            "==": value == self.target,
        }[self.compare]


@dataclass(frozen=True)
class Part:
    """One part of the acceptance, run in a process of its own.

    Attributes:
        name: As `--only` takes it, and the module below `acceptance.parts`.
        title: Heading in the report.
        seconds: Time limit on a GPU.
    """

    name: str
    title: str
    seconds: int


PARTS: Final = (
    Part("environment", "Environment", 45),
    Part("correctness", "Correctness on the device", 105),
    Part("throughput", "Throughput and memory, CLIP ViT-L/14-336 and 7B", 210),
    Part("images", "Image pipeline", 50),
    Part("fp8", "fp8", 50),
)
"""In order of value; a run that is cut off has the first ones. 460 seconds in all."""

_CORRECTNESS: Final = (
    ("bf16_loss", "bf16 loss against float64 on the CPU, relative", "<=", 2e-2),
    ("fp16_gradient", "fp16 gradient with the scaler against fp32, relative", "<=", 2e-2),
    ("fp16_overflow", "fp16 overflow: update skipped and scale halved", "==", 1),
    (
        "sdpa_forward",
        "attention, sdpa: packed and shared rows against float64, forward",
        "<=",
        2e-2,
    ),
    ("sdpa_backward", "attention, sdpa: gradients", "<=", 2e-2),
    ("flex_forward", "attention, FlexAttention: forward", "<=", 2e-2),
    ("flex_backward", "attention, FlexAttention: gradients", "<=", 2e-2),
    ("varlen_forward", "attention, torch varlen: forward", "<=", 2e-2),
    ("varlen_backward", "attention, torch varlen: gradients", "<=", 2e-2),
    ("flash_attn_forward", "attention, flash-attn: forward", "<=", 2e-2),
    ("flash_attn_backward", "attention, flash-attn: gradients", "<=", 2e-2),
    ("packed_loss", "packed against padded, fp32: loss, relative", "<=", 1e-4),
    ("packed_gradient", "packed against padded, fp32: gradient, relative", "<=", 1e-3),
    ("shared_loss", "shared prefixes against padded, fp32: loss, relative", "<=", 1e-4),
    ("merged_logits", "LoRA merged against adapter, fp32: logits, relative", "<=", 1e-4),
    ("deterministic", "two deterministic runs give the same bits", "==", 1),
    ("resume", "a killed and resumed run ends in the same bits", "==", 1),
    ("frozen", "digests of frozen parts unchanged by training", "==", 1),
)

_THROUGHPUT: Final = (
    ("stage1_padded", "stage 1, padded", "samples/s", None, None),
    ("stage1_packed", "stage 1, packed", "samples/s", ">=", 24.0),
    ("stage1_mfu", "stage 1, packed: share of the measured bf16 rate (MFU)", "%", None, None),
    (
        "stage1_trainer",
        "stage 1, transformers Trainer, same rows and flags",
        "samples/s",
        None,
        None,
    ),
    ("stage1_against_trainer", "stage 1: times the Trainer's rate", "", ">=", 2.0),
    ("lora_padded", "LoRA, padded", "samples/s", None, None),
    ("lora_packed", "LoRA, packed", "samples/s", ">=", 17.0),
    ("lora_mfu", "LoRA, packed: MFU", "%", None, None),
    ("lora_sharing", "LoRA: shared prefixes on top of packing, times", "", ">=", 1.3),
    ("lora_compiled", "LoRA, packed, compiled", "samples/s", None, None),
    ("lora_trainer", "LoRA, transformers Trainer, same rows and flags", "samples/s", None, None),
    ("lora_against_trainer", "LoRA: times the Trainer's rate", "", ">=", 2.0),
    ("full_packed", "full fine-tuning, packed", "samples/s", ">=", 11.5),
    ("full_mfu", "full fine-tuning, packed: MFU", "%", None, None),
    ("full_trainer", "full fine-tuning, transformers Trainer", "samples/s", None, None),
    ("full_against_trainer", "full fine-tuning: times the Trainer's rate", "", ">=", 2.0),
    ("qlora_packed", "QLoRA, packed", "samples/s", None, None),
    ("lora_2048", "LoRA, one record of 2,048 tokens: peak memory", "GB", "<=", 24.0),
    ("qlora_2048", "QLoRA, one record of 2,048 tokens: peak memory", "GB", "<=", 12.0),
    ("planner_stage1", "planner's peak memory, stage 1: error", "%", "<=", 10.0),
    ("planner_lora", "planner's peak memory, LoRA: error", "%", "<=", 10.0),
    ("planner_full", "planner's peak memory, full fine-tuning: error", "%", "<=", 10.0),
    ("planner_qlora", "planner's peak memory, QLoRA: error", "%", "<=", 10.0),
)

FIGURES: Final = (
    Figure("environment", "start", "imports of torch, transformers and vlm_sft", "s"),
    Figure("environment", "gemm", "bf16 matrix product, 8192 x 8192 x 8192", "TFLOP/s"),
    Figure("environment", "copy", "copy on the device, bytes read and written", "GB/s"),
    *(
        Figure("correctness", key, title, "", compare, target)
        for key, title, compare, target in _CORRECTNESS
    ),
    *(
        Figure("throughput", key, title, unit, compare, target)
        for key, title, unit, compare, target in _THROUGHPUT
    ),
    Figure("images", "decoded", "JPEG 640 x 480 to 336 x 336, all cores", "images/s"),
    Figure("images", "decoded_per_core", "JPEG 640 x 480 to 336 x 336, one core", "images/s"),
    Figure("images", "wait_stage1", "data-loader wait share at stage 1's rate", "%", "<=", 5.0),
    Figure("images", "wait_lora", "data-loader wait share at LoRA's rate", "%", "<=", 5.0),
    Figure("fp8", "fp8_error", "fp8 against bf16 layers: output, relative", "", "<=", 0.1),
    Figure("fp8", "fp8_speedup", "fp8 against bf16, compiled 7B layers, forward and backward", "x"),
)
BY_KEY: Final = {figure.key: figure for figure in FIGURES}
assert len(BY_KEY) == len(FIGURES)


@dataclass(frozen=True)
class Job:
    """What a part is to do.

    Attributes:
        device: `cuda` or `cpu`.
        tiny: Take shapes that only show that the code works.
        seconds: Time limit of the part.
        results: JSON lines that the part appends to, one figure each.
        known: Figures of the parts before, by key.
    """

    device: str
    tiny: bool
    seconds: float
    results: str
    known: dict[str, float]

    def record(self, key: str, value: float, note: str = "") -> None:
        """Append a figure as soon as it is there, so that a cut run keeps it."""
        assert key in BY_KEY, key
        self._append({"key": key, "value": float(value), "note": note})

    def missing(self, key: str, reason: str) -> None:
        """Append why a figure could not be measured."""
        assert key in BY_KEY, key
        self._append({"key": key, "value": None, "note": reason})

    def fact(self, name: str, value: Any) -> None:
        """Append a fact about the machine or the run that is not a figure."""
        self._append({"fact": name, "value": value})

    @contextmanager
    def figures(self, *keys: str) -> Iterator[None]:
        """Note an error of the block as the reason of every key that it was to record."""
        try:
            yield
        except Exception as error:  # one broken measurement must not cost the others
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            done = {row.get("key") for row in read_rows(Path(self.results))}
            for key in keys:
                if key not in done:
                    self.missing(key, reason)

    def write(self, path: Path) -> None:
        """Write the job for the process of its part."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Job":
        """Read what `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def _append(self, row: dict[str, Any]) -> None:
        line = json.dumps({**row, "at": round(time.time(), 1)}, allow_nan=False, default=str)
        with open(self.results, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a results file; a last line that was cut off is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows
