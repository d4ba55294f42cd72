"""What the loaders of the three libraries share: taking features from an encoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from vlm_sft.data.images import ImageSpec


class FeatureSource(Protocol):
    """How to get hidden states out of one family of encoders."""

    @property
    def num_states(self) -> int:
        """Number of states to choose from; for a transformer layers + 1 (0 is the embeddings)."""
        ...

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens before the patches."""
        ...

    def states(
        self, encoder: nn.Module, pixel_values: Tensor, indices: Sequence[int]
    ) -> list[Tensor]:
        """Return the states of these indices (from 0), each `[N, prefix + patches, width]`.

        Args:
            encoder: The encoder that this source belongs to.
            pixel_values: `[N, 3, H, W]`, normalized.
            indices: At least one.
        """
        ...


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder with what its library says about it.

    Attributes:
        encoder: The image encoder alone, without text tower or classifier.
        source: How features are taken from it.
        image_spec: Size and normalization of its input images.
    """

    encoder: nn.Module
    source: FeatureSource
    image_spec: ImageSpec


@dataclass(frozen=True)
class BlockStates:
    """States of an encoder that is one stack of transformer blocks.

    Attributes:
        find_blocks: Returns the blocks of an encoder.
        num_blocks: How many there are.
        num_prefix_tokens: See `FeatureSource`.
    """

    find_blocks: Callable[[nn.Module], Sequence[nn.Module]]
    num_blocks: int
    num_prefix_tokens: int

    @property
    def num_states(self) -> int:
        """The embeddings and the output of every block."""
        return self.num_blocks + 1

    def states(
        self, encoder: nn.Module, pixel_values: Tensor, indices: Sequence[int]
    ) -> list[Tensor]:
        """See `FeatureSource`."""
        return capture_blocks(self.find_blocks(encoder), lambda: encoder(pixel_values), indices)


class _DeepestStateReached(Exception):
    """Ends the forward pass of an encoder after the deepest state that is wanted."""


def capture_blocks(
    blocks: Sequence[nn.Module], run: Callable[[], Any], indices: Sequence[int]
) -> list[Tensor]:
    """Return states of a stack of blocks: 0 is the input of the first, i the output of block i.

    This is the numbering of transformers' `hidden_states`, before any final layer norm. Blocks
    after the deepest wanted state are not run.

    Args:
        blocks: The stack, in order.
        run: Runs the encoder's forward pass.
        indices: States to return.
    """
    wanted, found = set(indices), dict[int, Tensor]()
    deepest = max(wanted)

    def before_first(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[0] = args[0] if args else next(iter(kwargs.values()))
        if deepest == 0:
            raise _DeepestStateReached

    def after(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[index] = output[0] if isinstance(output, tuple) else output
            if index == deepest:
                # An exception is the only way out of the encoder's own forward function.
                raise _DeepestStateReached

        return hook

    handles = [blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)]
    handles += [blocks[i - 1].register_forward_hook(after(i)) for i in sorted(wanted - {0})]
    try:
        run()
    except _DeepestStateReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [found[index] for index in indices]
