# SPDX-License-Identifier: Apache-2.0
"""Loads on an OpenAI-compatible endpoint: clients that wait for answers, or arrivals that do not.

Bodies are made before a load begins, so that the clients take little of the machine.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from jobs._load_samples import Answer, Sample
from sg4v_ray.model.instructions import UNIFIED

_TIMEOUT_S: Final = 600.0
_KEEP_ALIVE_S: Final = 1.0
"""Shorter than any server's: a connection that the server is about to close is not used again."""

Ask = Callable[[bytes, float], Awaitable[Sample]]
"""Sends a body that was due at a time (of `time.monotonic`), and hears the answer to its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Whom a load is sent to."""

    name: str
    url: str
    """Up to and without /v1."""
    model: str
    key: str | None = None


def body(model: str, image: Path, max_tokens: int) -> bytes:
    """Return the body of a request about a JPEG file."""
    uri = f"data:image/jpeg;base64,{base64.b64encode(image.read_bytes()).decode()}"
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": UNIFIED},
    ]
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(asked).encode()


@asynccontextmanager
async def asking(endpoint: Endpoint) -> AsyncGenerator[Ask, None]:
    """Open connections to an endpoint, as many as are needed."""
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    if endpoint.key is not None:
        headers["authorization"] = f"Bearer {endpoint.key}"
    limits = httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_S)
    async with httpx.AsyncClient(
        base_url=endpoint.url,
        headers=headers,
        limits=limits,
        timeout=_TIMEOUT_S,
        trust_env=False,  # a proxy of the environment is no part of what is measured
    ) as http:

        async def ask(data: bytes, due_s: float) -> Sample:
            try:
                return await _ask(http, data, due_s)
            except httpx.HTTPError as error:
                return Sample(error=f"{type(error).__name__}: {error}")

        yield ask


async def _ask(http: httpx.AsyncClient, data: bytes, due_s: float) -> Sample:
    answer = Answer()
    async with http.stream("POST", "/v1/chat/completions", content=data) as response:
        if response.status_code != httpx.codes.OK:
            text = (await response.aread()).decode(errors="replace")
            return Sample(error=f"{response.status_code}: {text[:500]}")
        async for piece in response.aiter_raw():
            answer.hear(piece, time.monotonic() - due_s)
    return answer.sample(time.monotonic() - due_s)


async def closed_loop(ask: Ask, bodies: Sequence[bytes], *, clients: int) -> list[Sample]:
    """Let clients send one body after another, each as soon as it has its answer."""
    samples: dict[int, Sample] = {}
    todo = iter(enumerate(bodies))  # shared: whoever is free takes the next

    async def client() -> None:
        for number, data in todo:
            samples[number] = await ask(data, time.monotonic())

    await asyncio.gather(*(client() for _ in range(clients)))
    return [samples[number] for number in range(len(bodies))]


async def open_loop(ask: Ask, bodies: Sequence[bytes], at_s: Sequence[float]) -> list[Sample]:
    """Send each body when it is due, however many are still unanswered.

    Latencies count from then: a server that makes clients wait cannot hide it.
    """
    began_s = time.monotonic()

    async def arrive(data: bytes, due_s: float) -> Sample:
        await asyncio.sleep(due_s - time.monotonic())
        return await ask(data, due_s)

    pairs = zip(bodies, at_s, strict=True)
    return await asyncio.gather(*(arrive(data, began_s + after_s) for data, after_s in pairs))
