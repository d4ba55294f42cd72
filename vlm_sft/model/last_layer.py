"""The last layer's MLP only where a token is predicted: nothing reads what it gives elsewhere."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlm_sft.errors import UserError
from vlm_sft.model.language_model import causal_lm, decoder_layers
from vlm_sft.model.router import router_loss_coefficient


@dataclass
class LastMlp:
    """Hooks on the last layer of a language model; see `prune_last_mlp`."""

    handles: list[RemovableHandle] = field(default_factory=list)
    _rows: Tensor | None = None
    _shape: tuple[int, ...] = ()

    def remove(self) -> None:
        """Compute everything again."""
        for handle in self.handles:
            handle.remove()

    def note(self, attention: nn.Module, args: Any, options: dict[str, Any]) -> None:
        """Before the layer's attention, in its recomputation too: what this row needs."""
        layout = options.get("packed_layout")
        self._rows = None if layout is None else layout.target_positions

    def select(self, mlp: nn.Module, args: tuple[Any, ...]) -> Any:
        """Before the MLP: only the rows that are needed."""
        if self._rows is None:
            return args
        self._shape = args[0].shape
        return (args[0].flatten(0, 1).index_select(0, self._rows).unsqueeze(0), *args[1:])

    def spread(self, mlp: nn.Module, args: Any, output: Tensor) -> Tensor:
        """After the MLP: its rows in their places, zeros elsewhere."""
        if self._rows is None:
            return output
        if not isinstance(output, Tensor):
            raise TypeError(f"{type(mlp).__name__} gives more than one tensor")
        whole = output.new_zeros(self._shape).flatten(0, 1)
        return whole.index_copy(0, self._rows, output.squeeze(0)).view(self._shape)


def prune_last_mlp(language_model: nn.Module) -> LastMlp | None:
    """Let the MLP of the last layer skip the positions of a pack that predict nothing.

    Of a layer's products it is about two thirds, and in instruction data six of seven positions
    predict nothing. The residual and the last norm go over all positions, so the places of the
    others hold what nobody reads. Rows without `PackedLayout.target_positions` are computed whole.

    Returns:
        The hooks, or None where the layers are not made of `self_attn` and `mlp`, or where the
        router loss needs every position.
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
    pruned = LastMlp()
    pruned.handles += [
        attention.register_forward_pre_hook(pruned.note, with_kwargs=True),
        mlp.register_forward_pre_hook(pruned.select),
        mlp.register_forward_hook(pruned.spread),
    ]
    return pruned
