"""Group records that share an image, directly or over other records, in a few bytes per record."""

import hashlib
import os
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.digests import file_digest, hashed
from data_tools.instruct.clean.same_images import hash_image, near_pairs
from data_tools.instruct.contamination import coco_id
from data_tools.trained_images import HASH_DISTANCE
from vlm_sft.data.conversation import ImageSource
from vlm_sft.utils.escape import escape_control_line
from vlm_sft.utils.progress import track
from vlm_sft.utils.tar_index import read_member


class ImageGroups:
    """Joins records with equal images: by path, COCO id, content or perceptual hash.

    An image is opened when a record first names it; only numbers are kept of it.

    Attributes:
        counts: Distinct images by what they could be compared with: `images` (all), `missing`,
            `unreadable`.
        first: The first image of `missing` and of `unreadable`, as the records name it.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self._parents = array("Q")
        self._nodes: dict[int, int] = {}
        self._records = array("Q")
        self._hashes, self._hashed_nodes = array("Q"), array("Q")

    def add(self, key: int, images: tuple[ImageSource, ...]) -> None:
        """Add the next record; records with one `key` are in one group."""
        node = self._node("record", key)
        for image in images:
            self._join(node, self._image(image))
        self._records.append(node)

    def numbers(self) -> NDArray[np.uint64]:
        """Return the number of each record's group, in the order in which they were added."""
        self._join_similar()
        return np.array([self._root(node) for node in self._records], np.uint64)

    def _image(self, image: ImageSource) -> int:
        """Return the node of an image, joined with all that has its id, content or hash."""
        if isinstance(image, bytes):
            digest, known = hashlib.sha256(image).hexdigest(), len(self._parents)
            node = self._node("content", digest)
            if node == known:
                self._open(node, image)
            return node
        known = len(self._parents)
        node = self._node("path", os.path.realpath(image))
        if node != known:
            return node
        if (number := coco_id(image)) is not None:
            self._join(node, self._node("COCO id", number))
        inside = _member(image)
        if inside is None and not image.is_file():
            self.counts.update(images=1, missing=1)
            self.first.setdefault("missing", escape_control_line(str(image), 300))
            return node
        before = len(self._parents)
        digest = file_digest(image) if inside is None else hashlib.sha256(inside).hexdigest()
        same = self._node("content", digest)
        self._join(node, same)
        if same == before:
            self._open(same, image if inside is None else inside)
        else:
            self.counts["images"] += 1
        return node

    def _open(self, node: int, image: Path | bytes) -> None:
        self.counts["images"] += 1
        value = hash_image(image)
        if isinstance(value, int):
            self._hashes.append(value)
            self._hashed_nodes.append(node)
        else:
            self.counts["unreadable"] += 1
            name = f"one inside a record: {value}" if isinstance(image, bytes) else str(image)
            name = escape_control_line(name, 300)
            self.first.setdefault("unreadable", name)

    def _join_similar(self) -> None:
        """Join images whose perceptual hashes differ in few bits."""
        if not self._hashes:
            return
        hashes, nodes = np.array(self._hashes, np.uint64), np.array(self._hashed_nodes, np.uint64)
        values, first, which = np.unique(hashes, return_index=True, return_inverse=True)
        for node, value in zip(nodes.tolist(), which.tolist(), strict=True):
            self._join(node, int(nodes[first[value]]))
        near = near_pairs(values, HASH_DISTANCE)
        for value, others in track(near.items(), len(near), "joining similar images"):
            for other in others:
                self._join(int(nodes[first[value]]), int(nodes[first[other]]))

    def _node(self, *name: object) -> int:
        """Return the node of a name, a new one at first."""
        node = self._nodes.setdefault(hashed(*name), len(self._parents))
        if node == len(self._parents):
            self._parents.append(node)
        return node

    def _root(self, node: int) -> int:
        parents = self._parents
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    def _join(self, first: int, second: int) -> None:
        low, high = sorted((self._root(first), self._root(second)))
        self._parents[high] = low


def _member(image: Path) -> bytes | None:
    """Return an image inside a tar file; None if it is not in one, or missing there."""
    try:
        return read_member(image)
    except FileNotFoundError:
        return None
