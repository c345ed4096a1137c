# SPDX-License-Identifier: Apache-2.0
"""One engine behind a Ray Serve handle. Thin: what is worth testing is in `answer`."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from serve.answer import Piece, answer
from serve.deployment import ModelDeployment
from serve.request import Job
from sg4v_ray.core.errors import EngineError
from sg4v_ray.core.storage import Storage
from sg4v_ray.inference.engine import EngineStats, Generation, Request, complete
from sg4v_ray.inference.open import open_engine
from sg4v_ray.model.conversation import Conversation

_log = logging.getLogger(__name__)
_PROBE_S: Final = 20.0
"""A broken engine must be told from a slow one before Serve's own patience (30 s) ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A model whose artifact was found: what a replica and the ingress need to open it."""

    config: ModelDeployment
    digests: dict[str, str]
    fingerprint: str
    created: int
    """When the artifact was committed, in seconds since 1970."""

    def localise(self, cache: str, *names: str) -> Path:
        """Bring the model's files, or only the named ones, to this node."""
        digests = {name: self.digests[name] for name in names} if names else self.digests
        storage = Storage(self.config.root)
        folder = f"{self.config.artifact.path}/model"
        return storage.localise(folder, cache=Path(cache).expanduser(), digests=digests)


class Replica:
    """Ray Serve deployment: one engine, many requests at once."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, model: Served, *, cache: str, timeout_s: float
    ) -> None:
        started = time.monotonic()
        config, self._timeout_s = model.config, timeout_s
        folder = await asyncio.to_thread(model.localise, cache)
        self._conversation = Conversation.open(folder, config.template)
        self._engine = open_engine(config.engine, folder, threads=config.threads)
        self._suspected_at: int | None = None
        await self._engine.start()
        seconds = time.monotonic() - started
        _log.info("%s (%s) is ready after %.1f s", config.id, config.artifact, seconds)

    async def stream(self, job: Job) -> AsyncGenerator[Piece, None]:
        """Yield an answer in pieces."""
        waited_s: float | None = max(0.0, time.time() - job.sent_at)
        text = self._conversation.stream()
        pieces = answer(self._engine, job, text=text, timeout_s=self._timeout_s)
        try:
            async with aclosing(pieces) as opened:
                async for piece in opened:
                    yield piece if waited_s is None else replace(piece, waited_s=waited_s)
                    waited_s = None
        except (EngineError, TimeoutError):
            self._suspected_at = self._engine.stats().decode_steps
            raise

    async def complete(self, job: Job) -> Piece:
        """Return an answer whole: one message between processes instead of hundreds."""
        found = []
        async with aclosing(self.stream(job)) as pieces:
            async for piece in pieces:
                found.append(piece)
        text = "".join(one.text for one in found)
        return replace(found[-1], text=text, waited_s=found[0].waited_s)

    def stats(self) -> EngineStats:
        """Return what the engine does now."""
        return self._engine.stats()

    async def check_health(self) -> None:
        """Called by Serve. After an engine error or a time-out, see that the engine still works.

        One that has made tokens since does, and may be too busy to make one for us now. Any other
        is asked for one: a dead or stuck engine does not answer, and Serve replaces the replica.
        """
        if self._suspected_at is None:
            return
        if self._engine.stats().decode_steps > self._suspected_at:
            self._suspected_at = None
            return
        probe = Request(
            token_ids=(self._conversation.bos_token_id,),
            images=(),
            generation=Generation(max_tokens=1),
        )
        async with asyncio.timeout(_PROBE_S):
            await complete(self._engine, probe)
        self._suspected_at = None

    async def __del__(self) -> None:
        """Called by Serve when the last request has ended."""
        if hasattr(self, "_engine"):
            await self._engine.close()
