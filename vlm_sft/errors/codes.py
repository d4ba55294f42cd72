"""Every fault that has a name: its code, what it means, what to do. Makes `docs/errors.md`.

A ledger's `reason` is one of these names, and a command's error line begins with the code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class ErrorCode:
    """One fault.

    Attributes:
        number: Its family in the hundreds; never given to another fault again.
        name: Unique, in snake_case; raise sites and ledgers use it.
        meaning: One sentence.
        remedy: One sentence.
    """

    number: int
    name: str
    meaning: str
    remedy: str

    def __str__(self) -> str:
        """The code as it is printed, e.g. `VS101`."""
        return f"VS{self.number:03d}"


FAMILIES: Final[Mapping[int, str]] = {
    0: "Input and configuration",
    1: "Disk, processes and checkpoints",
    2: "Images",
    3: "Records, texts and templates",
    4: "Numbers, and parts that do not go together",
    5: "Teachers and answers of instruction data",
}
"""Titles by the hundreds of a code's number."""

ALL: Final = (
    ErrorCode(
        1,
        "configuration",
        "A key or a value of a configuration file or of an override is wrong.",
        "Mend the key that the message names; a misspelled one is told with the nearest known one.",
    ),
    ErrorCode(
        2,
        "wrong_input",
        "Something given to a command (an option, a name, a file) cannot be used.",
        "Do what the message says; `--help` shows examples of every command.",
    ),
    ErrorCode(
        3,
        "not_a_file",
        "A directory, pipe, socket or device stands where a regular file is expected.",
        "Give the name of a regular file.",
    ),
    ErrorCode(
        4,
        "file_too_large",
        "A file is larger than any file of its kind, and is not read into memory.",
        "Check that the name is the one that was meant.",
    ),
    ErrorCode(
        5,
        "custom_code",
        "A model folder needs Python code of its own, which is never run.",
        "Use a model that the library has built in, or convert the folder to such a model.",
    ),
    # --- disk, processes and checkpoints
    ErrorCode(
        100,
        "checkpoint_unusable",
        "A checkpoint cannot be used for a reason that has no code of its own.",
        "Do what the message says, or give another checkpoint.",
    ),
    ErrorCode(
        101,
        "disk_full",
        "The disk, or this user's share of it, has no room for what is to be written.",
        "Make room or choose another `output_dir`, then repeat the command: checkpoints saved "
        "before are untouched.",
    ),
    ErrorCode(
        102,
        "disk_error",
        "The system refused to read or write a file.",
        "Look at the file and the disk that the message names, then repeat the command.",
    ),
    ErrorCode(
        103,
        "not_permitted",
        "This user may not read or write a file or folder, or the disk is read-only.",
        "Change its permissions, or choose another place.",
    ),
    ErrorCode(
        104,
        "cache_unusable",
        "What is in `data.cache_dir` or `data.feature_cache` cannot be read or written.",
        "Remove that file, which costs time only, or give another folder with room in it.",
    ),
    ErrorCode(
        105,
        "feature_cache_full",
        "The features of the run's images have no room, in `data.feature_cache_gb` or on the disk.",
        "Make room or raise the limit, or train without `data.feature_cache`.",
    ),
    ErrorCode(
        106,
        "features_damaged",
        "A file in `data.feature_cache` is gone or is not what was written; what was there is kept "
        "as `NAME.kept-N`.",
        "Repeat the command: it computes these features again and resumes from the newest "
        "checkpoint.",
    ),
    ErrorCode(
        110,
        "checkpoints_all_damaged",
        "The run has checkpoints and not one of them is complete; it is not started over silently.",
        "Copy a good checkpoint back, or delete the folder `checkpoints` to start over.",
    ),
    ErrorCode(
        111,
        "checkpoint_damaged",
        "A file of a checkpoint is missing, too many, or changed since it was written.",
        "Use another checkpoint of the run, or copy this one again from where it was whole.",
    ),
    ErrorCode(
        112,
        "manifest_damaged",
        "A checkpoint's `manifest.json` is not what was written, so nothing in it can be trusted.",
        "Use another checkpoint of the run, or copy this one again from where it was whole.",
    ),
    ErrorCode(
        113,
        "no_checkpoint",
        "The folder is not there, or holds no complete checkpoint.",
        "Give a folder like `RUN/final` or `RUN/checkpoints/step-00000100`.",
    ),
    ErrorCode(
        114,
        "checkpoint_format",
        "The checkpoint was written in a form that this version does not read.",
        "Use the version of vlm-sft that wrote it; its manifest names it.",
    ),
    ErrorCode(
        115,
        "save_failed",
        "A checkpoint could not be written.",
        "Mend what the message says and repeat the command: it goes on from the one before.",
    ),
    ErrorCode(
        116,
        "save_changed",
        "What was saved for a trial did not come back from the disk as it was.",
        "Choose another `output_dir`: this place does not keep what is written.",
    ),
    ErrorCode(
        117,
        "save_incomplete",
        "Something is trained that no part of a checkpoint would hold.",
        "Report it: this is a bug, and nothing was trained or written.",
    ),
    ErrorCode(
        120,
        "folder_in_use",
        "Another run is at work in this `output_dir`.",
        "Wait for the process that the message names, or choose another `output_dir`.",
    ),
    ErrorCode(
        121,
        "not_ours",
        "An output would replace or delete something that this toolkit did not write, or an input.",
        "Choose a new name or an empty directory, or allow the replacement of a file with "
        "`--overwrite` where the command has it.",
    ),
    ErrorCode(
        131,
        "data_changed",
        "The training data is not what the run was started with.",
        "Put the files back as they were, or start a new run in another `output_dir`.",
    ),
    ErrorCode(
        132,
        "settings_changed",
        "Settings differ from those that the run was started with.",
        "Set them back, allow those that may change with `--allow-change KEY`, or choose another "
        "`output_dir`.",
    ),
    ErrorCode(
        133,
        "stage_changed",
        "The folder holds a run of the other stage.",
        "Choose another `output_dir`; stage 2 starts from stage 1 by `projector=RUN/final`.",
    ),
    ErrorCode(
        141,
        "loader_died",
        "A process that reads records ahead was ended from outside.",
        "Set `data.num_workers` lower, or 0, if memory or shared memory ran out, and repeat the "
        "command.",
    ),
    # --- images
    ErrorCode(
        201,
        "image_missing",
        "A record's image file is not there.",
        "Check the name and `image_root`, or leave the record out.",
    ),
    ErrorCode(
        202,
        "image_not_file",
        "A record's image is a folder, a pipe, a socket or a device.",
        "Give the name of a regular file.",
    ),
    ErrorCode(
        203,
        "image_format",
        "An image file is empty, or its content is of none of the formats that are decoded.",
        "Save it as JPEG, PNG, WebP, GIF, BMP or TIFF; the name's ending does not matter.",
    ),
    ErrorCode(
        204,
        "image_broken",
        "An image is truncated or corrupt.",
        "Get the file again.",
    ),
    ErrorCode(
        205,
        "image_too_large",
        "An image has more pixels, or a longer side, than is ever decoded.",
        "Shrink it.",
    ),
    ErrorCode(
        207,
        "image_path",
        "An image's name is a URL, or leads out of the image root by `..` or a symbolic link.",
        "Set `image_root` to a folder above all images, allow links with `follow_symlinks: true`, "
        "or move the image.",
    ),
    ErrorCode(
        208,
        "image_changed",
        "An image file has another size than when the run read its records.",
        "Put the old file back, or start a new run in another `output_dir`.",
    ),
    ErrorCode(
        209,
        "image_unreadable",
        "An image file is there but the system does not give its content.",
        "Check its permissions and the disk.",
    ),
    ErrorCode(
        210,
        "image_field",
        "What a record gives for an image is neither a file's name nor embedded bytes.",
        "Give `image` or `images` (not both) as names, or base64 data URLs.",
    ),
    # --- records, texts and templates
    ErrorCode(
        301,
        "not_utf8",
        "A file or line of records is not UTF-8.",
        "Save the file as UTF-8; the message has the place of the first wrong byte.",
    ),
    ErrorCode(
        302,
        "bad_text",
        "A text has half a surrogate pair, which is no character.",
        "Write the whole character, or remove the half.",
    ),
    ErrorCode(
        303,
        "json_syntax",
        "A file or line is not valid JSON.",
        "Mend it at the place that the message names.",
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
        "A record has NaN or an infinity, which are not JSON.",
        "Write a number, or null.",
    ),
    ErrorCode(
        306,
        "json_depth",
        "JSON is nested too deeply to be a record.",
        "Mend or remove it.",
    ),
    ErrorCode(
        307,
        "line_too_long",
        "A record is larger than is ever held in memory.",
        "Put images into files instead of the record, or remove the line.",
    ),
    ErrorCode(
        308,
        "data_file_missing",
        "A file of records or annotations is not there.",
        "Check its name in `data`, or on the command line.",
    ),
    ErrorCode(
        309,
        "data_file_unreadable",
        "A file of records or annotations cannot be read, is damaged, or is of no known kind.",
        "Give a JSON list, one JSON record a line, Parquet, or a `datasets` folder.",
    ),
    ErrorCode(
        310,
        "role_order",
        "The speakers of a record do not alternate, or it does not end in an answer.",
        "Mend the order: user and assistant in turn, at most one system turn, first.",
    ),
    ErrorCode(
        311,
        "empty_answer",
        "An answer is empty or blank.",
        "Write one, or remove the question and its answer.",
    ),
    ErrorCode(
        312,
        "no_answer",
        "A record has no answer to train on.",
        "Add an assistant's turn, or remove the record.",
    ),
    ErrorCode(
        313,
        "image_count",
        "A text has more or fewer places for images than there are images.",
        "Write one `<image>` for every image.",
    ),
    ErrorCode(
        314,
        "unknown_role",
        "A turn's speaker is missing or of no known name.",
        "Name it as the message says.",
    ),
    ErrorCode(
        315,
        "image_in_answer",
        "An image stands in a turn that is not the user's.",
        "Move it to the user's turn; in an answer's plain text `<image>` is text.",
    ),
    ErrorCode(
        316,
        "format",
        "A record is of none of the known forms, or of two at once.",
        "Write it as LLaVA, messages or Alpaca, and set the file's `format` if it cannot be told.",
    ),
    ErrorCode(
        317,
        "bad_id",
        "A record's `id` is neither text nor an integer.",
        "Write it as text, or leave it out.",
    ),
    ErrorCode(
        318,
        "bad_turn",
        "A turn is not an object, or its content is neither text nor a list of parts.",
        "Mend the turn that the message names.",
    ),
    ErrorCode(
        319,
        "bad_loss",
        "A turn's `loss` or `weight` has a wrong value, or stands on a turn that is no answer.",
        "Write true or false, 0 or 1, on answers only.",
    ),
    ErrorCode(
        320,
        "no_targets",
        "No token of a record is supervised, so it could teach nothing.",
        "Remove it, or let one of its answers be trained.",
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
        "A turn has tool calls, which would be lost.",
        "Write the call into the turn's text.",
    ),
    ErrorCode(
        323,
        "several_images",
        "`llava_quirks: llava-1.5` keeps one image per turn, and a turn has several.",
        "Spread them over turns, or take `llava_quirks: none`.",
    ),
    ErrorCode(
        324,
        "unspellable",
        "The tokenizer cannot encode a text without a control or unknown token.",
        "Use a tokenizer with byte fallback, or leave the record out.",
    ),
    ErrorCode(
        325,
        "template",
        "A chat template is missing or faulty, or does not fit the tokenizer or a record's turns.",
        "Choose another template or mend its file; `python -m vlm_sft.check` tries it out.",
    ),
    ErrorCode(
        326,
        "mask_proof",
        "The tokens of a record supervise something other than its answers.",
        "Choose another template; with one that comes with vlm-sft, report it with the record.",
    ),
    ErrorCode(
        327,
        "prompt_ends_in_answer",
        "A prompt to be answered ends in an answer.",
        "End it with the user's turn.",
    ),
    ErrorCode(
        330,
        "no_records",
        "No record is left to train on.",
        "Look at the counts in the message, and at the records with `python -m vlm_sft.check`.",
    ),
    ErrorCode(
        331,
        "too_many_broken",
        "More records turned out broken during training than `data.max_quarantined` allows.",
        "Find all of them with `python -m vlm_sft.check` and mend them, or raise the limit.",
    ),
    # --- numbers, and parts that do not go together
    ErrorCode(
        401,
        "wrong_base",
        "The vision tower or language model is not the one that a checkpoint was trained with.",
        "Put the original back, or name it in the configuration.",
    ),
    ErrorCode(
        402,
        "tokenizer_or_template_changed",
        "Tokenizer, chat template or LLaVA quirks are not those that the run was started with.",
        "Put them back as they were, or start a new run in another `output_dir`.",
    ),
    ErrorCode(
        403,
        "shapes_differ",
        "A tensor, or the choice of vision features, is of another shape than the model's.",
        "Use the tower, its features, the `projector_type` and the language model that it was "
        "trained with.",
    ),
    ErrorCode(
        404,
        "nothing_learns",
        "No part is trainable, or a trainable part has no gradient.",
        "Look at the trained tokens with `python -m vlm_sft.show`.",
    ),
    ErrorCode(
        406,
        "tensors_differ",
        "Tensors are missing, or there are some that the model has no place for.",
        "Use the configuration that they were made with, or get the whole folder again.",
    ),
    ErrorCode(
        407,
        "frozen_part_moved",
        "Weights that must not change have changed during the run.",
        "Do not use the result; report how the run was started.",
    ),
    ErrorCode(
        410,
        "not_finite",
        "A step's loss or gradient is NaN or infinite; the weights are those before it.",
        "Look at the records that the message names, lower the learning rate, or use bf16 or fp32.",
    ),
    ErrorCode(
        411,
        "too_many_not_finite",
        "More updates had to be left out than `train.max_skipped_steps` allows.",
        "Lower the learning rate, or look at the records that the message names.",
    ),
    ErrorCode(
        412,
        "fp16_overflow",
        "The gradient overflows fp16 even without loss scaling.",
        "Use `train.precision=bf16` or `fp32`.",
    ),
    ErrorCode(
        413,
        "out_of_memory",
        "The GPU has not enough memory for a micro-batch.",
        "Lower `train.micro_batch_size` (or `train.packing.max_tokens`) or `data.max_length`, or "
        "turn on gradient checkpointing.",
    ),
    ErrorCode(
        414,
        "packing_leaks",
        "The language model does not keep the records of a pack apart.",
        "Train padded: set `train.micro_batch_size` and take `train.packing` away.",
    ),
    # --- teachers and answers of instruction data
    ErrorCode(
        500,
        "teacher_address",
        "A teacher's address cannot be used, or would carry the key in the open.",
        "Give `teacher.base_url` as https://host/v1, or http:// for a server on this machine, "
        "without user name or password.",
    ),
    ErrorCode(
        501,
        "teacher_key",
        "The environment variable with the teacher's key is not set, or holds no key.",
        "Set the variable that `teacher.api_key_env` names.",
    ),
    ErrorCode(
        502,
        "teacher_refused",
        "The teacher's server refuses every request for a reason that repeating does not change.",
        "Mend what the message names (key, model, address, parameters, account), then give the "
        "same command again.",
    ),
    ErrorCode(
        503,
        "answers_damaged",
        "A line among the recorded answers is no answer.",
        "Delete the line that the message names; its request is asked again.",
    ),
    ErrorCode(
        504,
        "spending_damaged",
        "The record of what a run has spent was damaged or edited, so its limits cannot be kept.",
        "Restore `spending.jsonl`, or move it away to count from zero.",
    ),
)
"""Every code, in order of numbers."""

