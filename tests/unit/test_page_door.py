# SPDX-License-Identifier: Apache-2.0
"""What of the page's web server can be reached: little, and of files only the session's own."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from serve.page.door import COOKIE, Door


async def reached(request: Request) -> JSONResponse:
    return JSONResponse({"path": request.url.path, "body": (await request.body()).decode()})


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    (tmp_path / "uploads").mkdir()
    return tmp_path / "uploads"


@pytest.fixture
def client(uploads: Path) -> TestClient:
    return TestClient(door(uploads), follow_redirects=False)


def door(uploads: Path, *, is_for_this_machine: bool = False) -> Door:
    return Door(
        Starlette(routes=[Route("/{path:path}", reached, methods=["GET", "POST", "PUT"])]),
        knows=lambda one: one in ("friend", ""),
        uploads=uploads,
        max_upload_bytes=3_000_000,
        is_for_this_machine=is_for_this_machine,
    )


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1:8000", 200), ("evil.example", 403)])
def test_without_keys_a_strangers_name_for_this_machine_is_refused(
    uploads: Path, host: str, status: int
) -> None:
    client = TestClient(door(uploads, is_for_this_machine=True), base_url=f"http://{host}")
    assert client.get("/").status_code == status


@pytest.mark.parametrize(
    "path", ["/", "/config", "/theme.css", "/assets/a-b.js", "/static/js/x.js",
             "/gradio_api/queue/data?session_hash=a"],
)  # fmt: skip
def test_what_the_page_needs_is_open(client: TestClient, path: str) -> None:
    found = client.get(path)
    assert found.status_code == 200, path
    assert "default-src 'self'" in found.headers["content-security-policy"]
    assert found.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/docs"),
        ("GET", "/gradio_api/info"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1/"),
        ("GET", "/gradio_api/file=http://127.0.0.1/"),
        ("GET", "/gradio_api/deep_link"),
        ("GET", "/gradio_api/stream/a/b/c/playlist.m3u8"),
        ("GET", "/gradio_api/queue/join"),
        ("GET", "/monitoring"),
        ("GET", "/login"),
        ("POST", "/"),
        ("POST", "/login"),
        ("POST", "/gradio_api/run/ask"),
        ("POST", "/gradio_api/call/ask"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/vibe-code"),
        ("POST", "/gradio_api/upload/"),
        ("PUT", "/gradio_api/upload"),
        ("PUT", "/"),
    ],
)
def test_all_else_does_not_exist(client: TestClient, method: str, path: str) -> None:
    client.cookies.set(COOKIE, "friend")
    assert client.request(method, path).status_code == 404


@pytest.mark.parametrize(
    ("visitor", "status"), [("friend", 200), ("x", 401), ("", 401), (None, 401)]
)
def test_files_are_for_browsers_whose_user_showed_a_key(
    client: TestClient, uploads: Path, visitor: str | None, status: int
) -> None:
    if visitor is not None:
        client.cookies.set(COOKIE, visitor)
    assert client.post("/gradio_api/upload", content=b"x" * 3_000_000).status_code == status
    found = client.get(f"/gradio_api/file={uploads}/a/b.png")
    assert found.status_code == status
    assert found.headers["content-security-policy"] == "default-src 'none'; sandbox"


@pytest.mark.parametrize("file", ["/etc/passwd", "../a", "a.png", "http://127.0.0.1/"])
def test_only_uploads_are_shown(client: TestClient, uploads: Path, file: str) -> None:
    client.cookies.set(COOKIE, "friend")
    assert client.get(f"/gradio_api/file={file}").status_code == 404
    assert client.get(f"/gradio_api/file={uploads}/%2e%2e/a.png").status_code == 404


def test_an_upload_has_a_size_and_a_limit(client: TestClient) -> None:
    client.cookies.set(COOKIE, "friend")
    assert client.post("/gradio_api/upload", content=b"x" * 3_000_001).status_code == 413
    assert client.post("/gradio_api/upload", content=iter([b"x"])).status_code == 411


def test_a_browser_gets_its_cookie_once_and_scripts_do_not_see_it(client: TestClient) -> None:
    given = client.get("/").headers["set-cookie"]
    assert given.startswith(f"{COOKIE}=") and len(given.split(";")[0]) > 40
    assert "HttpOnly; SameSite=Strict" in given
    assert "set-cookie" not in client.get("/").headers
    assert "set-cookie" not in client.get("/config").headers


def test_below_a_path_the_cookie_is_for_it_alone(client: TestClient, uploads: Path) -> None:
    below = TestClient(client.app, root_path="/chat", follow_redirects=False)
    assert "Path=/chat;" in below.get("/chat/").headers["set-cookie"]
    assert below.get("/chat/docs").status_code == 404
    assert below.get("/chat").headers["location"] == "/chat/", "addresses in it are relative"


def event(*paths: Any) -> dict[str, Any]:
    files = [{"path": one, "meta": {"_type": "gradio.FileData"}} for one in paths]
    return {"data": [{"text": "a", "files": files}, "b", None], "session_hash": "c"}


def test_an_event_arrives_whole(client: TestClient, uploads: Path) -> None:
    sent = event(str(uploads / "x" / "a.png"))
    found = client.post("/gradio_api/queue/join", json=sent)
    assert json.loads(found.json()["body"]) == sent


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "http://127.0.0.1/", "https://elsewhere.test/a.png", "a.png", "", 5, {},
     "{uploads}/../secret", "{uploads}-2/a.png", "{uploads}/a\0.png", "file:///etc/passwd"],
)  # fmt: skip
def test_an_event_names_no_file_that_was_not_uploaded(
    client: TestClient, uploads: Path, path: Any
) -> None:
    if isinstance(path, str):
        path = path.replace("{uploads}", str(uploads))
    good = str(uploads / "a.png")
    for sent in (event(path), event(good, path), [[{"deep": event(path)}]]):
        found = client.post("/gradio_api/queue/join", json=sent)
        assert (found.status_code, found.text) == (400, "a file that was not uploaded here")


def test_a_link_that_leads_out_of_the_uploads_is_none_of_them(
    client: TestClient, uploads: Path
) -> None:
    (uploads / "link").symlink_to("/etc")
    found = client.post("/gradio_api/queue/join", json=event(str(uploads / "link" / "passwd")))
    assert found.status_code == 400


@pytest.mark.parametrize(
    ("body", "status"),
    [(b" " * (2**20 + 1), 413), (b"{", 400), (b"", 400), (b"[" * 100_000, 400), (b"\xff", 400)],
)
def test_an_event_is_small_and_json(client: TestClient, body: bytes, status: int) -> None:
    assert client.post("/gradio_api/queue/join", content=body).status_code == status


def test_no_socket_is_opened(client: TestClient) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/"):
        pass
