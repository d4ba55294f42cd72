"""Find images that look the same: candidates by perceptual hash, the decision by thumbnails."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from data_tools.instruct.clean.table import Table
from data_tools.instruct.config import SameImageConfig
from data_tools.instruct.generate.append_only import end_last_line
from vlm_sft.errors import ImageError
from vlm_sft.utils.filesystem import naming
from vlm_sft.utils.libraries import import_extra
from vlm_sft.utils.progress import track

HASH_BITS: Final = 64
THUMBNAIL: Final = (16, 16)
_ROWS_AT_ONCE: Final = 1024

Key = tuple[str, int, int]
"""Path, size in bytes and time of change in nanoseconds of a file."""


@dataclass(frozen=True)
class SameImages:
    """Images that a run should use once, or not at all.

    Attributes:
        repeats: Image -> the earlier one that looks the same.
        unreadable: Image -> why it cannot be opened.
        num_opened: Images that were opened for their hash; the others were in the cache.
    """

    repeats: Mapping[int, int] = field(default_factory=dict)
    unreadable: Mapping[int, str] = field(default_factory=dict)
    num_opened: int = 0


def drop_same_images(table: Table, same: SameImages) -> None:
    """Drop samples about images that repeat an earlier one, or cannot be opened."""
    samples = table.samples
    unreadable = samples["image"].isin(same.unreadable.keys())
    repeated = samples["image"].isin(same.repeats.keys())
    repeat_of = samples["image"].copy()
    first = samples.drop_duplicates("image")
    first_on = dict(zip(first["image"].tolist(), first.index.tolist(), strict=True))
    for number, images in table.more_images.items():
        unreadable[number] |= not same.unreadable.keys().isdisjoint(images)
        again = next((image for image in images if image in same.repeats), None)
        if again is not None and not repeated[number]:
            repeated[number], repeat_of[number] = True, again
        for image in images:
            first_on[image] = min(number, first_on.get(image, number))
    repeated &= ~unreadable
    samples.loc[unreadable, "code"] = "IMAGE_UNREADABLE"
    samples.loc[repeated, "code"] = "IMAGE_DUPLICATE"
    causes = [first_on[same.repeats[image]] for image in repeat_of[repeated].tolist()]
    samples.loc[repeated, "cause"] = np.array(causes, np.int32)


def find_same_images(paths: Mapping[int, Path], cache: Path, config: SameImageConfig) -> SameImages:
    """Find the images that look like an earlier one, in the given order.

    Args:
        paths: Image files by id.
        cache: File of hashes; missing ones are added. It changes the time, not the result.
        config: Thresholds and number of processes.
    """
    known = _read_cache(cache)
    keys = {number: _key(path) for number, path in paths.items()}
    new = [number for number, key in keys.items() if key is None or key not in known]
    unreadable: dict[int, str] = {}
    found = _hash_all([paths[number] for number in new], config.workers)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with naming(cache), cache.open("a+", encoding="utf-8") as file:
        end_last_line(file.fileno(), cache, b'["')
        for number, result in zip(new, track(found, len(new), "hashing images"), strict=True):
            key = keys[number]
            if isinstance(result, ImageError) or key is None:
                unreadable[number] = str(result)
                continue
            known[key] = result
            file.write(json.dumps([*key, f"{result:016x}"]) + "\n")
    hashes = {
        number: known[key]
        for number, key in keys.items()
        if key is not None and number not in unreadable
    }
    look_same = _thumbnail_comparison(paths, config.max_difference)
    return SameImages(_repeats(hashes, look_same, config.max_distance), unreadable, len(new))


def _repeats(
    hashes: Mapping[int, int], look_same: Callable[[int, int], bool], max_distance: int
) -> dict[int, int]:
    """Return the images with the first earlier, kept one that is similar."""
    numbers = list(hashes)
    values, which = np.unique(
        np.array([hashes[n] for n in numbers], np.uint64), return_inverse=True
    )
    near = near_pairs(values, max_distance)
    kept: dict[int, list[int]] = defaultdict(list)
    found: dict[int, int] = {}
    for place, number in enumerate(numbers):
        value = int(which[place])
        earlier = sorted(p for v in (value, *near.get(value, ())) for p in kept[v])
        first = next((numbers[p] for p in earlier if look_same(numbers[p], number)), None)
        if first is None:
            kept[value].append(place)
        else:
            found[number] = first
    return found


def near_pairs(values: NDArray[np.uint64], max_distance: int) -> dict[int, list[int]]:
    """Return for each index of the distinct `values` the indices within a Hamming distance.

    Values that differ in at most d bits are equal in one of d + 1 pieces of their bits, so only
    those that share a piece are compared.
    """
    edges = np.linspace(0, HASH_BITS, max_distance + 2).astype(int)
    near: dict[int, set[int]] = defaultdict(set)
    for low, high in pairwise(edges):
        pieces = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(pieces, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(pieces[order])) + 1):
            for start in range(0, len(members) if len(members) > 1 else 0, _ROWS_AT_ONCE):
                rows = members[start : start + _ROWS_AT_ONCE]
                distance = np.bitwise_count(values[rows][:, None] ^ values[members][None, :])
                for row, column in zip(*np.nonzero(distance <= max_distance), strict=True):
                    if rows[row] != members[column]:
                        near[int(rows[row])].add(int(members[column]))
    return {place: sorted(others) for place, others in near.items()}


def _thumbnail_comparison(
    paths: Mapping[int, Path], max_difference: float
) -> Callable[[int, int], bool]:
    """Return a function that compares two images in color, which perceptual hashes ignore."""
    from vlm_sft.data.images import open_image

    @lru_cache(1024)
    def thumbnail(number: int) -> NDArray[np.float32]:
        image = open_image(paths[number])
        values = np.asarray(image.resize(THUMBNAIL, reducing_gap=2.0), np.float32)
        return values - values.mean()  # brightness does not count

    def look_same(first: int, second: int) -> bool:
        difference = np.abs(thumbnail(first) - thumbnail(second)).mean()
        return bool(difference <= max_difference)

    return look_same


def _hash_all(paths: Sequence[Path], workers: int) -> Iterator[int | ImageError]:
    if workers == 1 or len(paths) < workers:
        yield from map(hash_image, paths)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(hash_image, paths, chunksize=64)


def hash_image(source: Path | bytes) -> int | ImageError:
    """Return the perceptual hash (ImageHash's `phash`, 64 bits), or why there is none."""
    from vlm_sft.data.images import open_image

    imagehash = import_extra("imagehash", "instruct")
    try:
        image = open_image(source)
    except ImageError as error:
        return error
    return int(str(imagehash.phash(image)), 16)


def _key(path: Path) -> Key | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def _read_cache(path: Path) -> dict[Key, int]:
    """Return the cached hashes; a line that a kill cut short is ignored."""
    known: dict[Key, int] = {}
    if not path.exists():
        return known
    with path.open("rb") as file:
        for line in file:
            try:
                name, size, changed, value = json.loads(line)
                known[str(name), int(size), int(changed)] = int(value, 16)
            except (ValueError, TypeError):
                continue
    return known
