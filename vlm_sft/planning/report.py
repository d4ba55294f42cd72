"""The plan in words: the data, memory by part, ways to train, and what each figure rests on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.markup import escape
from rich.table import Table

from vlm_sft.config.method import Method
from vlm_sft.model.activation_checkpointing import Policy
from vlm_sft.planning.calibrate import Calibration
from vlm_sft.planning.estimate import Memory, Speed
from vlm_sft.planning.gpus import ASSUMED_EFFICIENCY, GIB, MATMUL_SHARE, Device
from vlm_sft.planning.micro_batch import MicroBatch
from vlm_sft.planning.workload import Survey, Workload
from vlm_sft.utils.console import Console
from vlm_sft.utils.progress import format_seconds

NAMES: Final[dict[Method, str]] = {
    "stage1": "stage 1 (projector)",
    "lora": "stage 2, LoRA",
    "qlora": "stage 2, QLoRA",
    "full": "stage 2, full",
}

_WAY_COLUMNS: Final = (
    "way of training",
    "checkpointing",
    "size",
    "fits",
    "largest",
    "TFLOP a sample",
    "samples/s",
    "of peak",
    "time",
    "held up by",
)
_OF_WORDS: Final = ("way of training", "checkpointing", "fits", "held up by")

_PARTS: Final = {
    "vision_tower": "weights: tower",
    "projector": "weights: projector",
    "language_model": "weights: language model",
    "adapter": "weights: adapters",
}

_BYTES: Final = {
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "cast_weights": "trained weights in 16 bits",
    "activations": "activations of the layers",
    "loss": "logits and loss",
    "images": "images and projector",
    "passing": "passing tensors",
    "exchange": "exchange between processes",
    "overhead": "driver and idle (assumed)",
}


@dataclass(frozen=True)
class Way:
    """One way to train, planned.

    Attributes:
        method: What learns.
        policy: What is recomputed.
        configured: Whether the configuration asks for it.
        memory: Of one process at the run's largest micro-batch.
        fits: Whether the device has room for it.
        largest_micro_batch: Padded records of the longest length that fit, at most 1,024; 0: none;
            None: not asked, or records are packed.
        largest_pack: Where they are: `max_tokens` that fit, likewise at most 262,144.
        speed: In time.
    """

    method: Method
    policy: Policy
    configured: bool
    memory: Memory
    fits: bool
    speed: Speed
    largest_micro_batch: int | None = None
    largest_pack: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values; bytes as whole numbers."""
        memory = asdict(self.memory)
        weights = {key: round(value) for key, value in memory.pop("weights").items()}
        memory = {"weights": weights, **{key: round(value) for key, value in memory.items()}}
        told = {**memory, "allocated": round(self.memory.allocated)}
        return {**asdict(self), "memory": {**told, "total": round(self.memory.total)}}


