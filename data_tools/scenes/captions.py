"""Five sentences about a scene, each true, in varied wording."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_tools import wording, words
from data_tools.scenes.compose import Instance, Scene

CAPTIONS_PER_SCENE = 5
SIDE_MARGIN = 0.05
"""Two objects are left and right of each other if this share of the width lies between them."""


@dataclass(frozen=True)
class _Kind:
    name: str
    count: int
    crowd: bool

    def phrase(self, rng: np.random.Generator) -> str:
        if self.crowd:
            start = rng.choice(["many", "a crowd of", "lots of", "a group of"])
            return f"{start} {words.plural(self.name)}"
        return words.counted(self.name, self.count)

    @property
    def several(self) -> bool:
        return self.crowd or self.count > 1


def describe(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Five captions. Every one names true things only; most name everything there is."""
    texts = wording.load("scene_captions")
    kinds = _kinds(scene.instances)
    if not kinds:
        place = texts["places"][scene.background]
        return [f"There is nothing {place}."] * CAPTIONS_PER_SCENE
    captions: list[str] = []
    beside = _beside(scene, rng)
    if beside:
        captions.append(beside)
    patterns = [str(text) for text in rng.permutation(texts["plain"])[:2]]
    patterns += [str(text) for text in rng.permutation(texts["background"])]
    for pattern in patterns[: CAPTIONS_PER_SCENE - len(captions)]:
        order = [kinds[i] for i in rng.permutation(len(kinds))]
        captions.append(_fill(pattern, order, texts["places"][scene.background], rng))
    return captions


def _fill(pattern: str, kinds: Sequence[_Kind], place: str, rng: np.random.Generator) -> str:
    things = words.listed([kind.phrase(rng) for kind in kinds])
    return pattern.format(
        things=things,
        Things=words.capital(things),
        place=place,
        are="are" if kinds[0].several else words.be_one(kinds[0].name),
    )


def _beside(scene: Scene, rng: np.random.Generator) -> str | None:
    """A sentence about two single objects far enough apart, where there are such."""
    single = {kind.name for kind in _kinds(scene.instances) if not kind.several}
    placed = [
        (instance.category.name, instance.box())
        for instance in scene.instances
        if instance.category.name in single
    ]
    pairs = [
        (left[0], right[0])
        for left in placed
        for right in placed
        if left[1][0] + left[1][2] + SIDE_MARGIN * scene.width <= right[1][0]
    ]
    if not pairs:
        return None
    first, second = pairs[int(rng.integers(len(pairs)))]
    pattern = str(rng.choice(wording.load("scene_captions")["beside"]))
    pattern = pattern.replace("{A} is", f"{{A}} {words.be_one(first)}")
    return pattern.format(A=words.capital(words.counted(first, 1)), b=words.counted(second, 1))


def _kinds(instances: Sequence[Instance]) -> list[_Kind]:
    kinds = {}
    for name in dict.fromkeys(instance.category.name for instance in instances):
        same = [instance for instance in instances if instance.category.name == name]
        kinds[name] = _Kind(name, len(same), any(instance.crowd for instance in same))
    return list(kinds.values())
