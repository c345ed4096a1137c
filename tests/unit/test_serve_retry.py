# SPDX-License-Identifier: Apache-2.0
"""An engine's death before the first token is nobody's business; after it, it is told."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from serve.answer import Piece
from serve.ingress import Handles
from serve.protocol import ApiError
from serve.request import Job
from sg4v_ray.inference.engine import Generation, Request

JOB = Job(Request(token_ids=(1,), images=(), generation=Generation(max_tokens=1)), (), 1)
FULL = BackPressureError(num_queued_requests=1, max_queued_requests=1)


class Handle:
    """A handle of Serve whose calls go as they are told: so many pieces, then an error or none."""

    def __init__(self, *calls: tuple[int, Exception | None]) -> None:
        self.calls, self.asked = list(calls), 0

    def options(self, *, method_name: str, stream: bool = False) -> "Handle":
        return self

    def remote(self, job: Any) -> Any:
        self.asked += 1
        return Answer(*self.calls.pop(0))


class Answer:
    def __init__(self, pieces: int, error: Exception | None) -> None:
        self.pieces, self.error = pieces, error

    def cancel(self) -> None:
        raise AssertionError("nothing is cancelled here")

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        if self.error is not None:
            raise self.error
        return Piece("whole", self.pieces, "stop")

    async def __aiter__(self) -> AsyncGenerator[Piece, None]:
        for number in range(self.pieces):
            yield Piece("a", number + 1)
        if self.error is not None:
            raise self.error


def stream(handle: Any) -> list[Piece]:
    async def run() -> list[Piece]:
        async with aclosing(Handles({"chat": handle}).stream("chat", JOB)) as pieces:
            return [one async for one in pieces]

    return asyncio.run(run())


def whole(handle: Any) -> Piece:
    return asyncio.run(Handles({"chat": handle}).complete("chat", JOB))


def test_a_death_before_the_first_token_is_tried_again_once() -> None:
    handle = Handle((0, ActorDiedError()), (3, None))
    assert len(stream(handle)) == 3
    assert whole(Handle((0, ActorDiedError()), (3, None))).num_tokens == 3


def test_two_deaths_are_told() -> None:
    for ask in (stream, whole):
        handle = Handle((0, ActorDiedError()), (0, ActorDiedError()), (3, None))
        with pytest.raises(ApiError, match="is started again"):
            ask(handle)
        assert handle.asked == 2


def test_a_death_after_the_first_token_is_told_and_no_token_comes_twice() -> None:
    handle = Handle((2, ActorDiedError()), (3, None))
    with pytest.raises(ApiError, match="is started again"):
        stream(handle)
    assert handle.asked == 1


def test_a_full_queue_is_told_at_once() -> None:
    for ask in (stream, whole):
        handle = Handle((0, FULL), (3, None))
        with pytest.raises(ApiError, match="queue is full"):
            ask(handle)
        assert handle.asked == 1
