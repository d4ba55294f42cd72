"""Ask a text model for a second opinion about every sample (`verify.judge`).

The judge reads captions and boxes as text, with the questions and answers of a sample, and lists
the statements that these do not support. Its requests form a run of their own in `OUTPUT_DIR/judge`
that `generate` answers: they are content-addressed, answers are recorded as they come, and no
request that has one is sent again, whatever the answer is. Spending counts towards the `limits` of
the whole run.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from data_tools.coco import AnnotatedImage
from data_tools.digests import hashed
from data_tools.instruct.config import InstructConfig, JudgeConfig
from data_tools.instruct.generate.answers import read_answers
from data_tools.instruct.generate.command import ask_all
from data_tools.instruct.lines import write_lines
from data_tools.instruct.plan.command import parameters, request_of
from data_tools.instruct.plan.context import Context, describe, describe_several, quoted
from data_tools.instruct.plan.prompts import TYPES, digest
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import (
    Answer,
    Check,
    Cost,
    Judgment,
    Line,
    Objection,
    Request,
    Sample,
    worst,
)
from data_tools.instruct.verify import codes, reasons
from data_tools.instruct.verify.agreement import WITHOUT_VERDICT
from data_tools.instruct.verify.manner import is_refusal
from data_tools.instruct.verify.parse_answer import FINISHED, after_thinking, read_object
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.owned_files import write_owned_json
from vlm_sft.utils.reading import read_text

_REFUSED: Final = ("refusal", "content_filter")
"""Finish reasons of a model or server that does not want to answer."""
_CODES: Final = {"unsupported": "JUDGE_UNSUPPORTED", "contradicted": "JUDGE_CONTRADICTED"}
NO_VERDICT: Final = "JUDGE_NO_VERDICT"
_CONTENT: Final = frozenset(code.name for code in codes.ALL if code.family == "content")
"""Codes of the rules about what an answer says."""


class _Listed(Line):
    """One entry of the judge's list."""

    answer: int
    statement: str
    verdict: Literal["contradicted", "unsupported"]
    reason: str


class JudgeForm(Line):
    """What the judge is to answer with."""

    objections: tuple[_Listed, ...]