@dataclass(frozen=True)
class PlanReport:
    """All that `python -m vlm_sft.plan` found.

    Attributes:
        config: Path of the configuration.
        device: What the run is planned for.
        gpus: How many of it.
        efficiency: Share of its FLOP/s that a step reaches.
        survey: The data.
        work: The run's micro-batches.
        images_per_cpu_second: Measured here; None: no image could be opened.
        policies: The configured method under every policy.
        ways: Every method under its best policy.
        unplanned: Sentences on what the configuration asks for and the plan does not know.
        calibration: A few real steps, if they were asked for.
    """

    config: str
    device: Device
    gpus: int
    efficiency: float
    survey: Survey
    work: Workload
    images_per_cpu_second: float | None
    policies: Sequence[Way]
    ways: Sequence[Way]
    unplanned: Sequence[str] = ()
    calibration: Calibration | None = None

    def as_json(self) -> dict[str, Any]:
        """The whole plan as one object of plain values."""
        found = self.survey
        return {
            "config": self.config,
            "device": {**asdict(self.device), "gpus": self.gpus, "efficiency": self.efficiency},
            "data": {
                "files": [_file_json(file) for file in found.files],
                "every_record_read": found.is_whole,
                "relative_error_of_mean_length": found.error_of_mean(),
                "records_per_epoch": found.records_per_epoch,
                "mean_tokens": found.mean("lengths"),
                "mean_targets": found.mean("targets"),
                "mean_images": found.mean("images"),
                "longest": found.longest(),
                "images_per_cpu_second": self.images_per_cpu_second,
            },
            "run": {
                "steps": self.work.steps,
                "records": self.work.records,
                "micro_batches_a_step": self.work.micro_batches_a_step,
                "largest_micro_batch": asdict(self.work.largest),
                "padding": None if self.work.packing else self.padding,
                "packing": asdict(self.work.packing) if self.work.packing else None,
            },
            "memory_by_policy": [way.as_json() for way in self.policies],
            "ways": [way.as_json() for way in self.ways],
            "calibration": None if self.calibration is None else self.calibration.as_json(),
            "notes": self.notes(),
        }

    @property
    def padding(self) -> float:
        """Positions of all micro-batches / tokens of their records."""
        tokens = self.work.total("records") * self.work.mean_length
        return self.work.total("tokens") / tokens

    def print(self, console: Console) -> None:
        """The plan as tables and lines."""
        for line in (self._data_line(), self._run_line(), *self._left_out()):
            console.print(escape(line), soft_wrap=True)
        console.print(self._memory_table())
        console.print(self._ways_table())
        if self.calibration is not None:
            console.print(self.calibration.table())
        for note in self.notes():
            console.print(escape(f"- {note}"), soft_wrap=True)

    def notes(self) -> list[str]:
        """What each figure rests on: measured, a datasheet's, or assumed."""
        device = self.device
        rate = f"{device.flops / 1e12:,.4g} TFLOP/s of matrix products"
        basis = (
            "measured"
            if device.flops_source == "measured"
            else f"{MATMUL_SHARE:.0%} (assumed) of the datasheet's figure"
        )
        told = "assumed" if self.efficiency == ASSUMED_EFFICIENCY else "given"
        told = told if self.calibration is None else "measured"
        notes = [
            f"{device.name}: {device.memory / GIB:.1f} GiB, {rate} ({basis}), of which a step "
            f"reaches {self.efficiency:.0%} ({told}"
            + ("; --calibrate on the machine itself measures it)" if told == "assumed" else ")"),
            "bytes and FLOPs: counted on the model's own code with tensors that have no values; "
            "weights in 4 bits, exchange, driver and idle memory: formulas",
        ]
        notes += [f"{device.name}: {device.note}"] if device.note else []
        if self.images_per_cpu_second:
            rate = f"{self.images_per_cpu_second:,.0f} images a second on one core"
            notes.append(f"image loading: {rate}, measured on this machine with this data")
        else:
            notes.append("image loading: not counted (features are kept, or none could be opened)")
        if self.work.packing and self.work.packing.saved and not self.survey.is_whole:
            notes.append(
                "shared prefixes: found in a sample, where fewer records of one image meet than "
                "in the run, which therefore saves more; --sample 0 reads all records"
            )
        notes += self.unplanned
        if self.work.micro_batches_a_step == 1:
            notes.append(
                "a step is one micro-batch: its gradients come while its activations go, and the "
                "table has what they add to the peak"
            )
        return notes

    def _data_line(self) -> str:
        found = self.survey
        error = (
            "every record read"
            if found.is_whole
            else f"a sample; mean length within {found.error_of_mean():.1%} (95 %)"
        )
        return (
            f"data: {found.records_per_epoch:,.0f} records an epoch ({error}); mean "
            f"{found.mean('lengths'):,.0f} tokens, {found.mean('targets'):,.0f} supervised, "
            f"{found.mean('images'):.2f} images; longest {found.longest():,}"
        )

    def _run_line(self) -> str:
        largest = self.work.largest
        return (
            f"run: {self.work.steps:,} steps, {self.work.micro_batches_a_step} micro-batch(es) a "
            f"step and process; largest {_shape(largest)}; {self._filling()}; on {self.gpus} x "
            f"{self.device.name}"
        )

    def _filling(self) -> str:
        if self.work.packing is None:
            return f"padding takes {1 - 1 / self.padding:.1%} of all positions"
        return (
            f"packs {self.work.packing.filled:.0%} filled, shared prefixes save "
            f"{self.work.packing.saved:.1%} of all tokens"
        )

    def _left_out(self) -> list[str]:
        return [
            f"{file.path}: of {file.looked_at:,} records looked at, {count:,} would be left out or "
            f"stop the run ({reason}); see python -m vlm_sft.check"
            for file in self.survey.files
            for reason, count in sorted(file.left_out.items())
        ]

    def _memory_table(self) -> Table:
        size = _size_in(max(way.memory.total for way in self.policies))
        title = f"memory of one process in {size.unit}: {NAMES[self.policies[0].method]}"
        table = Table(title=title, title_justify="left")
        table.add_column("activation checkpointing")
        for way in self.policies:
            table.add_column(("> " if way.configured else "") + way.policy, justify="right")
        for part, name in _PARTS.items():
            if self.policies[0].memory.weights[part]:
                table.add_row(name, *(size(way.memory.weights[part]) for way in self.policies))
        for part, name in _BYTES.items():
            values = [getattr(way.memory, part) for way in self.policies]
            if any(values):
                table.add_row(name, *map(size, values))
        table.add_section()
        table.add_row("allocated", *(size(way.memory.allocated) for way in self.policies))
        verdicts = ["" if way.fits else " !" for way in self.policies]
        totals = [size(way.memory.total) for way in self.policies]
        table.add_row("total", *(t + v for t, v in zip(totals, verdicts, strict=True)))
        speeds = [f"{way.speed.samples_per_second:,.1f}" for way in self.policies]
        table.add_row("samples/s", *speeds)
        table.caption = "> taken; ! does not fit"
        return table

    def _ways_table(self) -> Table:
        table = Table(title="ways of training", title_justify="left")
        size = _size_in(max(way.memory.total for way in self.ways))
        for column in (size.unit if name == "size" else name for name in _WAY_COLUMNS):
            table.add_column(column, justify="left" if column in _OF_WORDS else "right")
        for way in self.ways:
            speed = way.speed
            table.add_row(
                ("> " if way.configured else "") + NAMES[way.method],
                way.policy,
                size(way.memory.total),
                "yes" if way.fits else "no",
                _largest(way),
                f"{speed.teraflop_per_sample:.4g}",
                f"{speed.samples_per_second:,.1f}",
                f"{speed.utilization:.0%}",
                format_seconds(speed.hours * 3600),
                speed.bottleneck,
            )
        what = "tokens of a pack" if self.work.packing else "records of the longest length"
        table.caption = f"largest: {what} that fit into one micro-batch"
        return table


def _file_json(file: Any) -> dict[str, Any]:
    counts = {"path": file.path, "records": file.records, "looked_at": file.looked_at}
    return {**counts, "would_train_on": len(file.lengths), "left_out": dict(file.left_out)}


def _largest(way: Way) -> str:
    found = way.largest_micro_batch or way.largest_pack
    return f"{found:,}" if found else "none"


def _shape(batch: MicroBatch) -> str:
    return f"{batch.rows} x {batch.length:,} tokens with {batch.images} image(s)"


@dataclass(frozen=True)
class _Size:
    """Bytes in one unit."""

    unit: str
    factor: int

    def __call__(self, size: float) -> str:
        value = size / self.factor
        return f"{value:,.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def _size_in(largest: float) -> _Size:
    """The unit for bytes of which the largest are so many."""
    return _Size("GiB", GIB) if largest >= GIB / 2 else _Size("MiB", 2**20)
