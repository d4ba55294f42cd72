"""Texts in nearly the same words: candidates by MinHash, the decision by exact Jaccard."""

from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Final
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from data_tools.instruct.clean import texts
from data_tools.instruct.clean.codes import CODE
from data_tools.instruct.clean.packages import require
from data_tools.instruct.config import NearDuplicatesConfig
from vlm_sft.utils.progress import track

if TYPE_CHECKING:
    from data_tools.instruct.clean.table import Reader, Table

MAX_PERMUTATIONS: Final = 128
MISSED: Final = 1e-4
"""Highest probability that a pair just at the threshold is no candidate."""


def banding(threshold: float) -> tuple[int, int]:
    """Bands and rows of a band: as many rows as leave a pair at the threshold missed by `MISSED`.

    Two sets of Jaccard similarity s agree in a band of r rows with probability s^r, and in none of
    b bands with (1 - s^r)^b (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4). Only
    what agrees in some band is compared, so more rows mean less work and fewer bands more misses.
    """
    for rows in range(16, 1, -1):
        bands = MAX_PERMUTATIONS // rows
        if (1 - threshold**rows) ** bands <= MISSED:
            return bands, rows
    return MAX_PERMUTATIONS, 1


class Signatures:
    """MinHash bands of samples, 32 bits a band.

    `datasketch.MinHashLSH` would keep a Python object for every band of every sample, kilobytes a
    sample; sorted columns find the same candidates. A chance agreement of 32 bits costs one
    comparison.
    """

    def __init__(self, threshold: float) -> None:
        datasketch = require("datasketch")
        self.bands, self._rows = banding(threshold)
        # Shingles come as 32-bit hashes already; by default each would cost a SHA-1.
        self._minhash = datasketch.MinHash(num_perm=self.bands * self._rows, seed=1, hashfunc=int)
        self._owners = array("I")
        self._keys = array("I")
        self._mix = np.random.default_rng(1).integers(2**63, size=32, dtype=np.uint64) | 1

    def add(self, number: int, words: Sequence[str], shingle_words: int) -> None:
        """Sign the sample of that number; numbers grow, and there is at least one word."""
        size = min(shingle_words, len(words))
        encoded = [crc32(word.encode("utf-8", "surrogatepass")) for word in words]
        crcs, runs = np.array(encoded, np.uint64), len(words) - size + 1
        self._minhash.clear()
        self._minhash.update_batch(
            self._mixed([crcs[start : start + runs] for start in range(size)]).tolist()
        )
        rows = self._minhash.hashvalues.astype(np.uint64).reshape(self.bands, self._rows)
        keys = self._mixed(list(rows.T))
        self._owners.append(number)
        self._keys.frombytes(keys.astype(np.uint32).tobytes())

    def _mixed(self, columns: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
        """32 bits of each row; arithmetic modulo 2^64 is what mixes."""
        mixed = np.zeros(len(columns[0]), np.uint64)
        for column, factor in zip(columns, self._mix, strict=False):
            mixed += column * factor
        return mixed >> np.uint64(32)

    def bytes(self) -> int:
        """Memory of the columns."""
        return len(self._owners) * 4 + len(self._keys) * 4

    def buckets(self, live: NDArray[np.bool_]) -> dict[int, list[int]]:
        """For every live sample that shares a bucket with another one, its buckets."""
        owners = np.frombuffer(self._owners, np.uint32) if self._owners else np.zeros(0, np.uint32)
        keys = np.frombuffer(self._keys, np.uint32) if self._keys else np.zeros(0, np.uint32)
        keys = keys.reshape(-1, self.bands)
        alive = live[owners]
        owners = owners[alive]
        found: dict[int, list[int]] = defaultdict(list)
        for band in range(self.bands):
            column = keys[:, band][alive]
            _, which, counts = np.unique(column, return_inverse=True, return_counts=True)
            for row in np.flatnonzero(counts[which] > 1):
                found[int(owners[row])].append(int(which[row]) * self.bands + band)
        return found


def mark_duplicates(table: "Table", reader: "Reader", config: NearDuplicatesConfig) -> None:
    """Set aside every live sample whose text an earlier kept one has, exactly or nearly.

    Two samples are compared if they are about one image (all such pairs), or if both are signed
    (pairs that share a band). The first in the order of the file stays.
    """
    assert table.signatures is not None
    live = table.live_samples()
    buckets = table.signatures.buckets(live)
    beside = _beside(table, live, config.threshold)
    in_bucket: dict[int, list[int]] = defaultdict(list)
    on_image: dict[int, list[int]] = defaultdict(list)
    compare = _Compare(table, reader, config)
    suspects = sorted({*buckets, *beside})
    for number in track(suspects, description="comparing texts"):
        places = buckets.get(number, [])
        image = int(table.images[number])
        earlier = {other for place in places for other in in_bucket[place]}
        if number in beside:
            earlier.update(on_image[image])
        if compare.is_repeat(number, sorted(earlier)):
            continue
        for place in places:
            in_bucket[place].append(number)
        if number in beside:
            on_image[image].append(number)


def _beside(table: "Table", live: NDArray[np.bool_], threshold: float) -> set[int]:
    """Samples with another on their image whose number of shingles allows the likeness."""
    numbers = np.flatnonzero(live)
    order = numbers[np.lexsort((table.sizes[numbers], table.images[numbers]))]
    images, sizes = table.images[order], table.sizes[order]
    alike = (images[1:] == images[:-1]) & (sizes[:-1] >= threshold * sizes[1:])
    return {int(number) for number in (*order[1:][alike], *order[:-1][alike])}


class _Compare:
    def __init__(self, table: "Table", reader: "Reader", config: NearDuplicatesConfig) -> None:
        self._table, self._reader, self._config = table, reader, config
        self._of = lru_cache(512)(self._read)

    def is_repeat(self, number: int, earlier: list[int]) -> bool:
        """Whether one of the earlier is too like it; if so, it is marked with the first such."""
        for other in self._possible(number, earlier):
            words, mine = self._of(number)
            others_words, theirs = self._of(other)
            likeness = texts.jaccard(mine, theirs)
            if likeness >= self._config.threshold:
                exact = words == others_words
                code = CODE["EXACT_DUPLICATE" if exact else "NEAR_DUPLICATE"]
                self._table.sample_codes[number] = code
                self._table.causes[number] = other
                self._table.likeness[number] = likeness
                return True
        return False

    def _possible(self, number: int, earlier: list[int]) -> Iterator[int]:
        size = int(self._table.sizes[number])
        for other in earlier:
            smaller, larger = sorted((size, int(self._table.sizes[other])))
            if smaller >= self._config.threshold * larger:
                yield other

    def _read(self, number: int) -> tuple[list[str], texts.Shingles]:
        sample = self._reader.sample(number)
        words = texts.words(texts.compared(sample.turns, sample.type))
        return words, texts.shingles(words, self._config.shingle_words)
