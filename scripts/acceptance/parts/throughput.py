"""Measure samples per second, MFU, peak memory against the planner, and transformers' Trainer."""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from acceptance.figures import Job, read_rows
from acceptance.models import (
    Records,
    captions,
    forget,
    long_record,
    make_model,
    mixture,
    run_config,
    size_of,
)
from acceptance.trainer import trainer_rate
from vlm_sft.config.schema import RunConfig
from vlm_sft.data.batch import Batch, Collator, PackedCollator, PaddedCollator
from vlm_sft.data.loader import load_steps, micro_batches_of_rank
from vlm_sft.model.activation_checkpointing import CheckpointPolicy, set_activation_checkpointing
from vlm_sft.model.costs import image_cost
from vlm_sft.model.parts import parameters_by_part
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.planning.calibrate import micro_batch_of
from vlm_sft.planning.devices import find_device
from vlm_sft.planning.estimate import Estimator, Method
from vlm_sft.train.compile import compile_layers
from vlm_sft.train.distributed import make_accelerator
from vlm_sft.train.optimizer import build_optimizer, gradient_norm
from vlm_sft.train.packing_check import prepare_packing
from vlm_sft.train.train_step import accumulate_gradient

WARM_UP, MEASURED = 1, 3
"""Steps before the measurement, and steps whose median is taken; with tiny shapes one."""

MFU_MODE = {"stage1": "stage1", "lora": "lora", "qlora": "lora", "full": "full"}


