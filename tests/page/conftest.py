# SPDX-License-Identifier: Apache-2.0
"""One site and one headless Chromium for all tests of this folder; what it asks for is noted."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.page.browsing import chromium
from tests.page.page_site import KEY, Site, site

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def page_site(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Site]:
    uploads = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))  # as the page sets it, but undone
        with site(tiny_model, uploads) as made:
            yield made


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Not for the session: while it is there, an event loop runs in this thread."""
    with chromium() as made:
        yield made


@pytest.fixture
def page(browser: "Browser", page_site: Site) -> "Iterator[Page]":
    """An open page; after each test, nothing was asked of another host, and nothing will be."""
    backend = page_site.backend
    backend.says, backend.is_silent, backend.jobs = None, False, []
    context = browser.new_context(viewport={"width": 1280, "height": 760})
    context.set_default_timeout(15_000)
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    opened = context.new_page()
    opened.goto(page_site.url)
    yield opened
    own = (page_site.url, "data:", "blob:")
    if not opened.is_closed():  # a link may connect without a request
        asked += opened.eval_on_selector_all(
            "[src], link[href]:not([rel=manifest])", "all => all.map(one => one.src || one.href)"
        )
    context.close()
    assert len(asked) > 10
    assert [one for one in asked if not one.startswith(own)] == []


@pytest.fixture
def connected(page: "Page") -> "Page":
    page.fill("#key input", KEY)
    page.press("#key input", "Enter")
    page.wait_for_selector("#question textarea")
    return page
