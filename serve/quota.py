# SPDX-License-Identifier: Apache-2.0
"""How much each key has used, over all processes that answer HTTP. Pure: time comes as arguments.

A request enters before its body is read (requests a minute, open requests, the day), books its
tokens when they are known and before any engine works, and leaves with those that it used.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import Final, Literal

from serve.keys import Quota
from sg4v_ray.core.rate import EvenLimit

Reason = Literal["requests", "tokens", "concurrency", "day"]
_BURST_S: Final = 10.0
"""Seconds of a limit that may be spent at once after a rest: people click, and scripts start."""
DAY_S: Final = 86_400
_LOST_AFTER_S: Final = 60.0
"""Beyond the longest request: then the process that took it is gone, and its place is free."""
_LATE_S: Final = 60.0
"""No message of one process to another takes longer."""
_BUSY_S: Final = 1
"""Retry-After where a caller's own open requests are too many: it knows when they end."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request must wait, and how long."""

    reason: Reason
    retry_after_s: int


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request that may go on."""

    left_requests: int | None
    """What the key could still send at once; None without a limit."""
    left_tokens: int | None


@dataclass(slots=True)
class _Used:
    """What one key has used."""

    quota: Quota
    requests: EvenLimit | None
    tokens: EvenLimit | None
    day: int
    today: int = 0
    open: dict[int, float] = field(default_factory=dict)
    """When each open request must be over, by number."""
    booked: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Tokens of each open request and the day that they were counted in, by number."""


class Quotas:
    """The books of all keys."""

    def __init__(self, *, longest_request_s: float) -> None:
        self._longest_s = longest_request_s + _LOST_AFTER_S
        self._used: dict[str, _Used] = {}
        self._gone: dict[int, float] = {}
        """Requests that left, and until when words of theirs that were overtaken may come."""

    def enter(
        self, name: str, quota: Quota, number: int, *, now: float, today: int = 0
    ) -> Ticket | Refusal:
        """Count a request, or say why it must wait.

        Args:
            name: of the key.
            quota: of the key; a changed one holds from now on.
            number: of the request, at random: whoever never hears the answer can still end it.
            now: seconds since 1970.
            today: tokens that were used today before these books were opened.
        """
        used = self._of(name, quota, now, today)
        for lost in [one for one, end in used.open.items() if end <= now]:
            used.open.pop(lost)  # its tokens stay used: nobody knows how many it made
            used.booked.pop(lost, None)
        if quota.tokens_per_day is not None and used.today >= quota.tokens_per_day:
            return Refusal("day", math.ceil(DAY_S - now % DAY_S))
        if quota.concurrency is not None and len(used.open) >= quota.concurrency:
            return Refusal("concurrency", _BUSY_S)
        limits: tuple[tuple[Reason, EvenLimit | None], ...] = (
            ("requests", used.requests),
            ("tokens", used.tokens),
        )
        for reason, limit in limits:
            if limit is not None and (wait_s := limit.wait_s(now)) > 0:
                return Refusal(reason, math.ceil(wait_s))
        if used.requests is not None:
            used.requests.book(1, now)
        if number not in self._gone:
            used.open[number] = now + self._longest_s
        return Ticket(_left(used.requests, now, least=1), _left(used.tokens, now, least=0))

    def book(
        self, name: str, quota: Quota, number: int, tokens: int, *, now: float, today: int = 0
    ) -> Refusal | None:
        """Book the most tokens that a request can use, or say why it must wait."""
        used = self._of(name, quota, now, today)
        if number in self._gone:
            return None
        if quota.tokens_per_day is not None and used.today + tokens > quota.tokens_per_day:
            return Refusal("day", math.ceil(DAY_S - now % DAY_S))
        if used.tokens is not None:
            if (wait_s := used.tokens.wait_s(now)) > 0:
                return Refusal("tokens", math.ceil(wait_s))
            used.tokens.book(tokens, now)
        used.today += tokens
        used.booked[number] = tokens, used.day
        used.open.setdefault(number, now + self._longest_s)  # entered in books that are lost
        return None

    def leave(self, name: str, number: int, tokens: int, *, now: float) -> None:
        """End a request that used so many tokens. Words of one that left may still come after."""
        for one in [*itertools.takewhile(lambda one: self._gone[one] <= now, self._gone)]:
            self._gone.pop(one)
        self._gone[number] = now + _LATE_S
        used = self._used.get(name)
        if used is None or used.open.pop(number, None) is None:
            return
        booked, day = used.booked.pop(number, (0, used.day))
        unused = booked - tokens
        if day == used.day:
            used.today -= unused
        if used.tokens is not None:
            used.tokens.give_back(unused)

    def days(self) -> dict[str, tuple[int, int]]:
        """Return the day (since 1970) and the tokens used in it, by key."""
        return {name: (one.day, one.today) for name, one in self._used.items()}

    def _of(self, name: str, quota: Quota, now: float, today: int) -> _Used:
        used, day = self._used.get(name), day_of(now)
        if used is None:
            used = self._used[name] = _Used(quota, *_limits(quota), day=day, today=today)
        elif used.quota != quota:
            used.quota, (used.requests, used.tokens) = quota, _limits(quota)
        if used.day != day:
            used.day, used.today = day, 0
        return used


def day_of(now: float) -> int:
    """Return the day since 1970, in UTC."""
    return int(now // DAY_S)


def _limits(quota: Quota) -> tuple[EvenLimit | None, EvenLimit | None]:
    made = (
        None if per_min is None else EvenLimit(per_min, aim=1.0, credit_s=_BURST_S)
        for per_min in (quota.requests_per_min, quota.tokens_per_min)
    )
    requests, tokens = made
    return requests, tokens


def _left(limit: EvenLimit | None, now: float, *, least: int) -> int | None:
    """Return what is left now; `least` more may be spent as long as nothing is owed."""
    if limit is None:
        return None
    return 0 if limit.wait_s(now) > 0 else least + int(limit.left(now))
