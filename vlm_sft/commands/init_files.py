"""The texts of the configurations that `vlm-sft init` writes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from vlm_sft.config.method import Method
from vlm_sft.planning.report import METHOD_NAMES
from vlm_sft.utils.cores import available_cores

CAPTION_PROMPT: Final = "Describe the image."
"""What stage 2 and the suite ask about an image whose record has no question."""

SuiteTask = Literal["answer", "describe"]
"""What a suite measures: short answers, or descriptions."""


@dataclass(frozen=True)
class Project:
    """What both stages have in common.

    Attributes:
        out: Folder of the configurations; runs are in its `runs`.
        data: Records of stage 2.
        captions: Captions of stage 1; None: `data`.
        eval: Held-out records; None: none.
        columns: Columns of `data` and `eval` by part, where their names are not recognized.
        images: Folder of relative image names; None: that of each file.
        tower: Vision tower.
        tower_is_timm: Whether it is a folder of timm.
        grid_pool: Side of the grid that its image tokens are averaged to; None: all tokens.
        llm: Language model.
        tokenizer: Tokenizer; None: the language model's.
        template: Chat template of stage 2.
        from_checkpoint: Finished model instead of tower and language model.
        projector: Checkpoint of an earlier stage 1.
        start_from: Checkpoint of an earlier full fine-tuning.
        precision: `train.precision`.
        data_are_captions: Whether the records of `data` have no questions.
        prompted: Files of stage 2 with records that get their question from `caption_prompt`.
        device: Name of the device.
        gpus: Number of devices.
        suite_images: Folder of the images of the suite.
    """

    out: str
    data: str
    captions: str | None
    eval: str | None
    columns: Mapping[str, str]
    images: str | None
    tower: str | None
    tower_is_timm: bool
    grid_pool: int | None
    llm: str | None
    tokenizer: str | None
    template: str
    from_checkpoint: str | None
    projector: str | None
    start_from: str | None
    precision: str
    data_are_captions: bool
    prompted: frozenset[str]
    device: str
    gpus: int
    suite_images: str

    @property
    def has_stage1(self) -> bool:
        """Whether the projector is trained in a stage 1."""
        return not (self.from_checkpoint or self.projector or self.start_from)

    @property
    def asks_training_data(self) -> bool:
        """Whether the suite asks about records that are trained on."""
        return self.eval is None or Path(self.eval).resolve() == Path(self.data).resolve()

    @property
    def runs(self) -> str:
        """Folder of the runs."""
        return f"{self.out}/runs"


@dataclass(frozen=True)
class Chosen:
    """The settings of a stage that the planner chose.

    Attributes:
        method: The training method.
        policy: `train.activation_checkpointing`.
        micro_batch_size: Records that one device processes at once.
        global_batch_size: Records of a step.
        epochs: Passes over the data.
        max_length: Longest record in tokens.
        steps: Optimizer steps of the run, about.
        quantized: Whether the frozen weights of the language model are in 4 bits.
        memory: Planned memory in GiB.
        parameters: Parameters of the language model; 0: unknown.
        notes: Sentences about the plan.
    """

    method: Method
    policy: str
    micro_batch_size: int
    global_batch_size: int
    epochs: int
    max_length: int
    steps: int
    quantized: bool = False
    memory: float = 0.0
    parameters: int = 0
    notes: tuple[str, ...] = ()


_RATES: Final = {"full": "2e-5", "lora": "2e-4", "qlora": "2e-4"}
"""Learning rates of the language model (LLaVA-1.5)."""

SMALL: Final = 1_000_000_000
"""Parameters of a language model below which `init` raises LLaVA-1.5's rates for full fine-tuning.

LLaVA-1.5 chose them for 7B; a small model barely learns with them. Measured with SmolLM2-135M and
one epoch of 74 captions: a validation loss of 3.44 with 2e-5 for both parts, 3.25 with 2e-4 and
1e-4 (which `init` writes), and 3.51 with 1e-3 and 3e-4.
"""


def stage1_file(project: Project, chosen: Chosen) -> str:
    """Return the configuration of stage 1."""
    captions = project.captions or project.data
    if project.captions is not None or project.data_are_captions:
        about, template = (
            "captions: an image, then its caption; a question would be dropped",
            "plain",
        )
    else:
        about, template = (
            "there are no captions: the projector learns from the answers",
            project.template,
        )
    return f"""\
# Stage 1: train only the projector, on {captions}.
#
#   vlm-sft check  {project.out}/stage1.yaml     # every record, image and mask; the model; one step
#   {_launch(project)}stage1 {project.out}/stage1.yaml
#
# {_planned(project, chosen)}
# Every setting: docs/configuration.md.

