"""Choose embeddings that are unlike each other. Rows are in order of rank, the best first."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

_ITERATIONS: Final = 20
_BLOCK: Final = 4096


def farthest_first(embeddings: NDArray[np.float32], count: int) -> list[int]:
    """Return the first row, then always the one farthest from those taken (greedy k-center).

    Args:
        embeddings: `[rows, D]`, at least `count` rows.
        count: Number of rows to take.
    """
    taken = [0]
    nearest = embeddings @ embeddings[0]
    while len(taken) < count:
        nearest[taken[-1]] = np.inf  # never again
        taken.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, embeddings @ embeddings[taken[-1]])
    return taken


def cluster_firsts(embeddings: NDArray[np.float32], count: int, *, seed: int) -> list[int]:
    """Return the first row of each of `count` clusters (spherical k-means).

    An empty cluster is replaced by the first row that is not taken yet.
    """
    rng = np.random.default_rng(seed)
    centers = embeddings[np.sort(rng.choice(len(embeddings), count, replace=False))].copy()
    labels = np.zeros(len(embeddings), np.int64)
    for _ in range(_ITERATIONS):
        before = labels
        labels = _nearest(embeddings, centers)
        if np.array_equal(before, labels):
            break
        sums = np.zeros_like(centers)
        np.add.at(sums, labels, embeddings)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centers = np.where(lengths > 0, sums / np.maximum(lengths, 1e-12), centers)
    firsts = [int(place) for place in np.unique(labels, return_index=True)[1]]
    taken = set(firsts)
    others = (place for place in range(len(embeddings)) if place not in taken)
    return sorted([*firsts, *(next(others) for _ in range(count - len(firsts)))])


def _nearest(embeddings: NDArray[np.float32], centers: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the nearest center of each row; a block at a time, to bound the memory."""
    return np.concatenate(
        [
            (embeddings[start : start + _BLOCK] @ centers.T).argmax(axis=1)
            for start in range(0, len(embeddings), _BLOCK)
        ]
    )
