import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_tools.coco import AnnotatedImage, Box
from data_tools.instruct.clean import codes
from data_tools.instruct.report import command as reporting
from data_tools.instruct.report import draw, page
from data_tools.instruct.report.charts import charts
from data_tools.instruct.report.counts import STEPS, Reservoir
from data_tools.instruct.report.samples import annotation_labels, cited_labels, split_at_claims
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Answer, Check, Shown
from tests.data_tools import asked
from tests.data_tools.instruct_runs import (
    Run,
    add,
    config_of,
    make_run,
    request_about,
    sample_of,
)
from vlm_sft.errors import UserError

TYPES = ("conversation", "detail", "reasoning")


def images(folder: Path, count: int) -> list[AnnotatedImage]:
    """Images of 80 x 60 pixels with up to three dogs, a cat in every second, a crowd."""
    folder.mkdir(exist_ok=True)
    found = []
    for number in range(1, count + 1):
        name = f"{number:012d}.jpg"
        Image.new("RGB", (80, 60), (number * 7 % 256, 90, 120)).save(folder / name)
        boxes = [Box("dog", 5.0 + 20 * i, 10, 18, 30, False, 100 * number + i)
                 for i in range(number % 3 + 1)]  # fmt: skip
        boxes += [Box("cat", 40, 5, 30, 20, False, 100 * number + 50)] if number % 2 else []
        boxes += [Box("person", 0, 0, 80, 20, True, 100 * number + 60)] if number % 5 == 0 else []
        found.append(
            AnnotatedImage(number, name, 80, 60, ("A dog.", "Dogs at play."), tuple(boxes),
                    (1000 + number, 2000 + number), license=number % 2 + 4)
        )  # fmt: skip
    return found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(images(tmp_path / "images", 14), TYPES)


def built(tmp_path: Path, run: Run, *stages: str) -> str:
    """The page of the run, not written."""
    folder = run.write(tmp_path / "run", *stages)
    report = reporting.read_report(config_of(folder.root, tmp_path / "images"), folder)
    drawn = {name: draw.save_figure(figure) for name, figure in charts(report.counts)}
    return page.render_report(report, drawn)


def written(tmp_path: Path, run: Run) -> dict[str, bytes]:
    """All files of the run's report."""
    folder = run.write(tmp_path / "run")
    reporting.command(config_of(folder.root, tmp_path / "images"))
    return {path.name: path.read_bytes() for path in folder.report.iterdir()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_the_figures_are_those_counted_from_the_files(tmp_path: Path, run: Run) -> None:
    text = text_of(built(tmp_path, run))
    folder = RunFolder(tmp_path / "run")
    requests, rejected = lines(folder.requests), lines(folder.rejected)
    samples, kept = lines(folder.samples), lines(folder.kept)
    answers = lines(folder.answers / "part-00001.jsonl")
    read = len(samples) + sum(bool(sample["turns"]) for sample in rejected)
    assert (len(requests), len(answers), read, len(samples), len(kept)) == (42, 38, 34, 26, 22)
    assert "22 of 42 requests became kept samples" in text
    assert "76.5 % of 34 parsed answers passed all checks" in text
    assert "answered 38 90.5 %" in text and "parsed into turns 34 81.0 %" in text
    codes = Counter(code for sample in rejected for code in sample["reasons"])
    assert codes == {"REFUSAL": 4, "OBJECT_NOT_FOUND": 5, "COUNT_WRONG": 3}
    for code, count in codes.items():
        assert f"{code} {count} ({100 * count / len(rejected):.1f} %)" in text
    checks = Counter(
        (check["rule"], check["verdict"]) for s in samples + rejected for check in s["checks"]
    )
    for rule in ("object", "count"):
        numbers = [checks[rule, v] for v in ("supported", "contradicted", "unknown")]
        assert "{} {} {} {} {}".format(rule, sum(numbers), *numbers) in text
    spent = sum(answer["usd"] for answer in answers)
    assert f"$0.00052 per kept sample; ${spent:.4f} in total" in text
    assert f"{sum(a['tokens_in'] for a in answers):,}" in text
    dogs = {s["image"]["id"] for s in kept}
    assert f"dog 14 {len(dogs)} {100 * len(dogs) / 14:.1f} %" in text


def test_losses_between_two_steps_add_up_to_their_difference(tmp_path: Path, run: Run) -> None:
    folder = run.write(tmp_path / "run")
    counts = reporting.read_report(config_of(tmp_path / "run", tmp_path / "images"), folder).counts
    numbers = [counts.step(step) for step in STEPS]
    for step, before, after in zip(list(STEPS)[1:], numbers, numbers[1:], strict=False):
        lost = sum(n for (found, _), n in counts.lost.items() if found == step)
        assert lost == before - after, step


def test_the_same_run_gives_the_same_bytes(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    first = written(tmp_path, run)
    printed = capsys.readouterr().out.splitlines()
    assert set(first) >= {"report.html", "funnel.png", "reasons.png", "claims.png"}
    assert "report.html" in printed[0]
    assert " ".join(printed[1].split()) == "22 of 42 requests became kept samples"
    assert printed[7] == "  images  requests  outcome" and len(printed) == 12
    assert written(tmp_path, run) == first


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (("index",), "Nothing is planned yet."),
        (("plan",), "Not finished. Of 42 requests 42 are not answered."),
        (("plan", "generate"), "4 are not answered, 38 are answered, not verified yet."),
        (("plan", "generate", "verify"), "26 are accepted, not cleaned yet."),
    ],
)
def test_unfinished_runs_have_a_page_that_says_so(
    tmp_path: Path, run: Run, stages: tuple[str, ...], words: str
) -> None:
    assert words in text_of(built(tmp_path, run, *stages)).replace("  ", " ")


