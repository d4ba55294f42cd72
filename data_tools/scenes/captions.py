"""Five sentences about a scene, each true, in varied wording."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_tools import wording
from data_tools.coco import AnnotatedImage, Box
from data_tools.geometry import order, region
from data_tools.scenes.compose import Instance, Scene
from vlm_sft.utils import words

CAPTIONS_PER_SCENE = 5


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
    """Return five captions, each true; most name everything in the scene."""
    texts = wording.load("scene_captions")
    kinds = _kinds(scene.instances)
    if not kinds:
        place = texts["places"][scene.background]
        return [f"There is nothing {place}."] * CAPTIONS_PER_SCENE
    captions: list[str] = []
    neighbors = _neighbors(scene, rng)
    if neighbors:
        captions.append(neighbors)
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


def _neighbors(scene: Scene, rng: np.random.Generator) -> str | None:
    """Return a sentence about two single objects side by side, where there are such."""
    single = {kind.name for kind in _kinds(scene.instances) if not kind.several}
    boxes = tuple(
        Box(instance.category.name, *instance.box(), crowd=False)
        for instance in scene.instances
        if instance.category.name in single
    )
    image = AnnotatedImage(scene.index, "", scene.width, scene.height, (), boxes)
    pairs = [
        (left, right)
        for left in boxes
        for right in boxes
        if left is not right and order(left, right, "left", image) == "supported"
    ]
    if not pairs:
        return None
    first, second = pairs[int(rng.integers(len(pairs)))]
    texts = wording.load("scene_captions")
    halves = region(first, "left", image), region(second, "right", image)
    patterns = texts["beside"] + (texts["sides"] if set(halves) == {"supported"} else [])
    one, other = words.counted(first.category, 1), words.counted(second.category, 1)
    values = {"A": words.capital(one), "b": other, "be": words.be_one(first.category)}
    return str(rng.choice(patterns)).format(**values)


def _kinds(instances: Sequence[Instance]) -> list[_Kind]:
    kinds = {}
    for name in dict.fromkeys(instance.category.name for instance in instances):
        same = [instance for instance in instances if instance.category.name == name]
        kinds[name] = _Kind(name, len(same), any(instance.crowd for instance in same))
    return list(kinds.values())
