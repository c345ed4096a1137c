# SPDX-License-Identifier: Apache-2.0
"""The HTTP routes, without Ray: bodies are read within limits, errors look like OpenAI's."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any, Final, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve import protocol
from serve.admin import Admin
from serve.answer import Piece
from serve.body import JSON, read_body
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
from serve.choices import Listener, all_of, events, jobs_for, merged
from serve.config import Limits
from serve.openapi import document
from serve.protocol import ApiError, ChatRequest
from serve.request import Job, media_urls, to_request
from serve.versions import Entry, Fixed, Traffic, Versions
from serve.visit import CLIENT_CLOSED, Visit, visit_of
from sg4v_ray.core.fetch import ByteBudget, Fetcher
from sg4v_ray.core.images import Rejected
from sg4v_ray.inference.engine import Generation
from sg4v_ray.inference.engine import Request as EngineRequest

Fetched = Mapping[str, bytes | Rejected]
"""What was found at each address of an image."""
_PROBE_S: Final = 20.0
"""Longer than a busy engine takes for a token, shorter than probes of clusters wait."""


class Backend(Protocol):
    """Whoever runs jobs; an ApiError that it raises goes to the client."""

    def stream(self, model_id: str, job: Job) -> AsyncGenerator[Piece, None]:
        """Yield an answer; closing the iterator aborts it."""

    async def complete(self, model_id: str, job: Job) -> Piece:
        """Return an answer whole."""

    async def ready(self) -> dict[str, bool]:
        """Say of each model whether something runs that would answer."""


class Routes:
    """The handlers; `app` puts them behind their paths."""

    def __init__(
        self,
        entries: Mapping[str, Entry],
        backend: Backend,
        limits: Limits,
        *,
        canaries: Mapping[str, Entry] | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        """Serve models from a backend.

        Args:
            entries: the models, by the ids that clients write.
            backend: who runs jobs.
            limits: of one request.
            canaries: other versions of some of them, by the same ids.
            traffic: who keeps the weights of the canaries; None keeps them here.
        """
        self._versions = Versions(entries, canaries or {}, traffic or Fixed())
        self._needed = frozenset(one.deployment for one in entries.values())
        self._backend, self._limits = backend, limits
        self._fetcher: Fetcher | None = None
        self._document = document(metadata.version("sg4v-ray"))
        self._pool = ThreadPoolExecutor(limits.decode_threads, thread_name_prefix="decode")

    def app(self) -> FastAPI:
        """Return the application. It has no documentation pages: those load foreign scripts."""
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{model_id}", self.model, methods=["GET"])
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        app.add_api_route("/v1/captions", self.captions, methods=["POST"], response_model=None)
        app.add_api_route("/openapi.json", self.openapi, methods=["GET"])
        app.add_api_route("/health/live", self.live, methods=["GET"])
        app.add_api_route("/health/ready", self.ready, methods=["GET"], response_model=None)
        app.add_api_route("/health/deep", self.deep, methods=["GET"], response_model=None)
        Admin(self._versions, self._limits).add_to(app)
        app.add_exception_handler(ApiError, _on_api_error)
        app.add_exception_handler(HTTPException, _on_http_error)
        app.add_exception_handler(ClientDisconnect, _on_disconnect)
        app.add_exception_handler(Exception, _on_bug)
        return app

    async def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": self._versions.cards()}

    async def model(self, model_id: str) -> dict[str, Any]:
        """GET /v1/models/{id}."""
        return self._versions.named(model_id).card(model_id)

    async def live(self) -> dict[str, Any]:
        """GET /health/live: this process answers."""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """GET /health/ready: every model has a replica that runs."""
        return _health(await self._backend.ready(), self._needed)

    async def deep(self) -> Response:
        """GET /health/deep: every model makes a token now."""
        every = self._versions.every()
        found = await asyncio.gather(*(self._makes_a_token(one) for one in every))
        found_well = {one.deployment: is_well for one, is_well in zip(every, found, strict=True)}
        return _health(found_well, self._needed)

    async def _makes_a_token(self, entry: Entry) -> bool:
        ids = (entry.model.conversation.bos_token_id,)
        probe = EngineRequest(token_ids=ids, images=(), generation=Generation(max_tokens=1))
        try:
            async with asyncio.timeout(_PROBE_S):
                await self._backend.complete(entry.deployment, Job(probe, (), 1))
        except (ApiError, TimeoutError):
            return False
        return True

    async def openapi(self) -> dict[str, Any]:
        """GET /openapi.json."""
        return self._document

    async def chat(self, http: Request) -> Response:
        """POST /v1/chat/completions."""
        visit = visit_of(http.state)
        body, entry, job = await self._asked(http, visit)
        n = body.n or 1
        await _begin(visit, body.model, entry, [job], n=n)
        if body.stream:
            return await self._streamed(body, entry, job, visit)
        jobs = jobs_for(job, n)
        pieces = await all_of([self._backend.complete(entry.deployment, one) for one in jobs])
        made = sum(one.num_tokens for one in pieces)
        visit.hear(made, pieces[-1].finish_reason, waited_s=pieces[0].waited_s)
        answer = protocol.completion(
            entry.head(body.model),
            [(one.text, one.finish_reason) for one in pieces],
            used=protocol.usage(job.num_prompt_tokens, made),
        )
        return JSONResponse(answer)

    async def _asked(self, http: Request, visit: Visit) -> tuple[ChatRequest, Entry, Job]:
        """Return a request without its messages, who answers it, and what the engine needs.

        What was sent takes up to a hundred times the memory of that, so it ends here.
        """
        data = await read_body(http, self._limits)
        loop, began = asyncio.get_running_loop(), time.monotonic()
        body = await loop.run_in_executor(self._pool, protocol.parse, data)
        entry = await self._versions.draw(body.model)
        most = entry.model.config.max_queued
        if body.n is not None and body.n > most:  # they would not all find a place, ever
            raise protocol.bad_request(f"n: this model takes at most {most}", param="n")
        fetched = await self._fetched([body], visit)
        job = await loop.run_in_executor(self._pool, self._prepare, entry, body, fetched)
        visit.prepare_s = time.monotonic() - began
        return body.model_copy(update={"messages": []}), entry, job

    async def captions(self, http: Request) -> Response:
        """POST /v1/captions."""
        visit = visit_of(http.state)
        body, model_id, entry, jobs = await self._asked_captions(http, visit)
        await _begin(visit, model_id, entry, jobs)
        pieces = await all_of(
            [self._backend.complete(entry.deployment, job) for job in jobs],
            at_once=entry.model.config.max_queued,
        )
        made, first, last = sum(one.num_tokens for one in pieces), pieces[0], pieces[-1]
        visit.hear(made, last.finish_reason, waited_s=first.waited_s)
        answer = answer_of(entry.head(model_id), jobs, pieces, body=body, model=entry.model)
        return JSONResponse(answer)

    async def _asked_captions(
        self, http: Request, visit: Visit
    ) -> tuple[CaptionRequest, str, Entry, list[Job]]:
        """Return a request without its images, who answers it, and what the engine needs."""
        limits = self._limits
        data = await read_body(http, limits, kinds=(JSON, MULTIPART))
        sent = http.headers["content-type"]
        loop, began = asyncio.get_running_loop(), time.monotonic()
        if sent.lower().startswith(MULTIPART):
            if visit.key is None and "origin" in http.headers:
                raise ApiError(403, "an upload from a web page needs a key", code="no_key")
            files, fields = await read_form(data, sent, max_images=limits.max_caption_images)
            body = await loop.run_in_executor(self._pool, parse_form, files, fields)
        else:
            body = await loop.run_in_executor(self._pool, parse_json, data)
        model_id, asked = self._captioner(body)
        entry = await self._versions.draw(model_id)
        fetched = await self._fetched(asked, visit)
        jobs = await loop.run_in_executor(self._pool, self._prepare_captions, entry, asked, fetched)
        visit.prepare_s = time.monotonic() - began
        return body.model_copy(update={"images": []}), model_id, entry, jobs

    def _captioner(self, body: CaptionRequest) -> tuple[str, list[ChatRequest]]:
        most = self._limits.max_caption_images
        if len(body.images) > most:
            raise protocol.bad_request(
                f"{len(body.images)} images; this server takes at most {most} a call",
                param="images",
            )
        stable = self._versions.stable
        asked = {name: one.model.config.instruction for name, one in stable.items()}
        model_id = pick(body.model, asked)
        return model_id, chats(body, model_id)

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
        get, most = self._fetcher.get, self._limits.image.max_bytes
        # What lies at addresses takes no more memory than what is sent.
        budget = ByteBudget(left=self._limits.max_body_bytes)
        found = await asyncio.gather(*(get(url, max_bytes=most, budget=budget) for url in urls))
        return dict(zip(urls, found, strict=True))

    def _prepare(self, entry: Entry, body: ChatRequest, fetched: Fetched) -> Job:
        return to_request(body, model=entry.model, limits=self._limits, fetched=fetched)

    async def _streamed(self, body: ChatRequest, entry: Entry, job: Job, visit: Visit) -> Response:
        # The first piece is awaited before the headers: a full queue is still a plain 503.
        jobs, heard = jobs_for(job, body.n or 1), Listener(visit)
        pieces = merged([self._backend.stream(entry.deployment, one) for one in jobs])
        first = await anext(pieces)
        heard.hear(*first)
        lines = events(
            pieces,
            first,
            entry.head(body.model),
            n=len(jobs),
            prompt=job.num_prompt_tokens,
            heard=heard,
            with_usage=bool(body.stream_options and body.stream_options.include_usage),
        )
        return StreamingResponse(
            lines,
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )


def _health(models: Mapping[str, bool], needed: frozenset[str]) -> Response:
    """Return 200 if all that are needed are well, else 503, with what is said of each.

    Canaries are not: no other server is better than this one because one of them is ill.
    """
    is_well = all(is_well for name, is_well in models.items() if name in needed)
    body = {"status": "ok" if is_well else "unavailable", "models": dict(models)}
    headers = {} if is_well else {"retry-after": "1"}
    return JSONResponse(body, 200 if is_well else 503, headers)


async def _begin(
    visit: Visit, model_id: str, entry: Entry, jobs: Sequence[Job], *, n: int = 1
) -> None:
    """Book what `n` answers to each job can use: from here on the engine works.

    Raises:
        ApiError: 429, the key may not.
    """
    visit.model, visit.version = model_id, entry.version
    visit.images = sum(len(one.request.images) for one in jobs)
    prompt = sum(one.num_prompt_tokens for one in jobs)
    await visit.book(prompt + n * sum(one.request.generation.max_tokens for one in jobs))
    visit.prompt_tokens = prompt


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
