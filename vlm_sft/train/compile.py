"""`train.compile`: the language model's layers compiled, one after the other by the same code."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vlm_sft.errors import ConfigError
from vlm_sft.model.language_model import decoder_layers
from vlm_sft.model.vlm import VisionLanguageModel


def compile_layers(
    model: VisionLanguageModel,
    device: torch.device,
    *,
    backend: str = "inductor",
    packed: bool = False,
) -> None:
    """Have every layer of the language model compiled at its first use, in place.

    Layers are alike, so one compilation serves all; lengths are left open, so one serves every
    batch, and another a batch of one record. Parameters keep their names. Dropout draws what it
    draws without compiling. An operation that cannot be compiled is an error, and so is compiling
    over and over (see `compile_faults_told`).

    Args:
        model: Changed in place.
        device: Where it runs; decides which compiler is needed.
        backend: torch.compile's.
        packed: The attention of packed records is left out: its segments differ in every row.

    Raises:
        ConfigError: If the compiler is missing.
        UserError: If the model has no list of decoder layers.
    """
    require_compiler(device)
    options = {"fallback_random": True} if backend == "inductor" else None
    layer: Any
    for layer in decoder_layers(model.language_model):
        layer.compile(fullgraph=not packed, dynamic=True, backend=backend, options=options)


@contextmanager
def eager(enabled: bool) -> Iterator[None]:
    """While it holds, compiled layers run as if they were not; does nothing if not enabled.

    For evaluations and generated answers, whose many shapes would each be compiled.
    """
    if not enabled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def compile_faults_told(enabled: bool) -> Iterator[None]:
    """While it holds, what cannot be compiled is told in a sentence; nothing if not enabled.

    Raises:
        ConfigError: In place of the compiler's own error.
    """
    if not enabled:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

    try:
        yield
    except TorchDynamoException as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "no message")
        raise ConfigError(
            f"train.compile: a layer of the language model cannot be compiled "
            f"({type(error).__name__}: {first.strip()}); set it to false"
        ) from error


def require_compiler(device: torch.device) -> None:
    """Refuse `train.compile` without the compiler that the device needs.

    Raises:
        ConfigError: Naming what to install.
    """
    if device.type == "cpu":
        name = os.environ.get("CXX", "g++")
        if shutil.which(name) is None:
            raise ConfigError(
                f"train.compile: the C++ compiler {name!r} that a CPU needs for it is not "
                "installed; install it, name another in the environment variable CXX, or set "
                "train.compile to false"
            )
    elif importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "train.compile: triton, which a GPU needs for it, is not installed; run "
            "`pip install triton`, or set train.compile to false"
        )
