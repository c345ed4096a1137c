# SPDX-License-Identifier: Apache-2.0
"""The page over HTTP with the true Gradio: what it names, and what it does not do."""

import re
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from serve.page.door import COOKIE
from tests.page.page_site import KEY

if TYPE_CHECKING:
    from tests.page.page_site import Site

pytestmark = pytest.mark.serving


@pytest.fixture
def client(page_site: "Site") -> httpx.Client:
    return httpx.Client(base_url=page_site.url, timeout=10)


def join(client: httpx.Client, fn: str, data: list[Any]) -> httpx.Response:
    """Send an event as the page's script does."""
    config = client.get("config").json()
    (index,) = {one["id"] for one in config["dependencies"] if str(one["api_name"]).startswith(fn)}
    body = {"data": data, "fn_index": index, "session_hash": "abc", "trigger_id": None}
    return client.post("gradio_api/queue/join", json=body)


def test_the_page_loads_from_its_own_server_alone(client: httpx.Client) -> None:
    text = client.get("").text
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"([^\"]+)\"", text)
    assert len(loaded) > 2
    assert [one for one in loaded if "//" in one.removeprefix("data:image/svg+xml,")
            and "www.w3.org" not in one] == []  # fmt: skip
    assert "googleapis" not in text and "gstatic" not in text
    style = client.get("theme.css").text
    assert "@import" not in style
    # The name of SVG's vocabulary stands in pictures that are part of the style.
    assert set(re.findall(r"https?://[^/'\" )]+", style)) == {"http://www.w3.org"}


def test_files_are_not_taken_from_strangers(client: httpx.Client, page_site: "Site") -> None:
    files = {"files": ("a.png", b"x")}
    assert client.post("gradio_api/upload", files=files).status_code == 401
    client.get("")
    assert COOKIE in client.cookies, "a cookie alone is no key"
    assert client.post("gradio_api/upload", files=files).status_code == 401


def test_an_image_has_a_most_size(client: httpx.Client) -> None:
    client.get("")
    assert join(client, "connect", [KEY]).status_code == 200
    with client.stream("GET", "gradio_api/queue/data", params={"session_hash": "abc"}) as events:
        assert any("process_completed" in line for line in events.iter_lines())
    for size, status in ((10 * 2**20, 200), (10 * 2**20 + 1, 413)):
        found = client.post("gradio_api/upload", files={"files": ("a.png", b"x" * size)})
        assert found.status_code == status


def test_gradio_offers_no_api(client: httpx.Client) -> None:
    for path in ("gradio_api/info", "docs", "openapi.json", "gradio_api/openapi.json"):
        assert client.get(path).status_code == 404
    info = re.search(r"window.gradio_api_info = (\{.*?\});</script>", client.get("").text)
    assert info is not None
    assert '"named_endpoints":{}' in info[1].replace(" ", "")


def test_a_strangers_event_fetches_nothing(client: httpx.Client) -> None:
    for path in ("http://127.0.0.1:1/a.png", "/etc/passwd"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        found = join(client, "ask", [{"text": "a", "files": [file]}, "captioner", "key"])
        assert (found.status_code, found.text) == (400, "a file that was not uploaded here")
