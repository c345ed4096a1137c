# SPDX-License-Identifier: Apache-2.0
"""Routes of the Batch API: create, look, list, cancel."""

import asyncio
import json
from typing import Any

from aiohttp import web

from tests.teacher_server.account import Account
from tests.teacher_server.answers import ApiError, error
from tests.teacher_server.batch import UNDER_WAY, Batch
from tests.teacher_server.batch_life import Life
from tests.teacher_server.chat import hang_up
from tests.teacher_server.config import BatchPlan, ServerConfig
from tests.teacher_server.faults import Faults
from tests.teacher_server.files import Files, page
from tests.teacher_server.wire import CHAT


class Batches:
    """All batches of this process, by id and in order of creation."""

    def __init__(
        self, config: ServerConfig, files: Files, account: Account, faults: Faults
    ) -> None:
        self._config, self._files, self._account = config, files, account
        self._life = Life(config, files, account, faults)
        self._batches: dict[str, Batch] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def routes(self) -> list[web.RouteDef]:
        """Return what the service answers about batches."""
        return [
            web.post("/v1/batches", self._create),
            web.get("/v1/batches", self._list),
            web.get("/v1/batches/{id}", self._retrieve),
            web.post("/v1/batches/{id}/cancel", self._cancel),
        ]

    async def _create(self, request: web.Request) -> web.Response:
        fields = await _fields(request)
        data = self._files.find(fields["input_file_id"]).data
        number = len(self._batches)
        if self._plan(number).no_money:
            status, headers, body = error("429_quota", 0)
            return web.json_response(body, status=status, headers=headers)
        batch = Batch(
            id=f"batch_{number:06d}",
            number=number,
            input_file_id=fields["input_file_id"],
            plan=self._plan(number),
            metadata=fields.get("metadata"),
        )
        self._batches[batch.id] = batch
        batch.enter("validating", self._account)
        self._start(batch, data)
        return hang_up(request) if batch.plan.drop_create else web.json_response(batch.fields())

    def _plan(self, number: int) -> BatchPlan:
        plans = self._config.batch_plans
        return (plans[number] if number < len(plans) else None) or BatchPlan()

    def _start(self, batch: Batch, data: bytes) -> None:
        task = asyncio.create_task(self._life.lead(batch, data, self._enqueued))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.result())  # a mistake here shows on stderr

    def _enqueued(self) -> int:
        return sum(one.total for one in self._batches.values() if one.status in UNDER_WAY)

    async def _retrieve(self, request: web.Request) -> web.Response:
        return web.json_response(self._find(request).fields())

    async def _list(self, request: web.Request) -> web.Response:
        shown = [batch.fields() for batch in self._batches.values()]
        return web.json_response(page(shown[::-1], request))

    async def _cancel(self, request: web.Request) -> web.Response:
        batch = self._find(request)
        if batch.can_be_cancelled:
            batch.enter("cancelling", self._account)
        elif batch.status != "cancelling":
            raise ApiError(409, f"Cannot cancel a batch with status '{batch.status}'.")
        return web.json_response(batch.fields())

    def _find(self, request: web.Request) -> Batch:
        batch_id = request.match_info["id"]
        if batch_id not in self._batches:
            raise ApiError(404, f"No batch found with id '{batch_id}'.")
        return self._batches[batch_id]


async def _fields(request: web.Request) -> dict[str, Any]:
    """Read and check the body of a creation."""
    try:
        fields: dict[str, Any] = json.loads(await request.read())
        endpoint, window = fields["endpoint"], fields["completion_window"]
        metadata = fields.get("metadata") or {}
        sizes = [(len(key), len(value)) for key, value in metadata.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ApiError(400, f"not the fields of a batch: {error!r}") from error
    if endpoint != CHAT or window != "24h" or not isinstance(fields.get("input_file_id"), str):
        raise ApiError(400, f"unknown endpoint {endpoint!r} or window {window!r}, or no file")
    if len(sizes) > 16 or any(key > 64 or value > 512 for key, value in sizes):
        raise ApiError(400, "metadata has 16 pairs at most, of 64 and 512 characters")
    return fields