def test_a_run_without_an_accepted_sample_has_a_page(tmp_path: Path) -> None:
    run = Run(images(tmp_path / "images", 3))
    for image in run.images:
        add(run, image, "detail", "object")
    text = text_of(built(tmp_path, run))
    assert "0 of 3 requests became kept samples" in text
    assert "OBJECT_NOT_FOUND 3 (100.0 %)" in text and "Gallery" in text


def test_plots_of_an_earlier_report_do_not_stay(tmp_path: Path, run: Run) -> None:
    written(tmp_path, run)
    folder = RunFolder(tmp_path / "run")
    for path in (folder.samples, folder.rejected, folder.kept, folder.dropped):
        path.unlink()
    reporting.command(config_of(folder.root, tmp_path / "images"))
    assert sorted(p.name for p in folder.report.iterdir()) == ["funnel.png", "report.html"]


def test_samples_of_another_plan_are_refused(tmp_path: Path, run: Run) -> None:
    folder = run.write(tmp_path / "run")
    plan = folder.requests.read_text().splitlines(keepends=True)
    folder.requests.write_text("".join(plan[:20]))
    with pytest.raises(UserError, match=r"belongs to no request of the present plan.*`verify`"):
        reporting.command(config_of(folder.root, tmp_path / "images"))


def test_who_made_the_samples_is_said_plainly(tmp_path: Path, run: Run) -> None:
    run.kept[:] = [sample.model_copy(update={"origin": "rules"}) for sample in run.kept]
    assert "All of the 22 samples were made by rules, a program" in text_of(built(tmp_path, run))


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> \u202eevil\u202c \x1b[31mred\x1b[0m "
    '"><svg onload=alert(3)> </style> \ud800'.encode("utf-8", "replace").decode()
)


def hostile_run(tmp_path: Path) -> Run:
    """A run in which every foreign text tries to be more than text."""
    run = make_run(
        [
            AnnotatedImage(p.id, p.file_name, 80, 60, (HOSTILE, "A dog."),
                    tuple(Box(HOSTILE, b.left, b.top, b.width, b.height, b.crowd, b.id)
                          for b in p.boxes), p.caption_ids)
            for p in images(tmp_path / "images", 4)
        ],
        TYPES,
    )  # fmt: skip
    for group in (run.samples, run.rejected, run.kept, run.dropped):
        group[:] = [
            sample.model_copy(
                update={
                    "turns": tuple(
                        turn.model_copy(
                            update={"question": HOSTILE, "answer": turn.answer + HOSTILE * 200}
                        )
                        for turn in sample.turns
                    ),
                    "raw": HOSTILE * 200 if sample.raw else None,
                    "model": HOSTILE,
                }
            )
            for sample in group
        ]
    run.answers[:] = [a.model_copy(update={"text": HOSTILE}) for a in run.answers]
    return run


def test_foreign_text_stays_text(tmp_path: Path) -> None:
    html = built(tmp_path, hostile_run(tmp_path))
    assert not re.search("[\x00-\x09\x0b-\x1f\u202a-\u202e\u2066-\u2069]", html)
    tags = Tags()
    tags.feed(html)
    assert [tag for tag, _ in tags.found].count("script") == 1
    assert not [name for _, attributes in tags.found for name in attributes if name[:2] == "on"]
    sources = [a["src"] for tag, a in tags.found if tag == "img"]
    assert sources and all(
        str(source).startswith(("data:image/jpeg;base64,", "data:image/png;base64,"))
        for source in sources
    )
    assert "default-src 'none'" in html and "&lt;script&gt;alert(1)" in html
    assert len(html) < 1_000_000, "huge texts are cut, and said to be"
    assert re.search(r"… [\d,]+ characters after<", html)


def test_the_page_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    made = images(tmp_path / "images", 6)
    run = Run(made)
    for number in range(900):
        add(run, made[number % 6], "reasoning", ("object", "kept")[number % 2])
    for number, sample in enumerate(run.rejected):
        run.rejected[number] = sample.model_copy(update={"reasons": (f"CODE_{number % 30:02d}",)})
    html = built(tmp_path, run)
    assert html.count("data:image/jpeg") == 10 * 5 + 20 * 2 + 20 + 20


def test_an_image_that_cannot_be_opened_is_reported_in_its_place(tmp_path: Path, run: Run) -> None:
    for path in (tmp_path / "images").glob("*.jpg"):
        path.unlink()
    html = built(tmp_path, run)
    assert "data:image/jpeg" not in html and 'class="gone"' in html and "<svg" in html


def test_a_random_choice_depends_on_the_keys_alone() -> None:
    forward, backward = Reservoir[int](5, seed=1), Reservoir[int](5, seed=1)
    for number in range(1000):
        forward.add(str(number), number)
        backward.add(str(999 - number), 999 - number)
    assert forward.items() == backward.items() and len(forward.items()) == 5
    other = Reservoir[int](5, seed=2)
    for number in range(1000):
        other.add(str(number), number)
    assert other.items() != forward.items()


def test_how_answers_begin_and_what_is_chosen_is_what_cleaning_counted(
    tmp_path: Path, run: Run
) -> None:
    opening = {"opening": "there are two", "before": 9, "kept": 6, "share": 0.3}
    openings = {"answers": {"before": 25, "kept": 20}, "most_frequent": [opening]}
    kept = {"yes": 3, "no": 1, "guessed_by_category_alone": 0.75}
    cleaning = {"openings": {"detail": openings}, "answers": {"yes_no": {"kept": kept}}}
    folder = run.write(tmp_path / "run")
    folder.cleaning.write_text(json.dumps(cleaning))
    text = text_of(built(tmp_path, run))
    assert "Answers of detail begin with answers share before cleaning" in text
    assert "there are two … 6 30.0 % 9" in text
    assert "yes / no answer turns share yes 3 75.0 % no 1 25.0 %" in text


@given(
    st.text(max_size=40),
    st.lists(st.tuples(st.integers(-3, 45), st.integers(-3, 45)), max_size=6),
)
def test_pieces_are_the_text_and_every_claim_is_covered(
    text: str, spans: list[tuple[int, int]]
) -> None:
    found = split_at_claims(text, dict(enumerate(spans)))
    assert "".join(piece.text for piece in found) == text
    for index, (start, end) in enumerate(spans):
        covered = "".join(piece.text for piece in found if index in piece.claims)
        assert covered == text[max(start, 0) : max(end, 0)]
        opened = sum(index in piece.opening for piece in found)
        assert opened == sum(index in piece.closing for piece in found) == bool(covered)


def test_boxes_tell_by_more_than_colour_what_they_are() -> None:
    image = AnnotatedImage(
        1, "a.jpg", 100, 50, (),
        (Box("dog", 0, 0, 20, 20, False, 1), Box("person", 30, 0, 40, 40, True, 2),
         Box("cup", 80, 40, 5, 5, False, 3)),
    )  # fmt: skip
    shown = Shown(boxes=(1, 2), summarised={"cup": (3,)})
    check = Check(rule="count", verdict="contradicted", code="COUNT_WRONG", evidence=(1, 3))
    drawn = draw.drawn_boxes(image, shown, [check])
    assert [box.name for box in drawn] == ["b2 person (crowd)", "✗ b1 dog", "✗ cup"]
    assert [box.css for box in drawn] == ["plain crowd", "contradicted", "contradicted counted"]
    labels = annotation_labels(image, shown)
    assert cited_labels(check, labels) == "b1 dog, #3 cup (counted)"


@given(
    st.lists(
        st.tuples(*[st.floats(0, 1) for _ in range(4)], st.booleans()), min_size=1, max_size=30
    )
)
def test_names_stay_inside_the_image(
    boxes: list[tuple[float, float, float, float, bool]],
) -> None:
    drawn = [
        draw.DrawnBox(f"b{i}", "dog", x, y, w * (1 - x), h * (1 - y), crowd, None)
        for i, (x, y, w, h, crowd) in enumerate(boxes)
    ]
    for label in draw.place_labels(drawn, (320, 240), 11):
        assert label.left >= 0 and label.left + label.width <= 320.1
        assert label.top >= 0 and label.top + label.height <= 240.1


@pytest.mark.parametrize("size", [(90, 70), (641, 427), (57, 100)])
def test_a_drawn_image_keeps_its_size_and_its_bytes(size: tuple[int, int]) -> None:
    box = draw.DrawnBox("b1", "dog $x$ 犬", 0.2, 0.3, 0.3, 0.3, True, "contradicted")
    image = Image.new("RGB", size, "green")
    image.putpixel((0, size[1] - 1), (1, 2, 3))
    data = draw.draw_png(image, [box])
    assert data == draw.draw_png(image, [box])
    drawn = Image.open(io.BytesIO(data)).convert("RGB")
    assert drawn.size == size
    assert drawn.getpixel((size[0] - 1, 0)) == (0, 128, 0), "the image is not changed elsewhere"
    assert drawn.getpixel((0, size[1] - 1)) == (1, 2, 3)
    edge = (round(0.2 * size[0]), round(0.45 * size[1]))
    assert draw.draw_png(image, []) != data and drawn.getpixel(edge) != (0, 128, 0)


def test_what_became_of_the_images_is_listed_with_the_reasons(tmp_path: Path) -> None:
    run = Run(images(tmp_path / "images", 5))
    for image, fates in zip(
        run.images,
        (["object", "kept"], ["object", "unanswered"], ["unread"], ["object"], []),
        strict=True,
    ):
        for fate in fates:
            add(run, image, "detail", fate)
    folder = run.write(tmp_path / "run")
    folder.plan.write_text(json.dumps({"left_out": {"not_chosen": 1, "of_evaluations": 0}}))
    text = text_of(built(tmp_path, run))
    assert "in the training files 1 1" in text
    assert (
        "all answers rejected by verify 3 4 OBJECT_NOT_FOUND 3, REFUSAL 1 (rejected.jsonl)" in text
    )
    assert "not answered 0 1 not asked yet 1" in text
    assert "not chosen 1 – images.count is smaller" in text and "evaluation images 0" not in text
    assert "2 of 5 images have a sample" not in text and "1 of 5 images have a sample" in text


def test_every_code_of_cleaning_has_a_meaning() -> None:
    assert codes.MEANINGS.keys() <= page.MEANINGS.keys()


def test_answers_that_could_not_be_read_count_as_no_claims(tmp_path: Path) -> None:
    checks = (Check(rule="reading", verdict="contradicted", code="NOT_JSON", claim="x"),)
    images = [asked.image(1)]
    run = Run(images)
    for number in range(2):
        request = request_about(images[0], "detail", number)
        answer = Answer(request=request.id, teacher="openai", text="x", finish="stop")
        run.requests.append(request)
        run.answers.append(answer)
        sample = sample_of(request, images[0], answer, (), checks, ("NOT_JSON",))
        run.rejected.append(sample)
    folder = run.write(tmp_path / "run")
    config = config_of(folder.root, tmp_path / "images")
    counts = reporting.read_report(config, folder).counts
    values = {caption: value for value, caption in page.headline(counts)}
    assert values["of 0 checked claims are contradicted"] == "–"
    assert counts.other_checks == {("reading", "contradicted"): 2} and not counts.claims
