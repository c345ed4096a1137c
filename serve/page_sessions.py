# SPDX-License-Identifier: Apache-2.0
"""What the page remembers of those who have it open. No key: those stay in the browsers."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from serve.page_client import Exchange


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
    conversation: list[Shown] = field(default_factory=list)
    answering: asyncio.Task[Any] | None = None
    captioning: asyncio.Task[Any] | None = None

    def stop(self) -> None:
        """End what runs; the server hears of it, because the connection is closed."""
        for task in (self.answering, self.captioning):
            if task is not None:
                task.cancel()


class Sessions:
    """All open pages, as many as fit."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._pages: OrderedDict[str, Session] = OrderedDict()

    def open(self, page: str, visitor: str) -> Session:
        """Begin with a page, or go on. The one that was used longest ago may be forgotten."""
        session = self._pages.setdefault(page, Session(visitor))
        self._pages.move_to_end(page)
        if len(self._pages) > self._most:
            self._pages.popitem(last=False)
        return session

    def find(self, page: str) -> Session | None:
        """Return what is known of a page; None if it did not connect, or was forgotten."""
        if page in self._pages:
            self._pages.move_to_end(page)
        return self._pages.get(page)

    def knows(self, visitor: str) -> bool:
        """Say whether a page of this browser has connected."""
        return any(one.visitor == visitor for one in self._pages.values())
