"""Find the annotated images whose file agrees with the annotations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_tools.coco import AnnotatedImage, CocoIndex, read_coco
from vlm_sft.errors import ImageError, UserError
from vlm_sft.utils.escape import escape_control_line
from vlm_sft.utils.image_paths import image_path, nearest_existing
from vlm_sft.utils.progress import track


def read_annotated(
    instances: Path | None,
    captions: Path | None,
    folder: Path,
    *,
    max_faulty: float,
    names: tuple[str, str],
    follow_symlinks: bool = False,
) -> tuple[CocoIndex, tuple[AnnotatedImage, ...]]:
    """Read the annotations, and find their images that can be used.

    Args:
        instances: As `read_coco`.
        captions: As `read_coco`.
        folder: The folder of the images.
        max_faulty: Share of the boxes, captions or images that may be dropped for one kind of
            fault.
        names: What the user calls `folder` and `max_faulty`, e.g. `--images` and `--max-faulty `.
        follow_symlinks: Whether images may be symbolic links that lead out of `folder`.

    Raises:
        UserError: As `read_coco`, too many images are faulty, or none can be used.
    """
    of_folder, of_share = names
    remedy = f"; {of_share}1 (100%) drops everything that is faulty"
    index = read_coco(instances, captions, max_faulty, remedy)
    usable = usable_images(index, folder, follow_symlinks=follow_symlinks)
    remedy = (
        f"; give the folder of these images as {of_folder}, or use only the existing ones with "
        f"{of_share}1 (100%)"
    )
    index.findings.require_few({"image": len(index.images)}, max_faulty, remedy)
    if not usable:
        raise UserError(
            f"{of_folder} {folder}: not one of the {len(index.images):,} annotated images can be "
            "used; give annotations that list images, and the folder of these images",
            code="no_records",
        )
    return index, usable


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


def _problem(
    image: AnnotatedImage, folder: Path, upright_size: Callable[[Path], Any], follow_symlinks: bool
) -> tuple[str, str] | None:
    """Return the kind of finding and what was found; None for a usable image."""
    try:
        path = image_path(folder, image.file_name, follow_symlinks=follow_symlinks)
        size = upright_size(path)
    except ImageError as error:
        if error.reason == "image_missing":
            near = nearest_existing(folder / image.file_name)
            return "image_missing", f"no such file in {folder}{near}"
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
