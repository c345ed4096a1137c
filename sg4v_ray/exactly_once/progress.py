# SPDX-License-Identifier: Apache-2.0
"""Progress of one job: the reports of its work actors, added up in one Ray actor."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import ray
from ray.util.metrics import Counter as MetricCounter
from ray.util.metrics import Gauge

from sg4v_ray.core import observe
from sg4v_ray.exactly_once.poison import CrashTracker, DeathCause, Life, Suspicion
from sg4v_ray.inference.engine import EngineStats

_HEARTBEAT_S, _SAMPLES = 2.0, 8
ALIVE_S = 10.0
"""An actor without a heartbeat for this long counts as gone."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The load of one actor; sent every few seconds."""

    running: int
    """Requests in its decoding batch."""
    waiting: int
    """Requests that wait inside the engine."""
    busy_rate: float
    """Share of the time since the last heartbeat with requests running, 0 to 1."""


@dataclass(slots=True)
class Progress:
    """Counts since this run started. Rows of a part that ran twice count twice."""

    rows: int = 0
    last_s: float = 0.0
    """Monotonic clock of the driver's machine at the last finished row."""
    tokens: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    actors: int = 0
    """Actors with a recent heartbeat, loading actors included."""
    ready_actors: int = 0
    """Actors that accept rows."""
    held_s: float = 0.0
    """Billed time: seconds for which actors held their resources, summed over the actors."""
    actor_s: float = 0.0
    """Seconds for which actors accepted rows, summed over the actors."""
    queue: int = 0
    """Requests that wait inside the engines."""
    busy_rate: float = 0.0
    """Mean over the ready actors."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Throughput of one run, from the first ready actor to the last row; None without rows.

    A window from the first to the last row would give too high a rate: the first rows of an engine
    all finish late and together.
    """

    rows_in_last_run: int = 0
    rows_per_s: float | None = None


@dataclass(slots=True)
class _Actor:
    began_s: float
    heard_s: float
    ready_s: float | None = None
    earlier_s: float = 0.0
    """Seconds for which it accepted rows before its last restart."""
    heartbeat: Heartbeat = Heartbeat(0, 0, 0.0)

    @property
    def useful_s(self) -> float:
        """Seconds for which it accepted rows."""
        return self.earlier_s + (0.0 if self.ready_s is None else self.heard_s - self.ready_s)


async def send_heartbeats(
    progress: "ray.actor.ActorHandle[ProgressActor]",
    engine: str,
    stats: Callable[[], EngineStats | None],
) -> None:
    """Report every few seconds that an actor is alive; `stats` returns None while it loads."""
    while True:
        busy = 0
        for _ in range(_SAMPLES):
            await asyncio.sleep(_HEARTBEAT_S / _SAMPLES)
            now = stats()
            busy += now is not None and now.running > 0
        heartbeat = None if now is None else Heartbeat(now.running, now.waiting, busy / _SAMPLES)
        progress.heartbeat.remote(engine, heartbeat)


