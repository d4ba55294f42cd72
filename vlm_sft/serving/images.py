"""Read the images of a request: `data:` URIs; files and remote hosts if the server allows them."""

import base64
import binascii
import io
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlm_sft.data.images import FORMATS, read_bytes
from vlm_sft.errors import ImageError
from vlm_sft.serving.errors import RequestError
from vlm_sft.serving.remote_images import FETCH_SECONDS, FetchError, fetch
from vlm_sft.utils.image_paths import image_path


@dataclass(frozen=True)
class ImageLimits:
    """Which images a request may have.

    Attributes:
        max_images: Images of a request.
        max_pixels: Pixels of an image, by its header.
        max_bytes: Bytes of a fetched image.
        image_dir: Folder below which `file://` images may be read; None: no files are read.
        remote_hosts: Hosts from which images may be fetched; see `remote_images.fetch`.
    """

    max_images: int = 8
    max_pixels: int = 50_000_000
    max_bytes: int = 32 * 2**20
    image_dir: Path | None = None
    remote_hosts: tuple[str, ...] = ()


class ImageReader:
    """Reads the images of one request.

    Args:
        limits: Which images are allowed.
    """

    def __init__(self, limits: ImageLimits) -> None:
        self._limits = limits
        self._num_images = 0
        self._deadline = time.monotonic() + FETCH_SECONDS

    def read(self, url: str, where: str) -> bytes:
        """Return the bytes of an image file.

        Args:
            url: A `data:`, `file:`, `http:` or `https:` URI.
            where: The place in the request, for error messages.

        Raises:
            RequestError: The image is malformed, too large, one too many, or not allowed.
        """
        limits = self._limits
        self._num_images += 1
        if self._num_images > limits.max_images:
            raise RequestError(
                400, "too_many_images",
                f"messages: more than {limits.max_images} images, the maximum here",
            )  # fmt: skip
        data = self._bytes(url, where)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                pixels = image.width * image.height
        except Exception:
            raise RequestError(
                400, "invalid_image", f"{where}: is not an image file of a supported format"
            ) from None
        if pixels > limits.max_pixels:
            raise RequestError(
                413, "image_too_large",
                f"{where}: has {pixels:,} pixels, and the maximum here is {limits.max_pixels:,}",
            )  # fmt: skip
        return data

    def _bytes(self, url: str, where: str) -> bytes:
        limits = self._limits
        scheme = url[:20].partition(":")[0].lower()
        if scheme == "data":
            return _decode(url, where)
        if scheme == "file" and limits.image_dir is not None:
            return _read_file(url.partition("://")[2], where, limits.image_dir)
        if scheme in ("http", "https") and limits.remote_hosts:
            try:
                return fetch(
                    url, limits.remote_hosts, max_bytes=limits.max_bytes, deadline=self._deadline
                )
            except FetchError as error:
                raise RequestError(400, "image_not_fetched", f"{where}: {error}") from None
        allowed = ["a data: URI"]
        allowed += ["file://NAME"] * (limits.image_dir is not None)
        allowed += ["an address of an allowed host"] * bool(limits.remote_hosts)
        refused = "" if limits.remote_hosts else "; this server does not fetch other addresses"
        raise RequestError(
            400, "image_not_allowed", f"{where}: expected {' or '.join(allowed)}{refused}"
        )


def _decode(url: str, where: str) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError(400, "invalid_image", f"{where}: expected data:image/...;base64,...")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(400, "invalid_image", f"{where}: is not valid base64") from None


def _read_file(name: str, where: str, folder: Path) -> bytes:
    relative = name.removeprefix(f"{folder}/") if name.startswith("/") else name
    try:
        return read_bytes(image_path(folder, relative))
    except (ImageError, ValueError):
        raise RequestError(
            400, "image_not_allowed", f"{where}: no such image in the folder of this server"
        ) from None
