"""Reload an exported folder with stock transformers, for comparison with the trained model."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm_sft.errors import UserError
from vlm_sft.utils.libraries import library_call

_PROGRAM: Final = Path(__file__).with_name("reload.py")


_RELATIVE_LIMIT: Final = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest allowed difference of logits, relative to the largest logit, by exported dtype.

Merging adapters and casting round; norms of small activations amplify that, on some CPU kernels to
2e-4 with tiny fp32 models. A tensor that is missing, renamed or swapped makes a difference as large
as the logits themselves.
"""


def logit_limit(dtype: torch.dtype, largest: float) -> float:
    """Return how much logits may differ after merging and casting, given the largest of them."""
    return _RELATIVE_LIMIT.get(dtype, 1e-4) * max(1.0, largest)


@dataclass(frozen=True)
class Reloaded:
    """Results of stock transformers for an exported folder.

    Attributes:
        model_class: Class that was loaded.
        logits: `[1, T, V]` float32.
        pixels: The test image as the exported image processor prepares it, `[3, H, W]`.
        missing_keys: Tensors of the class that are not in the folder.
        unexpected_keys: Tensors of the folder that are not in the class.
        token_counts: Image tokens that the exported processor gives each of `token_sizes`.
    """

    model_class: str
    logits: Tensor
    pixels: Tensor
    missing_keys: list[str]
    unexpected_keys: list[str]
    token_counts: list[int] = field(default_factory=list)


Reload = Callable[[Path, dict[str, Tensor]], Reloaded]
"""A function that loads a folder and computes on the inputs described in `reload.py`."""


def reload_in_new_process(
    folder: Path, inputs: dict[str, Tensor], *, python: str = sys.executable
) -> Reloaded:
    """Reload the folder with transformers alone, in a new process without any state of training.

    Args:
        folder: The exported folder.
        inputs: Inputs as described in `reload.py`.
        python: Interpreter with the version of transformers to use.

    Raises:
        UserError: The program failed; the message has its last line of output.
    """
    with tempfile.TemporaryDirectory(prefix="vlm_sft-export-") as scratch:
        inputs_file = Path(scratch, "inputs.safetensors")
        outputs_file = Path(scratch, "outputs.safetensors")
        save_file(inputs, inputs_file)
        finished = subprocess.run(
            [python, "-P", str(_PROGRAM), str(folder), str(inputs_file), str(outputs_file)],
            # On the CPU, and without a look at the hub: the folder must be complete.
            env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if finished.returncode != 0:
            lines = finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"]
            raise UserError(f"transformers cannot load the exported folder: {lines[-1]}")
        with safe_open(outputs_file, "pt") as file:
            metadata = file.metadata()
        return _reloaded(load_file(outputs_file), metadata)


def reload_here(folder: Path, inputs: dict[str, Tensor]) -> Reloaded:
    """Reload the folder in this process, which is faster but shares patches of this process.

    Raises:
        UserError: transformers cannot load the folder.
    """
    from vlm_sft.export.reload import reload

    with library_call("transformers", str(folder), "load the exported folder"):
        return _reloaded(*reload(str(folder), inputs))


def _reloaded(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Reloaded:
    return Reloaded(
        model_class=metadata["class"],
        logits=tensors["logits"],
        pixels=tensors["pixels"],
        missing_keys=json.loads(metadata["missing"]),
        unexpected_keys=json.loads(metadata["unexpected"]),
        token_counts=json.loads(metadata.get("token_counts", "[]")),
    )


def noise_image(size: int) -> Tensor:
    """Return a wide noise image, uint8 `[size, 3/2 size, 3]`."""
    generator = torch.Generator().manual_seed(0)
    shape = (size, size * 3 // 2, 3)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
