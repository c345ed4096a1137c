# SPDX-License-Identifier: Apache-2.0
"""What the page remembers of those who have it open. No key: those stay in the browsers."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serve.page.client import Exchange


@dataclass(slots=True)
class Shown(Exchange):
    """An exchange as it stands on the page."""

    file: str = ""
    """Where the image was uploaded to."""
    note: str = ""
    """What the answer took; empty while it grows."""


@dataclass(slots=True)
class Session:
    """One open page whose user showed a key that the server knows."""

    visitor: str
    """Value of the cookie of the browser."""
    used_s: float
    conversation: list[Shown] = field(default_factory=list)
    answering: asyncio.Task[Any] | None = None
    captioning: asyncio.Task[Any] | None = None


class Sessions:
    """All open pages, as many as fit."""

    def __init__(
        self, most: int, *, keep_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._keep_s, self._clock = most, keep_s, clock
        self._pages: OrderedDict[str, Session] = OrderedDict()

    def open(self, page: str, visitor: str) -> Session:
        """Begin with a page, or go on. The one that was used longest ago may be forgotten."""
        session = self.find(page, visitor)
        if session is None:
            session = self._pages[page] = Session(visitor, self._clock())
            self._pages.move_to_end(page)
            if len(self._pages) > self._most:
                self._pages.popitem(last=False)
        return session

    def find(self, page: str, visitor: str) -> Session | None:
        """Return what is known of a page; None if it did not connect, or was forgotten."""
        self._forget()
        session = self._pages.get(page)
        if session is None or session.visitor != visitor:
            return None
        session.used_s = self._clock()
        self._pages.move_to_end(page)
        return session

    def knows(self, visitor: str) -> bool:
        """Say whether a page of this browser has connected."""
        self._forget()
        return any(one.visitor == visitor for one in self._pages.values())

    def _forget(self) -> None:
        oldest_s = self._clock() - self._keep_s
        while self._pages and next(iter(self._pages.values())).used_s < oldest_s:
            self._pages.popitem(last=False)
