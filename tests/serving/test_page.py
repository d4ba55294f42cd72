"""The chat page in a real Chromium: upload, ask, stop, compare, errors, keyboard, key."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlm_sft.inference.loaded_model import LoadedModel, load_checkpoint

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytest.importorskip("playwright.sync_api")

from tests.serving.served import Served, ask, png, text, uri
from vlm_sft.serving.images import ImageLimits
from vlm_sft.serving.protocol import Limits

WAIT = 60_000
"""Milliseconds: test machines can be slow."""


@pytest.fixture(scope="module")
def loaded(full_run: Path) -> LoadedModel:
    return load_checkpoint(full_run / "final", device="cpu")


@pytest.fixture(scope="module")
def served(loaded: LoadedModel) -> Iterator[Served]:
    limits = Limits(max_tokens=200, max_body=300_000, images=ImageLimits(max_images=3))
    server = Served([loaded, loaded], limits, key=None, page=True, local_only=True)
    yield server
    server.close()


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    yield from opened(browser, served.url)


def opened(browser: Any, url: str) -> Iterator[Any]:
    """Open the page; it must not have errors or use other servers."""
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    context.set_default_timeout(WAIT)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "console",
        lambda message: (
            problems.append(message.text) if "Content Security" in message.text else None
        ),
    )
    page.on(
        "request",
        lambda request: (
            problems.append(request.url)
            if not request.url.startswith((url, "data:", "blob:"))
            else None
        ),
    )
    page.goto(url)
    yield page
    context.close()
    assert problems == []


def file(name: str, data: bytes) -> dict[str, Any]:
    return {"name": name, "mimeType": "image/png", "buffer": data}


def choose_model(page: Any, name: str) -> None:
    page.wait_for_selector("#models span")
    page.click("#settings-toggle")
    page.select_option("#model", name)
    page.click("#settings-toggle")


def finished(page: Any) -> None:
    page.wait_for_selector("#send:visible")


def wait(page: Any, condition: str) -> None:
    """Wait for a condition in JavaScript; the page's policy forbids playwright's own way."""
    deadline = time.monotonic() + WAIT / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(50)


def answers(page: Any) -> list[str]:
    found: list[str] = page.locator(".reply .text").all_text_contents()
    return found


def test_images_are_uploaded_and_the_answer_is_that_of_the_api(page: Any, served: Served) -> None:
    choose_model(page, "tiny")
    page.set_input_files("#files", [file("a.png", png("red")), file("b.png", png("blue"))])
    page.wait_for_selector("#attached li:nth-child(2)")
    page.fill("#question", "Same color?")
    page.click("#send")
    page.wait_for_selector(".facts:not(:empty)")
    finished(page)
    same = ask(
        served.client(), uri(png("red")), uri(png("blue")), text("Same color?"), max_tokens=200
    )
    expected = same.choices[0].message.content
    assert answers(page) == [expected]
    facts = page.text_content(".facts")
    assert f"{same.usage.completion_tokens}\xa0tokens · " in facts and "tokens/s" in facts
    assert expected in page.text_content("#status"), "screen readers hear the answer"
    assert page.locator(".question img").count() == 2

    page.click(".again")
    page.wait_for_selector(".facts:not(:empty)")
    finished(page)
    assert answers(page) == [expected]

    page.fill("#question", "And now?")
    page.press("#question", "Enter")
    page.wait_for_selector(".turn:nth-child(2) .facts:not(:empty)")
    finished(page)
    assert page.locator(".turn").count() == 2


def test_an_answer_grows_while_it_is_generated_and_can_be_stopped(
    page: Any, served: Served, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = served.engine._batch
    step = batch.step

    def slow_step() -> None:
        time.sleep(0.1)
        step()

    monkeypatch.setattr(batch, "step", slow_step)
    letter = loaded.tokenizer.encode("a", add_special_tokens=False)[-1]
    monkeypatch.setattr("vlm_sft.serving.engine._choose", lambda *_: letter)  # until it is stopped
    choose_model(page, "tiny")
    page.fill("#question", "Tell me everything.")
    page.press("#question", "Enter")
    wait(page, "document.querySelector('.reply .text')?.textContent.length > 1")
    first = answers(page)[0]
    wait(page, f"document.querySelector('.reply .text').textContent.length > {len(first)}")
    page.press("#question", "Escape")
    page.wait_for_selector(".facts:not(:empty)")
    assert "stopped" in page.text_content(".facts")
    assert answers(page)[0].startswith(first)
    finished(page)
    deadline = time.monotonic() + 30
    while served.engine.running:
        assert time.monotonic() < deadline, "the place is free again"
        time.sleep(0.05)


def test_two_models_answer_side_by_side(page: Any) -> None:
    page.wait_for_selector("#models span:nth-child(2)")
    page.fill("#question", "What is it?")
    page.click("#send")
    page.wait_for_selector(".reply:nth-child(2) .facts:not(:empty)")
    finished(page)
    assert page.locator(".reply h3").all_text_contents() == ["tiny", "other"]
    left, right = (page.locator(".reply").nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    assert len(set(answers(page))) == 1


def test_errors_are_shown_and_the_page_goes_on(
    page: Any, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_model(page, "tiny")
    page.set_input_files("#files", [file("broken.png", b"no image")])
    page.fill("#question", "What is this?")
    page.click("#send")
    page.wait_for_selector(".turn:nth-child(1) .failure:not(:empty)")
    assert page.text_content(".failure").startswith("An attached file is not an image file")
    finished(page)

    page.click(".edit")
    assert page.input_value("#question") == "What is this?"
    page.click("#attached button")
    with monkeypatch.context() as full:
        full.setattr(served.engine, "max_queue", 0)
        page.click("#send")
        page.wait_for_selector(".failure:not(:empty)")
        assert "The server is busy" in page.text_content(".failure")
        finished(page)
    page.click(".again")
    page.wait_for_selector(".facts:not(:empty)")
    finished(page)
    assert page.text_content(".failure") == ""

    page.set_input_files("#files", [file("large.png", os.urandom(300_000))])
    page.click("#send")
    page.wait_for_selector(".turn:nth-child(2) .failure:not(:empty)")
    assert "larger than this server accepts" in page.text_content(".turn:nth-child(2) .failure")
    finished(page)

    page.set_input_files("#files", [{**file("notes.txt", b"hi"), "mimeType": "text/plain"}])
    page.wait_for_selector("#problem:not(:empty)")
    assert "notes.txt is not an image" in page.text_content("#problem")
    page.set_input_files("#files", [file(f"{i}.png", png("red")) for i in range(3)])
    page.wait_for_selector("#attached li:nth-child(3)")
    page.click("#send")
    page.wait_for_selector("#problem:not(:empty)")
    assert "accepts 3 images in a conversation" in page.text_content("#problem")


TRANSFER = """([kind, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
  const options = { bubbles: true, cancelable: true };
  document.dispatchEvent(
    kind === "paste"
      ? new ClipboardEvent("paste", { ...options, clipboardData: data })
      : new DragEvent("drop", { ...options, dataTransfer: data })
  );
}"""


def test_images_are_dropped_pasted_and_removed(page: Any) -> None:
    for number, kind in enumerate(("paste", "drop"), 1):
        page.evaluate(TRANSFER, [kind, list(png("red"))])
        page.wait_for_selector(f"#attached li:nth-child({number}) img")
    page.click("#attached li:nth-child(1) button")
    assert page.locator("#attached li").count() == 1
    page.click("#new-chat")
    assert page.locator("#attached li").count() == 0


def test_a_photo_is_taken_with_the_camera(page: Any) -> None:
    page.click("#camera")
    page.wait_for_selector("#camera-dialog[open]")
    wait(page, "document.getElementById('video').videoWidth > 0")
    page.click("#shoot")
    page.wait_for_selector("#attached img")
    uri_of_photo = page.get_attribute("#attached img", "src")
    assert uri_of_photo.startswith("data:image/jpeg;base64,")
    wait(page, "document.getElementById('video').srcObject === null")


def test_the_page_can_be_used_with_the_keyboard_alone(page: Any) -> None:
    focused = "document.activeElement.id || document.activeElement.className"
    page.wait_for_selector("#models span")
    assert page.evaluate(focused) == "question"
    page.keyboard.type("What is it?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".reply:nth-child(2) .facts:not(:empty)")
    finished(page)
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(focused))
        focus = (
            "document.activeElement.closest('.box:has(#question:focus)') ?? document.activeElement"
        )
        if page.evaluate("document.activeElement !== document.body"):
            assert page.evaluate(f"getComputedStyle({focus}).outlineWidth") == "3px"
    assert {"new-chat", "settings-toggle", "theme", "chat", "choose", "camera", "send"} <= reached
    assert {"again", "edit", "copy"} <= reached
    with page.expect_file_chooser():
        page.focus("#choose")
        page.keyboard.press("Enter")
    page.focus("#settings-toggle")
    page.keyboard.press("Space")
    assert page.get_attribute("#settings-toggle", "aria-expanded") == "true"
    unnamed = """() => [...document.querySelectorAll("button, input, select, textarea")].filter(
      (each) => !each.labels?.length && !each.getAttribute("aria-label") && !each.textContent.trim()
    ).map((each) => each.id)"""
    assert page.evaluate(unnamed) == []


def test_a_narrow_screen_needs_no_sideways_scrolling(page: Any) -> None:
    page.set_viewport_size({"width": 340, "height": 600})
    page.wait_for_selector("#models span")
    page.click("#settings-toggle")
    assert page.evaluate("document.documentElement.scrollWidth") <= 340
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_the_key_is_asked_for_and_kept_in_memory_only(browser: Any, loaded: LoadedModel) -> None:
    server = Served(loaded, Limits(max_tokens=20), page=True)
    try:
        for page in opened(browser, server.url):
            for key in ("wrong", "a-secret-key"):
                page.wait_for_selector("#key-dialog[open]")
                page.fill("#key", key)
                page.keyboard.press("Enter")
                if key == "wrong":
                    page.wait_for_selector("#key-problem:not(:empty)")
            page.wait_for_selector("#models span")
            page.fill("#question", "hi")
            page.keyboard.press("Enter")
            page.wait_for_selector(".facts:not(:empty)")
            stored = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
            assert page.evaluate(stored) == '[{},{},""]'
            assert "a-secret-key" not in page.content()
            page.reload()
            page.wait_for_selector("#key-dialog[open]")
    finally:
        server.close()
