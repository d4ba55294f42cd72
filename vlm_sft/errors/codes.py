"""The error codes: number, name, meaning and remedy of every error that a user can fix.

`docs/errors.md` is generated from them. The `reason` in a ledger is one of these names, and the
error line of a command begins with the code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class ErrorCode:
    """One error that a user can fix.

    Attributes:
        number: Number of the code; the hundreds are its family. A number is never reused.
        name: Unique name in snake_case, used where the error is raised and in ledgers.
        meaning: What is wrong, in one sentence.
        remedy: What to do, in one sentence.
    """

    number: int
    name: str
    meaning: str
    remedy: str

    def __str__(self) -> str:
        """Return the code as it is printed, e.g. `VS101`."""
        return f"VS{self.number:03d}"


FAMILIES: Final[Mapping[int, str]] = {
    0: "Input and configuration",
    1: "Disk, processes and checkpoints",
    2: "Images",
    3: "Records, text and templates",
    4: "Model, training and memory",
    5: "Teacher models and generated answers",
}
"""Title of each family, by the hundreds of its numbers."""

ALL: Final = (
    ErrorCode(
        1,
        "configuration",
        "A key or a value of a configuration file or of an override is wrong.",
        "Fix the key that the message names; for a misspelled key it names the nearest known one.",
    ),
    ErrorCode(
        2,
        "wrong_input",
        "An option, a name or a file that was given to a command cannot be used.",
        "Do what the message says; `--help` shows examples for every command.",
    ),
    ErrorCode(
        3,
        "not_a_file",
        "A directory, pipe, socket or device is given instead of a regular file.",
        "Give the path of a regular file.",
    ),
    ErrorCode(
        4,
        "file_too_large",
        "A file is larger than any valid file of its kind, so it is not read into memory.",
        "Check that the path is the intended one.",
    ),
    ErrorCode(
        5,
        "custom_code",
        "A model requires its own Python code, which is never executed.",
        "Use a model that is built into the library, or convert it to one.",
    ),
    # --- Disk, processes and checkpoints
    ErrorCode(
        100,
        "checkpoint_unusable",
        "A checkpoint cannot be used, for a reason that has no other code.",
        "Do what the message says, or give another checkpoint.",
    ),
    ErrorCode(
        101,
        "disk_full",
        "The disk, or the user's quota, is full.",
        "Free some space or choose another `output_dir`, then repeat the command; checkpoints that "
        "were saved before are intact.",
    ),
    ErrorCode(
        102,
        "disk_error",
        "The operating system could not read or write a file.",
        "Check the file and the disk that the message names, then repeat the command.",
    ),
    ErrorCode(
        103,
        "not_permitted",
        "A file or directory may not be read or written, or the disk is read-only.",
        "Change the permissions, or choose another location.",
    ),
    ErrorCode(
        104,
        "cache_unusable",
        "A file in `data.cache_dir` or `data.feature_cache` cannot be read or written.",
        "Delete the file (it is computed again), or choose another directory with free space.",
    ),
    ErrorCode(
        105,
        "feature_cache_full",
        "The features of all images would exceed `data.feature_cache_gb` or the free disk space.",
        "Free some space, raise the limit, or train without `data.feature_cache`.",
    ),
    ErrorCode(
        106,
        "features_damaged",
        "A file in `data.feature_cache` is missing or does not match its checksum; a damaged file "
        "is kept as `NAME.kept-N`.",
        "Repeat the command; it computes these features again and resumes from the newest "
        "checkpoint.",
    ),
    ErrorCode(
        110,
        "checkpoints_all_damaged",
        "The run has checkpoints, but none of them is complete; it does not silently start over.",
        "Restore a complete checkpoint, or delete the directory `checkpoints` to start over.",
    ),
    ErrorCode(
        111,
        "checkpoint_damaged",
        "A checkpoint has a missing, an additional or a changed file.",
        "Use another checkpoint of the run, or copy this one again from an intact copy.",
    ),
    ErrorCode(
        112,
        "manifest_damaged",
        "A checkpoint's `manifest.json` does not match its checksum, so it cannot be trusted.",
        "Use another checkpoint of the run, or copy this one again from an intact copy.",
    ),
    ErrorCode(
        113,
        "no_checkpoint",
        "The directory does not exist, or does not contain a complete checkpoint.",
        "Give a directory like `RUN/final` or `RUN/checkpoints/step-00000100`.",
    ),
    ErrorCode(
        114,
        "checkpoint_format",
        "The checkpoint has a format that this version does not read.",
        "Use the version of vlm-sft that is named in the checkpoint's manifest.",
    ),
    ErrorCode(
        115,
        "save_failed",
        "A checkpoint could not be written.",
        "Fix what the message names and repeat the command; it resumes from the checkpoint before.",
    ),
    ErrorCode(
        116,
        "save_changed",
        "A trial checkpoint that was written and read back differs from the original.",
        "Choose another `output_dir`; this disk does not store data reliably.",
    ),
    ErrorCode(
        117,
        "save_incomplete",
        "A trained parameter would not be saved in any part of the checkpoint.",
        "Report it; this is a bug, and nothing was trained or written.",
    ),
    ErrorCode(
        120,
        "folder_in_use",
        "Another process is training in this `output_dir`.",
        "Wait for the process that the message names, or choose another `output_dir`.",
    ),
    ErrorCode(
        121,
        "not_ours",
        "An output would replace or delete an input, or a file that this toolkit did not write.",
        "Choose a new name or an empty directory, or use `--overwrite` if the command has it.",
    ),
    ErrorCode(
        131,
        "data_changed",
        "The training data differs from the data that the run was started with.",
        "Restore the files, or start a new run in another `output_dir`.",
    ),
    ErrorCode(
        132,
        "settings_changed",
        "Settings differ from those that the run was started with.",
        "Restore them, allow those that may change with `--allow-change KEY`, or choose another "
        "`output_dir`.",
    ),
    ErrorCode(
        133,
        "stage_changed",
        "The directory contains a run of the other stage.",
        "Choose another `output_dir`; stage 2 starts from stage 1 with `projector=RUN/final`.",
    ),
    ErrorCode(
        141,
        "loader_died",
        "A data loader process was killed.",
        "Lower `data.num_workers` (0 loads in the training process) if memory or shared memory was "
        "full, then repeat the command.",
    ),
    # --- Images
    ErrorCode(
        201,
        "image_missing",
        "A record's image file does not exist.",
        "Check the name and `image_root`, or remove the record.",
    ),
    ErrorCode(
        202,
        "image_not_file",
        "A record's image is a directory, a pipe, a socket or a device.",
        "Give the path of a regular file.",
    ),
    ErrorCode(
        203,
        "image_format",
        "An image file is empty, or has none of the supported formats.",
        "Save it as JPEG, PNG, WebP, GIF, BMP or TIFF; the file extension does not matter.",
    ),
    ErrorCode(
        204,
        "image_broken",
        "An image is truncated or corrupt.",
        "Download or copy the file again.",
    ),
    ErrorCode(
        205,
        "image_too_large",
        "An image has more pixels, or a longer side, than the decoder accepts.",
        "Shrink it.",
    ),
    ErrorCode(
        207,
        "image_path",
        "An image path is a URL, or leads out of the image root through `..` or a symbolic link.",
        "Set `image_root` to a directory that contains all images, allow links with "
        "`follow_symlinks: true`, or move the image.",
    ),
    ErrorCode(
        208,
        "image_changed",
        "An image file has changed its size since the run read its records.",
        "Restore the old file, or start a new run in another `output_dir`.",
    ),
    ErrorCode(
        209,
        "image_unreadable",
        "An image file exists but cannot be read.",
        "Check its permissions and the disk.",
    ),
    ErrorCode(
        210,
        "image_field",
        "A record's image is neither a file name nor embedded bytes.",
        "Give `image` or `images` (not both) as file names or base64 data URLs.",
    ),
    # --- Records, text and templates
    ErrorCode(
        301,
        "not_utf8",
        "A file or a line of records is not UTF-8.",
        "Save the file as UTF-8; the message gives the position of the first wrong byte.",
    ),
    ErrorCode(
        302,
        "bad_text",
        "A text contains a lone surrogate, which is not a character.",
        "Write the complete character, or remove the surrogate.",
    ),
    ErrorCode(
        303,
        "json_syntax",
        "A file or line is not valid JSON.",
        "Fix it at the position that the message gives.",
    ),
    ErrorCode(
        304,
        "json_duplicate_key",
        "A key appears twice in one JSON object.",
        "Keep one of the two.",
    ),
    ErrorCode(
        305,
        "json_nan",
        "A record contains NaN or an infinity, which are not JSON.",
        "Write a number, or null.",
    ),
    ErrorCode(
        306,
        "json_depth",
        "JSON is nested too deeply to be a record.",
        "Fix or remove it.",
    ),
    ErrorCode(
        307,
        "line_too_long",
        "A record is larger than the reader accepts.",
        "Store images in files instead of the record, or remove the line.",
    ),
    ErrorCode(
        308,
        "data_file_missing",
        "A file of records or annotations does not exist.",
        "Check its path in `data` or on the command line.",
    ),
    ErrorCode(
        309,
        "data_file_unreadable",
        "A file of records or annotations cannot be read, is damaged, or has an unknown format.",
        "Use one of the formats of `docs/data-formats.md`.",
    ),
    ErrorCode(
        310,
        "role_order",
        "The turns of a record do not alternate, or the last one is not an answer.",
        "Fix the order: at most one system turn first, then user and assistant alternately.",
    ),
    ErrorCode(
        311,
        "empty_answer",
        "An answer is empty or consists of white space.",
        "Write an answer, or remove the question and its answer.",
    ),
    ErrorCode(
        312,
        "no_answer",
        "A record has no assistant turn to train on.",
        "Add an assistant turn, or remove the record.",
    ),
    ErrorCode(
        313,
        "image_count",
        "The number of image placeholders in a record differs from its number of images.",
        "Write one `<image>` for each image.",
    ),
    ErrorCode(
        314,
        "unknown_role",
        "The role of a turn is missing or unknown.",
        "Use one of the roles that the message lists.",
    ),
    ErrorCode(
        315,
        "image_in_answer",
        "An image is in a turn that is not the user's.",
        "Move it to a user turn; in an answer given as text, `<image>` is ordinary text.",
    ),
    ErrorCode(
        316,
        "format",
        "A record has none of the supported formats, or the keys of two of them.",
        "Use a format of `docs/data-formats.md`, and set `format` or `columns` if it is ambiguous.",
    ),
    ErrorCode(
        317,
        "bad_id",
        "A record's `id` is neither text nor an integer.",
        "Write it as text, or omit it.",
    ),
    ErrorCode(
        318,
        "bad_turn",
        "A turn is not a JSON object, or its content is neither text nor a list of parts.",
        "Fix the turn that the message names.",
    ),
    ErrorCode(
        319,
        "bad_loss",
        "A turn's `loss` or `weight` has a wrong value, or the turn is not an answer.",
        "Use true or false for `loss`, 0 or 1 for `weight`, on answers only.",
    ),
    ErrorCode(
        320,
        "no_targets",
        "No token of a record is supervised, so there is nothing to train on.",
        "Remove the record, or train on one of its answers.",
    ),
    ErrorCode(
        321,
        "too_long",
        "A record is longer than `data.max_length`.",
        "Raise the limit, or choose `length_policy: drop_turns` or `skip`.",
    ),
    ErrorCode(
        322,
        "tool_calls",
        "A turn has tool calls, which are not supported.",
        "Write the call into the text of the turn.",
    ),
    ErrorCode(
        323,
        "several_images",
        "`llava_quirks: llava-1.5` keeps one image per turn, and a turn has several.",
        "Distribute them over turns, or set `llava_quirks: none`.",
    ),
    ErrorCode(
        324,
        "unspellable",
        "The tokenizer cannot encode a text without a special or unknown token.",
        "Use a tokenizer with byte fallback, or remove the record.",
    ),
    ErrorCode(
        325,
        "template",
        "A chat template is missing or invalid, or does not fit the tokenizer or a record.",
        "Choose another template or fix its file; `vlm-sft check` tests it.",
    ),
    ErrorCode(
        326,
        "mask_proof",
        "The supervised tokens of a record differ from its answers.",
        "Choose another template; if it is a built-in one, report it together with the record.",
    ),
    ErrorCode(
        327,
        "prompt_ends_in_answer",
        "A prompt ends with an answer.",
        "End it with a user turn.",
    ),
    ErrorCode(
        328,
        "too_many_crops",
        "The images of a record are divided into more crops than `data.max_crops`.",
        "Raise the limit, lower `model.image_tiling.max_tiles` or the grids, or choose "
        "`length_policy: drop_turns` or `skip`.",
    ),
    ErrorCode(
        330,
        "no_records",
        "No record is left to train on.",
        "Look at the counts in the message, and check the records with `vlm-sft check`.",
    ),
    ErrorCode(
        331,
        "too_many_broken",
        "More records failed to load during training than `data.max_quarantined` allows.",
        "Find all of them with `vlm-sft check` and fix them, or raise the limit.",
    ),
    ErrorCode(
        332,
        "missing_column",
        "A table or a VQA file lacks the column or part that has the texts or the images.",
        "Name the column with `columns` of the data file, or add it.",
    ),
    ErrorCode(
        333,
        "ambiguous_columns",
        "Several columns of a table could have the same part of the records.",
        "Name the right one with `columns` of the data file.",
    ),
    ErrorCode(
        334,
        "bad_row",
        "A row of a table has more or fewer cells than the header, or a wrong quote.",
        "Put cells with delimiters, quotes or line breaks in quotes, and double quotes in them.",
    ),
    ErrorCode(
        335,
        "empty_cell",
        "A cell of a table is empty that a record needs.",
        "Fill it, or remove the row.",
    ),
    ErrorCode(
        336,
        "repeated_row",
        "A row of an imagefolder, or an id of a VQA file, repeats an earlier one.",
        "Keep one of the two.",
    ),
    ErrorCode(
        337,
        "unpaired",
        "An image has no caption or two, a caption no image, or a question no answer.",
        "Add the file or entry that is missing, or remove the one that is left.",
    ),
    ErrorCode(
        338,
        "hub_dataset",
        "A data set of the hub is not there, not accessible, or has no such config or split.",
        "Check the address (`hf://datasets/OWNER/NAME`), HF_TOKEN and the network.",
    ),
    # --- Model, training and memory
    ErrorCode(
        401,
        "wrong_base",
        "The vision tower or language model is not the one that a checkpoint was trained with.",
        "Restore the original, or give its location in the configuration.",
    ),
    ErrorCode(
        402,
        "tokenizer_or_template_changed",
        "Tokenizer, chat template or LLaVA quirks are not those that the run was started with.",
        "Restore them, or start a new run in another `output_dir`.",
    ),
    ErrorCode(
        403,
        "shapes_differ",
        "A tensor or the vision features have another shape than in the model.",
        "Use the vision tower, features, `projector_type` and language model of the training run.",
    ),
    ErrorCode(
        404,
        "nothing_learns",
        "Nothing is trainable, or a trainable part gets no gradient.",
        "Look at the trained tokens with `vlm-sft show`.",
    ),
    ErrorCode(
        406,
        "tensors_differ",
        "Tensors are missing, or unexpected ones are present.",
        "Use the configuration that they were saved with, or copy the whole directory again.",
    ),
    ErrorCode(
        407,
        "frozen_part_moved",
        "Frozen weights have changed during the run.",
        "Do not use the result, and report how the run was started.",
    ),
    ErrorCode(
        410,
        "not_finite",
        "The loss or the gradient of a step is NaN or infinite; the weights were not updated.",
        "Check the records that the message names, lower the learning rate, or use bf16 or fp32.",
    ),
    ErrorCode(
        411,
        "too_many_not_finite",
        "More updates were skipped than `train.max_skipped_steps` allows.",
        "Lower the learning rate, or check the records that the message names.",
    ),
    ErrorCode(
        412,
        "fp16_overflow",
        "The gradient overflows in fp16 even without loss scaling.",
        "Use `train.precision=bf16` or `fp32`.",
    ),
    ErrorCode(
        413,
        "out_of_memory",
        "The GPU is out of memory.",
        "Lower `train.micro_batch_size` (or `train.packing.max_tokens`) or `data.max_length`, or "
        "set `train.activation_checkpointing: full`.",
    ),
    ErrorCode(
        414,
        "packing_leaks",
        "In a packed row, the language model lets records attend to each other.",
        "Train with padding: set `train.micro_batch_size` and remove `train.packing`.",
    ),
    # --- Teacher models and generated answers
    ErrorCode(
        500,
        "teacher_address",
        "The address of a teacher model cannot be used, or would send the key unencrypted.",
        "Give `teacher.base_url` as https://host/v1, or http:// for a local server, without user "
        "name or password.",
    ),
    ErrorCode(
        501,
        "teacher_key",
        "The environment variable with the teacher's key is not set or is empty.",
        "Set the variable that `teacher.api_key_env` names.",
    ),
    ErrorCode(
        502,
        "teacher_refused",
        "The teacher's server refuses every request, and a retry would not help.",
        "Fix what the message names (key, model, address, parameters, account), then repeat the "
        "command.",
    ),
    ErrorCode(
        503,
        "answers_damaged",
        "A line of the recorded answers is not a valid answer.",
        "Delete the line that the message names; its request is sent again.",
    ),
    ErrorCode(
        504,
        "spending_damaged",
        "The file with the costs of a run is damaged or edited, so its limits cannot be enforced.",
        "Restore `spending.jsonl`, or move it away to count from zero.",
    ),
    ErrorCode(
        505,
        "judge_refused",
        "The server of a judge model refuses every request, and a retry would not help.",
        "Fix what the message names: `--judge-url`, `--judge-model` or the key.",
    ),
    ErrorCode(
        506,
        "verdicts_damaged",
        "A line of the recorded replies of a judge is not valid.",
        "Delete the line that the message names; its request is sent again.",
    ),
)
"""All codes, sorted by number."""

CODES: Final[Mapping[str, ErrorCode]] = {code.name: code for code in ALL}
"""All codes by name."""

CODE_OF_FINGERPRINT: Final[Mapping[str, str]] = {
    "stage": "stage_changed",
    "base_model": "wrong_base",
    "tokenizer": "tokenizer_or_template_changed",
    "template": "tokenizer_or_template_changed",
    "recipe": "tokenizer_or_template_changed",
    "data": "data_changed",
}
"""Names of errors, by the entry of a checkpoint's fingerprint that differs from the run's."""

_HEAD: Final = """\
# Errors

A command that cannot continue prints one line and exits with code 2:

```
error VS311: a.json[7]: record 'r7': turn 1: the answer is empty; write one or remove the exchange
```

The sentence names the file, record or setting. The code identifies the error and is never reused.
The names below are also the values of `reason` in `ledger.jsonl` and of `vlm-sft show --reason`. In
Python every such error is a subclass of `vlm_sft.UserError`: `ConfigError`, `TemplateError`,
`RecordError`, `ImageError` or `CheckpointError`. A traceback is a bug; please report it.

Generated from `vlm_sft/errors/codes.py` by `vlm-sft errors > docs/errors.md`.
"""


def page() -> str:
    """Return `docs/errors.md`, with a table for every family."""
    lines = [_HEAD]
    for family, title in FAMILIES.items():
        lines += [f"## {title}", "", "| code | name | meaning | remedy |"]
        lines.append("|---|---|---|---|")
        lines += [
            f"| {code} | `{code.name}` | {code.meaning} | {code.remedy} |"
            for code in ALL
            if code.number // 100 == family
        ]
        lines.append("")
    return "\n".join(lines)
