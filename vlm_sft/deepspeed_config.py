"""DeepSpeed's JSON files (`zero2.json`, `zero3.json`), read for what they ask and done by FSDP2.

DeepSpeed itself is not used: its checkpoints are pickles. ZeRO stage 3 is FSDP2; stages 1 and 2 are
FSDP2 with weights that stay gathered between forward and backward. What a file says beside that is
compared with the run's own configuration: nothing in it is passed over in silence.

Source: DeepSpeed's "Configuration JSON" page; LLaVA's `scripts/zero2.json`, `scripts/zero3.json`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_sft.config.schema import RunConfig
from vlm_sft.errors import ConfigError, UserError
from vlm_sft.utils.reading import read_json

AUTO = "auto"
"""What transformers' files say where the trainer's own setting counts."""

WITHOUT_MEANING = frozenset(
    {
        "allgather_bucket_size",
        "allgather_partitions",
        "communication_data_type",
        "contiguous_gradients",
        "gather_16bit_weights_on_model_save",
        "ignore_unused_parameters",
        "memory_efficient_linear",
        "overlap_comm",
        "prescale_gradients",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "steps_per_print",
        "sub_group_size",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
    }
)
"""Settings of how DeepSpeed does it, or of what it prints; none changes what is learned."""

LOSS_SCALE = frozenset(
    {"loss_scale", "loss_scale_window", "initial_scale_power", "hysteresis", "min_loss_scale"}
)
"""Of `fp16`; torch's own scaler is used."""


@dataclass(frozen=True)
class ZeroRequest:
    """What a file asks for.

    Attributes:
        path: The file.
        stage: ZeRO's: 0 shares nothing, 1 and 2 gradients and optimizer state, 3 weights as well.
        without_meaning: Settings in it that have no counterpart here.
    """

    path: str
    stage: int
    without_meaning: tuple[str, ...]

    @property
    def shares(self) -> bool:
        """Whether anything is to be shared out."""
        return self.stage > 0

    @property
    def reshard_after_forward(self) -> bool:
        """Whether gathered weights are given up between forward and backward (ZeRO-3)."""
        return self.stage == 3

    def told(self, *, in_full: bool, num_processes: int) -> str:
        """What becomes of it, in a line."""
        done = f"ZeRO stage {self.stage} is done by FSDP2"
        if not self.shares:
            done = "ZeRO stage 0: every process holds the whole model"
        elif not in_full:
            done = (
                f"ZeRO stage {self.stage} has little to share where the language model does not "
                "learn in full: every process holds the whole model"
            )
        elif num_processes == 1:
            done = f"ZeRO stage {self.stage} has nobody to share with in one process"
        names = ", ".join(self.without_meaning)
        return f"{self.path}: {done}" + (f"; without meaning here: {names}" if names else "")


def read_deepspeed(config: RunConfig, *, num_processes: int | None = None) -> ZeroRequest | None:
    """What `train.deepspeed` asks for, after comparing it with the rest of the configuration.

    Args:
        config: The run's.
        num_processes: To compare accumulation and whole batches; None where it is not known yet.

    Raises:
        ConfigError: The file cannot be read, asks for what is not built (offloading, another
            optimizer), contradicts the configuration, or says something that is not understood.
    """
    if config.train.deepspeed is None:
        return None
    path = config.train.deepspeed
    if config.train.sharding != "auto":
        raise ConfigError(
            f"train.sharding: {config.train.sharding} is set beside train.deepspeed: {path}; "
            "both say how to share, so delete one of them"
        )
    return _Reader(path, config, num_processes).read(_load(path))


