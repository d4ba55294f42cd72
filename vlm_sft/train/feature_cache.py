"""`data.feature_cache`: compute the features of the frozen tower once and keep them on disk."""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from vlm_sft.checkpoint.run_dir import CACHE_ESTIMATE
from vlm_sft.config.schema import DataConfig, RunConfig
from vlm_sft.data.build import Data
from vlm_sft.data.conversation import ImageSource
from vlm_sft.data.dataset import SupervisedDataset
from vlm_sft.data.feature_store import FeatureStore, disk_use, feature_key, remove_stale
from vlm_sft.data.image_layout import ImageLayout
from vlm_sft.data.images import read_bytes
from vlm_sft.data.loader import lost_worker_errors, outlive_stop_signals, usable_workers
from vlm_sft.errors import ImageError, UserError
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.quantization import num_weights
from vlm_sft.model.vision_tower import VisionTower
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.distributed import all_reduce_sum, rank0_only
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.filesystem import existing_above, free_bytes
from vlm_sft.utils.progress import track

logger = logging.getLogger(__name__)

FILL_BATCH: Final = 16
"""Batch size of the tower while the cache is filled."""

CODE: Final = (
    "data/images.py",
    "data/image_layout.py",
    "model/vision_tower.py",
    "model/towers/base.py",
    "model/towers/{library}.py",
)
"""Source files on which the features of an image depend."""


@dataclass(frozen=True)
class CacheEstimate:
    """Estimate of the FLOPs that cached features save in a run, and of their size on disk.

    Attributes:
        tower_flops: FLOPs of one crop of an image through the tower.
        record_flops: FLOPs of one record through the rest of the model, forward and backward.
        records: Records of an epoch.
        crops: Crops of the images of an epoch, repetitions counted.
        missing: Number of different images without features.
        missing_crops: Their crops.
        epochs: Epochs of this run.
        num_bytes: Bytes on disk of the missing features.
    """

    tower_flops: float
    record_flops: float
    records: float
    crops: float
    missing: int
    missing_crops: int
    epochs: float
    num_bytes: int

    @property
    def tower_share(self) -> float:
        """Share of the tower in the FLOPs of a step without the cache, 0 to 1."""
        tower = self.tower_flops * self.crops
        return tower / max(1.0, tower + self.record_flops * self.records)

    @property
    def break_even_epochs(self) -> float:
        """Epochs after which the cache has saved as many FLOPs as filling it costs."""
        return self.missing_crops / max(1.0, self.crops)

    @property
    def saved(self) -> float:
        """Share of the run's FLOPs that the cache saves; negative if filling it costs more."""
        without = self.epochs * (self.tower_flops * self.crops + self.record_flops * self.records)
        shown = self.epochs * self.crops - self.missing_crops
        return self.tower_flops * shown / max(1.0, without)

    def __str__(self) -> str:
        effect = f"saves about {self.saved:.1%} of its FLOPs"
        if abs(self.saved) < 0.001:
            effect = "takes the same FLOPs with it as without"
        elif self.saved < 0:
            effect = f"costs about {-self.saved:.1%} more of its FLOPs than it saves"
        return (
            f"feature cache: the tower takes about {self.tower_share:.1%} of a step's FLOPs; "
            f"{self.missing:,} different images to compute, {_format_bytes(self.num_bytes)} on "
            f"disk; breaks even after {self.break_even_epochs:.2f} epochs; this run "
            f"has {self.epochs:.3g} and {effect} (time to read the disk not counted)"
        )


def use_feature_cache(
    config: RunConfig, model: VisionLanguageModel, accelerator: Accelerator, data: Data
) -> None:
    """Make the datasets load features from `data.feature_cache` in place of images, if it is set.

    Missing features are computed first, distributed over the ranks, after rank 0 has logged what
    they cost and save. An image that cannot be opened is left to training, which handles it as it
    does without the cache.

    Raises:
        UserError: If the features do not fit into `data.feature_cache_gb` or on the disk, or the
            directory cannot be written.
    """
    if config.data.feature_cache is None:
        return
    found = _look_up(config, model, accelerator, data)
    store, missing = found.store, found.missing
    note = Path(config.output_dir) / CACHE_ESTIMATE
    # That of the start that filled the cache stays; it costs a forward pass of the tower.
    if missing or not rank0_only(accelerator, note.exists):
        estimate = _estimate(config, model, data, found)
        rank0_only(accelerator, lambda: _write_estimate(estimate, note))
    if missing:
        rank0_only(accelerator, lambda: _prepare_filling(estimate, config.data, store))
        _run_on_all_ranks(
            accelerator,
            lambda: _fill(store, model.vision_tower, accelerator, config.data, missing),
        )
    for dataset, digests in zip(found.datasets, found.digests, strict=True):
        readable = {digest for digest in digests if digest is not None}
        cached = {
            digest
            for digest in readable
            if digest not in missing or store.holds(digest, missing[digest].layout.num_crops)
        }
        dataset.use_features(store, [d if d in cached else None for d in digests])
    logger.info("feature cache: %s images from %s", f"{found.num_images:,}", store.folder)


