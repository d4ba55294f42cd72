"""Answers become samples: read, checked claim by claim, accepted or rejected with their reasons.

A pure function of images, requests and answers: it may be run again at no cost, and the same
files give the same bytes.
"""

import gc
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from rich.table import Table

import vlm_sft
from data_tools.coco import AnnotatedImage
from data_tools.instruct.config import InstructConfig
from data_tools.instruct.generate.answers import answers_folder, read_answers
from data_tools.instruct.grow.growth import Growth, read_growth
from data_tools.instruct.index import read_categories, read_images
from data_tools.instruct.plan.command import read_requests
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Answer, Check, Cost, Grown, ImageSource, Request, Sample
from data_tools.instruct.verify import Policy, check_sample, reasons
from data_tools.instruct.verify.agreement import Agreement
from data_tools.instruct.verify.parse_answer import read_turns
from vlm_sft.errors import UserError
from vlm_sft.utils.console import Console
from vlm_sft.utils.owned_files import owned_open, write_owned_json
from vlm_sft.utils.ownership import refuse_input
from vlm_sft.utils.progress import track

TOOL: Final = f"vlm_sft/{vlm_sft.__version__}"
EXAMPLES: Final = 5
"""Number of samples of each reason in `verification.json`."""


def command(config: InstructConfig, file: Path | None = None) -> None:
    """Write samples.jsonl, rejected.jsonl and verification.json, and print a summary.

    Args:
        config: The run's.
        file: LLaVA records to check in place of the run's answers; the results are then written
            to `checked/NAME/` in the run's folder.
    """
    folder = RunFolder(Path(config.output_dir))
    categories = read_categories(folder)
    policy = Policy(config.verify, categories)
    images = read_images(folder)
    if file is not None:
        from data_tools.instruct.verify.llava_records import imported_samples

        folder = RunFolder(folder.root / "checked" / file.stem)
        for output in (folder.samples, folder.rejected, folder.verification):
            refuse_input(output, [file])

    def checked(tally: Tally) -> Iterator[Sample]:
        if file is not None:
            return imported_samples(file, images, policy, tally.left_out)
        return _samples(config, folder, images, policy, tally)

    # What is loaded stays until the end; full collections need not visit it again and again.
    gc.freeze()
    tally = Tally()
    samples, code = checked(tally), 0
    if (settings := config.verify.judge) is not None:
        from data_tools.instruct.verify.judge import Judge

        judge = Judge(config, images, categories)
        code = judge.ask(checked(Tally()))
        if code > 128:  # ended by a signal
            raise SystemExit(code)
        tally.judge_decides = settings.decides
        samples = judge.judged(samples)
    write_samples(folder, samples, tally)
    print_summary(tally, folder)
    if code and tally.judge_decides:
        raise SystemExit(code)


def make_sample(
    request: Request,
    answer: Answer,
    image: AnnotatedImage,
    policy: Policy,
    growth: Growth | None = None,
) -> Sample:
    """Return one answer with everything found about it.

    Args:
        request: The request.
        answer: Its answer.
        image: The annotated image.
        policy: How strict.
        growth: Of a grown run: its parents, and what was grown before.
    """
    parsed = read_turns(request, answer)
    checks, turns = parsed.checks, parsed.turns
    if turns and growth is not None:
        turns, found = growth.judged(request, turns, policy)
        checks += found
    elif turns:
        checks += check_sample(turns, request.type, image, request.shown, policy)
    codes = reasons(checks)
    if growth is not None and turns and not codes:
        growth.keep(request, turns)
    return Sample(
        id=request.sample_id,
        type=request.type,
        origin="rules" if answer.teacher == "rules" else "llm",
        image=image_source(image),
        turns=turns,
        raw=None if turns else answer.text,
        shown=request.shown,
        request=request.id,
        template=request.template,
        template_sha256=request.template_sha256,
        model=answer.model,
        fingerprint=answer.fingerprint,
        parameters=request.parameters,
        cost=_cost(answer),
        tool=TOOL,
        checks=checks,
        status="rejected" if codes else "accepted",
        reasons=codes,
        grown=request.grown,
    )