CODES: Final[Mapping[str, ErrorCode]] = {code.name: code for code in ALL}
"""Every code by its name."""

CODE_OF_FACT: Final[Mapping[str, str]] = {
    "stage": "stage_changed",
    "base_model": "wrong_base",
    "tokenizer": "tokenizer_or_template_changed",
    "template": "tokenizer_or_template_changed",
    "recipe": "tokenizer_or_template_changed",
    "data": "data_changed",
}
"""Names by the fact of a checkpoint's manifest that differs from the run's own."""

_HEAD: Final = """\
# Errors

A command that cannot go on says so and ends with exit code 2:

```
error VS311: a.json[7]: record 'r7': turn 1: the answer is empty; write one or remove the exchange
```

The sentence names the file, record or setting; the code says which fault it is, and no code is ever
given to another one. `reason` in `ledger.jsonl`, and what `python -m vlm_sft.show --reason` takes,
are the names below. A traceback is a bug: please report it.

Generated from `vlm_sft/errors/codes.py` by `python -m vlm_sft.errors > docs/errors.md`.
"""


def page() -> str:
    """`docs/errors.md`: a table for every family."""
    lines = [_HEAD]
    for family, title in FAMILIES.items():
        lines += [f"## {title}", "", "| code | name | what it means | what to do |"]
        lines.append("|---|---|---|---|")
        lines += [
            f"| {code} | `{code.name}` | {code.meaning} | {code.remedy} |"
            for code in ALL
            if code.number // 100 == family
        ]
        lines.append("")
    return "\n".join(lines)
