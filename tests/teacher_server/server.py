# SPDX-License-Identifier: Apache-2.0
"""A local provider with faults, limits and an account of its own, as a process of its own.

    python -m tests.teacher_server.server --config FILE.json --log FILE.jsonl

prints `http://127.0.0.1:PORT/v1` when it listens.
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.teacher_server.account import Account
from tests.teacher_server.answers import ApiError, error
from tests.teacher_server.batches import Batches
from tests.teacher_server.chat import Chat, is_authorized
from tests.teacher_server.config import ServerConfig, load
from tests.teacher_server.faults import Faults
from tests.teacher_server.files import Files
from tests.teacher_server.wire import CHAT

_MAX_BODY_BYTES = 64 * 2**20


def build_app(config: ServerConfig, log: Path) -> web.Application:
    """Make the HTTP service."""
    account, faults = Account(config, log), Faults(config)
    files = Files(config.max_file_bytes)
    batches = Batches(config, files, account, faults)
    app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_only_with_key(config)])
    app.router.add_post(CHAT, Chat(config, account, faults).complete)

    async def models(_: web.Request) -> web.Response:
        listed = {"id": config.model, "object": "model", "created": 0, "owned_by": "tests"}
        return web.json_response({"object": "list", "data": [listed]})

    app.router.add_get("/v1/models", models)
    if config.has_batch_api:
        app.add_routes([*files.routes(), *batches.routes()])
    return app


def _only_with_key(config: ServerConfig) -> Any:
    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path != CHAT and not is_authorized(request, config):  # chat logs refusals
            return web.json_response(error("401", 0)[2], status=401)
        try:
            answer: web.StreamResponse = await handler(request)
        except ApiError as no:
            return web.json_response(no.body, status=no.status)
        return answer

    return check


async def _serve(config: ServerConfig, log: Path, port: int) -> None:
    runner = web.AppRunner(build_app(config, log), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=1024)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", flush=True)
    await asyncio.Event().wait()


def _end_with_parent(loop: asyncio.AbstractEventLoop) -> None:
    """Exit when whoever started this process closes its standard input, or dies."""
    loop.add_reader(sys.stdin, lambda: os.read(0, 1024) or os._exit(0))


def main() -> None:
    """Serve until killed; the log needs no goodbye."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--config", type=Path, required=True)
    flags.add_argument("--log", type=Path, required=True)
    flags.add_argument("--port", type=int, default=0)
    flags.add_argument("--with-parent", action="store_true", help="end when stdin is closed")
    args = flags.parse_args()
    loop = asyncio.new_event_loop()
    if args.with_parent:
        _end_with_parent(loop)
    loop.run_until_complete(_serve(load(args.config), args.log, args.port))


if __name__ == "__main__":
    main()