class ProgressActor:
    """Ray actor that adds up the reports of the work actors and exports them to Prometheus.

    It also tracks crashes, because no engine can take it down: it runs on the driver's node.
    """

    def __init__(self, artifact: str) -> None:
        self._progress, self._crashes = Progress(), CrashTracker()
        self._actors: dict[str, _Actor] = {}
        self._earlier = Progress()
        """Seconds of the actors of earlier pools."""
        self._ready_s: float | None = None
        self._labels = {"artifact": artifact}
        self._rows, self._tokens, self._rejected, self._engine_s = (
            MetricCounter(one.name, one.description, one.labels)
            for one in (observe.ROWS, observe.TOKENS, observe.ROWS_REJECTED, observe.ENGINE_S)
        )
        self._queue, self._busy, self._alive = (
            Gauge(one.name, one.description, one.labels)
            for one in (observe.QUEUE, observe.BUSY, observe.ACTORS)
        )

    def heartbeat(self, engine: str, heartbeat: Heartbeat | None) -> None:
        """Record that an actor is alive; `heartbeat` is None while it loads."""
        now = time.monotonic()
        actor = self._actors.setdefault(engine, _Actor(now, now))
        actor.heard_s = now
        if heartbeat is not None:
            actor.heartbeat = heartbeat

    def ready(self, engine: str) -> None:
        """Record that a work actor accepts rows."""
        now = time.monotonic()
        self._ready_s = self._ready_s or now
        self._actors.setdefault(engine, _Actor(now, now)).ready_s = now

    def finish(
        self,
        engine: str,
        ids: list[str],
        *,
        rows: int,
        tokens: int,
        rejects: list[str],
        engine_s: float,
    ) -> None:
        """Count the rows, generated tokens, reject reasons and engine seconds of one slice.

        Args:
            engine: the actor that finished them.
            ids: rows of any slice that left the engine alive; see `CrashTracker.leave`.
        """
        self._crashes.leave(engine, ids)
        self._progress.last_s = time.monotonic()
        self._progress.rows += rows
        self._progress.tokens += tokens
        self._progress.rejects.update(rejects)
        self._rows.inc(rows, self._labels)
        if tokens:
            self._tokens.inc(tokens, self._labels)
        if engine_s:
            self._engine_s.inc(engine_s, self._labels)
        for reason in rejects:
            self._rejected.inc(1, {**self._labels, "reason": reason})

    def enter(self, engine: str, ids: list[str], finished: list[str]) -> dict[str, Suspicion]:
        """See `CrashTracker.enter`.

        Args:
            finished: rows that left the engine alive. Other rows of their slices are still inside;
                without this report a crash would make suspects of the finished rows too.
        """
        self._crashes.leave(engine, finished)
        return self._crashes.enter(engine, ids)

    def enter_probe(self, engine: str, ids: list[str]) -> None:
        """See `CrashTracker.enter_probe`."""
        self._crashes.enter_probe(engine, ids)

    def leave(self, engine: str, ids: list[str]) -> None:
        """See `CrashTracker.leave`."""
        self._crashes.leave(engine, ids)

    def suspicion(self, ids: list[str]) -> dict[str, Suspicion]:
        """See `CrashTracker.suspicion`."""
        return self._crashes.suspicion(ids)

    def previous_life(self, engine: str) -> Life | None:
        """See `CrashTracker.previous_life`."""
        return self._crashes.previous_life(engine)

    def report_start(self, engine: str, life: Life, previous_death: DeathCause | None) -> None:
        """Record the start of an actor's process, and the death of its previous process."""
        self._crashes.started(engine, life, previous_death)
        now = time.monotonic()
        # Paid for from here on, while the weights are still being fetched.
        actor = self._actors.setdefault(engine, _Actor(now, now))
        if actor.ready_s is not None:
            actor.earlier_s += actor.heard_s - actor.ready_s
            actor.ready_s = None

    def drop_pool(self) -> None:
        """Record that all actors so far are gone, because the plan is built again."""
        self._crashes.drop_engines()
        self._earlier = self.read()
        self._actors.clear()

    def read(self) -> Progress:
        """Return the counts so far."""
        now = time.monotonic()
        alive = [one for one in self._actors.values() if now - one.heard_s < ALIVE_S]
        ready = [one for one in alive if one.ready_s is not None]
        busy = sum(one.heartbeat.busy_rate for one in ready) / len(ready) if ready else 0.0
        queue = sum(one.heartbeat.waiting for one in ready)
        self._queue.set(queue, self._labels)
        self._busy.set(busy, self._labels)
        self._alive.set(len(alive), self._labels)
        return replace(
            self._progress,
            actors=len(alive),
            ready_actors=len(ready),
            held_s=self._earlier.held_s
            + sum(one.heard_s - one.began_s for one in self._actors.values()),
            actor_s=self._earlier.actor_s + sum(one.useful_s for one in self._actors.values()),
            queue=queue,
            busy_rate=busy,
        )

    def speed(self) -> Speed:
        """Return the throughput so far."""
        rows = self._progress.rows
        if self._ready_s is None or not rows:
            return Speed()
        return Speed(rows, round(rows / max(1e-3, self._progress.last_s - self._ready_s), 2))