class Bench:
    """A model and its optimizer, trained for a few steps on batches in memory."""

    def __init__(self, job: Job, method: Method, policy: CheckpointPolicy, **train: Any) -> None:
        self.job, self.method, self.policy = job, method, policy
        self.size = size_of(job.tiny)
        self.pack = 2048 if job.tiny else 16_384
        self.config: RunConfig = run_config(self.size, method, pack=self.pack, **train)
        self.device = torch.device(job.device)
        forget(self.device)
        self.accelerator = make_accelerator("bf16")
        self.model: VisionLanguageModel = make_model(self.config, method, self.device)
        set_activation_checkpointing(self.model, policy)
        assert self.config.train.packing is not None
        self.backend = prepare_packing(
            self.model,
            self.config.train.packing,
            "bf16",
            self.device,
            self.accelerator.autocast(),
            prune=not self.config.train.compile,
        )
        if self.config.train.compile:
            compile_layers(self.model, self.device, packed=True)
        self.wrapped = self.accelerator.prepare(self.model)
        self.optimizer = build_optimizer(parameters_by_part(self.model), self.config.optim)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]

    def packed(self, *, shared: bool = False) -> PackedCollator:
        """Return the collator that fills rows."""
        return PackedCollator(self.pack, shared, 1, image_cost(self.model), 0)

    def rate(self, records: Records, collator: Collator, batch_size: int) -> float:
        """Return samples per second: the median of a few steps, loading not counted."""
        steps = len(records) // batch_size
        seconds = []
        warm_up, measured = (0, 1) if self.job.tiny else (WARM_UP, MEASURED)
        for step in range(warm_up + measured):
            first = step % steps * batch_size
            batches = self.load(records, collator, range(first, first + batch_size))
            self._wait()
            start = time.perf_counter()
            self.step(batches)
            self._wait()
            seconds.append(time.perf_counter() - start)
        return batch_size / statistics.median(seconds[warm_up:])

    def load(self, records: Records, collator: Collator, indices: Sequence[int]) -> list[Batch]:
        """Return the micro-batches of a step."""
        chunks = micro_batches_of_rank(collator, records, indices, world_size=1, rank=0)
        return next(load_steps(records, [chunks], collator=collator, num_workers=0))

    def step(self, batches: list[Batch]) -> None:
        """Do one optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)
        accumulate_gradient(self.wrapped, batches, self.accelerator)
        gradient_norm(self.trained, self.config.optim.max_grad_norm)
        self.optimizer.step()

    def memory(self, batches: list[Batch]) -> tuple[float, float]:
        """Return the measured and the predicted peak of a step, in bytes.

        The optimizer has its state when this is called; on a CPU nothing is measured.
        """
        planner = Estimator(self.config, find_device(None, torch.bfloat16), gpus=1, efficiency=0.5)
        largest = max((micro_batch_of(batch) for batch in batches), key=lambda b: b.tokens)
        predicted = planner.memory(
            self.method, self.policy, largest, micro_batches=len(batches)
        ).allocated
        if self.device.type != "cuda":
            self.step(batches)
            return float("nan"), predicted
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        self.step(batches)
        return float(torch.cuda.max_memory_allocated()), predicted

    def mfu(self, records: Records, rate: float) -> float:
        """Return the share of the measured bf16 rate that model FLOPs reach, in percent."""
        peak = self.job.known.get("gemm", 1.0) * 1e12
        return 100 * rate * records.mean_flops(self.size, MFU_MODE[self.method]) / peak

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main(job: Job) -> None:
    """Measure every training method, the most important figures first."""
    with job.figures("lora_padded", "lora_packed", "lora_mfu", "lora_sharing", "planner_lora"):
        lora(job)
    with job.figures("stage1_padded", "stage1_packed", "stage1_mfu", "planner_stage1"):
        stage1(job)
    with job.figures("full_packed", "full_mfu", "planner_full"):
        full(job)
    with job.figures("lora_2048"):
        one_long_record(job, "lora")
    with job.figures("qlora_2048", "planner_qlora", "qlora_packed"):
        one_long_record(job, "qlora")
    for method in ("lora", "stage1", "full"):
        keys = (f"{method}_trainer", f"{method}_against_trainer")
        if job.tiny and method != "lora":
            for key in keys:
                job.missing(key, "with tiny shapes only LoRA is compared")
            continue
        with job.figures(*keys):
            against_trainer(job, method)
    with job.figures("lora_compiled"):
        compiled(job)


def lora(job: Job) -> None:
    """Measure LoRA padded, packed and with shared prefixes."""
    bench, batch = Bench(job, "lora", "none"), 2 if job.tiny else 32
    records = mixture(2 * batch, bench.size)
    packed = bench.rate(records, bench.packed(), batch)
    job.record("lora_packed", packed, f"{bench.backend}, batch {batch}, no recomputation")
    job.record("lora_mfu", bench.mfu(records, packed))
    together = sorted(range(len(records)), key=lambda index: records.prefix_ids[index])
    ordered = Records(
        [records.examples[i] for i in together],
        [records.prefix_ids[i] for i in together],
        [records.samples[i] for i in together],
    )
    plain = bench.rate(ordered, bench.packed(), batch)
    shared = bench.rate(ordered, bench.packed(shared=True), batch)
    job.record("lora_sharing", shared / plain, f"{shared:.1f} against {plain:.1f} samples/s")
    _against_planner(job, bench, records, batch)
    job.record("lora_padded", bench.rate(records, PaddedCollator(batch // 2, 0), batch))


def stage1(job: Job) -> None:
    """Measure stage 1 padded and packed."""
    bench, batch = Bench(job, "stage1", "none"), 2 if job.tiny else 64
    records = captions(2 * batch, bench.size)
    packed = bench.rate(records, bench.packed(), batch)
    job.record("stage1_packed", packed, f"{bench.backend}, batch {batch}")
    job.record("stage1_mfu", bench.mfu(records, packed))
    _against_planner(job, bench, records, batch)
    job.record("stage1_padded", bench.rate(records, PaddedCollator(batch // 2, 0), batch))


def full(job: Job) -> None:
    """Measure full fine-tuning with the least recomputation that fits."""
    policies: tuple[CheckpointPolicy, ...] = ("selective", "full")
    for policy in policies:
        try:
            bench, batch = Bench(job, "full", policy), 2 if job.tiny else 32
            records = mixture(2 * batch, bench.size)
            rate = bench.rate(records, bench.packed(), batch)
            break
        except Exception as error:
            if policy == policies[-1] or "memory" not in str(error).lower():
                raise
            bench = None  # type: ignore[assignment]
            forget(torch.device(job.device))
    job.record("full_packed", rate, f"{bench.backend}, batch {batch}, recomputing: {policy}")
    job.record("full_mfu", bench.mfu(records, rate))
    _against_planner(job, bench, records, batch)


def one_long_record(job: Job, method: Method) -> None:
    """Measure the peak memory of one record of 2,048 tokens, everything recomputed."""
    bench = Bench(job, method, "full")
    records = long_record(bench.size)
    collator = PaddedCollator(1, 0)
    batches = bench.load(records, collator, [0])
    bench.step(batches)
    measured, predicted = bench.memory(batches)
    if measured == measured:
        job.record(f"{method}_2048", measured / 1e9, f"planner: {predicted / 1e9:.1f} GB")
    else:
        job.missing(f"{method}_2048", "memory is measured on a GPU only")
    if method == "qlora":
        _record_error(job, "planner_qlora", measured, predicted)
        batch = 2 if job.tiny else 16
        rate = bench.rate(mixture(2 * batch, bench.size), bench.packed(), batch)
        job.record("qlora_packed", rate, f"batch {batch}, everything recomputed")


def compiled(job: Job) -> None:
    """Measure LoRA with compiled layers; the steps that compile are not counted."""
    if job.tiny:
        job.missing("lora_compiled", "compiling takes half a minute of a CPU; not done when tiny")
        return
    bench, batch = Bench(job, "lora", "none", compile=True), 2 if job.tiny else 32
    records = mixture(2 * batch, bench.size)
    start = time.perf_counter()
    bench.step(bench.load(records, bench.packed(), range(batch)))
    spent = time.perf_counter() - start
    rate = bench.rate(records, bench.packed(), batch)
    job.record("lora_compiled", rate, f"{spent:.0f} s to compile")


def against_trainer(job: Job, method: Method) -> None:
    """Measure transformers' Trainer on the same rows with the same flags."""
    size = size_of(job.tiny)
    batch = 2 if job.tiny else {"stage1": 64, "lora": 32, "full": 32}[method]
    records = captions(2 * batch, size) if method == "stage1" else mixture(2 * batch, size)
    micro = batch // 2 if method != "full" else max(1, batch // 8)
    recompute = method == "full"
    config = run_config(size, method, pack=None)
    forget(torch.device(job.device))
    steps = WARM_UP + (1 if job.tiny else MEASURED - 1)
    rate = trainer_rate(config, method, records, job.device, batch, micro, steps, recompute)
    job.record(f"{method}_trainer", rate, f"micro-batch {micro}, recomputation: {recompute}")
    ours = {r["key"]: r["value"] for r in read_rows(Path(job.results)) if r.get("value")}
    own = ours.get(f"{method}_packed", job.known.get(f"{method}_packed"))
    if own is None:
        job.missing(f"{method}_against_trainer", f"{method}_packed was not measured")
    else:
        job.record(f"{method}_against_trainer", own / rate)


def _against_planner(job: Job, bench: Bench, records: Records, batch: int) -> None:
    if job.tiny and bench.method != "lora":
        job.missing(f"planner_{bench.method}", "with tiny shapes only LoRA is planned")
        return
    batches = bench.load(records, bench.packed(), range(batch))
    measured, predicted = bench.memory(batches)
    _record_error(job, f"planner_{bench.method}", measured, predicted)


def _record_error(job: Job, key: str, measured: float, predicted: float) -> None:
    if measured != measured:
        job.missing(key, "memory is measured on a GPU only")
        return
    note = f"predicted {predicted / 1e9:.1f} GB, measured {measured / 1e9:.1f} GB"
    job.record(key, 100 * abs(predicted / measured - 1), note)


if __name__ == "__main__":
    main(Job.read(Path(sys.argv[1])))
