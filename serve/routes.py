# SPDX-License-Identifier: Apache-2.0
"""The HTTP routes, without Ray: bodies are read within limits, errors look like OpenAI's."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve import protocol
from serve.answer import Piece
from serve.captions import (
    MULTIPART,
    CaptionRequest,
    answer_of,
    chats,
    parse_form,
    parse_json,
    pick,
    read_form,
)
from serve.config import Limits
from serve.openapi import document
from serve.protocol import ApiError, ChatRequest
from serve.request import ChatModel, Job, media_urls, to_request
from serve.visit import CLIENT_CLOSED, Visit, visit_of
from sg4v_ray.core.fetch import Fetcher
from sg4v_ray.core.images import Rejected
from sg4v_ray.inference.engine import Generation
from sg4v_ray.inference.engine import Request as EngineRequest

_log = logging.getLogger(__name__)
Fetched = Mapping[str, bytes | Rejected]
"""What was found at each address of an image."""
_PROBE_S: Final = 20.0
"""Longer than a busy engine takes for a token, shorter than probes of clusters wait."""
_JSON: Final = "application/json"


class Backend(Protocol):
    """Whoever runs jobs; an ApiError that it raises goes to the client."""

    def stream(self, model_id: str, job: Job) -> AsyncGenerator[Piece, None]:
        """Yield an answer; closing the iterator aborts it."""

    async def complete(self, model_id: str, job: Job) -> Piece:
        """Return an answer whole."""

    async def ready(self) -> dict[str, bool]:
        """Say of each model whether something runs that would answer."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the list."""

    model: ChatModel
    created: int
    fingerprint: str

    def card(self) -> dict[str, Any]:
        """Return what /v1/models says of it."""
        config = self.model.config
        return protocol.model_card(
            config.id, created=self.created, max_model_len=config.engine.max_model_len
        )

    def head(self) -> dict[str, Any]:
        """Return the fields that every object of one answer shares."""
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.model.config.id,
            "system_fingerprint": self.fingerprint,
        }


