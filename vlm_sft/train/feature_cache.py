"""`data.feature_cache`: a frozen tower's features computed once, worth it or not, and kept."""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Final

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from vlm_sft.config.schema import DataConfig, RunConfig
from vlm_sft.data.build import Data
from vlm_sft.data.conversation import ImageSource
from vlm_sft.data.dataset import SupervisedDataset
from vlm_sft.data.feature_store import FeatureStore, disk_use, remove_stale
from vlm_sft.data.images import ImageSpec, read_bytes, read_pixels
from vlm_sft.data.loader import lost_worker_errors
from vlm_sft.errors import ImageError, UserError
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.quantization import num_weights
from vlm_sft.model.vision_tower import VisionTower
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.distributed import rank0_only, total
from vlm_sft.utils.filesystem import existing_above, free_bytes
from vlm_sft.utils.progress import track

logger = logging.getLogger(__name__)

FILL_BATCH: Final = 16
"""Images that go through the tower at once while the cache is filled."""

CODE: Final = (
    "data/images.py",
    "model/vision_tower.py",
    "model/towers/base.py",
    "model/towers/{library}.py",
)
"""Files of this package that decide what an image's features are."""


@dataclass(frozen=True)
class Worth:
    """What keeping features saves of the arithmetic of a run, and what it costs on disk.

    Attributes:
        tower_flops: Of one image through the tower.
        record_flops: Of one record through the rest, forward and backward.
        records: Records of an epoch.
        images: Images shown in an epoch.
        missing: Different images that are not kept yet.
        epochs: That this run trains for.
        num_bytes: Disk that the missing ones will take.
    """

    tower_flops: float
    record_flops: float
    records: float
    images: float
    missing: int
    epochs: float
    num_bytes: int

    @property
    def tower_share(self) -> float:
        """What of a step's arithmetic the tower takes without the cache, 0..1."""
        tower = self.tower_flops * self.images
        return tower / max(1.0, tower + self.record_flops * self.records)

    @property
    def break_even_epochs(self) -> float:
        """Epochs after which filling the cache has been saved again."""
        return self.missing / max(1.0, self.images)

    @property
    def saved(self) -> float:
        """What of the whole run's arithmetic is saved, 0..1; below 0 it is lost."""
        without = self.epochs * (self.tower_flops * self.images + self.record_flops * self.records)
        shown = self.epochs * self.images - self.missing
        return self.tower_flops * shown / max(1.0, without)

    def __str__(self) -> str:
        verdict = f"saves about {self.saved:.1%} of this run's arithmetic"
        if self.saved <= 0:
            verdict = f"costs about {-self.saved:.1%} more arithmetic than it saves in this run"
        return (
            f"feature cache: the tower is about {self.tower_share:.1%} of a step's arithmetic; "
            f"{self.missing:,} different images are to be computed, {_told(self.num_bytes)} on "
            f"disk; that pays from {self.break_even_epochs:.2f} epochs on and, over "
            f"{self.epochs:.3g} epochs, {verdict} (reading the disk not counted)"
        )


def use_feature_cache(
    config: RunConfig, model: VisionLanguageModel, accelerator: Accelerator, data: Data
) -> None:
    """Have the records' features, not their images, loaded from `data.feature_cache`, if set.

    Features that are not there yet are computed first, shared out over the processes; before that
    the first process says what they take and what they save. An image that cannot be opened is
    left to training, which deals with it as without the cache.

    Raises:
        UserError: No room, within `data.feature_cache_gb` or on the disk, or the folder is not to
            be written.
    """
    if config.data.feature_cache is None:
        return
    found = _look_up(config, model, accelerator, data)
    store, missing = found.store, found.missing
    if missing:
        worth = _worth(config, model, data, missing=len(missing), num_bytes=store.entry_bytes)
        rank0_only(accelerator, lambda: _announce(worth, config.data, store))
        _together(
            accelerator,
            lambda: _fill(store, model.vision_tower, accelerator, config.data, missing),
        )
    for dataset, digests in zip(found.datasets, found.digests, strict=True):
        there = {digest for digest in digests if digest is not None}
        kept = {digest for digest in there if digest not in missing or store.holds(digest)}
        dataset.use_features(store, [d if d in kept else None for d in digests])
    logger.info("feature cache: %s images from %s", f"{found.num_images:,}", store.folder)


def feature_cache_outlook(
    config: RunConfig, model: VisionLanguageModel, accelerator: Accelerator, data: Data
) -> str:
    """Return what `use_feature_cache` would report, without computing or writing features.

    Raises:
        UserError: As `use_feature_cache`.
    """
    found = _look_up(config, model, accelerator, data)
    if not found.missing:
        return f"all {found.num_images:,} images are in {found.store.folder}"
    num_missing, num_bytes = len(found.missing), found.store.entry_bytes
    worth = _worth(config, model, data, missing=num_missing, num_bytes=num_bytes)
    _require_room(worth, config.data, found.store)
    return str(worth).removeprefix("feature cache: ")


