"""The configuration of a run: every setting with its type, default, meaning and resume policy.

`Free`, `Explicit` and `Forbidden` say whether a resumed run may change a setting; see
`vlm_sft.config.fields`.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from vlm_sft.config import loading
from vlm_sft.config.fields import (
    Count,
    CountOrZero,
    Explicit,
    Forbidden,
    Fraction,
    Free,
    ImageAspect,
    ImageProcessing,
    NonEmptyText,
    NonNegative,
    Positive,
)
from vlm_sft.config.loading import Section
from vlm_sft.config.renamed import refuse_renamed, translate_renamed

_MOST_LAYERS: Final = 1000
_LAYERS = re.compile(r"(^|_)(layers?|depths?|blocks)$")
"""Keys of other libraries' configurations that count layers: building one by one never ends."""
_DROPOUT = re.compile(r"drop")
"""Keys of probabilities that libraries only check in the first step."""


def _plain_architecture(tree: dict[str, Any]) -> dict[str, Any]:
    """Check what libraries do not check before the first step, or before memory is full."""
    waiting: list[tuple[str, Any]] = list(tree.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{key}.{name}", child) for name, child in value.items()]
        elif isinstance(value, list):
            waiting += [(key, child) for child in value]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            _require_plain_number(str(key), value)
    return tree


def _require_plain_number(key: str, number: float) -> None:
    last = key.rpartition(".")[2]
    if _LAYERS.search(last) and number > _MOST_LAYERS:
        raise ValueError(f"{key}: expected at most {_MOST_LAYERS:,} layers (found {number})")
    if _DROPOUT.search(last) and not 0 <= number <= 1:
        raise ValueError(f"{key}: expected a number from 0 to 1 (found {number})")


Architecture = Annotated[dict[str, Any], AfterValidator(_plain_architecture)]
"""A configuration of another library, from which a model with random weights is built."""


class VisionTowerConfig(Section):
    """Which frozen encoder, and which of its features."""

    library: Forbidden[Literal["open_clip", "transformers", "timm"]]
    name: Explicit[NonEmptyText | None] = None
    """A name of that library, a hub name, or a local folder (transformers)."""
    config: Forbidden[Architecture | None] = None
    """Instead of `name`: build with random weights from this configuration (tests, tiny runs)."""
    weights: Explicit[NonEmptyText | None] = None
    """open_clip: a pretrained tag or a file; timm: a state-dict file. None: the library's default
    weights for `name` (open_clip: needed; random weights are only made from `config`)."""
    feature_layers: Forbidden[list[int]] = Field(default=[-2], min_length=1)
    """Indices into the hidden states (0 = embeddings, -1 = last); several are concatenated."""
    feature_select: Forbidden[Literal["patch", "cls_patch"]] = "patch"
    """`patch` drops the class token, `cls_patch` keeps it (LLaVA `mm_vision_select_feature`)."""
    grid_pool: Forbidden[Count | None] = None
    """Average the square grid of patch features down to `grid_pool` x `grid_pool` tokens."""
    image_size: Forbidden[Annotated[int, Field(gt=0, le=8192)] | None] = None
    """Side of the input square in pixels; None takes the tower's own."""


class LanguageModelConfig(Section):
    """Which causal language model, and how it is held in memory."""

    name: Explicit[NonEmptyText | None] = None
    """A local folder or a hub name that `AutoModelForCausalLM` loads."""
    config: Forbidden[Architecture | None] = None
    """Instead of `name`: random weights from this configuration (needs `model_type`)."""
    tokenizer: Explicit[NonEmptyText | None] = None
    """A folder or hub name; None: the one of `name`. `bytes`: a built-in byte tokenizer."""
    attn_implementation: Explicit[NonEmptyText] = "auto"
    """`auto`: flash-attention where installed and supported, else SDPA; or transformers' name."""
    quantization: Forbidden[Literal["nf4", "fp4"] | None] = None
    """Hold the frozen linear layers, but for the head, in 4 bits (bitsandbytes; needs `lora` in
    stage 2); null: all in the numbers of `train.precision`."""
    double_quantization: Forbidden[bool] = True
    """Of 4-bit weights also the scales, in 8 bits (QLoRA, section 3): 0.37 bit a weight less."""

    @model_validator(mode="after")
    def _one_source(self) -> "LanguageModelConfig":
        if (self.name is None) == (self.config is None):
            raise ValueError("give exactly one of `name` and `config`")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("a model built from `config` needs `tokenizer`")
        return self


class LoraConfig(Section):
    """Low-rank adapters on the language model (peft)."""

    r: Forbidden[Annotated[int, Field(gt=0, le=65_536)]] = 16
    alpha: Forbidden[Positive] = 32
    dropout: Forbidden[Fraction] = 0.05
    targets: Forbidden[list[NonEmptyText] | Literal["all-linear"]] = "all-linear"
    """Module names inside the language model (`q_proj`); `all-linear`: all but the head."""
    use_dora: Forbidden[bool] = False
    """DoRA (arXiv 2402.09353): learn each output's magnitude apart from its direction."""
    use_rslora: Forbidden[bool] = False
    """rsLoRA (arXiv 2312.03732): scale by alpha / sqrt(r) instead of alpha / r."""


class ModelConfig(Section):
    """Tower, projector and language model."""

    vision_tower: VisionTowerConfig
    projector_type: Forbidden[str] = "mlp2x_gelu"
    """`linear`, or `mlpNx_gelu`: N linear layers with GELU between them."""
    language_model: LanguageModelConfig

    @field_validator("projector_type")
    @classmethod
    def _known_projector(cls, name: str) -> str:
        if re.fullmatch(r"linear|mlp[1-9]\d?x_gelu", name) is None:
            raise ValueError(
                "expected 'linear' or 'mlpNx_gelu' with N from 1 to 99, e.g. mlp2x_gelu "
                f"(found {name!r})"
            )
        return name


class DataFile(Section):
    """One file (or folder, for Parquet and `datasets`) of records."""

    path: Explicit[NonEmptyText]
    format: Forbidden[Literal["auto", "llava", "messages", "alpaca"]] = "auto"
    image_root: Explicit[NonEmptyText | None] = None
    """Folder that relative image names start from; None: the file's own folder."""
    follow_symlinks: Free[bool] = False
    """Whether symbolic links below `image_root` may lead out of it; `..` never may."""
    weight: Forbidden[Annotated[float, Field(gt=0, le=1e4, allow_inf_nan=False)]] = 1.0
    """How often each record is seen in one epoch: 2 twice, 0.5 every other record."""

    def images_start_in(self) -> Path:
        """Return the directory that relative image names start from."""
        return Path(self.path).parent if self.image_root is None else Path(self.image_root)


class DataConfig(Section):
    """Which records, under which template, and what to do with those that do not fit."""

    train: Forbidden[Annotated[list[DataFile], Field(min_length=1)]]
    eval: Explicit[list[DataFile]] = Field(default=[])
    template: Forbidden[NonEmptyText] = "auto"
    """A name of `vlm_sft/data/templates`, a YAML file, or `auto`: the model's own chat template."""
    system: Forbidden[str | None] = None
    """System text for records that have none; None: the template's default, "": none."""
    image_separator: Explicit[str | None] = None
    """Text between an image and its neighbors where content is a list of parts: in such records,
    in `chat`, `evaluate` and the exported chat template; None: the template's, mostly a newline."""
    llava_quirks: Forbidden[Literal["none", "llava-1.5"]] = "none"
    """`llava-1.5` repeats the quirks of LLaVA's code (`vlm_sft/data/llava_quirks.py`)"""
    max_length: Forbidden[Annotated[int, Field(gt=0, le=sys.maxsize)]] = 2048
    """Longest sequence in tokens, image tokens included."""
    length_policy: Forbidden[Literal["error", "drop_turns", "skip"]] = "error"
    on_error: Explicit[Literal["stop", "quarantine"]] = "stop"
    """A record that cannot be used: stop, or leave it out and say so in the ledger."""
    max_quarantined: Free[CountOrZero] = 100
    """Records that may turn out broken while training goes on (`on_error: quarantine`)."""
    image_aspect: Forbidden[ImageAspect] = "pad"
    """`pad`: whole image on a square of the tower's mean color; `crop`: center square."""
    image_processing: Explicit[ImageProcessing] = "fast"
    """`fast`: pixels at most 2 levels of 255 from Pillow's, in less than half the time; `exact`:
    Pillow's own."""
    feature_cache: Explicit[NonEmptyText | None] = None
    """Folder where the frozen tower's features of all images are kept, computed before training
    where they are not there yet; None: images go through the tower in every step. See
    `docs/images.md` for when that pays."""
    feature_cache_gb: Free[Positive] = 100.0
    """Most that `feature_cache` may hold, in GB (1e9 bytes), over all towers; more is refused."""
    num_workers: Free[Annotated[int, Field(ge=0, le=1024)]] = 2
    cache_dir: Free[NonEmptyText | None] = None
    """Folder where tokenized records are kept across runs; None: each start tokenizes all anew."""


class LearningRates(Section):
    """Peak learning rate of each trainable part."""

    projector: Explicit[NonNegative]
    language_model: Explicit[NonNegative] = 0.0
    """Of the language model's weights, or of its adapters."""


class OptimConfig(Section):
    """AdamW with linear warm-up and a schedule."""

    optimizer: Forbidden[Literal["adamw", "adamw_8bit"]] = "adamw"
    """`adamw_8bit` keeps both moments in a byte a number (bitsandbytes): 2 bytes for every weight
    that learns instead of 8."""
    learning_rate: LearningRates
    weight_decay: Explicit[NonNegative] = 0.0
    betas: Explicit[tuple[Fraction, Fraction]] = (0.9, 0.999)
    epsilon: Explicit[Positive] = 1e-8
    schedule: Explicit[Literal["cosine", "linear", "constant"]] = "cosine"
    warmup_ratio: Explicit[Fraction] = 0.03
    max_grad_norm: Explicit[Positive | None] = 1.0
    """Clip the gradient's global norm; None: never."""


class PackingConfig(Section):
    """Records laid end to end in rows, none seeing another, instead of padded batches."""

    max_tokens: Explicit[Count]
    """Of one row, image tokens included; at least `data.max_length`."""
    round_to: Explicit[Annotated[int, Field(gt=0, le=65_536)]] = 1
    """Fill rows up to a multiple of so many tokens: few shapes, for compiled kernels."""
    attention: Explicit[Literal["auto", "flash_attn", "varlen", "flex", "sdpa"]] = "auto"
    """The kernel: flash-attn, torch's variable-length attention, FlexAttention, or SDPA a record;
    `auto` takes the first that is to be had."""

    @model_validator(mode="after")
    def _rows_hold_a_multiple(self) -> "PackingConfig":
        if self.round_to > self.max_tokens:
            raise ValueError(
                f"round_to is {self.round_to}, but a row holds no more than max_tokens, "
                f"{self.max_tokens}; set round_to to at most that"
            )
        return self


Tracker = Literal["tensorboard", "wandb", "trackio"]


class TrackingConfig(Section):
    """How the trackers of `train.trackers` name the run, and where they write."""

    project: Free[Annotated[str, Field(min_length=1, max_length=128)]] = "vlm_sft"
    """Project of wandb and trackio; for TensorBoard the folder inside `dir`."""
    name: Free[NonEmptyText | None] = None
    """Name of the run; null: the last part of `output_dir`."""
    entity: Free[NonEmptyText | None] = None
    """wandb's user or team; null: the account's default."""
    dir: Free[NonEmptyText | None] = None
    """Folder that trackers write to; null: `trackers` inside `output_dir`."""

    @field_validator("project")
    @classmethod
    def _plain_project(cls, project: str) -> str:
        if set(project) & set("/\\#?%:") or project in (".", ".."):
            raise ValueError(f"expected a name without / \\ # ? % : (found {project!r})")
        return project


class TrainConfig(Section):
    """How long, in what batches and numbers, and what is written down."""

    epochs: Explicit[Positive] = 1.0
    max_steps: Explicit[Count | None] = None
    """Stop after this many optimizer steps; None: after `epochs`."""
    global_batch_size: Forbidden[Count]
    """Records an optimizer step, over all processes and micro-batches."""
    micro_batch_size: Explicit[Count | None] = None
    """Records one process takes through the model at once, padded to the longest."""
    packing: Explicit[PackingConfig | None] = None
    """Instead of `micro_batch_size`: one process takes one row of packed records at once. Neither
    changes which records a step has, nor its loss."""
    share_image_prefix: Forbidden[bool] = False
    """With `packing`: records of one image that begin alike are trained on together, what comes
    up to and with the image being computed once. Their order is a shuffle of images instead of
    records; each record's loss stays what it is."""
    precision: Explicit[Literal["bf16", "fp16", "fp32"]] = "bf16"
    """Numbers of the frozen weights and of the forward pass."""
    master_weights: Forbidden[Literal["fp32", "none"]] = "fp32"
    """Trained weights are kept in fp32; with `none` the language model's, in stage 2 in full and
    bf16, are kept in bfloat16 alone, each update being rounded stochastically."""
    sharding: Explicit[Literal["auto", "none", "zero2", "zero3"]] = "auto"
    """Shard weights, gradients and optimizer state over the ranks with FSDP2. `zero3` frees
    gathered weights between forward and backward, `zero2` keeps them (less communication, more
    memory), `none` replicates the model (DDP). `auto` is `zero3` for full fine-tuning on several
    ranks, else `none`. See `docs/multi-gpu.md`, also for users of DeepSpeed."""
    on_nonfinite_loss: Explicit[Literal["stop", "skip"]] = "stop"
    """A loss or gradient that is not finite: stop, or leave that step's update out and say so."""
    max_skipped_steps: Free[CountOrZero] = 10
    """Updates that may be left out in a run (`on_nonfinite_loss: skip`)."""
    neftune_alpha: Explicit[Positive | None] = None
    """NEFTune (arXiv 2310.05914): noise on the embeddings of text while training, uniform in
    +-alpha / sqrt(text tokens of the record x width); the paper takes 5 to 15. Null: none."""
    activation_checkpointing: Free[Literal["auto", "none", "selective", "full"]] = "auto"
    """What the backward pass computes again: nothing, the cheap operations of every layer of the
    language model, or whole layers; `auto` measures a step and takes the fastest that fits. None
    changes a result."""
    compile: Explicit[bool] = False
    """Compile the language model's layers (torch.compile): a minute or more at the start, faster
    steps after it; rounds otherwise than without. Needs a C++ compiler on a CPU, triton on a
    GPU."""
    fp8: Explicit[bool] = False
    """Multiply in fp8 in the decoder's wide linear layers (torchao): less exact, and only on
    NVIDIA's GPUs from Ada and Hopper on."""
    deterministic: Explicit[bool] = False
    """Only kernels that give the same bits every time, for the same machine and libraries; slower
    on a GPU, and refused by name where there is none. A CPU repeats its bits anyway."""
    group_by_length: Forbidden[bool] = False
    """Put records of like length (and modality) into the same batch."""
    save_every_steps: Free[Count] = 500
    save_every_minutes: Free[Positive | None] = None
    """Save also when so much time has gone since the last save."""
    async_checkpointing: Free[bool] = True
    """Write checkpoints beside training; the step that saves only waits for copies in memory."""
    keep_last_checkpoints: Free[Count] = 2
    eval_every_steps: Free[Count | None] = None
    eval_samples: Free[CountOrZero] = 3
    """Held-out records answered by the model at each evaluation."""
    log_every_steps: Free[Count] = 1
    """Steps from one row of `metrics.jsonl` to the next. Each row is also a line on stderr; on a
    terminal a progress bar shows the newest one instead."""
    trackers: Free[list[Tracker]] = Field(default=["tensorboard"])
    tracking: TrackingConfig = TrackingConfig()
    """Names and places for `trackers`. A resumed run continues the same wandb or trackio run."""

    @model_validator(mode="after")
    def _padded_or_packed(self) -> "TrainConfig":
        if (self.micro_batch_size is None) == (self.packing is None):
            raise ValueError(
                "give exactly one of `micro_batch_size` (padded) and `packing`; null takes one away"
            )
        if self.packing is not None and self.group_by_length:
            raise ValueError("`packing` needs no `group_by_length`; set that to false")
        if self.share_image_prefix and self.packing is None:
            raise ValueError("`share_image_prefix` needs `packing`; give that in place of padding")
        return self


class RunConfig(Section):
    """The whole file."""

    output_dir: Free[NonEmptyText]
    seed: Forbidden[Annotated[int, Field(ge=0, lt=2**32)]] = 42
    projector: Explicit[NonEmptyText | None] = None
    """A stage-1 checkpoint folder (`RUN/final`) whose projector this run starts from."""
    model: ModelConfig
    lora: Forbidden[LoraConfig | None] = None
    """Stage 2 only: adapters on the language model; null trains it in full."""
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig

    @model_validator(mode="after")
    def _packs_hold_every_record(self) -> "RunConfig":
        packing, longest = self.train.packing, self.data.max_length
        if packing is not None and packing.max_tokens < longest:
            raise ValueError(
                f"train.packing.max_tokens is {packing.max_tokens}, but data.max_length lets a "
                f"record have {longest} tokens; set it to at least that"
            )
        return self

    def input_paths(self) -> list[Path]:
        """Return the files and directories that a run reads and that exist here.

        Of the records' images only directories are known: see `image_roots`.
        """
        files = [*self.data.train, *self.data.eval]
        names = (
            self.projector,
            self.model.vision_tower.name,
            self.model.vision_tower.weights,
            self.model.language_model.name,
            self.model.language_model.tokenizer,
            self.data.template,
            *(file.path for file in files),
        )
        paths = (Path(name).expanduser() for name in names if name)
        return [path for path in paths if path.exists()]

    def image_roots(self) -> list[Path]:
        """Return the directories that relative image names of the records start from."""
        return [file.images_start_in() for file in [*self.data.train, *self.data.eval]]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file, apply `key.path=value` overrides, and check the result.

    Raises:
        ConfigError: One sentence with the file, the key, the value and what was expected. A
            misspelled key is reported with the nearest known one, a renamed one with its new name.
    """
    tree = loading.read_tree(path, overrides)
    refuse_renamed(tree, str(path))
    return parse_config(tree, str(path))


def load_stored_config(path: str | Path) -> RunConfig:
    """Read a configuration that a run stored, also one that an earlier version stored.

    Raises:
        ConfigError: As `load_config`; old keys are translated instead of refused.
    """
    return parse_config(translate_renamed(loading.read_tree(path)), str(path))


def parse_config(tree: Mapping[str, Any], where: str) -> RunConfig:
    """Check a nested mapping of plain values; `where` names it in errors.

    Raises:
        ConfigError: As `load_config`.
    """
    return loading.parse(RunConfig, tree, where)


def dump_config(config: RunConfig) -> str:
    """Return the resolved configuration as YAML, from which `load_config` restores it."""
    return loading.dump(config)


def means_folder(name: str) -> bool:
    """Whether a `name` or `tokenizer` that is there or not is a folder's, and not a hub name.

    Hub names are `model` or `owner/model`; the latter is a folder's where `owner/` is a folder.
    """
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        return True
    return "/" in name and Path(name).parent.is_dir()
