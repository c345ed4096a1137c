# SPDX-License-Identifier: Apache-2.0
"""Several answers to one request (`n`): each is a job of its own, all are one stream."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from serve import protocol
from serve.answer import Piece
from serve.protocol import ApiError
from serve.request import Job
from serve.visit import Visit

Indexed = tuple[int, Piece]
"""A piece, and which answer it belongs to."""


def jobs_for(job: Job, n: int) -> list[Job]:
    """Return a job for each answer; sampled ones get seeds that follow the first."""
    how = job.request.generation
    return [
        replace(
            job,
            request=replace(
                job.request, generation=replace(how, seed=(how.seed + index) % 2**63)
            ),
        )
        for index in range(n)
    ]  # fmt: skip


async def all_of(
    asked: Sequence[Coroutine[Any, Any, Piece]], *, at_once: int | None = None
) -> list[Piece]:
    """Return all answers; the first that fails ends the others in the engine.

    Args:
        asked: who answers.
        at_once: how many are asked at the same time; None asks all. Serve counts each in the
            model's queue at first, even where a replica would take it.
    """
    failed: list[ApiError] = []
    places = asyncio.Semaphore(at_once or len(asked))

    async def in_turn(one: Coroutine[Any, Any, Piece]) -> Piece:
        try:
            async with places:
                return await one
        finally:
            one.close()  # of one that never began

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(in_turn(one)) for one in asked]
    except* ApiError as errors:
        failed += [one for one in errors.exceptions if isinstance(one, ApiError)]
    if failed:
        raise failed[0]
    return [one.result() for one in tasks]


async def merged(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Indexed, None]:
    """Yield pieces of all streams as they come. Closing this closes them all.

    Raises:
        ApiError: of the first stream that fails.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for piece in only:
                yield 0, piece
        return
    awaited = {asyncio.ensure_future(anext(one)): index for index, one in enumerate(streams)}
    try:
        while awaited:
            done, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = awaited.pop(task)
                try:
                    piece = task.result()
                except StopAsyncIteration:
                    continue
                awaited[asyncio.ensure_future(anext(streams[index]))] = index
                yield index, piece
    finally:
        for task in awaited:
            task.cancel()
        await asyncio.gather(*awaited, return_exceptions=True)
        for one in streams:
            await one.aclose()


class Listener:
    """Tells a visit what all answers together have made."""

    def __init__(self, visit: Visit) -> None:
        self._visit = visit
        visit.is_heard = True
        self._made: dict[int, int] = {}

    def hear(self, index: int, piece: Piece) -> None:
        """Note a piece."""
        self._made[index] = piece.num_tokens
        self._visit.hear(self.made, piece.finish_reason, waited_s=piece.waited_s)

    @property
    def made(self) -> int:
        """Tokens of all answers so far."""
        return sum(self._made.values())


async def events(
    pieces: AsyncGenerator[Indexed, None],
    first: Indexed,
    head: dict[str, Any],
    *,
    n: int,
    prompt: int,
    heard: Listener,
    with_usage: bool,
) -> AsyncGenerator[str, None]:
    """Yield server-sent events; an error after the headers is an event and no [DONE] follows.

    Args:
        pieces: all but the first one; what was made until a client goes away is heard too.
        first: awaited before the headers.
        head: what every chunk of the answer holds.
        n: how many answers there are.
        prompt: its tokens.
        heard: who counts the tokens.
        with_usage: a last chunk tells them.
    """
    blank = {"usage": None} if with_usage else {}

    def lines(index: int, piece: Piece) -> str:
        text = ""
        if piece.text:
            made = protocol.chunk(head, {"content": piece.text}, index=index)
            text += protocol.event({**made, **blank})
        if piece.finish_reason is not None:
            end = protocol.chunk(head, {}, index=index, finish_reason=piece.finish_reason)
            text += protocol.event({**end, **blank})
        return text

    async with aclosing(pieces) as opened:
        role = {"role": "assistant", "content": ""}
        heads = (protocol.chunk(head, role, index=index) for index in range(n))
        yield "".join(protocol.event({**one, **blank}) for one in heads) + lines(*first)
        try:
            async for index, piece in opened:
                heard.hear(index, piece)
                if text := lines(index, piece):
                    yield text
        except ApiError as error:
            yield protocol.event(error.body())
            return
    if with_usage:
        used = protocol.usage(prompt, heard.made)
        yield protocol.event({**protocol.chunk(head, {}), "choices": [], "usage": used})
    yield protocol.DONE