class Routes:
    """The handlers; `app` puts them behind their paths."""

    def __init__(self, entries: Mapping[str, Entry], backend: Backend, limits: Limits) -> None:
        self._entries, self._backend, self._limits = entries, backend, limits
        self._fetcher: Fetcher | None = None
        self._document = document(metadata.version("sg4v-ray"))
        self._pool = ThreadPoolExecutor(limits.decode_threads, thread_name_prefix="decode")

    def app(self) -> FastAPI:
        """Return the application. It has no documentation pages: those load foreign scripts."""
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{model_id}", self.model, methods=["GET"])
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        app.add_api_route("/v1/captions", self.captions, methods=["POST"], response_model=None)
        app.add_api_route("/openapi.json", self.openapi, methods=["GET"])
        app.add_api_route("/health/live", self.live, methods=["GET"])
        app.add_api_route("/health/ready", self.ready, methods=["GET"], response_model=None)
        app.add_api_route("/health/deep", self.deep, methods=["GET"], response_model=None)
        app.add_exception_handler(ApiError, _on_api_error)
        app.add_exception_handler(HTTPException, _on_http_error)
        app.add_exception_handler(ClientDisconnect, _on_disconnect)
        app.add_exception_handler(Exception, _on_bug)
        return app

    async def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [one.card() for one in self._entries.values()]}

    async def model(self, model_id: str) -> dict[str, Any]:
        """GET /v1/models/{id}."""
        return self._entry(model_id).card()

    async def live(self) -> dict[str, Any]:
        """GET /health/live: this process answers."""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """GET /health/ready: every model has a replica that runs."""
        return _health(await self._backend.ready())

    async def deep(self) -> Response:
        """GET /health/deep: every model makes a token now."""
        found = await asyncio.gather(*(self._makes_a_token(one) for one in self._entries.values()))
        return _health(dict(zip(self._entries, found, strict=True)))

    async def _makes_a_token(self, entry: Entry) -> bool:
        ids = (entry.model.conversation.bos_token_id,)
        probe = EngineRequest(token_ids=ids, images=(), generation=Generation(max_tokens=1))
        try:
            async with asyncio.timeout(_PROBE_S):
                await self._backend.complete(entry.model.config.id, Job(probe, (), 1))
        except (ApiError, TimeoutError):
            return False
        return True

    async def openapi(self) -> dict[str, Any]:
        """GET /openapi.json."""
        return self._document

    async def chat(self, http: Request) -> Response:
        """POST /v1/chat/completions."""
        data = await read_body(http, self._limits)
        loop = asyncio.get_running_loop()
        visit, began = visit_of(http.state), time.monotonic()
        body = await loop.run_in_executor(self._pool, protocol.parse, data)
        fetched = await self._fetched([body], visit)
        entry, job = await loop.run_in_executor(self._pool, self._prepare, body, fetched)
        visit.prepare_s = time.monotonic() - began
        await _begin(visit, entry, [job])
        if body.stream:
            return await self._streamed(body, entry, job, visit)
        piece = await self._backend.complete(entry.model.config.id, job)
        visit.hear(piece.num_tokens, piece.finish_reason)
        answer = protocol.completion(
            entry.head(),
            text=piece.text,
            finish_reason=piece.finish_reason,
            used=protocol.usage(job.num_prompt_tokens, piece.num_tokens),
        )
        return JSONResponse(answer)

    async def captions(self, http: Request) -> Response:
        """POST /v1/captions."""
        limits = self._limits
        kinds = (_JSON, MULTIPART)
        data = await read_body(http, limits, kinds=kinds)
        sent, visit = http.headers["content-type"], visit_of(http.state)
        loop, began = asyncio.get_running_loop(), time.monotonic()
        if sent.lower().startswith(MULTIPART):
            if visit.key is None and "origin" in http.headers:
                raise ApiError(403, "an upload from a web page needs a key", code="no_key")
            files, fields = await read_form(data, sent, max_images=limits.max_caption_images)
            body = await loop.run_in_executor(self._pool, parse_form, files, fields)
        else:
            body = await loop.run_in_executor(self._pool, parse_json, data)
        entry, asked = self._captioner(body)
        fetched = await self._fetched(asked, visit)
        jobs = await loop.run_in_executor(self._pool, self._prepare_captions, entry, asked, fetched)
        visit.prepare_s = time.monotonic() - began
        await _begin(visit, entry, jobs)
        pieces = await _all([self._backend.complete(entry.model.config.id, job) for job in jobs])
        visit.hear(sum(one.num_tokens for one in pieces), pieces[-1].finish_reason)
        made = answer_of(entry.head(), jobs, pieces, body=body, model=entry.model)
        return JSONResponse(made)

    def _captioner(self, body: CaptionRequest) -> tuple[Entry, list[ChatRequest]]:
        most = self._limits.max_caption_images
        if len(body.images) > most:
            raise protocol.bad_request(
                f"{len(body.images)} images; this server takes at most {most} a call",
                param="images",
            )
        asked = {name: one.model.config.instruction for name, one in self._entries.items()}
        entry = self._entry(pick(body.model, asked))
        return entry, chats(body, entry.model.config.id)

    def _prepare_captions(
        self, entry: Entry, asked: Sequence[ChatRequest], fetched: Fetched
    ) -> list[Job]:
        jobs = []
        for index, chat in enumerate(asked):
            try:
                job = to_request(chat, model=entry.model, limits=self._limits, fetched=fetched)
            except ApiError as error:
                raise error.about(f"images.{index}") from None
            jobs.append(job)
        return jobs

    async def _fetched(self, bodies: Sequence[ChatRequest], visit: Visit) -> Fetched:
        """Return what lies at the addresses of images, where this server fetches any."""
        named = [url for body in bodies for url in media_urls(body, self._limits)]
        if not named:
            return {}
        visit.fetched, urls = len(named), list(dict.fromkeys(named))
        if self._fetcher is None:
            self._fetcher = Fetcher(self._limits.fetching())
        most = self._limits.image.max_bytes
        found = await asyncio.gather(*(self._fetcher.get(url, max_bytes=most) for url in urls))
        return dict(zip(urls, found, strict=True))

    def _prepare(self, body: ChatRequest, fetched: Fetched) -> tuple[Entry, Job]:
        entry = self._entry(body.model)
        return entry, to_request(body, model=entry.model, limits=self._limits, fetched=fetched)

    def _entry(self, model_id: str) -> Entry:
        if model_id not in self._entries:
            raise ApiError(
                404,
                f"no model {model_id!r} here; GET /v1/models lists what there is",
                param="model",
                code="model_not_found",
            )
        return self._entries[model_id]

    async def _streamed(self, body: ChatRequest, entry: Entry, job: Job, visit: Visit) -> Response:
        # The first piece is awaited before the headers: a full queue is still a plain 503.
        pieces = self._backend.stream(entry.model.config.id, job)
        first = await anext(pieces)
        visit.hear(first.num_tokens, first.finish_reason)
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        counted = _counted(pieces, visit)
        events = _events(first, counted, entry.head(), job, with_usage=with_usage)
        return StreamingResponse(
            events,
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )


