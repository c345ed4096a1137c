# SPDX-License-Identifier: Apache-2.0
"""The books of all keys in one Ray Serve deployment, and the way to it from every ingress."""

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from contextvars import Context
from typing import Any, Final

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve.keys import Key, Quota
from serve.protocol import ApiError
from serve.quota import Quotas, Refusal, Ticket, day_of
from serve.traffic import Weights
from sg4v_ray.core.storage import STORAGE_ERRORS, Storage

_log = logging.getLogger(__name__)
_FILE: Final = "usage.json"
_SAVE_AFTER_S: Final = 5.0
"""What a key used meanwhile is lost with the process."""
_RETRY_AFTER_S: Final = 1
_PATIENCE_S: Final = 5.0


class QuotaDesk:
    """Ray Serve deployment of one replica. What keys used today survives it, where it may save."""

    def __init__(
        self,
        *,
        longest_request_s: float,
        state: str | None,
        canaries: Mapping[str, tuple[str, float]],
    ) -> None:
        self._quotas = Quotas(longest_request_s=longest_request_s)
        self._home = None if state is None else Storage(state)
        self._weights = Weights(canaries, self._home)
        self._before = self._load()
        self._is_saved = True
        self._saving: asyncio.Task[None] | None = None

    async def enter(self, name: str, quota: Quota, number: int) -> Ticket | Refusal:
        """See `Quotas.enter`."""
        now = time.time()
        return self._quotas.enter(name, quota, number, now=now, today=self._today(name, now))

    async def book(self, name: str, quota: Quota, number: int, tokens: int) -> Refusal | None:
        """See `Quotas.book`."""
        now = time.time()
        today = self._today(name, now)
        refusal = self._quotas.book(name, quota, number, tokens, now=now, today=today)
        self._save_soon()
        return refusal

    async def leave(self, name: str, number: int, tokens: int) -> None:
        """See `Quotas.leave`."""
        self._quotas.leave(name, number, tokens, now=time.time())
        self._save_soon()

    async def weights(self) -> dict[str, float]:
        """Return the weight of each canary, by model."""
        return self._weights.found()

    async def shift(self, model_id: str, weight: float) -> bool:
        """Set the weight of a canary; False if it cannot be kept."""
        try:
            await asyncio.to_thread(self._weights.shift, model_id, weight)
        except STORAGE_ERRORS as error:
            _log.error("the weight of %s is not changed: it cannot be kept: %s", model_id, error)
            return False
        return True

    def _today(self, name: str, now: float) -> int:
        day, tokens = self._before.get(name, (0, 0))
        return tokens if day == day_of(now) else 0

    def _load(self) -> dict[str, tuple[int, int]]:
        if self._home is None or not self._home.exists(_FILE):
            return {}
        found = json.loads(self._home.get(_FILE))
        return {name: (int(day), int(tokens)) for name, (day, tokens) in found.items()}

    def _save_soon(self) -> None:
        self._is_saved = False
        if self._home is not None and (self._saving is None or self._saving.done()):
            self._saving = asyncio.create_task(self._save(self._home))

    async def _save(self, home: Storage) -> None:
        """Save what was used until nothing was used meanwhile: many requests are one object."""
        while not self._is_saved:
            await asyncio.sleep(_SAVE_AFTER_S)
            self._is_saved = True
            data = json.dumps({**self._before, **self._quotas.days()}).encode()
            try:
                await asyncio.to_thread(home.put, _FILE, data)
            except STORAGE_ERRORS as error:  # no request is refused for it; tried again
                self._is_saved = False
                _log.error("what keys used today is not saved: %s", error)


class DeskHandle:
    """The `Desk` of the guard that is Ray Serve. Without it nobody with a quota gets in."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._leaving: set[asyncio.Task[None]] = set()

    async def enter(self, key: Key, number: int) -> Ticket | Refusal:
        """Count a request.

        Raises:
            ApiError: 503, the books cannot be reached.
        """
        found: Ticket | Refusal = await self._ask("enter", key.name, key.quota, number)
        return found

    async def book(self, key: Key, number: int, tokens: int) -> Refusal | None:
        """Book the most tokens that it can use.

        Raises:
            ApiError: 503, the books cannot be reached.
        """
        refusal: Refusal | None = await self._ask("book", key.name, key.quota, number, tokens)
        return refusal

    async def leave(self, key: Key, number: int, tokens: int) -> None:
        """End it; a place that cannot be given back is free after the longest request."""
        # In a context of its own: Serve cancels what is asked in that of a cancelled request.
        task = asyncio.create_task(self._leave(key, number, tokens), context=Context())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        await asyncio.shield(task)

    async def _leave(self, key: Key, number: int, tokens: int) -> None:
        try:
            await self._ask("leave", key.name, number, tokens)
        except ApiError as error:
            _log.warning("request %d of %s is not ended: %s", number, key.name, error)

    async def weights(self) -> dict[str, float] | None:
        """Return the weight of each canary; None if the desk cannot be reached."""
        try:
            found: dict[str, float] = await self._ask("weights")
        except ApiError as error:
            _log.warning("canaries keep the weights that they had: %s", error.__cause__)
            return None
        return found

    async def shift(self, model_id: str, weight: float) -> None:
        """Set the weight of a canary.

        Raises:
            ApiError: 503, the desk cannot be reached, or cannot keep it.
        """
        if not await self._ask("shift", model_id, weight):
            raise _unavailable("the weight cannot be kept in auth.state; the log says why")

    async def _ask(self, method: str, *args: object) -> Any:
        try:  # a call of a desk that starts anew would wait for it
            async with asyncio.timeout(_PATIENCE_S):
                return await getattr(self._handle, method).remote(*args)
        except (
            BackPressureError, DeploymentUnavailableError, RayActorError, TimeoutError,
        ) as error:  # fmt: skip
            raise _unavailable("quotas cannot be looked up now; try again") from error


def _unavailable(message: str) -> ApiError:
    return ApiError(503, message, code="unavailable", retry_after_s=_RETRY_AFTER_S)
