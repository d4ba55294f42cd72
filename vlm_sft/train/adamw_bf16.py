"""AdamW for weights that are stored in bfloat16 only, with stochastic rounding.

A bfloat16 value has 8 significant bits, so rounding to nearest loses every update smaller than
about 1/512 of its weight. Stochastic rounding is unbiased, so the updates of many steps add up
correctly (Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv 1502.02551; for
bfloat16 weights, arXiv 2010.06192).
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
"""Mantissa bits of float32 that bfloat16 does not have."""


def require_master_weights(config: RunConfig, trainable: Set[str]) -> None:
    """Check that `train.master_weights: none`, if set, works with the rest of the configuration.

    Raises:
        ConfigError: The run is not full fine-tuning in bf16 with torch's AdamW.
    """
    if config.train.master_weights == "fp32":
        return
    if "language_model" not in trainable:
        raise ConfigError(
            "train.master_weights: none is for full fine-tuning in stage 2; the projector and "
            "adapters are small and trained in float32, so leave it at fp32"
        )
    if config.train.precision != "bf16":
        raise ConfigError(
            "train.master_weights: none keeps the language model in bfloat16, but train.precision "
            f"is {config.train.precision}; set that to bf16, or leave master_weights at fp32"
        )
    if config.optim.optimizer != "adamw":
        raise ConfigError(
            f"train.master_weights: none does not work with optim.optimizer: "
            f"{config.optim.optimizer}, which rounds weights to nearest; use one of the two"
        )


class StochasticAdamW(torch.optim.AdamW):
    """AdamW of torch, computed in float32; weights in bfloat16 are rounded stochastically.

    Moments are float32. The random bits are a pure function of the seed, of the number of updates
    of the tensor and of its name, so a resumed run writes the same bits, and so does every rank
    with the same weights, if all use devices of one model. Besides the state, float32 copies of one
    tensor's weights and gradient are in memory at a time.

    Args:
        groups: Parameter groups with `names`, as `build_optimizer` makes them.
        config: Betas and epsilon.
        seed: Seed of the rounding.
        fused: As for `torch.optim.AdamW`.
    """

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimConfig, *, seed: int, fused: bool | None
    ) -> None:
        super().__init__(groups, lr=0.0, betas=config.betas, eps=config.epsilon, fused=fused)
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        assert closure is None, "gradients are computed before the step"
        updated = list(self._with_gradient())
        for group, _, parameter in updated:
            if not self.state[parameter]:
                self.state[parameter] = first_state(parameter, on_device=bool(group["fused"]))
        steps = [self.state[parameter]["step"] for _, _, parameter in updated]
        before = torch.stack(steps).tolist() if steps else []  # one device sync, not one per tensor
        for (group, name, parameter), count in zip(updated, before, strict=True):
            generator = torch.Generator(parameter.device)
            generator.manual_seed(rounding_seed(self._seed, int(count), name))
            self._update(group, parameter, generator)

    def _with_gradient(self) -> Iterator[tuple[dict[str, Any], str, nn.Parameter]]:
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    yield group, name, parameter

    def _update(
        self, group: dict[str, Any], parameter: nn.Parameter, generator: torch.Generator
    ) -> None:
        assert parameter.grad is not None
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        weights = parameter.float()  # no copy if it is float32 already
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
    """Return the state of a parameter before its first update, with float32 moments."""
    place = parameter.device if on_device else torch.device("cpu")
    moments = {key: torch.zeros_like(parameter, dtype=torch.float32) for key in MOMENTS}
    return {"step": torch.zeros((), device=place), **moments}


def rounding_seed(seed: int, updates: int, name: str) -> int:
    """Return the seed of the rounding of a tensor's update, after `updates` earlier ones."""
    digest = hashlib.sha256(f"{seed}/{updates}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round each value up or down to bfloat16 so that the expected result is the value.

    A value between two bfloat16 values `a` and `b` (the one further from zero) becomes `b` with
    probability `(x - a) / (b - a)`, to within 1/65536. Values that bfloat16 represents are
    unchanged, infinities and NaN included; values beyond its largest one can become infinity.

    Args:
        values: float32, any shape; not changed.
        generator: Random generator on the same device.

    Returns:
        bfloat16 of the same shape.
    """
    assert values.dtype == torch.float32, values.dtype
    # Add uniform noise to the 16 low bits and truncate: the carry into the high bits has the
    # wanted probability. A float stores sign and magnitude, so a carry always leads away from zero.
    bits = torch.randint(
        0, 1 << LOW_BITS, values.shape, generator=generator, dtype=torch.int32, device=values.device
    )
    bits.add_(values.view(torch.int32)).bitwise_and_(-1 << LOW_BITS)
    rounded = bits.view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
