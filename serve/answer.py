# SPDX-License-Identifier: Apache-2.0
"""From an engine's tokens to text: whole characters, stop texts cut, a deadline kept."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from serve.request import Job
from sg4v_ray.core.errors import EngineError
from sg4v_ray.inference.engine import Engine, FinishReason
from sg4v_ray.model.conversation import TextStream


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became certain; the last piece of an answer has a finish reason."""

    text: str
    num_tokens: int
    """All tokens made so far, those of cut text included."""
    finish_reason: FinishReason | None = None
    waited_s: float | None = None
    """On the first piece: how long the request waited for a replica."""


class StopText:
    """Cuts a text before the first of some strings, however the text is divided into pieces.

    First is the one that is complete first. A tail that could be the beginning of one is held
    back until the next piece decides.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.found = False
        self._stop = stop
        self._held = ""

    def push(self, text: str) -> str:
        """Take the next piece; return what may be shown."""
        text = self._held + text
        ends = [(at + len(one), at) for one in self._stop if (at := text.find(one)) >= 0]
        if ends:
            self.found = True
            self._held = ""
            return text[: min(ends)[1]]
        keep = max((_overlap(text, one) for one in self._stop), default=0)
        shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return shown

    def flush(self) -> str:
        """Return what was held back, once it is known that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest tail of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


async def answer(
    engine: Engine, job: Job, *, text: TextStream, timeout_s: float
) -> AsyncGenerator[Piece, None]:
    """Yield the answer in pieces. Closing this iterator aborts the request in the engine.

    Raises:
        TimeoutError: the last token was not made in time.
        EngineError: the engine stopped.
    """
    stop = StopText(job.stop)
    num_tokens = 0
    deadline = asyncio.get_running_loop().time() + timeout_s
    async with aclosing(engine.generate(job.request)) as deltas:
        while True:
            async with asyncio.timeout_at(deadline):
                delta = await anext(deltas, None)
            if delta is None:
                raise EngineError("the engine ended a request without a finish reason")
            num_tokens += len(delta.token_ids)
            shown = stop.push(text.push(delta.token_ids))
            if stop.found:
                yield Piece(shown, num_tokens, "stop")
                return
            if delta.finish_reason is not None:
                yield Piece(shown + stop.flush(), num_tokens, delta.finish_reason)
                return
            if shown:
                yield Piece(shown, num_tokens)
