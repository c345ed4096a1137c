# SPDX-License-Identifier: Apache-2.0
"""A server and its chat page on two ports of this process, without Ray, for a browser."""

import asyncio
import hashlib
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.answer import Piece
from serve.config import Auth, Limits, ServeConfig
from serve.guard import Guard
from serve.keys import Key
from serve.page.config import PageConfig
from serve.page.web import web
from serve.quota import Ticket
from serve.request import Job
from tests.unit.serve_site import DEPLOYMENT, ENGINE, InProcess, make_routes, open_model

KEY = "sg4v-page-key"
LIMITS = Limits(max_body_bytes=400_000, max_caption_images=3)
ROUTE = "/chat"


class Backend(InProcess):
    """The fake captioner; told to, it says something else."""

    says: str | None = None
    is_silent = False
    _held = 0

    async def stream(self, model_id: str, job: Job) -> AsyncGenerator[Piece, None]:
        if self.says is not None:
            yield Piece(self.says, 3, "stop")
            return
        if self.is_silent:
            yield Piece("Well, ", 1)
            self._held += 1
            try:
                await asyncio.Event().wait()
            finally:
                self._held -= 1
        async for piece in super().stream(model_id, job):
            yield piece

    def running(self) -> int:
        stats = self.engine.stats()
        return stats.running + stats.waiting + self._held


class OneKey:
    """A ring and a desk for one key without a quota."""

    def find(self, presented: str) -> Key | None:
        entry = Key(name="reader", sha256=hashlib.sha256(KEY.encode()).hexdigest())
        return entry if presented == KEY else None

    async def enter(self, key: Key, *_: int) -> Ticket:
        raise AssertionError("a key without a quota needs no ticket")

    book = leave = enter


@dataclass(frozen=True)
class Site:
    """Where the page is, and what stands behind it."""

    url: str
    backend: Backend


def below(app: ASGIApp, route: str) -> ASGIApp:
    """Put an application below a path, as Ray Serve does: the path stays whole."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if not scope["path"].startswith(route):
                await PlainTextResponse("this would be the API", 404)(scope, receive, send)
                return
            scope = {**scope, "root_path": route}
        await app(scope, receive, send)

    return call


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Serve an application on a port of this machine while the block runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=asyncio.run, args=(server.serve(),), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        threading.Event().wait(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def site(folder: Path, uploads: Path, *, token_s: float = 0.04) -> Iterator[Site]:
    """Serve API and page."""
    model = open_model(folder)
    slow = replace(model.config, engine=replace(ENGINE, latency_s=token_s))
    backend = Backend(folder, replace(model, config=slow))
    one = OneKey()
    api = Guard(make_routes(backend, LIMITS).app(), ring=one, desk=one)  # type: ignore[arg-type]
    config = ServeConfig(
        models=(DEPLOYMENT,), auth=Auth(keys_env="ANY"), limits=LIMITS, page=PageConfig()
    )
    assert config.page is not None
    with serving(api) as address:
        page = web(config, config.page, api=address, uploads=uploads)
        with serving(below(page, ROUTE)) as shown:
            yield Site(f"{shown}{ROUTE}/", backend)