@dataclass(frozen=True)
class _Found:
    """A run's images in the cache.

    Attributes:
        store: The tower's features.
        datasets: Training records, then held-out ones if there are any.
        digests: Of each dataset's images, in order; None where a file cannot be read.
        missing: Images without features, by digest: a dataset and a place in it.
    """

    store: FeatureStore
    datasets: Sequence[SupervisedDataset]
    digests: Sequence[Sequence[bytes | None]]
    missing: Mapping[bytes, tuple[SupervisedDataset, int]]

    @property
    def num_images(self) -> int:
        """Number of different images."""
        return len({d for digests in self.digests for d in digests if d is not None})


def _look_up(
    config: RunConfig, model: VisionLanguageModel, accelerator: Accelerator, data: Data
) -> _Found:
    """Move the tower to the run's device and find which images have features."""
    store = open_store(config.data, model.vision_tower.to(accelerator.device), accelerator)
    datasets = [data.train] if data.eval is None else [data.train, data.eval]
    digests = [_digests(dataset) for dataset in datasets]
    return _Found(store, datasets, digests, _missing(store, datasets, digests))


def open_store(config: DataConfig, tower: VisionTower, accelerator: Accelerator) -> FeatureStore:
    """The store of what this tower makes of images prepared as `config` says, on this device."""
    assert config.feature_cache is not None
    size = tower.image_spec.size
    blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=tower.device)
    with accelerator.autocast():
        features = tower(blank)[0]
    tokens, width = features.shape
    return FeatureStore(
        config.feature_cache,
        {
            "tower": tower.digest(),
            "features": {
                "library": tower.library,
                "feature_layers": tower.feature_layers,
                "feature_select": tower.feature_select,
                "grid_pool": tower.grid_pool,
            },
            "image_spec": asdict(tower.image_spec),
            "image_aspect": config.image_aspect,
            "image_processing": config.image_processing,
            "mixed_precision": str(accelerator.mixed_precision),
            "device": tower.device.type,
            "code": _code_digest(tower.library),
            "libraries": {name: metadata.version(name) for name in _libraries(tower)},
        },
        shape=(tokens, width),
        dtype=features.dtype,
    )


def _libraries(tower: VisionTower) -> list[str]:
    own = {"open_clip": "open_clip_torch"}.get(tower.library, tower.library)
    return ["torch", "pillow", "simplejpeg", own]


def _code_digest(library: str) -> str:
    package = resources.files("vlm_sft")
    files = (package.joinpath(name.format(library=library)) for name in CODE)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _digests(dataset: SupervisedDataset) -> list[bytes | None]:
    """sha256 of every image's bytes, in the dataset's order; None where they cannot be read."""
    of_files: dict[ImageSource, bytes | None] = {}
    found: list[bytes | None] = []
    for source in track(dataset.images(), sum(dataset.num_images), "hashing images"):
        if isinstance(source, bytes):
            found.append(_digest(source))
            continue
        if source not in of_files:
            of_files[source] = _digest(source)
        found.append(of_files[source])
    return found


def _digest(source: ImageSource) -> bytes | None:
    try:
        return hashlib.sha256(read_bytes(source)).digest()
    except ImageError:
        return None


def _missing(
    store: FeatureStore,
    datasets: Sequence[SupervisedDataset],
    digests: Sequence[Sequence[bytes | None]],
) -> dict[bytes, tuple[SupervisedDataset, int]]:
    """Where the first image of each digest that is not kept stands."""
    places: dict[bytes, tuple[SupervisedDataset, int]] = {}
    for dataset, found in zip(datasets, digests, strict=True):
        for place, digest in enumerate(found):
            if digest is not None:
                places.setdefault(digest, (dataset, place))
    return {digest: place for digest, place in places.items() if not store.holds(digest)}


def _worth(
    config: RunConfig, model: VisionLanguageModel, data: Data, *, missing: int, num_bytes: int
) -> Worth:
    weights, train = np.array(data.train.weights), data.train
    images = np.array(train.num_images)
    epochs, records = config.train.epochs, float(weights.sum())
    if config.train.max_steps is not None:
        steps = config.train.max_steps * config.train.global_batch_size
        epochs = min(epochs, steps / records)
    tokens = float((weights * np.array(train.lengths)).sum()) / records
    return Worth(
        tower_flops=tower_flops(model.vision_tower),
        record_flops=tokens * token_flops(model, config.train.activation_checkpointing == "full"),
        records=records,
        images=float((weights * images).sum()),
        missing=missing,
        epochs=epochs,
        num_bytes=missing * num_bytes,
    )


