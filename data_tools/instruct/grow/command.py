"""Plan a run whose requests make new samples from the accepted ones of another run."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from data_tools.digests import hashed
from data_tools.instruct.config import InstructConfig
from data_tools.instruct.grow.operators import OPERATORS, grown_id
from data_tools.instruct.index import read_categories, read_images, write_images
from data_tools.instruct.lines import read_lines, write_lines
from data_tools.instruct.plan.command import LEFT_OUT, parameters, request_of
from data_tools.instruct.plan.context import describe, quoted
from data_tools.instruct.plan.estimate import Tally, estimate_lines
from data_tools.instruct.plan.prompts import TYPES, closing, operator_template
from data_tools.instruct.run_folder import RunFolder, own_run, run_inputs
from data_tools.instruct.schema import Request, Sample
from vlm_sft.config import loading as settings
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.owned_files import write_owned, write_owned_json
from vlm_sft.utils.reading import read_bytes, read_json

_GROWABLE: Final = ("conversation", "reasoning")
"""Types of samples with questions of the teacher; that of a description is ours."""


def command(
    config: InstructConfig,
    given: Path,
    operators: Sequence[str],
    out: Path,
    number: int,
    *,
    overwrite: bool,
) -> None:
    """Write the folder of a run with requests about the samples; nothing is sent.

    Args:
        config: The run whose accepted samples are the parents; kept ones, if it was cleaned.
        given: Its configuration file.
        operators: Names of `OPERATORS`.
        out: The folder of the new run.
        number: Requests per sample and operator.
        overwrite: Whether the user allows replacing files of any origin.

    Raises:
        UserError: There are no samples to grow, or a file of the run is missing or damaged.
    """
    parent_run, folder = RunFolder(Path(config.output_dir)), RunFolder(out)
    source = parent_run.kept if parent_run.kept.exists() else parent_run.samples
    own_run(
        out, ["grow"], inputs=[given, parent_run.root, *run_inputs(config)], overwrite=overwrite
    )
    config = config.model_copy(update={"output_dir": str(out)})
    if config.teacher.kind == "rules":
        raise UserError("teacher.kind=rules: rules write no new samples; name a server")
    images, categories = read_images(parent_run), read_categories(parent_run)
    samples = list(read_lines(source, Sample))
    parents = [sample for sample in samples if sample.type in _GROWABLE]
    if not parents:
        raise UserError(
            f"{source}: has no conversation or reasoning to grow (of {len(samples):,} samples)",
            code="no_records",
        )
    prompts = config.requests.prompts
    templates = {name: operator_template(name, categories, prompts) for name in operators}

    def requests() -> Iterator[Request]:
        for parent in parents:
            for name in operators:
                for repeat in range(number):
                    yield _request(config, parent, name, repeat, templates[name], images)

    write_images(folder, [images[name] for name in sorted({p.image.id for p in parents})])
    write_owned(folder.index, read_bytes(parent_run.index))
    tally = Tally({**dict.fromkeys(TYPES, templates[operators[0]]), **templates})
    write_lines(folder.requests, tally.through(requests()))
    write_lines(folder.parents, parents)
    write_owned_json(
        folder.templates, {**dict.fromkeys(TYPES, templates[operators[0]]), **templates}
    )
    write_owned(folder.config, settings.dump(config).encode())
    before = read_json(parent_run.plan) if parent_run.plan.exists() else {}
    plan = {
        "images": {"indexed": tally.images, "asked_about": tally.images},
        "left_out": dict.fromkeys(LEFT_OUT, 0),
        "guard": before.get("guard", {}),
        **tally.as_dict(config.teacher),
    }
    write_owned_json(folder.plan, plan)
    left_out = Counter(sample.type for sample in samples if sample.type not in _GROWABLE)
    found = f"{len(parents):,} of {len(samples):,} samples of {source} are grown"
    if left_out:
        found += f"; left out: {', '.join(f'{n:,} {name}' for name, n in left_out.items())}"
    echo("\n".join([found, *estimate_lines(plan, config)]), file=sys.stdout)
    echo(f"next: vlm-sft data generate {folder.config}, then verify, clean, export",
         file=sys.stdout)  # fmt: skip


def _request(
    config: InstructConfig,
    parent: Sample,
    operator: str,
    number: int,
    template: Mapping[str, Any],
    images: Mapping[int, Any],
) -> Request:
    """Return the request that makes a new sample of a parent."""
    shown = config.requests
    context = describe(images[parent.image.id], shown.decimals, shown.max_boxes, shown.min_area)
    text = f"{context.text}\n\n{_talk(parent, OPERATORS[operator].shows_answers)}"
    content = {
        "image": parent.image.id,
        "type": parent.type,
        "number": number,
        "template": operator,
        "template_sha256": template["sha256"],
        "question": None,
        "context": closing(text, template["ask"], ""),
        "parameters": parameters(
            config.teacher, hashed(config.seed, "grow", parent.id, operator, number)
        ),
        "shown": context.shown,
    }
    grown = grown_id(parent.id, operator, number)
    return request_of(content).model_copy(update={"sample_id": grown})


def _talk(parent: Sample, with_answers: bool) -> str:
    """Return the parent's turns, a line each, so that none can pass for another one."""
    lines = ["QUESTIONS AND ANSWERS:" if with_answers else "QUESTIONS:"]
    for number, turn in enumerate(parent.turns, 1):
        lines.append(f"q{number}: {quoted(turn.question)}")
        if with_answers:
            lines.append(f"a{number}: {quoted(turn.answer)}")
    return "\n".join(lines)