def image_source(image: AnnotatedImage) -> ImageSource:
    """Return what a sample keeps of its image."""
    return ImageSource(
        id=image.id,
        file_name=image.file_name,
        width=image.width,
        height=image.height,
        license=image.license,
    )


class Tally:
    """Counts of a run of checks: the funnel, verdicts by rule, codes, examples."""

    def __init__(self) -> None:
        self.funnel: Counter[str] = Counter()
        self.by_type: dict[str, Counter[str]] = {}
        self.by_operator: dict[str, Counter[str]] = {}
        self.verdicts: dict[str, Counter[str]] = defaultdict(Counter)
        self.codes: Counter[str] = Counter()
        self.codes_by_type: dict[str, Counter[str]] = {}
        self.deviations: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.answerable: Counter[bool] = Counter()
        """Questions of accepted samples of `refuse`."""
        self.examples: dict[str, list[dict[str, str]]] = {}
        self.judge_decides: bool | str | None = None
        """None: there is no judge."""
        self.agreement = Agreement()

    def add(self, sample: Sample) -> None:
        """Count a finished sample."""
        self.funnel["answered"] += 1
        self.funnel["read"] += bool(sample.turns)
        self.funnel[sample.status] += 1
        self.agreement.add(sample)
        self.by_type.setdefault(sample.type, Counter())[sample.status] += 1
        if sample.grown is not None:
            self._add_grown(sample, sample.grown)
        for check in sample.checks:
            self.verdicts[check.rule][check.verdict] += 1
            if check.rule == "reading" and check.code is None:
                self.deviations[check.claim] += 1
        for code in sample.reasons:
            self.codes[code] += 1
            self.codes_by_type.setdefault(sample.type, Counter())[code] += 1
            known = self.examples.setdefault(code, [])
            if len(known) < EXAMPLES:
                known.append({"sample": sample.id, "claim": _claim(sample, code)})

    def _add_grown(self, sample: Sample, grown: Grown) -> None:
        self.by_operator.setdefault(grown.operator, Counter())[sample.status] += 1
        if sample.status == "accepted":
            self.answerable.update(task.answerable for task in grown.tasks)

    def as_dict(self) -> dict[str, Any]:
        """Return the content of `verification.json`, with sorted keys."""
        return {
            "funnel": {
                name: self.funnel[name]
                for name in ("requests", "unanswered", "answered", "read", "accepted", "rejected")
            },
            "left_out": dict(sorted(self.left_out.items())),
            "by_type": _sorted(self.by_type),
            **self._grown(),
            "verdicts": _sorted(self.verdicts),
            "codes": dict(sorted(self.codes.items())),
            "codes_by_type": _sorted(self.codes_by_type),
            "deviations": dict(sorted(self.deviations.items())),
            "examples": dict(sorted(self.examples.items())),
            **self._judge(),
        }

    def _grown(self) -> dict[str, Any]:
        if not self.by_operator:
            return {}
        found: dict[str, Any] = {"by_operator": _sorted(self.by_operator)}
        if total := self.answerable.total():
            unanswerable = self.answerable[False]
            found["unanswerable"] = {
                "questions": total, "unanswerable": unanswerable, "share": unanswerable / total
            }  # fmt: skip
        return found

    def _judge(self) -> dict[str, Any]:
        if self.judge_decides is None:
            return {}
        return {"judge": self.agreement.summary(self.judge_decides)}


def write_samples(folder: RunFolder, samples: Iterator[Sample], tally: Tally) -> None:
    """Write accepted and rejected samples as they come, and the counts; all or nothing."""
    with ExitStack() as stack:
        accepted = stack.enter_context(owned_open(folder.samples))
        rejected = stack.enter_context(owned_open(folder.rejected))
        for sample in samples:
            tally.add(sample)
            file = accepted if sample.status == "accepted" else rejected
            file.write(sample.model_dump_json().encode() + b"\n")
    write_owned_json(folder.verification, tally.as_dict())


