"""COCO's three ways to say which pixels belong to an object: box, polygon, run lengths."""

import numpy as np
from contourpy import contour_generator
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
"""Which pixels are the object's, [height, width]."""


def box(mask: Mask) -> tuple[float, float, float, float]:
    """Left, top, width, height in pixels of the smallest box around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return (
        float(left),
        float(top),
        float(columns[-1] + 1 - left),
        float(rows[-1] + 1 - top),
    )


def run_lengths(mask: Mask) -> dict[str, list[int]]:
    """COCO's uncompressed run-length form: columns first, starting with the unset pixels.

    Source: `pycocotools/_mask.pyx` and the data format page of cocodataset.org.
    """
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    bounds = np.concatenate(([0], edges, [flat.size]))
    counts = np.diff(bounds).tolist()
    if flat.size and flat[0]:
        counts = [0, *counts]
    return {"counts": counts, "size": [int(mask.shape[0]), int(mask.shape[1])]}


def polygons(mask: Mask, tolerance: float = 0.6) -> list[list[float]]:
    """Outlines as COCO's flat lists x1, y1, x2, y2, ... in pixels; holes are filled, as COCO does.

    Args:
        mask: The object's pixels.
        tolerance: Corners nearer than this many pixels to the simplified outline are dropped.
    """
    left, top, width, height = (int(value) for value in box(mask))
    padded = np.zeros((height + 2, width + 2), dtype=np.float64)
    padded[1:-1, 1:-1] = mask[top : top + height, left : left + width]
    lines = contour_generator(z=padded).lines(0.5)
    outlines = []
    for line in lines:
        points = np.asarray(line, dtype=np.float64)
        if _signed_area(points) <= 0:  # the inner border of a hole runs the other way round
            continue
        kept = np.clip(_simplify(points[:-1], tolerance) - 0.5, 0, (width, height))
        if len(kept) >= 3:
            outlines.append((kept + np.array([left, top])).round(2).ravel().tolist())
    return outlines or [_corners(left, top, width, height)]


def _corners(left: int, top: int, width: int, height: int) -> list[float]:
    right, bottom = float(left + width), float(top + height)
    return [float(left), float(top), right, float(top), right, bottom, float(left), bottom]


def _signed_area(points: NDArray[np.float64]) -> float:
    x, y = points[:, 0], points[:, 1]
    return float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])) / 2


def _simplify(ring: NDArray[np.float64], tolerance: float) -> NDArray[np.float64]:
    """Douglas and Peucker's line simplification (1973) of a closed ring, without recursion."""
    far = int(np.argmax(np.sum((ring - ring[0]) ** 2, axis=1)))
    closed = np.vstack((ring, ring[:1]))
    keep = np.zeros(len(closed), dtype=bool)
    keep[[0, far, len(closed) - 1]] = True
    spans = [(0, far), (far, len(closed) - 1)]
    while spans:
        start, end = spans.pop()
        if end - start < 2:
            continue
        chord = closed[end] - closed[start]
        inner = closed[start + 1 : end] - closed[start]
        length = float(np.hypot(chord[0], chord[1]))
        if length > 0:
            distance = np.abs(inner[:, 0] * chord[1] - inner[:, 1] * chord[0]) / length
        else:
            distance = np.hypot(inner[:, 0], inner[:, 1])
        worst = int(np.argmax(distance))
        if distance[worst] > tolerance:
            middle = start + 1 + worst
            keep[middle] = True
            spans += [(start, middle), (middle, end)]
    kept: NDArray[np.float64] = closed[:-1][keep[:-1]]
    return kept
