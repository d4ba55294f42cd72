"""The review page in a real Chromium: keys, edits, reloads, filters, kills and narrow screens."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")

from tests.data_tools.review_runs import served, write_run

ROOT = Path(__file__).parents[2]
WAIT = 60_000


def opened(browser: Any, url: str, **more: Any) -> Iterator[Any]:
    """Open the page; it must not have errors or use other servers."""
    context = browser.new_context(viewport={"width": 1100, "height": 800}, **more)
    context.set_default_timeout(WAIT)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "console",
        lambda message: problems.append(message.text) if "Security" in message.text else None,
    )
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith((url, "data:")) else problems.append(request.url)
        ),
    )
    page.goto(url)
    ready(page)
    yield page
    context.close()
    assert problems == []


def ready(page: Any) -> None:
    page.wait_for_selector("#sample[aria-busy=false]")


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)
        ready(page)


def shown(page: Any) -> str:
    return str(page.text_content("#sample .id"))


def count(page: Any) -> str:
    return str(page.text_content("#count"))


def lines(root: Path, reviewer: str = "ann") -> list[dict[str, Any]]:
    path = root / "review" / f"{reviewer}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def test_samples_are_decided_with_the_keyboard_and_a_reload_keeps_everything(
    browser: Any, root: Path
) -> None:
    with served(root) as address:
        for page in opened(browser, address):
            total = int(count(page).split(" of ")[1])
            first = shown(page)
            assert page.locator("#sample img").count() == 1
            assert page.locator("#sample svg rect.line").count() >= 1, "boxes are drawn"
            assert page.locator("#sample .found li").count() >= 1, "claims are listed"
            press(page, "a")
            second = shown(page)
            assert second != first and count(page) == f"1 of {total}"
            page.keyboard.press("r")
            page.wait_for_selector("#reasons[open]")
            press(page, "2")
            third = shown(page)
            assert count(page) == f"2 of {total}"

            page.keyboard.press("e")
            page.locator("form textarea[name=answer]").first.fill("There are 99 dogs <b>here</b>.")
            page.keyboard.press("a")  # a letter of the text, not the key
            page.keyboard.press("Control+Enter")
            page.wait_for_selector(".badge.decided.edit")
            ready(page)
            assert shown(page) == third and count(page) == f"3 of {total}"
            assert "<b>here</b>.a" in page.text_content("#sample .turns"), "text stays text"
            assert page.locator("#sample .turns b", has_text="here").count() == 0
            assert "rejected by the verifier" in page.text_content("#sample h4"), "verified again"

            press(page, "k")
            assert shown(page) == second and "does not show" in page.text_content("#sample h4")
            page.reload()
            ready(page)
            assert shown(page) == second and count(page) == f"3 of {total}"
            press(page, "u")
            assert shown(page) == third and count(page) == f"2 of {total}"
            assert page.locator(".badge.decided").count() == 0
            press(page, "j", "k", "k", "k", "k")
            assert shown(page) == first and "the first one" in page.text_content("#problem")

            page.keyboard.press("e")
            page.keyboard.press("Escape")
            assert page.locator("form").count() == 0
            page.keyboard.press("?")
            page.wait_for_selector("#keys[open]")
            page.keyboard.press("a")  # decides nothing behind the help
            page.keyboard.press("Escape")
    found = lines(root)
    assert [line["decision"] for line in found] == ["accept", "reject", "edit", "undo"]
    assert [line["id"] for line in found] == [first, second, third, third]
    assert found[1]["reason"] == "not_in_image" and found[2]["turns"][0]["answer"].endswith(".a")
    assert all(line["reviewer"] == "ann" and line["digest"] and line["time"] for line in found)


def test_filters_show_a_part_and_the_first_visit_what_is_not_reviewed(
    browser: Any, root: Path
) -> None:
    with served(root) as address:
        for page in opened(browser, address):
            press(page, "a")
            page.select_option("#show", "rejected")
            ready(page)
            number = int(str(page.text_content("#matching")).split()[0])
            names = []
            for _ in range(number):
                names.append(shown(page))
                assert "rejected by the verifier" in page.text_content("#sample h4")
                press(page, "j")
            assert len(set(names)) == number and "the last one" in page.text_content("#problem")
            page.select_option("#type", "detail")
            ready(page)
            assert all("detail" in shown(page) for _ in range(2))
            page.select_option("#show", "unreviewed")
            page.select_option("#type", "")
            ready(page)
        for page in opened(browser, address):
            assert "1 of" in count(page) and page.locator(".badge.decided").count() == 0
            total = int(count(page).split(" of ")[1])
            page.select_option("#show", "unreviewed")
            ready(page)
            press(page, "j", *("a" for _ in range(total - 2)))
            assert count(page) == f"{total - 1} of {total}", "the one that was passed over is next"
            press(page, "a")
            assert "All samples are reviewed" in page.text_content("#sample")
            press(page, "k")


def test_a_killed_command_keeps_every_decision_that_the_page_has_shown(
    browser: Any, root: Path
) -> None:
    command = [sys.executable, "-m", "data_tools.review", str(root), "--reviewer", "bob"]
    for already in (0, 3):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+/\S+/", process.stdout.readline())
            assert found is not None
            for page in opened(browser, found[0]):
                assert count(page).startswith(f"{already} of")
                if already:
                    assert page.locator(".badge.decided").count() == 0
                    continue
                press(page, "a", "a", "a")
                process.send_signal(signal.SIGKILL)
                process.wait()
                page.keyboard.press("a")
                page.wait_for_selector("#problem.bad:not(:empty)")
                assert "Start it again" in page.text_content("#problem")
                assert count(page).startswith("3 of")
        finally:
            process.kill()
            process.communicate()
    assert [line["decision"] for line in lines(root, "bob")] == ["accept"] * 3


def test_a_narrow_dark_screen_needs_no_sideways_scrolling_and_every_control_has_a_name(
    browser: Any, root: Path
) -> None:
    with served(root) as address:
        for page in opened(browser, address, color_scheme="dark"):
            page.set_viewport_size({"width": 400, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= 400
            page.keyboard.press("e")
            assert page.evaluate("document.documentElement.scrollWidth") <= 400
            unnamed = """() => [...document.querySelectorAll("button, select, textarea")].filter(
              (one) => !one.labels?.length && !one.ariaLabel && !one.textContent.trim()
            ).map((one) => one.outerHTML)"""
            assert page.evaluate(unnamed) == []
            page.click("#cancel")
            assert page.locator("form").count() == 0
