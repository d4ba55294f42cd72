"""Images that look the same: candidates by perceptual hash, the decision by colour thumbnails."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from data_tools.instruct.clean.packages import require
from data_tools.instruct.config import SameImageConfig
from data_tools.instruct.generate.append_only import end_last_line
from vlm_sft.errors import ImageError
from vlm_sft.utils.filesystem import naming
from vlm_sft.utils.progress import track

HASH_BITS: Final = 64
THUMBNAIL: Final = (16, 16)
_ROWS_AT_ONCE: Final = 1024

Key = tuple[str, int, int]
"""A file's path, size in bytes and time of change in nanoseconds."""


@dataclass(frozen=True)
class Looks:
    """What was found about the images.

    Attributes:
        repeats: Image -> the earlier one that looks the same.
        unreadable: Image -> why it cannot be opened.
        opened: How many had to be opened for their hash; the cache knew the others.
    """

    repeats: Mapping[int, int]
    unreadable: Mapping[int, str]
    opened: int


def look(paths: Mapping[int, Path], cache: Path, config: SameImageConfig) -> Looks:
    """Find among the images, in the order given, those that look like an earlier one.

    Args:
        paths: Image files by id.
        cache: File of hashes; what it lacks is added. It decides nothing but the time taken.
        config: Thresholds and number of processes.
    """
    known = _read_cache(cache)
    keys = {number: _key(path) for number, path in paths.items()}
    new = [number for number, key in keys.items() if key is None or key not in known]
    unreadable: dict[int, str] = {}
    found = _hashes([paths[number] for number in new], config.workers)
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
    return Looks(
        repeats(hashes, _Alike(paths, config.max_difference), config), unreadable, len(new)
    )


def repeats(
    hashes: Mapping[int, int], alike: Callable[[int, int], bool], config: SameImageConfig
) -> dict[int, int]:
    """Images with the first earlier kept one that is near by hash and `alike`."""
    numbers = list(hashes)
    values, which = np.unique(
        np.array([hashes[n] for n in numbers], np.uint64), return_inverse=True
    )
    near = near_pairs(values, config.max_distance)
    kept: dict[int, list[int]] = defaultdict(list)
    found: dict[int, int] = {}
    for place, number in enumerate(numbers):
        value = int(which[place])
        earlier = sorted(p for v in (value, *near.get(value, ())) for p in kept[v])
        first = next((numbers[p] for p in earlier if alike(numbers[p], number)), None)
        if first is None:
            kept[value].append(place)
        else:
            found[number] = first
    return found


def near_pairs(values: NDArray[np.uint64], max_distance: int) -> dict[int, list[int]]:
    """For each place in the distinct `values`, the places that differ by at most so many bits.

    Values that differ in at most d bits agree in one of d + 1 pieces of their bits, so only those
    that share a piece are compared.
    """
    edges = np.linspace(0, HASH_BITS, max_distance + 2).astype(int)
    near: dict[int, set[int]] = defaultdict(set)
    for low, high in pairwise(edges):
        pieces = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(pieces, kind="stable")
        starts = np.flatnonzero(np.diff(pieces[order])) + 1
        for members in np.split(order, starts):
            for first, second in _close(values, members, max_distance):
                near[first].add(second)
                near[second].add(first)
    return {place: sorted(others) for place, others in near.items()}


def _close(
    values: NDArray[np.uint64], members: NDArray[np.intp], max_distance: int
) -> Iterator[tuple[int, int]]:
    if len(members) < 2:
        return
    for start in range(0, len(members), _ROWS_AT_ONCE):
        rows = members[start : start + _ROWS_AT_ONCE]
        bits = np.bitwise_count(values[rows][:, None] ^ values[members][None, :])
        for row, column in zip(*np.nonzero(bits <= max_distance), strict=True):
            if rows[row] < members[column]:
                yield int(rows[row]), int(members[column])


class _Alike:
    """Whether two images' thumbnails differ little; perceptual hashes see no colour."""

    def __init__(self, paths: Mapping[int, Path], max_difference: float) -> None:
        self._paths, self._max_difference = paths, max_difference
        self._thumbnail = lru_cache(1024)(self._read)

    def __call__(self, first: int, second: int) -> bool:
        difference = np.abs(self._thumbnail(first) - self._thumbnail(second)).mean()
        return bool(difference <= self._max_difference)

    def _read(self, number: int) -> NDArray[np.float32]:
        from vlm_sft.data.images import open_image

        image = open_image(self._paths[number])
        values = np.asarray(image.resize(THUMBNAIL, reducing_gap=2.0), np.float32)
        return values - values.mean()  # brightness is no difference


def _hashes(paths: Sequence[Path], workers: int) -> Iterator[int | ImageError]:
    if workers == 1 or len(paths) < workers:
        yield from map(hash_of, paths)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(hash_of, paths, chunksize=64)


def hash_of(path: Path) -> int | ImageError:
    """The perceptual hash (ImageHash's `phash`, 64 bits), or why there is none."""
    from vlm_sft.data.images import open_image

    imagehash = require("imagehash")
    try:
        image = open_image(path)
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
    """What the cache holds; a line cut by a kill is as if it were not there."""
    known: dict[Key, int] = {}
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return known
    with file:
        for line in file:
            try:
                name, size, changed, value = json.loads(line)
                known[str(name), int(size), int(changed)] = int(value, 16)
            except (ValueError, TypeError):
                continue
    return known
