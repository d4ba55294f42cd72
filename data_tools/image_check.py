"""Find the annotated images whose file agrees with the annotations."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data_tools.coco import AnnotatedImage, CocoIndex
from vlm_sft.errors import ImageError, UserError
from vlm_sft.utils.escape import escape_control_line
from vlm_sft.utils.image_paths import image_path, nearest_existing
from vlm_sft.utils.progress import track


def usable_images(
    index: CocoIndex, folder: Path, *, follow_symlinks: bool = False
) -> tuple[AnnotatedImage, ...]:
    """Return the images whose file exists and has, by its header, the annotated size.

    Images are compared as training shows them, EXIF orientation applied: boxes of an image that
    EXIF turns although it was annotated as stored would name wrong sides. All other images are
    added to the index's findings.
    """
    from vlm_sft.data.images import upright_size

    usable = []
    for image in track(index.images, description="looking at images"):
        problem = _problem(image, folder, upright_size, follow_symlinks)
        if problem is None:
            usable.append(image)
        else:
            kind, found = problem
            index.findings.add(kind, f"{escape_control_line(image.file_name, 200)}: {found}")
    return tuple(usable)


def require_few_missing(images: Iterable[AnnotatedImage], folder: Path, max_faulty: float) -> None:
    """Refuse a folder in which too many of the annotated images are missing.

    Raises:
        UserError: The folder does not exist, or lacks more than the share `max_faulty` of them.
    """
    if not folder.is_dir():
        raise UserError(
            f"--images {folder}: not a folder{nearest_existing(folder)}; give the folder with the "
            "images",
            code="image_missing",
        )
    images = list(images)
    missing = [p.file_name for p in images if not (folder / p.file_name).exists()]
    if len(missing) > max_faulty * len(images):
        shown = ", ".join(escape_control_line(name, 200) for name in missing[:3])
        more = ", ..." if len(missing) > 3 else ""
        raise UserError(
            f"--images {folder}: {len(missing)} annotated images are not there ({shown}{more})"
            f"{nearest_existing(folder / missing[0])}; give the folder that holds them, "
            "annotations of these images only, or --max-faulty 1 to build from the others",
            code="image_missing",
        )


def _problem(
    image: AnnotatedImage, folder: Path, upright_size: Callable[[Path], Any], follow_symlinks: bool
) -> tuple[str, str] | None:
    """Return the kind of finding and what was found; None for a usable image."""
    try:
        path = image_path(folder, image.file_name, follow_symlinks=follow_symlinks)
        size = upright_size(path)
    except ImageError as error:
        if error.reason == "image_missing":
            return "image_missing", f"{error}{nearest_existing(folder / image.file_name)}"
        return "image_unreadable", str(error)
    annotated = f"{image.width} x {image.height}"
    fits = (size.width, size.height) == (image.width, image.height)
    as_stored = size.turn == "sideways" and (size.height, size.width) == (
        image.width,
        image.height,
    )
    if fits and (size.turn == "other" or as_stored):
        return "image_turned", f"{annotated} fits it before and after EXIF turns it"
    if as_stored:
        return "image_turned", (
            f"annotated as stored ({annotated}), but its EXIF orientation turns it to "
            f"{size.width} x {size.height} pixels; store it upright without EXIF orientation"
        )
    if not fits:
        return "image_size", f"{size.width} x {size.height} pixels, annotated as {annotated}"
    return None
