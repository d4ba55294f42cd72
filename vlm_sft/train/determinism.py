"""`train.deterministic`: only deterministic kernels, or an error that names the missing one."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vlm_sft.errors import ConfigError

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
}
"""Read by cuBLAS when CUDA starts, and by transformers for flash-attention's backward."""

NAMED = re.compile(r"(\S+) does not have a deterministic implementation")


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Context manager that allows deterministic operations only, if enabled.

    Must be entered before CUDA is first used. Source: the page "Reproducibility" of PyTorch.

    Raises:
        ConfigError: An operation has no deterministic kernel on its device; it is named.
    """
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        found = NAMED.search(str(error))
        if found is None:
            raise
        raise ConfigError(
            f"train.deterministic: {found[1]} has no deterministic kernel on this device; choose "
            "another model.language_model.attn_implementation, or set it to false"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        for name in missing:
            os.environ.pop(name, None)