class _Reader:
    def __init__(self, path: str, config: RunConfig, num_processes: int | None) -> None:
        self._path, self._config, self._processes = path, config, num_processes
        self._without: list[str] = []

    def read(self, tree: Mapping[str, Any]) -> ZeroRequest:
        stage = 0
        for key, value in tree.items():
            if key == "zero_optimization":
                stage = self._zero(value)
            elif key in ("bf16", "fp16"):
                self._precision(key, value)
            elif key == "optimizer":
                self._optimizer(value)
            elif key == "scheduler":
                self._scheduler(value)
            elif key in WITHOUT_MEANING:
                self._without.append(key)
            elif key == "gradient_accumulation_steps":
                self._accumulation(value)
            else:
                self._compare(key, value)
        return ZeroRequest(self._path, stage, tuple(self._without))

    def _zero(self, section: Any) -> int:
        where = "zero_optimization"
        tree = self._mapping(where, section)
        for key, value in tree.items():
            if key in ("offload_optimizer", "offload_param"):
                self._offload(f"{where}.{key}", value)
            elif key in WITHOUT_MEANING:
                self._without.append(f"{where}.{key}")
            elif key != "stage":
                raise self._unknown(f"{where}.{key}")
        stage = tree.get("stage", 0)
        if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
            raise self._wrong(f"{where}.stage", f"found {stage!r}, expected 0, 1, 2 or 3")
        return int(stage)

    def _offload(self, where: str, section: Any) -> None:
        device = self._mapping(where, section).get("device", "none")
        if device not in (None, "none"):
            raise self._wrong(
                where,
                f"offloading to {device!r} is not built; delete the section, and where memory is "
                "short use more processes, LoRA, or train.activation_checkpointing: full",
            )

    def _precision(self, key: str, section: Any) -> None:
        tree = self._mapping(key, section)
        for name in tree:
            if key == "fp16" and name in LOSS_SCALE:
                self._without.append(f"{key}.{name}")
            elif name not in ("enabled", "auto_cast"):
                raise self._unknown(f"{key}.{name}")
        ours = self._config.train.precision
        enabled = tree.get("enabled", False)
        self._same(f"{key}.enabled", enabled, ours == key, f"train.precision is {ours}")

    def _optimizer(self, section: Any) -> None:
        tree = self._mapping("optimizer", section)
        kind = tree.get("type")
        if kind not in ("Adam", "AdamW"):
            raise self._wrong("optimizer.type", f"found {kind!r}; only AdamW is built")
        for name, value in self._mapping("optimizer.params", tree.get("params", {})).items():
            where = f"optimizer.params.{name}"
            if name in ("torch_adam", "adam_w_mode"):
                self._same(where, value, True, "AdamW of torch is used")
            else:
                self._compare(where, value)

    def _scheduler(self, section: Any) -> None:
        tree = self._mapping("scheduler", section)
        params = self._mapping("scheduler.params", tree.get("params", {}))
        if any(value != AUTO for value in params.values()):
            raise self._wrong(
                "scheduler",
                "the learning rate follows optim.schedule and optim.warmup_ratio; delete the "
                'section, or set its params to "auto"',
            )
        self._without.append("scheduler")

    def _compare(self, where: str, value: Any) -> None:
        """Hold a setting against its counterpart in the configuration."""
        train, optim = self._config.train, self._config.optim
        ours: dict[str, tuple[str, Any]] = {
            "train_batch_size": ("train.global_batch_size", train.global_batch_size),
            "train_micro_batch_size_per_gpu": ("train.micro_batch_size", train.micro_batch_size),
            "gradient_clipping": ("optim.max_grad_norm", optim.max_grad_norm or 0.0),
            "optimizer.params.lr": (
                "optim.learning_rate.language_model",
                optim.learning_rate.language_model,
            ),
            "optimizer.params.betas": ("optim.betas", list(optim.betas)),
            "optimizer.params.eps": ("optim.epsilon", optim.epsilon),
            "optimizer.params.weight_decay": ("optim.weight_decay", optim.weight_decay),
        }
        if where not in ours:
            raise self._unknown(where)
        named, expected = ours[where]
        self._same(where, value, expected, f"{named} is {expected}")

    def _accumulation(self, value: Any) -> None:
        train = self._config.train
        if value == AUTO or self._processes is None:
            return
        if train.micro_batch_size is None:
            raise self._wrong(
                "gradient_accumulation_steps",
                'with train.packing the number of packs follows the records; say "auto"',
            )
        together = train.micro_batch_size * self._processes
        expected = -(-train.global_batch_size // together)
        told = f"{self._processes} processes take {expected} micro-batches a step"
        self._same("gradient_accumulation_steps", value, expected, told)

    def _same(self, where: str, value: Any, expected: Any, told: str) -> None:
        if value not in (AUTO, expected):
            raise self._wrong(where, f'found {value!r}, but {told}; make them alike, or say "auto"')

    def _mapping(self, where: str, section: Any) -> Mapping[str, Any]:
        if not isinstance(section, dict):
            raise self._wrong(where, f"found {section!r}, expected a section")
        return section

    def _unknown(self, where: str) -> ConfigError:
        return self._wrong(where, "is not understood here; delete it if the run can do without")

    def _wrong(self, where: str, what: str) -> ConfigError:
        return ConfigError(f"{self._path}: {where}: {what}")


def _load(path: str) -> Mapping[str, Any]:
    try:
        tree = read_json(Path(path).expanduser())
    except OSError:
        raise ConfigError(
            f"train.deepspeed: {path}: no such file; give DeepSpeed's JSON, or delete the key"
        ) from None
    except UserError as error:
        raise ConfigError(f"train.deepspeed: {error}", code=error.reason) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"train.deepspeed: {path}: expected a JSON object of settings")
    return tree
