"""Questions with a known answer: which of the possible answers does the model find likeliest."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vlm_sft.data.images import to_pixels
from vlm_sft.errors import UserError
from vlm_sft.evaluation.statistics import balanced_accuracy_interval, interval_of_shares
from vlm_sft.inference import VlmRun, question
from vlm_sft.model.vlm import decoder_of, head_logits

Condition = Literal["right", "blank", "shuffled"]
CONDITIONS: tuple[Condition, ...] = ("right", "blank", "shuffled")
CLOSED_SETS = (("yes", "no"), ("left", "right"), ("top", "bottom"))


@dataclass(frozen=True)
class Probe:
    """A question about a picture, its answer, and the answers that it is chosen among."""

    id: str
    image: str
    question: str
    answer: str
    kind: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What the model chose; `log_probabilities` are in the order of the probe's choices."""

    probe: Probe
    log_probabilities: tuple[float, ...]

    @property
    def choice(self) -> str:
        """The likeliest answer; of equals the first."""
        return self.probe.choices[int(np.argmax(self.log_probabilities))]

    @property
    def correct(self) -> bool:
        """Whether it is the true one."""
        return self.choice == self.probe.answer


def read_probes(path: Path) -> list[Probe]:
    """Read a JSON list of `id, image, question, answer, kind`.

    Yes/no, left/right and top/bottom are chosen between the two; any other answer among all
    answers of the file of its kind.

    Raises:
        UserError: The file is missing or not such a list; the record is named.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path}: no such file of probes; data_tools.build_coco makes them") from (
            None
        )
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); make it again") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a list of probes with at least one, found none")
    keys = ("id", "image", "question", "answer", "kind")
    open_sets: dict[str, set[str]] = {}
    for index, row in enumerate(rows):
        for key in keys:
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise UserError(f"{path}[{index}]: {key!r} is missing or not text; add it")
        open_sets.setdefault(row["kind"], set()).add(row["answer"])
    return [Probe(**{k: row[k] for k in keys}, choices=_choices(row, open_sets)) for row in rows]


def _choices(row: Mapping[str, str], open_sets: Mapping[str, set[str]]) -> tuple[str, ...]:
    for closed in CLOSED_SETS:
        if row["answer"] in closed:
            return closed
    return tuple(sorted(open_sets[row["kind"]]))


def spell(answer: str) -> str:
    """As the short training answers are spelled: `Yes.` for `yes`."""
    return answer[:1].upper() + answer[1:] + "."


def derangement(names: Iterable[str], *, seed: int) -> dict[str, str]:
    """Another picture for each picture, never itself: one cycle through all of them.

    Raises:
        UserError: There are fewer than two.
    """
    unique = sorted(set(names))
    if len(unique) < 2:
        raise UserError("the shuffled condition needs at least two pictures; leave it out")
    order = [unique[i] for i in np.random.default_rng(seed).permutation(len(unique))]
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def blank_pixels(run: VlmRun) -> Tensor:
    """A picture of the tower's mean colour, float32 `[3, size, size]`."""
    size = run.image_spec.size
    red, green, blue = (int(255 * value) for value in run.image_spec.mean)
    picture = Image.new("RGB", (size, size), (red, green, blue))
    return to_pixels(picture, run.image_spec, run.aspect)


def condition_pixels(
    run: VlmRun, image: str, images_dir: Path, condition: Condition, others: Mapping[str, str]
) -> Tensor:
    """Pixels of the picture, of a blank one, or of the one that `others` gives in its stead."""
    if condition == "blank":
        return blank_pixels(run)
    return run.pixels(images_dir / (others[image] if condition == "shuffled" else image))


def judge(
    run: VlmRun,
    probes: Sequence[Probe],
    images_dir: Path,
    condition: Condition = "right",
    *,
    seed: int = 0,
) -> Iterator[list[Verdict]]:
    """Verdicts picture by picture, all questions of a picture in one batch.

    Raises:
        ImageError: A picture is missing or broken.
    """
    by_image: dict[str, list[Probe]] = {}
    for probe in probes:
        by_image.setdefault(probe.image, []).append(probe)
    others = derangement(by_image, seed=seed) if condition == "shuffled" else {}
    for image, asked in by_image.items():
        pixels = condition_pixels(run, image, images_dir, condition, others)
        yield judge_picture(run, asked, pixels)


