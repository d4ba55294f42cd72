"""Look up a device by name, or measure the one of this machine."""

import os
import time

import torch

from vlm_sft.planning.gpus import GPUS, Device, require_known


def find_device(name: str | None, dtype: torch.dtype) -> Device:
    """Return the device to plan for.

    Args:
        name: A name in `GPUS`; `cpu` for this machine's CPU; None for this machine's GPU, or its
            CPU if it has none.
        dtype: The compute dtype, in which a CPU is measured.

    Raises:
        UserError: If the name is not known.
    """
    if name is None and torch.cuda.is_available():
        return _local_gpu()
    if name in (None, "cpu"):
        return _local_cpu(dtype)
    require_known(name)
    assert name is not None
    return GPUS[name]


def _local_gpu() -> Device:
    properties = torch.cuda.get_device_properties(0)
    # The driver's name ("NVIDIA A100-SXM4-80GB") contains the family of the table's ("a100-80").
    # If several variants match, take the slowest memory.
    driver_name = properties.name.lower().replace(" ", "")
    variants = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in driver_name]
    known = min(variants, key=lambda gpu: gpu.bandwidth) if variants else None
    bandwidth, link = (known.bandwidth, known.link) if known else (1e12, 16e9)
    note = "" if known else "not in the table: its bandwidth is assumed to be 1 TB/s"
    flops = _measure_matmul_flops(torch.device("cuda"), torch.bfloat16, side=8192)
    return Device(
        properties.name, properties.total_memory, flops, bandwidth, link, "measured", note=note
    )


def _local_cpu(dtype: torch.dtype) -> Device:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    flops = _measure_matmul_flops(torch.device("cpu"), dtype, side=512)
    note = "its matrix products were measured now; memory bandwidth is assumed to be 10 GB/s"
    return Device("cpu", memory, flops, 10e9, 0, "measured", is_cpu=True, note=note)


def _measure_matmul_flops(device: torch.device, dtype: torch.dtype, *, side: int) -> float:
    """Return FLOP/s of the fastest of five square matrix products."""
    matrix = torch.randn(side, side, device=device).to(dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(2 * side**3 / min(seconds))
