"""Fingerprints of weights: whole (nothing moved during a run) and sampled (is it that model?)."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Final

import torch
from torch import Tensor, nn

SAMPLES_PER_TENSOR: Final = 64


def tensors_digest(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 (hex) over names, dtypes, shapes and every byte; the order given does not matter.

    Of a packed weight its scales count too.
    """
    digest = hashlib.sha256()
    for whole_name, whole in sorted(named_tensors, key=lambda pair: pair[0]):
        for name, tensor in held_tensors(whole_name, whole):
            _add(digest, name, tensor, tensor)
    return digest.hexdigest()


def sample_digest(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 (hex) over names, shapes and 64 evenly spaced values a tensor, rounded to bfloat16.

    Cheap on models of any size and the same for every dtype that a run may hold the model in; it
    tells base models apart, it does not prove that every byte is equal.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors, key=lambda pair: pair[0]):
        flat = tensor.detach().reshape(-1)
        count = min(SAMPLES_PER_TENSOR, flat.numel())
        # Integer arithmetic: a float linspace would miss indices of tensors beyond 2**24.
        index = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
        _add(digest, name, tensor, flat[index].to(torch.bfloat16), with_dtype=False)
    return digest.hexdigest()


def held_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor and, where bitsandbytes has packed weights into it, what unpacks them again."""
    yield name, tensor
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        for key, value in state.as_dict(packed=True).items():
            yield f"{name}.{key}", value


def named_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers of a module by name, those that are not saved included."""
    return chain(module.named_parameters(), module.named_buffers())


def _add(
    digest: "hashlib._Hash", name: str, tensor: Tensor, values: Tensor, *, with_dtype: bool = True
) -> None:
    dtype = str(tensor.dtype) if with_dtype else ""
    digest.update(f"{name}|{dtype}|{tuple(tensor.shape)}|".encode())
    flat = values.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