output_dir: {_text(f"{project.runs}/stage1")}   # the same command resumes a run in it
seed: 42

{_model(project, quantized=chosen.quantized)}
data:
  train:
{_file(captions, project)}
  template: {_text(template)}   # {about}
{_data(project, chosen)}
optim:
  learning_rate:
    projector: 1e-3   # LLaVA-1.5
{_optim()}
{_train(project, chosen)}"""


def stage2_file(project: Project, chosen: Chosen) -> str:
    """Return the configuration of stage 2."""
    method = chosen.method
    start = f"{project.runs}/stage1/final" if project.has_stage1 else project.projector
    lines = []
    if start is not None:
        lines = [f"projector: {_text(start)}   # the projector that stage 1 trained"]
    if project.start_from is not None:
        lines = [f"start_from: {_text(project.start_from)}   # projector and language model"]
    lora = """\
lora:
  r: 64          # rank: more has more capacity and takes more memory
  alpha: 128     # the adapters' output is multiplied by alpha / r
  dropout: 0.05
  targets: all-linear

"""
    projector, language_model, source = "2e-5", _RATES.get(method, "2e-5"), "LLaVA-1.5"
    if method == "full" and 0 < chosen.parameters < SMALL:
        projector, language_model = "2e-4", "1e-4"
        source = "LLaVA-1.5, with 7B parameters, uses 2e-5 for both"
    validation = ""
    if project.eval is not None:
        validation = f"  eval:\n{_file(project.eval, project, stage2=True)}\n"
    train = (
        "the projector and the language model" if method == "full" else "the projector and adapters"
    )
    return f"""\
# Stage 2 ({METHOD_NAMES[method].removeprefix("stage 2, ")}): train {train}, on {project.data}.
#
#   vlm-sft check  {project.out}/stage2.yaml{"     # after stage 1" if project.has_stage1 else ""}
#   {_launch(project)}stage2 {project.out}/stage2.yaml
#
# {_planned(project, chosen)}
# Every setting: docs/configuration.md.

output_dir: {_text(f"{project.runs}/stage2")}   # the same command resumes a run in it
seed: 42
{"".join(f"{line}{chr(10)}" for line in lines)}
{_model(project, quantized=chosen.quantized)}
{"" if method == "full" else lora}data:
  train:
{_file(project.data, project, stage2=True)}
{validation}  template: {_text(project.template)}   # auto: the tokenizer's own chat template
{_data(project, chosen)}
optim:
  learning_rate:
    projector: {projector}        # {source}
    language_model: {language_model}
{_optim()}
{_train(project, chosen)}"""


def suite_file(project: Project, files: Mapping[SuiteTask, str]) -> str:
    """Return the configuration of the evaluation suite.

    Args:
        project: Data and models.
        files: The file of the questions of each task.
    """
    final = f"{project.runs}/stage2/final"
    source = project.eval or project.data
    warning = ""
    if project.asks_training_data:
        warning = "# These records are also trained on: hold some out (init --eval).\n"
    text = f"""\
# Questions from {source} with their answers (docs/evaluation.md). Each is asked by itself, also one
# from the middle of a conversation.
{warning}#
#   vlm-sft evaluate {final} {project.out}/suite.yaml --out {project.out}/evaluation

