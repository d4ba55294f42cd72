"""Plan a run whose requests make new samples from the accepted ones of another run."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from data_tools.instruct import contamination
from data_tools.instruct.config import InstructConfig
from data_tools.instruct.grow.operators import GROUPS, OPERATORS
from data_tools.instruct.grow.refusals import Share
from data_tools.instruct.grow.requests import Material, grows, make_requests
from data_tools.instruct.grow.seed_tasks import read_seed_tasks
from data_tools.instruct.grow.translation import LANGUAGES
from data_tools.instruct.index import read_categories, read_images, write_images
from data_tools.instruct.lines import read_lines, write_lines
from data_tools.instruct.plan.command import LEFT_OUT
from data_tools.instruct.plan.estimate import Tally, estimate_lines
from data_tools.instruct.plan.prompts import TYPES, operator_template
from data_tools.instruct.plan.selection import choose
from data_tools.instruct.run_folder import RunFolder, own_run, run_inputs
from data_tools.instruct.schema import Request, Sample
from vlm_sft.config import loading as settings
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.owned_files import write_owned, write_owned_json
from vlm_sft.utils.reading import read_bytes, read_json

UNANSWERABLE: Final = 0.5
"""Share of the questions of `refuse` that the image cannot answer."""


def command(
    config: InstructConfig,
    given: Path,
    operators: Sequence[str],
    out: Path,
    number: int,
    language: str | None = None,
    unanswerable: float | None = None,
    seed_tasks: Path | None = None,
    *,
    overwrite: bool,
) -> None:
    """Write the folder of a run with requests for new samples; nothing is sent.

    Args:
        config: The run whose accepted samples are the parents; kept ones, if it was cleaned.
        given: Its configuration file.
        operators: Names of `OPERATORS` or `GROUPS`.
        out: The folder of the new run.
        number: Requests per operator and sample, or image.
        language: Of `translate`.
        unanswerable: Share of the questions of `refuse` without an answer; None: one half.
        seed_tasks: File of `self-instruct`; None: ours.
        overwrite: Whether the user allows replacing files of any origin.

    Raises:
        UserError: There is nothing to grow, an option does not fit the operators, or a file of the
            run is missing or damaged.
    """
    _require_options(operators, language, unanswerable, seed_tasks)
    parent_run, folder = RunFolder(Path(config.output_dir)), RunFolder(out)
    source = parent_run.kept if parent_run.kept.exists() else parent_run.samples
    inputs: list[str | Path] = [
        given,
        parent_run.root,
        *run_inputs(config),
        *([seed_tasks] if seed_tasks else []),
    ]
    own_run(out, ["grow"], inputs=inputs, overwrite=overwrite)
    config = config.model_copy(update={"output_dir": str(out)})
    if config.teacher.kind == "rules":
        raise UserError("teacher.kind=rules: rules write no new samples; name a server")
    images, categories = read_images(parent_run), read_categories(parent_run)
    language = (language or "").lower()
    samples = list(read_lines(source, Sample))
    names = [one for name in operators for one in GROUPS.get(name, (name,))]
    parents = [one for one in samples if any(grows(one, name, language) for name in names)]
    seeds = read_seed_tasks(seed_tasks) if "self-instruct" in names else ()
    templates = {
        name: operator_template(
            name, categories, config.requests.prompts,
            language=language.capitalize() if name == "translate" else "",
            questions=[seed.question for seed in seeds] if name == "self-instruct" else (),
        )
        for name in names
    }  # fmt: skip
    guard = contamination.check(list(images.values()), config.guard)
    known = [i for i in images.values() if (i.captions or i.boxes) and not guard.refuses(i.id)]
    chosen = choose(known, config.images.count, config.images.choose, config.seed)
    if not any(OPERATORS[name].source == "image" for name in names):
        chosen = []
    share = Share(UNANSWERABLE if unanswerable is None else unanswerable)
    plan = read_json(parent_run.plan) if parent_run.plan.exists() else {}
    material = Material(
        config, images, categories, chosen, parents, templates, language, share, seeds,
        begin=plan.get("next_number", {}),
    )  # fmt: skip
    requests = list(make_requests(material, operators, number))
    if not requests:
        raise UserError(
            f"{source}: has nothing to grow by {', '.join(operators)} (of {len(samples):,} "
            "samples; conversations and reasoning about one image are grown, in English except for "
            "`translate --language English`)",
            code="no_records",
        )
    found_now = guard.as_dict() if chosen else plan.get("guard", {})
    plan = _write_run(folder, parent_run, material, requests, found_now, number)
    lines = [*(guard.lines() if chosen else ()), *_found(source, samples, parents, plan)]
    echo("\n".join([*lines, *estimate_lines(plan, config)]), file=sys.stdout)
    echo(f"next: vlm-sft data generate {folder.config}, then verify, clean, export",
         file=sys.stdout)  # fmt: skip


def _write_run(
    folder: RunFolder,
    parent_run: RunFolder,
    material: Material,
    requests: Sequence[Request],
    guard: dict[str, Any],
    number: int,
) -> dict[str, Any]:
    """Write the files of the new run, and return its plan.

    Args:
        folder: The new run.
        parent_run: The run that is grown.
        material: What the requests were made from.
        requests: The requests.
        guard: What the split guard found about the images, including those that get new questions.
        number: Requests per operator and image; those of the next generation go on after them.
    """
    config, images, templates = material.config, material.images, material.templates
    used = {request.image for request in requests} | {p.image.id for p in material.parents}
    used |= {one.id for request in requests if request.grown for one in request.grown.images}
    write_images(folder, [images[name] for name in sorted(used)])
    write_owned(folder.index, read_bytes(parent_run.index))
    tally = Tally(templates)
    write_lines(folder.requests, tally.through(requests))
    write_lines(folder.parents, material.parents)
    first = next(iter(templates.values()))
    write_owned_json(folder.templates, {**dict.fromkeys(TYPES, first), **templates})
    write_owned(folder.config, settings.dump(config).encode())
    asked = [name for name in templates if OPERATORS[name].source == "image"]
    by_operator = Counter(request.template for request in requests)
    plan: dict[str, Any] = {
        "images": {"indexed": len(used), "asked_about": len({r.image for r in requests})},
        "left_out": dict.fromkeys(LEFT_OUT, 0),
        "guard": guard,
        "next_number": {**material.begin, **{n: material.begin.get(n, 0) + number for n in asked}},
        "operators": dict(sorted(by_operator.items())),
        **tally.as_dict(config.teacher),
    }
    share = material.share
    if share.total:
        plan["unanswerable"] = {
            "wanted": share.wanted, "questions": share.total, "unanswerable": share.unanswerable
        }  # fmt: skip
    write_owned_json(folder.plan, plan)
    return plan


def _found(
    source: Path, samples: Sequence[Sample], parents: Sequence[Sample], plan: dict[str, Any]
) -> list[str]:
    """Return what is grown, and what is not, in words."""
    taken = {parent.id for parent in parents}
    left_out = Counter(
        "several images" if len(sample.images) > 1 else _language(sample) or sample.type
        for sample in samples
        if sample.id not in taken
    )
    found = f"{len(parents):,} of {len(samples):,} samples of {source} are grown"
    if left_out:
        found += f"; left out: {', '.join(f'{n:,} {name}' for name, n in left_out.items())}"
    lines = [
        found,
        "requests: " + ", ".join(f"{n:,} {name}" for name, n in plan["operators"].items()),
    ]
    if (of := plan.get("unanswerable")) is not None:
        share = of["unanswerable"] / of["questions"]
        lines.append(
            f"refuse: {of['questions']:,} questions, {of['unanswerable']:,} ({share:.0%}) cannot "
            f"be answered from the image, {of['wanted']:.0%} wanted"
        )
    return lines


def _language(sample: Sample) -> str:
    return (sample.grown.language or "") if sample.grown else ""


def _require_options(
    operators: Sequence[str],
    language: str | None,
    unanswerable: float | None,
    seed_tasks: Path | None,
) -> None:
    """Refuse options without the operator that they are for, and operators that lack theirs."""
    for option, value, name in (
        ("--language", language, "translate"),
        ("--unanswerable", unanswerable, "refuse"),
        ("--seed-tasks", seed_tasks, "self-instruct"),
    ):
        if value is not None and name not in operators:
            raise UserError(f"{option}: is an option of the operator {name}, which is not named")
    if "translate" in operators and (language or "").lower() not in LANGUAGES:
        found = f"{language!r} is not one of" if language else "is needed by translate: one of"
        known = ", ".join(name.capitalize() for name in LANGUAGES)
        raise UserError(f"--language {found} {known}")
    for name in operators:
        if name in GROUPS and not set(GROUPS[name]) - set(operators):
            raise UserError(f"--operators: {name} has no operator left that is not named itself")
