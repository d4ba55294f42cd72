"""Images decoded a second, and how long training would wait for them."""

import io
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from acceptance.figures import Job
from vlm_sft.data.images import ImageSpec, read_pixels

SPEC = ImageSpec(336, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class _Images(Dataset[torch.Tensor]):
    """The same few JPEGs again and again, decoded each time."""

    def __init__(self, jpegs: list[bytes], count: int) -> None:
        self.jpegs, self.count = jpegs, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return read_pixels(self.jpegs[index % len(self.jpegs)], SPEC, "pad", "fast")


def main(job: Job) -> None:
    """Measure one core, all cores, and the share of a step that is spent waiting."""
    torch.set_num_threads(1)
    jpegs = [_jpeg(seed) for seed in range(2 if job.tiny else 16)]
    with job.figures("decoded_per_core"):
        count = 20 if job.tiny else 1000
        start = time.perf_counter()
        for index in range(count):
            read_pixels(jpegs[index % len(jpegs)], SPEC, "pad", "fast")
        job.record("decoded_per_core", count / (time.perf_counter() - start))
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    with job.figures("decoded"):
        count = 100 if job.tiny else 20_000
        loader = _loader(jpegs, count, 50 if job.tiny else 64, workers)
        next(batches := iter(loader))  # the workers have started
        start = time.perf_counter()
        done = sum(len(batch) for batch in batches)
        rate = done / (time.perf_counter() - start)
        job.record("decoded", rate, f"{workers} workers, {len(jpegs[0]) // 1000} KB a JPEG")
    for key, figure, images in (
        ("wait_stage1", "stage1_packed", 64),
        ("wait_lora", "lora_packed", 30),  # 94 % of the mixture's records have an image
    ):
        with job.figures(key):
            known = job.known.get(figure)
            if known is None:
                job.missing(key, f"{figure} was not measured")
                continue
            step = 32 / known if key == "wait_lora" else 64 / known
            job.record(key, _wait_share(jpegs, images, step, workers, job.tiny))


def _wait_share(jpegs: list[bytes], images: int, step: float, workers: int, tiny: bool) -> float:
    """Return the percentage of time spent waiting for batches while steps take `step` seconds."""
    steps = 3 if tiny else 8
    step = min(step, 0.1) if tiny else step
    batches = iter(_loader(jpegs, images * (steps + 1), images, workers))
    next(batches)
    waited, start = 0.0, time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
        time.sleep(step)
    return 100 * waited / (time.perf_counter() - start)


def _loader(jpegs: list[bytes], count: int, batch: int, workers: int) -> "DataLoader[torch.Tensor]":
    return DataLoader(
        _Images(jpegs, count), batch_size=batch, num_workers=workers, prefetch_factor=2
    )


def _jpeg(seed: int) -> bytes:
    """Return a JPEG of 640 x 480 with broad shapes and fine grain, about 100 KB."""
    noise = np.random.default_rng(seed)
    small = noise.integers(0, 255, (24, 32, 3), dtype=np.uint8)
    broad = np.asarray(Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC))
    grain = noise.normal(0, 12, (480, 640, 1))
    buffer = io.BytesIO()
    pixels = (broad + grain).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


if __name__ == "__main__":
    main(Job.read(Path(sys.argv[1])))