class Judge:
    """The judge of a run.

    Args:
        config: With `verify.judge`.
        images: The index.
        categories: What annotators looked for.

    Raises:
        UserError: The file of `verify.judge.prompt` is missing.
    """

    def __init__(
        self,
        config: InstructConfig,
        images: Mapping[int, AnnotatedImage],
        categories: Iterable[str],
    ) -> None:
        assert config.verify.judge is not None
        self._config, self._judge, self._images = config, config.verify.judge, images
        self._run = RunFolder(Path(config.output_dir))
        self._folder = RunFolder(self._run.judge)
        self._template = make_template(self._judge, categories)
        self._context: tuple[list[int], Context] | None = None

    def ask(self, samples: Iterable[Sample]) -> int:
        """Ask about every sample with turns that has not been judged; return the exit code.

        Raises:
            UserError: The settings or the key are wrong, or the server refuses everything.
        """
        write_owned_json(self._folder.templates, dict.fromkeys(TYPES, self._template))
        requests = (self.request_about(sample) for sample in samples if sample.turns)
        if not write_lines(self._folder.requests, requests):
            return 0
        config = self._config.model_copy(
            update={"output_dir": str(self._folder.root), "teacher": self._judge}
        )
        try:
            return ask_all(config, name="judge", spending=self._run.spending)
        except UserError as error:
            if error.reason != "teacher_refused" or not len(read_answers(self._folder.answers)):
                raise
            echo(f"judge: {error}", file=sys.stdout)
            return 3  # as for other failed requests: what has been judged is not lost

    def judged(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yield the samples with the recorded verdicts, which may reject them (`decides`)."""
        answers = read_answers(self._folder.answers)
        for sample in samples:
            if not sample.turns:
                yield sample
                continue
            request = self.request_about(sample).id
            judgment = read_judgment(request, answers.get(request), len(sample.turns))
            sample = sample.model_copy(update={"judgment": judgment})
            decides = self._judge.decides
            yield decided(sample, judgment, decides) if decides else sample

    def request_about(self, sample: Sample) -> Request:
        """Return the request to judge a sample; equal turns about an image give an equal id."""
        images = [self._images[image.id] for image in sample.images]
        ids = [image.id for image in images]
        if self._context is None or self._context[0] != ids:
            shown = self._config.requests
            limits = (shown.decimals, shown.max_boxes, shown.min_area)
            several = len(images) > 1
            self._context = (
                ids,
                (describe_several(images, *limits) if several else describe(images[0], *limits)),
            )
        context = self._context[1]
        seed = hashed(self._config.seed, "judge", *ids, sample.type)
        content: dict[str, Any] = {
            "image": ids[0],
            "type": sample.type,
            "number": 0,
            "template": sample.type,
            "template_sha256": self._template["sha256"],
            "question": None,
            "context": f"{context.text}\n\n{_talk(sample)}",
            "parameters": parameters(self._judge, seed),
            "shown": context.shown,
        }
        return request_of(content).model_copy(update={"sample_id": sample.id})


def make_template(config: JudgeConfig, categories: Iterable[str]) -> dict[str, Any]:
    """Return the judge's template: the system message and the schema of its answers.

    Raises:
        UserError: The file of `verify.judge.prompt` is missing or not a text.
    """
    if config.prompt is None:
        ours = files("data_tools.instruct").joinpath("prompts", "judge.txt")
        text = ours.read_text(encoding="utf-8")
    else:
        try:
            text = read_text(Path(config.prompt))
        except FileNotFoundError:
            raise UserError(
                f"verify.judge.prompt: {config.prompt}: no such file", code="data_file_missing"
            ) from None
    system = text.strip().replace("{categories}", ", ".join(categories) or "nothing")
    template = {
        "messages": [{"role": "system", "content": system}],
        "answer_schema": JudgeForm.model_json_schema(),
    }
    return {**template, "sha256": digest(template)}


def read_judgment(request: str, answer: Answer | None, turns: int) -> Judgment:
    """Return the verdict in a judge's answer about a sample with this number of turns."""
    if answer is None:
        return Judgment(request=request, verdict="unanswered", note="no answer has been recorded")
    found = _objections(answer, turns)
    cost = Cost(
        tokens_in=answer.tokens_in, tokens_cached=answer.tokens_cached,
        tokens_out=answer.tokens_out, usd=answer.usd, attempts=answer.attempts,
    )  # fmt: skip
    if isinstance(found, Judgment):
        return found.model_copy(update={"model": answer.model, "cost": cost})
    return Judgment(
        request=request, verdict=worst(found), objections=found, model=answer.model, cost=cost
    )


def decided(
    sample: Sample, judgment: Judgment, decides: Literal[True, "contradicted", "instead"]
) -> Sample:
    """Return the sample with the judge's verdict among its checks and reasons.

    Args:
        sample: As the rules leave it.
        judgment: The judge's opinion of it.
        decides: `verify.judge.decides`.
    """
    checks = list(sample.checks)
    if judgment.verdict in WITHOUT_VERDICT:
        claim = f"{judgment.verdict}: {judgment.note}"
        checks.append(Check(rule="judge", verdict="unknown", code=NO_VERDICT, claim=claim))
    elif decides == "instead":
        overruled = tuple(code for code in sample.reasons if code in _CONTENT)
        judgment = judgment.model_copy(update={"overruled": overruled})
        checks = [replace(c, code=None) if c.code in _CONTENT else c for c in checks]
    checks += [
        Check(
            rule="judge",
            verdict="contradicted" if objection.verdict == "contradicted" else "unknown",
            code=_CODES[objection.verdict],
            turn=objection.turn,
            part="answer",
            claim=objection.statement,
        )
        for objection in judgment.objections
        if decides is True or objection.verdict == "contradicted"
    ]
    found = reasons(checks)
    return sample.model_copy(
        update={
            "checks": tuple(checks),
            "judgment": judgment,
            "reasons": found,
            "status": "rejected" if found else "accepted",
        }
    )


def _talk(sample: Sample) -> str:
    """Return questions and answers, a line each, so that none can pass for another one."""
    lines = ["QUESTIONS AND ANSWERS:"]
    for number, turn in enumerate(sample.turns, 1):
        lines += [f"q{number}: {quoted(turn.question)}", f"a{number}: {quoted(turn.answer)}"]
    return "\n".join([*lines, "", "List what is contradicted or unsupported, as one JSON object."])


def _objections(answer: Answer, turns: int) -> tuple[Objection, ...] | Judgment:
    """Return the listed statements, or the judgment that there is no verdict."""

    def none(verdict: Literal["unreadable", "refused"], note: str) -> Judgment:
        return Judgment(request=answer.request, verdict=verdict, note=" ".join(note.split())[:200])

    text, _ = after_thinking(answer.text.strip())
    if answer.finish in _REFUSED:
        return none("refused", text or f"finish: {answer.finish}")
    if answer.finish not in FINISHED:
        return none("unreadable", f"finish: {answer.finish}")
    found = read_object(text)
    if isinstance(found, str):
        return none("refused" if is_refusal(text) else "unreadable", text or "no text")
    try:
        form = JudgeForm.model_validate_json(found[0])
    except ValidationError as error:
        first = error.errors()[0]
        return none("unreadable", f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    for listed in form.objections:
        if not 1 <= listed.answer <= turns:
            return none("unreadable", f"it lists a statement of answer {listed.answer} of {turns}")
    return tuple(
        Objection(
            turn=listed.answer - 1,
            statement=listed.statement,
            verdict=listed.verdict,
            reason=listed.reason,
        )
        for listed in form.objections
    )