def tower_flops(tower: VisionTower) -> float:
    """Floating-point operations of one image through the tower, counted as it is run."""
    size = tower.image_spec.size
    with FlopCounterMode(display=False) as counter:
        tower(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    return float(counter.get_total_flops())


def token_flops(model: VisionLanguageModel, checkpointing: bool) -> float:
    """Operations of one token through the language model's layers, forward and backward.

    Two a parameter for each pass: forward, gradient of the activations, gradient of the weights
    where they learn, and the forward pass again with checkpointing. Head and attention, a few per
    cent of it, are left out.
    """
    live = causal_lm(model.language_model)
    tables = {id(live.get_input_embeddings().weight)}
    if (head := live.get_output_embeddings()) is not None:
        tables.add(id(head.weight))
    layers = [p for p in live.parameters() if id(p) not in tables]
    everything = float(sum(num_weights(p) for p in layers))
    learning = float(sum(num_weights(p) for p in layers if p.requires_grad))
    return 2 * (everything * (2 + checkpointing) + learning)


def _announce(worth: Worth, config: DataConfig, store: FeatureStore) -> None:
    """Report what is to come, refuse what has no room, and mark the directory.

    Raises:
        UserError: As `_require_room`.
    """
    assert config.feature_cache is not None
    logger.info(worth)
    _require_room(worth, config, store)
    store.describe()
    remove_stale(config.feature_cache)


def _require_room(worth: Worth, config: DataConfig, store: FeatureStore) -> None:
    """Check the cache directory, its limit and the disk, without changing anything.

    Raises:
        UserError: The directory is not ours or cannot be written, or the features take more than
            `data.feature_cache_gb` or than the disk has free.
    """
    assert config.feature_cache is not None
    store.require_place()
    used, limit = disk_use(config.feature_cache), int(config.feature_cache_gb * 1e9)
    if used + worth.num_bytes > limit:
        raise UserError(
            f"data.feature_cache: {config.feature_cache} holds {_told(used)} and would take "
            f"{_told(worth.num_bytes)} more, but data.feature_cache_gb allows "
            f"{config.feature_cache_gb:g} GB; raise it, remove folders of other towers from there, "
            "or leave data.feature_cache out",
            code="feature_cache_full",
        )
    free = free_bytes(existing_above(Path(config.feature_cache)))
    if free is not None and worth.num_bytes > free:
        raise UserError(
            f"data.feature_cache: {config.feature_cache} has {_told(free)} free and "
            f"{_told(worth.num_bytes)} are needed; make room, give another folder, or leave "
            "data.feature_cache out",
            code="feature_cache_full",
        )


def _fill(
    store: FeatureStore,
    tower: VisionTower,
    accelerator: Accelerator,
    config: DataConfig,
    missing: Mapping[bytes, tuple[SupervisedDataset, int]],
) -> None:
    """Compute this process's share of the missing features."""
    mine = list(missing.items())[accelerator.process_index :: accelerator.num_processes]
    # Runs that fill one folder at once begin at different places and skip what they find.
    start = os.getpid() % max(1, len(mine))
    images = _Images(mine[start:] + mine[:start], store, tower.image_spec, config)
    loader = DataLoader(
        images,
        batch_size=FILL_BATCH,
        num_workers=config.num_workers,
        collate_fn=list,
        generator=torch.Generator(),
    )
    with lost_worker_errors():
        for batch in track(loader, len(loader), f"computing features, {FILL_BATCH} images each"):
            made = [item for item in batch if item is not None]
            if not made:
                continue
            with accelerator.autocast():
                features = tower(torch.stack([square for _, square in made]))
            for (digest, _), kept in zip(made, features, strict=True):
                store.write(digest, kept)


class _Images(Dataset["tuple[bytes, Tensor] | None"]):
    """Images by digest; None for one that is no image, has changed, or is kept by now."""

    def __init__(
        self,
        missing: Sequence[tuple[bytes, tuple[SupervisedDataset, int]]],
        store: FeatureStore,
        spec: ImageSpec,
        config: DataConfig,
    ) -> None:
        self._missing, self._store, self._spec, self._config = missing, store, spec, config

    def __len__(self) -> int:
        return len(self._missing)

    def __getitem__(self, index: int) -> tuple[bytes, Tensor] | None:
        digest, (dataset, place) = self._missing[index]
        if self._store.holds(digest):
            return None
        aspect, processing = self._config.image_aspect, self._config.image_processing
        try:
            data = read_bytes(dataset.image(place))
            square = read_pixels(data, self._spec, aspect, processing)
        except ImageError:  # training opens it again and says what is wrong
            return None
        return (digest, square) if hashlib.sha256(data).digest() == digest else None


def _together(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Do `work` in every process; all wait for all, and none goes on where one has failed."""
    failure: UserError | None = None
    try:
        work()
    except UserError as error:
        failure = error
    failed = torch.tensor(int(failure is not None), device=accelerator.device)
    count = int(total(accelerator, failed))
    if failure is not None:
        raise failure
    if count:
        raise UserError(
            "data.feature_cache: another process could not fill it; its own message says why",
            code="cache_unusable",
        )


def _told(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"
