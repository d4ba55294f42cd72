"""Memory, FLOP/s and bandwidth of known GPUs, with the source of each figure."""

from dataclasses import dataclass
from typing import Final, Literal

from vlm_sft.errors import UserError

GIB: Final = 2**30

CUDA_OVERHEAD: Final = int(0.8 * GIB)
"""Bytes per rank for the CUDA context, cuBLAS workspaces and NCCL buffers; assumed."""

FRAGMENTATION: Final = 0.03
"""Memory lost to fragmentation in the caching allocator, as a share of the allocated bytes;
assumed."""

MATMUL_SHARE: Final = 0.8
"""Share of the datasheet's dense FLOP/s that large matrix products reach. Measured on an H200 (790
of 989 TFLOP/s, bf16, 8192 x 8192 x 8192), assumed for every other GPU."""

ASSUMED_EFFICIENCY: Final = 0.5
"""Share of the matrix-product rate that a training step reaches; assumed. Well-tuned training loops
on Hopper reach an MFU of 33 to 43 % of the datasheet's figure, which is 41 to 54 % of this rate."""

GPUS_PER_MACHINE: Final = 8
NETWORK: Final = 50e9
"""Bytes/s of each GPU to other machines in one direction, with more than `GPUS_PER_MACHINE` GPUs: a
network card of 400 Gbit/s for each GPU; assumed."""

Source = Literal["datasheet", "measured"]


@dataclass(frozen=True)
class Device:
    """One accelerator, or the CPU of this machine.

    Attributes:
        name: The name that `--gpu` takes.
        memory: Bytes that one process can allocate.
        flops: FLOP/s of large dense 16-bit matrix products with 32-bit accumulation.
        bandwidth: Bytes/s of the device memory.
        link: Bytes/s to other GPUs in one direction; 0 if there is no link.
        flops_source: Whether `flops` was measured, or is `MATMUL_SHARE` of the datasheet's figure.
        is_cpu: Whether this is the CPU of this machine.
        note: A remark for the user; empty if there is none.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    flops_source: Source = "datasheet"
    is_cpu: bool = False
    note: str = ""


def _gpu(
    name: str, gib: float, tflops: float, gbytes: float, link: float, note: str = ""
) -> Device:
    """Build a device from its datasheet: GiB, dense TFLOP/s, GB/s, GB/s in one direction."""
    flops = MATMUL_SHARE * tflops * 1e12
    return Device(name, int(gib * GIB), flops, gbytes * 1e9, link * 1e9, note=note)


_NO_BF16: Final = "has no bf16; use train.precision: fp16, which its FLOP/s here are for"

# Memory is what the driver reports as usable, not the nominal size. TFLOP/s are the datasheet's
# dense (not sparse) tensor-core figures in bf16 or fp16 with fp32 accumulation: on GeForce cards
# (5090, 4090, 3090) half of the fp16-accumulation figure that is usually quoted. Links: NVLink
# where the card has it, otherwise PCIe x16.
GPUS: Final = {
    gpu.name: gpu
    for gpu in (
        _gpu("b200", 178, 2250, 8000, 900),
        Device("h200", 139 * GIB, 790e12, 4800e9, 450e9, "measured"),
        _gpu("h100-80", 79, 989, 3350, 450),
        _gpu("h100-pcie", 79, 756, 2000, 64),
        _gpu("a100-80", 79, 312, 2039, 300),
        _gpu("a100-40", 39.4, 312, 1555, 300),
        _gpu("l40s", 44.4, 362, 864, 32),
        _gpu("a6000", 47.5, 154.8, 768, 32),
        _gpu("5090", 31.3, 209.5, 1792, 64),
        _gpu("4090", 23.5, 165.2, 1008, 32),
        _gpu("3090", 23.6, 71, 936, 32),
        _gpu("l4", 22, 121, 300, 32),
        _gpu("t4", 14.6, 65, 300, 16, _NO_BF16),
    )
}


def require_known(name: str | None) -> None:
    """Check the value of `--gpu`; None and `cpu` mean this machine.

    Raises:
        UserError: If the name is not in `GPUS`; the message lists the known names.
    """
    if name not in (None, "cpu", *GPUS):
        raise UserError(f"--gpu {name}: not known; expected cpu or one of {', '.join(GPUS)}")
