"""Skip the MLP of the last decoder layer at positions that predict no token."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlm_sft.errors import UserError
from vlm_sft.model.language_model import causal_lm, decoder_layers
from vlm_sft.model.router import router_loss_coefficient


@dataclass
class LastMlpPruning:
    """Hooks on the last layer of a language model; see `prune_last_mlp`."""

    handles: list[RemovableHandle] = field(default_factory=list)
    _positions: Tensor | None = None
    _shape: tuple[int, ...] = ()

    def remove(self) -> None:
        """Remove the hooks: all positions are computed again."""
        for handle in self.handles:
            handle.remove()

    def read_layout(self, attention: nn.Module, args: Any, options: dict[str, Any]) -> None:
        """Read the target positions from the layout (before the layer's attention).

        The MLP is not passed the layout, but the attention before it is, and also when activation
        checkpointing runs the layer again in the backward pass.
        """
        layout = options.get("packed_layout")
        self._positions = None if layout is None else layout.target_positions

    def select(self, mlp: nn.Module, args: tuple[Any, ...]) -> Any:
        """Reduce the input of the MLP `[1, T, D]` to the target positions."""
        if self._positions is None:
            return args
        self._shape = args[0].shape
        return (args[0].flatten(0, 1).index_select(0, self._positions).unsqueeze(0), *args[1:])

    def scatter(self, mlp: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Put the output of the MLP at the target positions of `[1, T, D]`, zeros elsewhere."""
        if self._positions is None:
            return output
        if not isinstance(output, Tensor):
            raise TypeError(f"{type(mlp).__name__} returns more than one tensor")
        full = output.new_zeros(self._shape).flatten(0, 1)
        # Correct since positions are unique: the gradient of a duplicate would be counted twice.
        return full.index_copy(0, self._positions, output.squeeze(0)).view(self._shape)


def prune_last_mlp(language_model: nn.Module) -> LastMlpPruning | None:
    """Let the MLP of the last layer skip the positions of packed rows that predict no token.

    No later layer attends to them, so nothing reads their output. The MLP is about two thirds of a
    layer's FLOPs, and in instruction data about six of seven positions predict nothing. Rows whose
    layout has no `target_positions`, and padded rows, are computed at all positions.

    Returns:
        The hooks; None if the last layer has no `self_attn` and `mlp`, or if the router loss needs
        every position.
    """
    if router_loss_coefficient(causal_lm(language_model)) is not None:
        return None
    try:
        last = decoder_layers(language_model)[-1]
    except UserError:
        return None
    attention, mlp = getattr(last, "self_attn", None), getattr(last, "mlp", None)
    if not isinstance(attention, nn.Module) or not isinstance(mlp, nn.Module):
        return None
    pruning = LastMlpPruning()
    pruning.handles += [
        attention.register_forward_pre_hook(pruning.read_layout, with_kwargs=True),
        mlp.register_forward_pre_hook(pruning.select),
        mlp.register_forward_hook(pruning.scatter),
    ]
    return pruning
