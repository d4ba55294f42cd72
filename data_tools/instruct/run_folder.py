"""The files of a run, and which of them may be replaced."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from data_tools.instruct.config import InstructConfig
from vlm_sft.config import loading as settings
from vlm_sft.errors import UserError
from vlm_sft.utils.owned_files import own_output
from vlm_sft.utils.ownership import foreign_entries, read_marker, refuse_in_checkpoint, refuse_input

KIND: Final = "instruction-data run"
"""The kind in the marker of a run's folder."""

PLOTS: Final = ("funnel.png", "reasons.png", "claims.png", "categories.png")
EXPORTS: Final = ("llava.json", "messages.jsonl", "train.parquet", "receipts.jsonl", "export.json")

WRITTEN: Final[dict[str, tuple[str, ...]]] = {
    "index": ("images.jsonl", "index.json"),
    "plan": ("requests.jsonl", "templates.json", "config.yaml", "plan.json"),
    "grow": (
        "images.jsonl",
        "index.json",
        "parents.jsonl",
        "requests.jsonl",
        "templates.json",
        "config.yaml",
        "plan.json",
    ),
    "generate": (),
    "verify": (
        "samples.jsonl",
        "rejected.jsonl",
        "verification.json",
        "judge/requests.jsonl",
        "judge/templates.json",
    ),
    "clean": ("kept.jsonl", "dropped.jsonl", "cleaning.json", "reviewed.jsonl"),
    "export": tuple(f"export/{name}" for name in EXPORTS),
    "report": ("report/report.html", *(f"report/{name}" for name in PLOTS)),
}
"""Files that each stage replaces, below the run's folder."""

_APPENDED: Final = (
    "answers", "failures.jsonl", "spending.jsonl", "teacher.json", "batches.jsonl", "cache",
    "checked", "export", "judge", "report", "review",
)  # fmt: skip
"""Other names in a run's folder: files that only grow, and folders."""


class _Name:
    """The path of a name below a run's folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: "RunFolder", owner: object = None) -> Path:
        return folder.root / self._name


@dataclass(frozen=True)
class RunFolder:
    """A run's folder; the docstring of each path begins with the stage that writes it."""

    root: Path

    config = _Name("config.yaml")
    """`plan`: the resolved configuration."""
    images = _Name("images.jsonl")
    """`index`: one `coco.AnnotatedImage` a line, in the order of ids."""
    index = _Name("index.json")
    """`index`: findings in the annotations, counts and digests."""
    templates = _Name("templates.json")
    """`plan`: the prompts by name."""
    plan = _Name("plan.json")
    """`plan`: numbers of images chosen, refused and left out, with the estimates."""
    requests = _Name("requests.jsonl")
    """`plan`: one `schema.Request` a line."""
    parents = _Name("parents.jsonl")
    """`grow`: the `schema.Sample`s that the requests make new ones from."""
    answers = _Name("answers")
    """`generate`: a folder of append-only files of `schema.Answer`; runs may share it."""
    failures = _Name("failures.jsonl")
    """`generate`: one `schema.Failure` a line, appended; the last one of a request counts."""
    spending = _Name("spending.jsonl")
    """`generate`: attempts and their costs, appended; the sum is what the run has spent."""
    teacher = _Name("teacher.json")
    """`generate`: properties of the server."""
    batches = _Name("batches.jsonl")
    """`generate`: batches and their states, appended."""
    samples = _Name("samples.jsonl")
    """`verify`: accepted `schema.Sample`s, in the order of the requests."""
    rejected = _Name("rejected.jsonl")
    """`verify`: rejected ones, in the order of the requests."""
    verification = _Name("verification.json")
    """`verify`: counts of requests, answers, verdicts and reasons."""
    judge = _Name("judge")
    """`verify`: requests to the judge and its answers, as a run's folder of its own."""
    review = _Name("review")
    """`review`: a folder of append-only files of `review.decisions.Decision`, one a reviewer."""
    reviewed = _Name("reviewed.jsonl")
    """`clean`, with decisions of reviewers: the samples after them, which are cleaned."""
    kept = _Name("kept.jsonl")
    """`clean`: samples to train on."""
    dropped = _Name("dropped.jsonl")
    """`clean`: samples left out, with their reasons."""
    cleaning = _Name("cleaning.json")
    """`clean`: counts, balances, duplicates."""
    image_hashes = _Name("cache/image_hashes.jsonl")
    """`clean`: a cache of perceptual hashes, which may be deleted."""
    exports = _Name("export")
    """`export`: training files and `export.json`, which counts them."""
    report = _Name("report")
    """`report`: `report.html` and the plots."""


def refuse_older(root: Path) -> None:
    """Refuse the folder of a run that an older version made, under other names and request ids.

    Raises:
        UserError: It has `pictures.jsonl`, or lines about a `picture`.
    """
    lines = ("requests.jsonl", "samples.jsonl", "kept.jsonl")
    old = (root / "pictures.jsonl").exists()
    if old or any(_begins_with(root / name, {"picture"}) for name in lines):
        raise UserError(
            f"{root}: was made by an older version, whose answers this version would ask and pay "
            "for again; choose a new output_dir (files in export/ can be trained on as they are)",
            code="not_ours",
        )


