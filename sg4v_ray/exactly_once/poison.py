# SPDX-License-Identifier: Apache-2.0
"""Poison pills: rows that crash an engine are found by bisection; an innocent row is not rejected.

Ray restarts a dead actor and sends it the same rows again, without end. So the rows inside an
engine are recorded outside of it. A crash makes them one group of suspects; a group is run by
halves, each with the engine to itself, until a row crashes the engine alone. The loss of a node,
Ray's memory monitor and our own stop are no crashes.

    128 rows in one slice       1 crash together, then at most 7 of halves: 8
    128 rows in several slices  1 crash together, 1 of a whole slice, then at most 7 of halves: 9
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from typing import Final, NamedTuple, Protocol, TypeVar

_log = logging.getLogger(__name__)

REJECT_DETAIL: Final = (
    "the engine crashed {crashes} times with this image in its batch; the last crash was with this "
    "image alone"
)
"""`reject_detail` of a condemned row."""

Row = TypeVar("Row")
Outcome = TypeVar("Outcome")


class DeathCause(StrEnum):
    """Why the process of an engine ended."""

    CRASHED = "crashed"
    """By itself: an exit, an abort, a fault in native code. A row may be the cause."""
    NODE_LOST = "node_lost"
    """With its node: preemption, failure, scale-down."""
    MEMORY_MONITOR = "memory_monitor"
    """Killed by Ray, because its node was short of memory."""
    STOPPED = "stopped"
    """Intended: `ray.kill`, the end of a plan."""
    UNKNOWN = "unknown"
    """Not recorded, or a SIGTERM. The rows get one more try together; the second such death counts
    as a crash."""


class Life(NamedTuple):
    """A process of a restarted actor."""

    worker_id: str
    node_id: str


@dataclass(frozen=True, slots=True)
class Suspicion:
    """The state of a row that was inside an engine when it crashed."""

    group: int
    """Rows of one crash share a group."""
    size: int
    """Rows that are left in the group, those in other engines and parts included."""
    crashes: int
    """Crashes with this row inside, 1 or more."""
    is_condemned: bool = False
    """The last crash was with this row alone: it must not be run again."""


@dataclass(slots=True)
class _Inside:
    ids: set[str] = field(default_factory=set)
    is_probe: bool = False


class CrashTracker:
    """Records the rows inside each engine. It lives in an actor that no engine can take down.

    `died` must be called before the rows of a dead engine are sent again; rows that are sent
    earlier only cost more crashes.
    """

    def __init__(self) -> None:
        self._inside: dict[str, _Inside] = {}
        self._lives: dict[str, Life] = {}
        self._groups: dict[int, set[str]] = {}
        self._group_of: dict[str, int] = {}
        self._numbers = count(1)
        self._crashes: Counter[str] = Counter()
        self._doubtful: set[str] = set()
        """Rows that were inside at a death of unknown cause."""
        self._condemned: set[str] = set()
        """Kept when they leave: their part may be run again. Each has cost two crashes."""

    def previous_life(self, engine: str) -> Life | None:
        """Return the last life of an engine that reported its start; None for the first life."""
        return self._lives.get(engine)

    def started(self, engine: str, life: Life, previous_death: DeathCause | None) -> None:
        """Record a new life of an engine, and the death of the previous one.

        One call for both: if the new process dies before this call, the recorded process stays that
        of the suspects.
        """
        if previous_death is not None:
            self.died(engine, previous_death)
        self._lives[engine] = life

    def enter(self, engine: str, ids: Iterable[str]) -> dict[str, Suspicion]:
        """Record rows that go in together, unless there are suspects among them.

        Returns:
            The suspects, for `run_suspects`. If there are any, no row is recorded.
        """
        ids = list(ids)
        if suspects := self.suspicion(ids):
            return suspects
        inside = self._inside.get(engine)
        if inside is None or inside.is_probe:
            inside = self._inside[engine] = _Inside()
        inside.ids.update(ids)
        return {}

    def enter_probe(self, engine: str, ids: Iterable[str]) -> None:
        """Record suspects that have the engine to themselves."""
        self._inside[engine] = _Inside(set(ids), is_probe=True)

    def leave(self, engine: str, ids: Iterable[str]) -> None:
        """Clear rows that left an engine alive."""
        ids = set(ids)
        if (inside := self._inside.get(engine)) is not None:
            inside.ids -= ids
            if not inside.ids:
                del self._inside[engine]
        self._clear(ids)

    def suspicion(self, ids: Iterable[str]) -> dict[str, Suspicion]:
        """Return the suspects and the condemned rows among `ids`, in their order."""
        return {one: self._suspicion(one) for one in ids if self._is_suspect(one)}

    def died(self, engine: str, cause: DeathCause) -> None:
        """Record the death of an engine; a second report of the same death changes nothing."""
        self._lives.pop(engine, None)
        inside = self._inside.pop(engine, None)
        if inside is None:
            return
        _log.warning("engine %s died with %d rows inside: %s", engine, len(inside.ids), cause)
        if cause is DeathCause.CRASHED:
            self._blame(inside.ids, inside)
        elif cause is DeathCause.UNKNOWN:
            again = inside.ids & self._doubtful
            self._doubtful |= inside.ids
            self._blame(again, inside)

    def drop_engines(self) -> None:
        """Record that all engines were stopped, because the plan is built again."""
        self._inside.clear()
        self._lives.clear()

    def _is_suspect(self, key: str) -> bool:
        return key in self._group_of or key in self._condemned

    def _suspicion(self, key: str) -> Suspicion:
        if key in self._condemned:
            return Suspicion(0, 1, self._crashes[key], is_condemned=True)
        group = self._group_of[key]
        return Suspicion(group, len(self._groups[group]), self._crashes[key])

    def _blame(self, ids: set[str], inside: _Inside) -> None:
        """Make rows of one crash a group, which replaces the groups that they were in."""
        ids = ids - self._condemned
        if inside.is_probe:
            groups = {self._group_of[one] for one in ids if one in self._group_of}
            self._clear(set().union(*(self._groups[one] for one in groups)) - inside.ids)
        self._crashes.update(ids)
        self._doubtful -= ids
        self._ungroup(ids)
        if ids and inside.is_probe and len(inside.ids) == 1:
            _log.warning("condemned, crashes the engine: %s", ", ".join(ids))
            self._condemned |= ids
        elif ids:
            number = next(self._numbers)
            self._groups[number] = set(ids)
            self._group_of.update(dict.fromkeys(ids, number))

    def _clear(self, ids: Iterable[str]) -> None:
        ids = set(ids) - self._condemned
        self._ungroup(ids)
        self._doubtful -= ids
        for one in ids:
            self._crashes.pop(one, None)

    def _ungroup(self, ids: Iterable[str]) -> None:
        for one in ids:
            number = self._group_of.pop(one, None)
            if number is None:
                continue
            self._groups[number].discard(one)
            if not self._groups[number]:
                del self._groups[number]


def next_probe(suspects: Mapping[str, Suspicion]) -> list[str]:
    """Return the suspects to run next with the engine to themselves; none if none are left.

    One group at a time. If all of its rows are here, one half: the other half is judged by the
    outcome. If some are in other engines or parts, all rows that are here: a crash clears the
    others, and no crash clears these.
    """
    left = {key: one for key, one in suspects.items() if not one.is_condemned}
    if not left:
        return []
    first = next(iter(left.values()))
    here = [key for key, one in left.items() if one.group == first.group]
    return here if len(here) < first.size else here[: (len(here) + 1) // 2]


class TrackerClient(Protocol):
    """The calls of one engine to the tracker; the methods of `CrashTracker`, awaited."""

    async def enter(self, ids: list[str]) -> dict[str, Suspicion]:
        """See `CrashTracker.enter`."""

    async def enter_probe(self, ids: list[str]) -> None:
        """See `CrashTracker.enter_probe`."""

    async def leave(self, ids: list[str]) -> None:
        """See `CrashTracker.leave`."""

    async def suspicion(self, ids: list[str]) -> dict[str, Suspicion]:
        """See `CrashTracker.suspicion`."""


async def run_tracked(
    rows: Mapping[str, Row],
    *,
    run: Callable[[Sequence[Row]], Awaitable[Sequence[Outcome]]],
    condemn: Callable[[Row, str], Outcome],
    tracker: TrackerClient,
    lock: "SharedExclusiveLock",
) -> dict[str, Outcome]:
    """Run rows in an engine that other calls share; suspects first, with the engine to themselves.

    Rows that ran together stay recorded as inside: the caller calls `leave` with each row that
    left the engine alive, in one call with its other reports.

    Args:
        rows: by id.
        run: returns the outcomes of rows in their order. If the engine is dead it ends the process
            and does not raise: an error releases the lock, and another call would be blamed.
        condemn: makes the outcome of a condemned row; gets its `reject_detail`.
        lock: one for all calls of this engine.
    """
    outcomes: dict[str, Outcome] = {}
    while left := [key for key in rows if key not in outcomes]:
        async with lock.shared():
            # Inside the lock: rows that wait for it are not in the engine.
            suspects = await tracker.enter(left)
            if not suspects:
                outcomes.update(await _run(left, rows, run))
        if suspects:
            here = {key: rows[key] for key in suspects}
            async with lock.exclusive():
                found = await run_suspects(here, run=run, condemn=condemn, tracker=tracker)
            outcomes.update(found)
    return outcomes


async def run_suspects(
    rows: Mapping[str, Row],
    *,
    run: Callable[[Sequence[Row]], Awaitable[Sequence[Outcome]]],
    condemn: Callable[[Row, str], Outcome],
    tracker: TrackerClient,
) -> dict[str, Outcome]:
    """Probe suspects until each has an outcome or is cleared; nothing else is in the engine.

    Returns:
        The outcomes by id. Rows that another engine cleared meanwhile have none.
    """
    outcomes: dict[str, Outcome] = {}
    while True:
        # Each time: other engines run other rows of the same groups.
        suspects = await tracker.suspicion([key for key in rows if key not in outcomes])
        for key, one in suspects.items():
            if one.is_condemned:
                detail = REJECT_DETAIL.format(crashes=one.crashes)
                outcomes[key] = condemn(rows[key], detail)
        probe = next_probe(suspects)
        if not probe:
            return outcomes
        await tracker.enter_probe(probe)
        outcomes.update(await _run(probe, rows, run))
        # Before the next probe, which may crash.
        await tracker.leave(probe)


async def _run(
    keys: list[str],
    rows: Mapping[str, Row],
    run: Callable[[Sequence[Row]], Awaitable[Sequence[Outcome]]],
) -> dict[str, Outcome]:
    return dict(zip(keys, await run([rows[key] for key in keys]), strict=True))


class SharedExclusiveLock:
    """Many shared holders or one exclusive holder; exclusive waiters go first. For one event loop.

    A holder must not acquire it again.
    """

    def __init__(self) -> None:
        self._holders = self._exclusive_waiters = 0
        self._is_exclusive = False
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Hold the lock together with other shared holders."""
        while self._is_exclusive or self._exclusive_waiters:
            await self._changed.wait()
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            self._wake()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Hold the lock alone."""
        self._exclusive_waiters += 1
        try:
            while self._is_exclusive or self._holders:
                await self._changed.wait()
            self._is_exclusive = True
        finally:
            self._exclusive_waiters -= 1
            self._wake()
        try:
            yield
        finally:
            self._is_exclusive = False
            self._wake()

    def _wake(self) -> None:
        """Let all waiters check their condition again."""
        self._changed.set()
        self._changed = asyncio.Event()
