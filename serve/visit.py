# SPDX-License-Identifier: Apache-2.0
"""One request of one key, from its arrival to its last byte."""

import time
from dataclasses import dataclass, field
from typing import Final, Protocol

from serve.keys import Key
from serve.protocol import ApiError
from serve.quota import Refusal, Ticket

VISIT: Final = "visit"
"""Where a request's `Visit` lies in its state."""
CLIENT_CLOSED: Final = 499
"""What nginx and Serve call a request whose client went away."""
_SAID: Final = {
    "requests": "this key has sent its requests of this minute",
    "tokens": "this key has used its tokens of this minute",
    "concurrency": "this key has as many requests open as it may",
    "day": "this key has used its tokens of today, or this request could pass them",
}


class Desk(Protocol):
    """Whoever keeps the books of all keys (`serve.desk`)."""

    async def enter(self, key: Key, number: int) -> Ticket | Refusal:
        """Count a request."""

    async def book(self, key: Key, number: int, tokens: int) -> Refusal | None:
        """Book the most tokens that it can use."""

    async def leave(self, key: Key, number: int, tokens: int) -> None:
        """End it with the tokens that it used."""


@dataclass(slots=True)
class Visit:
    """What is known of a request while it goes its way. Times are seconds of one process."""

    request_id: str
    desk: Desk | None = None
    key: Key | None = None
    """None where keys are not asked for."""
    number: int | None = None
    """By which the desk knows it; None if it does not, e.g. of a key without a quota."""
    ticket: Ticket | None = None
    """What the desk said when it came in."""
    booked: int = 0
    """Tokens that it may use."""
    route: str = "none"
    """The path as it is declared, so that labels are few."""
    model: str = ""
    version: str = ""
    """Which artifact answers."""
    images: int = 0
    fetched: int = 0
    """Of the images, those that came from an address."""
    prompt_tokens: int = 0
    made: int = 0
    """Tokens of the answer so far."""
    is_heard: bool = False
    """`made` is up to date while the answer grows."""
    finish_reason: str | None = None
    status: int = 0
    is_whole: bool = False
    """The last byte was sent."""
    prepare_s: float = 0.0
    queue_s: float | None = None
    """How long it waited for a replica."""
    first_token_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)
    _heard: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since it came."""
        return time.monotonic() - self._began

    @property
    def tokens(self) -> int:
        """Tokens that it used, as far as they are known; else those that it may have used.

        None if there was no room for it.
        """
        if self.status == 503:
            return 0
        if not self.is_heard and (not self.is_whole or self.status == 504):
            return self.booked
        return self.prompt_tokens + self.made

    async def book(self, tokens: int) -> None:
        """Book the most tokens that this request can use.

        Raises:
            ApiError: 429, the key may not.
        """
        if self.desk is not None and self.key is not None and self.number is not None:
            refusal = await self.desk.book(self.key, self.number, tokens)
            if refusal is not None:
                raise too_many(refusal)
        self.booked = tokens

    def hear(self, made: int, finish_reason: str | None, *, waited_s: float | None = None) -> None:
        """Note a piece of the answer: all tokens so far, and why it ends if it does."""
        now = self.seconds
        if waited_s is not None:
            self.queue_s = waited_s
        if self.first_token_s is None:
            self.first_token_s = now
        else:
            self.gaps_s.append(now - self._heard)
        self._heard, self.made, self.finish_reason = now, made, finish_reason


def visit_of(state: object) -> Visit:
    """Return the visit of a request; one of nobody where no guard stands before the routes."""
    found = getattr(state, VISIT, None)
    return found if isinstance(found, Visit) else Visit(request_id="none")


def too_many(refusal: Refusal) -> ApiError:
    """Return the 429 of a refusal."""
    return ApiError(
        429,
        f"{_SAID[refusal.reason]}; try again in {refusal.retry_after_s} s",
        code="rate_limit_exceeded",
        retry_after_s=refusal.retry_after_s,
    )
