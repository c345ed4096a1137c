# SPDX-License-Identifier: Apache-2.0
"""POST /v1/chat/completions: bills what was generated, whether or not the client hears of it."""

import asyncio
import json
import random
import time
from typing import Any

from aiohttp import web

from tests.teacher_server.account import Account
from tests.teacher_server.answers import completion, error, error_body, generate
from tests.teacher_server.config import UNBILLED, ServerConfig
from tests.teacher_server.faults import Faults
from tests.teacher_server.limits import Limits
from tests.teacher_server.wire import Ask, BadRequest, parse

_LOOK_AGAIN_S = 0.02


class Chat:
    """The online endpoint."""

    def __init__(self, config: ServerConfig, account: Account, faults: Faults) -> None:
        self._config, self._account, self._faults = config, account, faults
        self._limits = Limits(config)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Answer one request, or break it as configured."""
        body = await request.read()
        n = self._account.number()
        if not is_authorized(request, self._config):
            return await self._refuse(request, n, "401", None, *error("401", 0))
        try:
            ask = parse(body)
        except BadRequest as no:
            shape = error_body(str(no), "invalid_request_error", None)
            return await self._refuse(request, n, "400", None, 400, {}, shape)
        wait_s = self._limits.enter(self._tokens(ask), time.monotonic())
        if wait_s is not None:
            return await self._refuse(request, n, "429_limit", ask, *error("429", wait_s))
        self._limits.concurrent += 1
        try:
            return await self._work(request, n, ask)
        finally:
            self._limits.concurrent -= 1

    def _tokens(self, ask: Ask) -> int:
        """Count what a request takes of the tokens per minute."""
        if self._config.tokens_per_window is None:
            return 0
        if self._config.count_max_tokens and ask.max_tokens is not None:
            return ask.prompt_tokens + ask.max_tokens
        return ask.prompt_tokens + generate(ask, "ok", self._config).num_tokens

    async def _work(self, request: web.Request, n: int, ask: Ask) -> web.StreamResponse:
        config, outcome = self._config, self._faults.draw(ask)
        delay_s = config.latency_s + random.random() * config.random_latency_s
        if delay_s:
            await asyncio.sleep(delay_s)
        if outcome == "drop_before":
            self._log(request, n, outcome, ask)
            return hang_up(request)
        if outcome in UNBILLED:
            shape = error(outcome, config.retry_after_s)
            return await self._refuse(request, n, outcome, ask, *shape)
        made = generate(ask, outcome, config)
        self._log(request, n, made.outcome, ask, made.num_tokens)
        data = json.dumps(completion(ask, made, f"{n:012d}")).encode()
        if outcome == "timeout":
            return await _wait_for_the_client_to_go(request)
        if outcome == "drop_after":
            return await _send_half(request, data)
        return await self._send(request, n, 200, {}, data[:-20] if outcome == "malformed" else data)

    async def _refuse(
        self,
        request: web.Request,
        n: int,
        outcome: str,
        ask: Ask | None,
        status: int,
        headers: dict[str, str],
        shape: dict[str, Any],
    ) -> web.StreamResponse:
        self._log(request, n, outcome, ask)
        if self._config.echo_key:
            shape["error"]["message"] += f" You sent {request.headers.get('Authorization')}."
        return await self._send(request, n, status, headers, json.dumps(shape).encode())

    def _log(
        self,
        request: web.Request,
        n: int,
        outcome: str,
        ask: Ask | None,
        answered: int | None = None,
    ) -> None:
        """Write what this request came to; it is billed if anything was generated."""
        billed = ask is not None and answered is not None
        self._account.write(
            "request",
            n=n,
            client_request_id=request.headers.get("X-Client-Request-Id"),
            image=ask.image_sha if ask else None,
            prompt=ask.prompt_sha if ask else None,
            outcome=outcome,
            billed=billed,
            prompt_tokens=ask.prompt_tokens if ask and billed else 0,
            completion_tokens=answered or 0,
            usd=self._account.usd(ask.prompt_tokens, answered or 0) if ask and billed else 0.0,
        )

    async def _send(
        self, request: web.Request, n: int, status: int, headers: dict[str, str], data: bytes
    ) -> web.StreamResponse:
        """Write the response, and note when the socket has taken all of it."""
        headers = {**headers, "x-request-id": f"req_{n:012d}"}
        response = web.Response(
            body=data, status=status, headers=headers, content_type="application/json"
        )
        try:
            await response.prepare(request)
            await response.write_eof()
        except ConnectionError:
            return response
        while (line := request.transport) is not None and line.get_write_buffer_size():
            await asyncio.sleep(_LOOK_AGAIN_S)
        if line is not None and not line.is_closing():
            self._account.write("delivered", n=n)
        return response


def is_authorized(request: web.Request, config: ServerConfig) -> bool:
    """Say whether the request carries the configured key."""
    return request.headers.get("Authorization") == f"Bearer {config.key}"


def hang_up(request: web.Request) -> web.Response:
    """Close the connection; what is returned goes nowhere."""
    if request.transport is not None:
        request.transport.close()
    return web.Response()


async def _wait_for_the_client_to_go(request: web.Request) -> web.Response:
    while request.transport is not None and not request.transport.is_closing():
        await asyncio.sleep(_LOOK_AGAIN_S)
    return web.Response()


async def _send_half(request: web.Request, data: bytes) -> web.StreamResponse:
    """Promise a whole body, send half of it and hang up."""
    response = web.StreamResponse(headers={"Content-Length": str(len(data))})
    response.content_type = "application/json"
    await response.prepare(request)
    await response.write(data[: len(data) // 2])
    hang_up(request)
    return response
