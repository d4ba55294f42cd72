"""Vision features on disk: one file per image, named by the digest of the image's bytes."""

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

from vlm_sft.data.image_layout import ImageLayout
from vlm_sft.errors import UserError
from vlm_sft.utils.atomic_files import write_bytes, write_json
from vlm_sft.utils.filesystem import require_writable
from vlm_sft.utils.ownership import CACHE, own_directory, require_directory, set_aside
from vlm_sft.utils.reading import read_bytes, read_json

STALE_SECONDS: Final = 3600.0
"""Age at which an unfinished file counts as left behind by a killed process."""

_SETTINGS_FILE: Final = "recipe.json"
_STORE_NAME: Final = re.compile(r"[0-9a-f]{16}")
_FILE_NAME: Final = re.compile(r"[0-9a-f]{64}\.safetensors")
_UNFINISHED_NAME: Final = re.compile(
    r"\.([0-9a-f]{64}\.safetensors|recipe\.json)\.[a-z0-9_]{8,12}\.tmp"
)


class FeatureStore:
    """Features `[crops, tokens, width]` of images by a key, for one tower and its settings.

    The key is a sha256 of the image's bytes and of how it is divided; see `feature_key`.

    A file is complete or absent, so any number of runs may fill a directory at once and be killed
    at any point. Every file has a sha256 of its features, which is compared on reading.

    Args:
        folder: Directory of all stores; each combination of settings has a directory in it.
        settings: Everything besides the image's bytes that the features depend on, as plain JSON.
        shape: `(tokens, width)` of a crop.
        dtype: Dtype of the features.

    Attributes:
        folder: Directory of this store.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        *,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        described = {**settings, "shape": list(shape), "dtype": str(dtype)}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        self._cache = Path(folder)
        self.folder = self._cache / digest[:16]
        self._settings, self._shape, self._dtype = described, shape, dtype
        self._entry_bytes: dict[int, int] = {}

    def require_place(self) -> None:
        """Check that `describe` and `write` can use the directory, without changing anything.

        Raises:
            UserError: See `describe`.
        """
        try:
            _require_cache(self._cache)
            require_writable(self.folder)
        except OSError as error:
            raise _unusable(self.folder, error) from None

    def describe(self) -> None:
        """Mark the cache directory as ours and write the settings of this store to `recipe.json`.

        Raises:
            UserError: If the directory cannot be written, or has files that are not of a cache.
        """
        try:
            own_directory(
                self._cache,
                CACHE,
                adopt=is_feature_cache(self._cache),
                setting="data.feature_cache",
            )
            write_json(self.folder / _SETTINGS_FILE, self._settings)
        except OSError as error:
            raise _unusable(self.folder, error) from None

    def path(self, digest: bytes) -> Path:
        """Return the path of an image's features, whether they exist or not."""
        name = digest.hex()
        return self.folder / name[:2] / f"{name}.safetensors"

    def entry_bytes(self, crops: int = 1) -> int:
        """Return the bytes on disk of an image with this number of crops."""
        if crops not in self._entry_bytes:
            features = torch.zeros(crops, *self._shape, dtype=self._dtype)
            self._entry_bytes[crops] = len(_packed(features))
        return self._entry_bytes[crops]

    def holds(self, digest: bytes, crops: int = 1) -> bool:
        """Return whether an image's file exists with the right size; its content is not read."""
        try:
            return self.path(digest).stat().st_size == self.entry_bytes(crops)
        except OSError:
            return False

    def write(self, digest: bytes, features: Tensor) -> None:
        """Write an image's features.

        Raises:
            UserError: If the file cannot be written, e.g. because the disk is full.
        """
        try:
            write_bytes(self.path(digest), _packed(features.detach().cpu()))
        except OSError as error:
            raise _unusable(self.folder, error) from None

    def read(self, digest: bytes, crops: int = 1) -> Tensor:
        """Read an image's features `[crops, tokens, width]`.

        Raises:
            UserError: If they are missing or damaged; a damaged file is renamed, so that the next
                start computes them again.
        """
        path = self.path(digest)
        try:
            features = _unpacked(read_bytes(path, limit=self.entry_bytes(crops)))
        except (OSError, UserError, ValueError, KeyError, SafetensorError) as error:
            fault = " ".join(str(error).split())
        else:
            if (tuple(features.shape), features.dtype) == ((crops, *self._shape), self._dtype):
                return features
            fault = f"{tuple(features.shape)} of {features.dtype}"
        where = ""
        with suppress(OSError):
            where = f"; the file is now {set_aside(path)}"
        raise UserError(
            f"{path}: the features there are missing or damaged ({fault}){where}. Repeat the "
            "command, which computes them again and resumes from the newest checkpoint",
            code="features_damaged",
        )


def feature_key(digest: bytes, layout: ImageLayout) -> bytes:
    """Return the key of an image's features.

    Args:
        digest: sha256 of the image's bytes.
        layout: Its crops; the same image can be divided in one record, and not in another.
    """
    if layout.tiles is None:
        return digest
    return hashlib.sha256(digest + repr((layout.tiles, layout.overview)).encode()).digest()


def disk_use(folder: str | Path) -> int:
    """Return the bytes of all features under `folder`, stale unfinished files not counted.

    Only files that a store writes, in the folders that it creates, are counted.
    """
    total = 0
    for path in _own_files(Path(folder)):
        with suppress(OSError):  # deleted meanwhile by another run
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
    """Check, before the tower is loaded, that a store can use the directory.

    Nothing is changed. A directory with stores may be read-only: it may have all features.

    Raises:
        UserError: See `FeatureStore.describe`.
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
    """Return whether a directory has the directory of a store, by its name and its settings."""
    return next(_stores(folder), None) is not None


def _stores(folder: Path) -> Iterator[Path]:
    """Yield the directories of the stores in a cache directory."""
    for path in sorted(folder.glob("*")):
        if not _STORE_NAME.fullmatch(path.name) or path.is_symlink():
            continue
        try:
            settings = read_json(path / _SETTINGS_FILE)
        except (OSError, UserError):
            continue
        if isinstance(settings, dict) and {"shape", "dtype"} <= settings.keys():
            yield path


def _own_files(folder: Path) -> Iterator[Path]:
    """Yield the files of all stores: features, settings, and unfinished files of both."""
    for store in _stores(folder):
        for path in [*store.glob("*"), *store.glob("[0-9a-f][0-9a-f]/*")]:
            names = (_FILE_NAME.fullmatch, _UNFINISHED_NAME.fullmatch)
            ours = path.name == _SETTINGS_FILE or any(match(path.name) for match in names)
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
        f"data.feature_cache: {folder} cannot be written ({error.strerror or error}); free disk "
        "space, choose another directory, or remove data.feature_cache",
        code="cache_unusable",
    )