def feature_cache_outlook(
    config: RunConfig, model: VisionLanguageModel, accelerator: Accelerator, data: Data
) -> str:
    """Return what `use_feature_cache` would log, without computing or writing features.

    Raises:
        UserError: See `use_feature_cache`.
    """
    found = _look_up(config, model, accelerator, data)
    if not found.missing:
        return f"all {found.num_images:,} images are in {found.store.folder}"
    estimate = _estimate(config, model, data, found)
    _require_space(estimate, config.data, found.store)
    return str(estimate).removeprefix("feature cache: ")


class _Missing(NamedTuple):
    """An image without features."""

    dataset: SupervisedDataset
    number: int
    layout: ImageLayout


@dataclass(frozen=True)
class _Lookup:
    """Which images of a run have features in the cache.

    Attributes:
        store: The features of the run's tower.
        datasets: The training records, then the validation records if there are any.
        digests: Key of each dataset's images, in order; None where a file cannot be read.
        missing: Images without features, by key: a dataset, the image's number in it, and its
            layout.
    """

    store: FeatureStore
    datasets: Sequence[SupervisedDataset]
    digests: Sequence[Sequence[bytes | None]]
    missing: Mapping[bytes, _Missing]

    @property
    def num_images(self) -> int:
        """Number of different images."""
        return len({d for digests in self.digests for d in digests if d is not None})


def _look_up(
    config: RunConfig, model: VisionLanguageModel, accelerator: Accelerator, data: Data
) -> _Lookup:
    """Move the tower to the run's device and find which images have features."""
    store = open_store(config.data, model.vision_tower.to(accelerator.device), accelerator)
    datasets = [data.train] if data.eval is None else [data.train, data.eval]
    digests = [_digests(dataset) for dataset in datasets]
    return _Lookup(store, datasets, digests, _missing(store, datasets, digests))


def open_store(config: DataConfig, tower: VisionTower, accelerator: Accelerator) -> FeatureStore:
    """Open the store for the features of this tower, with this preprocessing, on this device."""
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
    """Return the key of every image's features, in order; None where it cannot be read."""
    by_file: dict[ImageSource, bytes | None] = {}
    digests: list[bytes | None] = []
    images = track(dataset.images(), sum(dataset.num_images), "hashing images")
    for source, layout in zip(images, dataset.all_layouts(), strict=True):
        if isinstance(source, bytes):
            digest = _digest(source)
        else:
            if source not in by_file:
                by_file[source] = _digest(source)
            digest = by_file[source]
        digests.append(None if digest is None else feature_key(digest, layout))
    return digests


def _digest(source: ImageSource) -> bytes | None:
    try:
        return hashlib.sha256(read_bytes(source)).digest()
    except ImageError:
        return None


def _missing(
    store: FeatureStore,
    datasets: Sequence[SupervisedDataset],
    digests: Sequence[Sequence[bytes | None]],
) -> dict[bytes, _Missing]:
    """Return the first image of each key without features."""
    images: dict[bytes, _Missing] = {}
    for dataset, found in zip(datasets, digests, strict=True):
        for number, (digest, layout) in enumerate(zip(found, dataset.all_layouts(), strict=True)):
            if digest is not None and digest not in images:
                images[digest] = _Missing(dataset, number, layout)
    return {
        digest: image
        for digest, image in images.items()
        if not store.holds(digest, image.layout.num_crops)
    }


def _estimate(
    config: RunConfig, model: VisionLanguageModel, data: Data, found: _Lookup
) -> CacheEstimate:
    weights, train = np.array(data.train.weights), data.train
    missing_crops = [image.layout.num_crops for image in found.missing.values()]
    epochs, records = config.train.epochs, float(weights.sum())
    if config.train.max_steps is not None:
        steps = config.train.max_steps * config.train.global_batch_size
        epochs = min(epochs, steps / records)
    tokens = float((weights * np.array(train.lengths)).sum()) / records
    return CacheEstimate(
        tower_flops=tower_flops(model.vision_tower),
        record_flops=tokens * token_flops(model, config.train.activation_checkpointing == "full"),
        records=records,
        crops=float((weights * np.array(train.num_crops)).sum()),
        missing=len(missing_crops),
        missing_crops=sum(missing_crops),
        epochs=epochs,
        num_bytes=sum(map(found.store.entry_bytes, missing_crops)),
    )


