# SPDX-License-Identifier: Apache-2.0
"""Which rows were inside an engine when it died, so that a poisonous one cannot kill for ever.

Ray restarts a dead actor and sends it the same rows again, without end. So the rows that go into
an engine are noted outside of it. When it died, each noted row gets a strike and is run alone
from then on; a row with two strikes has killed an engine twice, the second time alone.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

MAX_STRIKES = 2


class Strikes:
    """The notes. They live in the tally's actor, which no engine can take down with it."""

    def __init__(self) -> None:
        self._inside: dict[str, set[str]] = defaultdict(set)
        self._strikes: Counter[str] = Counter()

    def enter(self, engine: str, ids: Iterable[str]) -> dict[str, int]:
        """Note the rows without strikes as inside; return the others with their strikes."""
        suspects = {one: self._strikes[one] for one in ids if one in self._strikes}
        self._inside[engine].update(one for one in ids if one not in suspects)
        return suspects

    def enter_alone(self, engine: str, key: str) -> None:
        """Note a row with a strike, which nothing else shares the engine with."""
        self._inside[engine].add(key)

    def leave(self, engine: str, ids: Iterable[str]) -> None:
        """Rows came out alive; what they were suspected of is forgotten."""
        self._inside[engine].difference_update(ids)
        for one in ids:
            self._strikes.pop(one, None)

    def died(self, engine: str) -> None:
        """Give a strike to every row that was inside; called by the engine's next life."""
        self._strikes.update(self._inside.pop(engine, ()))


class Gate:
    """Many rows may be inside at once, or one alone. For one event loop."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._inside = 0
        self._wants_alone = 0
        self._is_alone = False

    @asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        """Be inside with others; those who want to be alone go first."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._is_alone and not self._wants_alone)
            self._inside += 1
        try:
            yield
        finally:
            await self._left()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Be inside with nobody else."""
        self._wants_alone += 1
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: not self._inside)
                self._inside += 1
                self._is_alone = True
        finally:
            self._wants_alone -= 1
        try:
            yield
        finally:
            self._is_alone = False
            await self._left()

    async def _left(self) -> None:
        async with self._changed:
            self._inside -= 1
            self._changed.notify_all()