def own_for(
    config: InstructConfig, given: Path, commands: Sequence[str], *, overwrite: bool
) -> None:
    """Check, before any work, that commands replace only their own files in the run's folder.

    Args:
        config: The run's.
        given: The configuration file that the user gave.
        commands: Stages to run; `plan` indexes as well.
        overwrite: Whether the user allows replacing files of any origin except inputs.
    """
    _require_plain_addresses(config)
    root = Path(config.output_dir)
    stages = ["index", *commands] if "plan" in commands else commands
    own = root / "config.yaml"
    given_elsewhere = not own.exists() or not given.samefile(own)
    inputs: list[str | Path] = [*run_inputs(config), *([given] if given_elsewhere else [])]
    images = [config.coco.images] if config.coco.images else []
    _require_own_answers_dir(config, root, inputs)
    own_run(root, stages, inputs=inputs, image_roots=images, overwrite=overwrite)
    if "plan" in stages:
        own_config(own, settings.dump(config), given)


def _require_own_answers_dir(config: InstructConfig, root: Path, inputs: list[str | Path]) -> None:
    """Refuse an answers directory that has other contents, before any answer is written."""
    given = config.teacher.answers_dir
    if not given:
        return
    refuse_input(given, inputs)
    refuse_in_checkpoint(given)
    place, run = Path(given).resolve(), root.resolve()
    names = {name.split("/")[0] for names in WRITTEN.values() for name in names} | {*_APPENDED}
    taken = place == run or any(
        place.is_relative_to(run / name) for name in names - {RunFolder(root).answers.name}
    )
    if taken or read_marker(place) is not None:
        raise UserError(
            f"teacher.answers_dir {given}: has other files of vlm_sft; choose a directory for "
            "the answers alone, or omit it for output_dir/answers",
            code="not_ours",
        )


def _require_plain_addresses(config: InstructConfig) -> None:
    """Refuse addresses of servers that may contain a key, before the configuration is written."""
    for section, server in (("teacher", config.teacher), ("verify.judge", config.verify.judge)):
        given = server.base_url or [] if server else []
        urls = [given] if isinstance(given, str) else given
        if any(sign in url for url in urls for sign in "@?#"):
            raise UserError(
                f"{section}.base_url holds a user name, a password, a query or a fragment (not "
                "shown, for it may be a key); give https://host/v1, and put the key into the "
                f"variable {section}.api_key_env",
                code="teacher_address",
            )


def own_run(
    root: Path,
    stages: Iterable[str],
    *,
    inputs: Iterable[str | Path],
    image_roots: Iterable[str | Path] = (),
    overwrite: bool,
) -> None:
    """Create or accept a run's folder, and check that the stages may replace their files.

    A folder without a marker is accepted if it has only files of a run.

    Raises:
        UserError: The folder has other files, is one of the inputs, or a file that would be
            replaced was changed since it was written.
    """
    inputs = list(inputs)
    is_old = read_marker(root) is None and _is_unmarked_run(root)
    for name in _APPENDED:
        refuse_input(root / name, inputs)
    names = [name for stage in stages for name in WRITTEN[stage]]
    files = own_output(
        root,
        KIND,
        names,
        inputs=inputs,
        image_roots=image_roots,
        adopt=is_old,
        overwrite=overwrite,
    )
    if is_old:
        files.accept(name for names in WRITTEN.values() for name in names)


def own_config(path: Path, text: str, given: Path) -> None:
    """Refuse to rewrite the configuration file that the user gave, under whatever name.

    Args:
        path: The run's own `config.yaml`.
        text: Its new content.
        given: The file that the command was started with.
    """
    if path.is_file() and path.samefile(given) and path.read_text(encoding="utf-8") != text:
        raise UserError(
            f"{given}: is the given configuration and would be rewritten with other values or "
            "without its comments; give a copy of it outside of output_dir",
            code="not_ours",
        )


def _is_unmarked_run(root: Path) -> bool:
    """Return whether a folder has a run's index or requests, and only files of a run."""
    known = {name.split("/")[0] for names in WRITTEN.values() for name in names} | {*_APPENDED}
    if foreign_entries(root, known):
        return False
    return any(
        _begins_with(root / name, keys)
        for name, keys in (
            ("images.jsonl", {"file_name", "caption_ids", "boxes"}),
            ("requests.jsonl", {"sample_id", "template_sha256"}),
            ("samples.jsonl", {"schema", "request"}),
        )
    )


def _begins_with(path: Path, keys: set[str]) -> bool:
    """Return whether the file's first line is a JSON object with these keys."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            first = json.loads(file.readline(1 << 24))
        except (ValueError, RecursionError):
            return False
    return isinstance(first, dict) and keys <= first.keys()


def run_inputs(config: InstructConfig) -> Iterator[str]:
    """Yield every input file and folder in a run's configuration."""
    named = [config.coco.instances, config.coco.captions, config.coco.images]
    named.append(config.requests.prompts)
    named.append(config.verify.judge.prompt if config.verify.judge else None)
    for files in config.guard.lists.values():
        named += [files] if isinstance(files, str) else files
    yield from (name for name in named if name)
