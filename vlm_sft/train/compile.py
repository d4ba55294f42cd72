"""`train.compile`: compile the decoder layers of the language model with torch.compile."""

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
    """Compile every decoder layer in place, at its first use.

    Layers are alike, so one compilation serves all of them. Shapes are dynamic, so one compilation
    serves all batches, and a second one batches of a single record. Parameters keep their names,
    and dropout draws the same bits as without compiling. A graph break is an error, and so is
    repeated recompilation (see `compile_errors`).

    Args:
        model: Changed in place.
        device: Device of the run, which decides the compiler that is needed.
        backend: As for `torch.compile`.
        packed: Allow graph breaks: the segments of packed attention differ in every row.

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
    """Context manager that runs compiled layers uncompiled, if enabled.

    For evaluation and generation, whose many shapes would each be compiled.
    """
    if not enabled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def compile_errors(enabled: bool) -> Iterator[None]:
    """Context manager that converts an error of the compiler into a `ConfigError`, if enabled.

    Raises:
        ConfigError: A layer cannot be compiled.
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
    """Check that the compiler that `train.compile` needs on a device is installed.

    Raises:
        ConfigError: It is not; the message says what to install.
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