def print_summary(tally: Tally, folder: RunFolder) -> None:
    """Print the funnel, and the most frequent reasons with an example each."""
    funnel = tally.as_dict()["funnel"]
    console = Console(highlight=False, markup=False, emoji=False)
    asked = f"requests {funnel['requests']:,}: unanswered {funnel['unanswered']:,}"
    if not funnel["requests"]:  # a file of others' was checked
        left_out = tally.left_out.total()
        asked = f"records {funnel['answered'] + left_out:,}: left out {left_out:,}"
    judged = f"accepted {funnel['accepted']:,}, rejected {funnel['rejected']:,}"
    console.print(f"{asked}, {judged} -> {folder.root}", soft_wrap=True)
    for reason, count in sorted(tally.left_out.items()):
        console.print(f"left out: {count:,} {reason}", soft_wrap=True)
    for note, count in sorted(tally.deviations.items()):
        console.print(f"repaired: {count:,} had {note}", soft_wrap=True)
    for name, of in sorted(tally.by_operator.items()):
        accepted, rejected = of["accepted"], of["rejected"]
        console.print(f"  {name:<14}{accepted:>8,} accepted{rejected:>8,} rejected")
    if total := tally.answerable.total():
        console.print(
            f"  of {total:,} accepted questions of refuse, {tally.answerable[False]:,} "
            "cannot be answered from the image"
        )
    _print_codes(console, tally)
    if tally.judge_decides is not None:
        for line in tally.agreement.lines():
            console.print(line, soft_wrap=isinstance(line, str))


def _print_codes(console: Console, tally: Tally) -> None:
    if not tally.codes:
        return
    table = Table("reason", "samples", "example", box=None)
    for code, count in sorted(tally.codes.items(), key=lambda item: (-item[1], item[0])):
        example = tally.examples[code][0]
        table.add_row(code, f"{count:,}", f"{example['sample']}: {example['claim']}"[:90])
    console.print(table)


def _samples(
    config: InstructConfig,
    folder: RunFolder,
    images: dict[int, AnnotatedImage],
    policy: Policy,
    tally: Tally,
) -> Iterator[Sample]:
    answers = read_answers(answers_folder(config))
    growth = read_growth(folder, images)
    with folder.requests.open("rb") as file:
        total = sum(1 for _ in file)
    if not total and answers:
        raise UserError(
            f"{folder.requests}: is empty, although there are {len(answers):,} answers in "
            f"{answers.folder}; run `plan` with the settings that they were asked with",
            code="no_records",
        )
    for request in track(read_requests(folder), total, "verifying"):
        tally.funnel["requests"] += 1
        answer = answers.get(request.id)
        if answer is None:
            tally.funnel["unanswered"] += 1
            continue
        image = images.get(request.image)
        if image is None:
            raise UserError(
                f"{folder.requests}: request {request.sample_id} is about image "
                f"{request.image}, which is not in {folder.images}; run `index` and `plan` again"
            )
        yield make_sample(request, answer, image, policy, growth)
    answered = tally.funnel["requests"] - tally.funnel["unanswered"]
    if foreign := len(answers) - answered:
        reason = f"answers to no request in {folder.requests.name} (of another plan or run)"
        tally.left_out[reason] = foreign


def _cost(answer: Answer) -> Cost:
    return Cost(
        tokens_in=answer.tokens_in,
        tokens_cached=answer.tokens_cached,
        tokens_out=answer.tokens_out,
        usd=answer.usd,
        attempts=answer.attempts,
    )


def _claim(sample: Sample, code: str) -> str:
    found: Check = next(check for check in sample.checks if check.code == code)
    return " ".join(found.claim.split())


def _sorted(counts: dict[str, Counter[str]]) -> dict[str, dict[str, int]]:
    return {name: dict(sorted(counter.items())) for name, counter in sorted(counts.items())}