def tower_flops(tower: VisionTower) -> float:
    """Return the FLOPs of one crop through the tower, counted in a forward pass."""
    size = tower.image_spec.size
    with FlopCounterMode(display=False) as counter:
        tower(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    return float(counter.get_total_flops())


def token_flops(model: VisionLanguageModel, checkpointing: bool) -> float:
    """Return the FLOPs of one token through the language model's layers, forward and backward.

    2 FLOPs per weight in each pass: forward, gradient of the activations, gradient of the weights
    if they are trained, and the forward pass again with activation checkpointing. Head and
    attention, a few percent of the total, are not counted.
    """
    language_model = causal_lm(model.language_model)
    tables = {id(language_model.get_input_embeddings().weight)}
    if (head := language_model.get_output_embeddings()) is not None:
        tables.add(id(head.weight))
    layers = [p for p in language_model.parameters() if id(p) not in tables]
    all_weights = float(sum(num_weights(p) for p in layers))
    trainable = float(sum(num_weights(p) for p in layers if p.requires_grad))
    return 2 * (all_weights * (2 + checkpointing) + trainable)


def _write_estimate(estimate: CacheEstimate, path: Path) -> None:
    shares = {"tower_share": estimate.tower_share, "saved": estimate.saved}
    write_json(path, asdict(estimate) | shares)


def _prepare_filling(estimate: CacheEstimate, config: DataConfig, store: FeatureStore) -> None:
    """Log the estimate, check for space, and mark the directory as a cache.

    Raises:
        UserError: See `_require_space`.
    """
    assert config.feature_cache is not None
    logger.info(estimate)
    _require_space(estimate, config, store)
    store.describe()
    remove_stale(config.feature_cache)


def _require_space(estimate: CacheEstimate, config: DataConfig, store: FeatureStore) -> None:
    """Check the cache directory, its limit and the disk, without changing anything.

    Raises:
        UserError: If the directory is not a cache or cannot be written, or the features take more
            than `data.feature_cache_gb` or than the disk has free.
    """
    assert config.feature_cache is not None
    store.require_place()
    used, limit = disk_use(config.feature_cache), int(config.feature_cache_gb * 1e9)
    if used + estimate.num_bytes > limit:
        raise UserError(
            f"data.feature_cache: {config.feature_cache} has {_format_bytes(used)} and needs "
            f"{_format_bytes(estimate.num_bytes)} more, but data.feature_cache_gb allows "
            f"{config.feature_cache_gb:g} GB; raise it, delete the directories of other towers "
            "there, or remove data.feature_cache",
            code="feature_cache_full",
        )
    free = free_bytes(existing_above(Path(config.feature_cache)))
    if free is not None and estimate.num_bytes > free:
        raise UserError(
            f"data.feature_cache: {config.feature_cache} has {_format_bytes(free)} free and "
            f"{_format_bytes(estimate.num_bytes)} are needed; free disk space, choose another "
            "directory, or remove data.feature_cache",
            code="feature_cache_full",
        )


def _fill(
    store: FeatureStore,
    tower: VisionTower,
    accelerator: Accelerator,
    config: DataConfig,
    missing: Mapping[bytes, _Missing],
) -> None:
    """Compute this rank's share of the missing features."""
    mine = list(missing.items())[accelerator.process_index :: accelerator.num_processes]
    # Runs that fill one directory at once start at different images and skip what they find.
    start = os.getpid() % max(1, len(mine))
    missing_images = _MissingImages(mine[start:] + mine[:start], store)
    loader = DataLoader(
        missing_images,
        batch_size=FILL_BATCH,
        num_workers=usable_workers(config.num_workers),
        collate_fn=list,
        worker_init_fn=outlive_stop_signals,
        generator=torch.Generator(),
    )
    with lost_worker_errors():
        for batch in track(loader, len(loader), f"computing features, {FILL_BATCH} images each"):
            images = [item for item in batch if item is not None]
            if not images:
                continue
            crops = [pixels for _, pixels in images]
            with accelerator.autocast():
                # Not all crops at once: an image can have dozens.
                features = torch.cat([tower(some) for some in torch.cat(crops).split(FILL_BATCH)])
            found = features.split([len(pixels) for pixels in crops])
            for (digest, _), image_features in zip(images, found, strict=True):
                store.write(digest, image_features)


class _MissingImages(Dataset["tuple[bytes, Tensor] | None"]):
    """Crops by key; None for an image that is broken, has changed, or has features by now."""

    def __init__(self, missing: Sequence[tuple[bytes, _Missing]], store: FeatureStore) -> None:
        self._missing, self._store = missing, store

    def __len__(self) -> int:
        return len(self._missing)

    def __getitem__(self, index: int) -> tuple[bytes, Tensor] | None:
        digest, (dataset, number, layout) = self._missing[index]
        if self._store.holds(digest, layout.num_crops):
            return None
        try:
            data = read_bytes(dataset.image(number))
            found = dataset.crops(number, data)
        except ImageError:  # training opens it again and reports the error
            return None
        key = feature_key(hashlib.sha256(data).digest(), found.layout)
        return (digest, found.pixels) if key == digest else None


def _run_on_all_ranks(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Run `work` on every rank and wait for all of them.

    Raises:
        UserError: On every rank, if any of them failed.
    """
    failure: UserError | None = None
    try:
        work()
    except UserError as error:
        failure = error
    failed = torch.tensor(int(failure is not None), device=accelerator.device)
    count = int(all_reduce_sum(accelerator, failed))
    if failure is not None:
        raise failure
    if count:
        raise UserError(
            "data.feature_cache: another rank could not fill it; see that rank's error message",
            code="cache_unusable",
        )


def _format_bytes(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"
