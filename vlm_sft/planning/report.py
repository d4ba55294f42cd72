"""The plan as text and as JSON: the data, memory by part, training options, and assumptions."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.markup import escape
from rich.table import Table

from vlm_sft.config.method import Method
from vlm_sft.planning.calibrate import Calibration
from vlm_sft.planning.data_stats import DataStats, FileStats
from vlm_sft.planning.gpus import (
    ASSUMED_EFFICIENCY,
    GIB,
    GPUS_PER_MACHINE,
    MATMUL_SHARE,
    NETWORK,
    Device,
)
from vlm_sft.planning.planner import TrainingOption
from vlm_sft.planning.step_stats import StepStats
from vlm_sft.utils.console import Console
from vlm_sft.utils.progress import format_rate, format_seconds

METHOD_NAMES: Final[dict[Method, str]] = {
    "stage1": "stage 1 (projector)",
    "lora": "stage 2, LoRA",
    "qlora": "stage 2, QLoRA",
    "full": "stage 2, full fine-tuning",
}

_WEIGHT_ROWS: Final = {
    "vision_tower": "weights: vision tower",
    "projector": "weights: projector",
    "language_model": "weights: language model",
    "adapter": "weights: adapters",
}

_MEMORY_ROWS: Final = {
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "cast_weights": "16-bit copies of trainable weights",
    "activations": "activations of the decoder layers",
    "loss": "logits and loss",
    "images": "images and projector",
    "transient": "transient tensors",
    "communication": "communication buffers",
    "overhead": "CUDA context, fragmentation (assumed)",
}


@dataclass(frozen=True)
class PlanReport:
    """Everything that `python -m vlm_sft.plan` found.

    Attributes:
        config: Path of the configuration.
        device: The device that the run is planned for.
        gpus: Number of these devices.
        efficiency: Share of the device's FLOP/s that a step reaches.
        data: The training records.
        steps: The run's micro-batches.
        images_per_cpu_second: Measured on this machine; None if images are not loaded or none could
            be read.
        by_policy: The configured method under every activation checkpointing policy.
        by_method: Every method, sized.
        unsupported: Sentences about configured settings that the plan does not consider.
        calibration: Comparison with real steps, if it was requested.
    """

    config: str
    device: Device
    gpus: int
    efficiency: float
    data: DataStats
    steps: StepStats
    images_per_cpu_second: float | None
    by_policy: Sequence[TrainingOption]
    by_method: Sequence[TrainingOption]
    unsupported: Sequence[str] = ()
    calibration: Calibration | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the plan as one object of plain values."""
        data, steps = self.data, self.steps
        return {
            "config": self.config,
            "device": {**asdict(self.device), "gpus": self.gpus, "efficiency": self.efficiency},
            "data": {
                "files": [_file_json(file) for file in data.files],
                "every_record_tokenized": data.is_complete and not data.is_assumed,
                "assumed": data.is_assumed,
                "relative_error_of_mean_length": data.mean_length_error(),
                "records_per_epoch": data.records_per_epoch,
                "mean_tokens": data.mean("lengths"),
                "mean_targets": data.mean("targets"),
                "mean_images": data.mean("images"),
                "longest": data.longest(),
                "images_per_cpu_second": self.images_per_cpu_second,
            },
            "run": {
                "steps": steps.num_steps,
                "records": steps.num_records,
                "micro_batches_per_step": steps.micro_batches_per_step,
                "largest_micro_batch": asdict(steps.largest),
                "padding": None if steps.packing else self.padding,
                "packing": asdict(steps.packing) if steps.packing else None,
            },
            "by_policy": [option.as_json() for option in self.by_policy],
            "by_method": [option.as_json() for option in self.by_method],
            "calibration": None if self.calibration is None else self.calibration.as_json(),
            "notes": self.notes(),
        }

    @property
    def padding(self) -> float:
        """Tokens of all micro-batches including padding, divided by those of their records."""
        tokens = self.steps.total("records") * self.steps.mean_length
        return self.steps.total("tokens") / tokens

    def print(self, console: Console) -> None:
        """Print the plan as lines and tables."""
        for line in (self._data_line(), self._run_line(), *self._skipped_lines()):
            console.print(escape(line), soft_wrap=True)
        console.print(self._memory_table())
        console.print(self._options_table())
        if self.calibration is not None:
            console.print(self.calibration.table())
        for note in self.notes():
            console.print(escape(f"- {note}"), soft_wrap=True)

    def _data_line(self) -> str:
        data = self.data
        if data.is_assumed:
            basis = "assumed, all alike"
        elif data.is_complete:
            basis = "every record tokenized"
        else:
            basis = f"a sample; mean length within {data.mean_length_error():.1%} (95 %)"
        return (
            f"data: {data.records_per_epoch:,.0f} records per epoch ({basis}); mean "
            f"{data.mean('lengths'):,.0f} tokens, {data.mean('targets'):,.0f} supervised, "
            f"{data.mean('images'):.2f} images; longest {data.longest():,}"
        )

    def _run_line(self) -> str:
        steps, largest = self.steps, self.steps.largest
        if steps.packing is None:
            filling = f"{1 - 1 / self.padding:.1%} of all tokens are padding"
        else:
            filling = (
                f"packed rows are {steps.packing.filled:.0%} full, shared image prefixes save "
                f"{steps.packing.saved:.1%} of all tokens"
            )
        images = f"{largest.images} image(s)"
        if largest.crops != largest.images:
            images += f" in {largest.crops} crops"
        devices = f"{self.gpus} x {self.device.name}"
        if self.gpus > GPUS_PER_MACHINE and self.device.link:
            devices += (
                f" in machines of {GPUS_PER_MACHINE}, with {NETWORK / 1e9:.0f} GB/s between "
                "machines for each GPU (assumed)"
            )
        return (
            f"run: {steps.num_steps:,} steps, {steps.micro_batches_per_step} micro-batch(es) per "
            f"step and rank; largest {largest.rows} x {largest.length:,} tokens with "
            f"{images}; {filling}; on {devices}"
        )

    def _skipped_lines(self) -> list[str]:
        return [
            f"{file.path}: {count:,} of {file.num_tokenized:,} tokenized records would be skipped "
            f"or stop the run ({reason}); see python -m vlm_sft.check"
            for file in self.data.files
            for reason, count in sorted(file.skipped.items())
        ]

    def _memory_table(self) -> Table:
        options = self.by_policy
        size = _unit_for(max(option.memory.total for option in options))
        title = f"memory per rank in {size.unit}: {METHOD_NAMES[options[0].method]}"
        table = Table(title=title, title_justify="left")
        table.add_column("activation checkpointing")
        for option in options:
            table.add_column(_mark(option) + option.policy, justify="right")
        for part, name in _WEIGHT_ROWS.items():
            if options[0].memory.weights[part]:
                table.add_row(name, *(size(option.memory.weights[part]) for option in options))
        for part, name in _MEMORY_ROWS.items():
            values = [getattr(option.memory, part) for option in options]
            if any(values):
                table.add_row(name, *map(size, values))
        table.add_section()
        table.add_row("allocated", *(size(option.memory.allocated) for option in options))
        table.add_row("total", *(size(o.memory.total) + ("" if o.fits else " !") for o in options))
        table.add_row("samples/s", *(format_rate(o.speed.samples_per_second) for o in options))
        table.caption = "> selected; ! does not fit"
        return table

    def _options_table(self) -> Table:
        table = Table(title="training options", title_justify="left")
        size = _unit_for(max(option.memory.total for option in self.by_method))
        table.add_column("method")
        table.add_column("checkpointing")
        table.add_column(size.unit, justify="right")
        table.add_column("fits")
        for column in ("largest", "TFLOP/sample", "samples/s", "MFU", "time"):
            table.add_column(column, justify="right")
        table.add_column("bottleneck")
        for option in self.by_method:
            speed = option.speed
            largest = option.largest_micro_batch or option.largest_packed_row
            table.add_row(
                _mark(option) + METHOD_NAMES[option.method],
                option.policy,
                size(option.memory.total),
                "yes" if option.fits else "no",
                f"{largest:,}" if largest else "none",
                f"{speed.teraflop_per_sample:.4g}",
                format_rate(speed.samples_per_second),
                f"{speed.utilization:.0%}",
                format_seconds(speed.hours * 3600),
                speed.bottleneck,
            )
        what = "packed row in tokens" if self.steps.packing else "micro-batch of longest records"
        table.caption = f"largest: {what} that fits; MFU: share of the matrix-product rate"
        return table

    def notes(self) -> list[str]:
        """Return what the figures are based on: measurements, datasheets or assumptions."""
        device = self.device
        source = (
            "measured"
            if device.flops_source == "measured"
            else f"{MATMUL_SHARE:.0%} (assumed) of the datasheet's figure"
        )
        if self.calibration is not None:
            efficiency = "measured"
        elif self.efficiency == ASSUMED_EFFICIENCY:
            efficiency = "assumed; --calibrate on that machine measures it"
        else:
            efficiency = "given"
        notes = [
            f"{device.name}: {device.memory / GIB:.1f} GiB, {device.flops / 1e12:,.4g} TFLOP/s of "
            f"matrix products ({source}), of which a step reaches {self.efficiency:.0%} "
            f"({efficiency})",
            "memory and FLOPs: counted by running the model's own code on tensors without values; "
            "4-bit weights, communication buffers, CUDA context and fragmentation: formulas",
        ]
        if device.note:
            notes.append(f"{device.name}: {device.note}")
        if self.images_per_cpu_second:
            rate = f"{self.images_per_cpu_second:,.0f} images per second and core"
            notes.append(f"image loading: {rate}, measured on this machine with this data")
        else:
            reason = (
                "no records"
                if self.data.is_assumed
                else "features are cached, or no image could be"
            )
            notes.append(f"image loading: not considered ({reason} read)")
        packing = self.steps.packing
        if packing and packing.saved and not self.data.is_complete:
            notes.append(
                "shared image prefixes: found in a sample, in which fewer records share an image "
                "than in the run, which will therefore save more; --sample 0 tokenizes all records"
            )
        notes += self.unsupported
        if self.steps.micro_batches_per_step == 1:
            notes.append(
                "a step has one micro-batch, whose gradients are allocated while its activations "
                "are freed; the table shows what they add to the peak"
            )
        return notes


def _file_json(file: FileStats) -> dict[str, Any]:
    return {
        "path": file.path,
        "records": file.num_records,
        "tokenized": file.num_tokenized,
        "usable": len(file.lengths),
        "skipped": dict(file.skipped),
    }


def _mark(option: TrainingOption) -> str:
    return "> " if option.configured else ""


@dataclass(frozen=True)
class _Unit:
    """A unit of memory; calling it formats a number of bytes."""

    unit: str
    factor: int

    def __call__(self, size: float) -> str:
        value = size / self.factor
        return f"{value:,.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def _unit_for(largest: float) -> _Unit:
    """Return GiB or MiB, whichever suits a table whose largest entry is `largest` bytes."""
    return _Unit("GiB", GIB) if largest >= GIB / 2 else _Unit("MiB", 2**20)
