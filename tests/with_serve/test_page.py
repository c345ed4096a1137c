# SPDX-License-Identifier: Apache-2.0
"""The chat page as an application of Ray Serve beside the API, in headless Chromium."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from ray import serve

from serve.config import Auth, ServeConfig
from serve.page import app as page
from serve.page.config import PageConfig
from tests.page.browsing import answers, ask, attach, chromium, wait_for_answers
from tests.unit.serve_site import DEPLOYMENT, png
from tests.waiting import eventually
from tests.with_serve.conftest import KEY
from tests.with_serve.test_serve import running

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from tests.with_serve.conftest import Server

pytestmark = [pytest.mark.serving, pytest.mark.soak]


@pytest.fixture
def shown(server: "Server") -> Iterator["Page"]:
    """The page, opened and connected."""
    config = ServeConfig(
        models=(DEPLOYMENT,),
        auth=Auth(keys_env="ANY"),
        port=int(server.url.rpartition(":")[2]),
        page=PageConfig(num_cpus=0.1),
    )
    serve.run(page.application(config), name=page.PAGE, route_prefix="/chat")
    try:
        with chromium() as browser:
            opened = browser.new_page()
            opened.goto(f"{server.url}/chat")
            opened.fill("#key input", KEY)
            opened.press("#key input", "Enter")
            opened.wait_for_selector("#question textarea")
            yield opened
    finally:
        serve.delete(page.PAGE)


def busy(server: "Server") -> int:
    """Return what the slow model works on; asked in a thread, for the browser's loop is in ours."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(running, server, "slow").result()


def choose(shown: "Page", model: str) -> None:
    shown.click("#chat-model input")
    shown.get_by_role("option", name=model).click()


def test_the_page_works_below_its_path(
    shown: "Page", server: "Server", tmp_path: Path, shots: Path
) -> None:
    assert shown.url == f"{server.url}/chat/"
    file = tmp_path / "teal.png"
    file.write_bytes(png("teal"))
    choose(shown, "captioner")
    attach(shown, file)
    ask(shown, "What is it?")
    wait_for_answers(shown, 1)
    ask(shown, "Which colour?")
    wait_for_answers(shown, 2)
    assert all(answers(shown))
    assert shown.locator("#chat .asked img").evaluate("it => it.naturalWidth") == 30
    shown.screenshot(path=shots / "serve.png")

    shown.click("#clear")
    # The question has the focus again when all is cleared; a list that opens before would close.
    shown.wait_for_selector("#question :focus")
    choose(shown, "slow")
    ask(shown, "Slowly")
    eventually(lambda: busy(server) == 1)
    shown.click("#question .stop-button")
    eventually(lambda: busy(server) == 0, within_s=2.0)
    wait_for_answers(shown, 1)

    ask(shown, "Slowly again")
    eventually(lambda: busy(server) == 1)
    shown.close()
    eventually(lambda: busy(server) == 0, within_s=5.0)

    for path in ("/chatter", "/v1/models", "/gradio_api/info"):
        assert httpx.get(server.url + path).status_code == 401, "the API's own, with its guard"
    assert httpx.get(f"{server.url}/chat/gradio_api/info").status_code == 404
