# SPDX-License-Identifier: Apache-2.0
"""Who gets in: the outermost layer of the application, before any body is read.

Everything needs a key, paths that do not exist too: there is no list of open ones to get wrong.
It looks at `scope["path"]` as the server received it and at nothing that a Host header can change.
(Serve's own proxy answers `/-/healthz` and `/-/routes` itself, before us and without a key.)
"""

import re
import secrets
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.config import LOOPBACK
from serve.gate import Gate
from serve.keys import Key, KeyRing
from serve.keys import Scope as KeyScope
from serve.protocol import ApiError, bad_request
from serve.quota import Refusal
from serve.telemetry import LogOnly, Telemetry
from serve.visit import VISIT, Desk, Visit, too_many

_REQUEST_ID: Final = "x-request-id"
_UNCLEAN: Final = re.compile(r"[^A-Za-z0-9._:-]")
_LONGEST_ID: Final = 128
_LONGEST_KEY: Final = 512
_SCOPES: Final[Mapping[str, KeyScope]] = {"/health": "metrics", "/admin": "admin"}
"""What a path needs that is not for inference, with all below it."""
_ALIVE: Final = "/health/live"
_SERVES_OWN: Final = ("x-request-timeout-seconds", "x-request-disconnect-disabled")
"""Headers by which Serve lets whoever sends them lift its deadline, or have the engine work on
for nobody."""


class Guard:
    """ASGI middleware: key, scope, quota; then the application with a `Visit` in its state."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        ring: KeyRing | None,
        desk: Desk,
        gate: Gate | None = None,
        telemetry: Telemetry | None = None,
        echoes_id: bool = True,
    ) -> None:
        """Let nobody in without a key of the ring; without a ring, everybody.

        Args:
            app: what is guarded.
            ring: all keys.
            desk: who keeps the books of their quotas.
            gate: what all but the probe of liveness goes through; None is one that stays open.
            telemetry: who hears of each request; None writes lines in the log alone.
            echoes_id: answer with the id of the request; Serve's proxy does so itself.
        """
        self._app, self._ring, self._desk, self._echoes_id = app, ring, desk, echoes_id
        self._gate, self._telemetry = gate or Gate(), telemetry or LogOnly()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no socket is opened here
            await send({"type": "websocket.close", "code": 1008})
            return
        visit = Visit(_request_id(Headers(scope=scope)), self._desk)
        sending = _with_headers(send, visit, echoes_id=self._echoes_id)
        self._telemetry.began()
        try:
            await self._serve(visit, scope, receive, sending)
        finally:  # also of a client that went away before the first byte
            self._telemetry.ended(visit)
            if visit.key is not None and visit.number is not None:
                await self._desk.leave(visit.key, visit.number, visit.tokens)

    async def _serve(self, visit: Visit, scope: Scope, receive: Receive, sending: Send) -> None:
        with ExitStack() as passing:
            try:
                visit.key = self._key(scope)
                _check_headers(Headers(scope=scope))
                if scope["path"] != _ALIVE:
                    passing.enter_context(self._gate.passing())
                if visit.key is not None and visit.key.quota.has_limits:
                    await self._enter(visit, visit.key)
            except ApiError as error:
                await _answer(error)(scope, receive, sending)
                return
            await self._pass(visit, scope, receive, sending)

    async def _pass(self, visit: Visit, scope: Scope, receive: Receive, sending: Send) -> None:
        scope.setdefault("state", {})[VISIT] = visit
        try:
            await self._app(scope, receive, sending)
        except Exception:  # answered further out, where every bug is
            visit.status, visit.is_whole = 500, True
            raise
        finally:
            # Set by the router: the path as it is declared.
            visit.route = getattr(scope.get("route"), "path", visit.route)

    def _key(self, scope: Scope) -> Key | None:
        if self._ring is None:
            check_host(Headers(scope=scope).get("host"))
            return None
        kind, _, presented = Headers(scope=scope).get("authorization", "").partition(" ")
        presented = presented.strip()
        is_sent = kind.lower() == "bearer" and 0 < len(presented) <= _LONGEST_KEY
        key = self._ring.find(presented) if is_sent else None
        if key is None:
            raise ApiError(
                401,
                "no valid API key; send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )
        needed = scope_of(scope["path"])
        if needed not in key.scopes:
            raise ApiError(
                403, f"this key has no scope {needed!r}; ask for one that has", code="no_scope"
            )
        return key

    async def _enter(self, visit: Visit, key: Key) -> None:
        # Known before it is counted: if its caller leaves meanwhile, it is ended all the same.
        visit.number = secrets.randbits(63)
        found = await self._desk.enter(key, visit.number)
        if isinstance(found, Refusal):
            visit.number = None
            raise too_many(found)
        visit.ticket = found


def _check_headers(headers: Headers) -> None:
    for name in _SERVES_OWN:
        if name in headers:
            raise bad_request(f"{name}: this server does not take this header", param=name)


def check_host(host: str | None) -> None:
    """Refuse what a web page of a stranger sends whose name was made to mean this machine.

    Browsers always send the name.

    Raises:
        ApiError: 403, it is not one of this machine's own names.
    """
    if host is not None and re.sub(r":\d*$", "", host.lower()).strip("[]") not in LOOPBACK:
        raise ApiError(
            403,
            "without keys this server answers its own machine alone, as 127.0.0.1 or localhost; "
            "set auth.keys_file for others",
            code="no_key",
        )


def scope_of(path: str) -> KeyScope:
    """Return the scope that a path needs."""
    for start, scope in _SCOPES.items():
        if path == start or path.startswith(f"{start}/"):
            return scope
    return "inference"


def _request_id(headers: Headers) -> str:
    """Return the caller's id of a request, as it can stand in a log, or a new one."""
    sent = _UNCLEAN.sub("_", headers.get(_REQUEST_ID, ""))[:_LONGEST_ID]
    return sent or f"req-{uuid.uuid4().hex}"


def _with_headers(send: Send, visit: Visit, *, echoes_id: bool) -> Send:
    """Return a `send` that adds the request's id and what is left of the quota."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            visit.status = message["status"]
            headers = MutableHeaders(scope=message)
            if echoes_id:
                headers[_REQUEST_ID] = visit.request_id
            for name, value in _left(visit).items():
                headers[name] = value
        await send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            visit.is_whole = True

    return sending


def _left(visit: Visit) -> dict[str, str]:
    if visit.key is None or visit.ticket is None:
        return {}
    quota, ticket = visit.key.quota, visit.ticket
    pairs: dict[str, Any] = {}
    if quota.requests_per_min is not None:
        pairs["x-ratelimit-limit-requests"] = f"{quota.requests_per_min:g}"
        pairs["x-ratelimit-remaining-requests"] = str(ticket.left_requests)
    if quota.tokens_per_min is not None:
        pairs["x-ratelimit-limit-tokens"] = f"{quota.tokens_per_min:g}"
        pairs["x-ratelimit-remaining-tokens"] = str(ticket.left_tokens)
    return pairs


def _answer(error: ApiError) -> JSONResponse:
    headers = error.headers()
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)
