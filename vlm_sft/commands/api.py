"""The Python API: the functions that `import vlm_sft` offers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState

from vlm_sft.config.finished import resolve
from vlm_sft.config.method import Stage, require_stage1, require_stage2, trainable_parts
from vlm_sft.config.resume import require_changeable
from vlm_sft.config.schema import RunConfig, load_config, parse_config
from vlm_sft.data.build import load_chat_tokenizer
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.record_formats import RawRecord, parse_record
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import UserError
from vlm_sft.inference.loaded_model import LoadedModel, load_checkpoint
from vlm_sft.inspection.tokens import TokenView, view_tokenized
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.setup import load_model

ConfigInput = RunConfig | str | Path | Mapping[str, Any]
"""A configuration: loaded, the path of its YAML file, or nested plain values."""


@dataclass(frozen=True)
class TrainResult:
    """How `train_stage` ended.

    Attributes:
        output_dir: The run directory.
        checkpoint: `final` if the run is finished, else its newest checkpoint; None if it was
            stopped before the first one.
        step: Optimizer steps done at that checkpoint.
        finished: Whether the run is finished; False if a signal stopped it.
    """

    output_dir: Path
    checkpoint: Path | None
    step: int
    finished: bool

    def load(self, device: str | None = None) -> LoadedModel:
        """Load the checkpoint for inference; see `load_checkpoint`.

        Raises:
            UserError: There is no checkpoint.
        """
        if self.checkpoint is None:
            raise UserError(f"{self.output_dir}: the run has no checkpoint", code="no_checkpoint")
        return load_checkpoint(self.checkpoint, device=device)


def train_stage(
    stage: Stage,
    config: ConfigInput,
    *overrides: str,
    allow_change: Sequence[str] = (),
) -> TrainResult:
    """Train a stage, as `vlm-sft stage1` and `vlm-sft stage2` do.

    Resumes from the newest checkpoint of `output_dir`, if there is one. Progress is logged to the
    logger `vlm_sft`.

    Args:
        stage: `stage1` or `stage2`.
        config: The configuration.
        overrides: `key.path=value` settings that replace those of a configuration file.
        allow_change: Settings that a resumed run may change, as for `--allow-change`.

    Raises:
        UserError: Anything that a user can fix; see its subclasses.
    """
    from vlm_sft.commands.train import run_stage

    if stage not in ("stage1", "stage2"):
        raise UserError(f"stage {stage!r}: expected 'stage1' or 'stage2'")
    run_config = _as_config(config, overrides)
    (require_stage1 if stage == "stage1" else require_stage2)(run_config)
    require_changeable(run_config, allow_change)
    try:
        result = run_stage(run_config, stage=stage, allowed=allow_change)
    finally:
        # Accelerate keeps the precision and the trackers of a run for the whole process.
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()
    output_dir = Path(run_config.output_dir)
    folder = None if result.checkpoint is None else result.checkpoint.folder
    step = 0 if result.checkpoint is None else result.checkpoint.step
    return TrainResult(output_dir, folder, step, finished=result.stopped_by is None)


def build_model(config: ConfigInput, *overrides: str) -> VisionLanguageModel:
    """Build the model that a run of this configuration would start to train.

    The base models are loaded (or built from `config` keys with random weights), the projector
    comes from `projector` or is initialized randomly, and the trainable parts are unfrozen.

    Raises:
        UserError: A part cannot be loaded.
    """
    run_config = _as_config(config, overrides)
    model, _ = load_model(run_config, trainable_parts(run_config))
    return model


def tokenize_record(
    tokenizer: ConfigInput | ChatTokenizer,
    record: Mapping[str, Any] | Conversation,
    *,
    image_root: str | Path = ".",
    num_image_tokens: int = 1,
) -> TokenView:
    """Tokenize one record as training does, to see its ids, labels and mask.

    `print` shows the result as text, with the trained tokens between ⟦ and ⟧. The length limit of
    the configuration is not applied, and images are not opened.

    Args:
        tokenizer: A configuration, whose tokenizer and chat template are loaded, or a
            `ChatTokenizer` (faster for many records).
        record: A record in any of the supported formats, or a `Conversation`.
        image_root: Directory that image names of the record start from.
        num_image_tokens: Image tokens per image, for `TokenView.length` only; `input_ids` contains
            one placeholder per image.

    Raises:
        RecordError: The record is malformed or cannot be tokenized.
        UserError: The tokenizer or the chat template cannot be loaded.
    """
    if isinstance(tokenizer, ChatTokenizer):
        chat_tokenizer = tokenizer
    else:
        chat_tokenizer = load_chat_tokenizer(_as_config(tokenizer))
    if not isinstance(record, Conversation):
        record = parse_record(RawRecord(record, "record", "record"), None, Path(image_root))
    tokenized = chat_tokenizer.tokenize(record)
    image_tokens = [num_image_tokens] * tokenized.num_images
    return view_tokenized(tokenized, tokenized.labels, chat_tokenizer, image_tokens)


def _as_config(config: ConfigInput, overrides: Sequence[str] = ()) -> RunConfig:
    if isinstance(config, (str, Path)):
        return resolve(load_config(config, overrides))
    if overrides:
        raise UserError("overrides are for configuration files; change the configuration itself")
    return resolve(config if isinstance(config, RunConfig) else parse_config(config, "config"))
