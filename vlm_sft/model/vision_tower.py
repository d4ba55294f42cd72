"""The frozen vision tower: images to features, whichever library the encoder comes from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlm_sft.config.schema import VisionTowerConfig
from vlm_sft.data.images import ImageSpec
from vlm_sft.errors import UserError
from vlm_sft.model.hashing import named_state, tensors_digest
from vlm_sft.utils.libraries import library_call


class FeatureSource(Protocol):
    """How one family of encoders gives its features; written once a library."""

    @property
    def num_states(self) -> int:
        """States that can be chosen: for a transformer its layers + 1 (0 = embeddings)."""
        ...

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens before the patches."""
        ...

    def states(
        self, encoder: nn.Module, pixel_values: Tensor, indices: Sequence[int]
    ) -> list[Tensor]:
        """The chosen states (indices from 0), each `[N, prefix + patches, width]`."""
        ...


@dataclass(frozen=True)
class LoadedEncoder:
    """What a library's loader hands over."""

    encoder: nn.Module
    source: FeatureSource
    image_spec: ImageSpec


class VisionTower(nn.Module):
    """A frozen encoder with its feature choice.

    Always in eval mode and outside autograd; its weights never change.

    Attributes:
        image_spec: What images must look like.
        num_tokens: Tokens an image becomes.
        width: Features a token.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(self, loaded: LoadedEncoder, config: VisionTowerConfig) -> None:
        super().__init__()
        self.encoder = loaded.encoder
        self.config = config
        self.image_spec = loaded.image_spec
        self._source = loaded.source
        self._layers = _resolve_layers(config.feature_layers, loaded.source.num_states)
        self._drop = _tokens_to_drop(config, loaded.source)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.image_spec, name)).view(3, 1, 1)
            self.register_buffer(f"_{name}", values, persistent=False)
        self.requires_grad_(False)
        self.eval()
        size = self.image_spec.size
        probe = self(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        self.num_tokens: int = probe.shape[1]
        self.width: int = probe.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the encoder's weights."""
        return next(self.encoder.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the encoder's weights."""
        return next(self.encoder.parameters()).device

    def train(self, mode: bool = True) -> "VisionTower":
        """Stays in eval mode whatever is asked: dropout and batch statistics are frozen too."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` uint8 to features `[N, num_tokens, width]`, no gradient."""
        states = self._source.states(self.encoder, self.normalized(pixel_values), self._layers)
        features = torch.cat([state[:, self._drop :] for state in _same_grid(states)], dim=-1)
        if self.config.grid_pool is not None:
            features = _pool_grid(features, self.config.grid_pool)
        return features

    def normalized(self, pixel_values: Tensor) -> Tensor:
        """`(value / 255 - mean) / std` of bytes `[N, 3, H, W]`: what the encoder itself is fed.

        Computed on the tower's device in float32 (or wider, as the tower is) and then rounded to
        its dtype.

        Raises:
            TypeError: The images are not bytes; normalized ones would be normalized again.
        """
        if pixel_values.dtype != torch.uint8:
            raise TypeError(f"images must be uint8 in 0..255, found {pixel_values.dtype}")
        pixels = pixel_values.to(self.device).to(self._mean.dtype) / 255
        return ((pixels - self._mean) / self._std).to(self.dtype)

    def digest(self) -> str:
        """sha256 over every parameter and buffer: equal before and after a run."""
        return tensors_digest(named_state(self.encoder))


def build_vision_tower(
    config: VisionTowerConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> VisionTower:
    """Load (or, from `config.config`, draw from `seed`) an encoder and freeze it.

    Raises:
        UserError: If the name, folder, weights or feature choice do not fit.
    """
    if (config.name is None) == (config.config is None):
        raise UserError("model.vision_tower: give exactly one of `name` and `config`")
    load = _loader(config.library)
    key = f"model.vision_tower.{'config' if config.name is None else 'name'}"
    with library_call(config.library, key, "build this encoder and run it on one image"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            loaded = load(config)
        tower = VisionTower(loaded, config)
    cast_floating(tower, dtype)
    return tower


def cast_floating(module: nn.Module, dtype: torch.dtype) -> None:
    """Hold parameters and batch-norm statistics in `dtype`; other buffers stay as they are.

    `module.to(dtype)` would also round rotary-embedding tables, which libraries keep in float32.
    """
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for child in module.modules():
        if isinstance(child, _BatchNorm) and child.running_mean is not None:
            child.running_mean = child.running_mean.to(dtype)
            assert child.running_var is not None
            child.running_var = child.running_var.to(dtype)


class _Captured(Exception):
    """Ends an encoder's forward pass once the deepest wanted state is there."""


def capture_blocks(
    blocks: Sequence[nn.Module], run: Callable[[], Any], indices: Sequence[int]
) -> list[Tensor]:
    """States of a stack of blocks: 0 is the first block's input, i the output of block i.

    Blocks after the deepest wanted one are not run. The numbering is that of transformers'
    `hidden_states`, before any final layer norm, for all libraries alike.
    """
    wanted, found = set(indices), dict[int, Tensor]()
    deepest = max(wanted)

    def before_first(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[0] = args[0] if args else next(iter(kwargs.values()))
        if deepest == 0:
            raise _Captured

    def after(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[index] = output[0] if isinstance(output, tuple) else output
            if index == deepest:
                raise _Captured

        return hook

    handles = [blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)]
    handles += [blocks[i - 1].register_forward_hook(after(i)) for i in sorted(wanted - {0})]
    try:
        run()
    except _Captured:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [found[index] for index in indices]


@dataclass(frozen=True)
class BlockStates:
    """Features of any encoder that is one stack of blocks over a row of tokens."""

    find_blocks: Callable[[nn.Module], Sequence[nn.Module]]
    num_blocks: int
    num_prefix_tokens: int

    @property
    def num_states(self) -> int:
        """Embeddings and every block's output."""
        return self.num_blocks + 1

    def states(
        self, encoder: nn.Module, pixel_values: Tensor, indices: Sequence[int]
    ) -> list[Tensor]:
        """See `FeatureSource`."""
        return capture_blocks(self.find_blocks(encoder), lambda: encoder(pixel_values), indices)


def _loader(library: str) -> Callable[[VisionTowerConfig], LoadedEncoder]:
    # Imported here: a run needs one of the three libraries, and each takes seconds to import.
    if library == "transformers":
        from vlm_sft.model.towers.transformers import load

        return load
    if library == "open_clip":
        from vlm_sft.model.towers.open_clip import load as load_open_clip

        return load_open_clip
    from vlm_sft.model.towers.timm import load as load_timm

    return load_timm


def _resolve_layers(layers: Sequence[int], num_states: int) -> list[int]:
    for layer in layers:
        if not -num_states <= layer < num_states:
            raise UserError(
                f"model.vision_tower.feature_layers: found {layer}, expected {-num_states} to "
                f"{num_states - 1} (this encoder has {num_states} states, 0 being the first)"
            )
    return [layer % num_states for layer in layers]


def _tokens_to_drop(config: VisionTowerConfig, source: FeatureSource) -> int:
    if config.feature_select == "patch":
        return source.num_prefix_tokens
    if source.num_prefix_tokens == 0:
        raise UserError(
            "model.vision_tower.feature_select: 'cls_patch' asks for a class token and this "
            "encoder has none; use 'patch'"
        )
    if config.grid_pool is not None:
        raise UserError(
            "model.vision_tower.grid_pool: pools patches only and feature_select 'cls_patch' "
            "keeps the class token; use 'patch'"
        )
    return 0


def _same_grid(states: list[Tensor]) -> list[Tensor]:
    lengths = [state.shape[1] for state in states]
    if len(set(lengths)) > 1:
        raise UserError(
            f"model.vision_tower.feature_layers: the layers have {lengths} tokens an image; only "
            "layers of one grid can be concatenated, choose those"
        )
    return states


def _pool_grid(features: Tensor, side: int) -> Tensor:
    images, tokens, width = features.shape
    grid = round(tokens**0.5)
    if grid * grid != tokens:
        raise UserError(
            f"model.vision_tower.grid_pool: {tokens} tokens an image are no square grid; remove it"
        )
    if side > grid:
        raise UserError(
            f"model.vision_tower.grid_pool: found {side}, expected at most {grid}, the side of "
            "this tower's grid"
        )
    squares = features.transpose(1, 2).reshape(images, width, grid, grid)
    pooled = nn.functional.adaptive_avg_pool2d(squares, side)
    return pooled.flatten(2).transpose(1, 2)
