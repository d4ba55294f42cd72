"""What is known of GPUs by name, and where each figure comes from."""

from dataclasses import dataclass
from typing import Final, Literal

from vlm_sft.errors import UserError

GIB: Final = 2**30

CUDA_OVERHEAD: Final = int(0.8 * GIB)
"""Of a process for the driver's context, cuBLAS workspaces and NCCL; assumed."""

FRAGMENTATION: Final = 0.03
"""Share of the allocated bytes that lie idle between them; assumed."""

MATMUL_SHARE: Final = 0.8
"""Of a datasheet's FLOP/s that large matrix products reach: measured on an H200 (790 of 989
TFLOP/s, bf16, 8192 cubed), assumed for every other GPU."""

ASSUMED_EFFICIENCY: Final = 0.5
"""Share of the matrix products' rate that a training step reaches; assumed. Good loops on Hopper
reach 33 to 43 % of the datasheet's figure, which is 41 to 54 % of this one."""

Source = Literal["datasheet", "measured"]


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: As `--gpu` takes it.
        memory: Bytes that one process can use.
        flops: Of large dense 16-bit matrix products with 32-bit sums, FLOP/s.
        flops_source: Measured, or `MATMUL_SHARE` of the datasheet's figure.
        bandwidth: Of its memory, bytes/s.
        link: To its neighbors, bytes/s in one direction; 0 where there are none.
        is_cpu: This machine's processor.
        note: What a user must know about it.
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
    flops = MATMUL_SHARE * tflops * 1e12
    return Device(name, int(gib * GIB), flops, gbytes * 1e9, link * 1e9, note=note)


_NO_BF16: Final = "has no bf16; train.precision: fp16 is needed, and its FLOP/s are meant"

GPUS: Final = {
    gpu.name: gpu
    for gpu in (
        # usable GiB as drivers report them; dense TFLOP/s, GB/s, GB/s a direction: datasheets
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
    """Refuse a GPU that is not in the table; None and `cpu` mean this machine.

    Raises:
        UserError: Lists the known names.
    """
    if name not in (None, "cpu", *GPUS):
        raise UserError(f"--gpu {name}: not known; expected cpu or one of {', '.join(GPUS)}")
