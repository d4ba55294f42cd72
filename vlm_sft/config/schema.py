"""The configuration of a run: every setting with its type, default, meaning and resume policy.

`Free`, `Explicit` and `Forbidden` say whether a resumed run may change a setting; see
`vlm_sft.config.fields`.
"""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vlm_sft.config import loading
from vlm_sft.config.connectors import TokenGrid, connector_grid, connector_kind
from vlm_sft.config.fields import (
    Architecture,
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
from vlm_sft.config.hub_address import HubAddress, is_hub_address
from vlm_sft.config.loading import Section
from vlm_sft.config.renamed import refuse_renamed, translate_renamed
from vlm_sft.errors import ConfigError, UserError


class VisionTowerConfig(Section):
    """The vision encoder, which stays frozen, and the features that are taken from it."""

    library: Forbidden[Literal["open_clip", "transformers", "timm"]]
    """Library that the encoder is loaded with."""
    name: Explicit[NonEmptyText | None] = None
    """Name of the encoder in that library, a hub name, or a local directory (transformers). Give
    either `name` or `config`."""
    config: Forbidden[Architecture | None] = None
    """Configuration to build the encoder from with random weights, for tests and tiny runs."""
    weights: Explicit[NonEmptyText | None] = None
    """Weights for `name`: a pretrained tag or a file (open_clip, where they are required), or a
    state-dict file (timm). Null: the library's default weights for that name."""
    feature_layers: Forbidden[list[int]] = Field(default=[-2], min_length=1)
    """Hidden states to use as features: 0 is the embeddings, -1 the last layer. The features of
    several layers are concatenated. LLaVA uses the layer before the last."""
    feature_select: Forbidden[Literal["patch", "cls_patch"]] = "patch"
    """Tokens to use as features: `patch` drops the class token, `cls_patch` keeps it (LLaVA's
    `mm_vision_select_feature`)."""
    grid_pool: Forbidden[Count | None] = None
    """Average the grid of patch features down to `grid_pool` x `grid_pool` tokens, for fewer image
    tokens. Null: no pooling."""
    image_size: Forbidden[Annotated[int, Field(gt=0, le=8192)] | None] = None
    """Side of the square input image in pixels. Null: the size that the encoder was trained
    with."""


class LanguageModelConfig(Section):
    """The causal language model, its tokenizer and its form in memory."""

    name: Explicit[NonEmptyText | None] = None
    """Local directory or hub name for `AutoModelForCausalLM`. Give either `name` or `config`."""
    config: Forbidden[Architecture | None] = None
    """Configuration (with `model_type`) to build the model from with random weights, for tests and
    tiny runs. It needs `tokenizer`."""
    tokenizer: Explicit[NonEmptyText | None] = None
    """Local directory or hub name of the tokenizer, or `bytes` for a built-in byte tokenizer
    (`bytes-img`: with `<img>` and `</img>`). Null: the tokenizer of `name`."""
    attn_implementation: Explicit[NonEmptyText] = "auto"
    """Attention kernel, by transformers' name. `auto`: FlashAttention if it is installed and
    supported, else PyTorch's SDPA. With `train.packing`, see `train.packing.attention`."""
    quantization: Forbidden[Literal["nf4", "fp4"] | None] = None
    """Keep the frozen linear layers except the output head in 4 bits (bitsandbytes). In stage 2 it
    needs `lora` (QLoRA). Null: keep them in the dtype of `train.precision`."""
    double_quantization: Forbidden[bool] = True
    """Also quantize the scales of 4-bit weights, to 8 bits; saves 0.37 bits per weight (QLoRA,
    section 3). Without `quantization` it has no effect."""

    @model_validator(mode="after")
    def _one_source(self) -> "LanguageModelConfig":
        if (self.name is None) == (self.config is None):
            raise ValueError("give exactly one of `name` and `config`")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("a model built from `config` needs `tokenizer`")
        return self


Tiles = Annotated[int, Field(gt=0, le=64)]
"""Number of tiles in a row, in a column, or of an image."""


class ImageTilingConfig(Section):
    """How an image is divided into crops, each of which the vision tower encodes
    (`docs/images.md`).
    """

    layout: Forbidden[str] = "none"
    """`none`: an image is one square (`data.image_aspect`). `anyres`: LLaVA-NeXT's overview and
    tiles, without the tokens of the padding, a learned newline after each row. `anyres_max_N`:
    LLaVA-OneVision's, which scales the tiles' tokens down to at most N crops' and divides no image
    of a record with several. `dynamic`: InternVL's tiles and overview."""
    grids: Forbidden[list[tuple[Tiles, Tiles]] | None] = Field(default=None, min_length=1)
    """Rows and columns of tiles to choose from (`anyres`, `anyres_max_N`); the order decides
    between grids that fit equally well. Null: LLaVA-NeXT's five grids of up to 4 tiles for
    `anyres`, all from 1 x 1 to 6 x 6 for `anyres_max_N`."""
    min_tiles: Forbidden[Tiles] = 1
    """Fewest tiles of an image (`dynamic`)."""
    max_tiles: Forbidden[Tiles] = 12
    """Most tiles of an image, the overview not counted (`dynamic`)."""

    @property
    def max_crops(self) -> int | None:
        """The N of `anyres_max_N`; None for every other layout."""
        match = _ANYRES_MAX.fullmatch(self.layout)
        return int(match[1]) if match else None

    @model_validator(mode="after")
    def _fits_the_layout(self) -> "ImageTilingConfig":
        layout = self.layout
        if layout not in ("none", "anyres", "dynamic") and self.max_crops is None:
            raise ValueError(
                "layout: expected none, anyres, anyres_max_N with N from 1 to 999 (anyres_max_9 is "
                f"LLaVA-OneVision's), or dynamic (found {layout!r})"
            )
        if self.grids is not None and not layout.startswith("anyres"):
            raise ValueError(
                f"`grids` is for anyres and anyres_max_N; remove it (layout: {layout})"
            )
        if layout != "dynamic" and (self.min_tiles, self.max_tiles) != (1, 12):
            raise ValueError(
                f"`min_tiles` and `max_tiles` are for dynamic; remove them (layout: {layout})"
            )
        if self.min_tiles > self.max_tiles:
            raise ValueError(
                f"min_tiles is {self.min_tiles}, but max_tiles is {self.max_tiles}; set min_tiles "
                "to at most that"
            )
        return self


_ANYRES_MAX = re.compile(r"anyres_max_([1-9]\d{0,2})")


class ModelConfig(Section):
    """The three parts of the model: vision tower, projector and language model.

    With `from_checkpoint` a finished model provides all three.
    """

    from_checkpoint: Explicit[NonEmptyText | None] = None
    """Finished vision-language model to start from: the folder or hub name of a LLaVA, LLaVA-NeXT,
    LLaVA-OneVision or InternVL of transformers, or a folder of the original LLaVA code
    (`docs/from-checkpoint.md`). It determines every other setting of `model` except
    `attn_implementation` and the quantization, and the defaults of `data.template` and
    `data.image_aspect`. Null: build the model from its parts."""
    vision_tower: VisionTowerConfig
    image_tiling: ImageTilingConfig = ImageTilingConfig()
    projector_type: Forbidden[str] = "mlp2x_gelu"
    """Architecture of the projector: `linear`; `mlpNx_gelu`, N linear layers with GELU between them
    (LLaVA-1.5: `mlp2x_gelu`); `pixel_shuffle_mlp`, which joins 2 x 2 tokens into one (InternVL); or
    `resampler`, learned queries with cross-attention (Qwen-VL). For average pooling, set
    `vision_tower.grid_pool`."""
    num_queries: Forbidden[Annotated[int, Field(gt=0, le=65_536)] | None] = None
    """Image tokens of the `resampler`: a square number, such as 64 or 144. Null: 256. Other
    projectors have no queries."""
    language_model: LanguageModelConfig

    @model_validator(mode="before")
    @classmethod
    def _parts_of_checkpoint(cls, tree: Any) -> Any:
        """Name the finished model as the source of the parts that are not given."""
        if not isinstance(tree, Mapping) or tree.get("from_checkpoint") is None:
            return tree
        filled = dict(tree)
        for part, defaults in (
            ("vision_tower", {"library": "transformers"}),
            ("language_model", {}),
        ):
            section = filled.get(part) or {}
            if isinstance(section, Mapping):
                named = section.get("name") is not None or section.get("config") is not None
                source = {} if named else {"name": filled["from_checkpoint"]}
                filled[part] = {**defaults, **section, **source}
        return filled

    @field_validator("projector_type")
    @classmethod
    def _known_projector(cls, name: str) -> str:
        try:
            connector_kind(name)
        except UserError as error:
            raise ValueError(str(error).removeprefix("model.projector_type: ")) from None
        return name

    @model_validator(mode="after")
    def _fitting_queries(self) -> "ModelConfig":
        if self.num_queries is None:
            return self
        if self.projector_type != "resampler":
            raise ValueError(
                f"num_queries is for projector_type: resampler (found {self.projector_type!r}); "
                "remove it"
            )
        if math.isqrt(self.num_queries) ** 2 != self.num_queries:
            raise ValueError(
                "num_queries: expected a square number, whose queries lie on a square grid, such "
                f"as 64, 144 or 256 (found {self.num_queries})"
            )
        return self

    def token_grid(self, tower_grid: TokenGrid) -> TokenGrid:
        """Return the tokens of an image crop in the language model, given those of the tower.

        Raises:
            UserError: If the projector cannot take the tower's tokens.
        """
        return connector_grid(self.projector_type, tower_grid, num_queries=self.num_queries)


class LoraConfig(Section):
    """LoRA adapters on the language model (peft). The section needs no key: `lora: {}`."""

    r: Forbidden[Annotated[int, Field(gt=0, le=65_536)]] = 16
    """Rank of the adapters. More rank has more capacity and takes more memory."""
    alpha: Forbidden[Positive] = 32
    """Scale of the adapters' output: it is multiplied by alpha / r."""
    dropout: Forbidden[Fraction] = 0.05
    """Dropout probability on the input of the adapters."""
    targets: Forbidden[list[NonEmptyText] | Literal["all-linear"]] = "all-linear"
    """Names of the language model's modules that get adapters, e.g. `[q_proj, v_proj]`.
    `all-linear`: all linear layers except the output head."""
    use_dora: Forbidden[bool] = False
    """Train the magnitude of each output separately from its direction (DoRA, arXiv 2402.09353)."""
    use_rslora: Forbidden[bool] = False
    """Scale the adapters by alpha / sqrt(r) instead of alpha / r (rsLoRA, arXiv 2312.03732)."""


DataFormat = Literal[
    "auto", "llava", "messages", "alpaca", "table", "imagefolder", "captions", "vqa", "shards"
]
"""Values of `format` of a data file."""


class ColumnNames(Section):
    """Columns of a table whose rows are a question and its answer, or a caption. A column that is
    null is recognized by its name (`docs/data-formats.md`).
    """

    id: Forbidden[NonEmptyText | None] = None
    """Id of the record."""
    image: Forbidden[NonEmptyText | None] = None
    """File name or bytes of the image, or a list of them."""
    question: Forbidden[NonEmptyText | None] = None
    """Question about the image."""
    answer: Forbidden[NonEmptyText | None] = None
    """Answer to the question."""
    text: Forbidden[NonEmptyText | None] = None
    """Caption, instead of question and answer."""
    messages: Forbidden[NonEmptyText | None] = None
    """Turns in LLaVA's or the messages format, in a CSV file as JSON."""

    @classmethod
    def of_option(cls, columns: Mapping[str, str] | None) -> Self:
        """Return the columns that the option --columns names; none if it was not given.

        Raises:
            ConfigError: A part is none that a table can have.
        """
        for part in columns or {}:
            if part not in cls.model_fields:
                expected = ", ".join(cls.model_fields)
                raise ConfigError(f"--columns: {part} is no part; expected one of {expected}")
        return cls.model_validate(columns or {})


class DataFile(Section):
    """A file or directory of records; `docs/data-formats.md` shows every format."""

    path: Explicit[NonEmptyText]
    """The file or directory, or a data set of the hub
    (`hf://datasets/OWNER/NAME@REVISION?config=CONFIG&split=SPLIT`). A resumed run may find the same
    records in another place; their content must not change."""
    streaming: Forbidden[bool] = False
    """Read a data set of the hub once, record by record, into tar shards, which needs no Arrow copy
    of it and goes on after an interruption."""
    format: Forbidden[DataFormat] = "auto"
    """Format of the records (`llava`, `messages`, `alpaca`, `table`), or of the file or directory
    (`imagefolder`; `captions`: images with a text file each; `vqa`; `shards`: tar files in
    WebDataset's layout). `auto` recognizes it."""
    columns: ColumnNames = ColumnNames()
    caption_prompt: Forbidden[NonEmptyText | None] = None
    """Question about the image for records that have none, such as captions. Null: the image
    alone."""
    annotations: Explicit[NonEmptyText | None] = None
    """File with the answers to the questions of `path` (`vqa`). Null: they are in `path`."""
    image_name: Forbidden[NonEmptyText | None] = None
    """Name of the image of an `image_id` (`vqa`), e.g. `COCO_train2014_{image_id:012d}.jpg`. Null:
    the questions name their images, or the `data_subtype` of VQA v2 determines it."""
    image_root: Explicit[NonEmptyText | None] = None
    """Directory that relative image names start from. Null: the directory of the file, or `path`
    itself if that is a directory."""
    follow_symlinks: Free[bool] = False
    """Allow symbolic links below `image_root` to lead out of it; `..` is never allowed."""
    weight: Forbidden[Annotated[float, Field(gt=0, le=1e4, allow_inf_nan=False)]] = 1.0
    """How often each record is used per epoch: 2 means twice, 0.5 means in every other epoch."""

    @field_validator("path")
    @classmethod
    def _address(cls, path: str) -> str:
        if is_hub_address(path):
            HubAddress.parse(path)
        return path

    @model_validator(mode="after")
    def _streaming_from_the_hub(self) -> "DataFile":
        if is_hub_address(self.path):
            if self.format in ("imagefolder", "captions", "vqa", "shards"):
                raise ValueError(
                    f"format {self.format!r} is of files and folders; a data set of the hub has "
                    "rows, so leave `format` out"
                )
        elif self.streaming:
            raise ValueError("`streaming` is for data sets of the hub (hf://datasets/...)")
        return self

    def images_start_in(self) -> Path:
        """Return the directory that relative image names start from.

        Image names in data sets of the hub start from the current directory.
        """
        if self.image_root is not None:
            return Path(self.image_root)
        if is_hub_address(self.path):
            return Path.cwd()
        path = Path(self.path)
        return path if path.is_dir() else path.parent


class DataConfig(Section):
    """The records, how they become tokens, and what happens to records that cannot be used."""

    train: Forbidden[Annotated[list[DataFile], Field(min_length=1)]]
    """Files of training records."""
    eval: Explicit[list[DataFile]] = Field(default=[])
    """Files of held-out records, for the validation loss; see `train.eval_every_steps`."""
    eval_text: Explicit[list[DataFile]] = Field(default=[])
    """Files of held-out conversations without images, for stage 2: their loss before the first step
    and at every evaluation shows what the language model forgets (`docs/report.md`)."""
    template: Forbidden[NonEmptyText] = "auto"
    """Chat template: the name of a built-in template (`docs/templates.md`), a YAML file, or `auto`
    for the tokenizer's own."""
    system: Forbidden[str | None] = None
    """System prompt for records without one. Null: the template's default; "": none."""
    image_separator: Explicit[str | None] = None
    """Text between an image and its neighbors in records whose content is a list of parts, and in
    `chat`, `evaluate` and the exported chat template. Null: the template's, usually a newline."""
    llava_quirks: Forbidden[Literal["none", "llava-1.5"]] = "none"
    """`llava-1.5` repeats the quirks of LLaVA-1.5's data code, to reproduce its models; the
    checkpoint's manifest lists them. `none` repeats none of them."""
    max_length: Forbidden[Annotated[int, Field(gt=0, le=sys.maxsize)]] = 2048
    """Maximum length of a record in tokens, image tokens included."""
    max_crops: Forbidden[Count | None] = None
    """Maximum number of image crops of a record, which the vision tower encodes; without
    `model.image_tiling`, an image is one crop. More are handled as a record that is too long. Null:
    no limit."""
    length_policy: Forbidden[Literal["error", "drop_turns", "skip"]] = "error"
    """What to do with longer records: `error` treats them as bad records (see `on_error`),
    `drop_turns` removes question-answer pairs from the end until the record fits, `skip` skips
    them. No record is ever cut inside an answer."""
    on_error: Explicit[Literal["stop", "quarantine"]] = "stop"
    """What to do with a record that cannot be used: `stop` the run, or `quarantine` the record,
    which skips it and lists it in `ledger.jsonl`."""
    max_quarantined: Free[CountOrZero] = 100
    """Number of records that may turn out bad during training before the run stops (`on_error:
    quarantine`)."""
    image_aspect: Forbidden[ImageAspect] = "pad"
    """How an image becomes square: `pad` puts the whole image on a square of the vision tower's
    mean color, `crop` takes the center square."""
    image_processing: Explicit[ImageProcessing] = "fast"
    """How images are decoded and resized: `exact` uses Pillow; `fast` takes less than half the time
    and differs from Pillow by at most 2 of 255 levels."""
    feature_cache: Explicit[NonEmptyText | None] = None
    """Directory for the vision tower's features of all images. Missing features are computed before
    training and then read in every step. Null: the tower encodes the images in every step.
    `docs/images.md` explains when the cache pays off."""
    feature_cache_gb: Free[Positive] = 100.0
    """Maximum size of `feature_cache` in GB (1e9 bytes), over all towers; a run that would need
    more is refused."""
    num_workers: Free[Annotated[int, Field(ge=0, le=1024)]] = 2
    """Number of processes per rank that load and prepare records. 0: load in the training
    process."""
    cache_dir: Free[NonEmptyText | None] = None
    """Directory for tokenized records, and for the sizes of images that are divided into crops,
    shared by runs. Null: tokenize all records and read the sizes at every start."""

    @property
    def files(self) -> list[DataFile]:
        """All files of records."""
        return [*self.train, *self.eval, *self.eval_text]


class LearningRates(Section):
    """Peak learning rate of each trainable part, after warm-up."""

    projector: Explicit[NonNegative]
    """Peak learning rate of the projector."""
    language_model: Explicit[NonNegative] = 0.0
    """Peak learning rate of the language model's weights or of its LoRA adapters. Stage 2 requires
    it; stage 1 refuses it, because the language model is frozen there."""


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    optimizer: Forbidden[Literal["adamw", "adamw_8bit"]] = "adamw"
    """`adamw_8bit` keeps both moments in 8 bits (bitsandbytes): 2 bytes per trainable weight
    instead of 8."""
    learning_rate: LearningRates
    weight_decay: Explicit[NonNegative] = 0.0
    """Weight decay. The default is LLaVA's."""
    betas: Explicit[tuple[Fraction, Fraction]] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moment."""
    epsilon: Explicit[Positive] = 1e-8
    """Constant in AdamW's denominator, for numerical stability."""
    schedule: Explicit[Literal["cosine", "linear", "constant"]] = "cosine"
    """Learning rate after warm-up: decays to 0 at the end of the run along a half cosine or a line,
    or stays constant."""
    warmup_ratio: Explicit[Fraction] = 0.03
    """Fraction of all steps over which the learning rate rises linearly to its peak."""
    max_grad_norm: Explicit[Positive | None] = 1.0
    """Clip the global norm of the gradient to this value. Null: no clipping."""


class PackingConfig(Section):
    """Records concatenated in rows instead of padded batches; records do not attend to each
    other.
    """

    max_tokens: Explicit[Count]
    """Length of a row in tokens, image tokens included; at least `data.max_length`. It determines
    how much memory the activations take."""
    round_to: Explicit[Annotated[int, Field(gt=0, le=65_536)]] = 1
    """Pad each row to a multiple of this number of tokens, so that compiled kernels see few
    shapes."""
    attention: Explicit[Literal["auto", "flash_attn", "varlen", "flex", "sdpa"]] = "auto"
    """Attention kernel: flash-attn, PyTorch's variable-length attention, FlexAttention, or one SDPA
    call per record. `auto` takes the first that is available."""

    @model_validator(mode="after")
    def _rows_hold_a_multiple(self) -> "PackingConfig":
        if self.round_to > self.max_tokens:
            raise ValueError(
                f"round_to is {self.round_to}, but a row has at most max_tokens, "
                f"{self.max_tokens}; set round_to to at most that"
            )
        return self


Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class TrackingConfig(Section):
    """Names and directories for the experiment trackers of `train.trackers`."""

    project: Free[Annotated[str, Field(min_length=1, max_length=128)]] = "vlm_sft"
    """Project name in wandb and trackio; experiment in MLflow; directory inside `dir` for
    TensorBoard."""
    name: Free[NonEmptyText | None] = None
    """Name of the run. Null: the last part of `output_dir`."""
    entity: Free[NonEmptyText | None] = None
    """User or team in wandb. Null: the account's default."""
    group: Free[NonEmptyText | None] = None
    """Group of the run in wandb and trackio; the tag `group` in MLflow."""
    tags: Free[list[NonEmptyText]] = Field(default=[])
    """Tags of the run in wandb and MLflow."""
    dir: Free[NonEmptyText | None] = None
    """Directory that the trackers write to, unless a variable such as MLFLOW_TRACKING_URI names a
    server. Null: `trackers` inside `output_dir`."""

    @field_validator("project")
    @classmethod
    def _is_a_name(cls, project: str) -> str:
        if set(project) & set("/\\#?%:") or project in (".", ".."):
            raise ValueError(f"expected a name without / \\ # ? % : (found {project!r})")
        return project


class TrainConfig(Section):
    """Duration, batches, precision, sharding, checkpoints, evaluation and logging."""

    epochs: Explicit[Positive] = 1.0
    """Passes over the training data; fractions are allowed."""
    max_steps: Explicit[Count | None] = None
    """Maximum number of optimizer steps. Null: as many as `epochs` takes."""
    global_batch_size: Forbidden[Count]
    """Number of records per optimizer step, over all ranks and micro-batches."""
    micro_batch_size: Explicit[Count | None] = None
    """Number of records that one rank processes at once, padded to the longest. It affects speed
    and memory, but neither the records of a step nor its loss. Give either this or `packing`."""
    packing: Explicit[PackingConfig | None] = None
    """Pack records into rows instead of padding them (`docs/packing.md`). Packing affects speed and
    memory, but neither the records of a step nor its loss. Null: padded batches."""
    share_image_prefix: Forbidden[bool] = False
    """With `packing`: compute the common beginning of records of the same image, up to and
    including the image, only once. Each record's loss stays the same, but records of an image are
    in the same step, so images are shuffled instead of records."""
    precision: Explicit[Literal["bf16", "fp16", "fp32"]] = "bf16"
    """Dtype of the frozen weights and of the forward pass."""
    master_weights: Forbidden[Literal["fp32", "none"]] = "fp32"
    """Dtype of the trained weights. With `none`, full fine-tuning in bf16 keeps the language model
    in bf16 without an fp32 copy and rounds each update stochastically."""
    sharding: Explicit[Literal["auto", "none", "zero2", "zero3"]] = "auto"
    """Shard weights, gradients and optimizer state over the ranks with FSDP2. `zero3` frees
    gathered weights between forward and backward, `zero2` keeps them (less communication, more
    memory), `none` replicates the model (DDP). `auto` is `zero3` for full fine-tuning on several
    ranks, else `none`. See `docs/multi-gpu.md`, also for users of DeepSpeed."""
    on_nonfinite_loss: Explicit[Literal["stop", "skip"]] = "stop"
    """What to do if the loss or the gradient of a step is NaN or infinite: `stop` the run, or
    `skip` the update and report it."""
    max_skipped_steps: Free[CountOrZero] = 10
    """Number of updates that may be skipped before the run stops (`on_nonfinite_loss: skip`)."""
    neftune_alpha: Explicit[Positive | None] = None
    """NEFTune (arXiv 2310.05914): add uniform noise of up to alpha / sqrt(text tokens of the record
    x width) to the text embeddings during training. The paper uses 5 to 15. Null: no noise."""
    activation_checkpointing: Free[Literal["auto", "none", "selective", "full"]] = "auto"
    """What the backward pass recomputes to save memory: nothing (`none`), the cheap operations of
    every layer of the language model (`selective`), or whole layers (`full`). `auto` measures a
    step and takes the fastest policy that fits. The result is the same with all of them."""
    compile: Explicit[bool] = False
    """Compile the language model's layers with torch.compile: a minute or more at the start, faster
    steps afterwards, and slightly different rounding. Needs a C++ compiler on a CPU, Triton on a
    GPU."""
    fp8: Explicit[bool] = False
    """Multiply in fp8 in the wide linear layers of the language model (torchao): faster, less
    exact, and only on NVIDIA GPUs from the Ada and Hopper generation on."""
    deterministic: Explicit[bool] = False
    """Use only kernels that give bit-identical results on the same machine with the same libraries.
    Slower on a GPU, and refused where an operation has no such kernel. On a CPU results are always
    repeatable."""
    group_by_length: Forbidden[bool] = False
    """Put records of similar length, and with and without images, into the same batch: less
    padding, but a less random order. Not needed with `packing`."""
    save_every_steps: Free[Count] = 500
    """Number of steps between checkpoints."""
    save_every_minutes: Free[Positive | None] = None
    """Also save a checkpoint when this many minutes have passed since the last one. Null: only by
    steps."""
    async_checkpointing: Free[bool] = True
    """Write checkpoints in the background; training only waits while the weights are copied to
    memory."""
    keep_last_checkpoints: Free[Count] = 2
    """Number of most recent checkpoints to keep; older ones are deleted."""
    eval_every_steps: Free[Count | None] = None
    """Number of steps between evaluations on `data.eval`, `data.eval_text` and `eval_suite`. Null:
    no evaluation before the end."""
    eval_samples: Free[CountOrZero] = 3
    """Number of held-out records whose questions the model answers at each evaluation, written to
    `samples.jsonl`."""
    eval_suite: Explicit[NonEmptyText | None] = None
    """Suite of tasks (`docs/evaluation.md`) whose questions the model answers at each evaluation;
    all ranks share them. Keep it small: training waits. Null: none."""
    keep_best: Explicit[NonEmptyText | None] = None
    """Metric of the evaluations by which the best checkpoint is kept in `best`: `TASK.SCORE` of
    `eval_suite`, e.g. `pope.accuracy`, or `eval_loss`. Null: no checkpoint is kept for its
    metric."""
    early_stopping: Explicit[Count | None] = None
    """Number of evaluations in a row without a better `keep_best` after which the run ends. Null:
    train to the last step."""
    log_every_steps: Free[Count] = 1
    """Number of steps between rows of `metrics.jsonl`. Each row is also logged to stderr; on a
    terminal a progress bar shows the newest row instead."""
    trackers: Free[list[Tracker]] = Field(default=[])
    """Experiment trackers that get the same numbers as `metrics.jsonl`, and the generated answers
    with their images (`docs/report.md`). Each needs its extra: `pip install
    'vlm-sft[tensorboard]'`, or `track` for the others. `[]`: none; `report.html` is always
    written."""
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _padded_or_packed(self) -> "TrainConfig":
        if (self.micro_batch_size is None) == (self.packing is None):
            raise ValueError(
                "give exactly one of `micro_batch_size` (padded) and `packing`; set the other one "
                "to null"
            )
        if self.packing is not None and self.group_by_length:
            raise ValueError("`packing` needs no `group_by_length`; set that to false")
        if self.share_image_prefix and self.packing is None:
            raise ValueError(
                "`share_image_prefix` needs `packing`; give it instead of `micro_batch_size`"
            )
        return self

    @model_validator(mode="after")
    def _best_of_something(self) -> "TrainConfig":
        if self.early_stopping is not None and self.keep_best is None:
            raise ValueError("`early_stopping` needs `keep_best`, the metric that has to improve")
        if self.keep_best not in (None, "eval_loss") and self.eval_suite is None:
            raise ValueError("`keep_best` needs `eval_suite`, unless it is eval_loss")
        return self


class RunConfig(Section):
    """The configuration of a run: the whole YAML file."""

    output_dir: Free[NonEmptyText]
    """Directory of the run: checkpoints, metrics, ledger and the result (`final`). The same command
    resumes the run in it."""
    seed: Forbidden[Annotated[int, Field(ge=0, lt=2**32)]] = 42
    """Seed of all random numbers: weight initialization, the order of records, dropout."""
    projector: Explicit[NonEmptyText | None] = None
    """Checkpoint (`RUN/final` of stage 1) whose projector this run starts from. Null: random
    initialization."""
    start_from: Explicit[NonEmptyText | None] = None
    """Checkpoint (`RUN/final`) of full fine-tuning whose projector and language model this run
    starts from, to train in several stages with a learning rate schedule each. `model` names the
    same parts as in that run. For full fine-tuning only. Null: the language model as `model` names
    it."""
    model: ModelConfig
    lora: Forbidden[LoraConfig | None] = None
    """LoRA adapters on the language model, in stage 2 only. Null: full fine-tuning."""
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig

    @model_validator(mode="after")
    def _rows_hold_every_record(self) -> "RunConfig":
        packing, longest = self.train.packing, self.data.max_length
        if packing is not None and packing.max_tokens < longest:
            raise ValueError(
                f"train.packing.max_tokens is {packing.max_tokens}, but data.max_length allows "
                f"records of {longest} tokens; set max_tokens to at least that"
            )
        return self

    @model_validator(mode="after")
    def _validation_loss_exists(self) -> "RunConfig":
        if self.train.keep_best == "eval_loss" and not self.data.eval:
            raise ValueError("train.keep_best: eval_loss needs `data.eval`")
        return self

    @model_validator(mode="after")
    def _one_start(self) -> "RunConfig":
        if self.start_from is not None and self.projector is not None:
            raise ValueError(
                "`projector` and `start_from` each name a projector to start from; remove one of "
                "them"
            )
        if self.start_from is not None and self.lora is not None:
            raise ValueError(
                "`start_from` is for full fine-tuning: adapters need their base as a model of its "
                "own; export that run (vlm-sft export RUN/final OUT --to hf) and set "
                "model.from_checkpoint: OUT instead"
            )
        return self

    def input_paths(self) -> list[Path]:
        """Return the files and directories that the run reads, as far as they exist here.

        Image files are not included; see `image_roots`.
        """
        files = self.data.files
        names = (
            self.projector,
            self.start_from,
            self.model.from_checkpoint,
            self.model.vision_tower.name,
            self.model.vision_tower.weights,
            self.model.language_model.name,
            self.model.language_model.tokenizer,
            self.data.template,
            self.train.eval_suite,
            *(file.path for file in files),
            *(file.annotations for file in files),
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
    if isinstance(overrides, str):
        raise ConfigError("overrides: expected a list of key.path=value, found a single text")
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
    """Return whether the name of a model or tokenizer means a local directory, not a hub name.

    Hub names are `model` or `owner/model`; the latter means a directory if `owner/` exists.
    """
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        return True
    return "/" in name and Path(name).parent.is_dir()