async def read_body(http: Request, limits: Limits, *, kinds: tuple[str, ...] = (_JSON,)) -> bytes:
    """Read a body, counting the bytes that arrive and not those that were announced.

    Raises:
        ApiError: 408, it did not come in time; 413, it is too large; 415, it is declared to be of
            another kind. A web page of somebody else can send forms without asking, but no JSON,
            and no key.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in kinds:
        raise ApiError(415, f"the body must have the content type {' or '.join(kinds)}")
    max_bytes = limits.max_body_bytes
    too_large = ApiError(413, f"the body has more than {max_bytes} bytes", code="body_too_large")
    announced = http.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for data in http.stream():
                body += data
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            408, f"the body took longer than {limits.body_timeout_s:g} s", code="body_too_slow"
        ) from None
    return bytes(body)


def _health(models: Mapping[str, bool]) -> Response:
    """Return 200 if all are well, else 503, with what is said of each."""
    is_well = all(models.values())
    body = {"status": "ok" if is_well else "unavailable", "models": dict(models)}
    headers = {} if is_well else {"retry-after": "1"}
    return JSONResponse(body, 200 if is_well else 503, headers)


async def _all(asked: Sequence[Coroutine[Any, Any, Piece]]) -> list[Piece]:
    """Return all answers; the first that fails ends the others in the engine."""
    failed: list[ApiError] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in asked]
    except* ApiError as errors:
        failed += [one for one in errors.exceptions if isinstance(one, ApiError)]
    if failed:
        raise failed[0]
    return [one.result() for one in tasks]


async def _begin(visit: Visit, entry: Entry, jobs: Sequence[Job]) -> None:
    """Book what jobs can use, and note what they are: from here on the engine works.

    Raises:
        ApiError: 429, the key may not.
    """
    visit.model = entry.model.config.id
    visit.images = sum(len(one.request.images) for one in jobs)
    await visit.book(sum(one.max_tokens for one in jobs))
    visit.prompt_tokens = sum(one.num_prompt_tokens for one in jobs)


async def _counted(
    pieces: AsyncGenerator[Piece, None], visit: Visit
) -> AsyncGenerator[Piece, None]:
    """Yield the same; what was made until a client goes away is what its key has used."""
    async with aclosing(pieces) as opened:
        async for piece in opened:
            visit.hear(piece.num_tokens, piece.finish_reason)
            yield piece


async def _events(
    first: Piece,
    pieces: AsyncGenerator[Piece, None],
    head: dict[str, Any],
    job: Job,
    *,
    with_usage: bool,
) -> AsyncGenerator[str, None]:
    """Yield server-sent events; an error after the headers is an event and no [DONE] follows."""
    blank = {"usage": None} if with_usage else {}

    def events(piece: Piece) -> str:
        text = ""
        if piece.text:
            text += protocol.event({**protocol.chunk(head, {"content": piece.text}), **blank})
        if piece.finish_reason is not None:
            end = protocol.chunk(head, {}, finish_reason=piece.finish_reason)
            text += protocol.event({**end, **blank})
        return text

    async with aclosing(pieces) as opened:
        role = protocol.chunk(head, {"role": "assistant", "content": ""})
        last = first
        yield protocol.event({**role, **blank}) + events(first)
        try:
            async for last in opened:
                yield events(last)
        except ApiError as error:
            yield protocol.event(error.body())
            return
    if with_usage:
        used = protocol.usage(job.num_prompt_tokens, last.num_tokens)
        yield protocol.event({**protocol.chunk(head, {}), "choices": [], "usage": used})
    yield protocol.DONE


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers())


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = ApiError(error.status_code, str(error.detail)).body()
    return JSONResponse(body, error.status_code, error.headers)


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)


async def _on_bug(_: Request, __: Exception) -> Response:
    """Say nothing of what went wrong; the traceback is in the log of the ingress."""
    return JSONResponse(ApiError(500, "internal error; it was logged").body(), 500)