def judge_picture(run: VlmRun, probes: Sequence[Probe], pixels: Tensor) -> list[Verdict]:
    """Verdicts of questions about one picture, its common prefix run once."""
    prompts, answers = [], []
    for probe in probes:
        prompt = run.prompt_ids(question(probe.question, [b""]))
        for choice in probe.choices:
            prompts.append(prompt)
            answers.append(run.renderer.answer_ids(spell(choice)))
    scores = iter(score_branches(run, prompts, answers, pixels))
    return [Verdict(p, tuple(next(scores) for _ in p.choices)) for p in probes]


@torch.inference_mode()
def score_branches(
    run: VlmRun, prompts: Sequence[list[int]], answers: Sequence[list[int]], pixels: Tensor
) -> list[float]:
    """Summed log-probability of each answer (stop token included) after its prompt.

    The ids that all prompts share are run once and their keys and values repeated for each branch;
    the rest is padded on the right, behind everything that it could disturb.
    """
    device, model = run.device, run.model
    shared = _common_prefix(prompts)
    decoder = cast(Any, decoder_of(model.language_model))
    prefix = torch.tensor([prompts[0][:shared]], device=device)
    cache = decoder(
        inputs_embeds=model.embed(prefix, pixels[None].to(device)), use_cache=True
    ).past_key_values
    cache.batch_repeat_interleave(len(prompts))
    tails = [
        [*prompt[shared:], *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)
    ]
    longest = max(map(len, tails))
    pad = run.pad_token_id
    ids = torch.tensor([tail + [pad] * (longest - len(tail)) for tail in tails], device=device)
    mask = torch.zeros(len(tails), shared + longest, dtype=torch.long, device=device)
    for row, tail in enumerate(tails):
        mask[row, : shared + len(tail)] = 1
    hidden = decoder(
        inputs_embeds=model.embed(ids, None),
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return _answer_scores(model.language_model, hidden, tails, answers)


def _answer_scores(
    language_model: nn.Module,
    hidden: Tensor,
    tails: Sequence[list[int]],
    answers: Sequence[list[int]],
) -> list[float]:
    places = [
        (row, len(tail) - len(answer) + i, target)
        for row, (tail, answer) in enumerate(zip(tails, answers, strict=True))
        for i, target in enumerate(answer)
    ]
    table = torch.tensor(places, device=hidden.device)
    rows, columns, targets = table.unbind(dim=1)
    logits = head_logits(language_model, hidden[rows, columns]).float()
    found = -nn.functional.cross_entropy(logits, targets, reduction="none")
    sums = torch.zeros(len(tails), device=hidden.device).index_add(0, rows, found)
    return cast(list[float], sums.tolist())


def _common_prefix(prompts: Sequence[list[int]]) -> int:
    """Length of what all prompts share, at least one token short of the shortest."""
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def summarize(verdicts: Sequence[Verdict], *, seed: int = 0) -> dict[str, Any]:
    """Accuracy, balanced accuracy, share of each choice, in all and by kind.

    Intervals are 95 % percentile bootstraps over pictures (Wilson's over pictures where all
    answers are alike right or wrong).
    """
    kinds = sorted({verdict.probe.kind for verdict in verdicts})
    summary = _summary(verdicts, seed)
    summary["by_kind"] = {
        k: _summary([v for v in verdicts if v.probe.kind == k], seed) for k in kinds
    }
    return summary


def _summary(verdicts: Sequence[Verdict], seed: int) -> dict[str, Any]:
    correct = [verdict.correct for verdict in verdicts]
    images = [verdict.probe.image for verdict in verdicts]
    truths = [verdict.probe.answer for verdict in verdicts]
    chosen = [verdict.choice for verdict in verdicts]
    return {
        "questions": len(verdicts),
        "pictures": len(set(images)),
        "accuracy": interval_of_shares(correct, images, seed=seed).as_dict(),
        "balanced_accuracy": balanced_accuracy_interval(
            correct, truths, images, seed=seed
        ).as_dict(),
        "chosen": {name: chosen.count(name) / len(chosen) for name in sorted(set(chosen))},
        "chance": sum(1 / len(v.probe.choices) for v in verdicts) / len(verdicts),
    }
