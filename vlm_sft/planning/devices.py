"""What is known of GPUs and of this machine's processor, and where each figure comes from."""

import os
import time

import torch

from vlm_sft.planning.gpus import GPUS, Device, require_known


def find_device(name: str | None, dtype: torch.dtype) -> Device:
    """The device of that name; None: the GPU of this machine or, where there is none, its CPU.

    Raises:
        UserError: The name is not known.
    """
    if name is None and torch.cuda.is_available():
        return _local_gpu()
    if name in (None, "cpu"):
        return _this_cpu(dtype)
    require_known(name)
    assert name is not None
    return GPUS[name]


def _local_gpu() -> Device:
    properties = torch.cuda.get_device_properties(0)
    known = _of_the_table(properties.name)
    rate = _matmul_rate(torch.device("cuda"), torch.bfloat16, side=8192)
    bandwidth, link = (known.bandwidth, known.link) if known else (1e12, 16e9)
    note = "" if known else "not in the table: its bandwidth is assumed to be 1 TB/s"
    return Device(
        properties.name, properties.total_memory, rate, bandwidth, link, "measured", note=note
    )


def _of_the_table(name: str) -> Device | None:
    """The table's device that a driver's name means; with several of a kind, the smaller."""
    plain = name.lower().replace(" ", "")
    found = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in plain]
    return min(found, key=lambda gpu: gpu.bandwidth) if found else None


def _this_cpu(dtype: torch.dtype) -> Device:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rate = _matmul_rate(torch.device("cpu"), dtype, side=512)
    note = "its matrix products were measured here; memory speed is assumed to be 10 GB/s"
    return Device("cpu", memory, rate, 10e9, 0, "measured", is_cpu=True, note=note)


def _matmul_rate(device: torch.device, dtype: torch.dtype, *, side: int) -> float:
    """FLOP/s of the fastest of a few square matrix products."""
    left = torch.randn(side, side, device=device).to(dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(2 * side**3 / min(seconds))
