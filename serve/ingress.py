# SPDX-License-Identifier: Apache-2.0
"""The deployment that answers HTTP and hands jobs to the models' replicas."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Final

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve.answer import Piece
from serve.config import Auth, Limits
from serve.deployment import Canary, canary_id
from serve.desk import DeskHandle
from serve.gate import Gate
from serve.guard import Guard
from serve.protocol import ApiError
from serve.replica import Served
from serve.request import ChatModel, Job
from serve.routes import Routes
from serve.telemetry import RayTelemetry, write_lines
from serve.traffic import SharedWeights
from serve.versions import Entry
from sg4v_ray.core.errors import EngineError

_FILES: Final = ("config.json", "tokenizer.json")
"""What the ingress needs of a model; it never downloads weights."""
_RETRY_AFTER_S: Final = 1
_UNAVAILABLE: Final = "unavailable"
_log = logging.getLogger(__name__)


@contextmanager
def as_api_errors() -> Iterator[None]:
    """Turn what a handle raises into what a client may read."""
    try:
        yield
    except BackPressureError:
        raise ApiError(
            503, "the model's queue is full; try again", code="overloaded",
            retry_after_s=_RETRY_AFTER_S,
        ) from None  # fmt: skip
    except (DeploymentUnavailableError, RayActorError, EngineError) as error:
        raise ApiError(
            503, "the model stopped and is started again; try again", code=_UNAVAILABLE,
            retry_after_s=_RETRY_AFTER_S,
        ) from error  # fmt: skip
    except TimeoutError:
        raise ApiError(
            504, "the answer took longer than this server allows", code="timeout"
        ) from None


def _sent(job: Job) -> Job:
    return replace(job, sent_at=time.time())


class Handles:
    """The `Backend` that is Ray Serve."""

    def __init__(self, handles: dict[str, DeploymentHandle]) -> None:
        self._whole = {key: one.options(method_name="complete") for key, one in handles.items()}
        self._pieces = {
            key: one.options(method_name="stream", stream=True) for key, one in handles.items()
        }

    async def stream(self, model_id: str, job: Job) -> AsyncGenerator[Piece, None]:
        """Yield an answer; closing this iterator aborts it in the engine.

        An engine that dies before its first piece is noticed by nobody: another replica is asked.
        """
        for is_last in (False, True):
            pieces, has_begun = self._pieces[model_id].remote(_sent(job)), False
            try:
                with as_api_errors():
                    async for piece in pieces:
                        has_begun = True
                        yield piece
                return
            except (GeneratorExit, asyncio.CancelledError):
                pieces.cancel()  # of a request that failed by itself, this would raise its error
                raise
            except ApiError as error:
                if is_last or has_begun or error.code != _UNAVAILABLE:
                    raise
                _log.warning("%s is asked again: %s", model_id, error)

    async def complete(self, model_id: str, job: Job) -> Piece:
        """Return an answer whole; cancelling this aborts it in the engine.

        If the engine dies, another replica is asked once.
        """
        try:
            return await self._once(model_id, job)
        except ApiError as error:
            if error.code != _UNAVAILABLE:
                raise
            _log.warning("%s is asked again: %s", model_id, error)
            return await self._once(model_id, job)

    async def _once(self, model_id: str, job: Job) -> Piece:
        response = self._whole[model_id].remote(_sent(job))
        try:
            with as_api_errors():
                piece: Piece = await response
                return piece
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def ready(self) -> dict[str, bool]:
        """Say of each model whether one of its replicas runs, as Serve's controller knows."""
        app = serve.get_replica_context().app_name
        status = await asyncio.to_thread(serve.status)
        deployments = status.applications[app].deployments
        return {
            name: deployments[name].replica_states.get("RUNNING", 0) > 0 for name in self._whole
        }


def _entry(served: Served, cache: str) -> Entry:
    model = ChatModel.open(served.config, served.localise(cache, *_FILES))
    return Entry(model, served.created, served.fingerprint)


@serve.ingress()
class Ingress:
    """Ray Serve deployment: parse, decode, tokenise, route."""

    def __init__(
        self,
        models: tuple[Served, ...],
        handles: dict[str, DeploymentHandle],
        desk: DeploymentHandle,
        *,
        auth: Auth,
        limits: Limits,
        cache: str,
        canaries: dict[str, Canary],
    ) -> None:
        found = {one.config.id: _entry(one, cache) for one in models}
        seconds, books = {one: canary_id(one) for one in canaries}, DeskHandle(desk)
        self._routes = Routes(
            {one: entry for one, entry in found.items() if one not in seconds.values()},
            Handles(handles),
            limits,
            canaries={model_id: found[one] for model_id, one in seconds.items()},
            traffic=SharedWeights(books, {one: canary.weight for one, canary in canaries.items()}),
        )
        write_lines()
        self._gate = Gate()
        self._guarded = partial(
            Guard,
            ring=auth.ring(),
            desk=books,
            gate=self._gate,
            telemetry=RayTelemetry(),
            echoes_id=False,
        )

    async def drain(self) -> None:
        """Refuse new requests; return when those that were accepted have ended."""
        await self._gate.close()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        app = self._routes.app()
        app.add_middleware(self._guarded)
        return app
