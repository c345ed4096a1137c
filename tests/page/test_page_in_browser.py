# SPDX-License-Identifier: Apache-2.0
"""The chat page in headless Chromium, over HTTP, with the fake engine behind it.

After each test the fixture `page` looks whether anything was asked of another host.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.page.browsing import answers, ask, attach, circle, wait_for_answers
from tests.waiting import eventually

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from tests.page.page_site import Site

pytestmark = [pytest.mark.serving, pytest.mark.soak]
HOSTILE = (
    "<img src=http://elsewhere.test/a.png onerror=document.title='ran'> "
    "![b](http://elsewhere.test/b.png) <script>document.title='ran'</script> "
    "<b>bold</b> ${document.title='ran'} {{1+1}} [c](javascript:alert(1)) $x^2$"
)


@pytest.fixture
def teal(tmp_path: Path) -> Path:
    file = tmp_path / "teal.png"
    file.write_bytes(circle("teal"))
    return file


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    file = tmp_path / "bad.png"
    file.write_bytes(b"this is no image")
    return file


def test_a_wrong_key_is_told_in_the_servers_words(page: "Page") -> None:
    page.fill("#key input", "wrong")
    page.click("#connect")
    assert (
        page.inner_text(".notice")
        == "401: no valid API key; send it as `Authorization: Bearer KEY`"
    )
    assert not page.locator("#question").is_visible()


def test_an_answer_about_an_image_grows_and_says_what_it_took(
    connected: "Page", page_site: "Site", teal: Path, shots: Path
) -> None:
    attach(connected, teal)
    ask(connected, "What is it?")
    seen: set[str] = set()

    def has_ended() -> bool:
        seen.update(one for one in answers(connected) if one)
        return connected.locator("#chat .note").count() == 1

    eventually(has_ended)
    whole = answers(connected)[0]
    assert len(seen) > 3 and all(whole.startswith(one) for one in seen)
    (job,) = page_site.backend.jobs
    assert len(job.request.images) == 1
    note = connected.inner_text("#chat .note")
    assert " tokens \u00b7 " in note and " s \u00b7 first word after " in note
    assert connected.locator("#chat .asked img").evaluate("it => it.naturalWidth") == 320
    connected.screenshot(path=shots / "chat.png")


@pytest.mark.parametrize("is_silent", [False, True])
def test_stop_ends_the_request_on_the_server(
    connected: "Page", page_site: "Site", shots: Path, is_silent: bool
) -> None:
    begin(connected, page_site, is_silent=is_silent)
    connected.screenshot(path=shots / f"growing-{is_silent}.png")
    connected.click("#question .stop-button")
    eventually(lambda: page_site.backend.running() == 0, within_s=1.0)
    wait_for_answers(connected, 1)
    assert connected.inner_text("#chat .note").startswith("stopped \u00b7 ")
    assert connected.locator("#question .submit-button").is_visible()


@pytest.mark.parametrize("is_silent", [False, True])
def test_closing_the_tab_ends_the_request_too(
    connected: "Page", page_site: "Site", is_silent: bool
) -> None:
    begin(connected, page_site, is_silent=is_silent)
    connected.close()
    eventually(lambda: page_site.backend.running() == 0, within_s=3.0)


def begin(page: "Page", page_site: "Site", *, is_silent: bool) -> None:
    """Ask, and wait until an answer has begun, which then grows or does not."""
    page_site.backend.is_silent = is_silent
    ask(page, "Tell me more")
    eventually(lambda: any(len(one) > 4 for one in answers(page)))
    assert page_site.backend.running() == 1


def test_a_second_turn_sends_the_first_again_with_its_image(
    connected: "Page", page_site: "Site", teal: Path, shots: Path
) -> None:
    attach(connected, teal)
    ask(connected, "What is it?")
    wait_for_answers(connected, 1)
    ask(connected, "Which colour?")
    wait_for_answers(connected, 2)
    first, second = page_site.backend.jobs
    assert len(second.request.images) == 1
    assert (second.request.images[0] == first.request.images[0]).all()
    assert len(second.request.token_ids) > len(first.request.token_ids) + 8
    connected.screenshot(path=shots / "second-turn.png")
    connected.click("#clear")
    connected.wait_for_selector("#chat .empty")
    ask(connected, "And now?")
    wait_for_answers(connected, 1)
    assert page_site.backend.jobs[-1].request.images == ()


def test_a_pasted_image_is_taken(connected: "Page", page_site: "Site") -> None:
    connected.focus("#question textarea")
    connected.evaluate(
        """bytes => {
            const data = new DataTransfer()
            data.items.add(new File([new Uint8Array(bytes)], "image.png", {type: "image/png"}))
            const paste = {clipboardData: data, bubbles: true, cancelable: true}
            document.activeElement.dispatchEvent(new ClipboardEvent("paste", paste))
        }""",
        list(circle("teal")),
    )
    connected.wait_for_selector("#question .thumbnail-item")
    ask(connected, "What is it?")
    wait_for_answers(connected, 1)
    assert len(page_site.backend.jobs[0].request.images) == 1


def test_a_bad_image_is_told_and_the_question_can_be_changed(
    connected: "Page", page_site: "Site", bad: Path, shots: Path
) -> None:
    attach(connected, bad)
    ask(connected, "What is it?")
    connected.wait_for_selector(".notice")
    told = "400: this is not an image; send JPEG, PNG, WEBP, GIF, BMP"
    assert connected.inner_text(".notice") == told
    connected.screenshot(path=shots / "bad-image.png")
    assert connected.input_value("#question textarea") == "What is it?"
    assert answers(connected) == []
    connected.click("#question .delete-button")
    connected.press("#question textarea", "Enter")
    wait_for_answers(connected, 1)
    assert connected.locator(".notice").count() == 0
    assert page_site.backend.jobs[-1].request.images == ()


def test_what_is_asked_and_answered_is_text(connected: "Page", page_site: "Site") -> None:
    page_site.backend.says = HOSTILE
    ask(connected, HOSTILE)
    wait_for_answers(connected, 1)
    assert answers(connected) == [HOSTILE]
    assert connected.locator("#chat .asked p").inner_text() == HOSTILE
    assert connected.locator("#chat :is(.answer, .asked p) *").count() == 0
    assert connected.title() == "sg4v-ray"


def test_captions_of_many_images_of_which_one_is_bad(
    connected: "Page", page_site: "Site", teal: Path, bad: Path, tmp_path: Path, shots: Path
) -> None:
    files = [teal, bad]
    for colour in ("red", "blue", "green"):
        files.append(tmp_path / f"<i>{colour}.png")
        files[-1].write_bytes(circle(colour))
    connected.get_by_role("tab", name="Captions").click()
    attach(connected, *files, to="#images")
    connected.click("#caption")
    connected.get_by_text("5 of 5 images, 1 without a caption").wait_for()
    connected.screenshot(path=shots / "captions.png")
    assert connected.locator(".captions tbody img").count() == 4
    with connected.expect_download() as saving:
        connected.get_by_text("Download JSON").click()
    saved: list[dict[str, Any]] = json.loads(Path(saving.value.path()).read_text())
    assert saving.value.suggested_filename == "captions.json"
    assert [set(one) for one in saved] == [
        {"file", "caption", "tokens", "flags"} if one is not bad else {"file", "error"}
        for one in files
    ]
    assert saved[1]["error"] == "400: this is not an image; send JPEG, PNG, WEBP, GIF, BMP"
    shown = connected.locator(".captions .said").all_inner_texts()
    assert shown == [one["caption"] for one in saved if "caption" in one]
    assert {len(one.request.images) for one in page_site.backend.jobs} == {1}


def test_captions_as_hostile_as_can_be_are_text(
    connected: "Page", page_site: "Site", teal: Path
) -> None:
    page_site.backend.says = HOSTILE
    connected.get_by_role("tab", name="Captions").click()
    attach(connected, teal, to="#images")
    connected.click("#caption")
    assert connected.locator(".captions .said").inner_text() == HOSTILE
    assert connected.locator(".captions .said *").count() == 0
    assert connected.title() == "sg4v-ray"
