"""Compare an exported folder, reloaded from disk, with the model that it was made from."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm_sft.errors import UserError
from vlm_sft.utils.libraries import library_call

_PROGRAM: Final = Path(__file__).with_name("reload.py")


@dataclass(frozen=True)
class Reloaded:
    """What stock transformers computes from an exported folder.

    Attributes:
        model_class: The class that it loaded.
        logits: `[1, T, V]` float32.
        pixels: The test image as the exported image processor prepares it, `[3, H, W]`.
        missing_keys: Tensors of the class that the folder lacks.
        unexpected_keys: Tensors of the folder that the class does not have.
    """

    model_class: str
    logits: Tensor
    pixels: Tensor
    missing_keys: list[str]
    unexpected_keys: list[str]


Reload = Callable[[Path, dict[str, Tensor]], Reloaded]
"""Loads a folder and computes on the inputs that `reload.py` describes."""


def reload_in_new_process(
    folder: Path, inputs: dict[str, Tensor], *, python: str = sys.executable
) -> Reloaded:
    """Reload with transformers alone, in a process that has nothing of the training's state.

    Args:
        folder: The exported folder.
        inputs: As `reload.py` describes them.
        python: The interpreter, whose transformers is used.

    Raises:
        UserError: The program failed; the sentence has its last line.
    """
    with tempfile.TemporaryDirectory(prefix="vlm_sft-export-") as scratch:
        given, made = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        save_file(inputs, given)
        finished = subprocess.run(
            [python, "-P", str(_PROGRAM), str(folder), str(given), str(made)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if finished.returncode != 0:
            lines = finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"]
            raise UserError(f"transformers cannot load the exported folder: {lines[-1]}")
        with safe_open(made, "pt") as file:
            metadata = file.metadata()
        return _reloaded(load_file(made), metadata)


def reload_here(folder: Path, inputs: dict[str, Tensor]) -> Reloaded:
    """Reload in this process: seconds faster, and blind to what this process has patched.

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
    )


def noise_image(size: int) -> Tensor:
    """Return a wide image of noise, `[size, 3/2 size, 3]` uint8."""
    generator = torch.Generator().manual_seed(0)
    shape = (size, size * 3 // 2, 3)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
