"""The machine, its clocks, and the two rates that everything else is compared with."""

import subprocess
import sys
import time
from pathlib import Path

from acceptance.figures import Job


def main(job: Job) -> None:
    """Record imports, versions, clocks, the matrix product's rate and the copy's."""
    start = time.perf_counter()
    import torch
    import transformers  # noqa: F401

    import vlm_sft.commands.train  # noqa: F401

    job.record("start", time.perf_counter() - start)
    from bench_results import machine_facts

    for name, value in machine_facts().items():
        job.fact(name, value)
    job.fact("threads", torch.get_num_threads())
    device = torch.device(job.device)
    if device.type == "cuda":
        _clocks(job)
    with job.figures("gemm"):
        job.record("gemm", _matrix_rate(device, 256 if job.tiny else 8192) / 1e12)
    with job.figures("copy"):
        job.record("copy", _copy_rate(device, 2**20 if job.tiny else 2**32) / 1e9)
    if device.type == "cuda":
        _clocks(job, "clocks_after")


def _clocks(job: Job, name: str = "clocks_before") -> None:
    """Record clocks and temperature as nvidia-smi reports them; the card is left as it is."""
    query = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    job.fact(name, done.stdout.strip() or done.stderr.strip())


def _matrix_rate(device: "torch.device", side: int) -> float:  # noqa: F821
    """Return FLOP/s of a bf16 product of random matrices: median of 5 after 3 that warm up."""
    import torch

    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = _median_seconds(device, lambda: left @ right)
    return float(2 * side**3 / seconds)


def _copy_rate(device: "torch.device", size: int) -> float:  # noqa: F821
    """Return bytes read and written a second by a copy on the device."""
    import torch

    source = torch.randint(0, 255, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return float(2 * size / _median_seconds(device, lambda: target.copy_(source)))


def _median_seconds(device, action) -> float:  # type: ignore[no-untyped-def]
    import torch

    seconds = []
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[3:])[2]


if __name__ == "__main__":
    main(Job.read(Path(sys.argv[1])))
