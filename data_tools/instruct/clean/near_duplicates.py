"""Find texts in nearly the same words: candidates by MinHash, the decision by exact Jaccard."""

from array import array
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Final
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from data_tools.instruct.clean import texts
from data_tools.instruct.config import NearDuplicatesConfig
from vlm_sft.utils.libraries import import_extra
from vlm_sft.utils.progress import track

if TYPE_CHECKING:
    from data_tools.instruct.clean.table import SampleFile, Table

MAX_PERMUTATIONS: Final = 128
MAX_MISSED: Final = 1e-4
"""Maximum probability that a pair exactly at the threshold is not a candidate."""


def choose_bands(threshold: float) -> tuple[int, int]:
    """Return the number of bands and the rows per band for a threshold.

    Two sets of Jaccard similarity s agree in a band of r rows with probability s^r, and in none of
    b bands with (1 - s^r)^b (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4). More
    rows mean fewer comparisons, more bands fewer misses: this takes the most rows that leave a pair
    at the threshold missed with probability `MAX_MISSED` at most.
    """
    for rows in range(16, 1, -1):
        bands = MAX_PERMUTATIONS // rows
        if (1 - threshold**rows) ** bands <= MAX_MISSED:
            return bands, rows
    return MAX_PERMUTATIONS, 1


class Signatures:
    """MinHash bands of samples, 32 bits per band.

    Columns, because `datasketch.MinHashLSH` needs 6.8 KB per sample for its dictionaries. An
    accidental agreement of 32 bits costs one comparison.
    """

    def __init__(self, threshold: float) -> None:
        datasketch = import_extra("datasketch", "instruct")
        self.bands, self._rows = choose_bands(threshold)
        # Shingles are 32-bit hashes already; by default each would cost a SHA-1.
        self._minhash = datasketch.MinHash(num_perm=self.bands * self._rows, seed=1, hashfunc=int)
        self._numbers = array("I")
        self._keys = array("I")
        self._factors = np.random.default_rng(1).integers(2**63, size=32, dtype=np.uint64) | 1

    def add(self, number: int, words: Sequence[str], shingle_words: int) -> None:
        """Add a sample; numbers increase, and there is at least one word."""
        size = min(shingle_words, len(words))
        hashes = np.array([crc32(word.encode("utf-8", "surrogatepass")) for word in words], "u8")
        num_shingles = len(words) - size + 1
        shingles = self._combine([hashes[start : start + num_shingles] for start in range(size)])
        self._minhash.clear()
        self._minhash.update_batch(shingles.tolist())
        rows = self._minhash.hashvalues.astype(np.uint64).reshape(self.bands, self._rows)
        self._numbers.append(number)
        self._keys.frombytes(self._combine(list(rows.T)).astype(np.uint32).tobytes())

    def _combine(self, columns: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
        """Return a 32-bit hash of each row, by arithmetic modulo 2^64."""
        mixed = np.zeros(len(columns[0]), np.uint64)
        for column, factor in zip(columns, self._factors, strict=False):
            mixed += column * factor
        return mixed >> np.uint64(32)

    def num_bytes(self) -> int:
        """Return the memory of the columns."""
        return 4 * (len(self._numbers) + len(self._keys))

    def buckets(self, live: NDArray[np.bool_]) -> dict[int, list[int]]:
        """Return the shared buckets of each live sample that shares one with another."""
        numbers = np.array(self._numbers, np.int64)
        keys = np.array(self._keys, np.uint32).reshape(-1, self.bands)[live[numbers]]
        numbers = numbers[live[numbers]]
        found: dict[int, list[int]] = defaultdict(list)
        for band in range(self.bands):
            _, bucket, sizes = np.unique(keys[:, band], return_inverse=True, return_counts=True)
            for row in np.flatnonzero(sizes[bucket] > 1):
                found[int(numbers[row])].append(int(bucket[row]) * self.bands + band)
        return found


def drop_near_duplicates(table: "Table", file: "SampleFile", config: NearDuplicatesConfig) -> None:
    """Drop every live sample whose text is (nearly) that of an earlier kept one.

    Two samples are compared if they are about the same image, or if both have signatures that share
    a band. The first in the order of the file stays.
    """
    assert table.signatures is not None
    live = table.live_samples
    sizes, images = (table.samples[name].to_numpy() for name in ("size", "image"))
    buckets = table.signatures.buckets(live)
    on_one_image = _on_one_image(np.flatnonzero(live), images, sizes, config.threshold)
    kept: dict[tuple[str, int], list[int]] = defaultdict(list)
    duplicates: list[tuple[int, str, int, float]] = []

    @lru_cache(512)
    def read(number: int) -> tuple[list[str], texts.Shingles]:
        sample = file.read(number)
        words = texts.words(texts.compared(sample.turns, sample.type))
        return words, texts.shingles(words, config.shingle_words)

    for number in track(sorted({*buckets, *on_one_image}), description="comparing texts"):
        places = [("bucket", bucket) for bucket in buckets.get(number, ())]
        if number in on_one_image:
            places.append(("image", int(images[number])))
        for other in sorted({other for place in places for other in kept[place]}):
            smaller, larger = sorted((int(sizes[number]), int(sizes[other])))
            if smaller < config.threshold * larger:
                continue  # too different in size to be similar
            (words, shingles), (others_words, others) = read(number), read(other)
            similarity = texts.jaccard(shingles, others)
            if similarity >= config.threshold:
                code = "EXACT_DUPLICATE" if words == others_words else "NEAR_DUPLICATE"
                duplicates.append((number, code, other, similarity))
                break
        else:
            for place in places:
                kept[place].append(number)
    if duplicates:
        numbers, codes, causes, similarities = map(list, zip(*duplicates, strict=True))
        table.samples.loc[numbers, "code"] = codes
        table.samples.loc[numbers, "cause"] = np.array(causes, np.int32)
        table.samples.loc[numbers, "similarity"] = np.array(similarities, np.float32)


def _on_one_image(
    numbers: NDArray[np.int64],
    images: NDArray[np.int64],
    sizes: NDArray[np.uint32],
    threshold: float,
) -> set[int]:
    """Return the samples with another one on their image that is similar in size."""
    order = numbers[np.lexsort((sizes[numbers], images[numbers]))]
    images, sizes = images[order], sizes[order]
    similar = (images[1:] == images[:-1]) & (sizes[:-1] >= threshold * sizes[1:])
    return {*order[1:][similar].tolist(), *order[:-1][similar].tolist()}
