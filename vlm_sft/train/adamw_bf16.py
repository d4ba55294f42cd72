"""AdamW of weights that are kept in bfloat16 alone, rounded at random instead of to the nearest.

A bfloat16 number has 8 significant bits, so that rounding to the nearest loses every update smaller
than about 1/512 of its weight. Rounded up or down with the chances that make the mean exact, the
updates of many steps add up to what they are (Gupta et al., "Deep Learning with Limited Numerical
Precision", arXiv 1502.02551; of bfloat16 weights, arXiv 2010.06192).
"""

import hashlib
from collections.abc import Iterator, Set
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from vlm_sft.checkpoint.optimizer import MOMENTS
from vlm_sft.config.schema import OptimConfig, RunConfig
from vlm_sft.errors import ConfigError

LOW_BITS: Final = 16
"""Bits of a float32 that a bfloat16 lacks."""


def require_roundable(config: RunConfig, trainable: Set[str]) -> None:
    """Refuse `train.master_weights: none` where it has no meaning or is not built.

    Raises:
        ConfigError: The language model does not learn in full, in bf16, by torch's AdamW.
    """
    if config.train.master_weights == "fp32":
        return
    if "language_model" not in trainable:
        raise ConfigError(
            "train.master_weights: none is for stage 2 in full; the projector and adapters are "
            "small and learn in float32, so leave it at fp32"
        )
    if config.train.precision != "bf16":
        raise ConfigError(
            "train.master_weights: none keeps the language model in bfloat16, but train.precision "
            f"is {config.train.precision}; set that to bf16, or leave master_weights at fp32"
        )
    if config.optim.optimizer != "adamw":
        raise ConfigError(
            f"train.master_weights: none does not go with optim.optimizer: {config.optim.optimizer}"
            ", which rounds the weights it writes to the nearest; take one of the two alone"
        )


class StochasticAdamW(torch.optim.AdamW):
    """torch's AdamW, computed in float32 of each tensor; bfloat16 ones are rounded at random.

    Moments are float32. The random bits are a pure function of the seed, of how often the tensor
    was updated before and of its name: a run that goes on from a checkpoint writes the same bits,
    and so does every process that holds the same weights, as long as all compute on devices of one
    model. Beside the state, a float32 copy of one tensor's weights and gradient is held at a time.

    Args:
        groups: With `names` beside `params`, as `build_optimizer` makes them.
        config: Betas and epsilon.
        seed: The run's.
        fused: As torch takes it.
    """

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimConfig, *, seed: int, fused: bool | None
    ) -> None:
        super().__init__(groups, lr=0.0, betas=config.betas, eps=config.epsilon, fused=fused)
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient; there is no closure to call."""
        assert closure is None, "the gradient is there already"
        learning = list(self._learning())
        for group, _, parameter in learning:
            if not self.state[parameter]:
                self.state[parameter] = first_state(parameter, on_device=bool(group["fused"]))
        steps = [self.state[parameter]["step"] for _, _, parameter in learning]
        before = torch.stack(steps).tolist() if steps else []  # one wait for the device, not many
        for (group, name, parameter), count in zip(learning, before, strict=True):
            generator = torch.Generator(parameter.device)
            generator.manual_seed(rounding_seed(self._seed, int(count), name))
            self._update(group, parameter, generator)

    def _learning(self) -> Iterator[tuple[dict[str, Any], str, nn.Parameter]]:
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    yield group, name, parameter

    def _update(
        self, group: dict[str, Any], parameter: nn.Parameter, generator: torch.Generator
    ) -> None:
        assert parameter.grad is not None
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        weights = parameter.float()  # the parameter itself where it is float32
        adamw(
            [weights],
            [parameter.grad.float()],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=False,
            fused=bool(group["fused"]),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if parameter.dtype == torch.bfloat16:
            parameter.copy_(round_stochastically(weights, generator))


def first_state(parameter: nn.Parameter, *, on_device: bool) -> dict[str, Tensor]:
    """What AdamW knows of a parameter before its first update, moments in float32."""
    place = parameter.device if on_device else torch.device("cpu")
    moments = {key: torch.zeros_like(parameter, dtype=torch.float32) for key in MOMENTS}
    return {"step": torch.zeros((), device=place), **moments}


def rounding_seed(seed: int, updates: int, name: str) -> int:
    """Seed of the random bits for the update of a tensor that had so many before."""
    digest = hashlib.sha256(f"{seed}/{updates}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """One of the two bfloat16 numbers around each value, such that the mean is the value.

    A number between `a` and the next one further from zero `b` becomes `b` with the chance
    `(x - a) / (b - a)`, to 1/65536. What bfloat16 represents stays as it is, infinities and NaN
    included; beyond its largest number lies infinity.

    Args:
        values: float32, any shape; left as they are.
        generator: On their device.

    Returns:
        bfloat16 of the same shape.
    """
    assert values.dtype == torch.float32, values.dtype
    # Noise below the bits that stay carries into them as often as what is cut off is large; sign
    # and magnitude are apart in a float, so a carry always leads away from zero.
    bits = torch.randint(
        0, 1 << LOW_BITS, values.shape, generator=generator, dtype=torch.int32, device=values.device
    )
    bits.add_(values.view(torch.int32)).bitwise_and_(-1 << LOW_BITS)
    rounded = bits.view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
