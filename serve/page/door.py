# SPDX-License-Identifier: Apache-2.0
"""What of Gradio's web server strangers reach: what the page needs, and nothing else.

Gradio answers on some eighty paths; it relays to other servers, records, and lets its own source
be edited. Here a path that is not listed does not exist, files are taken from and shown to
browsers alone whose user has connected with a key, and no browser loads anything from elsewhere.
"""

import json
import re
import secrets
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.guard import check_host
from serve.protocol import ApiError

COOKIE: Final = "sg4v_page"
_OPEN: Final = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/(assets|static|svelte)/[^\\]+"
    r"|/gradio_api/(queue/data|upload_progress|startup-events|theme\.css)"
)
_READS: Final = ("GET", "HEAD")
_EVENTS: Final = re.compile(r"/gradio_api/(queue/join|cancel|reset)")
_UPLOAD: Final = "/gradio_api/upload"
_FILES: Final = "/gradio_api/file="
_MAX_EVENT_BYTES: Final = 2**20
"""Of what a click sends. Files come as uploads, and are limited there."""
_PAGE_POLICY: Final = (
    # Gradio starts by scripts inside the page and makes functions of texts.
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "object-src 'none'; manifest-src 'none'; base-uri 'self'; form-action 'none'; "
    "frame-ancestors 'self'"
)
_FILE_POLICY: Final = "default-src 'none'; sandbox"


class Door:
    """ASGI middleware before Gradio."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        knows: Callable[[str], bool],
        uploads: Path,
        max_upload_bytes: int,
        is_for_this_machine: bool,
    ) -> None:
        """Let little in.

        Args:
            app: Gradio's.
            knows: says whether the browser with this cookie may use files.
            uploads: the folder where Gradio puts files.
            max_upload_bytes: of all files of one upload; Gradio looks at the size of each.
            is_for_this_machine: nobody is asked for a key, so other names than this machine's own
                are refused, as the API does.
        """
        self._app, self._knows, self._uploads = app, knows, uploads.resolve()
        self._max_upload_bytes = max_upload_bytes
        self._is_for_this_machine = is_for_this_machine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        place = scope.get("root_path", "")
        path = scope["path"].removeprefix(place)
        if not path:  # addresses inside the page are relative to its folder
            await RedirectResponse(f"{place}/")(scope, receive, send)
            return
        visitor = _cookie(scope)
        refusal = self._refusal(scope, path, visitor)
        if refusal is None and scope["method"] == "POST" and _EVENTS.fullmatch(path):
            body = await _body(receive)
            refusal = self._refused_event(body)
            receive = _again(body or b"", receive)
        is_new = path == "/" and visitor is None
        sending = _with_headers(
            send, policy=_FILE_POLICY if path.startswith(_FILES) else _PAGE_POLICY,
            cookie=_new_cookie(scope) if is_new else None,
        )  # fmt: skip
        if refusal is None:
            await self._app(scope, receive, sending)
        else:
            await refusal(scope, receive, sending)

    def _refusal(self, scope: Scope, path: str, visitor: str | None) -> PlainTextResponse | None:
        if self._is_for_this_machine:
            try:
                check_host(Headers(scope=scope).get("host"))
            except ApiError as error:
                return PlainTextResponse(error.message, error.status)
        method = scope["method"]
        is_upload = method == "POST" and path == _UPLOAD
        if is_upload or (method in _READS and path.startswith(_FILES)):
            if not visitor or not self._knows(visitor):
                return PlainTextResponse("connect with a key first", 401)
            if is_upload:
                return self._refused_upload(Headers(scope=scope).get("content-length", ""))
            is_there = self._is_upload(path.removeprefix(_FILES))
        else:
            allowed = _EVENTS if method == "POST" else _OPEN if method in _READS else None
            is_there = allowed is not None and allowed.fullmatch(path) is not None
        return None if is_there else PlainTextResponse("not found", 404)

    def _refused_upload(self, size: str) -> PlainTextResponse | None:
        if not size.isdecimal():  # what is announced here, the web server holds them to
            return PlainTextResponse("an upload says how large it is", 411)
        if int(size) > self._max_upload_bytes:
            return PlainTextResponse(f"more than {self._max_upload_bytes} bytes", 413)
        return None

    def _refused_event(self, body: bytes | None) -> PlainTextResponse | None:
        """Refuse events that are too large, or that name files which were not uploaded here.

        Gradio would fetch an address that stands in the place of a file.
        """
        if body is None:
            return PlainTextResponse(f"more than {_MAX_EVENT_BYTES} bytes", 413)
        try:
            event = json.loads(body)
        except (ValueError, RecursionError):
            return PlainTextResponse("this is not JSON", 400)
        if all(self._is_upload(one) for one in _paths(event)):
            return None
        return PlainTextResponse("a file that was not uploaded here", 400)

    def _is_upload(self, path: Any) -> bool:
        if not isinstance(path, str) or "\0" in path:
            return False
        return Path(path).is_absolute() and Path(path).resolve().is_relative_to(self._uploads)


def _paths(event: Any) -> list[Any]:
    """Return all values of `path` in an event, however deep."""
    found, left = [], [event]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            found += [one["path"]] if one.get("path") is not None else []
            left += one.values()
        elif isinstance(one, list):
            left += one
    return found


async def _body(receive: Receive) -> bytes | None:
    """Read a body; None if it is too large."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > _MAX_EVENT_BYTES:
            return None
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that was read once more, then what comes after it."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receiving() -> Message:
        return first.pop() if first else await receive()

    return receiving


def _cookie(scope: Scope) -> str | None:
    try:
        cookies = SimpleCookie(Headers(scope=scope).get("cookie", ""))
    except CookieError:
        return None
    return cookies[COOKIE].value if COOKIE in cookies else None


def _new_cookie(scope: Scope) -> str:
    place = scope.get("root_path", "") or "/"
    secure = "; Secure" if scope.get("scheme") == "https" else ""
    value = secrets.token_urlsafe(32)
    return f"{COOKIE}={value}; Path={place}; HttpOnly; SameSite=Strict{secure}"


def _with_headers(send: Send, *, policy: str, cookie: str | None) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["content-security-policy"] = policy
            headers["x-content-type-options"] = "nosniff"
            headers["referrer-policy"] = "no-referrer"
            if cookie is not None:
                headers.append("set-cookie", cookie)
        await send(message)

    return sending
