"""A frozen tower's features on disk: a file an image, found by the image's bytes."""

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vlm_sft.errors import UserError
from vlm_sft.utils.atomic_files import write_bytes, write_json
from vlm_sft.utils.filesystem import require_writable
from vlm_sft.utils.ownership import CACHE, own_directory, require_directory, set_aside
from vlm_sft.utils.reading import read_bytes, read_json

STALE_SECONDS: Final = 3600.0
"""An unfinished file of that age was left by a process that was killed."""

_RECIPE: Final = "recipe.json"
_STORE_NAME: Final = re.compile(r"[0-9a-f]{16}")
_FILE_NAME: Final = re.compile(r"[0-9a-f]{64}\.safetensors")
_UNFINISHED_NAME: Final = re.compile(
    r"\.([0-9a-f]{64}\.safetensors|recipe\.json)\.[a-z0-9_]{8,12}\.tmp"
)


class FeatureStore:
    """Features `[tokens, width]` by sha256 of the image's bytes, under all that decides them.

    A file is complete or absent, so that any number of runs may fill a folder at once and be killed
    at any point. Each holds a sha256 of its features, which every reading compares.

    Args:
        folder: Of all stores; each recipe has a folder of its own in it.
        recipe: Everything besides the image's bytes that decides its features, as plain JSON.
        shape: `(tokens, width)`.
        dtype: Of the features.

    Attributes:
        folder: The recipe's own.
        entry_bytes: What one image takes on disk.
    """

    def __init__(
        self,
        folder: str | Path,
        recipe: Mapping[str, Any],
        *,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        described = {**recipe, "shape": list(shape), "dtype": str(dtype)}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        self._cache = Path(folder)
        self.folder = self._cache / digest[:16]
        self._recipe, self._shape, self._dtype = described, shape, dtype
        self.entry_bytes = len(_packed(torch.zeros(shape, dtype=dtype)))

    def require_place(self) -> None:
        """Check that `describe` and `write` would find a place of ours, without changing anything.

        Raises:
            UserError: As `describe`.
        """
        try:
            _require_cache(self._cache)
            require_writable(self.folder)
        except OSError as error:
            raise _unusable(self.folder, error) from None

    def describe(self) -> None:
        """Mark the cache directory and write `recipe.json`, which says what its features are of.

        Raises:
            UserError: The directory cannot be written, or holds files that are not of a cache.
        """
        try:
            own_directory(
                self._cache,
                CACHE,
                adopt=is_feature_cache(self._cache),
                setting="data.feature_cache",
            )
            write_json(self.folder / _RECIPE, self._recipe)
        except OSError as error:
            raise _unusable(self.folder, error) from None

    def path(self, digest: bytes) -> Path:
        """Where an image's features are or would be."""
        name = digest.hex()
        return self.folder / name[:2] / f"{name}.safetensors"

    def holds(self, digest: bytes) -> bool:
        """Whether an image's file is there and as long as it should be; its content is unread."""
        try:
            return self.path(digest).stat().st_size == self.entry_bytes
        except OSError:
            return False

    def write(self, digest: bytes, features: Tensor) -> None:
        """Keep an image's features.

        Raises:
            UserError: The disk is full or refuses.
        """
        try:
            write_bytes(self.path(digest), _packed(features.detach().cpu()))
        except OSError as error:
            raise _unusable(self.folder, error) from None

    def read(self, digest: bytes) -> Tensor:
        """An image's features.

        Raises:
            UserError: They are missing or damaged; a damaged file is renamed, so that the next
                start computes them again.
        """
        path = self.path(digest)
        try:
            features = _unpacked(read_bytes(path, limit=self.entry_bytes))
        except (OSError, UserError, ValueError, KeyError, SafetensorError) as error:
            fault = " ".join(str(error).split())
        else:
            if (tuple(features.shape), features.dtype) == (self._shape, self._dtype):
                return features
            fault = f"{tuple(features.shape)} of {features.dtype}"
        where = ""
        with suppress(OSError):
            where = f"; the file is now {set_aside(path)}"
        raise UserError(
            f"{path}: the features kept there are missing or damaged ({fault}){where}. Repeat the "
            "command, which computes them again and resumes from the newest checkpoint",
            code="features_damaged",
        )


def disk_use(folder: str | Path) -> int:
    """Return the bytes of all features under `folder`, without stale unfinished files.

    Only files that a store writes, in the folders that it creates, are counted.
    """
    total = 0
    for path in _own_files(Path(folder)):
        with suppress(OSError):  # gone meanwhile: another run works here
            if not _is_stale(path):
                total += path.stat().st_size
    return total


def remove_stale(folder: str | Path) -> None:
    """Delete the unfinished files that killed processes left under `folder`."""
    for path in _own_files(Path(folder)):
        with suppress(OSError):
            if _is_stale(path):
                path.unlink()


def _is_stale(path: Path) -> bool:
    unfinished = _UNFINISHED_NAME.fullmatch(path.name) is not None
    return unfinished and time.time() - path.stat().st_mtime > STALE_SECONDS


def require_feature_cache(folder: str | Path) -> None:
    """Check, before the tower is known, that a store would find a place, without changing anything.

    A directory that holds stores may be read only: this run's features can all be there.

    Raises:
        UserError: As `FeatureStore.describe`.
    """
    try:
        _require_cache(Path(folder))
        if not is_feature_cache(Path(folder)):
            require_writable(Path(folder))
    except OSError as error:
        raise _unusable(Path(folder), error) from None


def _require_cache(folder: Path) -> None:
    adopt = is_feature_cache(folder)
    require_directory(folder, CACHE, adopt=adopt, setting="data.feature_cache")


def is_feature_cache(folder: Path) -> bool:
    """Return whether a directory holds the folder of a store, by its name and its recipe."""
    return next(_stores(folder), None) is not None


def _stores(folder: Path) -> Iterator[Path]:
    """Yield the folders of the stores in a cache directory."""
    for path in sorted(folder.glob("*")):
        if not _STORE_NAME.fullmatch(path.name) or path.is_symlink():
            continue
        try:
            recipe = read_json(path / _RECIPE)
        except (OSError, UserError):
            continue
        if isinstance(recipe, dict) and {"shape", "dtype"} <= recipe.keys():
            yield path


def _own_files(folder: Path) -> Iterator[Path]:
    """Yield the files of all stores: features, recipes and unfinished ones of both."""
    for store in _stores(folder):
        for path in [*store.glob("*"), *store.glob("[0-9a-f][0-9a-f]/*")]:
            names = (_FILE_NAME.fullmatch, _UNFINISHED_NAME.fullmatch)
            ours = path.name == _RECIPE or any(match(path.name) for match in names)
            if ours and path.is_file() and not path.is_symlink():
                yield path


def _packed(features: Tensor) -> bytes:
    features = features.contiguous()
    return save({"features": features, "sha256": _checksum(features)})


def _unpacked(data: bytes) -> Tensor:
    tensors = load(data)
    features = tensors["features"]
    if not torch.equal(_checksum(features), tensors["sha256"]):
        raise ValueError("its checksum differs")
    return features


def _checksum(features: Tensor) -> Tensor:
    plain = features.reshape(-1).view(torch.uint8).numpy().data
    return torch.frombuffer(bytearray(hashlib.sha256(plain).digest()), dtype=torch.uint8)


def _unusable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"data.feature_cache: {folder} cannot be written ({error.strerror or error}); make room, "
        "give another folder, or leave data.feature_cache out",
        code="cache_unusable",
    )
