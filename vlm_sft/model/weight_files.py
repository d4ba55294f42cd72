"""Read tensors by name from weight files of other programs; no code in them is run."""

import pickle
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from torch import Tensor

from vlm_sft.errors import UserError
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.reading import require_regular

STORED_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Dtypes of weights by their name in a configuration."""

_FLOATS: Final = (*STORED_DTYPES.values(), torch.float64)


class WeightFiles:
    """The tensors of the files of a folder, by name; they are read when they are asked for.

    Args:
        paths: Safetensors files, and files of `torch.save`, of which only tensors are read.

    Raises:
        UserError: A file is missing or cannot be read, or contains more than tensors.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._path_of: dict[str, Path] = {}
        self._pickled: dict[Path, dict[str, Tensor]] = {}
        for path in paths:
            require_regular(path)
            if path.suffix == ".safetensors":
                with _readable(path), safe_open(path, "pt") as file:
                    names = list(file.keys())
            else:
                self._pickled[path] = _read_pickled(path)
                names = list(self._pickled[path])
            for name in names:
                if name in self._path_of:
                    raise UserError(
                        f"{path}: contains {name}, as {self._path_of[name].name} does; which of "
                        "the two belongs to the model is unknown, copy the folder again",
                        code="tensors_differ",
                    )
                self._path_of[name] = path

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._path_of)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors by name; those of safetensors files share memory with the file.

        Raises:
            UserError: A file cannot be read, or a tensor is quantized or complex.
        """
        by_path: dict[Path, list[str]] = {}
        for name in names:
            by_path.setdefault(self._path_of[name], []).append(name)
        found: dict[str, Tensor] = {}
        for path, wanted in by_path.items():
            if path in self._pickled:
                found |= {name: self._pickled[path][name] for name in wanted}
                continue
            with _readable(path), safe_open(path, "pt") as file:
                found |= {name: file.get_tensor(name) for name in wanted}
        for name, tensor in found.items():
            if tensor.dtype not in _FLOATS and not name.endswith("position_ids"):
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise UserError(
                    f"{self._path_of[name]}: {name} is {dtype}, expected one of "
                    f"{', '.join(STORED_DTYPES)}; quantized weights cannot be loaded, take the "
                    "model without quantization",
                    code="tensors_differ",
                )
        return found


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    with library_call("safetensors", str(path), "read this file", code="checkpoint_damaged"):
        yield


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """Read a file of `torch.save` that contains tensors by name and nothing else."""
    try:
        is_zip = zipfile.is_zipfile(path)  # files of torch before 1.6 cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: contains Python objects that are not tensors; such a file can run code and "
            "is never loaded, save its tensors as safetensors",
            code="custom_code",
        ) from None
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read as weights ({type(error).__name__}: {error}); copy it again "
            "from where the model is from",
            code="checkpoint_damaged",
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise UserError(
            f"{path}: does not contain tensors by name; save a state dict",
            code="checkpoint_damaged",
        )
    for name, tensor in state.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            kind = "has no values (device meta)" if tensor.is_meta else "is sparse"
            raise UserError(
                f"{path}: {name} {kind}, expected a dense tensor; save the state dict again",
                code="checkpoint_damaged",
            )
    return dict(state)
