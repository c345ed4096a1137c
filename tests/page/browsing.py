# SPDX-License-Identifier: Apache-2.0
"""How a test uses the page."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")


@contextmanager
def chromium() -> "Iterator[Browser]":
    """Run a headless Chromium; meanwhile an event loop runs in this thread."""
    if not CHROMIUM.exists():
        pytest.fail(f"no {CHROMIUM}; install it with `apt-get install chromium`")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            # No other host is reached, whatever the machine has for a network.
            args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
        )
        try:
            yield browser
        finally:
            browser.close()


def attach(page: "Page", *files: Path, to: str = "#question") -> None:
    """Upload files, and wait until the page shows them."""
    page.set_input_files(f"{to} input[type=file]", list(files))
    shown = ".thumbnail-item" if to == "#question" else ".file"
    page.locator(f"{to} {shown}").nth(len(files) - 1).wait_for()


def ask(page: "Page", words: str) -> None:
    """Type a question and send it."""
    page.fill("#question textarea", words)
    page.press("#question textarea", "Enter")


def answers(page: "Page") -> list[str]:
    """Return what stands below the questions."""
    return page.locator("#chat .answer").all_inner_texts()


def wait_for_answers(page: "Page", count: int) -> None:
    """Wait until so many answers have ended, and the next question may be sent."""
    page.locator("#chat .note").nth(count - 1).wait_for()
    page.wait_for_selector("#question .submit-button")


def circle(colour: str) -> bytes:
    """Return a drawing."""
    image, data = Image.new("RGB", (320, 240), "whitesmoke"), BytesIO()
    ImageDraw.Draw(image).ellipse((90, 50, 230, 190), colour)
    image.save(data, "PNG")
    return data.getvalue()
