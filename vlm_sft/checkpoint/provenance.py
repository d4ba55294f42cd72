"""Record and compare the software and environment variables that a checkpoint was written with."""

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from vlm_sft.utils.libraries import installed_version

PACKAGE: Final = Path(__file__).resolve().parent.parent
LIBRARIES: Final = ("vlm-sft", "torch", "transformers", "accelerate", "peft", "safetensors")
LIBRARIES_IF_IMPORTED: Final = ("bitsandbytes",)

_RECORDED_PREFIXES: Final = (
    "ACCELERATE_",
    "ATEN_",
    "AOTI",
    "BNB_",
    "CUBLAS",
    "CUDA_",
    "CUDNN_",
    "FLASH_ATTENTION_",
    "FSDP_",
    "GOMP_",
    "HF_DEACTIVATE_ASYNC_LOAD",
    "HIP_VISIBLE_DEVICES",
    "KMP_",
    "MKL_",
    "NCCL_",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_",
    "ONEDNN_",
    "OPENBLAS_",
    "PARALLELISM_CONFIG_",
    "PYTORCH_",
    "ROCR_VISIBLE_DEVICES",
    "TIMM_",
    "TORCH",
    "TRANSFORMERS_",
    "USE_HUB_KERNELS",
    "VLM_SFT_",
    "XLA_",
)
_NOT_RECORDED: Final = ("TORCHELASTIC_", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR", "TORCH_NCCL_")
"""Set by the launcher, or paths only: they differ between runs that compute the same."""

_SECRET: Final = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")


def software() -> dict[str, str]:
    """Return the versions of the libraries a run computes with, and a sha256 of this package.

    The sha256 (key `code`) is over all source files, so that an edited checkout is noticed too.
    """
    sources = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        sources.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    used = [*LIBRARIES, *(name for name in LIBRARIES_IF_IMPORTED if name in sys.modules)]
    return {**{name: installed_version(name) for name in used}, "code": sources.hexdigest()}


def software_difference(then: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Describe how the software of a checkpoint differs from today's; None if it does not."""
    changed = [
        f"{name} {then.get(name, 'unknown')[:12]}, now {now[name][:12]}"
        for name in now
        if then.get(name) != now[name]
    ]
    return "; ".join(changed) or None


def recorded_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that numerical libraries read, without any that may hold a secret."""
    return {
        name: environment[name]
        for name in sorted(environment)
        if name.startswith(_RECORDED_PREFIXES)
        and not name.startswith(_NOT_RECORDED)
        and not any(word in name for word in _SECRET)
    }


def environment_difference(then: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Describe how two recorded environments differ; None if they do not."""
    changed = [
        f"{name} {then.get(name, 'unset')}, now {now.get(name, 'unset')}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]
    return "; ".join(changed) or None
