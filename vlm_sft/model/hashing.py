"""Digests of weights: over every byte (frozen weights must not change) or sampled (same model?)."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Final

import torch
from torch import Tensor, nn

from vlm_sft.utils.progress import track

SAMPLES_PER_TENSOR: Final = 64


def tensors_digest(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a sha256 (hex) over names, dtypes, shapes and every byte, in any order of the input.

    It includes the quantization scales of a quantized weight.
    """
    digest = hashlib.sha256()
    ordered = sorted(named_tensors, key=lambda pair: pair[0])
    for full_name, full in track(ordered, description="hashing frozen weights"):
        for name, tensor in stored_tensors(full_name, full):
            _add(digest, name, tensor, tensor)
    return digest.hexdigest()


def sample_digest(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a sha256 (hex) over names, shapes and 64 evenly spaced values of each tensor.

    The values are rounded to bfloat16, so that the digest does not depend on the dtype in which a
    run holds the model. It is cheap for models of any size and distinguishes base models, but does
    not prove that every byte is equal.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors, key=lambda pair: pair[0]):
        flat = tensor.detach().reshape(-1)
        count = min(SAMPLES_PER_TENSOR, flat.numel())
        # Integer arithmetic: a float32 linspace cannot represent all indices beyond 2**24.
        index = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
        _add(digest, name, tensor, flat[index].to(torch.bfloat16), with_dtype=False)
    return digest.hexdigest()


def stored_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor and, if bitsandbytes has quantized it, its quantization state."""
    yield name, tensor
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        for key, value in state.as_dict(packed=True).items():
            yield f"{name}.{key}", value


def named_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return all parameters and buffers of a module by name, including unsaved buffers."""
    return chain(module.named_parameters(), module.named_buffers())


def _add(
    digest: "hashlib._Hash", name: str, tensor: Tensor, values: Tensor, *, with_dtype: bool = True
) -> None:
    dtype = str(tensor.dtype) if with_dtype else ""
    digest.update(f"{name}|{dtype}|{tuple(tensor.shape)}|".encode())
    flat = values.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