seed: 0
tasks:
"""
    for task, file in files.items():
        kind, comment, limits = _SCORED[task]
        text += f"""\
  - name: {task}
    kind: {kind}   # {comment}
    files: [{_text(file)}]
    images: {_text(project.suite_images)}
    conditions: [right, blank]   # blank: what the model answers without seeing the image
{limits}"""
    return text


_SCORED: Final[Mapping[SuiteTask, tuple[str, str, str]]] = {
    "answer": (
        "gqa", "short answers: equality, without case and final period", "    max_tokens: 32\n"
    ),
    "describe": (
        "caption",
        "long answers: CIDEr-D, BLEU and ROUGE-L against the record's (docs/scoring.md)",
        f"    prompt: {CAPTION_PROMPT}   # for records without a question\n    max_tokens: 256\n",
    ),
}  # fmt: skip


def _planned(project: Project, chosen: Chosen) -> str:
    devices = project.device if project.gpus == 1 else f"{project.gpus} x {project.device}"
    return (
        f"Planned: {chosen.memory:.1f} GiB of memory on {devices} (`vlm-sft plan` shows the parts)."
    )


def _launch(project: Project) -> str:
    if project.gpus == 1:
        return "vlm-sft "
    return f"torchrun --nproc-per-node {project.gpus} -m vlm_sft."


def _text(value: str) -> str:
    """Return a text as a YAML value: as it is if it is a plain path or name, else quoted."""
    plain = value.replace("/", "").replace("-", "").replace("_", "").replace(".", "")
    return (
        value if plain.isascii() and plain.isalnum() and plain[0].isalpha() else json.dumps(value)
    )


def _file(path: str, project: Project, *, stage2: bool = False) -> str:
    lines = f"    - path: {_text(path)}"
    if project.images is not None:
        lines += f"\n      image_root: {_text(project.images)}   # relative image names start here"
    if project.columns and path != project.captions:
        columns = ", ".join(f"{part}: {_text(name)}" for part, name in project.columns.items())
        lines += f"\n      columns: {{{columns}}}"
    if stage2 and path in project.prompted:
        lines += f"\n      caption_prompt: {CAPTION_PROMPT}   # for records without a question"
    return lines


def _model(project: Project, *, quantized: bool) -> str:
    quantization = "    quantization: nf4   # frozen weights in 4 bits\n" if quantized else ""
    if project.from_checkpoint is not None:
        model = f"model:\n  from_checkpoint: {_text(project.from_checkpoint)}   # all parts\n"
        return model + (f"  language_model:\n{quantization}" if quantization else "")
    assert project.tower is not None and project.llm is not None
    tokenizer = "" if project.tokenizer is None else f"    tokenizer: {_text(project.tokenizer)}\n"
    library, layers = "transformers", "[-2]       # the layer before the last, as in LLaVA"
    if project.tower_is_timm:
        library, layers = "timm", "[-1]       # the last feature map"
    pool = ""
    if project.grid_pool is not None:
        tokens = project.grid_pool**2
        pool = f"    grid_pool: {project.grid_pool}   # {tokens} tokens an image: for a CPU\n"
    return f"""\
model:
  vision_tower:
    library: {library}
    name: {_text(project.tower)}
    feature_layers: {layers}
    feature_select: patch
{pool}  projector_type: mlp2x_gelu
  language_model:
    name: {_text(project.llm)}
{tokenizer}{quantization}"""


def _data(project: Project, chosen: Chosen) -> str:
    aspect = (
        ""
        if project.from_checkpoint
        else "  image_aspect: pad          # the whole image on a square\n"
    )
    cache = ""
    if project.device == "cpu" and (project.has_stage1 or chosen.epochs > 1):
        folder, passes = f"{project.runs}/features", "all epochs"
        if project.has_stage1:
            passes = "both stages"
        cache = f"  feature_cache: {_text(folder)}   # the tower runs once for {passes}\n"
    return f"""\
  max_length: {chosen.max_length}            # tokens of a record, image tokens included
  length_policy: drop_turns  # longer records lose their last questions and answers
  on_error: stop             # quarantine: skip bad records and list them in ledger.jsonl
{aspect}{cache}  num_workers: {_num_workers(project)}
"""


def _num_workers(project: Project) -> int:
    """Return two workers, or one if training is to share a single core with them."""
    return min(2, available_cores()) if project.device == "cpu" else 2


def _optim() -> str:
    return """\
  weight_decay: 0.0
  schedule: cosine
  warmup_ratio: 0.03
  max_grad_norm: 1.0
"""


def _steps_between(steps: int) -> int:
    """Return after how many of a run's steps it saves: about a tenth of them, in round numbers."""
    return max((n for n in (10, 20, 50, 100, 200, 500) if n <= steps / 10), default=10)


def _train(project: Project, chosen: Chosen) -> str:
    saves = _steps_between(chosen.steps)
    every, best = "null", ""
    if project.eval is not None and chosen.method != "stage1":
        every = str(saves)
        best = "  keep_best: null            # eval_loss: also keep the best step, as RUN/best\n"
    return f"""\
train:
  epochs: {chosen.epochs}                  # more learn more and take longer
  global_batch_size: {chosen.global_batch_size}      # records of an optimizer step
  micro_batch_size: {chosen.micro_batch_size}       # of them at once, for memory and speed only
  precision: {project.precision}
  activation_checkpointing: {chosen.policy}   # recompute to save memory: none, selective or full
  save_every_steps: {saves}       # of about {chosen.steps}
  keep_last_checkpoints: 2
  eval_every_steps: {every}
  eval_samples: 3
{best}  log_every_steps: 1
  trackers: []               # tensorboard, wandb, trackio, mlflow; report.html is always written
"""
